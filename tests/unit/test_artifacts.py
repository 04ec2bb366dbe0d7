"""Promises of artifacts: unfinished is never read as done, settings never mix, rows add up, bytes are checked."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import AccountingError, Artifact, CorruptArtifact, Draft, Equation
from cxr_retrieval.errors import UserError

ROWS = Equation("images", ("prepared", "quarantined"))


def draft(folder: Path, **settings: Any) -> Draft:
    return Draft(str(folder), "corpus", settings or {"size": 256}, ("archive",)).begin()


def finished(folder: Path, *contents: bytes, **settings: Any) -> Artifact:
    making = draft(folder, **settings)
    files = [making.write(f"rows/{number}.bin", data) for number, data in enumerate(contents)]
    return making.finish(files, {"images": 3, "prepared": 2, "quarantined": 1}, [ROWS])


def test_without_a_manifest_an_artifact_is_unfinished(tmp_path: Path) -> None:
    making = draft(tmp_path)
    making.write("rows.bin", b"rows")
    assert artifacts.find(str(tmp_path)) is None
    with pytest.raises(UserError, match=r"no finished corpus at .* unfinished: run the job"):
        artifacts.load(str(tmp_path), "corpus")
    with pytest.raises(UserError, match="not there"):
        artifacts.load(str(tmp_path / "elsewhere"), "corpus")


def test_a_finished_artifact_is_found_with_what_was_said(tmp_path: Path) -> None:
    made = finished(tmp_path, b"one", b"two")
    found = artifacts.load(str(tmp_path), "corpus")
    assert found == made
    assert found.counts == {"images": 3, "prepared": 2, "quarantined": 1}
    assert found.manifest["equations"] == ["images 3 = prepared 2 + quarantined 1"]
    assert [(entry.path, entry.size) for entry in found.files] == [("rows/0.bin", 3), ("rows/1.bin", 3)]
    assert found.read("rows/1.bin") == b"two"
    with pytest.raises(UserError, match="is a corpus, not a model"):
        artifacts.load(str(tmp_path), "model")


def test_a_plan_of_other_settings_is_refused(tmp_path: Path) -> None:
    draft(tmp_path, size=256)
    draft(tmp_path, size=256)  # the same settings go on
    with pytest.raises(UserError, match="plan of other settings: choose another workspace or move the folder away"):
        draft(tmp_path, size=128)


def test_rows_that_do_not_add_up_finish_nothing(tmp_path: Path) -> None:
    making = draft(tmp_path)
    with pytest.raises(AccountingError, match="images 3 = prepared 2 \\+ quarantined 0"):
        making.finish([], {"images": 3, "prepared": 2, "quarantined": 0}, [ROWS])
    assert artifacts.find(str(tmp_path)) is None


def test_equal_bytes_have_equal_content_ids_and_settings_other_input_ids(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", b"a", b"b", size=1)
    two = finished(tmp_path / "two", b"a", b"b", size=2)
    other = finished(tmp_path / "other", b"a", b"c", size=1)
    assert one.manifest["content_id"] == two.manifest["content_id"] != other.manifest["content_id"]
    assert one.input_id == other.input_id != two.input_id


def test_the_content_id_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    ids = []
    for name, order in (("there", "ab"), ("back", "ba")):
        making = draft(tmp_path / name)
        ids.append(making.finish([making.write(file, file.encode()) for file in order], {}).manifest["content_id"])
    assert ids[0] == ids[1]


def test_parts_are_part_of_the_content(tmp_path: Path) -> None:
    parts = [finished(tmp_path / "parts" / str(number), bytes([number])) for number in range(2)]
    whole = [draft(tmp_path / name).finish([], {}, parts=[part]) for name, part in zip("ab", parts, strict=True)]
    assert whole[0].manifest["content_id"] != whole[1].manifest["content_id"]
    assert whole[0].part_uris == [str(tmp_path / "parts" / parts[0].input_id)]


@pytest.mark.parametrize("damage", [b"onf", b"on", b"one more", b""])
def test_a_damaged_file_is_refused(damage: bytes, tmp_path: Path) -> None:
    made = finished(tmp_path, b"one")
    (tmp_path / "rows/0.bin").write_bytes(damage)
    with pytest.raises(CorruptArtifact, match=r"rows/0\.bin: the bytes are not those of the manifest"):
        made.read("rows/0.bin")


def test_a_missing_file_and_a_damaged_manifest_are_refused(tmp_path: Path) -> None:
    made = finished(tmp_path, b"one")
    (tmp_path / "rows/0.bin").unlink()
    with pytest.raises(CorruptArtifact, match=r"rows/0\.bin: the file that the manifest names is missing"):
        made.read("rows/0.bin")
    (tmp_path / artifacts.MANIFEST).write_bytes(b'{"kind": "cor')
    with pytest.raises(CorruptArtifact, match=r"manifest\.json: not a manifest"):
        artifacts.find(str(tmp_path))


def test_a_staged_file_is_measured_as_it_lies_there(tmp_path: Path) -> None:
    making = draft(tmp_path)
    with making.staged("deep/er.bin") as (path, slot):
        path.write_bytes(b"x" * 1000)
        assert not storage.exists(str(tmp_path / "deep/er.bin"))
    assert (slot.value.size, slot.value.sha256) == (1000, storage.sha256(tmp_path / "deep/er.bin"))


def test_a_staged_file_that_fails_is_not_there(tmp_path: Path) -> None:
    making = draft(tmp_path)
    with contextlib.suppress(RuntimeError), making.staged("rows.bin") as (path, _):
        path.write_bytes(b"half")
        raise RuntimeError
    assert not storage.exists(str(tmp_path / "rows.bin"))
    assert [path.name for path in tmp_path.iterdir()] == [artifacts.PLAN]


def test_the_input_id_follows_kind_settings_and_inputs() -> None:
    ids = [
        artifacts.input_id("index", {"a": 1, "b": 2}, ["x"]),
        artifacts.input_id("model", {"a": 1, "b": 2}, ["x"]),
        artifacts.input_id("index", {"a": 1, "b": 3}, ["x"]),
        artifacts.input_id("index", {"a": 1, "b": 2}, ["x", "y"]),
    ]
    assert len(set(ids)) == 4
    assert artifacts.input_id("index", {"b": 2, "a": 1}, ["x"]) == ids[0]
