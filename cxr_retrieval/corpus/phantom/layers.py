"""The healthy chest as attenuation maps: each function returns one organ's share, float32 [S, S].

One unit is about the attenuation of a whole trunk; maps add up as thickness does along a ray.
"""

import cv2
import numpy as np

from cxr_retrieval.corpus.phantom.anatomy import SIDES, Layout
from cxr_retrieval.corpus.phantom.canvas import Canvas, curve, ribbon

Layer = np.ndarray


def body(canvas: Canvas, layout: Layout) -> Layer:
    """Skin to skin: trunk, neck, shoulders and upper arms, thin at their rims; thicker towards the abdomen."""
    anatomy, arms = layout.anatomy, layout.exposure.arms
    layer = canvas.empty()
    top = layout.apex + anatomy.shoulder
    wall = layout.half_width + anatomy.wall
    out = 0.06 * arms
    for side in SIDES:
        trunk = curve([
            (wall * 1.04, top + 0.36), (wall * 1.005, top + 0.46), (wall * 0.99, layout.base - 0.06),
            (wall * 0.99, 1.0), (wall * 0.99, 1.2),
        ])  # fmt: skip
        neck = curve([
            (0.092, -0.25), (0.092, top - 0.17), (0.112, top - 0.11), (0.18, top - 0.066), (0.29, top - 0.042),
            (0.40, top - 0.012), (0.49 + out, top + 0.05), (0.56 + out, top + 0.17), (0.62 + out, top + 0.5),
        ])  # fmt: skip
        armpit = curve([
            (0.66 + 3 * out, 1.2), (0.53 + 3 * out, 1.2), (0.515 + 2 * out, 0.90), (0.485 + 1.5 * out, top + 0.56),
            (wall * 1.04 + 0.026, top + 0.42), (wall * 1.04, top + 0.37),
        ])  # fmt: skip
        outline = np.vstack([[(0, -0.25)], neck, armpit, trunk, [(0, 1.2)]])
        canvas.fill(layer, layout.place(side, outline))
    mask = canvas.blur(layer, 0.0015)
    # A round cross-section: thickness grows like a root from the skin line.
    rim = cv2.pow(np.clip(canvas.blur(layer, 0.07) * 2 - 0.85, 0.02, 1.0), 0.52) * mask
    across = (canvas.x - np.float32(layout.middle)) * np.float32(1 / wall)
    depth = 0.595 + 0.42 * np.maximum(canvas.y, 0.1) - 0.18 * np.minimum(across * across, 1.2)
    return rim * depth * np.float32(anatomy.girth)


def abdomen(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> Layer:
    """Liver and bowel below the domes, with the stomach bubble."""
    result = np.zeros((canvas.size, canvas.size), dtype=np.float32)
    offsets = np.linspace(0, 0.995, 40) * layout.half_width
    for side in SIDES:
        edge = np.stack([offsets, layout.dome(side, offsets)], axis=1)
        outline = np.vstack([edge, [(layout.half_width, 1.3), (0, 1.3)]])
        result += canvas.shape(layout.place(side, outline), 0.03) * np.float32(0.20 if side < 0 else 0.16)
    offset, depth, radius = layout.anatomy.gas
    if radius > 0:
        radius *= rng.uniform(0.7, 1.2)
        y = float(layout.dome(1, offset)) + depth
        ring = curve([
            (offset - 1.5 * radius, y), (offset - 0.7 * radius, y - 0.75 * radius),
            (offset + radius, y - 0.7 * radius), (offset + 1.7 * radius, y + 0.2 * radius),
            (offset + 0.4 * radius, y + 0.55 * radius),
        ], 8, closed=True)  # fmt: skip
        result -= canvas.shape(layout.place(1, ring), 0.006) * np.float32(0.42)
    loops = canvas.empty()
    for _ in range(int(rng.integers(0, 9))):
        x, y = rng.uniform(0.0, 0.27), layout.base + rng.uniform(0.02, 0.15)
        wide, tall = rng.uniform(0.012, 0.035), rng.uniform(0.010, 0.022)
        ring = curve([(x - wide, y), (x, y - tall), (x + wide, y), (x, y + tall)], 6, closed=True)
        canvas.fill(loops, layout.place(1, ring), int(rng.integers(90, 220)))
    return result - canvas.blur(loops, 0.004) * np.float32(0.30)


def heart(canvas: Canvas, layout: Layout) -> Layer:
    """Heart, great vessels and mediastinum as the share of lung depth they take, 0..1."""
    radius, knob_y = layout.anatomy.knob, layout.carina - 0.035
    silhouette = canvas.empty()
    canvas.fill(silhouette, layout.heart())
    angle = np.linspace(0, 2 * np.pi, 40)
    knob = np.stack([0.040 + radius * np.cos(angle), knob_y + 1.1 * radius * np.sin(angle)], axis=1)
    top = layout.apex
    upper = curve([(0.062, -0.1), (0.052, top), (0.046, top + 0.10), (0.05, knob_y), (0.05, layout.carina + 0.05)])
    canvas.fill(silhouette, layout.place(1, np.vstack([[(0, -0.1)], upper, [(0, layout.carina + 0.05)]])))
    canvas.fill(
        silhouette,
        layout.place(-1, np.vstack([[(0, -0.1)], upper * (1.06, 1), [(0, layout.carina + 0.05)]])),
    )
    canvas.fill(silhouette, layout.place(1, knob))
    edge = canvas.blur(silhouette, 0.0045)
    core = canvas.blur(silhouette, 0.035)
    return edge * np.clip(0.72 + 0.60 * (core - 0.5), 0.45, 0.97)


def aorta(canvas: Canvas, layout: Layout) -> Layer:
    """The knob's dense rim and the line of the descending aorta beside the spine."""
    y = layout.carina - 0.035
    reach = layout.anatomy.knob + 0.036
    line = curve([(0.02, y - 0.02), (reach, y), (0.062, y + 0.10), (0.055, y + 0.25), (0.040, y + 0.42)])
    left, right = ribbon(line, 0.02)
    return canvas.shape(layout.place(1, np.vstack([left, right[::-1]])), 0.006) * np.float32(0.07)


def airways(canvas: Canvas, layout: Layout) -> Layer:
    """Trachea and main bronchi: air to be taken away from the mediastinum."""
    layer = canvas.empty()
    lean, y = layout.anatomy.lean * 1.5 - 0.004, layout.carina
    trachea = np.array([(lean * 0.2, -0.1), (lean * 0.6, y - 0.18), (lean, y - 0.05), (lean, y)])
    canvas.stroke(layer, [curve(layout.place(1, trachea))], 0.033, 255)
    right = [(lean, y - 0.01), (lean - 0.045, y + 0.055), (lean - 0.075, y + 0.11)]
    left = [(lean, y - 0.01), (lean + 0.055, y + 0.045), (lean + 0.10, y + 0.075)]
    canvas.stroke(layer, [curve(layout.place(1, right)), curve(layout.place(1, left))], 0.021, 150)
    return canvas.blur(layer, 0.005) * np.float32(0.19)


def spine(canvas: Canvas, layout: Layout) -> Layer:
    """Vertebral bodies with end plates, pedicles and spinous processes; the discs between stay darker."""
    bodies, details = canvas.empty(), canvas.empty()
    bow = layout.tilt()
    # K vertebrae, each a little taller than the one above.
    gap = 0.043 + 0.0014 * np.arange(21)
    top = np.cumsum(gap) - gap - 0.06
    half, middle, tall = 0.030 + 0.010 * np.clip(top, 0, 1), bow * np.sin(3 * top), gap * 0.80

    def per_vertebra(*pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return layout.place(1, np.array(pairs).transpose(2, 0, 1))

    waist, bottom = top + tall / 2, top + tall
    upper = per_vertebra((middle - half, top), (middle + half, top))
    lower = per_vertebra((middle + half, bottom), (middle - half, bottom))
    waists = per_vertebra((middle + half * 0.88, waist), (middle - half * 0.88, waist))
    canvas.fill(bodies, np.concatenate([upper, waists[:, :1], lower, waists[:, 1:]], axis=1), 210)
    canvas.stroke(details, np.concatenate([upper, lower]), 0.004, 120)
    angle = np.linspace(0, 2 * np.pi, 14)
    ring = np.stack([0.006 * np.cos(angle), 0.010 * np.sin(angle)], axis=1)
    for side in SIDES:
        pedicle = per_vertebra((middle + side * half * 0.62, top + tall * 0.42))
        canvas.stroke(details, pedicle + ring, 0.003, 130)
        reach = (middle + side * (half + 0.024), top + 0.16 * tall)
        canvas.stroke(bodies, per_vertebra((middle + side * half, top + 0.3 * tall), reach), 0.012, 90)
    canvas.stroke(
        details, per_vertebra((middle, top + tall * 0.75), (middle + bow * 0.2, top + gap * 1.12)), 0.007, 170
    )
    density = np.float32(layout.anatomy.bone)
    # Muscle, sternum and great vessels in front of and behind the column: a wide soft band.
    bulk = np.exp(-(((canvas.x - np.float32(layout.middle)) / np.float32(0.062)) ** 2)) * np.float32(0.12)
    return (
        bulk
        + (canvas.blur(bodies, 0.003) * np.float32(0.105) + canvas.blur(details, 0.0014) * np.float32(0.06)) * density
    )


def cage(canvas: Canvas, layout: Layout) -> Layer:
    """Ribs and clavicles: faint bands between two brighter cortical lines."""
    back, front, keys = canvas.empty(), canvas.empty(), canvas.empty()
    width = layout.anatomy.rib_width
    for side in SIDES:
        posterior, anterior = layout.ribs(side)
        # Bands thin out at their ends, where the rib turns out of the plane.
        taper = np.interp(np.linspace(0, 1, posterior.shape[1]), [0, 0.08, 0.82, 1], [0.7, 1.12, 1.1, 0.35]) * width
        canvas.band(back, posterior, taper * np.where(np.arange(11) < 9, 1.0, 0.78)[:, None], 135, 225)
        canvas.band(
            front, anterior, np.interp(np.arange(anterior.shape[1]), [0, 5, 32], [0.35, 1.05, 1.35]) * width, 95, 165
        )
        y, shoulder = layout.apex + 0.145 * layout.height, layout.apex + layout.anatomy.shoulder
        key = curve([
            (0.036, y + 0.012), (0.085, y - 0.004), (0.17, y - 0.040), (0.26, shoulder + 0.038),
            (0.36, shoulder + 0.014), (0.44, shoulder + 0.022),
        ])  # fmt: skip
        half = np.interp(
            np.linspace(0, 1, len(key)),
            [0, 0.05, 0.15, 0.5, 0.85, 0.97, 1],
            [0.007, 0.016, 0.0135, 0.0115, 0.013, 0.012, 0.006],
        )
        canvas.band(keys, layout.place(side, key)[None], half, 130, 220)
    # The front ends of the ribs are cartilage: they fade before the sternum.
    offset = np.abs(canvas.x - np.float32(layout.middle))
    fade = np.clip((offset - 0.13) / 0.10, 0, 1)
    density = np.float32(layout.anatomy.bone)
    bones = canvas.blur(back, 0.0014) * np.float32(0.15) + canvas.blur(front, 0.0018) * (np.float32(0.08) * fade)
    return (bones + canvas.blur(keys, 0.0016) * np.float32(0.21)) * density


def shoulders(canvas: Canvas, layout: Layout) -> Layer:
    """Scapulae beside (PA) or over (AP) the upper lungs, and the heads of the humeri."""
    plates, lines = canvas.empty(), canvas.empty()
    top = layout.apex + layout.anatomy.shoulder
    inward = 0.06 * (1 - layout.exposure.arms)
    w = layout.half_width
    spread = 0.03 * layout.exposure.arms
    for side in SIDES:
        blade = curve([
            (0.445, top + 0.085), (0.40, top + 0.045), (0.86 * w - inward, top + 0.055),
            (0.82 * w - inward, top + 0.20), (0.90 * w - inward, top + 0.36), (0.98 * w - 0.5 * inward, top + 0.33),
            (0.405, top + 0.16),
        ], 6, closed=True)  # fmt: skip
        placed = layout.place(side, blade)
        canvas.fill(plates, placed, 70)
        canvas.stroke(lines, [np.vstack([placed, placed[:1]])], 0.005, 150)
        ridge = curve([(0.80 * w - inward, top + 0.10), (0.36, top + 0.060), (0.455, top + 0.022)])
        canvas.stroke(lines, [layout.place(side, ridge)], 0.016, 100)
        angle = np.linspace(0, 2 * np.pi, 30)
        head = np.stack([0.478 + spread + 0.045 * np.cos(angle), top + 0.085 + 0.047 * np.sin(angle)], axis=1)
        shaft = curve([
            (0.495 + spread, top + 0.10), (0.525 + 1.8 * spread, top + 0.24), (0.545 + 4 * spread, top + 0.55),
            (0.55 + 6 * spread, 1.1),
        ])  # fmt: skip
        canvas.fill(plates, layout.place(side, head), 165)
        canvas.band(plates, layout.place(side, shaft)[None], 0.019, 130, 220)
    density = np.float32(layout.anatomy.bone)
    return (canvas.blur(plates, 0.0022) * np.float32(0.22) + canvas.blur(lines, 0.0025) * np.float32(0.11)) * density


def breasts(canvas: Canvas, layout: Layout) -> Layer:
    """Two domes of soft tissue over the bases, sharpest at their lower rim; zero without breasts."""
    size = layout.anatomy.breast
    if size <= 0:
        return np.zeros((canvas.size, canvas.size), dtype=np.float32)
    radius = 0.105 + 0.055 * size
    # Smooth enough for half the resolution.
    half = (canvas.size // 2, canvas.size // 2)
    grid_x, grid_y = (cv2.resize(grid, half, interpolation=cv2.INTER_AREA) for grid in (canvas.x, canvas.y))
    cy = layout.base - 0.125 + 0.06 * size
    dy = (grid_y - np.float32(cy)) / np.float32(radius)
    # Long above, round below.
    dy = np.maximum(dy, dy * np.float32(-0.55))
    total = np.zeros_like(grid_x)
    for side in SIDES:
        dx = (grid_x - np.float32(layout.middle + side * 0.60 * layout.half_width)) / np.float32(radius * 1.08)
        total += np.sqrt(np.sqrt(np.maximum(1 - dx * dx - dy * dy, 0))) * np.float32(0.07 + 0.08 * size)
    full = cv2.resize(total, (canvas.size, canvas.size), interpolation=cv2.INTER_LINEAR)
    return canvas.blur(full, 0.003)


def vessels(canvas: Canvas, layout: Layout) -> Layer:
    """Arteries and veins from the hila, five generations, not yet cut to the lungs."""
    layer = canvas.empty()
    widths = (0.0105, 0.0062, 0.0040, 0.0027, 0.0019)
    values = (190, 150, 115, 85, 60)
    stretch = (layout.half_width / 0.36, layout.height / 0.74)
    for side, generations in reversed(list(zip(SIDES, layout.anatomy.vessels, strict=True))):
        x, y = layout.hilum(side)
        for generation in range(4, -1, -1):
            lines = generations[generation] * np.array([side * stretch[0], stretch[1]]) + np.array([x, y])
            width = widths[generation] * (1 - 0.35 * layout.flat)
            canvas.stroke(layer, lines, width, values[generation])
    hazy = canvas.empty()
    for side in SIDES:
        x, y = layout.hilum(side)
        blob = curve(
            [(x - 0.022, y - 0.045), (x + 0.022, y - 0.03), (x + 0.020, y + 0.03), (x - 0.012, y + 0.065)],
            6,
            closed=True,
        )
        canvas.fill(hazy, blob, 255)
    return canvas.blur(layer, 0.0016) * np.float32(0.135) + canvas.blur(hazy, 0.02) * np.float32(0.15)
