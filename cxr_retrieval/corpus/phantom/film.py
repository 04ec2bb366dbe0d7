"""From a body, a film and its signs to pixels: layers are added up as thickness, then exposed and developed.

`stage` sets up a healthy chest, `signs` changes it, `develop` makes the film.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

from cxr_retrieval.corpus.phantom import layers
from cxr_retrieval.corpus.phantom.anatomy import SIDES, Anatomy, Deformation, Exposure, Layout
from cxr_retrieval.corpus.phantom.canvas import Canvas, curve


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
        filled=zeros,
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
        * (np.float32(0.55 * scene.air_gain) * (0.88 + 0.2 * canvas.y))
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
    density += layers.cage(canvas, layout) + layers.shoulders(canvas, layout)
    density += scene.lines
    # A soft floor: film never goes fully black inside the body.
    density = 0.5 * (density + np.sqrt(density * density + np.float32(0.012)))
    if exposure.view == "AP":
        density += _devices(canvas, layout, np.random.default_rng([exposure.seed, 3]))
    return _print(canvas, exposure, density)


def _print(canvas: Canvas, exposure: Exposure, density: np.ndarray) -> np.ndarray:
    """The film curve with scatter and noise, then borders and lead markers."""
    rng = np.random.default_rng([exposure.seed, 4])
    haze = np.float32(exposure.haze)
    if haze > 0:
        density = density * (1 - 0.22 * haze) + canvas.blur(density, 0.08) * (0.22 * haze) + 0.05 * haze
    film: np.ndarray = cv2.pow(1 - cv2.exp(density * np.float32(-1.75 * exposure.penetration)), 1.18 * exposure.gamma)
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
    """Unexposed strips at the rim of some films."""
    size = len(pixels)
    for edge in range(4):
        if rng.random() < 0.12:
            strip = max(1, round(size * rng.uniform(0.005, 0.025)))
            np.rot90(pixels, edge)[:strip] = rng.integers(0, 8)


def _markers(pixels: np.ndarray, exposure: Exposure, rng: np.random.Generator) -> None:
    """Side marker, and on portable films what the technician stuck beside it."""
    size = len(pixels)
    scale, weight = size / 512, max(1, round(size / 256))
    font = cv2.FONT_HERSHEY_SIMPLEX
    value = int(rng.integers(205, 256))

    def write(text: str, x: float, y: float, height: float) -> None:
        cv2.putText(pixels, text, (int(x * size), int(y * size)), font, height * scale, value, weight, cv2.LINE_AA)

    left = rng.random() < 0.8
    x, y = (rng.uniform(0.90, 0.94) if left else rng.uniform(0.03, 0.06)), rng.uniform(0.06, 0.15)
    write("L" if left else "R", x, y, rng.uniform(0.7, 0.95))
    if exposure.view == "AP":
        style = rng.integers(3)
        write("AP", x - 0.008, y + 0.045, 0.45)
        if style == 0:
            write("PORTABLE", 0.03, rng.uniform(0.04, 0.07), 0.42)
        elif style == 1:
            write("SUPINE", 0.80, rng.uniform(0.92, 0.96), 0.42)


def _devices(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Electrodes and their leads, a tube in the trachea, a central line: each only on some films."""
    layer = canvas.empty()
    if rng.random() < 0.45:
        for side, height in ((-1, 0.10), (1, 0.12), (1, 0.85)):
            x, y = layout.point(side, height + rng.uniform(-0.05, 0.05), rng.uniform(0.75, 1.0))
            lead = curve([
                (x, y), (x + side * rng.uniform(0.02, 0.12), y + rng.uniform(0.05, 0.2)),
                (x + rng.uniform(-0.05, 0.15) * side, y + rng.uniform(0.3, 0.45)),
                (x + rng.uniform(0.0, 0.3) * side, 1.05),
            ])  # fmt: skip
            canvas.stroke(layer, [lead], 0.003, 150)
            angle = np.linspace(0, 2 * np.pi, 20)
            canvas.fill(layer, np.stack([x + 0.011 * np.cos(angle), y + 0.011 * np.sin(angle)], 1), 170)
    if rng.random() < 0.22:
        tip = layout.carina - rng.uniform(0.03, 0.08)
        canvas.stroke(layer, [curve(layout.place(1, [(0.012, -0.05), (-0.004, 0.5 * tip), (-0.003, tip)]))], 0.006, 110)
    if rng.random() < 0.3:
        y, h = layout.apex, layout.height
        line = [
            (0.12, y - 0.10),
            (0.10, y + 0.08),
            (0.05, y + 0.17),
            (0.043, y + 0.3 * h),
            (0.042, y + rng.uniform(0.42, 0.52) * h),
        ]
        canvas.stroke(layer, [curve(layout.place(-1, line))], 0.0045, 130)
    if rng.random() < 0.12:
        tube = [
            (0.004, -0.05),
            (0.006, 0.3),
            (0.018, layout.base - 0.15),
            (0.06, layout.base),
            (0.12, layout.base + 0.06),
        ]
        canvas.stroke(layer, [curve(layout.place(1, tube))], 0.005, 110)
    return canvas.blur(layer, 0.0009) * np.float32(0.55)
