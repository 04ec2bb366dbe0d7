"""Promises about published versions afterwards: the gate, the way back, and what may be deleted."""

import json
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import jobs.versions
from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.config import Settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache as cached
from cxr_retrieval.index import lifecycle
from cxr_retrieval.index import versions as published
from cxr_retrieval.index.aliases import list_aliases, move_alias
from cxr_retrieval.index.lifecycle import (
    Evaluations,
    Figure,
    Garbage,
    collect,
    drop_version,
    garbage,
    promote,
    rollback,
)
from cxr_retrieval.index.removal import Holdings, purge
from cxr_retrieval.index.versions import Version, list_versions, open_version, publish, resolve, verify
from jobs.versions import evaluations_in, run, show_problems


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def to(tmp_path: Path) -> str:
    return str(tmp_path / "published")


def model_files(weights: str) -> dict[str, bytes]:
    return {"model.json": b"{}", "weights.safetensors": weights.encode()}


def build(folder: Path, model: str, weights: str | None = None, images: str | None = None) -> Artifact:
    """A built index of a model; weights and shard are its own if not told, the findings are common to all."""
    weights, images = weights or model, images or weights or model
    draft = Draft(str(folder / f"{model}-{weights}-{images}"), "index", {"images": images}, ()).begin()
    index = json.dumps({"model": model, "embedding": "global"}).encode()
    files = {"index.json": index, "shards/0.faiss": images.encode() * 100, "findings.json": b"{}"}
    files |= {f"model/{name}": data for name, data in model_files(weights).items()}
    return draft.finish([draft.write(path, data) for path, data in files.items()], {"indexed": 7}, factory="Flat")


def evaluation(workspace: Path, name: str, model: str, value: float, *drawn: str, weights: str | None = None) -> Draft:
    """An evaluation of a model's embeddings; it is finished unless its name says otherwise."""
    trained = Draft(str(workspace / "models" / name), "model", {"name": model}, ()).begin()
    content = trained.finish([trained.write(*file) for file in model_files(weights or model).items()], {})
    embedded = Draft.under("", "embeddings", {}, (content.manifest["content_id"], "c0ffee")).input_id
    cell = {"value": value, "low": value - 0.01, "high": value + 0.01}
    figures: dict[str, Any] = {"model": model, "split": "test", "corpus": "c0ffee"}
    figures |= {"drawn": drawn} if drawn else {}  # those of 0.1.0 do not tell it: all were judged
    figures["embeddings"] = {"global": {"all": {"precision_at": {"8": cell}, "map": cell}}}
    folder = workspace / "reports" / "evaluation" / name
    draft = Draft(str(folder), "evaluation", {"name": name}, (embedded,)).begin()
    entry = draft.write("evaluation.json", json.dumps(figures).encode())
    if name != "unfinished":
        draft.finish([entry], {})
    return draft


@pytest.fixture
def versions(tmp_path: Path, to: str) -> list[str]:
    """Three versions in the order of their publishing; `latest` serves the last."""
    return [publish(build(tmp_path, model), to, "latest").version for model in ("old", "new", "newest")]


def judged(on: str = "NIH", **values: float) -> Evaluations:
    """Figures with an interval of two points to both sides."""
    figures = {"precision@8": 0.2, "mAP": 0.2} | {name.replace("_", "@"): value for name, value in values.items()}
    return {on: {name: Figure(value, value - 0.02, value + 0.02) for name, value in figures.items()}}


# ---- promote and rollback


def test_a_version_is_promoted_and_readers_of_the_alias_get_it(to: str, versions: list[str]) -> None:
    moved = promote(to, versions[0], "latest", lambda _: judged())
    assert (moved.version, moved.before, moved.moved) == (versions[0], versions[2], True)
    assert open_version(f"{to}@latest").version.id == versions[0]
    assert not promote(to, versions[0], "latest", lambda _: judged()).moved


def test_an_alias_is_promoted_from_another_and_is_made_where_there_is_none(to: str, versions: list[str]) -> None:
    promote(to, versions[1], "candidate", None)
    promote(to, "candidate", "serving", None)
    assert {name: alias.version for name, alias in list_aliases(to).items()} == {
        "latest": versions[2],
        "candidate": versions[1],
        "serving": versions[1],
    }


@pytest.mark.parametrize("worse", ["mAP", "precision_8"])
def test_a_version_that_is_worse_by_more_than_the_interval_is_refused(to: str, versions: list[str], worse: str) -> None:
    gates = {versions[0]: judged(**{worse: 0.17}), versions[2]: judged()}
    with pytest.raises(UserError, match=rf"{versions[0]} is refused: its {worse.replace('_', '@')} on NIH is 17.0"):
        promote(to, versions[0], "latest", lambda version: gates[version.id])
    assert list_aliases(to)["latest"].version == versions[2]
    gates[versions[0]] = judged(**{worse: 0.19})  # within it
    assert promote(to, versions[0], "latest", lambda version: gates[version.id]).moved


def test_what_a_gate_let_pass_is_shown_with_both_figures(
    to: str, versions: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = {versions[0]: judged(mAP=0.19), versions[2]: judged()}
    monkeypatch.setattr(jobs.versions, "evaluations_in", lambda _: lambda version: gates[version.id])
    gated = Namespace(**vars(options(f"{to}@latest", ["promote", versions[0]])) | {"without_gate": False})
    run(Settings(), gated)
    told = capsys.readouterr()
    shown = " ".join((told.out + told.err).split())
    assert f"{versions[0]}, serves now" in shown
    assert f"{versions[2]}, before" in shown
    assert "NIH │ mAP │ 19.0 [17.0, 21.0] │ 20.0 [18.0, 22.0]" in shown


def test_versions_of_one_model_need_no_judgement(tmp_path: Path, to: str, versions: list[str]) -> None:
    grown = publish(build(tmp_path, "newest", images="more"), to, "candidate").version
    assert promote(to, grown, "latest", lambda _: {}).moved
    with pytest.raises(UserError, match="evaluated on nothing"):
        promote(to, versions[0], "latest", lambda _: {})


def test_a_model_trained_anew_under_the_same_settings_is_judged_and_by_its_own_figures(
    tmp_path: Path, to: str, versions: list[str]
) -> None:
    again = publish(build(tmp_path, "newest", weights="others"), to, "candidate").version
    gate = evaluations_in(str(tmp_path))
    with pytest.raises(UserError, match="evaluated on nothing"):
        promote(to, again, "latest", gate)
    for name, weights in (("a", "newest"), ("b", "others"), ("c", "newest")):  # neither is the last to be read
        evaluation(tmp_path, name, "newest", 0.3 if weights == "newest" else 0.1, weights=weights)
    place = "the test patients of corpus c0ffee"
    assert gate(resolve(to, versions[2]))[place]["mAP"].value == 0.3
    assert gate(resolve(to, again))[place]["mAP"].value == 0.1
    with pytest.raises(UserError, match=rf"{again} is refused: its precision@8 on {place} is 10.0"):
        promote(to, again, "latest", gate)
    promote(to, again, "latest", None)
    assert promote(to, versions[2], "latest", gate).moved


def test_an_evaluation_of_before_embeddings_knew_their_model_by_its_bytes_counts_as_none(
    tmp_path: Path, to: str, versions: list[str]
) -> None:
    draft = evaluation(tmp_path, "first", "old", 0.3)
    of_input_id = Draft.under("", "embeddings", {}, ("old", "c0ffee")).input_id
    manifest = json.loads(storage.read_bytes(f"{draft.uri}/manifest.json")) | {"inputs": [of_input_id]}
    storage.write_bytes(f"{draft.uri}/manifest.json", json.dumps(manifest).encode())
    assert evaluations_in(str(tmp_path))(resolve(to, versions[0])) == {}


def test_versions_judged_on_different_patients_do_not_compare(to: str, versions: list[str]) -> None:
    gates = {versions[0]: judged("NIH"), versions[2]: judged("phantoms")}
    with pytest.raises(UserError, match=r"was evaluated on NIH, and .* on phantoms: evaluate both"):
        promote(to, versions[0], "latest", lambda version: gates[version.id])
    with pytest.raises(UserError, match="was evaluated on nothing"):
        promote(to, versions[0], "latest", lambda _: {})
    assert promote(to, versions[0], "latest", None).moved


def test_rollback_goes_to_the_version_before_and_done_twice_is_back(to: str, versions: list[str]) -> None:
    assert rollback(to, "latest").version == versions[1]
    assert list_aliases(to)["latest"].generation == 4
    assert rollback(to, "latest").version == versions[2]


def test_no_alias_is_made_or_moved_that_looks_like_a_version(to: str, versions: list[str]) -> None:
    for act in (lambda: promote(to, versions[0], "0" * 20, None), lambda: rollback(to, versions[0])):
        with pytest.raises(UserError, match="does not look like a version id"):
            act()
    assert list(list_aliases(to)) == ["latest"]


def test_there_is_no_way_back_from_the_first_version(tmp_path: Path, to: str) -> None:
    publish(build(tmp_path, "old"), to, "latest")
    with pytest.raises(UserError, match="nothing to roll back to"):
        rollback(to, "latest")
    with pytest.raises(UserError, match="there is no alias 'other'"):
        rollback(to, "other")


def test_whoever_moves_the_alias_during_a_promote_is_not_overwritten(to: str, versions: list[str]) -> None:
    def slow(version: Version) -> Evaluations:
        if version.id == versions[0]:
            rollback(to, "latest")
        return judged()

    with pytest.raises(UserError, match="somebody else moved alias 'latest' meanwhile"):
        promote(to, versions[0], "latest", slow)
    assert list_aliases(to)["latest"].version == versions[1]


@pytest.mark.parametrize("what", ["manifest", "object"])
@pytest.mark.parametrize("how", ["promote", "rollback"])
def test_a_version_that_goes_while_an_alias_moves_to_it_is_told_with_what_the_alias_serves(
    to: str, versions: list[str], monkeypatch: pytest.MonkeyPatch, how: str, what: str
) -> None:
    wanted = resolve(to, versions[1])
    gone = (
        f"{to}/versions/{wanted.id}.json" if what == "manifest" else wanted.object_uri(wanted.files["shards/0.faiss"])
    )

    def moved(*asked: Any) -> Any:
        storage.delete(gone)  # by a drop or a gc that looked at the aliases before
        return move_alias(*asked)

    monkeypatch.setattr(published, "move_alias", moved)
    with pytest.raises(UserError, match=rf"alias 'latest' serves version {wanted.id} now, but {gone}: gone") as told:
        promote(to, wanted.id, "latest", None) if how == "promote" else rollback(to, "latest")
    assert "\n" not in str(told.value)
    assert "publish that version again" in str(told.value)


def test_a_version_whose_facts_are_gone_is_not_judged_but_told_in_one_line(to: str, versions: list[str]) -> None:
    served = resolve(to, versions[2])
    storage.delete(served.object_uri(served.files["index.json"]))
    with pytest.raises(UserError, match="gone since it was uploaded; publish that version again"):
        promote(to, versions[0], "latest", lambda _: judged())


# ---- collect


def aged(to: str, days: float) -> None:
    for path in (Path(to) / "objects").iterdir():
        os.utime(path, (time.time(), time.time() - days * 86_400))


def test_what_a_version_names_is_never_garbage(to: str, versions: list[str]) -> None:
    aged(to, 365)
    assert garbage(to, 30) == []
    assert [verify(to, version) for version in versions] == [[], [], []]


def test_only_old_objects_that_no_version_names_are_deleted(to: str, versions: list[str]) -> None:
    aged(to, 31)
    orphan, young = "a" * 64, "b" * 64
    for name in (orphan, young):
        (Path(to) / "objects" / name).write_bytes(b"of a publish that never ended")
    os.utime(Path(to) / "objects" / orphan, (0, 0))
    assert [each.path for each in garbage(to, 30)] == [orphan]
    assert (Path(to) / "objects" / orphan).exists(), "to ask is not to delete"
    assert [each.path for each in collect(to, 30)] == [orphan]
    assert not (Path(to) / "objects" / orphan).exists()
    assert (Path(to) / "objects" / young).exists()
    assert [verify(to, version) for version in versions] == [[], [], []]


def test_what_a_killed_write_of_an_object_has_left_is_deleted_when_it_is_old(to: str, versions: list[str]) -> None:
    assert versions
    scratch = Path(to) / "objects" / f".{'a' * 64}.0123abcd"
    scratch.write_bytes(b"half")
    assert garbage(to, 30) == []
    os.utime(scratch, (0, 0))
    assert [each.path for each in collect(to, 30)] == [scratch.name]
    assert not scratch.exists()


def test_what_a_publish_names_after_it_was_found_to_be_garbage_is_kept(
    tmp_path: Path, to: str, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_version(to, versions[0])
    aged(to, 31)
    find = lifecycle.garbage

    def published_after(*asked: Any) -> list[Garbage]:
        found = find(*asked)
        assert publish(build(tmp_path, "old"), to, "latest").reused == 4
        return found

    monkeypatch.setattr(lifecycle, "garbage", published_after)
    assert collect(to, 30) == []
    assert verify(to, versions[0]) == []


def test_what_a_publish_names_after_a_purge_has_looked_is_kept(tmp_path: Path, to: str, versions: list[str]) -> None:
    drop_version(to, versions[0])
    aged(to, 31)
    doomed = {each.path for each in garbage(to, 30)}
    files = tuple(file for file in storage.list_files(storage.join(to, "objects")) if file.path in doomed)
    publish(build(tmp_path, "old"), to, "latest")
    assert purge(Holdings((), (), files, (), to)).files == ()
    assert verify(to, "latest") == []


def test_what_an_alias_serves_since_a_purge_has_looked_is_kept(to: str, versions: list[str]) -> None:
    files = tuple(storage.list_files(storage.join(to, "objects")))
    holdings = Holdings((versions[0],), (), files, (), to)
    promote(to, versions[0], "reviewed", None)
    with pytest.raises(UserError, match="alias 'reviewed' serves a version that holds removed patients"):
        purge(holdings)
    assert [verify(to, version) for version in versions] == [[], [], []]


@pytest.mark.parametrize("collected", ["before", "after"])
def test_a_publish_that_loses_an_object_to_gc_says_so_and_the_same_again_mends_it(
    tmp_path: Path, to: str, versions: list[str], monkeypatch: pytest.MonkeyPatch, collected: str
) -> None:
    drop_version(to, versions[0])
    aged(to, 31)
    doomed = garbage(to, 30)

    def collect_late() -> None:  # it looked for versions before the publish wrote its own
        for each in doomed:
            storage.delete(storage.join(to, "objects", each.path))

    def moved(*asked: Any) -> Any:
        if collected == "before":
            collect_late()
        done = move_alias(*asked)
        if collected == "after":
            collect_late()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(published, "move_alias", moved)
        with pytest.raises(UserError, match="publish that version again") as told:
            publish(build(tmp_path, "old"), to, "latest")
    assert "\n" not in str(told.value)
    assert publish(build(tmp_path, "old"), to, "latest").uploaded == len(doomed) == 3
    assert verify(to, "latest") == []


def test_a_dropped_version_gives_back_what_only_it_named(to: str, versions: list[str]) -> None:
    own = {entry.sha256 for entry in resolve(to, versions[0]).objects}
    kept = {entry.sha256 for version in versions[1:] for entry in resolve(to, version).objects}
    drop_version(to, versions[0])
    aged(to, 31)
    assert {each.path for each in collect(to, 30)} == own - kept
    assert sorted(list_versions(to)) == sorted(versions[1:])
    assert [verify(to, version) for version in versions[1:]] == [[], []]


def test_what_was_done_to_a_version_is_said_in_one_line(
    to: str, versions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, newest = versions
    for words in (["promote", newest], ["promote", old]):
        run(Settings(), options(f"{to}@first", words))
    promote(to, old, "latest", None)  # of the three only `new` is neither served nor rolled back to
    run(Settings(), options(to, ["drop", new]))
    assert capsys.readouterr().err.splitlines() == [
        f"{to}@first serves version {newest} now (generation 1)",
        f"{to}@first serves version {old} now (generation 2), not {newest}",
        f"{to}: version {new} is dropped; gc takes the objects that only it named",
    ]


def test_a_version_whose_manifest_is_damaged_is_listed_with_the_reason_and_can_be_dropped(
    to: str, versions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    promote(to, versions[2], "first", None)
    promote(to, versions[0], "latest", None)
    storage.write_bytes(f"{to}/versions/{versions[1]}.json", b"no JSON")
    run(Settings(), options(to, ["list"]))
    said = capsys.readouterr().out
    assert all(version in said for version in versions)
    assert "not JSON" in " ".join(said.split())
    run(Settings(), options(to, ["drop", versions[1]]))
    assert sorted(list_versions(to)) == sorted([versions[0], versions[2]])
    with pytest.raises(UserError, match=f"there is no version {versions[1]}; it has first, latest"):
        drop_version(to, versions[1])


def test_a_version_that_an_alias_serves_is_not_dropped(to: str, versions: list[str]) -> None:
    with pytest.raises(UserError, match="alias 'latest' serves it"):
        drop_version(to, versions[2])
    assert verify(to, versions[2]) == []


def test_a_version_that_an_alias_would_roll_back_to_is_dropped_and_that_is_said(
    to: str, versions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Settings(), options(to, ["drop", versions[1]]))
    assert f"{to}@latest was to roll back to it, and has nothing to roll back to" in capsys.readouterr().err
    with pytest.raises(UserError, match=versions[1]):
        rollback(to, "latest")
    assert verify(to, "latest") == []


def test_nothing_published_is_no_garbage(tmp_path: Path) -> None:
    assert garbage(str(tmp_path / "nothing"), 0) == []


# ---- the job


def test_the_gate_reads_finished_evaluations_of_the_versions_own_model(
    tmp_path: Path, to: str, versions: list[str]
) -> None:
    evaluation(tmp_path, "first", "old", 0.3)
    evaluation(tmp_path, "second", "new", 0.1)
    evaluation(tmp_path, "third", "old", 0.5, "10 of the 90 images of the test split")
    evaluation(tmp_path, "unfinished", "newest", 0.9)
    gate = evaluations_in(str(tmp_path))
    place = "the test patients of corpus c0ffee"
    of_few = f"{place}, 10 of the 90 images of the test split"  # other images do not compare
    assert {on: found["mAP"].value for on, found in gate(resolve(to, versions[0])).items()} == {place: 0.3, of_few: 0.5}
    assert gate(resolve(to, versions[1]))[place]["precision@8"].low == pytest.approx(0.09)
    assert gate(resolve(to, versions[2])) == {}
    assert evaluations_in(str(tmp_path / "elsewhere"))(resolve(to, versions[0])) == {}


def test_a_damaged_object_is_named_by_verify(to: str, versions: list[str]) -> None:
    show_problems(to, "latest")
    entry = resolve(to, versions[2]).files["shards/0.faiss"]
    storage.write_bytes(resolve(to, versions[2]).object_uri(entry), b"damaged")
    with pytest.raises(UserError, match=entry.sha256):
        show_problems(to, "latest")


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "cannot do ''"), (["prune"], "cannot do 'prune'"), (["promote"], "takes one version"), (["gc", "x"], "no")],
)
def test_words_that_mean_nothing_are_refused(words: list[str], message: str, to: str) -> None:
    with pytest.raises(UserError, match=message):
        run(Settings(), options(to, words))


def options(index: str, words: list[str]) -> Namespace:
    return Namespace(index=index, rest=words, without_gate=True, delete=False, purge=False, grace_days=30.0)
