"""The layouts of archives that can be prepared, by the name that `corpus.format` takes."""

from collections.abc import Callable, Mapping

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.formats.labels import Format
from cxr_retrieval.corpus.formats.nih import Nih

FORMATS: Mapping[str, Callable[[CorpusSettings], Format]] = {"nih": Nih}


def format_of(settings: CorpusSettings) -> Format:
    """The layout that the settings tell the archive to have."""
    return FORMATS[settings.format](settings)
