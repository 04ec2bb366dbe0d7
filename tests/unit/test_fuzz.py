"""Promises to whoever points this at files of unknown origin: whatever bytes an archive holds, an image is decoded or
rejected and a table is read or refused, in bounded time and memory.

`make fuzz` keeps the same promises for 50 times as many files, other ones in every run.
"""

import contextlib
import csv
import faulthandler
import gzip
import io
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import uid

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import printable
from cxr_retrieval.corpus.archive import Archive
from cxr_retrieval.corpus.decoding import Limits, Recipe, decode
from cxr_retrieval.corpus.dicom import is_dicom, read_facts
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats import FORMATS, format_of
from cxr_retrieval.corpus.formats.labels import AGES, GIVEN
from cxr_retrieval.corpus.limits import RejectedImage
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile
from tests.dicoms import SECRET, dataset, ramp, written
from tests.unit import test_archive, test_formats
from tests.unit.test_decoding import TRIPPING, chunk, deep_png, encoded, grey
from tests.unit.test_dicom import COLOURS, FACTS, LOSSLESS, LOSSY, compressed, look_up_table
from tests.unit.test_vindr import VinDrFolder

SIZE = 64
RECIPE, LIMITS = Recipe(SIZE, "letterbox"), Limits(min_side=32, max_pixels=1 << 20)
MOST_S, HANGS_S = 5.0, 60  # for one file on a busy machine; after which a process that is stuck in a decoder is ended
MOST_BYTES = 96 << 20  # taken for one file: 24 MiB of a decoder and what the operating system gives beside it
THOROUGH = settings.get_current_profile_name() == "fuzz"


def examples(count: int) -> settings:
    """So many files, the same ones in every run; or as many as the profile `fuzz` says, and other ones."""
    return settings(max_examples=50 * count if THOROUGH else count, derandomize=not THOROUGH)


def _memory(name: str) -> int:
    """A figure of this process in bytes: VmRSS, what it holds, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The time and the memory that one file may take."""
    faulthandler.dump_traceback_later(HANGS_S, exit=True)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most that was held
    held, start = _memory("VmRSS"), time.monotonic()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - start < MOST_S
    assert _memory("VmHWM") - held < MOST_BYTES


PIXEL_DATA = b"\xe0\x7f\x10\x00"
LIES = [n.to_bytes(width, order) for n in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF)
        for width in (1, 2, 4) for order in ("little", "big") if n < 1 << 8 * width]  # fmt: skip
edits = st.tuples(
    st.sampled_from(["set", "insert", "delete", "cut", "flip", "splice"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(max_size=6) | st.sampled_from(LIES),
)


def mutations(seeds: list[bytes], most: int = 6) -> st.SearchStrategy[bytes]:
    """Files that were edited: bytes set, put in, taken out, cut off, flipped, or another file's end put behind them."""

    def edited(seed: bytes, other: bytes, found: list[tuple[str, float, bytes]]) -> bytes:
        data = bytearray(seed)
        for kind, share, new in found:
            place = int(share * share * len(data))  # headers are near the beginning
            if kind == "cut":
                del data[int(len(data) * (1 - share / 4)) :]
            elif kind == "flip" and data:
                data[place] ^= new[0] if new else 0xFF
            elif kind == "splice":
                data[place:] = other[int(share * len(other)) :]
            elif kind in ("set", "delete"):
                data[place : place + len(new)] = new if kind == "set" else b""
            elif kind == "insert":
                data[place:place] = new
        return bytes(data)

    pick = st.sampled_from(seeds)
    return st.builds(edited, pick, pick, st.lists(edits, min_size=1, max_size=most))


def _pictures() -> list[bytes]:
    image = Image.fromarray(grey(64, 48))
    exif = Image.Exif()
    exif[270] = "text" * 10
    notes = PngInfo()
    notes.add_text("a", "b" * 100, zip=True)
    notes.add_itxt("k", "v", "en", "t", zip=True)
    return [
        encoded(image, pnginfo=notes, exif=exif, icc_profile=b"profile" * 9, dpi=(72, 72)),
        encoded(grey(64, 48).astype(np.uint16) * 200),
        deep_png(np.stack([ramp(16)] * 3, -1), 2),
        deep_png(np.stack([ramp(16)] * 2, -1), 4),
        encoded(image.convert("P"), transparency=b"\x00\x80"),
        encoded(image.convert("RGBA")),
        encoded(image, save_all=True, append_images=[image.rotate(90)]),
        encoded(image, "JPEG", exif=exif),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.convert("RGB"), "JPEG", progressive=True),
        encoded(image.convert("RGB"), "MPO", save_all=True, append_images=[image.convert("RGB")]),
        *TRIPPING,
    ]


def _with_true_checksums(png: bytes) -> bytes:
    """A mutated PNG whose checksums hold, so that what lies behind them is reached."""
    mended, place = png[:8], 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if place + 12 + length > len(png):
            break
        mended += chunk(png[place + 4 : place + 8], png[place + 8 : place + 8 + length])
        place += 12 + length
    return mended + png[place:]


def _films() -> list[bytes]:
    pixels = ramp()
    window = {"WindowCenter": [2000, 1], "WindowWidth": [900, 2], "RescaleSlope": 1, "RescaleIntercept": 0}
    tables = {name: look_up_table(np.arange(64), 0, 16) for name in ("ModalityLUTSequence", "VOILUTSequence")}
    seeds = [
        written(dataset(pixels, **window, **FACTS)),
        written(dataset(pixels, PixelSpacing=[0.2, 0.1], PixelPaddingValue=0, **tables)),
        written(dataset(COLOURS, 8)),
    ]
    implicit = dataset(pixels)
    implicit.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    deflated = dataset(pixels)
    deflated.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    seeds += [written(implicit), written(deflated)]
    seeds += [compressed(dataset(pixels), syntax, encode(pixels, 12)) for syntax, encode in LOSSLESS]
    seeds += [compressed(dataset(ramp(bits), bits), syntax, encode(ramp(bits))) for syntax, bits, encode in LOSSY]
    seeds.append(
        compressed(
            dataset(COLOURS, 8, PhotometricInterpretation="YBR_FULL_422"),
            uid.JPEGBaseline8Bit,
            imagecodecs.jpeg8_encode(COLOURS),
        )
    )
    runs = dataset(pixels)
    runs.compress(uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    plain = written(dataset(pixels))
    text = [plain.replace(PIXEL_DATA + b"OW", PIXEL_DATA + kind) for kind in (b"UT", b"UR", b"OL")]
    return [*seeds, *text, written(runs)]


PICTURES, FILMS = _pictures(), _films()


def decoded_or_rejected(data: bytes) -> None:
    with bounded():
        try:
            image = decode(data, RECIPE, LIMITS)
        except RejectedImage as rejected:
            told = rejected.text
        else:
            told = ""
            assert (image.pixels.shape, image.pixels.dtype) == ((SIZE, SIZE), np.uint8)
            LIMITS.check(image.width, image.height)
    assert told.isascii()
    assert told.isprintable()
    assert SECRET not in told


@given(data=mutations(PICTURES), mend=st.booleans())
@examples(1000)
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_picture_is_decoded_or_rejected_and_nothing_else(data: bytes, mend: bool) -> None:
    decoded_or_rejected(_with_true_checksums(data) if mend else data)


@given(data=mutations(FILMS))
@examples(1500)
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_dicom_file_is_decoded_or_rejected_and_tells_no_name(data: bytes) -> None:
    decoded_or_rejected(data)
    for whole in (True, False):
        with bounded(), contextlib.suppress(RejectedImage):
            if is_dicom(data):
                assert SECRET not in repr(read_facts(data, whole=whole))


STARTS = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    bytes(128) + b"DICM",
    FILMS[0][:340],
    b"\x02\x00\x00\x00UL\x04\x00",
]


@given(start=st.sampled_from(STARTS), data=st.binary(max_size=200))
@examples(600)
@pytest.mark.filterwarnings("ignore")
def test_random_bytes_are_rejected(start: bytes, data: bytes) -> None:
    with bounded(), pytest.raises(RejectedImage) as caught:
        decode(start + data, RECIPE, LIMITS)
    assert caught.value.reason in {"not_an_image", "damaged", "unsupported", "too_small", "too_large"}


# Label tables


def _nih(folder: Path) -> None:
    found = test_archive.Folder(folder).images("a.png", "b.png", "c/d.png")
    found.table(*(test_archive.line(name, "Mass|Hernia", patient=name) for name in ("a.png", "b.png", "d.png")))
    found.table("a.png,Mass,1,2,3,4", header="Image Index,Finding Label,Bbox [x,y,w,h],,,", name=test_archive.BOXES)
    found.table("d.png", header="a.png", name="test_list.txt").table(header="b.png", name="train_val_list.txt")


def _chexpert(folder: Path) -> None:
    people = [*test_formats.many("train", 0, 3), *test_formats.many("valid", 9, 2)]
    test_formats.chexpert(folder, *({**row, "Edema": "1.0", "Fracture": "-1.0"} for row in people))


def _padchest(folder: Path) -> None:
    test_formats.padchest(folder, "['nodule', 'scoliosis']", "['normal']", "['unchanged']", "nan")


def _column_map(folder: Path) -> None:
    names = [f"{n}.png" for n in range(4)]
    test_formats.images(folder, *names)
    rows = ({"file": name, "pid": name, "seen": "mass|Gout", "day": "2014-09-15", "years": "61"} for name in names)
    test_formats.table(folder / "list.csv", "file,pid,seen,day,years", *rows)


def _vindr(folder: Path) -> None:
    made = VinDrFolder(folder)
    made.archive = folder
    made.image("a").image("b").say("train", a=["AN", "A", "-"], b=["T", "-", "L"]).say("test", b=["P"])
    made.draw("train", "a,R0,Atelectasis,1,2,30,40", "a,R1,Atelectasis,1,2,31,41")


def _dicom(folder: Path) -> None:
    (folder / "IM1").write_bytes(FILMS[0])
    (folder / "labels.csv").write_text("StudyInstanceUID,Mass,Edema\n1.2.3,1,0\n1.2.4,-1,\n")


LAYOUTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "nih": (_nih, {"split": "official"}),
    "chexpert": (_chexpert, {"split": "official"}),
    "mimic": (test_formats.mimic, {"split": "official"}),
    "padchest": (_padchest, {}),
    "csv": (
        _column_map,
        {"columns": {"image": "file", "patient": "pid", "findings": "seen", "date": "day", "age": "years"}},
    ),
    "vindr": (_vindr, {"split": "official"}),
    "dicom": (_dicom, {}),
}
CELLS = ["", '"', '"x', 'x"y', "a,b", "\0", "\n", "\r\n", "\x1b[2J", "\u202e", "../../etc/passwd", "/etc/passwd",
         "..\\a", "y" * 40_000,
         "nan", "inf", "-1", "1e999", "1e300", "9e37",
         "9" * 40, "1" * 400, "\u0663", "\U0001f600", "\ufeff", "x" * 200_000,
         "1", "0", "-1.0", "Mass", "2014-02-30", "0001-01-01", "['", "['a\\'']", "a.png", "," * 70_000]  # fmt: skip


@st.composite
def mutated_tables(draw: st.DrawFn, table: bytes) -> bytes:
    """A table whose cells or bytes were changed, with or without the quotes that they need."""
    rows = list(csv.reader(io.StringIO(table.decode())))
    for _ in range(draw(st.integers(0, 4))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(CELLS) | st.text(max_size=12))
    if draw(st.booleans()):
        rows = draw(st.permutations(rows))
    if draw(st.booleans()):
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        data = text.getvalue().encode(errors="surrogatepass")
    else:
        data = "\n".join(map(",".join, rows)).encode(errors="surrogatepass")
    return draw(mutations([data], most=3)) if draw(st.booleans()) else data


def check_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    for row in rows:
        assert row["source_uri"] is None or Path(row["source_uri"]).is_relative_to(folder)
        assert len(row["text"] or "") < 300
        for name in ("image_id", "patient_id", "study_id", "sex", "view", "text"):
            assert row[name] is None or printable(row[name]) == row[name]
        assert row["age_years"] is None or row["age_years"] in AGES
        found, unknown = row["findings"] or [], row["unknown"] or []
        assert set(found) | set(unknown) <= set(FINDINGS)
        assert not set(found) & set(unknown)
        for box in row["boxes"] or []:
            assert all(math.isfinite(box[side]) for side in "xywh")
            assert min(box["w"], box["h"]) >= 0


@pytest.mark.parametrize("layout", FORMATS)
def test_a_mutated_table_is_read_or_refused_in_one_line(layout: str, tmp_path: Path) -> None:
    write, more = LAYOUTS[layout]
    write(tmp_path)
    if layout == "dicom":
        more = {"labels": str(tmp_path / "labels.csv")}
    corpus = CorpusSettings.model_validate({"archive": str(tmp_path), "format": layout, **more})
    kinds = {file.path: format_of(corpus).table_kind(file.path) for file in storage.list_files(str(tmp_path))}
    tables = sorted(path for path, kind in kinds.items() if kind or path == "labels.csv")
    seeds = {}
    for path in tables:
        data = (tmp_path / path).read_bytes()
        seeds[path] = gzip.decompress(data) if path.endswith(".gz") else data

    @given(st.sampled_from(tables).flatmap(lambda path: st.tuples(st.just(path), mutated_tables(seeds[path]))))
    @examples(150)
    def read_or_refused(mutated: tuple[str, bytes]) -> None:
        path, data = mutated
        (tmp_path / path).write_bytes(gzip.compress(data, 1) if path.endswith(".gz") else data)
        try:
            with bounded():
                rows = [row for rows in Archive(corpus).partitions() for row in rows.to_pylist()]
                check_rows(rows, tmp_path)
                known = [StoredFile(name, str(tmp_path / name), 0, 0.0) for name in tables]
                by_kind = {kinds[file.path] or GIVEN: file for file in known}
                for label in format_of(corpus).labels(by_kind):
                    assert set(label.findings) | set(label.unknown) <= set(FINDINGS)
            told = str(tmp_path)
        except UserError as error:
            told = str(error)
        finally:
            (tmp_path / path).write_bytes(gzip.compress(seeds[path]) if path.endswith(".gz") else seeds[path])
        assert told.isprintable()
        assert str(tmp_path) in told
        assert len(told) < 1000

    read_or_refused()
