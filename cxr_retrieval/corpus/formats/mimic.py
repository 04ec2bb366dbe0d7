"""MIMIC-CXR-JPG 2: `mimic-cxr-2.0.0-metadata.csv` and labels by study (`-chexpert` or `-negbio`), plain or as .gz.

Where both label tables are there, CheXpert's is read. Ages and sexes are in MIMIC-IV and not here; dates are shifted,
by another span for every patient. The labels of all studies are held in memory while the images are read: about 50 MB
for MIMIC's 227,827 studies, if as many rows of them are equal as in CheXpert.

Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, arXiv:1901.07042.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.formats.labels import Box, Label, Tables, date, quoted, records, view
from cxr_retrieval.corpus.formats.observations import OBSERVATIONS, Observations
from cxr_retrieval.corpus.splits import TEST, TRAIN, VALIDATION
from cxr_retrieval.errors import UserError

TABLE = re.compile(r"mimic-cxr-[0-9.]+-(metadata|chexpert|negbio|split)\.csv(\.gz)?")
IMAGE_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate")
UNLABELLED = {"reason": "no_label_row", "text": "the label table has no row for this image's study"}
SPLITS = {"train": TRAIN, "validate": VALIDATION, "test": TEST}


class Mimic:
    name = "MIMIC-CXR-JPG"
    known_by = "its dicom_id"
    needs: Mapping[str, str] = {"metadata": "table mimic-cxr-*-metadata.csv"}
    lists: Mapping[str, str] | None = {"split": "MIMIC's mimic-cxr-*-split.csv"}
    companions: Sequence[str] = ("mimic-cxr-", "IMAGE_FILENAMES", "README", "LICENSE.txt", "SHA256SUMS.txt")
    frame: int | None = None

    def __init__(self, settings: CorpusSettings) -> None:
        self._observations = Observations(settings)

    @staticmethod
    def table_kind(path: str) -> str | None:
        found = TABLE.fullmatch(path.rpartition("/")[2])
        return found.group(1) if found else None

    def image_of(self, path: str) -> str:
        return path.rpartition("/")[2].rpartition(".")[0]

    def labels(self, tables: Tables) -> Iterator[Label]:
        labels = tables.get("chexpert") or tables.get("negbio")
        if labels is None:
            raise UserError(f"{tables['metadata'].uri}: no mimic-cxr-*-chexpert.csv or -negbio.csv in this archive")
        kinds: dict[tuple[str, ...], dict[str, Any]] = {}  # what equal rows tell is held once
        studies: dict[str, dict[str, Any]] = {}
        for number, (study, *cells) in enumerate(records(labels, ("study_id", *OBSERVATIONS)), start=2):
            if study in studies:
                raise UserError(f"{labels.uri}: row {number:,} is its study's second; a study must have one")
            kind = tuple(cells)
            if kind not in kinds:
                kinds[kind] = self._observations.facts(dict(zip(OBSERVATIONS, cells, strict=True)))
            studies[study] = kinds[kind]
        for image, patient, study, position, day in records(tables["metadata"], IMAGE_COLUMNS):
            facts = studies.get(study, UNLABELLED)
            yield Label(image, patient, study=study, study_date=date(day), view=view(position), **facts)

    def boxes(self, _: Tables) -> Iterator[Box]:
        return iter(())

    def listed(self, tables: Tables) -> Iterator[tuple[str, str]]:
        """`validate` patients are neither trained on nor tested on, so they are the ones to choose by."""
        for image, split in records(tables["split"], ("dicom_id", "split")):
            if split not in SPLITS:
                raise UserError(f"{tables['split'].uri}: split {quoted(split)} is none of {', '.join(SPLITS)}")
            yield image, SPLITS[split]
