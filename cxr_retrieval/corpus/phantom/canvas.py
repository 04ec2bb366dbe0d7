"""A square drawing surface in body coordinates, and the few shapes that a phantom is built from.

Body coordinates: x to the right and y down, the unposed frame is [0, 1] x [0, 1]. Image left is the patient's right.
S is the image size in pixels, N a number of points.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

# Sub-pixel bits of OpenCV's integer coordinates: without them shapes jump by whole pixels between follow-ups.
_SHIFT = 4


def curve(points: list[tuple[float, float]] | np.ndarray, steps: int = 8, closed: bool = False) -> np.ndarray:
    """A Catmull-Rom curve through `points` [..., N, 2], `steps` samples a segment, as float64 [..., M, 2]."""
    knots = np.asarray(points, dtype=np.float64)
    first, last = knots[..., :1, :], knots[..., -1:, :]
    if closed:
        padded = np.concatenate([last, knots, knots[..., :2, :]], axis=-2)
    else:
        padded = np.concatenate([2 * first - knots[..., 1:2, :], knots, 2 * last - knots[..., -2:-1, :]], axis=-2)
    segments = padded.shape[-2] - 3
    before, start, end, after = (padded[..., i : segments + i, None, :] for i in range(4))
    t = (np.arange(steps) / steps)[:, None]
    samples = 0.5 * (
        2 * start
        + (end - before) * t
        + (2 * before - 5 * start + 4 * end - after) * t**2
        + (3 * start - before - 3 * end + after) * t**3
    )
    flat = samples.reshape(*knots.shape[:-2], segments * steps, 2)
    return flat if closed else np.concatenate([flat, last], axis=-2)


def ribbon(centre_line: np.ndarray, half_width: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two edges [..., N, 2] of a band around `centre_line` [..., N, 2]; `half_width` broadcasts to [..., N]."""
    tangent = np.empty_like(centre_line)
    tangent[..., 1:-1, :] = centre_line[..., 2:, :] - centre_line[..., :-2, :]
    tangent[..., 0, :] = centre_line[..., 1, :] - centre_line[..., 0, :]
    tangent[..., -1, :] = centre_line[..., -1, :] - centre_line[..., -2, :]
    normal = np.stack([-tangent[..., 1], tangent[..., 0]], axis=-1)
    normal /= np.maximum(np.hypot(normal[..., :1], normal[..., 1:]), 1e-9)
    reach = normal * np.asarray(half_width)[..., None]
    return centre_line + reach, centre_line - reach


def irregular_ring(
    rng: np.random.Generator, centre: tuple[float, float], radii: tuple[float, float], roughness: float
) -> np.ndarray:
    """A closed wobbly ellipse [48, 2]; `roughness` is the relative size of its lobes, 0 for a plain ellipse."""
    angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    radius = np.ones_like(angle)
    for order in range(2, 7):
        radius += roughness / order * rng.uniform(-1, 1) * np.cos(order * angle + rng.uniform(0, 2 * math.pi)) * 2
    return np.stack([centre[0] + radii[0] * radius * np.cos(angle), centre[1] + radii[1] * radius * np.sin(angle)], 1)


@dataclass(frozen=True)
class Sway:
    """A gentle bend that breaks the mirror symmetry of a chest: amplitudes in body units, phases in turns."""

    sideways: float = 0.0
    sideways_phase: float = 0.0
    upward: float = 0.0
    upward_phase: float = 0.0

    def dx(self, y: np.ndarray) -> np.ndarray:
        return self.sideways * np.sin(2 * math.pi * (0.9 * y + self.sideways_phase))

    def dy(self, x: np.ndarray) -> np.ndarray:
        return self.upward * np.sin(2 * math.pi * (0.8 * x + self.upward_phase))


class Canvas:
    """Masks of shapes given in body coordinates, seen through one sway and one pose.

    `rotation` in degrees, `shift` in frame widths; lengths given to the methods are in body units as well.
    """

    def __init__(
        self,
        size: int,
        rotation: float = 0.0,
        scale: float = 1.0,
        shift: tuple[float, float] = (0.0, 0.0),
        sway: Sway | None = None,
    ):
        self.size = size
        self._sway = sway or Sway()
        cosine, sine = math.cos(math.radians(rotation)) * scale, math.sin(math.radians(rotation)) * scale
        turn = np.array([[cosine, -sine], [sine, cosine]])
        middle = np.array([0.5, 0.5])
        self._turn, self._offset = turn * size, (middle - turn @ middle + np.array(shift)) * size
        axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
        inverse = np.linalg.inv(turn).astype(np.float32)
        away = middle + np.array(shift)
        dx, dy = axis[None, :] - np.float32(away[0]), axis[:, None] - np.float32(away[1])
        # Body coordinates of every pixel, float32 [S, S]: gradients and level sets are written with these.
        swayed_x = inverse[0, 0] * dx + inverse[0, 1] * dy + np.float32(0.5)
        swayed_y = inverse[1, 0] * dx + inverse[1, 1] * dy + np.float32(0.5)
        # The sway is small and smooth: one step of its inverse, on a coarse grid, is exact to a fraction of a pixel.
        coarse_x, coarse_y = (cv2.resize(grid, (64, 64), interpolation=cv2.INTER_AREA) for grid in (swayed_x, swayed_y))
        self.x = swayed_x - cv2.resize(self._sway.dx(coarse_y), (size, size), interpolation=cv2.INTER_LINEAR)
        self.y = swayed_y - cv2.resize(self._sway.dy(coarse_x), (size, size), interpolation=cv2.INTER_LINEAR)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Pixel positions [..., 2] of body points [..., 2]."""
        body = np.asarray(points, dtype=np.float64)
        bend = np.stack([self._sway.dx(body[..., 1]), self._sway.dy(body[..., 0])], axis=-1)
        return (body + bend) @ self._turn.T + self._offset - 0.5

    def _fixed(self, points: np.ndarray) -> np.ndarray:
        return np.round(self.pixels(points) * (1 << _SHIFT)).astype(np.int32)

    def empty(self) -> np.ndarray:
        """A black uint8 [S, S] layer for `fill` and `stroke`."""
        return np.zeros((self.size, self.size), dtype=np.uint8)

    def fill(self, layer: np.ndarray, outline: np.ndarray, value: int = 255) -> None:
        """One outline [N, 2], or several [K, N, 2] one over the other."""
        fixed = self._fixed(outline)
        for polygon in fixed if fixed.ndim == 3 else fixed[None]:
            cv2.fillPoly(layer, [polygon], value, cv2.LINE_AA, _SHIFT)

    def band(
        self, layer: np.ndarray, lines: np.ndarray, half_width: float | np.ndarray, inside: int, edge: int
    ) -> None:
        """Bone: bands around `lines` [K, N, 2] with brighter cortical edges."""
        one, other = ribbon(lines, half_width)
        self.fill(layer, np.concatenate([one, other[:, ::-1]], axis=1), inside)
        self.stroke(layer, np.concatenate([one, other]), 0.0035, edge)

    def stroke(self, layer: np.ndarray, lines: list[np.ndarray] | np.ndarray, width: float, value: int = 255) -> None:
        """Open lines of `width`; one thinner than a pixel is drawn one pixel wide and fainter.

        Many lines of one length come faster as one array [K, N, 2].
        """
        wanted = width * self.size
        thickness = max(1, round(wanted))
        faded = round(value * min(1.0, max(wanted, 0.45)))
        fixed = list(self._fixed(lines)) if isinstance(lines, np.ndarray) else [self._fixed(line) for line in lines]
        cv2.polylines(layer, fixed, False, faded, thickness, cv2.LINE_AA, _SHIFT)

    def blur(self, layer: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur, float32 [S, S]; a uint8 layer is scaled to 0..1. Wide blurs are made on a reduced copy."""
        spread = sigma * self.size
        byte = layer.dtype == np.uint8
        factor = 1
        while spread / factor > 5 and self.size // (factor * 2) >= 16:
            factor *= 2
        blurred: np.ndarray = layer
        if factor > 1:
            blurred = cv2.resize(layer, (self.size // factor, self.size // factor), interpolation=cv2.INTER_AREA)
        if byte and spread >= 3:
            # Wide gradients would show steps of 1/255; narrow ones are blurred as bytes, which is faster.
            blurred = blurred.astype(np.float32)
        if spread > 0.3:
            blurred = cv2.GaussianBlur(blurred, (0, 0), spread / factor, borderType=cv2.BORDER_REPLICATE)
        if factor > 1:
            blurred = cv2.resize(blurred, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        return blurred * np.float32(1 / 255) if byte else blurred

    def shape(self, outline: np.ndarray, softness: float = 0.0) -> np.ndarray:
        """The filled outline as float32 [S, S] in 0..1 with an edge blurred by `softness`."""
        layer = self.empty()
        self.fill(layer, outline)
        return self.blur(layer, softness)

    def clouds(self, rng: np.random.Generator, grain: float) -> np.ndarray:
        """Smooth noise float32 [S, S] with zero mean and unit spread; `grain` is the size of its lumps."""
        cells = int(np.clip(round(3.2 / grain), 6, self.size))
        field: np.ndarray = rng.standard_normal((cells, cells), dtype=np.float32)
        field = cv2.GaussianBlur(field, (0, 0), 1.6, borderType=cv2.BORDER_REFLECT)
        field = (field - field.mean()) / field.std()
        return cv2.resize(field, (self.size, self.size), interpolation=cv2.INTER_LINEAR)

    def bounds(self, area: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
        """x, y, w, h in pixels of where `area` [S, S] exceeds `threshold`; of its strongest pixels if none does."""
        inside = area > min(threshold, 0.9 * float(area.max()))
        x, y, w, h = cv2.boundingRect(inside.astype(np.uint8))
        return x, y, w, h
