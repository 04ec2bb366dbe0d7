"""Promises of reading DICOM: what a viewer would show, what is refused and why, and what never leaves the header."""

import contextlib
import datetime
import io
import struct
import subprocess
import sys
import zlib
from dataclasses import fields, replace
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from cxr_retrieval.corpus import dicom, film
from cxr_retrieval.corpus.decoding import DecodedImage, Limits, Recipe, RejectedImage, decode
from cxr_retrieval.corpus.dicom import DicomFacts, age_years, read_facts
from cxr_retrieval.corpus.film import read_film
from cxr_retrieval.corpus.limits import ExcludedImage
from tests.dicoms import HEIGHT, SECRET, WIDTH, dataset, ramp, written

SIZE = 64
RECIPE = Recipe(SIZE, "letterbox")
LIMITS = Limits(min_side=32, max_pixels=1 << 20)


def compressed(made: FileDataset, syntax: str, frame: bytes, fragments: int = 1) -> bytes:
    made.file_meta.TransferSyntaxUID = uid.UID(syntax)
    made.PixelData = encapsulate([frame], fragments_per_frame=fragments)
    made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    return written(made)


def decoded(data: bytes, recipe: Recipe = RECIPE) -> DecodedImage:
    return decode(data, recipe, LIMITS)


def shown(made: FileDataset | bytes) -> np.ndarray:
    """Grey values at full resolution."""
    return read_film(made if isinstance(made, bytes) else written(made), LIMITS).grey_HW.astype(int)


def rejected(data: bytes | FileDataset, limits: Limits = LIMITS, recipe: Recipe = RECIPE) -> RejectedImage:
    with pytest.raises(RejectedImage) as caught:
        decode(data if isinstance(data, bytes) else written(data), recipe, limits)
    assert caught.value.text.isascii()
    assert "\n" not in caught.value.text
    return caught.value


def from_least_to_most(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    return np.rint((wide - wide.min()) / np.ptp(wide) * 255).astype(int)


def png(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


def look_up_table(entries: np.ndarray, start: int, depth: int, vr: str | None = None) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", vr or ("SS" if start < 0 else "US"), [len(entries) % 65536, start, depth])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return Sequence([item])


# The export that a DICOM file is held against: the steps of the standard by pydicom's own functions on the whole image.
def export(made: FileDataset, rounded: bool = True) -> np.ndarray:
    values = apply_voi_lut(apply_modality_lut(made.pixel_array, made), made).astype(np.float64)
    low, high = 0.0, float((1 << made.BitsStored) - 1)
    if "RescaleSlope" in made and "VOILUTSequence" not in made:
        low, high = (end * made.RescaleSlope + made.RescaleIntercept for end in (low, high))
    if made.PixelRepresentation == 1:
        half = float(1 << made.BitsStored - 1)
        low, high = low - half, high - half
    if "VOILUTSequence" in made:
        low, high = 0.0, float((1 << made.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    grey = np.clip((values - low) / (high - low) * 255, 0, 255)
    grey = np.rint(grey) if rounded else np.floor(grey)
    return (255 - grey if made.PhotometricInterpretation == "MONOCHROME1" else grey).astype(np.uint8)


windows = st.fixed_dictionaries(
    {
        "WindowCenter": st.integers(0, 4096),
        "WindowWidth": st.integers(2, 6000),
        "VOILUTFunction": st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
        "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    }
)


@given(window=windows, signed=st.booleans(), rounded=st.booleans())
@settings(max_examples=60)
def test_a_png_that_was_exported_by_the_same_window_gives_the_same_pixels_within_one_grey_level(
    window: dict[str, Any], signed: bool, rounded: bool
) -> None:
    made = dataset(ramp(12, signed), **window)
    ours, theirs = decoded(written(made)).pixels, decoded(png(export(made, rounded))).pixels
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_first_of_several_windows_is_used() -> None:
    pixels = ramp()
    several = dataset(pixels, WindowCenter=[1000, 3000], WindowWidth=[600, 100], VOILUTFunction="LINEAR")
    one = dataset(pixels, WindowCenter=1000, WindowWidth=600)
    assert np.array_equal(shown(several), shown(one))


@pytest.mark.parametrize(
    ("function", "center", "width", "expected"),
    [
        # PS3.3 C.11.2.1.2.1: at or below c - 0.5 - (w - 1) / 2 black, above c - 0.5 + (w - 1) / 2 white.
        ("LINEAR", 2048, 4096, {0: 0, 4095: 255, 2047: 127, 2048: 128}),
        ("LINEAR", 2048, 1, {2047: 0, 2048: 255}),
        ("LINEAR_EXACT", 2048, 4096, {0: 0, 2048: 128, 1024: 64}),
        ("SIGMOID", 2048, 1024, {2048: 128, 2304: round(255 / (1 + np.exp(-1))), 0: round(255 / (1 + np.exp(8)))}),
    ],
)
def test_a_window_function_has_the_values_of_its_formula(
    function: str, center: float, width: float, expected: dict[int, int]
) -> None:
    pixels = np.tile(np.arange(4096, dtype=np.uint16), (32, 1))
    grey = shown(dataset(pixels, WindowCenter=center, WindowWidth=width, VOILUTFunction=function))
    assert {value: int(grey[0, value]) for value in expected} == expected


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 2000},
        {"WindowCenter": 0, "WindowWidth": 0},
        {"WindowCenter": 2000, "WindowWidth": 100, "VOILUTFunction": "VENDOR"},
    ],
)
def test_without_a_window_more_than_8_bits_run_from_their_least_to_their_most(window: Any) -> None:
    pixels = ramp() // 2 + 900
    assert np.array_equal(shown(dataset(pixels, **window)), from_least_to_most(pixels))


HALF_OF_8_BITS = (ramp(8) // 2 + 60).astype(np.uint8)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 1, "RescaleIntercept": 0}])
@pytest.mark.parametrize("stored", ["8 of 8 bits", "8 of 16 bits", "RLE", "JPEG"])
def test_8_bits_without_a_window_are_what_an_8_bit_png_of_them_is(
    photometric: str, rescale: dict[str, int], stored: str
) -> None:
    pixels = HALF_OF_8_BITS.astype(np.uint16) if stored == "8 of 16 bits" else HALF_OF_8_BITS
    made = dataset(pixels, 8, PhotometricInterpretation=photometric, **rescale)
    if stored == "RLE":
        made.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    lossless = imagecodecs.jpeg8_encode(HALF_OF_8_BITS, lossless=True)
    data = compressed(made, uid.JPEGLosslessSV1, lossless) if stored == "JPEG" else written(made)
    export = 255 - HALF_OF_8_BITS if photometric == "MONOCHROME1" else HALF_OF_8_BITS
    assert np.array_equal(decoded(data).pixels, decoded(png(export)).pixels)


@pytest.mark.parametrize(("slope", "intercept"), [(2, -100), (0.5, 0), (-1, 255), (-3, 7)])
def test_8_bits_without_a_window_keep_their_grey_values_however_they_are_rescaled(slope: float, intercept: int) -> None:
    grey = shown(dataset(HALF_OF_8_BITS, 8, RescaleSlope=slope, RescaleIntercept=intercept))
    assert np.array_equal(grey, HALF_OF_8_BITS if slope > 0 else 255 - HALF_OF_8_BITS)


def test_8_signed_bits_without_a_window_are_black_at_their_least_possible_value() -> None:
    pixels = (HALF_OF_8_BITS.astype(int) - 128).astype(np.int8)
    assert np.array_equal(shown(dataset(pixels, 8)), HALF_OF_8_BITS)


@pytest.mark.parametrize("depth", [8, 16])
def test_without_a_window_it_is_the_bits_of_a_modality_table_that_count(depth: int) -> None:
    entries = np.arange(256)[::-1] // 2 + (0 if depth == 8 else 1000)
    grey = shown(dataset(HALF_OF_8_BITS, 8, ModalityLUTSequence=look_up_table(entries, 0, depth)))
    values = entries[HALF_OF_8_BITS]
    assert np.array_equal(grey, values if depth == 8 else from_least_to_most(values))


def raw_element(data: bytes, name: str, vr: bytes, text: str) -> bytes:
    """A file with one more element, put in its place by hand: pydicom would refuse to write it."""
    tag = pydicom.tag.Tag(name)
    value = (text + " " * (len(text) % 2)).encode()
    later = [struct.pack("<HH", 0x28, element) for element in range(tag.element + 1, 0x1060)]
    after = min((at for at in map(data.find, later) if at > 0), default=data.find(struct.pack("<HH", 0x7FE0, 0x10)))
    return data[:after] + struct.pack("<HH2sH", tag.group, tag.element, vr, len(value)) + value + data[after:]


def test_numbers_longer_than_the_standard_allows_are_read() -> None:
    pixels = ramp()
    data = written(dataset(pixels, WindowWidth=1000, RescaleIntercept=0))
    longer = raw_element(data, "WindowCenter", b"DS", "2047.333333333333349")
    assert np.array_equal(shown(longer), shown(dataset(pixels, WindowCenter=2047.33333333333, WindowWidth=1000)))


@pytest.mark.parametrize("slope", ["inf", "nan", "1e300", "1e-320", "0", "x"])
@pytest.mark.filterwarnings("error")
def test_a_film_with_a_slope_that_is_no_number_of_sane_size_is_shown_as_without_it(slope: str) -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 900}  # in values that a slope would move out of it
    plain = written(dataset(ramp(), RescaleIntercept=7, PixelPaddingValue=0, **window))
    found = shown(raw_element(plain, "RescaleSlope", b"DS", slope))
    assert (found.min(), found.max()) == (0, 255)
    assert np.array_equal(found, shown(plain))
    assert not np.array_equal(found, shown(raw_element(plain, "RescaleSlope", b"DS", "2")))


def test_16_bits_without_a_window_are_what_a_16_bit_png_of_them_is() -> None:
    pixels = ramp(16)
    assert np.array_equal(decoded(written(dataset(pixels, 16))).pixels, decoded(png(pixels)).pixels)


def test_monochrome1_is_inverted_once() -> None:
    pixels = ramp()
    window = {"WindowCenter": 2000, "WindowWidth": 1500}
    inverted = dataset(pixels, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE", **window)
    assert np.array_equal(shown(inverted), 255 - shown(dataset(pixels, **window)))


@pytest.mark.parametrize("slope", [1, 0.5, 2.25, -1])
def test_a_window_is_in_rescaled_values(slope: float) -> None:
    pixels = ramp()
    rescaled = dataset(pixels, RescaleSlope=slope, RescaleIntercept=-300)
    rescaled.WindowCenter, rescaled.WindowWidth, rescaled.VOILUTFunction = 200, 1000, "LINEAR_EXACT"
    values = pixels.astype(np.float64) * slope - 300
    expected = np.clip((values - 200) / 1000 + 0.5, 0, 1) * 255
    assert np.abs(shown(rescaled) - expected).max() <= 0.5 + 1e-9


def test_a_modality_table_comes_before_the_window() -> None:
    pixels = ramp()
    entries = np.arange(4096)[::-1] * 16
    made = dataset(pixels, ModalityLUTSequence=look_up_table(entries, 0, 16), WindowCenter=30000, WindowWidth=40000)
    made.VOILUTFunction = "LINEAR_EXACT"
    expected = np.clip((entries[pixels] - 30000.0) / 40000 + 0.5, 0, 1) * 255
    assert np.abs(shown(made) - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("start", "count", "depth"), [(0, 4096, 12), (700, 2000, 16), (100, 4000, 8), (3000, 4096, 10)]
)
def test_a_voi_table_maps_what_lies_outside_to_its_ends_and_goes_before_a_window(
    start: int, count: int, depth: int
) -> None:
    pixels = ramp()
    entries = np.rint(np.linspace(0, 1, count) ** 2 * ((1 << depth) - 1)).astype(int)
    made = dataset(pixels, VOILUTSequence=look_up_table(entries, start, depth), WindowCenter=1, WindowWidth=2)
    expected = entries[np.clip(pixels.astype(int) - start, 0, count - 1)] / ((1 << depth) - 1) * 255
    assert np.abs(shown(made) - expected).max() <= 0.5 + 1e-9
    if depth > 8:
        assert np.abs(shown(made) - export(made)).max() <= 1


def test_a_voi_table_may_begin_below_zero() -> None:
    pixels = ramp(12, signed=True)
    entries = np.arange(4096)
    made = dataset(pixels, VOILUTSequence=look_up_table(entries, -2048, 12))
    assert np.array_equal(shown(made), from_least_to_most(pixels))


@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("count", [32767, 32768, 40000, 65535, 65536])
@pytest.mark.parametrize("implicit", [False, True])
def test_a_table_is_read_whole_however_many_entries_it_has(sequence: str, count: int, implicit: bool) -> None:
    pixels = ramp(16, signed=True)
    entries = np.rint(np.linspace(0, 65535, count)).astype(int)
    made = dataset(pixels, 16, **{sequence: look_up_table(entries, -32768, 16)})
    if implicit:  # nothing but the sign of the pixels says there whether a number of a table has one
        made.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    expected = entries[np.minimum(pixels.astype(int) + 32768, count - 1)] / 65535 * 255
    assert np.abs(shown(made) - expected).max() <= 0.5 + 1e-9


# PS3.3 C.11.2.1.1: the first value that is mapped has a sign where what comes out of the modality stage may have one.
@pytest.mark.parametrize(
    ("pixels", "bits", "modality", "start", "told"),
    [
        (ramp(), 12, {"RescaleSlope": 1, "RescaleIntercept": -1024}, -1024, ("SS", -1024)),
        (ramp(), 12, {"RescaleSlope": 1, "RescaleIntercept": -1024}, -1024, ("US", 65536 - 1024)),
        (ramp(12, signed=True), 12, {}, -2048, ("US", 65536 - 2048)),
        (ramp(), 12, {}, -1024, ("SS", -1024)),
        (ramp(16), 16, {}, 40000, ("SS", 40000 - 65536)),
        (
            ramp(16, signed=True),
            16,
            {"ModalityLUTSequence": look_up_table(np.arange(65536), -32768, 16)},
            40000,
            ("US", 40000),
        ),
    ],
    ids=["rescaled", "rescaled-unsigned", "signed-unsigned", "below-all", "unsigned-signed", "modality-table"],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_a_voi_table_begins_where_the_values_are_that_it_is_for(
    pixels: np.ndarray, bits: int, modality: dict[str, Any], start: int, told: tuple[str, int], implicit: bool
) -> None:
    entries = np.arange(4096)
    made = dataset(pixels, bits, **modality, VOILUTSequence=look_up_table(entries, told[1], 12, told[0]))
    if implicit:
        made.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    values = pixels.astype(int) + modality.get("RescaleIntercept", 32768 if modality else 0)
    expected = entries[np.clip(values - start, 0, 4095)] / 4095 * 255
    assert np.abs(shown(made) - expected).max() <= 0.5 + 1e-9


def test_the_entries_of_a_table_have_no_sign_whatever_the_file_says() -> None:
    entries = np.arange(4096) * 16
    made = dataset(ramp(), VOILUTSequence=look_up_table(entries, 0, 16))
    made.VOILUTSequence[0].add_new("LUTData", "SS", entries.astype(np.uint16).view(np.int16).tolist())
    assert np.abs(shown(made) - ramp() * 16 / 65535 * 255).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("big_endian", [False, True])
def test_a_table_is_read_in_the_byte_order_of_its_file(big_endian: bool) -> None:
    pixels = ramp()
    made = dataset(pixels, VOILUTSequence=look_up_table(np.arange(4096)[::-1], 0, 12))
    grey = shown(made)
    if big_endian:
        swapped = np.frombuffer(made.VOILUTSequence[0].LUTData, "<u2").astype(">u2").tobytes()
        made.VOILUTSequence[0].LUTData = swapped
        made.PixelData = pixels.astype(">u2").tobytes()
        made.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        assert np.array_equal(shown(written(made, little_endian=False, implicit_vr=False)), grey)
    assert np.array_equal(grey, 255 - from_least_to_most(pixels))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("limit", [None, 4095])
def test_padding_is_black_and_widens_no_window(photometric: str, limit: int | None) -> None:
    pixels = ramp() // 4 + 500
    padded = pixels.copy()
    padded[:20] = 4095 if limit is None else 4090
    made = dataset(padded, PhotometricInterpretation=photometric, PixelPaddingValue=4095 if limit is None else 4090)
    if limit is not None:
        padded[5] = 4093
        made.PixelData, made.PixelPaddingRangeLimit = padded.tobytes(), limit
    rest = from_least_to_most(pixels[20:])
    grey = shown(made)
    assert not grey[:20].any()
    assert np.array_equal(grey[20:], 255 - rest if photometric == "MONOCHROME1" else rest)


def test_padding_outside_the_stored_bits_and_signed_padding_written_as_unsigned_are_known() -> None:
    pixels = ramp()
    pixels[:20] = 65535
    assert not shown(dataset(pixels, PixelPaddingValue=65535))[:20].any()
    signed = ramp(16, signed=True) // 8
    signed[:20] = -20000
    made = dataset(signed, 16)
    made.add_new("PixelPaddingValue", "US", 65536 - 20000)
    grey = shown(made)
    assert not grey[:20].any()
    assert np.array_equal(grey[20:], from_least_to_most(signed[20:]))


def test_a_padding_value_is_none_of_the_cells_whose_values_lie_in_higher_bits() -> None:
    pixels = ramp()
    plain, shifted = dataset(pixels, PixelPaddingValue=4000), dataset(pixels << 4, PixelPaddingValue=4000)
    shifted.BitsStored, shifted.HighBit = 12, 15
    assert (pixels == 250).any()
    assert np.array_equal(shown(shifted), shown(plain))


def test_an_image_of_padding_alone_is_black() -> None:
    assert not shown(dataset(np.full((40, 40), 7, np.uint16), PixelPaddingValue=7)).any()


def test_a_flat_image_is_black_and_no_division_by_zero() -> None:
    assert not shown(dataset(np.full((40, 40), 4000, np.uint16))).any()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_stored_bits_and_their_sign_are_honoured(bits: int, signed: bool) -> None:
    pixels = ramp(bits, signed)
    made = dataset(pixels, bits, WindowCenter=0 if signed else 1 << bits - 1, WindowWidth=1 << bits)
    assert np.abs(shown(made) - from_least_to_most(pixels)).max() <= 1


def test_what_lies_in_unused_bits_is_not_shown() -> None:
    pixels = ramp(12)
    with_overlay = pixels | (np.arange(WIDTH, dtype=np.uint16) % 16 << 12)
    assert np.array_equal(shown(dataset(with_overlay)), shown(dataset(pixels)))
    signed = ramp(12, signed=True)
    stripped = (signed.view(np.uint16) & 0x0FFF).view(np.int16)
    assert np.array_equal(shown(dataset(stripped)), shown(dataset(signed)))
    high = dataset(pixels << 4)
    high.HighBit = 15
    assert np.array_equal(shown(high), shown(dataset(pixels)))


def test_implicit_deflated_and_big_endian_files_show_the_same() -> None:
    pixels = ramp()
    expected = shown(dataset(pixels))
    for syntax, little, implicit in (
        (uid.ImplicitVRLittleEndian, True, True),
        (uid.DeflatedExplicitVRLittleEndian, True, False),
        (uid.ExplicitVRBigEndian, False, False),
    ):
        made = dataset(pixels)
        made.file_meta.TransferSyntaxUID = syntax
        if not little:
            made.PixelData = pixels.astype(">u2").tobytes()
        assert np.array_equal(shown(written(made, little_endian=little, implicit_vr=implicit)), expected), syntax.name


def test_bytes_in_big_endian_words_are_swapped_back() -> None:
    pixels = ramp(8)
    made = dataset(pixels, 8)
    made.PixelData = np.frombuffer(pixels.tobytes(), "<u2").byteswap().tobytes()
    made["PixelData"].VR = "OW"
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    assert np.array_equal(shown(written(made, little_endian=False, implicit_vr=False)), shown(dataset(pixels, 8)))


def lossless_jpeg(predictor: int) -> Any:
    return lambda values, bits: imagecodecs.jpeg8_encode(values, lossless=True, predictor=predictor, bitspersample=bits)


def jpeg_2000(values: np.ndarray, mct: bool = True) -> bytes:
    return imagecodecs.jpeg2k_encode(values, reversible=True, codecformat="j2k", mct=mct)


LOSSLESS = [
    (uid.JPEGLossless, lossless_jpeg(6)),
    (uid.JPEGLosslessSV1, lossless_jpeg(1)),
    (uid.JPEGLSLossless, lambda values, _: imagecodecs.jpegls_encode(values)),
    (uid.JPEG2000Lossless, lambda values, _: jpeg_2000(values)),
]


@pytest.mark.parametrize(("syntax", "encode"), LOSSLESS, ids=[syntax.keyword for syntax, _ in LOSSLESS])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("fragments", [1, 3])
def test_a_compression_without_loss_shows_every_value(
    syntax: uid.UID, encode: Any, bits: int, signed: bool, fragments: int
) -> None:
    pixels = ramp(bits, signed)
    stored = pixels
    if signed and syntax != uid.JPEG2000Lossless:  # these know no sign: the stored bits are compressed as they are
        stored = pixels.view(np.dtype(f"u{pixels.dtype.itemsize}")) & np.array((1 << bits) - 1, "u2").astype(
            f"u{pixels.dtype.itemsize}"
        )
    data = compressed(dataset(pixels, bits), syntax, encode(stored, bits), fragments)
    assert np.array_equal(shown(data), shown(dataset(pixels, bits)))


@pytest.mark.parametrize("colour", [False, True])
def test_run_lengths_show_every_value(colour: bool) -> None:
    pixels = np.stack([ramp(8), 255 - ramp(8), ramp(8) // 2], -1) if colour else ramp()
    made = dataset(pixels, 8 if colour else 12)
    expected = shown(made)
    made.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    assert np.array_equal(shown(made), expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("syntax", "encode"), [(uid.RLELossless, None), *LOSSLESS])
def test_values_in_the_high_bits_of_what_is_compressed_are_found_there(
    syntax: uid.UID, encode: Any, signed: bool
) -> None:
    pixels = ramp(12, signed)
    held = (pixels << 4).view(np.uint16) | np.arange(WIDTH, dtype=np.uint16) % 16
    made = dataset(held, 16)
    if encode is None:
        made.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    made.BitsStored, made.HighBit, made.PixelRepresentation = 12, 15, int(signed)
    data = written(made) if encode is None else compressed(made, syntax, encode(held, 16))
    assert np.array_equal(shown(data), shown(dataset(pixels)))


TELL_BITS = [
    *LOSSLESS[:2],
    (
        uid.JPEG2000Lossless,
        lambda values, bits: imagecodecs.jpeg2k_encode(values, reversible=True, codecformat="j2k", bitspersample=bits),
    ),
]


@pytest.mark.parametrize(
    ("syntax", "encode", "bits", "stored"),
    [*((*kind, 8, 8) for kind in LOSSLESS), *((*kind, 16, 10) for kind in TELL_BITS)],
)
def test_a_frame_of_more_bits_than_its_header_tells_is_refused_and_not_wrapped_around(
    syntax: uid.UID, encode: Any, bits: int, stored: int
) -> None:
    pixels = ramp()
    made = dataset(pixels)
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, stored, stored - 1
    with pytest.raises(RejectedImage, match=rf"a frame of 1[26] bits .* header .* {stored}$") as refused:
        shown(compressed(made, syntax, encode(pixels, 12)))
    assert refused.value.reason == "damaged"


LOSSY = [
    (uid.JPEGBaseline8Bit, 8, lambda values: imagecodecs.jpeg8_encode(values, level=95)),
    (uid.JPEGExtended12Bit, 8, lambda values: imagecodecs.jpeg8_encode(values, level=95)),
    (uid.JPEGExtended12Bit, 12, lambda values: imagecodecs.jpeg8_encode(values, level=95, bitspersample=12)),
    (uid.JPEGLSNearLossless, 12, lambda values: imagecodecs.jpegls_encode(values, level=4)),
    (uid.JPEG2000, 12, lambda values: imagecodecs.jpeg2k_encode(values, level=75, codecformat="j2k")),
]


@pytest.mark.parametrize(("syntax", "bits", "encode"), LOSSY, ids=[f"{s.keyword}-{bits}" for s, bits, _ in LOSSY])
def test_a_compression_with_loss_shows_nearly_every_value(syntax: uid.UID, bits: int, encode: Any) -> None:
    pixels = ramp(bits)
    window = {"WindowCenter": 1 << bits - 1, "WindowWidth": 1 << bits}
    grey = shown(compressed(dataset(pixels, bits, **window), syntax, encode(pixels)))
    assert np.abs(grey - shown(dataset(pixels, bits, **window))).max() <= 8


def test_a_loss_that_overshoots_the_stored_bits_is_cut_and_not_wrapped_around() -> None:
    pixels = ramp()
    overshot = np.where(pixels > 4000, pixels + 90, pixels).astype(np.uint16)
    data = compressed(dataset(pixels), uid.JPEGLSNearLossless, imagecodecs.jpegls_encode(overshot))
    assert np.array_equal(shown(data), from_least_to_most(np.minimum(overshot, 4095)))


COLOURS = np.stack([ramp(8), 255 - ramp(8), ramp(8) // 2], -1)
LUMINANCE = np.asarray(Image.fromarray(COLOURS).convert("L")).astype(int)
IN_YBR = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))


def test_colour_becomes_the_luminance_that_a_png_of_it_has() -> None:
    assert np.array_equal(shown(dataset(COLOURS, 8)), LUMINANCE)
    planes = dataset(COLOURS, 8, PlanarConfiguration=1)
    planes.PixelData = COLOURS.transpose(2, 0, 1).tobytes()
    assert np.array_equal(shown(planes), LUMINANCE)
    assert np.abs(shown(dataset(IN_YBR, 8, PhotometricInterpretation="YBR_FULL")) - LUMINANCE).max() <= 1
    halved = np.stack([IN_YBR[:, 0::2, 0], IN_YBR[:, 1::2, 0], IN_YBR[:, 0::2, 1], IN_YBR[:, 0::2, 2]], -1)
    made = dataset(IN_YBR, 8, PhotometricInterpretation="YBR_FULL_422")
    made.PixelData = halved.tobytes()
    assert np.abs(shown(made) - LUMINANCE).max() <= 1


@pytest.mark.parametrize(
    ("syntax", "photometric", "frame"),
    [
        (uid.JPEGBaseline8Bit, "YBR_FULL_422", imagecodecs.jpeg8_encode(COLOURS, level=98)),
        (uid.JPEGBaseline8Bit, "RGB", imagecodecs.jpeg8_encode(COLOURS, level=98)),  # JFIF says that it is YBR
        (uid.JPEGBaseline8Bit, "RGB", imagecodecs.jpeg8_encode(COLOURS, level=98, outcolorspace="RGB")),
        (uid.JPEGLosslessSV1, "RGB", imagecodecs.jpeg8_encode(COLOURS, lossless=True)),
        (uid.JPEGLSLossless, "RGB", imagecodecs.jpegls_encode(COLOURS)),
        (uid.JPEG2000Lossless, "YBR_RCT", jpeg_2000(COLOURS)),
        (uid.JPEG2000Lossless, "RGB", jpeg_2000(COLOURS, mct=False)),
        (uid.JPEG2000Lossless, "YBR_FULL", jpeg_2000(IN_YBR, mct=False)),
    ],
)  # fmt: skip
def test_compressed_colour_becomes_its_luminance(syntax: uid.UID, photometric: str, frame: bytes) -> None:
    data = compressed(dataset(COLOURS, 8, PhotometricInterpretation=photometric), syntax, frame)
    assert np.abs(shown(data) - LUMINANCE).max() <= 4


@pytest.mark.parametrize(
    ("spacing", "aspect"),
    [
        ({"PixelSpacing": [0.4, 0.2]}, 2.0),
        ({"ImagerPixelSpacing": [0.2, 0.4]}, 0.5),
        ({"PixelAspectRatio": [3, 2]}, 1.5),
        ({"PixelSpacing": [0.143, 0.143], "PixelAspectRatio": [3, 2]}, 1.0),
        ({"PixelSpacing": [0.143, 0.14301]}, 1.0),
        ({}, 1.0),
    ],
)
def test_pixels_that_are_not_square_become_square_and_boxes_find_their_way_back(spacing: Any, aspect: float) -> None:
    pixels = np.zeros((120, 150), np.uint16)
    pixels[30:80, 40:110] = 4095
    image = decoded(written(dataset(pixels, **spacing)))
    assert (image.width, image.height, image.aspect) == (150, 120, pytest.approx(aspect))
    box = (40.0, 30.0, 70.0, 50.0)
    x, y, w, h = RECIPE.to_prepared(box, image.width, image.height, image.aspect)
    assert h / w == pytest.approx(50 * aspect / 70, rel=0.03)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[round(y) : round(y + h), round(x) : round(x + w)] = True
    assert np.mean((image.pixels > 127) == inside) > 0.97
    assert RECIPE.to_source((x, y, w, h), image.width, image.height, image.aspect) == pytest.approx(box)


def test_pixels_of_absurd_sides_are_refused() -> None:
    error = rejected(dataset(ramp(), PixelAspectRatio=[100, 1]))
    assert (error.reason, error.text) == ("unsupported", "pixels 100 times as high as wide")


@pytest.mark.parametrize("value", ["", "0\\0", "1", "nan\\1", " \\ ", "\\"])
def test_a_spacing_that_is_none_is_passed_over(value: str) -> None:
    assert decoded(raw_element(written(dataset(ramp())), "PixelSpacing", b"DS", value)).aspect == 1.0


@pytest.mark.parametrize(
    ("change", "reason", "told"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "unsupported", "photometric interpretation: PALETTE COLOR"),
        ({"PhotometricInterpretation": SECRET}, "unsupported", "photometric interpretation: none that"),
        ({"NumberOfFrames": 7}, "unsupported", "7 frames in one file"),
        ({"BitsAllocated": 32}, "unsupported", "12 of 32 bits"),
        ({"BitsAllocated": 1}, "unsupported", "12 of 1 bits"),
        ({"BitsStored": 0}, "damaged", "0 bits"),
        ({"BitsStored": 17}, "damaged", "17 bits"),
        ({"HighBit": 16}, "damaged", "bit 16"),
        ({"SamplesPerPixel": 3}, "damaged", "MONOCHROME2 of 3 values"),
        ({"Rows": HEIGHT + 1}, "damaged", f"{2 * WIDTH * HEIGHT:,} bytes for {WIDTH} x {HEIGHT + 1} pixels"),
        ({"Rows": HEIGHT - 1}, "damaged", f"{2 * WIDTH * HEIGHT:,} bytes for {WIDTH} x {HEIGHT - 1} pixels"),
        ({"Rows": 0}, "too_small", f"{WIDTH} x 0 pixels"),
        ({"Rows": 60_000, "Columns": 60_000}, "too_large", "60000 x 60000 pixels"),
        ({"PixelData": b""}, "damaged", f"DICOM of {WIDTH} x {HEIGHT} pixels without its pixel data"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_rightly_is_refused_by_name(change: dict[str, Any], reason: str, told: str) -> None:
    error = rejected(dataset(ramp(), **change))
    assert error.reason == reason
    assert told in error.text


def test_zeros_behind_the_pixels_are_padding_and_anything_else_is_a_size_that_lies() -> None:
    whole = dataset(ramp())
    pixels = whole.PixelData
    for rows in (1, 2, HEIGHT - 1):
        padded = dataset(ramp(), PixelData=pixels + bytes(2 * WIDTH * rows))
        assert decode(written(padded), RECIPE, LIMITS).pixels.tobytes() == (
            decode(written(whole), RECIPE, LIMITS).pixels.tobytes()
        )
    for surplus in (bytes(2 * WIDTH - 1) + b"\1", bytes(2 * WIDTH * HEIGHT)):
        error = rejected(dataset(ramp(), PixelData=pixels + surplus))
        assert error.reason == "damaged"
        assert f"{len(pixels) + len(surplus):,} bytes for {WIDTH} x {HEIGHT} pixels" in error.text


def test_an_image_that_a_setting_leaves_out_is_not_damaged() -> None:
    with pytest.raises(ExcludedImage):
        decode(written(dataset(ramp())), RECIPE, replace(LIMITS, source_side=HEIGHT + 1))


def test_a_film_that_says_that_text_is_burned_in_is_left_out_where_a_setting_says_so_before_a_pixel_is_decoded() -> (
    None
):
    without = replace(LIMITS, without_text=True)
    flagged = written(dataset(ramp(), BurnedInAnnotation="YES"))
    assert decode(flagged, RECIPE, LIMITS).burned_in
    for data in (flagged, written(dataset(ramp(), BurnedInAnnotation="YES", PixelData=bytes(9)))):
        with pytest.raises(ExcludedImage, match="burned_in"):
            decode(data, RECIPE, without)
    for said in ({}, {"BurnedInAnnotation": "NO"}):
        assert not decode(written(dataset(ramp(), **said)), RECIPE, without).burned_in


def test_raw_values_of_a_detector_are_left_out_by_rule_and_not_quarantined() -> None:
    with pytest.raises(ExcludedImage, match="for_processing"):
        decode(written(dataset(ramp(), PresentationIntentType="FOR PROCESSING")), RECIPE, LIMITS)


@pytest.mark.parametrize("place", ["read_header", "imagecodecs", "run_lengths"])
def test_memory_that_does_not_suffice_is_no_damage_of_the_file(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise MemoryError

    data = compressed(dataset(ramp()), LOSSLESS[0][0], LOSSLESS[0][1](ramp(), 12))
    if place == "read_header":
        monkeypatch.setattr(film, "read_header", short)
    elif place == "imagecodecs":
        for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
            monkeypatch.setattr(imagecodecs, name, short)
    else:
        monkeypatch.setattr(imagecodecs, "dicomrle_decode", short)
        data = compressed(dataset(ramp()), uid.RLELossless, b"\0" * 64)
    with pytest.raises(MemoryError):
        decode(data, RECIPE, LIMITS)


@pytest.mark.parametrize("name", ["Rows", "Columns", "BitsAllocated", "PhotometricInterpretation", "PixelData"])
def test_an_image_that_lacks_what_the_standard_wants_is_refused(name: str) -> None:
    made = dataset(ramp())
    delattr(made, name)
    assert rejected(made).reason in {"damaged", "unsupported"}


def test_a_report_is_no_image() -> None:
    made = dataset(ramp())
    for name in ("Rows", "Columns", "PixelData"):
        delattr(made, name)
    error = rejected(made)
    assert (error.reason, error.text) == ("not_an_image", "a DICOM object without an image")


def test_a_transfer_syntax_that_is_not_read_is_named_where_the_standard_names_it() -> None:
    for syntax, told in ((uid.MPEG2MPML, "MPEG2"), (uid.UID("1.2.3.4.5"), "one that the standard does not list")):
        made = dataset(ramp())
        error = rejected(compressed(made, syntax, b"\0\0"))
        assert error.reason == "unsupported"
        assert told in error.text


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("syntax", ["native", *(syntax.keyword for syntax, _ in LOSSLESS)])
def test_a_truncated_file_is_damaged(syntax: str, share: float) -> None:
    pixels = ramp()
    encode = {known.keyword: (known, function) for known, function in LOSSLESS}
    if syntax == "native":
        data = written(dataset(pixels))
    else:
        data = compressed(dataset(pixels), encode[syntax][0], encode[syntax][1](pixels, 12))
    assert rejected(data[: int(len(data) * share)]).reason in {"damaged", "not_an_image"}


@pytest.mark.parametrize("more", [1, 2, 0x3FFF_0000, 0xFFFF_FFFE - 2 * WIDTH * HEIGHT])
def test_a_file_that_ends_before_its_pixel_data_claims_to_is_damaged(more: int) -> None:
    data, length = written(dataset(ramp())), 2 * WIDTH * HEIGHT
    place = data.rindex(b"\xe0\x7f\x10\x00OW") + 8
    error = rejected(data[:place] + (length + more).to_bytes(4, "little") + data[place + 4 :])
    assert (error.reason, error.text) == (
        "damaged",
        f"DICOM that ends within PixelData: {length:,} of {length + more:,} bytes",
    )


def test_a_frame_that_tells_another_size_than_the_header_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decoder(*_: Any, **__: Any) -> None:
        raise AssertionError("pixels were decoded")

    frames = [(syntax, encode(ramp(12, width=200, height=300), 12)) for syntax, encode in LOSSLESS]
    for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
        monkeypatch.setattr(imagecodecs, name, decoder)
    for syntax, frame in frames:
        error = rejected(compressed(dataset(ramp()), syntax, frame))
        assert (error.reason, "another size" in error.text) == ("damaged", True), syntax.name


def test_a_frame_of_very_many_tiles_is_refused_before_it_is_decoded() -> None:
    frame = bytearray(jpeg_2000(ramp()))
    frame[24:32] = struct.pack(">II", 1, 1)
    assert rejected(compressed(dataset(ramp()), uid.JPEG2000Lossless, bytes(frame))).reason == "unsupported"


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


SMALLEST = bytes([0x11] * 6)  # precincts of two by two values at every level
STYLE_OF_ONE = bytes([0, 1, 5, 4, 4, 0, 1]) + SMALLEST  # of the first component: its number, what follows, levels, ...
STYLE_OF_ALL = bytes([1, 0, 0, 1, 0, 5, 4, 4, 0, 1]) + SMALLEST


@pytest.mark.parametrize(
    ("told", "where"),
    [
        (segment(0x53, STYLE_OF_ONE), b"\xff\x5c"),
        (segment(0x52, STYLE_OF_ALL), b"\xff\x5c"),
        (segment(0x53, STYLE_OF_ONE), b"\xff\x93"),
        (segment(0x52, STYLE_OF_ALL), b"\xff\x93"),
        (segment(0x30, segment(0x53, STYLE_OF_ONE)), b"\xff\x5c"),
    ],
    ids=["of a component", "a second time", "of a component in a tile", "in a tile", "hidden in another segment"],
)
def test_a_frame_of_very_many_precincts_is_refused_wherever_it_tells_of_them(
    told: bytes, where: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoder(*_: Any, **__: Any) -> None:
        raise AssertionError("pixels were decoded")

    pixels = ramp(12, width=900, height=900)
    frame = jpeg_2000(pixels)
    assert np.array_equal(shown(compressed(dataset(pixels), uid.JPEG2000Lossless, frame)), shown(dataset(pixels)))
    monkeypatch.setattr(imagecodecs, "jpeg2k_decode", decoder)
    place = frame.index(where)
    error = rejected(compressed(dataset(pixels), uid.JPEG2000Lossless, frame[:place] + told + frame[place:]))
    assert error.reason == "unsupported"
    assert "precincts" in error.text or "segments" in error.text


@pytest.mark.parametrize("told", [12, 12 + 8])
def test_a_tile_that_ends_before_its_data_begin_is_damaged_and_not_read_for_ever(told: int) -> None:
    frame = jpeg_2000(ramp())
    tile = frame.index(b"\xff\x90")
    start, comment = bytearray(frame[tile : tile + 12]), segment(0x64, b"\0\1ab")
    start[6:10] = struct.pack(">I", told)
    data = frame[:tile] + bytes(start) + 2 * comment + frame[tile + 12 :]
    assert rejected(compressed(dataset(ramp()), uid.JPEG2000Lossless, data)).reason == "damaged"


@pytest.mark.parametrize("before", [b"\xff\xd0\x00\x40", b"\xff\x01\x00\x40", b"\xff\x00\x00\x40"])
def test_a_size_that_hides_where_only_the_decoder_sees_it_is_refused(
    before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoder(*_: Any, **__: Any) -> None:
        raise AssertionError("pixels were decoded")

    pixels = ramp(8)
    frame = imagecodecs.jpeg8_encode(pixels, level=95)
    place = frame.index(b"\xff\xc0")
    huge = segment(0xC0, struct.pack(">BHHB3B", 8, 65500, 65500, 1, 1, 0x11, 0))
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", decoder)
    data = frame[:place] + (before + huge).ljust(66, b"\xff") + frame[place:]
    assert rejected(compressed(dataset(pixels, 8), uid.JPEGBaseline8Bit, data)).reason == "damaged"


@pytest.mark.parametrize("kind", [b"UT", b"UR", b"OV", b"UN"])
def test_pixel_data_that_claims_to_be_text_is_damaged_or_read_as_it_is(kind: bytes) -> None:
    data = written(dataset(ramp()))
    place = data.rindex(b"\xe0\x7f\x10\x00OW") + 4
    with contextlib.suppress(RejectedImage):
        decoded(data[:place] + kind + data[place + 2 :])
    if kind in (b"UT", b"UR"):
        assert rejected(data[:place] + kind + data[place + 2 :]).reason == "damaged"


ITEM, ITEM_END, LAST = (tag + bytes(4) for tag in (b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"))
OPEN_ITEM, EMPTY = ITEM[:4] + b"\xff" * 4, b"\x08\x00\x22\x00DA\x00\x00"
MANY = dicom.MOST_STEPS


def sequence(tag: bytes, value: bytes) -> bytes:
    return tag + b"SQ\0\0\xff\xff\xff\xff" + value + LAST


@pytest.mark.parametrize("read", [read_facts, decoded], ids=["facts", "pixels"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize(
    "many",
    [
        sequence(b"\x08\x00\x99\x99", ITEM * MANY),
        sequence(b"\x08\x00\x99\x99", OPEN_ITEM + EMPTY * MANY + ITEM_END),
        EMPTY * MANY,
    ],
    ids=["items", "elements of an item", "elements"],
)
def test_a_header_of_very_many_elements_is_given_up_and_not_read_to_its_end(
    many: bytes, packed: bool, read: Any
) -> None:
    made = dataset(ramp())
    if packed:
        made.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    data = written(made)
    begin = 144 + int.from_bytes(data[140:144], "little")  # behind the file meta information
    body = many + (zlib.decompress(data[begin:], -zlib.MAX_WBITS) if packed else data[begin:])
    data = data[:begin] + (zlib.compress(body, wbits=-zlib.MAX_WBITS) if packed else body)
    with pytest.raises(RejectedImage, match="so many elements that reading it takes 200,000 steps"):
        read(data)


def test_tables_of_very_many_items_are_given_up_too() -> None:
    data = written(dataset(ramp()))
    place = data.rindex(b"\xe0\x7f\x10\x00OW")
    items = ITEM * (dicom.MOST_TABLES // len(ITEM))
    tables = b"\x28\x00\x10\x30SQ\0\0" + struct.pack("<I", len(items)) + items
    assert rejected(data[:place] + tables + data[place:]).reason == "unsupported"


@pytest.mark.parametrize("name", ["LUTDescriptor", "LUTData"])
def test_a_table_that_is_longer_than_any_is_damaged_and_not_taken_apart(name: str) -> None:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [256, 0, 8], bytes(512)
    item.add_new(name, "OW", bytes(dicom.MOST_TABLE + 2))
    made = dataset(ramp(), VOILUTSequence=[item])
    assert rejected(made).text == "an element of a DICOM header of 131,074 bytes"
    made["VOILUTSequence"].is_undefined_length = True
    assert rejected(made).text == "an element of a DICOM header of 131,074 bytes"


@pytest.mark.parametrize("nested", [False, True])
def test_names_of_character_sets_without_end_are_damaged_and_not_taken_apart(nested: bool) -> None:
    names = b"\\" * (1 << 20)
    element = b"\x08\x00\x05\x00UT\0\0" + struct.pack("<I", len(names)) + names
    data = written(dataset(ramp()))
    place = data.index(b"\x08\x00\x16\x00UI")
    hidden = sequence(b"\x08\x00\x99\x99", OPEN_ITEM + element + ITEM_END) if nested else element
    error = rejected(data[:place] + hidden + data[place:])
    assert (error.reason, error.text) == ("damaged", "names of character sets of 1,048,576 bytes")


def test_a_number_of_a_header_that_is_longer_than_any_is_damaged_and_not_taken_apart() -> None:
    made = dataset(ramp())
    made.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    data = written(made, implicit_vr=True, little_endian=True)
    place = data.rindex(b"\xe0\x7f\x10\x00")
    centre = b"1\\" * (dicom.MOST_VALUE // 2 + 1)
    long = b"\x28\x00\x50\x10" + struct.pack("<I", len(centre)) + centre
    error = rejected(data[:place] + long + data[place:], Limits(min_side=32, max_pixels=1 << 24))
    assert (error.reason, error.text) == ("damaged", "an element of a DICOM header of 65,538 bytes")


def test_what_a_file_is_of_is_known_though_its_pixels_cannot_be_read() -> None:
    data = compressed(dataset(ramp(), Modality="US"), uid.MPEG2MPML, b"\0\0")
    assert read_facts(data).modality == "US"
    assert rejected(data).reason == "unsupported"


def test_run_lengths_that_never_end_fill_the_image_and_no_more() -> None:
    runs = bytes([129, 0]) * 100_000
    frame = struct.pack("<16I", 2, 64, 64 + len(runs), *[0] * 13) + runs + runs
    made = dataset(ramp())
    with contextlib.suppress(RejectedImage):
        decoded(compressed(made, uid.RLELossless, frame))
    short = struct.pack("<16I", 2, 64, 70, *[0] * 13) + bytes([129, 0, 129, 0, 129, 0]) * 2
    assert rejected(compressed(made, uid.RLELossless, short)).reason == "damaged"


def test_a_deflated_bomb_is_refused_before_it_is_inflated() -> None:
    made = dataset(ramp())
    made.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    data = written(made)
    body = data.index(b"1.2.840.10008.1.2.1.99") + 22
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(64)), packer.flush()])
    error = rejected(data[:body] + bomb, Limits(32, 1000))
    assert (error.reason, "deflated DICOM of more than" in error.text) == ("too_large", True)


def test_a_file_is_known_by_its_magic_whatever_stands_before_it() -> None:
    pixels = ramp()
    data = written(dataset(pixels))
    assert np.array_equal(shown(b"II*\0" + bytes(124) + data[128:]), from_least_to_most(pixels))
    assert np.array_equal(shown(data[132:]), from_least_to_most(pixels))  # no preamble, but file meta information


@pytest.mark.parametrize("implicit", [False, True])
def test_a_data_set_without_file_meta_information_is_refused_by_name(implicit: bool) -> None:
    buffer = io.BytesIO()
    made = dataset(ramp())
    made.preamble, made.file_meta = None, FileMetaDataset()
    made.save_as(buffer, implicit_vr=implicit, little_endian=True)
    error = rejected(buffer.getvalue())
    assert (error.reason, error.text) == (
        "not_an_image",
        "DICOM without preamble and file meta information, of unknown encoding",
    )


def test_a_recipe_that_knows_no_dicom_refuses_it_and_says_what_to_do() -> None:
    before = replace(RECIPE, window="8-bit as it is, 16-bit from minimum to maximum", version=1)
    assert before.id != RECIPE.id
    error = rejected(dataset(ramp()), recipe=before)
    assert error.reason == "unsupported"
    assert before.id in error.text
    pixels = ramp(8)
    assert np.array_equal(decode(png(pixels), before, LIMITS).pixels, decoded(png(pixels)).pixels)


FACTS = {
    "StudyInstanceUID": "1.2.3",
    "StudyDate": "20240229",
    "Modality": "DX",
    "ViewPosition": "PA",
    "PatientSex": "F",
    "PatientAge": "058Y",
    "BodyPartExamined": "CHEST",
    "BurnedInAnnotation": "NO",
    "ImageLaterality": "U",
}


def test_the_facts_of_a_header_are_these_and_no_others() -> None:
    facts = read_facts(written(dataset(ramp(), **FACTS)))
    assert facts == DicomFacts(
        image_uid=uid.generate_uid(entropy_srcs=["test"]),
        patient_id="4711",
        study_uid="1.2.3",
        study_date=datetime.date(2024, 2, 29),
        modality="DX",
        view="PA",
        sex="F",
        age_years=58,
        body_part="CHEST",
        laterality="U",
        burned_in=False,
        has_image=True,
    )
    assert SECRET not in repr(facts)


def test_the_facts_of_a_deflated_file_are_found_however_large_its_image_is() -> None:
    made = dataset(np.zeros((4000, 4000), np.uint16), **FACTS)
    made.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    assert read_facts(written(made)).age_years == 58


def test_what_a_header_does_not_say_is_not_known() -> None:
    made = dataset(ramp())
    del made.PatientID, made.SOPClassUID, made.SOPInstanceUID, made.Rows
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made)
    facts = read_facts(buffer.getvalue())
    assert not any(getattr(facts, field.name) for field in fields(facts))


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192", "ISO 2022 IR 87"])
def test_a_patient_id_is_read_in_its_character_set(charset: str) -> None:
    text = "山田" if charset == "ISO 2022 IR 87" else "Müller-7"
    made = dataset(ramp(), SpecificCharacterSet=charset if "2022" not in charset else ["", charset], PatientID=text)
    assert read_facts(written(made)).patient_id == text


@pytest.mark.parametrize(
    ("text", "years"),
    [("058Y", 58), ("000Y", None), ("001Y", 1), ("000M", 0), ("011M", 0), ("023M", 1), ("024M", 2),
     ("051W", 0), ("053W", 1), ("000D", 0), ("364D", 0), ("366D", 1),
     ("120Y", 120), ("121Y", None), ("999Y", None), ("", None), ("58", None), ("Y", None), ("058y", None),
     ("-58Y", None)],
)  # fmt: skip
def test_an_age_string_is_told_in_whole_years_and_no_age_at_all_is_not_that_of_an_infant(
    text: str, years: int | None
) -> None:
    assert age_years(text) == years


@pytest.mark.parametrize(
    ("name", "value", "fact"),
    [
        ("StudyDate", "20240230", "study_date"),
        ("StudyDate", SECRET[:8], "study_date"),
        ("PatientSex", "X", "sex"),
        ("ViewPosition", "Jane^Doe", "view"),
        ("BodyPartExamined", "see Dr. Mill", "body_part"),
        ("BurnedInAnnotation", "MAYBE", "burned_in"),
        ("StudyInstanceUID", "1.2.jane", "study_uid"),
    ],
)
def test_free_text_in_a_coded_element_is_not_told(name: str, value: str, fact: str) -> None:
    data = written(dataset(ramp(), **{**FACTS, name: FACTS[name]}))
    old = FACTS[name].encode() + b"\0" * (name == "StudyInstanceUID")
    padded = (value + " " * (len(value) % 2)).encode()
    at = data.index(struct.pack("<HH", *divmod(pydicom.tag.Tag(name), 1 << 16)))
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    assert data[at + 8 :].startswith(old.rstrip(b"\0"))
    changed = data[: at + 6] + struct.pack("<H", len(padded)) + padded + data[at + 8 + length :]
    assert getattr(read_facts(changed), fact) is None


def test_nothing_of_a_header_is_warned_of_or_logged() -> None:
    made = dataset(ramp(), SpecificCharacterSet="ISO_IR 192", **FACTS)
    data = (
        written(made)
        .replace(b"ISO_IR 192", b"JANE^DOE99")
        .replace(b"20240229", b"JANE DOE")
        .replace(b"058Y", b"JANE")
        .replace(b"1.2.3\0", b"JANEDO")
    )
    script = """
import sys, logging
logging.basicConfig(level=logging.DEBUG)
logging.getLogger().setLevel(logging.DEBUG)
from cxr_retrieval.corpus.decoding import Limits, Recipe, decode
from cxr_retrieval.corpus.dicom import read_facts
data = sys.stdin.buffer.read()
read_facts(data)
decode(data, Recipe(64, "letterbox"), Limits(32, 1 << 20))
"""
    ran = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert b"JAN" not in ran.stdout + ran.stderr
    assert SECRET.encode() not in ran.stdout + ran.stderr
