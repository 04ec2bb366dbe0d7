"""Promises of decoding: what prepared pixels are, what is refused and why, and boxes that find their way back."""

import hashlib
import io
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_retrieval.corpus.codestream import require_few_markers
from cxr_retrieval.corpus.decoding import DecodedImage, Recipe, decode
from cxr_retrieval.corpus.limits import ExcludedImage, Limits, RejectedImage
from cxr_retrieval.errors import UserError

SIZE = 64
LETTERBOX, STRETCH = Recipe(SIZE, "letterbox"), Recipe(SIZE, "stretch")
LIMITS = Limits(min_side=32, max_pixels=1 << 20)


def grey(width: int = 80, height: int = 60) -> np.ndarray:
    """Smooth bands that use the whole range of grey values."""
    x, y = np.meshgrid(np.linspace(0, 7, width), np.linspace(0, 5, height))
    wave = np.sin(x) * np.cos(y)
    return np.rint((wave - wave.min()) / np.ptp(wave) * 255).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decoded(data: bytes, recipe: Recipe = LETTERBOX) -> DecodedImage:
    return decode(data, recipe, LIMITS)


def rejected(data: bytes, recipe: Recipe = LETTERBOX, limits: Limits = LIMITS) -> RejectedImage:
    with pytest.raises(RejectedImage) as caught:
        decode(data, recipe, limits)
    assert caught.value.text.isascii()
    assert "\n" not in caught.value.text
    return caught.value


def test_a_grey_image_of_the_prepared_size_keeps_every_value() -> None:
    pixels = grey(SIZE, SIZE)
    image = decoded(encoded(pixels))
    assert (image.width, image.height) == (SIZE, SIZE)
    assert image.pixels.dtype == np.uint8
    assert np.array_equal(image.pixels, pixels)


def test_an_image_twice_as_large_becomes_the_mean_of_its_pixels() -> None:
    pixels = grey(2 * SIZE, 2 * SIZE)
    mean = pixels.reshape(SIZE, 2, SIZE, 2).mean(axis=(1, 3))
    assert np.abs(decoded(encoded(pixels)).pixels - mean).max() <= 0.5


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_file_is_damaged(form: str, share: float) -> None:
    data = encoded(grey(200, 200), form)
    assert rejected(data[: int(len(data) * share)]).reason == "damaged"


def test_a_png_that_lost_its_end_mark_and_no_pixel_keeps_its_pixels() -> None:
    pixels = grey(SIZE, SIZE)
    assert np.array_equal(decoded(encoded(pixels)[:-12]).pixels, pixels)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("length", [8, 33])
def test_the_bare_beginning_of_a_file_is_damaged_and_not_called_another_format(form: str, length: int) -> None:
    assert rejected(encoded(grey(), form)[:length]).reason == "damaged"


def test_a_flipped_byte_in_the_pixels_of_a_png_is_damaged() -> None:
    data = bytearray(encoded(grey()))
    data[len(data) // 2] ^= 0xFF
    assert rejected(bytes(data)).reason == "damaged"


BEHIND = [chunk(b"iCCP", profile) for profile in (b"abc\0", b"")]  # a chunk that Pillow trips over, behind the pixels
NO_COLOURS = (  # a palette image without its palette, and a byte of transparency for it
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, 8, 3, 0, 0, 0))
    + chunk(b"tRNS", b"\0")
    + chunk(b"IDAT", zlib.compress(bytes((SIZE + 1) * SIZE)))
    + chunk(b"IEND", b"")
)
TRIPPING = [*(encoded(grey(SIZE, SIZE))[:-12] + odd + chunk(b"IEND", b"") for odd in BEHIND), NO_COLOURS]


@pytest.mark.parametrize("data", TRIPPING, ids=["profile cut short", "empty profile", "no palette"])
def test_a_png_that_pillow_fails_on_for_whatever_reason_is_damaged(data: bytes) -> None:
    error = rejected(data)
    assert error.reason == "damaged"
    assert error.text.startswith(f"{SIZE} x {SIZE} PNG: ")


def test_memory_that_does_not_suffice_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        decoded(encoded(grey()))


def test_a_text_file_with_the_name_of_an_image_is_not_an_image() -> None:
    error = rejected(b"Patient moved, see report.\n")
    assert error.reason == "not_an_image"
    assert "27 bytes" in error.text


@pytest.mark.parametrize(
    ("form", "place", "piece", "told"),
    [
        ("JPEG", 2, b"\xff\xe5\0\2", "a JPEG of more than 100,000 segments"),
        ("JPEG", 2, b"\xff", "a JPEG of more than 100,000 segments"),
        ("PNG", 33, bytes(4) + b"prVt" + zlib.crc32(b"prVt").to_bytes(4, "big"), "a PNG of more than 100,000 chunks"),
    ],
    ids=["segments", "fill bytes", "chunks"],
)
def test_an_image_of_a_million_pieces_is_refused_before_any_is_kept(
    form: str, place: int, piece: bytes, told: str
) -> None:
    data = encoded(grey(), form)
    few, many = (data[:place] + times * piece + data[place:] for times in (1000, 1_000_000))
    assert decoded(few).pixels.tobytes() == decoded(data).pixels.tobytes()
    tracemalloc.start()
    try:
        error = rejected(many)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (error.reason, error.text) == ("unsupported", told)
    assert peak < 4 * len(many)


@pytest.mark.parametrize("amid_pixels", [b"\xff\0", b"\xff\x7f", b"\xff\xd0"], ids=["JPEG", "JPEG-LS", "restart"])
def test_what_looks_like_a_marker_amid_pixels_is_no_segment(amid_pixels: bytes) -> None:
    require_few_markers(b"\xff\xd8" + 200_000 * amid_pixels + b"\xff\xd9")


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(grey(), "JPEG", progressive=True)
    assert 1 < data.count(b"\xff\xda") < 20
    last = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + 100 * last + data[-2:]

    def load(_: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    error = rejected(many)
    assert (error.reason, error.text) == ("unsupported", "a JPEG of more than 100 scans")


def test_an_empty_file_is_called_empty() -> None:
    error = rejected(b"")
    assert (error.reason, error.text) == ("not_an_image", "neither PNG, JPEG nor DICOM: an empty file")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP"])
def test_another_image_format_is_refused(form: str) -> None:
    assert rejected(encoded(grey(), form)).reason == "not_an_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_colour_becomes_its_luminance(form: str) -> None:
    colours = {(255, 0, 0): 76, (0, 255, 0): 150, (0, 0, 255): 29, (90, 90, 90): 90}
    for colour, luminance in colours.items():
        pixels = decoded(encoded(Image.new("RGB", (SIZE, SIZE), colour), form)).pixels
        assert np.abs(pixels.astype(int) - luminance).max() <= 2, colour


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_values_stored_with_colour_or_opacity_are_the_same_grey_values(mode: str) -> None:
    pixels = grey(SIZE, SIZE)
    assert np.array_equal(decoded(encoded(Image.fromarray(pixels).convert(mode))).pixels, pixels)


@pytest.mark.parametrize("transparency", [None, 7, b"\x00\x80\xff"])
def test_a_palette_is_looked_up_whatever_is_transparent_in_it(transparency: int | bytes | None) -> None:
    places = grey(SIZE, SIZE) // 16
    values = np.arange(16, dtype=np.uint8)[::-1] * 17
    image = Image.fromarray(places).convert("P")
    image.putpalette(np.repeat(values, 3).tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow advises to keep the transparency
        assert np.array_equal(decoded(encoded(image, **options)).pixels, values[places])


def test_one_bit_becomes_black_and_white() -> None:
    pixels = np.where(grey(SIZE, SIZE) > 127, 255, 0).astype(np.uint8)
    assert np.array_equal(decoded(encoded(Image.fromarray(pixels).convert("1"))).pixels, pixels)


@given(low=st.integers(0, 40_000), width=st.integers(1, 25_535), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_16_bits_match_an_8_bit_export_of_the_same_window_within_one_grey_level(
    low: int, width: int, seed: int
) -> None:
    wide = np.random.default_rng(seed).integers(low, low + width + 1, (90, 70)).astype(np.uint16)
    span = max(int(wide.max()) - int(wide.min()), 1)
    export = np.rint((wide.astype(np.float64) - wide.min()) / span * 255).astype(np.uint8)
    ours, theirs = decoded(encoded(wide)).pixels, decoded(encoded(export)).pixels
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_flat_16_bit_image_is_black_and_no_division_by_zero() -> None:
    assert decoded(encoded(np.full((SIZE, SIZE), 4000, np.uint16))).pixels.max() == 0


def deep_png(pixels: np.ndarray, kind: int, *chunks: bytes) -> bytes:
    """A PNG of 16 bits of this colour type, which Pillow cannot write."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


WIDE = np.random.default_rng(3).integers(100, 4096, (90, 70)).astype(np.uint16)  # 12 bits: all but black in 8 of 16
OPAQUE, KEY = np.full_like(WIDE, 65535), chunk(b"tRNS", struct.pack(">3H", 200, 200, 200))


@pytest.mark.parametrize(
    "data",
    [
        deep_png(np.stack([WIDE] * 3, -1), 2),
        deep_png(np.stack([WIDE] * 3, -1), 2, KEY),
        deep_png(np.stack([WIDE, OPAQUE], -1), 4),
        deep_png(np.stack([WIDE] * 3 + [WIDE // 2], -1), 6),
        deep_png(WIDE, 0, chunk(b"tRNS", struct.pack(">H", 200))),
    ],
    ids=["RGB", "RGB-transparent", "grey-opacity", "RGBA", "grey-transparent"],
)
def test_16_bits_stored_with_colour_or_opacity_are_the_same_grey_values(data: bytes) -> None:
    assert np.array_equal(decoded(data).pixels, decoded(encoded(WIDE)).pixels)


def test_16_bit_colour_becomes_its_luminance_before_it_is_windowed() -> None:
    colours = np.stack([WIDE, 4095 - WIDE, WIDE // 3], -1)
    luminance = colours @ np.array([0.299, 0.587, 0.114])
    export = np.rint((luminance - luminance.min()) / np.ptp(luminance) * 255).astype(np.uint8)
    ours, theirs = decoded(deep_png(colours, 2)).pixels, decoded(encoded(export)).pixels
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("kind", [0, 2])
def test_a_16_bit_file_that_is_cut_or_changed_is_damaged_and_one_without_end_mark_is_not(kind: int) -> None:
    data = deep_png(WIDE if kind == 0 else np.stack([WIDE] * 3, -1), kind)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0xFF
    for bad in (data[: len(data) // 2], data[:-20], bytes(changed)):
        assert rejected(bad).reason == "damaged"
    assert np.array_equal(decoded(data[:-12]).pixels, decoded(data).pixels)


def test_nothing_of_what_a_16_bit_file_says_beside_its_pixels_is_printed() -> None:
    profile = struct.pack(">I", 4000) + bytes(range(256)) * 15 + bytes(156)
    notes = [
        chunk(b"iCCP", b"DOE JANE\0\0" + zlib.compress(profile)),
        chunk(b"sPLT", b"DOE JANE\0\x07"),
        chunk(b"tEXt", b"DOE JANE" * 20),
    ]
    data = deep_png(WIDE, 0, *notes)
    assert np.array_equal(decoded(data).pixels, decoded(encoded(WIDE)).pixels)
    script = """
import sys
from cxr_retrieval.corpus.decoding import Limits, Recipe, decode
decode(sys.stdin.buffer.read(), Recipe(64, "letterbox"), Limits(32, 1 << 20))
"""
    ran = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"", b"")


def test_a_recipe_that_cut_16_bit_colour_down_to_8_bits_refuses_it_and_reads_16_bit_grey_as_before() -> None:
    before = replace(LETTERBOX, window="8-bit as it is, 16-bit from minimum to maximum", version=1)
    for data in (deep_png(np.stack([WIDE] * 3, -1), 2), deep_png(np.stack([WIDE, OPAQUE], -1), 4)):
        error = rejected(data, before)
        assert error.reason == "unsupported"
        assert before.id in error.text
    assert np.array_equal(decoded(encoded(WIDE), before).pixels, decoded(encoded(WIDE)).pixels)


def test_a_cmyk_jpeg_has_the_grey_values_of_its_picture() -> None:
    image = Image.fromarray(grey(SIZE, SIZE))
    pixels = decoded(encoded(image.convert("RGB").convert("CMYK"), "JPEG", quality=98)).pixels
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 3


UPRIGHT = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", [*UPRIGHT, 1, 0, 9])
def test_a_jpeg_is_turned_as_its_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying, turned = grey(80, 60), decoded(encoded(grey(80, 60), "JPEG", exif=exif), STRETCH)
    upright = UPRIGHT.get(orientation, lambda pixels: pixels)(lying)
    assert (turned.height, turned.width) == upright.shape
    stored = np.asarray(Image.open(io.BytesIO(encoded(lying, "JPEG"))))
    expected = STRETCH.resize(np.ascontiguousarray(UPRIGHT.get(orientation, lambda pixels: pixels)(stored)))
    assert np.array_equal(turned.pixels, expected)


def test_exif_that_cannot_be_read_turns_nothing_and_harms_no_pixel() -> None:
    plain, odd = (encoded(grey(), "JPEG", exif=exif) for exif in (b"", b"Exif\0\0II*\0\xff\xff\xff\x7f"))
    assert np.array_equal(decoded(odd).pixels, decoded(plain).pixels)


def test_a_tiny_image_is_refused_and_one_at_the_limit_is_not() -> None:
    error = rejected(encoded(grey(200, 31)))
    assert (error.reason, error.text) == ("too_small", "200 x 31 pixels, a side under 32")
    assert decoded(encoded(grey(200, 32))).height == 32


def test_a_film_that_is_too_small_for_the_settings_is_left_out_before_a_pixel_is_decoded() -> None:
    wanted = Limits(32, 1 << 20, source_side=100)
    for image in (encoded(grey(200, 99)), encoded(grey(99, 200))[:200]):
        with pytest.raises(ExcludedImage, match="source_side"):
            decode(image, LETTERBOX, wanted)
    assert decode(encoded(grey(200, 100)), LETTERBOX, wanted).height == 100


def test_a_huge_header_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Image.Image) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(60_000))) + chunk(b"IEND", b"")
    error = rejected(bomb, limits=Limits(32, 100_000_000))
    assert (error.reason, error.text) == ("too_large", "60000 x 60000 pixels, more than 100,000,000")


@pytest.mark.parametrize("form", ["PNG", "MPO"])
def test_several_frames_in_one_file_are_refused(form: str) -> None:
    image = Image.fromarray(grey()).convert("RGB")
    error = rejected(encoded(image, form, save_all=True, append_images=[image.rotate(90)]))
    assert (error.reason, error.text) == ("unsupported", "2 frames in one file")


@pytest.mark.parametrize(("width", "height"), [(128, 128), (128, 64), (64, 128), (40, 33), (2000, 33), (33, 2000)])
def test_letterbox_keeps_the_aspect_on_black_and_stretch_fills(width: int, height: int) -> None:
    data = encoded(np.full((height, width), 200, np.uint8))
    assert decoded(data, STRETCH).pixels.min() == 200
    pixels = decoded(data).pixels
    assert pixels.shape == (SIZE, SIZE)
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    assert np.all(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 200)
    scale = SIZE / max(width, height)
    assert (len(columns), len(rows)) == (round(width * scale), round(height * scale))
    margins = rows[0], SIZE - 1 - rows[-1], columns[0], SIZE - 1 - columns[-1]
    assert abs(margins[0] - margins[1]) <= 1
    assert abs(margins[2] - margins[3]) <= 1


@pytest.mark.parametrize("recipe", [LETTERBOX, STRETCH], ids=lambda recipe: recipe.fit)
def test_a_box_in_prepared_pixels_is_where_its_content_is(recipe: Recipe) -> None:
    pixels = np.zeros((150, 200), np.uint8)
    pixels[30:90, 50:150] = 255
    x, y, w, h = recipe.to_prepared((50, 30, 100, 60), 200, 150)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[round(y) : round(y + h), round(x) : round(x + w)] = True
    assert np.mean((decoded(encoded(pixels), recipe).pixels > 127) == inside) > 0.99


sides = st.integers(32, 4096)
shares = st.floats(0, 1)


@given(
    size=st.integers(32, 1024),
    fit=st.sampled_from(["letterbox", "stretch"]),
    width=sides,
    height=sides,
    shares=st.tuples(shares, shares, shares, shares),
)
def test_a_box_comes_back_from_prepared_pixels_where_it_was(
    size: int, fit: str, width: int, height: int, shares: tuple[float, float, float, float]
) -> None:
    recipe = Recipe(size, fit)
    box = (shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height)
    prepared = recipe.to_prepared(box, width, height)
    assert recipe.to_source(prepared, width, height) == pytest.approx(box, abs=1e-6 * max(width, height))
    whole = recipe.to_prepared((0, 0, width, height), width, height)
    assert min(whole) >= 0
    assert whole[0] + whole[2] <= size + 1e-9
    assert whole[1] + whole[3] <= size + 1e-9


def test_the_id_of_a_recipe_changes_with_every_field() -> None:
    others = {"size": 65, "fit": "stretch", "mean": 0.4, "std": 0.3, "window": "x", "resampling": "x", "version": 99}
    assert set(others) == {field.name for field in fields(Recipe)}
    ids = [replace(LETTERBOX, **{name: value}).id for name, value in others.items()]
    assert len({LETTERBOX.id, *ids}) == 1 + len(others)


def test_png_files_give_the_pixels_that_they_gave_before_dicom_was_read() -> None:
    values = np.random.default_rng(5).integers(0, 256, (100, 140)).astype(np.uint8)
    digest = hashlib.sha256()
    for image in (values, values.astype(np.uint16) * 200 + 5, np.stack([values, 255 - values, values // 2], -1)):
        for recipe in (LETTERBOX, STRETCH, Recipe(200, "letterbox")):
            digest.update(decoded(encoded(image), recipe).pixels.tobytes())
    assert digest.hexdigest()[:16] == "0d02981d31bb811a"


def test_a_recipe_of_a_later_release_is_refused_since_that_may_read_images_otherwise() -> None:
    with pytest.raises(UserError, match="version 99 of the decode recipe, and this release knows"):
        Recipe.from_json(LETTERBOX.to_json() | {"version": 99})


def test_a_recipe_that_went_through_json_has_the_same_id() -> None:
    assert Recipe.from_json(LETTERBOX.to_json()) == LETTERBOX
    assert Recipe.from_json(LETTERBOX.to_json()).id == Recipe(SIZE, "letterbox").id
