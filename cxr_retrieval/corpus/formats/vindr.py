"""VinDr-CXR (PhysioNet 1.0.0): train/ and test/ of <image_id>.dicom, and annotations/ with the readers' tables.

Three readers saw every image for training, each on a row: a finding is present where two of them say so and uncertain
where one does. A test image has one row, which its five readers agreed on. Nothing says which images are of one
patient: each is taken for a patient of its own. H. Q. Nguyen et al., Scientific Data 2022;9:429.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.dicom import DICOM_ENDINGS, DicomFacts
from cxr_retrieval.corpus.findings import ABSENT, FINDINGS, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.labels import Box, Label, Tables, coordinate, header_of, quoted, records, view
from cxr_retrieval.corpus.formats.vocabulary import VINDR
from cxr_retrieval.corpus.splits import TEST, TRAIN_OR_VALIDATION
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile

TRAIN_LABELS, TEST_LABELS = "image_labels_train", "image_labels_test"
TRAIN_BOXES, TEST_BOXES = "annotations_train", "annotations_test"
TABLES = (TRAIN_LABELS, TEST_LABELS, TRAIN_BOXES, TEST_BOXES)
MOST_BOXES = 200  # of one finding on one image, each compared with the others: readers draw a few
SAME = 0.5  # intersection over union above which boxes of two readers are one
IMAGE, NO_FINDING = "image_id", "No finding"
READERS = ("rad_id", "rad_ID")
CORNERS = ("x_min", "y_min", "x_max", "y_max")


@dataclass
class _Votes:
    """Who saw an image, a name for every row, and how many of them saw each class."""

    readers: list[str] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)

    def state(self, name: str) -> int:
        """PRESENT where two readers say so, or the only one; UNKNOWN where one of several does; else ABSENT."""
        if self.classes[name] >= min(2, len(self.readers)):
            return PRESENT
        return UNKNOWN if self.classes[name] else ABSENT

    @property
    def twice(self) -> bool:
        """Whether a reader votes more than once, which would make two of one."""
        return len(set(self.readers)) < len(self.readers)


class VinDr:
    name = "VinDr-CXR"
    known_by = "its image_id"
    needs: Mapping[str, str] = {TRAIN_LABELS: f"label table annotations/{TRAIN_LABELS}.csv"}
    lists: Mapping[str, str] | None = {TEST_LABELS: f"annotations/{TEST_LABELS}.csv"}
    companions: Sequence[str] = ("LICENSE", "SHA256SUMS")
    frame: int | None = None
    endings: Sequence[str] = DICOM_ENDINGS

    def __init__(self, _: CorpusSettings) -> None: ...

    @staticmethod
    def table_kind(path: str) -> str | None:
        stem, dot, ending = path.removeprefix("annotations/").partition(".")
        return stem if stem in TABLES and dot + ending in (".csv", ".csv.gz") else None

    def image_of(self, path: str) -> str:
        return path.rpartition("/")[2].rpartition(".")[0]

    def patient_of(self, path: str, _: DicomFacts) -> str | None:
        return self.image_of(path)

    def header_label(self, path: str, facts: DicomFacts) -> Label:
        return Label(self.image_of(path), age_years=facts.age_years, sex=facts.sex, view=view(facts.view or ""))

    def labels(self, tables: Tables) -> Iterator[Label]:
        for kind in (TRAIN_LABELS, TEST_LABELS):
            vocabulary = VINDR.among(_classes(tables.get(kind)))
            for image, votes in _votes(tables.get(kind)).items():
                told = vocabulary.read({name: votes.state(name) for name in votes.classes}, ABSENT)
                yield Label(
                    image,
                    patient=image,
                    study=image,
                    reason="labels_twice" if votes.twice else None,
                    text="the label table has two rows of one reader for this image" if votes.twice else None,
                    **told._asdict(),
                )

    def boxes(self, tables: Tables) -> Iterator[Box]:
        for labels, kind in ((TRAIN_LABELS, TRAIN_BOXES), (TEST_LABELS, TEST_BOXES)):
            if kind in tables:
                votes = _votes(tables.get(labels))
                drawn: dict[tuple[str, str], list[_Drawn]] = {}
                for image, name, box in _drawn(tables[kind]):
                    if image not in votes:
                        continue
                    meant = VINDR.meanings.get(name, "")
                    finding = meant if meant in FINDINGS else name
                    if meant in FINDINGS and votes[image].state(name) == PRESENT:
                        boxes = drawn.setdefault((image, finding), [])
                        boxes.append(box)
                        if len(boxes) > MOST_BOXES:
                            raise UserError(
                                f"{tables[kind].uri}: more than {MOST_BOXES} boxes of {finding} on one image;"
                                " copy it again, or keep a row for each that a reader drew"
                            )
                    else:  # whoever asks keeps none of these, and counts them by what is wrong with them
                        yield _box(image, finding, box.corners)
                for (image, finding), found in drawn.items():
                    yield from (_box(image, finding, corners) for corners in merged(found))

    def listed(self, tables: Tables) -> Iterator[tuple[str, str]]:
        lists = {TRAIN_LABELS: TRAIN_OR_VALIDATION, TEST_LABELS: TEST}
        return ((image, split) for kind, split in lists.items() for image in _votes(tables[kind]))


Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Drawn:
    """A box that a reader drew: left, top, right, bottom."""

    reader: str
    corners: Corners


def _box(image: str, finding: str, corners: Corners) -> Box:
    left, top, right, bottom = corners
    return Box(image, finding, left, top, right - left, bottom - top)


def merged(drawn: Sequence["_Drawn"]) -> list[Corners]:
    """Boxes of one finding on one image: those of different readers that overlap by more than SAME are their mean."""
    groups: list[list[_Drawn]] = []
    for box in drawn:
        free = [group for group in groups if box.reader not in {other.reader for other in group}]
        best = max(free, key=lambda group: overlap(_mean(group), box.corners), default=None)
        if best is not None and overlap(_mean(best), box.corners) > SAME:
            best.append(box)
        else:
            groups.append([box])
    return [_mean(group) for group in groups]


def overlap(one: Corners, other: Corners) -> float:
    """Intersection over union, in [0, 1]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(one) + _area(other) - shared)


def _area(corners: Corners) -> float:
    left, top, right, bottom = corners
    return (right - left) * (bottom - top)


def _mean(group: Sequence[_Drawn]) -> Corners:
    left, top, right, bottom = (sum(side) / len(group) for side in zip(*(box.corners for box in group), strict=True))
    return left, top, right, bottom


def _classes(table: StoredFile | None) -> list[str]:
    """The classes that a table has columns of; nobody was asked for others."""
    return [name for name in header_of(table) if name not in (IMAGE, NO_FINDING, *READERS)] if table else []


def _reader(table: StoredFile) -> list[str]:
    """The column that names the readers, if there is one."""
    return [name for name in READERS if name in header_of(table)][:1]


def _votes(table: StoredFile | None) -> dict[str, _Votes]:
    """The readers' votes by image. Raises UserError for a cell that is neither 0 nor 1."""
    found: dict[str, _Votes] = {}
    if table is None:
        return found
    classes, reader = _classes(table), _reader(table)
    for number, (image, *cells) in enumerate(records(table, [IMAGE, *classes, *reader])):
        votes = found.setdefault(image, _Votes())
        votes.readers.append(cells.pop() if reader else str(number))  # whom no name tells apart, each row is another
        for name, cell in zip(classes, cells, strict=True):
            if cell not in ("0", "1", "0.0", "1.0"):
                raise UserError(
                    f"{table.uri}: column {quoted(name)} holds {quoted(cell)}, which is neither 0 nor 1; copy it again"
                )
            if cell.startswith("1"):
                votes.classes[name] += 1
    return found


def _drawn(table: StoredFile) -> Iterator[tuple[str, str, _Drawn]]:
    """Image, class and box of every row with a box: rows of images without a finding have none."""
    reader = _reader(table)
    for number, (image, name, *rest) in enumerate(records(table, [IMAGE, "class_name", *CORNERS, *reader]), start=2):
        if not any(rest[:4]):
            continue
        try:
            left, top, right, bottom = (coordinate(value) for value in rest[:4])
            corners = (left, top, right, bottom)
            if not (right > left and bottom > top and _area(corners) > 0):  # of tiny sides it is 0
                raise ValueError("a box without area")
        except ValueError:
            raise UserError(
                f"{table.uri}: row {number} is no box: x_max above x_min and y_max above y_min; copy it again"
            ) from None
        # A test image's boxes are those that its readers agreed on: no two of them are one.
        yield image, name, _Drawn(rest[4] if reader else "", corners)
