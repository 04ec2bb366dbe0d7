"""A folder of DICOM files as a PACS exports them: any names, any depth. Headers tell all but the findings.

Findings come from a CSV file, `corpus.labels`. One of its columns says which images a row is of (see KEYS). Those
that have a finding's name (see SPELLINGS) hold 1 (present), 0 (absent) or -1 (uncertain); an empty cell, a column that
is missing and an image without a row are findings that nobody has assessed. Other columns that hold the same and
nothing else are findings in the table's own words.
"""

from collections.abc import Iterator, Mapping, Sequence

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import say
from cxr_retrieval.corpus.dicom import DicomFacts
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.formats.labels import GIVEN, Box, Label, Tables, header_of, quoted, records, view
from cxr_retrieval.corpus.formats.observations import CELLS, Observations
from cxr_retrieval.corpus.formats.vocabulary import in_our_words, named
from cxr_retrieval.corpus.limits import BODY_PART, MODALITY
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile, canonical

PATH, IMAGE, STUDY = "path", "SOPInstanceUID", "StudyInstanceUID"
KEYS = (PATH, IMAGE, STUDY)  # columns that name a file (below the archive's folder), an image or all images of a study
SHOWN = 8  # columns that are not read, by their names
RADIOGRAPHS = ("CR", "DX", "DR", "RG", "OT")  # modalities of what may be a chest X-ray; so may be what names none
CHEST = ("CHEST", "THORAX", "TORAX", "LUNG")  # one of them is in the body part of a chest X-ray
ANY_PART = (None, "UNKNOWN", "UNDEFINED", "UNSPECIFIED", "OTHER", "NONE")  # body parts that do not say which


class DicomFolder:
    name = "a folder of DICOM"
    known_by = f"one of {', '.join(KEYS)}"
    needs: Mapping[str, str] = {}
    lists: Mapping[str, str] | None = None
    companions: Sequence[str] = ()
    frame: int | None = None
    endings: Sequence[str] = ("",)

    def __init__(self, settings: CorpusSettings) -> None:
        self._settings = settings
        self._key = IMAGE if settings.labels is None else _key(StoredFile("", canonical(settings.labels), 0, 0.0))

    @staticmethod
    def table_kind(_: str) -> str | None:
        return None  # the one table is the one that is given

    def image_of(self, path: str) -> str:
        return path

    def patient_of(self, _: str, facts: DicomFacts) -> str | None:
        return facts.patient_id

    def header_label(self, path: str, facts: DicomFacts) -> Label:
        names = {PATH: path, IMAGE: facts.image_uid, STUDY: facts.study_uid}
        return Label(
            names[self._key] or "",
            facts.patient_id or "",
            study=facts.study_uid or "",
            unknown=FINDINGS,
            study_date=facts.study_date,
            age_years=facts.age_years,
            sex=facts.sex,
            view=view(facts.view or ""),
            excluded=_rule(facts),
        )

    def labels(self, tables: Tables) -> Iterator[Label]:
        if GIVEN not in tables:
            return
        table = tables[GIVEN]
        columns = _findings(table, self._key)
        observations = Observations(self._settings, named(columns))
        for key, *cells in records(table, [self._key, *columns]):
            yield Label(key, **observations.facts(dict(zip(columns, cells, strict=True))))

    def boxes(self, _: Tables) -> Iterator[Box]:
        return iter(())

    def listed(self, _: Tables) -> Iterator[tuple[str, str]]:
        return iter(())


def _rule(facts: DicomFacts) -> str | None:
    """The rule that leaves out what its header says is no chest X-ray; None where it may be one."""
    if facts.modality not in (None, *RADIOGRAPHS):
        return MODALITY
    part = facts.body_part
    return None if part in ANY_PART or any(word in part for word in CHEST) else BODY_PART


def _findings(table: StoredFile, key: str) -> list[str]:
    """The columns of a table that tell of findings, ours or others; whoever waits is told of those that do not. Raises
    UserError where none is of ours."""
    columns = [name for name in dict.fromkeys(header_of(table)) if name and name != key]
    ours = [name for name in columns if in_our_words(name) in (*FINDINGS, NO_FINDING)]
    if not named(ours).labelled:
        raise UserError(f"{table.uri}: no column is named as a finding; they are {', '.join(FINDINGS)}")
    others = [name for name in columns if name not in ours]
    cells_of: dict[str, set[bool]] = {name: set() for name in others}  # whether they are labels
    for cells in records(table, others) if others else ():
        for name, cell in zip(others, cells, strict=True):
            if cell:
                cells_of[name].add(cell in CELLS)
    unread = [name for name in others if cells_of[name] != {True}]
    if unread:
        told, more = ", ".join(map(quoted, unread[:SHOWN])), len(unread) - SHOWN
        more_told = f" and {more:,} more" if more > 0 else ""
        say(f"{table.uri}: columns that tell of no finding and are not read: {told}{more_told}")
    return [name for name in columns if name not in unread]


def _key(table: StoredFile) -> str:
    named = set(header_of(table))
    found = [name for name in KEYS if name in named]
    if len(found) != 1:
        raise UserError(
            f"{table.uri}: the columns that may name an image are {', '.join(KEYS)}, and one of them has to be there;"
            f" {len(found)} are"
        )
    return found[0]
