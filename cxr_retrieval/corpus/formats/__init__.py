"""The layouts of archives that can be prepared, by the name that `corpus.format` takes."""

from collections.abc import Iterator, Mapping

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.formats.chexpert import CheXpert
from cxr_retrieval.corpus.formats.column_map import ColumnMap
from cxr_retrieval.corpus.formats.dicom import DicomFolder
from cxr_retrieval.corpus.formats.labels import Format
from cxr_retrieval.corpus.formats.mimic import Mimic
from cxr_retrieval.corpus.formats.nih import Nih
from cxr_retrieval.corpus.formats.padchest import PadChest
from cxr_retrieval.corpus.formats.vindr import VinDr

FORMATS: Mapping[str, type[Format]] = {
    "nih": Nih,
    "chexpert": CheXpert,
    "mimic": Mimic,
    "padchest": PadChest,
    "vindr": VinDr,
    "dicom": DicomFolder,
    "csv": ColumnMap,
}


def format_of(settings: CorpusSettings) -> Format:
    """The layout that the settings tell the archive to have."""
    return FORMATS[settings.format](settings)


def formats_with(path: str) -> Iterator[str]:
    """The formats that know a file of this path for a table that they need; csv, which takes any table, is none."""
    for name, layout in FORMATS.items():
        if name != "csv" and layout.table_kind(path) in layout.needs:
            yield name
