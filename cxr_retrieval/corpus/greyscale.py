"""The grey scale pipeline of DICOM (PS3.3 C.7.5.1, C.7.6.3, C.11.1, C.11.2), applied to a table instead of an image.

Unused bits and sign, modality table or rescale, VOI table or first window, inversion, padding: each maps one value to
one value, so all that 8 or 16 bits can hold goes through them, and the image is looked up in the result.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing

from cxr_retrieval.corpus.dicom import MOST_TABLE, element, first, number, require_short
from cxr_retrieval.corpus.limits import RejectedImage

WINDOWS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
LEAST = 1e-9  # a slope or width that is nothing


@dataclass(frozen=True)
class StoredBits:
    """Where a stored value lies in the bits that hold it: `bits` of them, from bit `shift` on.

    Where these are more than the `stored` bits of the header, a value that a lossy compression made too high is cut
    rather than wrapped around.
    """

    bits: int
    shift: int
    stored: int
    allocated: int
    signed: bool

    def values(self, held: np.ndarray) -> np.ndarray:
        values = held >> self.shift & (1 << self.bits) - 1
        if self.signed:
            values = np.where(values >> self.bits - 1, values - (1 << self.bits), values)
        lowest = -(1 << self.stored - 1) if self.signed else 0
        return np.clip(values, lowest, lowest + (1 << self.stored) - 1)


@dataclass(frozen=True)
class Lut:
    """A look-up table of a DICOM header: entries of `depth` bits, the first of them for `start`, as 16 bits without a
    sign hold it (PS3.3 C.11.1.1, C.11.2.1.1). Files tell signs by rules that many break, so none is taken from them.
    """

    start: int
    depth: int
    entries: np.ndarray

    @classmethod
    def of(cls, header: Dataset, name: str, order: str) -> "Lut | None":
        """The table of a sequence's first item, whose words are in byte `order`."""
        if not (sequence := element(header, name)):
            return None
        item = sequence[0]
        require_short(item, ["LUTDescriptor"])
        require_short(item, ["LUTData"], MOST_TABLE)
        count, start, depth = (int(value) & 0xFFFF for value in item.LUTDescriptor)
        if not 8 <= depth <= 16:
            raise RejectedImage("unsupported", f"a look-up table of {depth} bits")
        data, wanted = item["LUTData"].value, count or 1 << 16
        if isinstance(data, bytes):
            wide = len(data) >= 2 * wanted
            entries = np.frombuffer(data, f"{order}u2" if wide else "u1")
        else:
            entries = np.atleast_1d(np.asarray(data))
        if len(entries) < wanted:
            raise RejectedImage("damaged", f"a look-up table of {len(entries)} entries instead of {wanted}")
        return cls(start, depth, entries[:wanted].astype(np.int64) & 0xFFFF)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """What all values that are possible become. `start` has a sign where some of them are below zero, and where it
        would lie above them all."""
        signed = self.start >> 15 and (values.min() < 0 or values.max() < self.start)
        places = np.rint(values).astype(np.int64) - (self.start - (1 << 16) if signed else self.start)
        looked_up: np.ndarray = self.entries[np.clip(places, 0, len(self.entries) - 1)]
        return looked_up


@dataclass(frozen=True)
class Scale:
    """What turns stored values into grey ones, as far as the header says."""

    modality: Lut | None
    slope: float
    intercept: float
    voi: Lut | None
    window: Dataset | None
    padding: tuple[int, int] | None

    @classmethod
    def of(cls, header: Dataset, syntax: uid.UID) -> "Scale":
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        slope, intercept = number(header, "RescaleSlope"), number(header, "RescaleIntercept")
        rescaled = slope is not None and intercept is not None and abs(slope) > LEAST
        padding = first(header, "PixelPaddingValue")
        limit = first(header, "PixelPaddingRangeLimit")
        return cls(
            modality=Lut.of(header, "ModalityLUTSequence", order),
            slope=slope if rescaled and slope is not None else 1.0,
            intercept=intercept if rescaled and intercept is not None else 0.0,
            voi=Lut.of(header, "VOILUTSequence", order),
            window=_window(header),
            padding=None if padding is None else (int(padding), int(padding if limit is None else limit)),
        )


def _window(header: Dataset) -> Dataset | None:
    """The first window, set up to give grey values from 0 to 255. None where there is none that can be applied."""
    center, width = number(header, "WindowCenter"), number(header, "WindowWidth")
    function = str(first(header, "VOILUTFunction") or "LINEAR").strip(" \0").upper()
    if center is None or width is None or function not in WINDOWS or width < (1 if function == "LINEAR" else LEAST):
        return None
    window = Dataset()
    window.add_new("WindowCenter", "FD", center)  # as decimal strings they could be too long for pydicom to take
    window.add_new("WindowWidth", "FD", width)
    window.VOILUTFunction = function
    window.PhotometricInterpretation, window.PixelRepresentation, window.BitsStored = "MONOCHROME2", 0, 8
    return window


def grey_table(stored_HW: np.ndarray, bits: StoredBits, scale: Scale, inverted: bool) -> np.ndarray:
    """The grey value of everything that 8 or 16 bits can hold: `uint8 [256 or 65536]`, for these stored values."""
    held = np.arange(1 << 8 * stored_HW.dtype.itemsize)
    fields = held >> bits.shift & (1 << bits.bits) - 1  # of 12 bits a sixteenth as many: what is worked on below
    values = bits.values(np.arange(1 << bits.bits) << bits.shift)
    padding = np.zeros(len(held), bool)
    if scale.padding is not None:
        whole = 1 << bits.allocated
        # Signed values are sometimes written as unsigned ones.
        ends = [end - whole if bits.signed and whole // 2 <= end < whole else end for end in scale.padding]
        padding = ((values >= min(ends)) & (values <= max(ends)))[fields]
        if bits.shift == 0:
            padding |= held == ends[0] & (whole - 1)  # it may lie outside the bits that are stored
    measured = scale.modality(values) if scale.modality else values * scale.slope + scale.intercept
    if scale.voi:
        grey = scale.voi(measured) * (255.0 / ((1 << scale.voi.depth) - 1))
    elif scale.window is not None:
        grey = apply_windowing(measured, scale.window)
    else:
        if (scale.modality.depth if scale.modality else bits.stored) > 8:
            channels, span = [stored_HW], [0.0, float(len(held))]
            there = cv2.calcHist(channels, [0], None, [len(held)], span).ravel() > 0
            shown = measured[fields[there & ~padding]]
        else:  # without a VOI stage nothing is stretched: an 8-bit export has the values that are stored
            shown = np.array((0, 255)) if scale.modality else measured
        low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 0.0)
        grey = (measured - low) * (255.0 / ((high - low) or 1.0))
    table = np.rint(np.clip(grey, 0, 255)).astype(np.uint8)
    table = (255 - table if inverted else table)[fields]
    table[padding] = 0  # padding is background, and no part of the grey scale (PS3.3 C.7.5.1.1.2)
    return table
