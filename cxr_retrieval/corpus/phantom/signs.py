"""The radiographic sign of each finding, drawn into a scene with its box.

A sign's random state comes from the patient and the finding alone: the same nodule lies at the same place in every
follow-up, and only its severity (0 subtle .. 1 plain) changes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from cxr_retrieval.corpus.phantom.anatomy import SIDES, Deformation
from cxr_retrieval.corpus.phantom.canvas import curve, irregular_ring, ribbon
from cxr_retrieval.corpus.phantom.film import Scene


@dataclass(frozen=True)
class Sign:
    """One finding of one image. `seed` keeps place and shape over a patient's follow-ups."""

    finding: str
    severity: float
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def deformation(signs: list[Sign]) -> Deformation:
    """How these signs together change heart, domes and mediastinum."""
    ratio, flatten, pull = None, 0.0, 0.0
    raised = {-1: 0.0, 1: 0.0}
    for sign in signs:
        side = _side(sign.rng())
        if sign.finding == "Cardiomegaly":
            ratio = 0.505 + 0.175 * sign.severity
        elif sign.finding == "Emphysema":
            flatten = 0.10 + 0.85 * sign.severity
        elif sign.finding == "Atelectasis":
            raised[side] += 0.055 * sign.severity
            pull += side * 0.016 * sign.severity
        elif sign.finding == "Fibrosis":
            raised = {both: rise + 0.02 * sign.severity for both, rise in raised.items()}
        elif sign.finding == "Pneumothorax":
            pull -= side * 0.02 * max(0.0, sign.severity - 0.4)
        elif sign.finding == "Effusion":
            pull -= side * 0.012 * max(0.0, sign.severity - 0.5)
    if ratio is not None:
        flatten *= 0.4
    return Deformation(ratio, flatten, (raised[-1], raised[1]), pull)


def draw_sign(scene: Scene, sign: Sign) -> None:
    """Draw one sign and append its box or boxes to the scene."""
    _DRAW[sign.finding](scene, sign.severity, sign.rng())


def _side(rng: np.random.Generator) -> int:
    """The first number of every sign's random state: its side."""
    return -1 if rng.random() < 0.54 else 1


def _spot(rng: np.random.Generator, side: int, height: float) -> tuple[float, float]:
    """`height` and a lateral position beside the heart, where a soft opacity can be seen."""
    inner = 0.40 + (0.22 if side > 0 and height > 0.45 else 0.0)
    return height, rng.uniform(inner, 0.78)


def _ramp(value: np.ndarray) -> np.ndarray:
    return np.clip(value, 0, 1)


def _patch(
    scene: Scene, centre: tuple[float, float], radii: tuple[float, float], rng: np.random.Generator, soft: float
) -> np.ndarray:
    """An irregular region with a soft rim, float32 [S, S]."""
    return scene.canvas.shape(irregular_ring(rng, centre, radii, 0.32), soft)


def _bronchogram(
    scene: Scene, side: int, centre: tuple[float, float], reach: float, rng: np.random.Generator
) -> np.ndarray:
    """Dark branching airways from the hilum through a dense patch: the share of density they take away."""
    layer = scene.canvas.empty()
    hilum = np.array(scene.layout.hilum(side))
    for spread in (-0.55, 0.0, 0.5):
        axis = np.array(centre) - hilum
        angle = math.atan2(axis[1], axis[0]) + 0.5 * spread
        start = hilum + 0.35 * axis
        end = np.array(centre) + reach * np.array([math.cos(angle + spread), math.sin(angle + spread)])
        bend = (start + end) / 2 + rng.normal(0, 0.008, 2)
        scene.canvas.stroke(layer, [curve([tuple(start), tuple(bend), tuple(end)])], 0.0085, 255)
    return scene.canvas.blur(layer, 0.0022)


def _atelectasis(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    side = _side(rng)
    canvas, layout = scene.canvas, scene.layout
    lobar = rng.random() < 0.4
    if lobar:
        # Collapsed lower lobe: a wedge along the spine with a straight outer edge.
        reach = rng.uniform(0.45, 0.62) * layout.half_width * (0.75 + 0.35 * severity)
        top = layout.hilum(side)[1] + rng.uniform(-0.01, 0.03)
        floor = layout.base + 0.02
        wedge = layout.place(side, curve([
            (0.03, top), (0.35 * reach + 0.03, top + 0.3 * (floor - top)), (reach, floor), (0.02, floor),
        ], 6)[:-1])  # fmt: skip
        area = canvas.shape(wedge, 0.005)
        scene.fill(area * (0.22 + 0.70 * severity))
        # The heart is as dense as the wedge: what shows behind it is the added thickness.
        scene.lines += area * np.float32(0.02 + 0.14 * severity) * scene.lung
    else:
        layer = canvas.empty()
        height, slant = rng.uniform(0.84, 0.93), rng.uniform(-0.25, 0.35) * side
        for _ in range(1 + int(rng.random() < 0.65)):
            x, y = layout.point(side, height, rng.uniform(0.55, 0.70))
            length, tilt = rng.uniform(0.075, 0.12) * (0.8 + 0.4 * severity), slant + rng.normal(0, 0.08)
            line = curve(
                [(x - length, y - tilt * length), (x, y + rng.normal(0, 0.008)), (x + length, y + tilt * length)]
            )
            swell = np.sin(np.linspace(0, math.pi, len(line))) ** 0.6 * (0.003 + 0.011 * severity) + 0.001
            one, other = ribbon(line, swell)
            canvas.fill(layer, np.vstack([one, other[::-1]]))
            height -= rng.uniform(0.08, 0.15)
        plates = canvas.blur(layer, 0.0035)
        area = canvas.blur(layer, 0.02)
        scene.fill(plates * (0.28 + 0.55 * severity) + area * (0.08 + 0.42 * severity))
        area = plates
    scene.mark("Atelectasis", area * scene.lungs[side], 0.3)


def _cardiomegaly(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    # The shape comes from `deformation`; congested hila go with it.
    layer = scene.canvas.empty()
    scene.canvas.fill(layer, scene.layout.heart())
    below = scene.canvas.pixels(np.array([[scene.layout.middle, scene.layout.carina + 0.01]]))[0, 1]
    layer[: max(0, int(below))] = 0
    scene.vessel_gain *= np.float32(1 + 0.2 * severity * rng.random())
    scene.mark("Cardiomegaly", layer, 127, 0.0)


def _effusion(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    first = _side(rng)
    both = rng.random() < 0.4
    canvas, layout = scene.canvas, scene.layout
    for side in (first, -first) if both else (first,):
        size = severity * (1.0 if side == first else rng.uniform(0.3, 0.8))
        # The fluid level climbs at the chest wall: a meniscus.
        depth = layout.dome_height * (0.38 + 0.20 * size) + 0.27 * size**1.4
        lateral = _ramp((canvas.x - layout.middle) * side / layout.half_width)
        level = layout.base - depth * (0.52 + 0.22 * lateral + 0.55 * lateral**6)
        soft = 0.022 if layout.exposure.view == "PA" else 0.05
        area = _ramp((canvas.y - level) / soft + 0.5) * scene.lungs[side]
        scene.fill(area * (0.55 + 0.41 * min(1.0, 2.5 * size)))
        scene.lines += area * np.float32(0.08 * size)
        if layout.exposure.view == "AP":
            # Lying patients: the fluid spreads behind the lung as a veil.
            scene.fill(scene.lungs[side] * _ramp((canvas.y - layout.apex) / layout.height) * (0.02 + 0.32 * size))
        scene.mark("Effusion", area, 0.4)


def _infiltration(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    first = _side(rng)
    sides = (first, -first) if rng.random() < 0.4 else (first,)
    canvas, layout = scene.canvas, scene.layout
    for side in sides:
        centre = layout.point(side, *_spot(rng, side, rng.uniform(0.45, 0.85)))
        size = rng.uniform(0.07, 0.11) * (0.85 + 0.4 * severity)
        area = _patch(scene, centre, (size, size * rng.uniform(0.9, 1.5)), rng, 0.028)
        mottle = _ramp(0.55 + 0.42 * canvas.clouds(rng, 0.028) + 0.22 * canvas.clouds(rng, 0.012))
        scene.fill(area * mottle * (0.10 + 0.58 * severity))
        scene.mark("Infiltration", area * scene.lungs[side], 0.4)


def _round(
    scene: Scene, side: int, radius: float, density: float, rng: np.random.Generator, roughness: float
) -> np.ndarray:
    """A solid ball: denser in its middle than at its rim."""
    x, y = scene.layout.point(side, *_spot(rng, side, rng.uniform(0.2, 0.82)))
    area = scene.canvas.shape(irregular_ring(rng, (x, y), (radius, radius), roughness), 0.0055)
    distance = ((scene.canvas.x - np.float32(x)) ** 2 + (scene.canvas.y - np.float32(y)) ** 2) / np.float32(radius**2)
    ball = area * np.sqrt(np.clip(1.1 - 0.85 * distance, 0.12, 1))
    scene.fill(ball * min(density, 1.0))
    # Not cut to the lung: a ball behind the heart or dome still adds its thickness.
    scene.lines += ball * np.float32(0.06 * density)
    return area


def _mass(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    radius = 0.034 + 0.050 * severity
    area = _round(scene, _side(rng), radius, 0.18 + 0.60 * severity, rng, rng.uniform(0.06, 0.2))
    scene.mark("Mass", area, 0.5)


def _nodule(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    side = _side(rng)
    for _ in range(1 + int(rng.geometric(0.6) - 1) % 4):
        radius = (0.012 + 0.019 * severity) * rng.uniform(0.85, 1.15)
        area = _round(scene, side, radius, 0.25 + 0.53 * severity, rng, 0.04)
        scene.mark("Nodule", area, 0.4)
        side = -side if rng.random() < 0.5 else side


def _pneumonia(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    side = _side(rng)
    height = float(rng.choice([0.3, 0.7, 0.8])) + rng.uniform(-0.06, 0.06)
    centre = scene.layout.point(side, *_spot(rng, side, height))
    size = rng.uniform(0.075, 0.105) * (0.85 + 0.45 * severity)
    area = _patch(scene, centre, (size, size * rng.uniform(0.8, 1.15)), rng, 0.017)
    mottle = _ramp(0.82 + 0.2 * scene.canvas.clouds(rng, 0.03))
    airways = _bronchogram(scene, side, centre, 0.8 * size, rng)
    scene.fill(area * mottle * (0.14 + 0.62 * severity) * (1 - 0.35 * airways))
    scene.mark("Pneumonia", area * scene.lungs[side], 0.4)


def _pneumothorax(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    side = _side(rng)
    canvas, layout = scene.canvas, scene.layout
    gap = 0.012 + 0.165 * severity**1.3
    # The lung falls towards its hilum, most at the apex, with a visible pleural edge.
    outline = layout.lung(side)
    offset = (outline[:, 0] - layout.middle) * side
    down = np.clip((outline[:, 1] - layout.apex) / layout.height, 0, 1)
    inward = gap * (1.05 - 0.75 * down * (1 - 0.6 * severity)) * np.clip(offset / (0.35 * layout.half_width), 0, 1)
    lowered = np.clip(1 - down / 0.35, 0, 1) * gap * 0.95
    edge = np.stack([layout.middle + side * (offset - inward), outline[:, 1] + lowered], axis=1)
    lung = scene.lungs[side]
    inside = canvas.shape(edge, 0.0015)
    free = lung * (1 - inside) * (canvas.y < np.float32(layout.base - 0.02))
    scene.vessel_gain *= 1 - free
    # Free air is darker than lung; the fallen lung is denser.
    scene.filled = scene.filled * (1 - free) - free * np.float32(0.04 + 0.14 * severity)
    scene.fill(lung * inside * np.float32(0.02 + 0.34 * severity))
    line = canvas.empty()
    canvas.stroke(line, [edge[3 : len(edge) - 38]], 0.0042, 255)
    scene.lines += canvas.blur(line, 0.0009) * lung * np.float32(0.05 + 0.09 * severity)
    scene.mark("Pneumothorax", free, 0.5, 0.0)


def _consolidation(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    side = _side(rng)
    canvas, layout = scene.canvas, scene.layout
    upper = rng.random() < 0.4
    # A whole lobe up to its fissure: the border on that side is straight and sharp.
    x, fissure = layout.point(side, rng.uniform(0.46, 0.54), 0.5)
    slope = rng.uniform(-0.15, 0.25) * side
    away = (canvas.y - np.float32(fissure) - slope * (canvas.x - np.float32(x))) * (-1 if upper else 1)
    depth = (0.16 + 0.12 * severity) if upper else (0.20 + 0.16 * severity)
    lateral = _ramp(1.35 - np.abs((canvas.x - layout.middle) * side / layout.half_width - 0.52) * rng.uniform(1.6, 2.2))
    lobe = _ramp(away / 0.014) * _ramp((depth - away) / 0.09) * _ramp(lateral * 2)
    area = lobe * scene.lungs[side] * _ramp(0.9 + 0.12 * canvas.clouds(rng, 0.045))
    centre = layout.point(side, 0.3 if upper else 0.72, 0.5)
    airways = _bronchogram(scene, side, centre, 0.10, rng)
    scene.fill(area * (0.16 + 0.74 * severity) * (1 - 0.32 * airways))
    scene.mark("Consolidation", area, 0.4)


def _edema(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    canvas, layout = scene.canvas, scene.layout
    mottle = _ramp(0.78 + 0.22 * canvas.clouds(rng, 0.035))
    lines = canvas.empty()
    for side in SIDES:
        x, y = layout.hilum(side)
        dx = (canvas.x - np.float32(x + side * 0.05)) / np.float32(0.15 + 0.05 * severity)
        dy = (canvas.y - np.float32(y + 0.05)) / np.float32(0.19 + 0.05 * severity)
        away = dx * dx + dy * dy
        wing = cv2.exp(-away * np.sqrt(away))
        scene.fill(wing * mottle * (0.08 + 0.60 * severity) + 0.08 * severity)
        scene.mark("Edema", wing * scene.lungs[side], 0.4)
        # Kerley B lines: short, thin, horizontal, at the lateral bases.
        for height in np.arange(0.74, 1.0, 0.035):
            start = layout.point(side, height + rng.uniform(-0.01, 0.01), 0.99)
            end = layout.point(side, height + rng.uniform(-0.01, 0.01), rng.uniform(0.84, 0.92))
            canvas.stroke(lines, [np.array([start, end])], 0.0028, 200)
    scene.lines += canvas.blur(lines, 0.001) * scene.lung * np.float32(0.01 + 0.10 * severity)
    # Full veins, the upper ones too.
    scene.vessel_gain *= np.float32(1.02 + 0.7 * severity)


def _emphysema(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    scene.air_gain *= 1.02 + 0.18 * severity
    scene.vessel_gain *= np.float32(0.95 - 0.62 * severity)
    layout = scene.layout
    for side in SIDES:
        # Bullae: round areas without vessels, a hair line around some.
        for _ in range(int(rng.integers(0, 3))):
            centre = layout.point(side, rng.uniform(0.08, 0.45), rng.uniform(0.5, 0.8))
            bulla = _patch(scene, centre, (0.05 + 0.03 * severity, 0.055 + 0.03 * severity), rng, 0.012)
            scene.filled = scene.filled - bulla * scene.lungs[side] * np.float32(0.02 + 0.11 * severity)
            scene.vessel_gain *= 1 - np.float32(0.8 * severity) * bulla
        scene.mark("Emphysema", scene.lungs[side], 0.5, 0.0)


def _fibrosis(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    canvas, layout = scene.canvas, scene.layout
    # Zero lines of smooth noise form a net: reticulation without drawing a single line.
    net = cv2.exp(-((canvas.clouds(rng, 0.0095) / np.float32(0.50)) ** 2))
    wide = cv2.exp(-((canvas.clouds(rng, 0.019) / np.float32(0.42)) ** 2))
    for side in SIDES:
        lateral = (canvas.x - layout.middle) * side / layout.half_width
        height = (canvas.y - layout.apex) / layout.height
        low = _ramp((height - (0.62 - 0.25 * severity)) / 0.22)
        rim = _ramp((lateral - 0.62) / 0.2) * _ramp((height - 0.3) / 0.25)
        area = np.maximum(low * (0.35 + 0.65 * _ramp(lateral / 0.7)), rim * 0.8) * scene.lungs[side]
        scene.fill(area * (0.03 + 0.20 * severity + np.maximum(net, wide) * (0.08 + 0.27 * severity)))
        scene.mark("Fibrosis", area, 0.45)


def _pleural_thickening(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    side = _side(rng)
    canvas, layout = scene.canvas, scene.layout
    apical = rng.random() < 0.35
    depth = 0.018 + 0.034 * severity
    wobble = 1 + 0.30 * canvas.clouds(rng, 0.06)
    height = (canvas.y - layout.apex) / layout.height
    offset = (canvas.x - layout.middle) * side
    if apical:
        # A cap: the distance to the outline comes from its blur, whatever its curvature.
        depth *= 1.6
        band = _ramp((0.95 - canvas.blur(scene.lungs[side], depth * 0.6)) * 3.5 * wobble)
        reach = _ramp((0.15 + 0.08 * severity - height) / 0.05) * _ramp((offset / layout.half_width - 0.25) / 0.1)
    else:
        rows = np.linspace(0, 1.2, 256)
        inset = np.interp(canvas.y, rows, layout.wall(rows)).astype(np.float32) - offset
        band = _ramp((depth * wobble - inset) / 0.006 + 0.5)
        top, bottom = rng.uniform(0.12, 0.35), rng.uniform(0.78, 1.0)
        reach = _ramp((height - top) / 0.10) * _ramp((bottom - height) / 0.10)
    area = band * reach * scene.lungs[side]
    scene.fill(area * (0.60 + 0.40 * severity))
    scene.lines += area * np.float32(0.09 + 0.13 * severity)
    scene.mark("Pleural_Thickening", area, 0.5)


def _hernia(scene: Scene, severity: float, rng: np.random.Generator) -> None:
    canvas, layout = scene.canvas, scene.layout
    radius = 0.050 + 0.055 * severity
    x = layout.middle + rng.uniform(0.0, 0.035)
    y = float(layout.dome(1, 0.05)) - 0.72 * radius
    ring = irregular_ring(rng, (x, y), (radius * 1.15, radius), 0.05)
    area = canvas.shape(ring, 0.003)
    level = np.float32(y + rng.uniform(-0.15, 0.25) * radius)
    gas = canvas.shape((ring - (x, y)) * 0.86 + (x, y), 0.003) * (canvas.y < level)
    # Wall and fluid add thickness, the gas above the level takes it away.
    scene.lines += area * np.float32(0.08 + 0.13 * severity) - gas * np.float32(0.15 + 0.26 * severity)
    scene.mark("Hernia", area, 0.5)


_DRAW: dict[str, Callable[[Scene, float, np.random.Generator], None]] = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Effusion": _effusion,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Pleural_Thickening": _pleural_thickening,
    "Hernia": _hernia,
}
