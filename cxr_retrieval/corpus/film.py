"""The image of a DICOM file as a viewer would show it: how its values lie in the file, and their way to grey.

Windows and tables are in `greyscale`, compressed frames in `codestream`. Sizes are checked before memory is taken.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset

from cxr_retrieval.corpus import codestream
from cxr_retrieval.corpus.dicom import (
    NATIVE,
    UNREAD,
    burned_in,
    element,
    first,
    read_header,
    require_decodable,
    whole,
)
from cxr_retrieval.corpus.greyscale import Scale, StoredBits, grey_table
from cxr_retrieval.corpus.limits import (
    BURNED_IN,
    FOR_PROCESSING,
    HEADER_ROOM,
    ExcludedImage,
    Limits,
    RejectedImage,
    reading,
)

SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
PIXELS = (
    *SPACINGS,
    "PresentationIntentType",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "BurnedInAnnotation",
    "PixelData",
)
GREY, RGB, YBR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_RCT", "YBR_ICT"), ("YBR_FULL", "YBR_FULL_422")
NOT_SHOWN = ("PALETTE COLOR", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK")
SQUARE, ODDEST = 1e-3, 8.0  # how far from square is rounding; sides of a pixel that nobody means
ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True)
class Film:
    """Grey values `uint8 [H, W]` as they are shown, how many times as high as wide a pixel is, and whether the file
    says that text is burned into it."""

    grey_HW: np.ndarray
    aspect: float
    burned_in: bool


def read_film(data: bytes, limits: Limits) -> Film:
    """The image of a DICOM file as it is to be shown. Raises RejectedImage, and ExcludedImage for what is none of the
    images that are looked for."""
    with reading(UNREAD):
        header, syntax = read_header(data, PIXELS, 3 * limits.max_pixels + HEADER_ROOM)
        require_decodable(syntax)
        shape = _Shape.of(header, syntax, limits)
        with_text = burned_in(header) or False
        if with_text and limits.without_text:
            raise ExcludedImage(BURNED_IN)
        aspect = _aspect(header)
        pixels = element(header, "PixelData")
        scale = Scale.of(header, syntax)
    if shape.photometric not in GREY:
        return Film(_luminance(shape, pixels), aspect, with_text)
    stored_HW, told = (shape.native(pixels), None) if syntax in NATIVE else shape.decoded(pixels)
    table = grey_table(stored_HW, shape.held(told), scale, inverted=shape.photometric == "MONOCHROME1")
    return Film(cv2.LUT(np.ascontiguousarray(stored_HW), table), aspect, with_text)


def _aspect(header: Dataset) -> float:
    """Height of a pixel over its width: spacing between rows over that between columns (10.7.1.3, C.7.6.3.1.7)."""
    for name in SPACINGS:
        values = element(header, name)
        if values is None or isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 2:
            continue
        if not all(str(value).strip(" \0") for value in values):  # blanks tell nothing
            continue
        high, wide = (float(value) for value in values)
        if not (np.isfinite(high + wide) and high > 0 and wide > 0):
            continue
        aspect = high / wide
        if not 1 / ODDEST <= aspect <= ODDEST:
            raise RejectedImage("unsupported", f"pixels {aspect:.3g} times as high as wide")
        return 1.0 if abs(aspect - 1) < SQUARE else aspect
    return 1.0


@dataclass(frozen=True)
class _Shape:
    """How an image's stored values lie in its bytes."""

    syntax: uid.UID
    width: int
    height: int
    samples: int
    photometric: str
    planar: bool
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    words: bool  # 8-bit values that were swapped two by two, as big endian words

    @classmethod
    def of(cls, header: Dataset, syntax: uid.UID, limits: Limits) -> "_Shape":
        """The shape of the one image in a file. Raises RejectedImage for more than one, and outside the limits."""
        if "Rows" not in header and "PixelData" not in header:
            raise RejectedImage("not_an_image", "a DICOM object without an image")
        width, height = whole(header, "Columns"), whole(header, "Rows")
        limits.check(width, height)
        pixels = element(header, "PixelData")
        if not (pixels and isinstance(pixels, bytes)):  # of a value representation that is no bytes' it is none
            raise RejectedImage("damaged", f"DICOM of {width} x {height} pixels without its pixel data")
        frames = whole(header, "NumberOfFrames", 1)
        if frames > 1:
            raise RejectedImage("unsupported", f"{frames} frames in one file")
        if first(header, "PresentationIntentType") == "FOR PROCESSING":
            raise ExcludedImage(FOR_PROCESSING)  # such raw values come in pairs with what is shown of them
        photometric = str(first(header, "PhotometricInterpretation") or "").strip(" \0")
        if photometric not in (*GREY, *RGB, *YBR):
            told = photometric if photometric in NOT_SHOWN else "none that the standard lists"
            raise RejectedImage("unsupported", f"photometric interpretation: {told}")
        allocated = whole(header, "BitsAllocated")
        stored = whole(header, "BitsStored", allocated)
        shape = cls(
            syntax,
            width,
            height,
            samples=whole(header, "SamplesPerPixel", 1),
            photometric=photometric,
            planar=whole(header, "PlanarConfiguration", 0) == 1,
            allocated=allocated,
            stored=stored,
            high_bit=whole(header, "HighBit", stored - 1),
            signed=whole(header, "PixelRepresentation", 0) == 1,
            words=syntax == uid.ExplicitVRBigEndian and allocated == 8 and header["PixelData"].VR == "OW",
        )
        colour = photometric not in GREY
        if allocated not in (8, 16) or (colour and (allocated, stored) != (8, 8)):
            raise RejectedImage("unsupported", f"{stored} of {allocated} bits for a value of {photometric}")
        if not 1 <= stored <= shape.high_bit + 1 <= allocated:
            raise RejectedImage("damaged", f"{stored} bits that end in bit {shape.high_bit} of {allocated}")
        if shape.samples != (3 if colour else 1):
            raise RejectedImage("damaged", f"{photometric} of {shape.samples} values for a pixel")
        return shape

    def native(self, pixels: bytes, samples: int | None = None) -> np.ndarray:
        """Stored values [H, W], or all in a row for colour, of pixel data that is not compressed."""
        row = self.width * (samples or self.samples) * self.allocated // 8
        surplus = len(pixels) - row * self.height
        # Of less than a row, or of zeros, it is what some devices fill their blocks with; else a size that lies.
        if surplus < 0 or (surplus >= row and (surplus >= row * self.height or pixels[-surplus:].strip(b"\0"))):
            raise RejectedImage("damaged", f"{len(pixels):,} bytes for {self.width} x {self.height} pixels")
        if self.words:
            pixels = np.frombuffer(pixels + bytes(len(pixels) % 2), "<u2").byteswap().tobytes()
        kind = ">u2" if self.syntax == uid.ExplicitVRBigEndian else "<u2"
        values = np.frombuffer(pixels[: row * self.height], "u1" if self.allocated == 8 else kind)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        return values.reshape(self.height, self.width) if self.samples == 1 else values

    def decoded(self, pixels: bytes) -> tuple[np.ndarray, int | None]:
        """Stored values [H, W] or [H, W, 3] of a compressed frame as unsigned integers, and their bits."""
        values, bits = codestream.decoded(
            self.syntax,
            _frame(pixels),
            self.width,
            self.height,
            self.samples,
            self.allocated // 8,
            self.photometric in RGB,
        )
        more = self.high_bit + 1  # where the frame's bits fill their cell, those may be what else is kept there
        exact = not self.signed and self.syntax not in codestream.LOSSY
        if exact and bits is not None and more < bits < self.allocated and values.max() >> more:
            raise RejectedImage("damaged", f"a frame of {bits} bits whose header tells of {more}")
        return values.view(np.dtype(f"u{values.dtype.itemsize}")), bits

    def held(self, told: int | None) -> StoredBits:
        """Where values lie in what was read: in a frame that tells of fewer bits than the header's highest from bit 0
        on, else where the header says."""
        bits, shift = self.stored, self.high_bit + 1 - self.stored
        if told is not None and told <= self.high_bit:
            bits, shift = min(told, self.stored), 0
        if told is not None and shift == 0 and self.syntax in codestream.LOSSY:
            bits = told  # what lies above the stored bits is an overshoot here, and counts
        return StoredBits(bits, shift, self.stored, self.allocated, self.signed)


def _frame(pixels: bytes) -> bytes:
    """The one compressed frame of encapsulated pixel data: its fragments without the offset table (PS3.5 A.4)."""
    fragments, place = [], 0
    while place < len(pixels) and pixels[place : place + 4] != DELIMITER:
        length = int.from_bytes(pixels[place + 4 : place + 8], "little")
        if pixels[place : place + 4] != ITEM or place + 8 + length > len(pixels):
            raise RejectedImage("damaged", "compressed pixel data whose fragments are cut or lie of their length")
        fragments.append(pixels[place + 8 : place + 8 + length])
        place += 8 + length
    return b"".join(fragments[1:])


def _luminance(shape: _Shape, pixels: bytes) -> np.ndarray:
    """Luminance `uint8 [H, W]`: Y of YBR as it is, RGB by the weights that a PNG's colours get."""
    height, width = shape.height, shape.width
    if shape.syntax in NATIVE and shape.photometric == "YBR_FULL_422":  # Y, Y, Cb, Cr for two pixels
        if width % 2:
            raise RejectedImage("damaged", f"{shape.photometric} of {width} columns")
        pairs = shape.native(pixels, samples=2).reshape(height, width // 2, 4)
        return np.ascontiguousarray(pairs[..., :2].reshape(height, width))
    if shape.syntax in NATIVE:
        values = shape.native(pixels)
        if shape.planar:
            values = values.reshape(3, height, width).transpose(1, 2, 0)
        colours = values.reshape(height, width, 3)
    else:
        colours, _ = shape.decoded(pixels)
    if colours.dtype != np.uint8:
        raise RejectedImage("unsupported", "colours of more than 8 bits")
    if colours.ndim == 2:
        return colours
    if shape.photometric in YBR:
        return np.ascontiguousarray(colours[..., 0])
    return np.asarray(Image.fromarray(np.ascontiguousarray(colours)).convert("L"))
