"""What healthy films show that looks like a finding: without it every spot is a nodule and every veil an illness.

None is labelled or boxed. Each function returns float32 [S, S].
"""

import numpy as np

from cxr_retrieval.corpus.phantom.anatomy import SIDES, Layout
from cxr_retrieval.corpus.phantom.canvas import Canvas, curve, irregular_ring

Layer = np.ndarray


def veil(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> Layer:
    """Share of lung air, 0..1, that soft tissue, crowded vessels and a shallow breath hide, most at the bases."""
    exposure = layout.exposure
    height = np.clip((canvas.y - np.float32(layout.apex)) / np.float32(layout.height), 0, 1)
    crowded = 1 - exposure.inspiration
    result = height**3 * np.float32(0.30 * crowded * rng.uniform(0.4, 1.0) + 0.06 * layout.anatomy.girth)
    lumps = 0.55 + 0.35 * canvas.clouds(rng, 0.16) + 0.25 * canvas.clouds(rng, 0.05)
    result += np.clip(lumps, 0, 1.4) * np.float32(0.34 * exposure.veil)
    tilt = np.float32(rng.normal(0, 0.06))  # the patient is turned a little: one side is lighter
    return np.clip(result + tilt * np.sign(canvas.x - np.float32(layout.middle)), 0, 0.6)


def scars(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> Layer:
    """Old marks of one body, on all its films: granulomas, thin strands, nipples, calcified rib cartilage."""
    dots, soft = canvas.empty(), canvas.empty()
    age = layout.anatomy.age_years
    if rng.random() < 0.10 + 0.25 * (age > 40):
        for _ in range(int(rng.geometric(0.5))):
            spot = layout.point(int(rng.choice(SIDES)), rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.9))
            radius = rng.uniform(0.004, 0.010)
            canvas.fill(dots, irregular_ring(rng, spot, (radius, radius), 0.2), int(rng.integers(60, 230)))
    if rng.random() < 0.22:
        for side in SIDES[int(rng.random() < 0.5) :]:
            spot = layout.point(side, rng.uniform(0.78, 0.95), rng.uniform(0.5, 0.68))
            radius = rng.uniform(0.010, 0.016)
            canvas.fill(soft, irregular_ring(rng, spot, (radius, radius), 0.1), int(rng.integers(60, 170)))
    if rng.random() < 0.06 + 0.14 * (age > 50):
        for _ in range(int(rng.integers(1, 4))):
            side, height, lateral = int(rng.choice(SIDES)), rng.uniform(0.05, 1.0), rng.uniform(0.4, 0.85)
            start = np.array(layout.point(side, height, lateral))
            end = start + rng.normal(0, 0.05, 2)
            middle = (start + end) / 2 + rng.normal(0, 0.006, 2)
            canvas.stroke(soft, [curve([tuple(start), tuple(middle), tuple(end)])], rng.uniform(0.003, 0.006), 110)
    if rng.random() < np.clip((age - 30) / 70, 0, 0.6):
        for side in SIDES:
            for height in np.arange(0.15, 0.9, 0.16):
                spot = layout.point(side, height + rng.uniform(-0.03, 0.03), rng.uniform(0.25, 0.42))
                size = (rng.uniform(0.010, 0.028), rng.uniform(0.005, 0.010))
                canvas.fill(soft, irregular_ring(rng, spot, size, 0.6), int(rng.integers(20, 130)))
    return canvas.blur(dots, 0.0015) * np.float32(0.16) + canvas.blur(soft, 0.004) * np.float32(0.11)


def folds(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> Layer:
    """A fold of skin or cloth of one film: an edge that fades to one side, as a fallen lung's does."""
    chance = 0.22 if layout.exposure.view == "AP" else 0.05
    if rng.random() >= chance:
        return np.zeros((canvas.size, canvas.size), dtype=np.float32)
    side = int(rng.choice(SIDES))
    points = [(rng.uniform(0.75, 1.0), 0.02), (rng.uniform(0.72, 0.92), 0.4), (rng.uniform(0.70, 1.0), 0.85)]
    edge = curve([layout.point(side, height, lateral) for lateral, height in points])
    order = np.argsort(edge[:, 1])
    across = np.interp(canvas.y, edge[order, 1], edge[order, 0]).astype(np.float32)
    inward = (across - canvas.x) * side
    reach = np.clip((edge[:, 1].max() - canvas.y) / 0.15, 0, 1) * np.clip((canvas.y - edge[:, 1].min()) / 0.05, 0, 1)
    fade = np.exp(-np.maximum(inward, 0) / np.float32(rng.uniform(0.02, 0.06))) * np.clip(inward / 0.003 + 0.5, 0, 1)
    return fade * reach * np.float32(rng.uniform(0.02, 0.06))
