"""The header of a DICOM file: which elements are read at all, and the few facts that may leave the file.

Headers are full of names. Only the elements that a caller names are kept, and no text of a header is in what is raised,
warned of or logged: numbers of the image, such as rows and columns, are.
"""

import datetime
import io
import logging
import re
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pydicom
from pydicom import uid
from pydicom.charset import default_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_sequence
from pydicom.tag import BaseTag, Tag

from cxr_retrieval.corpus import codestream
from cxr_retrieval.corpus.limits import HEADER_ROOM, RejectedImage, reading

# pydicom tells of odd values by quoting them: nothing that it says is let out.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom\b")

UNDEFINED = 0xFFFF_FFFF  # the length of an element that ends with a delimiter
PREAMBLE, MAGIC = 128, b"DICM"
META = b"\x02\x00\x00\x00UL\x04\x00"  # what file meta information begins with: DICOM for certain, preamble or not
BARE = re.compile(rb"\x08\x00[\x00-\x18]\x00(UI|CS|UL|SH|DA|TM|LO|[\x00-\x40]\x00\x00\x00)", re.DOTALL)

UNREAD = "a DICOM header that cannot be read"  # and the words of whoever cannot: they would quote it
BARE_TEXT = "DICOM without preamble and file meta information, of unknown encoding"
DICOM_ENDINGS = (".dcm", ".dicom")

FACTS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "PatientID",
    "StudyInstanceUID",
    "StudyDate",
    "Modality",
    "ViewPosition",
    "PatientSex",
    "PatientAge",
    "BodyPartExamined",
    "BurnedInAnnotation",
    "ImageLaterality",
    "Laterality",
    "Rows",
)
NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
MOST_STEPS = 200_000  # of reading a file, three or so for an element and eight for an item; images take some hundreds
CHARACTER_SETS = (b"\x08\x00\x05\x00", b"\x00\x08\x00\x05")  # the tag of their names, little and big endian
MOST_NAMES = 256  # bytes of the names of character sets
MOST_VALUE = 64 << 10  # bytes of an element that becomes text or numbers
MOST_TABLE, MOST_TABLES = 128 << 10, 1 << 20  # bytes of a look-up table, and of a sequence of such
PIXEL_DATA = Tag("PixelData")
MOST = 1e12  # the largest number that is taken for one; infinity and no-number are neither


@dataclass(frozen=True)
class DicomFacts:
    """What may be told of a DICOM file. None is what the file does not say, or says in no form of the standard.

    `has_image`: it has rows of pixels, or is of a class of images and lost them. Reports and directories are neither.
    """

    image_uid: str | None
    patient_id: str | None
    study_uid: str | None
    study_date: datetime.date | None
    modality: str | None
    view: str | None
    sex: str | None
    age_years: int | None
    body_part: str | None
    laterality: str | None
    burned_in: bool | None
    has_image: bool


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM for certain: by its magic, or by file meta information that lost the preamble."""
    return data[PREAMBLE : PREAMBLE + 4] == MAGIC or data.startswith(META)


def is_bare_dicom(data: bytes) -> bool:
    """Whether a file looks like a DICOM data set without file meta information, of whatever encoding."""
    return BARE.match(data) is not None


def read_facts(data: bytes, *, whole: bool = True) -> DicomFacts:
    """The facts of a DICOM file's header that may be told; no pixel is read. Raises RejectedImage.

    Where `data` is not the `whole` file but its beginning, and the header may go on behind it, the reason is `damaged`.
    """
    with reading(UNREAD):
        header, _ = read_header(data, FACTS, HEADER_ROOM, to_the_end=False, whole=whole)
        found = {name: str(first(header, name) or "").strip(" \0") for name in FACTS}
    date = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", found["StudyDate"])
    side = _code(found["ImageLaterality"]) or _code(found["Laterality"])
    sex = _code(found["PatientSex"])
    return DicomFacts(
        image_uid=_uid(found["SOPInstanceUID"]),
        patient_id=found["PatientID"] if found["PatientID"].isprintable() and found["PatientID"] else None,
        study_uid=_uid(found["StudyInstanceUID"]),
        study_date=_date(*map(int, date.groups())) if date else None,
        modality=_code(found["Modality"]),
        view=_code(found["ViewPosition"]),
        sex=sex if sex in ("M", "F", "O") else None,
        age_years=age_years(found["PatientAge"]),
        body_part=_code(found["BodyPartExamined"]),
        laterality=side if side in ("R", "L", "U", "B") else None,
        burned_in=burned_in(header),
        has_image=bool(found["Rows"]) or "Image Storage" in uid.UID(found["SOPClassUID"]).name,
    )


def age_years(text: str) -> int | None:
    """Whole years of an age string (AS) such as 058Y, 018M, 003W or 012D; None of 000Y, which is what is left of an age
    that was taken out: that of an infant is told in days, weeks or months."""
    found = re.fullmatch(r"(\d{1,3})([DWMY])", text)
    if found is None or text == "000Y":
        return None
    in_a_year = {"Y": 1, "M": 12, "W": 365.25 / 7, "D": 365.25}
    years = int(int(found[1]) / in_a_year[found[2]])
    return years if years <= 120 else None


def read_header(
    data: bytes, names: tuple[str, ...], room: int, to_the_end: bool = True, whole: bool = True
) -> tuple[Dataset, uid.UID]:
    """The named elements of a file, and its transfer syntax, whether or not its pixels can be read. Of a deflated file,
    `room` bytes are inflated.

    Not `to_the_end`, reading stops behind the last of them; `data` that is not the `whole` file has to reach that far.
    """
    file = _Steps(data)
    file.seek(0 if data.startswith(META) else PREAMBLE + 4)
    meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    if "TransferSyntaxUID" not in meta:
        raise RejectedImage("damaged", "DICOM that names no transfer syntax")
    require_short(meta, ["TransferSyntaxUID"])
    syntax = uid.UID(str(meta.TransferSyntaxUID))
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflated = inflater.decompress(data[file.tell() :], room)
        if inflater.unconsumed_tail and to_the_end:
            raise RejectedImage("too_large", f"deflated DICOM of more than {room:,} bytes")
        file = _Steps(inflated)
    tags: list[BaseTag | int] = [Tag(name) for name in names]
    last, passed = max(tags), False

    def behind(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        nonlocal passed
        passed = tag > last
        return passed

    header = read_dataset(
        file,
        syntax == uid.ImplicitVRLittleEndian,
        syntax != uid.ExplicitVRBigEndian,
        stop_when=None if to_the_end else behind,
        specific_tags=tags,
    )
    if not (passed or whole):
        raise RejectedImage("damaged", f"a DICOM header that does not end within {len(data):,} bytes")
    require_complete(header)
    require_short(header, (name for name in names if name != "PixelData"))
    return header, syntax


def require_decodable(syntax: uid.UID) -> None:
    """Raises RejectedImage where pixels in a transfer syntax cannot be read."""
    if syntax not in NATIVE and syntax not in codestream.SYNTAXES:
        known = syntax.name if syntax in uid.UID_dictionary else "one that the standard does not list"
        raise RejectedImage("unsupported", f"DICOM in a transfer syntax that is not read: {known}")


class _Steps(io.BytesIO):
    """Bytes that pydicom goes through in few steps: it makes objects of every item and, in some sequences, of every
    element, wanted or not, and takes the names of character sets apart wherever they are. Raises RejectedImage.
    """

    _steps, _begin = 0, b""

    def tell(self) -> int:
        self._step()
        return super().tell()

    def read(self, size: int | None = -1, /) -> bytes:
        self._step()
        if self._begin[:4] in CHARACTER_SETS and (size or 0) > MOST_NAMES:
            raise RejectedImage("damaged", f"names of character sets of {size:,} bytes")
        found = super().read(size)
        if size == 8:
            self._begin = found  # of an element: its tag is in front of it, whatever else is read before its value
        return found

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise RejectedImage("unsupported", f"DICOM of so many elements that reading it takes {MOST_STEPS:,} steps")


def require_complete(header: Dataset) -> None:
    """Raises RejectedImage where the file ends within an element: pydicom takes what is there for its value."""
    for raw in header.values():
        if isinstance(raw, RawDataElement) and raw.value is not None and len(raw.value) < raw.length != UNDEFINED:
            there = f"{len(raw.value):,} of {raw.length:,} bytes"
            raise RejectedImage("damaged", f"DICOM that ends within {keyword_for_tag(raw.tag)}: {there}")


def require_short(header: Dataset, names: Iterable[str], most: int = MOST_VALUE) -> None:
    """Raises RejectedImage where an element has more than `most` bytes, as it was read: nothing is made of it yet.
    Sequences, which have tables in them, may be longer and are read here."""
    for name in names:
        raw = header.get_item(name)
        if not (isinstance(raw, RawDataElement) and isinstance(raw.value, bytes)):
            continue
        kind = dictionary_VR(raw.tag) if raw.VR in (None, "UN") else raw.VR
        if len(raw.value) > (MOST_TABLES if kind == "SQ" else most):
            raise RejectedImage("damaged", f"an element of a DICOM header of {len(raw.value):,} bytes")
        if kind == "SQ":  # pydicom would take as many steps as it likes
            file, length = _Steps(raw.value), len(raw.value)
            items = read_sequence(file, raw.is_implicit_VR, raw.is_little_endian, length, default_encoding)
            header[raw.tag] = DataElement(raw.tag, "SQ", items)


def element(header: Dataset, name: str) -> Any:
    return header[name].value if name in header else None


def first(header: Dataset, name: str) -> Any:
    """The only or the first value of an element; None where it is absent or empty."""
    value = element(header, name)
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return value
    return value[0] if len(value) else None


def burned_in(header: Dataset) -> bool | None:
    """Whether the pixels hold text that may tell who the patient is, if the file says so."""
    return {"YES": True, "NO": False}.get(str(first(header, "BurnedInAnnotation") or "").strip(" \0").upper())


def whole(header: Dataset, name: str, default: int | None = None) -> int:
    value = first(header, name)
    if value is None or value == "":
        if default is None:
            raise RejectedImage("damaged", f"a DICOM image without {name}")
        return default
    return int(value)


def number(header: Dataset, name: str) -> float | None:
    """A number of sane size, or None where there is none."""
    try:
        value = float(first(header, name))
    except (TypeError, ValueError):
        return None
    return value if abs(value) <= MOST else None


def _uid(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9.]{1,64}", text) else None


def _code(text: str) -> str | None:
    """A code string (CS). Anything else may be free text, and is not told."""
    return text.upper() if re.fullmatch(r"[A-Za-z0-9_ ]{1,16}", text) else None


def _date(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None
