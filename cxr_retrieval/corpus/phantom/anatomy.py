"""Who is drawn (`Anatomy`), how the film was taken (`Exposure`), and where every organ then lies (`Layout`).

Body coordinates as in `canvas`; `side` is -1 for the patient's right (image left) and +1 for the left.
"""

import math
from dataclasses import dataclass

import numpy as np

from cxr_retrieval.corpus.phantom.canvas import Sway, curve

SIDES = (-1, 1)
# Lateral lung border as (share of the half width, share of the height from apex to costophrenic angle).
_WALL = curve([
    (0.39, -0.003), (0.475, 0.006), (0.565, 0.035), (0.67, 0.098), (0.80, 0.215), (0.90, 0.38),
    (0.962, 0.57), (0.993, 0.78), (1.0, 1.0),
])  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """One patient's body; the same for all follow-ups. Lengths in body units."""

    age_years: int
    sex: str
    half_width: float  # of the inner thorax at its widest
    apex: float  # y of the lung apices
    base: float  # y of the costophrenic angles in full inspiration
    dome: float  # height of the diaphragm domes above the angles
    dome_gap: float  # right dome above left
    cardiothoracic: float  # heart width / inner thorax width, healthy and upright
    heart_share: float  # part of the heart width left of the midline
    knob: float  # radius of the aortic knob
    rib_slope: float
    rib_width: float
    bone: float  # density, 1 is average
    girth: float  # soft tissue, 1 is average
    wall: float  # thickness of the chest wall beside the lung
    shoulder: float  # y of the shoulders below the apices
    breast: float  # 0 none .. 1 large
    lean: float  # sideways shift of trachea and spine
    gas: tuple[float, float, float]  # stomach bubble: offset, depth below the dome, radius; 0 radius is none
    sway: Sway
    seed: int  # of what stays in this body beside the findings: old scars, implants
    vessels: tuple[tuple[np.ndarray, ...], ...]  # per side, per generation: lines [K, 6, 2] around the hilum


@dataclass(frozen=True)
class Exposure:
    """How one film was taken: view, breath, position, and the look of the film."""

    view: str
    inspiration: float  # 0 expiration .. 1 full
    rotation: float  # degrees
    scale: float
    shift: tuple[float, float]
    arms: float  # 0 hanging .. 1 spread
    penetration: float  # film response, 1 is average
    gamma: float
    blacks: float  # the darkest and the brightest tone of the print, shares of the full range
    whites: float
    veil: float  # uneven haze over healthy lungs, 0 none .. 1
    haze: float  # scattered radiation, 0..1
    grain: float  # noise, grey levels / 255
    seed: int  # of noise, markers and lines


@dataclass(frozen=True)
class Deformation:
    """What the findings do to the shape of the chest."""

    cardiothoracic: float | None = None
    flatten: float = 0.0  # 0 none .. 1: low flat diaphragm, long lungs, slim heart
    raised: tuple[float, float] = (0.0, 0.0)  # rise of the right and left dome
    pull: float = 0.0  # sideways shift of the mediastinum


def sample_vessels(rng: np.random.Generator) -> tuple[tuple[np.ndarray, ...], ...]:
    """Branching lines of both lungs relative to the hilum, x positive towards the chest wall."""
    sides = []
    for _ in SIDES:
        angle = np.deg2rad(np.linspace(-78, 84, 8) + rng.uniform(-9, 9, 8))
        start = np.stack([0.012 * np.cos(angle), 0.05 * np.sin(angle)], axis=1) * rng.uniform(0.1, 1.1, (8, 1))
        # The vessels of the bases are the fuller ones.
        length = rng.uniform(0.05, 0.12, 8) * np.where(angle < 0, 0.8, 1.0)
        generations = []
        for generation in range(5):
            bend = rng.normal(0, 0.10, len(angle))[:, None] * np.arange(5)
            step = (length / 5)[:, None]
            heading = angle[:, None] + bend
            moves = np.stack([step * np.cos(heading), step * np.sin(heading)], axis=2)
            lines = np.concatenate([start[:, None, :], start[:, None, :] + np.cumsum(moves, axis=1)], axis=1)
            generations.append(lines)
            children = 3 if generation < 1 else 2
            parent = np.repeat(np.arange(len(lines)), children)
            knot = rng.integers(2, 6, len(parent))
            knot[::children] = 5
            fork = np.tile(np.linspace(-1, 1, children), len(lines)) * rng.uniform(0.15, 0.50, len(parent))
            start, angle = lines[parent, knot], heading[parent, -1] + fork + rng.normal(0, 0.06, len(parent))
            length = length[parent] * rng.uniform(0.65, 0.95, len(parent))
        sides.append(tuple(generations))
    return tuple(sides)


def sample_anatomy(rng: np.random.Generator, age_years: int, sex: str) -> Anatomy:
    """A random body of that age and sex."""
    child = max(0.0, (14 - age_years) / 14)
    old = max(0.0, (age_years - 55) / 40)
    man = sex == "M"
    girth = float(np.clip(rng.normal(1.0, 0.13), 0.75, 1.35)) - 0.15 * child
    grown_woman = not man and age_years >= 14
    return Anatomy(
        age_years=age_years,
        sex=sex,
        half_width=float(np.clip(rng.normal(0.350, 0.026), 0.295, 0.41)) + (0.012 if man else -0.008),
        apex=rng.uniform(0.085, 0.155),
        base=float(np.clip(rng.normal(0.82, 0.035), 0.74, 0.90)) - 0.05 * child,
        dome=rng.uniform(0.105, 0.175),
        dome_gap=float(np.clip(rng.normal(0.022, 0.016), -0.015, 0.06)),
        cardiothoracic=float(np.clip(rng.normal(0.445, 0.032), 0.37, 0.53)) + 0.02 * child + 0.02 * old,
        heart_share=rng.uniform(0.65, 0.76),
        knob=rng.uniform(0.028, 0.037) + 0.012 * old - 0.008 * child,
        rib_slope=rng.uniform(0.7, 1.3),
        rib_width=rng.uniform(0.0095, 0.0125) * (1.0 if man else 0.92),
        bone=rng.uniform(0.85, 1.2) * (1 - 0.2 * old - 0.2 * child),
        girth=girth,
        wall=0.036 + 0.10 * max(0.0, girth - 0.8) + rng.uniform(0, 0.025),
        shoulder=rng.uniform(-0.015, 0.035),
        breast=rng.uniform(0.25, 1.0) if grown_woman else 0.0,
        lean=rng.normal(0, 0.006),
        gas=(rng.uniform(0.10, 0.17), rng.uniform(0.05, 0.08), rng.uniform(0.018, 0.052) * (rng.random() < 0.75)),
        sway=Sway(rng.normal(0, 0.005), rng.random(), rng.normal(0, 0.010), rng.random()),
        seed=int(rng.integers(1 << 31)),
        vessels=sample_vessels(rng),
    )  # fmt: skip


def sample_exposure(rng: np.random.Generator, view: str) -> Exposure:
    """A random film of that view; AP is portable: poor breath, crooked, grey."""
    portable = view == "AP"
    spread = 1.6 if portable else 1.0
    return Exposure(
        view=view,
        inspiration=rng.uniform(0.05, 0.8) if portable else rng.uniform(0.5, 1.0),
        rotation=rng.normal(0, 1.6) * spread,
        scale=float(np.clip(rng.normal(0.98, 0.055), 0.86, 1.12)),
        shift=(rng.normal(0, 0.016) * spread, rng.normal(0, 0.022) * spread),
        arms=rng.uniform(0.0, 0.45) if portable else rng.uniform(0.3, 1.0),
        penetration=float(np.clip(rng.normal(1.0, 0.11 * spread), 0.65, 1.4)),
        gamma=rng.uniform(0.75, 1.25),
        blacks=min(abs(rng.normal(0, 0.05 * spread)), 0.2),
        whites=1 - min(abs(rng.normal(0, 0.06 * spread)), 0.2),
        veil=rng.beta(1.6, 2.2) * (1.0 if portable else 0.75),
        haze=rng.uniform(0.3, 1.0) if portable else rng.uniform(0.0, 0.6),
        grain=rng.uniform(0.004, 0.012) if portable else rng.uniform(0.002, 0.008),
        seed=int(rng.integers(1 << 31)),
    )


class Layout:
    """Outlines of the organs in one film, all in body coordinates."""

    def __init__(self, anatomy: Anatomy, exposure: Exposure, deformation: Deformation):
        portable = exposure.view == "AP"
        self.anatomy, self.exposure = anatomy, exposure
        flat = deformation.flatten
        self.flat = flat
        self.half_width = anatomy.half_width * (1 + 0.03 * flat) * (0.97 + 0.03 * exposure.inspiration)
        self.apex = anatomy.apex + (0.012 if portable else 0.0) - 0.015 * flat
        self.base = anatomy.base - 0.10 * (1 - exposure.inspiration) + 0.05 * flat
        self.height = self.base - self.apex
        self.dome_height = anatomy.dome * (1 - 0.68 * flat) + 0.02 * (1 - exposure.inspiration)
        self.raised = {-1: deformation.raised[0], 1: deformation.raised[1] - anatomy.dome_gap}
        self.middle = 0.5 + anatomy.lean + deformation.pull
        ratio = deformation.cardiothoracic
        if ratio is None:
            ratio = anatomy.cardiothoracic * (1.09 if portable else 1.0) * (1 - 0.24 * flat)
        self.cardiothoracic = ratio
        self.carina = self.apex + 0.29 * self.height

    def wall(self, y: float | np.ndarray) -> np.ndarray:
        """Distance from the midline to the lateral lung border at height y."""
        share = (np.asarray(y) - self.apex) / self.height
        return self.half_width * np.interp(share, _WALL[:, 1], _WALL[:, 0])

    def dome(self, side: int, offset: float | np.ndarray) -> np.ndarray:
        """y of the diaphragm at a distance `offset` from the midline."""
        share = np.asarray(offset) / self.half_width
        peak = 0.50
        lateral = np.clip((share - peak) / (1.0 - peak), 0, 1)
        medial = np.clip((peak - share) / (peak + 0.42), 0, 1)
        away = np.where(share > peak, lateral, medial)
        rise = self.dome_height + self.raised[side]
        return self.base - rise * np.sqrt(1 - 0.999 * away**2)

    def point(self, side: int, height: float, lateral: float) -> tuple[float, float]:
        """The point at `height` (0 apex, 1 dome) and `lateral` (0 midline, 1 chest wall) of a lung."""
        y = self.apex + height * (float(self.dome(side, 0.5 * self.half_width)) - self.apex)
        return self.middle + side * lateral * float(self.wall(y)), y

    def place(self, side: int, points: list[tuple[float, float]] | np.ndarray) -> np.ndarray:
        """Body points [..., 2] of (distance from the midline, y) pairs on one side."""
        pairs = np.asarray(points, dtype=np.float64)
        return np.stack([self.middle + side * pairs[..., 0], pairs[..., 1]], axis=-1)

    def lung(self, side: int) -> np.ndarray:
        w, top, h = self.half_width, self.apex, self.height
        inner = curve([
            (0.09 * w, top + 0.55 * h), (0.10 * w, top + 0.35 * h), (0.13 * w, top + 0.16 * h),
            (0.20 * w, top + 0.055 * h), (0.285 * w, top + 0.010 * h),
            (0.38 * w, top - 0.003 * h),
        ], 6)  # fmt: skip
        outer = np.stack([_WALL[:, 0] * w, top + _WALL[:, 1] * h], axis=1)
        floor = np.linspace(0.995, 0.04, 40) * w
        return self.place(side, np.vstack([inner, outer, np.stack([floor, self.dome(side, floor)], axis=1)]))

    def hilum(self, side: int) -> tuple[float, float]:
        y = self.carina + (0.135 if side < 0 else 0.115) * self.height
        return self.middle + side * (0.19 if side < 0 else 0.21) * self.half_width, y

    def heart(self) -> np.ndarray:
        """Outline from the great vessels round the left ventricle and back."""
        width = self.cardiothoracic * 2 * self.half_width
        left, right = self.anatomy.heart_share * width, (1 - self.anatomy.heart_share) * width
        floor = float(self.dome(1, left * 0.8))
        floor_right = float(self.dome(-1, right * 0.8))
        top, h = self.carina, max(floor - self.carina, 0.2)
        drop = 0.10 * self.flat * h
        outline = [
            (-0.045, top - 0.10), (-0.050, top + 0.10 * h), (-0.62 * right, top + 0.34 * h), (-right, top + 0.64 * h),
            (-0.93 * right, floor_right - 0.015), (-0.5 * right, floor_right + 0.03), (0.45 * left, floor + 0.055),
            (0.86 * left, floor + 0.030), (left, floor - 0.045), (0.93 * left, floor - 0.30 * h + drop),
            (0.74 * left, floor - 0.50 * h + drop), (0.50 * left + 0.010, top + 0.27 * h),
            (0.068, top + 0.13 * h), (0.052, top + 0.03 * h), (0.05, top - 0.10),
        ]  # fmt: skip
        points = curve(outline, 6, closed=True)
        return np.stack([self.middle + points[:, 0], points[:, 1]], axis=1)

    def ribs(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Centre lines from the first rib down: eleven posterior [11, N, 2], seven anterior [7, M, 2]."""
        h, number = self.height, np.arange(11)
        start = self.apex + (-0.012 + 0.094 * number) * h
        drop = (0.055 + 0.0085 * number) * self.anatomy.rib_slope * h + 0.02 * h
        reach = self.wall(start + drop) + 0.004
        reach[0] *= 0.94
        low = start + 1.1 * drop
        back = [
            (0.04 + 0 * start, start + 0.006), (0.10 + 0 * start, start - 0.010), (0.45 * reach, start + 0.02 * drop),
            (0.74 * reach, start + 0.32 * drop), (0.925 * reach, start + 0.66 * drop),
            (0.993 * reach, start + 0.93 * drop), (reach, low + 0.02),
        ]  # fmt: skip
        fall = (0.075 + 0.009 * number) * h
        turn = self.wall(low + 0.35 * fall) + 0.002
        front = [
            (reach, low - 0.01), (turn, low + 0.35 * fall), (0.90 * reach, low + 0.95 * fall),
            (0.70 * reach, low + 1.5 * fall), (0.52 * reach, low + 1.75 * fall),
        ]  # fmt: skip
        posterior = curve(np.array(back).transpose(2, 0, 1))
        anterior = curve(np.array(front).transpose(2, 0, 1)[:7])
        return self.place(side, posterior), self.place(side, anterior)

    def tilt(self) -> float:
        """Sign and size of the spine's sideways bow."""
        return math.copysign(min(abs(self.anatomy.lean) * 1.2, 0.012), self.anatomy.lean)
