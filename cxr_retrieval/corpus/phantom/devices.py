"""What medicine leaves on a film: lines, tubes and electrodes of one film, implants of one body. None is a finding.

Each function returns attenuation to be added, float32 [S, S].
"""

import math

import numpy as np

from cxr_retrieval.corpus.phantom.anatomy import SIDES, Layout
from cxr_retrieval.corpus.phantom.canvas import Canvas, curve

Layer = np.ndarray
_METAL = np.float32(0.55)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, 20)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def attached(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> Layer:
    """Electrodes with their leads, tubes and a central line, each on some portable films and on few others."""
    layer = canvas.empty()
    share = 1.0 if layout.exposure.view == "AP" else 0.12
    if rng.random() < 0.5 * share:
        for side, height in ((-1, 0.10), (1, 0.12), (1, 0.85), (-1, 0.9))[: rng.integers(2, 5)]:
            x, y = layout.point(side, height + rng.uniform(-0.07, 0.07), rng.uniform(0.65, 1.05))
            lead = curve([
                (x, y), (x + side * rng.uniform(0.02, 0.12), y + rng.uniform(0.05, 0.2)),
                (x + rng.uniform(-0.05, 0.15) * side, y + rng.uniform(0.3, 0.45)),
                (x + rng.uniform(0.0, 0.3) * side, 1.25),
            ])  # fmt: skip
            canvas.stroke(layer, [lead], 0.003, int(rng.integers(70, 150)))
            canvas.fill(layer, _disc(x, y, rng.uniform(0.008, 0.013)), int(rng.integers(90, 180)))
    if rng.random() < 0.22 * share:  # in the trachea
        tip = layout.carina - rng.uniform(0.02, 0.08)
        canvas.stroke(layer, [curve(layout.place(1, [(0.012, -0.15), (-0.004, 0.5 * tip), (-0.003, tip)]))], 0.006, 110)
    if rng.random() < 0.30 * share:  # in the superior vena cava, from the neck or from the arm
        y, h = layout.apex, layout.height
        entry = [(0.11, y - 0.25), (0.10, y + 0.08)] if rng.random() < 0.6 else [(0.55, y + 0.30), (0.22, y + 0.05)]
        line = [*entry, (0.05, y + 0.17), (0.043, y + 0.3 * h), (0.042, y + rng.uniform(0.40, 0.55) * h)]
        canvas.stroke(layer, [curve(layout.place(-1 if rng.random() < 0.75 else 1, line))], 0.0032, 130)
    if rng.random() < 0.14 * share:  # to the stomach
        down = [(0.004, -0.15), (0.006, 0.3), (0.018, layout.base - 0.15), (0.06, layout.base)]
        canvas.stroke(layer, [curve(layout.place(1, [*down, (0.12, layout.base + 0.06)]))], 0.005, 110)
    if rng.random() < 0.07 * share:  # in the pleura
        side = int(rng.choice(SIDES))
        height = rng.uniform(0.5, 0.9)
        points = [(1.25, height + 0.05), (1.0, height), (0.8, height - 0.12), (0.68, rng.uniform(0.1, 0.35))]
        tube = curve([layout.point(side, y, x) for x, y in points])
        for edge in (-0.004, 0.004):
            canvas.stroke(layer, [tube + np.array([edge, 0.0])], 0.0025, 130)
    return canvas.blur(layer, 0.0009) * _METAL


def implanted(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> Layer:
    """A pacemaker, a port, or the wires and clips of an operation: on every film of the few who have them."""
    layer, age = canvas.empty(), layout.anatomy.age_years
    if rng.random() < (0.05 if age > 60 else 0.008):
        x, y = layout.point(1, rng.uniform(0.12, 0.22), rng.uniform(0.66, 0.85))
        box = _disc(0, 0, 1)
        canvas.fill(layer, np.sign(box) * np.abs(box) ** 0.5 * rng.uniform(0.028, 0.036) + (x, y), 235)
        vein = [(x - 0.02, y - 0.03), (layout.middle + 0.11, layout.apex + 0.10), (layout.middle - 0.03, layout.carina)]
        ends = [(0.085, layout.base - 0.16), (-0.075, layout.base - 0.22)][: rng.integers(1, 3)]
        for dx, tip in ends:
            bend = (layout.middle - 0.055, 0.5 * (layout.carina + tip) + 0.03)
            canvas.stroke(layer, [curve([*vein, bend, (layout.middle + dx, tip)])], 0.003, 190)
    elif rng.random() < 0.03:
        side = -1 if rng.random() < 0.7 else 1
        x, y = layout.point(side, rng.uniform(0.18, 0.30), rng.uniform(0.55, 0.75))
        canvas.fill(layer, _disc(x, y, 0.017), 130)
        canvas.stroke(layer, [_disc(x, y, 0.011)], 0.004, 220)
        catheter = [(x, y), (x - side * 0.04, y - 0.09), (layout.middle + side * 0.06, layout.apex + 0.10)]
        canvas.stroke(layer, [curve([*catheter, (layout.middle - 0.042, layout.carina + 0.08)])], 0.004, 120)
    if rng.random() < (0.06 if age > 50 else 0.01):
        wires = range(int(rng.integers(4, 8)))
        for y in np.linspace(layout.carina - 0.04, layout.base - 0.17, len(wires)):
            centre = (layout.middle + rng.normal(0, 0.004), y + rng.normal(0, 0.006))
            ring = _disc(0, 0, 1) * (rng.uniform(0.010, 0.016), 0.006) + centre
            canvas.stroke(layer, [ring[rng.integers(0, 3) :]], 0.003, 190)
    if rng.random() < 0.03:
        x, y = layout.point(int(rng.choice(SIDES)), rng.uniform(0.15, 0.7), rng.uniform(0.2, 1.0))
        for _ in range(int(rng.integers(2, 6))):
            at = np.array([x, y]) + rng.normal(0, 0.02, 2)
            canvas.stroke(layer, [np.stack([at, at + rng.normal(0, 0.006, 2)])], 0.003, 220)
    return canvas.blur(layer, 0.0009) * _METAL
