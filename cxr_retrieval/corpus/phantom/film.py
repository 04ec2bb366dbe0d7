"""From a body, a film and its signs to pixels: layers are added up as thickness, then exposed and developed.

`stage` sets up a healthy chest, `signs` changes it, `develop` makes the film.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

from cxr_retrieval.corpus.phantom import devices, layers, mimics
from cxr_retrieval.corpus.phantom.anatomy import SIDES, Anatomy, Deformation, Exposure, Layout
from cxr_retrieval.corpus.phantom.canvas import Canvas


@dataclass(frozen=True)
class Box:
    """Where the sign of `finding` is drawn: left, top, width, height in pixels of the drawn image, inside it."""

    finding: str
    x: int
    y: int
    w: int
    h: int


@dataclass
class Scene:
    """A chest being drawn; signs change it before it is exposed. All maps are float32 [S, S]."""

    canvas: Canvas
    layout: Layout
    lungs: dict[int, np.ndarray]  # side -> aerated area, 0..1
    heart: np.ndarray  # share of lung depth taken by heart and mediastinum
    filled: np.ndarray  # share of lung air replaced by something dense, 0..1
    vessel_gain: np.ndarray  # factor on the vessels, 1 is normal
    lines: np.ndarray  # attenuation added as it is
    air_gain: float = 1.0  # factor on the depth of air in the lungs
    boxes: list[Box] = field(default_factory=list)

    @property
    def lung(self) -> np.ndarray:
        return np.maximum(self.lungs[-1], self.lungs[1])

    def fill(self, density: np.ndarray) -> None:
        """Replace air by `density` (0..1, cut to the lungs); several fills combine like veils."""
        self.filled = 1 - (1 - self.filled) * (1 - np.clip(density, 0, 1) * self.lung)

    def mark(self, finding: str, area: np.ndarray, threshold: float, margin: float = 0.008) -> None:
        """Box where `area` [S, S] exceeds `threshold`, or where it is strongest if the sign is too faint for that."""
        x, y, w, h = self.canvas.bounds(area, threshold)
        pad, size = round(margin * self.canvas.size), self.canvas.size
        left, top = max(x - pad, 0), max(y - pad, 0)
        right, bottom = min(x + w + pad, size), min(y + h + pad, size)
        self.boxes.append(Box(finding, left, top, right - left, bottom - top))


def stage(anatomy: Anatomy, exposure: Exposure, deformation: Deformation, size: int) -> Scene:
    """The empty scene of a chest without focal signs."""
    canvas = Canvas(size, exposure.rotation, exposure.scale, exposure.shift, anatomy.sway)
    layout = Layout(anatomy, exposure, deformation)
    zeros = np.zeros((size, size), dtype=np.float32)
    return Scene(
        canvas=canvas,
        layout=layout,
        lungs={side: canvas.shape(layout.lung(side), 0.0028) for side in SIDES},
        heart=layers.heart(canvas, layout),
        filled=mimics.veil(canvas, layout, np.random.default_rng([exposure.seed, 6])),
        vessel_gain=np.ones_like(zeros),
        lines=zeros.copy(),
    )


def develop(scene: Scene) -> np.ndarray:
    """Expose the scene: uint8 [S, S], bright where the body is dense."""
    canvas, layout, exposure = scene.canvas, scene.layout, scene.layout.exposure
    rng = np.random.default_rng([exposure.seed, 1])
    lung = scene.lung
    # Lungs are deepest in their middle; the wide blur makes that bowl without geometry.
    bowl = 0.62 + 0.38 * canvas.blur(lung, 0.05)
    texture = 1 - 0.030 * canvas.clouds(rng, 0.012) - 0.035 * canvas.clouds(rng, 0.03)
    air = (
        lung
        * bowl
        * texture
        * (1 - scene.heart)
        * (1 - scene.filled)
        * (np.float32(0.58 * scene.air_gain) * (0.88 + 0.2 * canvas.y))
    )
    density = layers.body(canvas, layout)
    inside = np.clip(density * 3, 0, 1)
    density += layers.abdomen(canvas, layout, np.random.default_rng([exposure.seed, 2])) * inside
    density += layers.aorta(canvas, layout) + layers.breasts(canvas, layout)
    density += layers.spine(canvas, layout) * inside - layers.airways(canvas, layout) * inside
    density -= air
    density += layers.vessels(canvas, layout) * (
        lung * scene.vessel_gain * (1 - 0.8 * scene.filled) * (1 - 0.5 * scene.heart)
    )
    # Over heart and liver the ribs drown in scatter.
    clear = 0.45 + 0.55 * canvas.blur(lung * (1 - 0.6 * scene.heart), 0.02)
    density += layers.cage(canvas, layout) * clear + layers.shoulders(canvas, layout)
    density += scene.lines
    density += mimics.scars(canvas, layout, np.random.default_rng([layout.anatomy.seed, 1]))
    density += mimics.folds(canvas, layout, np.random.default_rng([exposure.seed, 7]))
    # A soft floor: film never goes fully black inside the body.
    density = 0.5 * (density + np.sqrt(density * density + (np.float32(0.012) * inside + np.float32(0.0004))))
    density += devices.implanted(canvas, layout, np.random.default_rng([layout.anatomy.seed, 2]))
    density += devices.attached(canvas, layout, np.random.default_rng([exposure.seed, 3]))
    return _print(canvas, exposure, density)


def _print(canvas: Canvas, exposure: Exposure, density: np.ndarray) -> np.ndarray:
    """The film curve with scatter and noise, then borders and lead markers."""
    rng = np.random.default_rng([exposure.seed, 4])
    haze = np.float32(exposure.haze)
    if haze > 0:
        density = density * (1 - 0.22 * haze) + canvas.blur(density, 0.08) * (0.22 * haze) + 0.05 * haze
    film: np.ndarray = cv2.pow(1 - cv2.exp(density * np.float32(-1.75 * exposure.penetration)), 1.18 * exposure.gamma)
    film = np.float32(exposure.blacks) + film * np.float32(exposure.whites - exposure.blacks)
    film += np.float32(0.005) + canvas.clouds(rng, 0.5) * np.float32(0.010)
    grain = rng.standard_normal((canvas.size, canvas.size), dtype=np.float32)
    film += cv2.GaussianBlur(grain, (0, 0), 0.7) * np.float32(2.1 * exposure.grain)
    pixels = np.clip(film * 255, 0, 255).astype(np.uint8)
    # A fresh stream: the grain above took a number of draws that depends on the size.
    rng = np.random.default_rng([exposure.seed, 5])
    _borders(pixels, rng)
    _markers(pixels, exposure, rng)
    return pixels


def _borders(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """The rim of some films: what the collimator or a crooked scan left out, black or, on a few, white."""
    if rng.random() < 0.7:
        return
    size = len(pixels)
    near, far = rng.uniform(-0.03, 0.035, 2), 1 - rng.uniform(-0.03, 0.035, 2)
    corners = np.array([near, (far[0], near[1]), far, (near[0], far[1])]) - 0.5
    angle = np.deg2rad(rng.normal(0, 1.2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inside = np.zeros_like(pixels)
    cv2.fillPoly(inside, [np.round((corners @ turn.T + 0.5) * size).astype(np.int32)], 1)
    pixels[inside == 0] = rng.integers(0, 12) if rng.random() < 0.85 else rng.integers(225, 256)


def _markers(pixels: np.ndarray, exposure: Exposure, rng: np.random.Generator) -> None:
    """Lead letters, often crooked or mirrored, and on portable films what the technician stuck beside them."""
    size = len(pixels)
    value = int(rng.integers(190, 256))
    left = rng.random() < 0.8
    x, y = (rng.uniform(0.86, 0.94) if left else rng.uniform(0.04, 0.11)), rng.uniform(0.04, 0.20)
    letter, height = "L" if left else "R", rng.uniform(0.6, 0.95)
    initials = "".join(rng.choice(list("ABCDEGHJKLMPRSTW"), 2))
    _write(pixels, letter, (x, y), height, value, rng.normal(0, 14), rng.random() < 0.1)
    if rng.random() < 0.35:
        _write(pixels, initials, (x, y + 0.04), 0.55 * height, value, rng.normal(0, 8), rng.random() < 0.1)
    if exposure.view != "AP":
        return
    if rng.random() < 0.6:
        _write(pixels, "AP", (x, y + 0.075), 0.45, value, rng.normal(0, 4))
    if rng.random() < 0.55:
        words = "PORTABLE" if rng.random() < 0.6 else str(rng.choice(["SUPINE", "ERECT", "SEMI UPRIGHT"]))
        corner = (
            (rng.uniform(0.08, 0.2), rng.uniform(0.03, 0.10)) if rng.random() < 0.6 else (0.86, rng.uniform(0.7, 0.95))
        )
        _write(pixels, words, corner, rng.uniform(0.34, 0.45), value, rng.normal(0, 3))
    if rng.random() < 0.15:  # the arrow that says which way is up
        tip = np.array([0.5 + 0.43 * (1 if left else -1), rng.uniform(0.3, 0.7)]) * size
        foot = (round(tip[0]), round(tip[1] + 0.045 * size))
        cv2.arrowedLine(pixels, foot, (round(tip[0]), round(tip[1])), value, max(1, size // 170), cv2.LINE_AA, 0, 0.4)


def _write(
    pixels: np.ndarray,
    text: str,
    centre: tuple[float, float],
    height: float,
    value: int,
    degrees: float = 0.0,
    mirrored: bool = False,
) -> None:
    """Text around `centre` (shares of the frame), turned by `degrees`."""
    size = len(pixels)
    scale, weight, font = height * size / 512, max(1, round(size / 256)), cv2.FONT_HERSHEY_SIMPLEX
    (width, tall), below = cv2.getTextSize(text, font, scale, weight)
    side = 2 * (max(width, tall + below) // 2 + 2)
    stamp = np.zeros((side, side), dtype=np.uint8)
    cv2.putText(stamp, text, ((side - width) // 2, (side + tall) // 2), font, scale, 255, weight, cv2.LINE_AA)
    stamp = stamp[:, ::-1] if mirrored else stamp
    turn: np.ndarray = cv2.getRotationMatrix2D((side / 2, side / 2), degrees, 1.0)
    turn[:, 2] += np.array(centre) * size - side / 2
    placed = cv2.warpAffine(stamp, turn, (size, size), flags=cv2.INTER_LINEAR)
    ink = placed > 0
    share = placed[ink].astype(np.float32) / 255
    pixels[ink] = pixels[ink] * (1 - share) + value * share
