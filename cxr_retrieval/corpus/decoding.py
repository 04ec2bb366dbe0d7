"""From a file's bytes to prepared pixels, by a recipe whose id follows the model and the index."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import imagecodecs
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from cxr_retrieval.corpus.codestream import require_few_markers
from cxr_retrieval.corpus.dicom import BARE_TEXT, is_bare_dicom, is_dicom
from cxr_retrieval.corpus.film import read_film
from cxr_retrieval.corpus.limits import Limits, RejectedImage, reading
from cxr_retrieval.errors import UserError

VERSION = 2  # raise it with every change that alters a prepared pixel
WINDOW = "8 bits as they are, more from minimum to maximum, DICOM first by its VOI LUT or its window"
FORMATS = ("PNG", "JPEG")
MAGIC = (PNG, JPEG) = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
MOST_CHUNKS = 100_000  # of a PNG: those of 8 KB are 25,000 of a large film
DEPTH, KIND = 24, 25  # the bytes of a PNG that tell the bits of a value, and what there is beside grey
_TURNS = {  # by the value of EXIF's Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = ("L", "1", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr")

Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before a pixel is decoded


@dataclass(frozen=True)
class Recipe:
    """How an image becomes prepared pixels. Two images are comparable only under one recipe.

    Colour becomes luminance. An 8-bit image keeps its grey values, and one of 16 bits is windowed from its lowest to
    its highest value. DICOM gets the grey values that a viewer shows: those of an 8-bit export by the same window, to
    one grey level where pixels are square; without a window it is treated as another image of its bits is. The image
    is then reduced by pixel area (enlarged linearly) to `size` x `size`: `letterbox` keeps the aspect and pads with
    black, `stretch` does not. The network sees (value / 255 - mean) / std.
    """

    size: int
    fit: str
    mean: float = 0.5
    std: float = 0.25
    window: str = WINDOW
    resampling: str = "area"
    version: int = VERSION

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Recipe":
        """Raises UserError for a recipe of a later release, which may read images otherwise."""
        if value["version"] > VERSION:
            raise UserError(
                f"images were prepared by version {value['version']} of the decode recipe, and this release knows"
                f" version {VERSION}: run it with the release that prepared them"
            )
        return cls(**value)

    def placement(self, width: int, height: int, aspect: float = 1.0) -> tuple[float, float, float, float]:
        """Scale x, scale y, left, top: prepared x = source x * scale x + left.

        The source has `width` x `height` pixels, each `aspect` times as high as wide.
        """
        if self.fit == "stretch":
            return self.size / width, self.size / height, 0.0, 0.0
        scaled_width, scaled_height = self._scaled(width, height, aspect)
        left, top = (self.size - scaled_width) // 2, (self.size - scaled_height) // 2
        return scaled_width / width, scaled_height / height, float(left), float(top)

    def to_prepared(
        self, box: tuple[float, float, float, float], width: int, height: int, aspect: float = 1.0
    ) -> tuple[float, ...]:
        """A box (x, y, w, h) of the source image in prepared pixels."""
        scale_x, scale_y, left, top = self.placement(width, height, aspect)
        x, y, w, h = box
        return x * scale_x + left, y * scale_y + top, w * scale_x, h * scale_y

    def to_source(
        self, box: tuple[float, float, float, float], width: int, height: int, aspect: float = 1.0
    ) -> tuple[float, ...]:
        """A box (x, y, w, h) of the prepared image in source pixels."""
        scale_x, scale_y, left, top = self.placement(width, height, aspect)
        x, y, w, h = box
        return (x - left) / scale_x, (y - top) / scale_y, w / scale_x, h / scale_y

    def _scaled(self, width: int, height: int, aspect: float) -> tuple[int, int]:
        tall = height * aspect
        scale = self.size / max(width, tall)
        return max(1, round(width * scale)), max(1, round(tall * scale))

    def resize(self, grey_HW: np.ndarray, aspect: float = 1.0) -> np.ndarray:
        """Prepared pixels `uint8 [size, size]` of an 8-bit grey image `[H, W]` of pixels `aspect` as high as wide."""
        height, width = grey_HW.shape
        target = (self.size, self.size) if self.fit == "stretch" else self._scaled(width, height, aspect)
        if target != (width, height):
            shrinks = target[0] < width or target[1] < height
            grey_HW = cv2.resize(grey_HW, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        if grey_HW.shape == (self.size, self.size):
            return np.ascontiguousarray(grey_HW)
        canvas = np.zeros((self.size, self.size), np.uint8)
        left, top = (self.size - target[0]) // 2, (self.size - target[1]) // 2
        canvas[top : top + target[1], left : left + target[0]] = grey_HW
        return canvas


@dataclass(frozen=True)
class DecodedImage:
    """Prepared pixels `uint8 [size, size]`, the size of the source image in pixels, how high as wide these are, and
    whether the file says that text is burned into them."""

    pixels: np.ndarray
    width: int
    height: int
    aspect: float = 1.0
    burned_in: bool = False


def decode(data: bytes, recipe: Recipe, limits: Limits) -> DecodedImage:
    """Decode a PNG, JPEG or DICOM file, known by its first bytes. Raises RejectedImage for what cannot be prepared."""
    if not data.startswith(MAGIC) and is_dicom(data):
        return _decode_dicom(data, recipe, limits)
    if data.startswith(PNG):
        _require_few_chunks(data)
    elif data.startswith(JPEG):
        require_few_markers(data)
    with reading("the header of a PNG or JPEG", words=True):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise _not_an_image(data) from None
    width, height = image.size
    limits.check(width, height)
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise RejectedImage("unsupported", f"{frames} frames in one file")
    if image.format == "PNG" and data[DEPTH] == 16:
        return DecodedImage(recipe.resize(_windowed(_deep(data, recipe))), width, height)
    with reading(f"{width} x {height} {image.format}", words=True):
        image.load()
        grey_HW = _grey(image)
    return DecodedImage(recipe.resize(grey_HW), grey_HW.shape[1], grey_HW.shape[0])


def _require_few_chunks(data: bytes) -> None:
    """Raises RejectedImage for a PNG of so many chunks that what a reader keeps of each fills the memory."""
    place = len(PNG)
    for _ in range(MOST_CHUNKS):
        if place >= len(data):
            return
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    raise RejectedImage("unsupported", f"a PNG of more than {MOST_CHUNKS:,} chunks")


def _decode_dicom(data: bytes, recipe: Recipe, limits: Limits) -> DecodedImage:
    _known(recipe, "DICOM")
    film = read_film(data, limits)
    height, width = film.grey_HW.shape
    return DecodedImage(recipe.resize(film.grey_HW, film.aspect), width, height, film.aspect, film.burned_in)


def _not_an_image(data: bytes) -> RejectedImage:
    if data.startswith(MAGIC):
        return RejectedImage("damaged", f"the header of a PNG or JPEG and no image: {len(data)} bytes")
    if is_bare_dicom(data):
        return RejectedImage("not_an_image", BARE_TEXT)
    found = "an empty file" if not data else f"{len(data)} bytes that begin with {data[:8]!r}"
    return RejectedImage("not_an_image", f"neither PNG, JPEG nor DICOM: {found}")


def _known(recipe: Recipe, form: str) -> None:
    """Refuse a form of image that an older recipe reads otherwise, or not at all."""
    if recipe.window != WINDOW:
        text = f"{form}, which decode recipe {recipe.id} does not know or reads otherwise: prepare and train again,"
        raise RejectedImage("unsupported", f"{text} or give an 8-bit PNG or JPEG")


def _deep(data: bytes, recipe: Recipe) -> np.ndarray:
    """Luminance `uint16 [H, W]` of a 16-bit PNG, of which Pillow keeps 8 bits where it has colour or opacity."""
    if data[KIND]:
        _known(recipe, "16 bits with colour or opacity")
    with reading("a 16-bit PNG that cannot be decoded"):
        values = imagecodecs.png_decode(data)
    if values.ndim == 2:
        return values
    if values.shape[2] == 2:
        return np.ascontiguousarray(values[..., 0])
    return cv2.cvtColor(values, cv2.COLOR_RGB2GRAY if values.shape[2] == 3 else cv2.COLOR_RGBA2GRAY)


def _windowed(wide_HW: np.ndarray) -> np.ndarray:
    """Grey values `uint8 [H, W]` from the lowest to the highest of 16-bit ones."""
    low, high = float(wide_HW.min()), float(wide_HW.max())
    steps = (np.arange(1 << 16, dtype=np.float32) - low) * (255.0 / max(high - low, 1.0))
    return cv2.LUT(wide_HW, np.rint(np.clip(steps, 0, 255)).astype(np.uint8))


def _grey(image: Image.Image) -> np.ndarray:
    """Luminance `uint8 [H, W]`, upright as its file says."""
    if image.mode not in MODES:
        raise RejectedImage("unsupported", f"pixel mode {image.mode}")
    turn = _TURNS.get(_orientation(image)) if image.format == "JPEG" else None
    grey = image if image.mode == "L" else image.convert("RGB").convert("L")
    return np.asarray(grey if turn is None else grey.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """How a JPEG's EXIF says that its pixels lie; 1, as they are to be seen, where it says nothing."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # Pillow names none of what it raises for mangled EXIF, which harms no pixel
        return 1
