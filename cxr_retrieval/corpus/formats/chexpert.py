"""CheXpert: `train.csv`, `valid.csv` and, where it is, `test.csv` or `test_labels.csv`, in full or small size.

Images are known by `patient00001/study1/view1_frontal.jpg`, which is unique in all of CheXpert: the download in batches
has other folders above it than the tables say.
"""

from collections.abc import Iterator, Mapping, Sequence

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.formats.labels import Box, Label, Tables, age, records, sex, view, whole_number
from cxr_retrieval.corpus.formats.observations import OBSERVATIONS, Observations
from cxr_retrieval.corpus.splits import TEST, TRAIN, TRAIN_OR_VALIDATION, VALIDATION

TABLES = {"train.csv": "train", "valid.csv": "valid", "test.csv": "test", "test_labels.csv": "test"}
COLUMNS = ("Path", *OBSERVATIONS)
PERSON = ("Sex", "Age", "Frontal/Lateral", "AP/PA")  # the test table lacks them


class CheXpert:
    name = "CheXpert"
    known_by = "its patient's folder, its study's and its file's name"
    needs: Mapping[str, str] = {"train": "label table train.csv"}
    lists: Mapping[str, str] | None = {"valid": "CheXpert's valid.csv"}
    companions: Sequence[str] = ()
    frame: int | None = None

    def __init__(self, settings: CorpusSettings) -> None:
        self._observations = Observations(settings)

    @staticmethod
    def table_kind(path: str) -> str | None:
        return TABLES.get(path.rpartition("/")[2].removesuffix(".gz"))

    def image_of(self, path: str) -> str:
        return "/".join(path.split("/")[-3:])

    def labels(self, tables: Tables) -> Iterator[Label]:
        for kind, file in tables.items():
            required, optional = (COLUMNS, PERSON) if kind == "test" else ((*COLUMNS, *PERSON), ())
            for path, *cells, gender, years, side, position in records(file, required, optional):
                image = self.image_of(path)
                patient, _, rest = image.partition("/")
                study, _, name = rest.partition("/")
                yield Label(
                    image,
                    patient if name else "",
                    study=f"{patient}_{study}",
                    age_years=age(whole_number(years)) or None,  # CheXpert has adults only, and 0 where it knows none
                    sex=sex(gender),
                    view=_view(side or name, position),
                    **self._observations.facts(dict(zip(OBSERVATIONS, cells, strict=True))),
                )

    def boxes(self, _: Tables) -> Iterator[Box]:
        return iter(())

    def listed(self, tables: Tables) -> Iterator[tuple[str, str]]:
        """The small download has no test images: there, what CheXpert holds out, `valid`, is what is tested on, and
        validation patients are taken from `train`."""
        whole = "test" in tables
        splits = {"train": TRAIN, "valid": VALIDATION, "test": TEST}
        splits = splits if whole else {"train": TRAIN_OR_VALIDATION, "valid": TEST}
        for kind, split in splits.items():
            for (path,) in records(tables[kind], ("Path",)):
                yield self.image_of(path), split


def _view(side: str, position: str) -> str | None:
    """`side` is Frontal or Lateral, or the name of the file. A few frontal images are said to be LL or RL: kept so."""
    if "lateral" in side.lower():
        return "LATERAL"
    return view(position) if position in ("PA", "AP") else position or None
