"""NIH ChestX-ray14: images by name, `Data_Entry_2017*.csv`, optionally `BBox_List_2017.csv` and the official lists."""

from collections.abc import Iterator, Mapping, Sequence

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.formats.labels import (
    Box,
    Label,
    Tables,
    age,
    coordinate,
    header_of,
    lines,
    quoted,
    records,
    sex,
    view,
    whole_number,
)
from cxr_retrieval.corpus.formats.vocabulary import NIH
from cxr_retrieval.corpus.splits import TEST, TRAIN_OR_VALIDATION
from cxr_retrieval.errors import UserError

TABLE, BOXES = "Data_Entry_2017", "BBox_List_2017"
LISTS = {"train_val_list": TRAIN_OR_VALIDATION, "test_list": TEST}
ENDINGS = {TABLE: ".csv", BOXES: ".csv"} | dict.fromkeys(LISTS, ".txt")
COLUMNS = (
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "View Position",
)
SEX = ("Patient Gender", "Patient Sex")  # one of them: the table that is for download now has the second


class Nih:
    name = "NIH"
    known_by = "its file's name"
    needs: Mapping[str, str] = {TABLE: f"label table {TABLE}*.csv"}
    lists: Mapping[str, str] | None = {kind: f"NIH's {kind}.txt" for kind in LISTS}
    companions: Sequence[str] = ()
    frame: int | None = 1024

    def __init__(self, _: CorpusSettings) -> None: ...

    @staticmethod
    def table_kind(path: str) -> str | None:
        if "/" in path:
            return None
        kind = next((kind for kind in ENDINGS if path.startswith(kind)), None)
        return kind if kind and path.endswith((ENDINGS[kind], f"{ENDINGS[kind]}.gz")) else None

    def image_of(self, path: str) -> str:
        return path.rpartition("/")[2]

    def labels(self, tables: Tables) -> Iterator[Label]:
        gender = next((name for name in SEX if name in header_of(tables[TABLE])), SEX[0])
        for image, found, follow_up, patient, years, told_view, told_sex in records(tables[TABLE], (*COLUMNS, gender)):
            findings = [finding for finding in found.split("|") if finding != NO_FINDING]
            strange = next((finding for finding in findings if finding not in FINDINGS), None)
            yield Label(
                image,
                patient,
                study=f"{patient}_{follow_up}",
                findings=[finding for finding in FINDINGS if finding in findings],
                follow_up=whole_number(follow_up),
                age_years=age(whole_number(years.removesuffix("Y"))),  # the table's first edition writes 058Y
                sex=sex(told_sex),
                view=view(told_view),
                reason=None if strange is None else "unknown_finding",
                text=None if strange is None else f"finding {quoted(strange)} is none of the {len(FINDINGS)}",
            )

    def boxes(self, tables: Tables) -> Iterator[Box]:
        if BOXES not in tables:
            return
        for number, row in enumerate(lines(tables[BOXES]), start=1):
            if number == 1 or not row:
                continue  # NIH's header is `Bbox [x,y,w,h],,,`: the columns are known by their places
            try:
                x, y, w, h = (coordinate(value) for value in row[2:6])
                if not (w > 0 and h > 0):
                    raise ValueError("a box without area")
            except ValueError:
                raise UserError(
                    f"{tables[BOXES].uri}: line {number} is no box: four numbers x, y, w, h with w and h above 0"
                ) from None
            yield Box(row[0], NIH.meanings.get(row[1], row[1]), x, y, w, h)

    def listed(self, tables: Tables) -> Iterator[tuple[str, str]]:
        return ((row[0], split) for kind, split in LISTS.items() for row in lines(tables[kind]) if row)
