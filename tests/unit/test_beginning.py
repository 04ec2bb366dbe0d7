"""Promises of an archive's beginning: it tells the first partition as the whole does, or says that it cannot."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus import beginning
from cxr_retrieval.corpus.archive import Archive
from cxr_retrieval.corpus.beginning import Beginning, NotToldYet
from cxr_retrieval.errors import UserError
from cxr_retrieval.storage import StoredFile
from tests.unit.test_archive import BOXES, Folder, line, lists

NAMES = [f"{patient:04d}_{follow_up:03d}.png" for patient in range(20) for follow_up in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path).images(*(f"images/{name}" for name in NAMES))
    found.table(*(line(name, "Effusion", patient=name[:4]) for name in NAMES))
    return found.table(
        f"{NAMES[2]},Effusion,10,20,30,40,,,", header="Image Index,Finding Label,Bbox [x,y,w,h],,,", name=BOXES
    )


def settings_of(folder: Folder, **changes: object) -> CorpusSettings:
    return CorpusSettings.model_validate({"archive": str(folder.path), "partition_images": 16} | changes)


def first(archive: Archive) -> pa.Table:
    return next(archive.partitions())


@pytest.mark.parametrize("changes", [{}, {"split": "official"}, {"views": ["PA"], "ages": [60, 120]}])
def test_it_tells_the_first_partition_as_the_whole_archive_does(changes: dict[str, object], folder: Folder) -> None:
    lists(folder, NAMES[:40], NAMES[40:])
    settings = settings_of(folder, **changes)
    begun = list(Beginning(settings).partitions())
    assert len(begun) == 1
    assert begun[0].num_rows == 16
    assert begun[0].equals(first(Archive(settings)))


def test_it_lists_one_image_more_than_it_needs_and_reads_no_further_row(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.table(*(line(name, patient=name[:4]) for name in NAMES[:16]), '"a quote that is never closed')
    listed = 0

    def counted(uri: str, left_out: Callable[[str], None]) -> Iterator[StoredFile]:
        nonlocal listed
        for file in storage_list(uri, left_out):
            listed += file.path.endswith(".png")
            yield file

    storage_list = storage.list_files
    monkeypatch.setattr(storage, "list_files", counted)
    settings = settings_of(folder)
    assert first(Beginning(settings)).num_rows == 16
    assert listed == 17
    with pytest.raises(UserError, match="cannot be read"):
        Archive(settings)


def test_a_second_row_that_comes_in_time_is_told_as_the_whole_archive_tells_it(folder: Folder) -> None:
    folder.table(*(line(name, patient=name[:4]) for name in (NAMES[0], *NAMES)))
    settings = settings_of(folder)
    rows = first(Beginning(settings))
    assert rows["reason"].to_pylist()[:2] == ["labels_twice", None]
    assert rows.equals(first(Archive(settings)))


def test_a_row_that_does_not_come_soon_is_not_waited_for(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.table(*(line(name, patient=name[:4]) for name in reversed(NAMES)))
    assert first(Beginning(settings_of(folder))).num_rows == 16
    monkeypatch.setattr(beginning, "MOST_ROWS", 60)
    with pytest.raises(NotToldYet):
        Beginning(settings_of(folder))


def test_an_image_whose_row_never_comes_has_its_reason(folder: Folder) -> None:
    folder.table(*(line(name, patient=name[:4]) for name in NAMES[1:]))
    settings = settings_of(folder)
    rows = first(Beginning(settings))
    assert rows["reason"].to_pylist()[:2] == ["no_label_row", None]
    assert rows.equals(first(Archive(settings)))


@pytest.mark.parametrize(
    "changes",
    [
        {"partition_images": len(NAMES)},
        {"split": "official"},
        {"format": "chexpert"},
        {"format": "dicom"},
    ],
    ids=["one partition is all of it", "its lists are not there", "its tables are not there", "headers tell"],
)
def test_it_says_where_it_cannot_tell(changes: dict[str, object], folder: Folder) -> None:
    with pytest.raises(NotToldYet):
        Beginning(settings_of(folder, **changes))
