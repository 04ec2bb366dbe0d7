"""PadChest: images by name, `PADCHEST_chest_x_ray_images_labels_160K*.csv`, plain or as .gz.

Labels are lists of words, of physicians or of a network that read the report. Where a word says that the list is not
the whole, findings that are not in it are unknown. Localisations are words too and no boxes: they are not kept.

Bustos et al., PadChest: a large chest x-ray image dataset with multi-label annotated reports, Medical Image Analysis
2020;66:101797.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import ABSENT, PRESENT, UNKNOWN
from cxr_retrieval.corpus.formats.labels import (
    Box,
    Label,
    Tables,
    age,
    date,
    filled,
    quoted,
    records,
    sex,
    view,
    whole_number,
)
from cxr_retrieval.corpus.formats.vocabulary import PADCHEST
from cxr_retrieval.corpus.limits import BY_ARCHIVE

TABLE = "PADCHEST_chest_x_ray_images_labels_160K"
COLUMNS = (
    "ImageID",
    "PatientID",
    "StudyID",
    "StudyDate_DICOM",
    "PatientBirth",
    "PatientSex_DICOM",
    "Projection",
    "Labels",
)
WORD = re.compile(r"'([^']*)'|\"([^\"]*)\"")
NORMAL = "normal"
# As in an earlier study; a report that says too little; a sentence that got no label.
NOT_THE_WHOLE = frozenset({"unchanged", "exclude", ""})
EXCLUDED = "EXCLUDE"  # a projection: what PadChest's authors found to be no image of a chest


class PadChest:
    name = "PadChest"
    known_by = "its file's name"
    needs: Mapping[str, str] = {TABLE: f"label table {TABLE}*.csv"}
    lists: Mapping[str, str] | None = None
    companions: Sequence[str] = ()
    frame: int | None = None

    def __init__(self, _: CorpusSettings) -> None: ...

    @staticmethod
    def table_kind(path: str) -> str | None:
        name = path.rpartition("/")[2]
        return TABLE if name.startswith(TABLE) and name.endswith((".csv", ".csv.gz")) else None

    def image_of(self, path: str) -> str:
        return path.rpartition("/")[2]

    def labels(self, tables: Tables) -> Iterator[Label]:
        for image, patient, study, day, birth, gender, projection, words in records(tables[TABLE], COLUMNS):
            taken, born = date(day), whole_number(birth.removesuffix(".0"))
            facts = {"excluded": BY_ARCHIVE} if projection == EXCLUDED else _facts(words)
            yield Label(
                image,
                patient,
                study=study,
                study_date=taken,
                age_years=age(taken.year - born) if taken and born else None,  # only the year of birth is told
                sex=sex(gender),
                view=view(projection),
                **facts,
            )

    def boxes(self, _: Tables) -> Iterator[Box]:
        return iter(())

    def listed(self, _: Tables) -> Iterator[tuple[str, str]]:
        return iter(())


def _facts(text: str) -> dict[str, Any]:
    """What a list of words tells, as fields of Label."""
    if not filled(text):
        return PADCHEST.read({}, UNKNOWN)._asdict()
    if not text.startswith("[") or WORD.sub("", text).strip("[], "):
        return {"reason": "unknown_label", "text": f"Labels is {quoted(text)}: no list of quoted words"}
    words = {(single or double).strip() for single, double in WORD.findall(text)}
    told = sorted(words - NOT_THE_WHOLE - {NORMAL})
    whole = words and not words & NOT_THE_WHOLE
    return PADCHEST.read(dict.fromkeys(told, PRESENT), ABSENT if whole else UNKNOWN)._asdict()
