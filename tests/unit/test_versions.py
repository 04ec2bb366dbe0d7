"""Promises of published versions: immutable, verified before use, and one winner for each move of an alias."""

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, CorruptArtifact, Draft
from cxr_retrieval.errors import UserError
from cxr_retrieval.index import cache as cached
from cxr_retrieval.index import versions
from cxr_retrieval.index.aliases import ALIAS_LIMIT, list_aliases
from cxr_retrieval.index.files import SHARD_KIND, SHARD_PART_FILES, shard_files
from cxr_retrieval.index.versions import open_version, publish, resolve, split_reference, verify

FILES = {
    "index.json": b'{"shards": 1}',
    "model/model.json": b"{}",
    "model/weights.safetensors": b"weights" * 1000,
    "shards/00000.faiss": b"vectors" * 3000,
    "shards/00000.parquet": b"rows" * 500,
    "shards/00000.thumbnails.parquet": b"thumbnails" * 500,
}


def build(folder: Path, shard: bytes = b"", **facts: Any) -> Artifact:
    """A built index; another `shard` makes another version that shares the rest."""
    draft = Draft(str(folder), "index", {"shard": shard.hex()}, ()).begin()
    files: Mapping[str, bytes] = FILES if not shard else {**FILES, "shards/00000.faiss": shard}
    return draft.finish([draft.write(path, data) for path, data in files.items()], {"rows": 7}, **facts)


@pytest.fixture
def to(tmp_path: Path) -> str:
    return str(tmp_path / "published")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cached.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every local file that was hashed since the fixture was asked for."""
    calls: list[Path] = []
    plain = storage.sha256

    def counting(path: Path) -> str:
        calls.append(path)
        return plain(path)

    monkeypatch.setattr(storage, "sha256", counting)
    return calls


def contents(reference: str) -> dict[str, bytes]:
    opened = open_version(reference)
    return {name: opened.path(name).read_bytes() for name in opened.paths}


def object_path(to: str, data: bytes) -> Path:
    return Path(to) / "objects" / hashlib.sha256(data).hexdigest()


# ---- publishing


def test_a_published_build_is_read_back_whole(tmp_path: Path, to: str) -> None:
    done = publish(build(tmp_path / "a", proof={"recall": 0.97}), to, "latest")
    assert (done.alias, done.generation, done.uploaded, done.reused, done.moved) == ("latest", 1, len(FILES), 0, True)
    assert done.bytes == sum(map(len, FILES.values()))
    assert contents(f"{to}@latest") == contents(to) == contents(f"{to}@{done.version}") == FILES
    opened = open_version(to)
    assert opened.facts["proof"] == {"recall": 0.97}
    assert opened.facts["counts"] == {"rows": 7}
    assert "files" not in opened.facts
    with pytest.raises(UserError, match=r"has no file 'shards/00001\.faiss'"):
        opened.path("shards/00001.faiss")


def test_publishing_again_gives_the_same_version_and_does_nothing(tmp_path: Path, to: str) -> None:
    made = build(tmp_path / "a")
    first, second = publish(made, to, "latest"), publish(made, to, "latest")
    assert second.version == first.version
    assert (second.uploaded, second.bytes, second.reused, second.moved) == (0, 0, len(FILES), False)
    assert second.generation == first.generation == 1
    third = publish(made, to, "stable")  # another alias moves, with nothing to upload
    assert (third.version, third.uploaded, third.moved) == (first.version, 0, True)


def test_a_new_version_uploads_only_what_changed(tmp_path: Path, to: str) -> None:
    old = publish(build(tmp_path / "a"), to, "latest")
    new = publish(build(tmp_path / "b", b"new vectors"), to, "latest")
    assert (new.uploaded, new.reused, new.bytes, new.generation) == (1, len(FILES) - 1, 11, 2)
    alias = list_aliases(to)["latest"]
    assert (alias.version, alias.predecessor, alias.generation) == (new.version, old.version, 2)
    assert versions.list_versions(to) == sorted([old.version, new.version])


def test_equal_files_are_one_object(tmp_path: Path, to: str) -> None:
    draft = Draft(str(tmp_path / "a"), "index", {}, ()).begin()
    done = publish(draft.finish([draft.write(name, b"same") for name in ("one", "two")], {}), to, "latest")
    assert (done.uploaded, done.bytes) == (1, 4)
    assert contents(to) == {"one": b"same", "two": b"same"}


def test_the_meter_counts_every_byte_once(tmp_path: Path, to: str) -> None:
    class Counting:
        done = 0

        def advance(self, count: int, *_: str) -> None:
            self.done += count

        found = advance

    publish(build(tmp_path / "a"), to, "latest")
    for shard in (b"", b"new vectors"):
        made, meter = build(tmp_path / f"m{shard.hex()}", shard), Counting()
        publish(made, to, "latest", meter)  # type: ignore[arg-type]
        assert meter.done == sum(entry.size for entry in made.files)
        meter = Counting()
        open_version(to, meter=meter)  # type: ignore[arg-type]
        assert meter.done == sum(entry.size for entry in made.files)


def test_a_damaged_or_missing_build_file_is_refused_and_the_alias_stays(tmp_path: Path, to: str) -> None:
    old = publish(build(tmp_path / "a"), to, "latest")
    made = build(tmp_path / "b", b"new vectors")
    shard = tmp_path / "b" / "shards/00000.faiss"
    shard.write_bytes(b"bad vectors")
    with pytest.raises(CorruptArtifact, match=r"00000\.faiss: the bytes are not those of the build's manifest"):
        publish(made, to, "latest")
    shard.unlink()
    with pytest.raises(CorruptArtifact, match=r"00000\.faiss: the file is missing"):
        publish(made, to, "latest")
    assert list_aliases(to)["latest"].version == old.version
    assert versions.list_versions(to) == [old.version]
    assert not object_path(to, b"bad vectors").exists()


def test_an_object_of_the_wrong_size_keeps_the_alias_where_it_is(tmp_path: Path, to: str) -> None:
    path = object_path(to, b"new vectors")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"new")
    with pytest.raises(CorruptArtifact, match="3 bytes instead of 11; move it away and publish again"):
        publish(build(tmp_path / "b", b"new vectors"), to, "latest")
    assert list_aliases(to) == {}


def test_another_manifest_under_the_same_id_is_an_error(tmp_path: Path, to: str) -> None:
    made = build(tmp_path / "a")
    done = publish(made, to, "latest")
    manifest = Path(to) / "versions" / f"{done.version}.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(CorruptArtifact, match="another manifest stands there"):
        publish(made, to, "other")
    assert "other" not in list_aliases(to)


@pytest.mark.parametrize("alias", ["", ".", "..", "../x", "a/b", "a b", "-x", "x" * 65, "x\n", "0" * 20])
def test_an_alias_that_is_no_name_is_refused_before_anything_is_written(alias: str, tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match=r"no alias may be called"):
        publish(build(tmp_path / "a"), to, alias)
    assert not Path(to).exists()


def test_the_shards_of_a_build_are_files_of_its_version_by_their_number(tmp_path: Path, to: str) -> None:
    folder = tmp_path / "builds"
    shards = []
    for number in range(2):
        draft = Draft.under(str(folder / "parts"), SHARD_KIND, {"number": number}, ()).begin()
        entries = [draft.write(name, f"{kind} {number}".encode()) for kind, name in SHARD_PART_FILES.items()]
        shards.append(draft.finish(entries, {}))
    draft = Draft.under(str(folder), "index", {}, ()).begin()
    publish(draft.finish([draft.write("index.json", b"{}")], {}, parts=shards), to, "latest")
    version = open_version(to)
    assert set(version.paths) == {"index.json", *shard_files(0).values(), *shard_files(1).values()}
    for number in range(2):
        for kind, name in shard_files(number).items():
            assert version.path(name).read_text() == f"{kind} {number}"


# ---- races for the alias


def test_two_racing_publishers_have_one_winner_and_two_versions(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(build(tmp_path / "old"), to, "latest")
    builds = [build(tmp_path / name, name.encode()) for name in ("first", "second")]
    barrier, plain = threading.Barrier(2), storage.replace

    def together(*arguments: Any) -> bool:
        barrier.wait()
        return plain(*arguments)

    monkeypatch.setattr(storage, "replace", together)

    def attempt(made: Artifact) -> versions.Published | UserError:
        try:
            return publish(made, to, "latest")
        except UserError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(attempt, builds))
    winner = next(outcome for outcome in outcomes if isinstance(outcome, versions.Published))
    loser = next(outcome for outcome in outcomes if isinstance(outcome, UserError))
    alias = list_aliases(to)["latest"]
    assert (alias.version, alias.generation) == (winner.version, 2)
    assert f"somebody else moved alias 'latest' meanwhile: it serves version {winner.version}" in str(loser)
    assert "do the same again to put it in front, or leave it" in str(loser)
    assert "\n" not in str(loser)
    assert len(versions.list_versions(to)) == 3
    for name in ("first", "second"):
        lost = outcomes[("first", "second").index(name)]
        version = lost.version if isinstance(lost, versions.Published) else str(lost).split("; version ")[1].split()[0]
        assert contents(f"{to}@{version}")["shards/00000.faiss"] == name.encode()
    monkeypatch.setattr(storage, "replace", plain)
    again = publish(builds[outcomes.index(loser)], to, "latest")  # as the message says
    assert (again.generation, again.uploaded) == (3, 0)


def test_whoever_moves_the_alias_during_the_upload_is_not_overwritten(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(build(tmp_path / "old"), to, "latest")
    plain = storage.create
    others: list[versions.Published] = []

    def slow(*arguments: Any) -> bool:
        monkeypatch.setattr(storage, "create", plain)
        others.append(publish(build(tmp_path / "other", b"other"), to, "latest"))
        return plain(*arguments)

    monkeypatch.setattr(storage, "create", slow)
    with pytest.raises(UserError, match="somebody else moved alias 'latest'"):
        publish(build(tmp_path / "mine", b"mine"), to, "latest")
    assert list_aliases(to)["latest"].version == others[0].version


def racing_replace(monkeypatch: pytest.MonkeyPatch, answer: Callable[[bool], bool]) -> None:
    plain = storage.replace
    monkeypatch.setattr(storage, "replace", lambda *arguments: answer(plain(*arguments)))


def test_a_refusal_of_a_repeated_request_was_our_own_move(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    racing_replace(monkeypatch, lambda _: False)  # the first request was done, the second one refused
    done = publish(build(tmp_path / "a"), to, "latest")
    assert (done.generation, done.moved) == (1, True)
    assert list_aliases(to)["latest"].version == done.version


def test_a_lost_answer_is_settled_by_reading_back(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: bool) -> bool:
        raise UserError("the connection broke")

    racing_replace(monkeypatch, lost)
    done = publish(build(tmp_path / "a"), to, "latest")
    assert (done.generation, done.moved) == (1, True)


def test_a_move_that_was_not_done_is_an_error(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise UserError("the connection broke")

    monkeypatch.setattr(storage, "replace", broken)
    with pytest.raises(UserError, match="the connection broke"):
        publish(build(tmp_path / "a"), to, "latest")
    assert list_aliases(to) == {}


def test_two_publishers_of_the_same_build_both_succeed(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = build(tmp_path / "a"), storage.replace

    def after_another(*arguments: Any) -> bool:
        monkeypatch.setattr(storage, "replace", plain)
        publish(made, to, "latest")
        return plain(*arguments)

    monkeypatch.setattr(storage, "replace", after_another)
    done = publish(made, to, "latest")
    assert (done.generation, done.moved) == (1, False)


# ---- reading


def test_readers_of_an_old_alias_or_version_keep_working(tmp_path: Path, to: str) -> None:
    old = publish(build(tmp_path / "a"), to, "stable")
    opened = open_version(f"{to}@stable")
    publish(build(tmp_path / "b", b"new vectors"), to, "latest")
    assert opened.path("shards/00000.faiss").read_bytes() == FILES["shards/00000.faiss"]
    assert contents(f"{to}@stable") == contents(f"{to}@{old.version}") == FILES
    assert contents(to)["shards/00000.faiss"] == b"new vectors"


def test_a_local_version_is_used_in_place(tmp_path: Path, to: str, cache: Path) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    opened = open_version(to)
    assert all(str(path).startswith(f"{to}/objects/") for path in opened.paths.values())
    assert not (cache / "objects").exists()


def test_the_second_open_hashes_nothing(tmp_path: Path, to: str, hashed: list[Path]) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    hashed.clear()
    open_version(to)
    assert len(hashed) == len(FILES)
    hashed.clear()
    open_version(to)
    assert hashed == []


def test_two_stores_that_share_an_object_keep_their_receipts(tmp_path: Path, to: str, hashed: list[Path]) -> None:
    made = build(tmp_path / "a")
    for store in (to, to + "2"):
        publish(made, store, "latest")
        open_version(store)
    hashed.clear()
    open_version(to)
    open_version(to + "2")
    assert hashed == []


def test_a_cache_that_cannot_be_written_costs_only_hashes(tmp_path: Path, to: str, hashed: list[Path]) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    (tmp_path / "file").touch()
    hashed.clear()
    for _ in range(2):
        opened = open_version(to, cache=str(tmp_path / "file" / "cache"))
        assert opened.path("index.json").read_bytes() == FILES["index.json"]
    assert len(hashed) == 2 * len(FILES)


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_flipped_byte_is_refused_before_use(opened_before: bool, keep_times: bool, tmp_path: Path, to: str) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    if opened_before:
        open_version(to)
    path = object_path(to, FILES["shards/00000.faiss"])
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    if keep_times:  # as a copying tool would that keeps times
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorruptArtifact, match=f"{path.name}: the bytes are not those .* publish that version again"):
        open_version(to)
    found = verify(to, "latest")
    assert len(found) == 1
    assert path.name in found[0]


@pytest.mark.parametrize("receipt", [b"", b"not json", b"[]", b"{}", b"\xff"])
def test_a_damaged_receipt_is_no_receipt(
    receipt: bytes, tmp_path: Path, to: str, cache: Path, hashed: list[Path]
) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    open_version(to)
    for path in (cache / "receipts").iterdir():
        path.write_bytes(receipt)
    hashed.clear()
    open_version(to)
    assert len(hashed) == len(FILES)


def test_verify_names_every_missing_and_damaged_object(tmp_path: Path, to: str) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    assert verify(to, "latest") == []
    missing, short = object_path(to, FILES["index.json"]), object_path(to, FILES["model/model.json"])
    missing.unlink()
    short.write_bytes(b"{")
    found = verify(to, "latest")
    assert len(found) == 2
    assert any(missing.name in line and "missing" in line for line in found)
    assert any(short.name in line and "1 bytes instead of 2" in line for line in found)
    with pytest.raises(CorruptArtifact):
        open_version(to)
    short.unlink()
    publish(build(tmp_path / "again"), to, "latest")  # what the message says
    assert verify(to, "latest") == []


def test_an_unknown_name_names_those_that_exist(tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match="there is no alias 'latest'; nothing is published there: publish first"):
        resolve(to, "latest")
    for alias in ("stable", "latest"):
        publish(build(tmp_path / "a"), to, alias)
    with pytest.raises(UserError, match="there is no alias 'newest'; it has latest, stable"):
        resolve(to, "newest")
    with pytest.raises(UserError, match=f"there is no version {'0' * 20}; it has latest, stable"):
        resolve(to, "0" * 20)
    with pytest.raises(UserError, match="is not a name of an alias or version; it has latest, stable"):
        resolve(to, "../versions/x")


def test_an_alias_whose_manifest_is_missing_says_so(tmp_path: Path, to: str) -> None:
    done = publish(build(tmp_path / "a"), to, "latest")
    (Path(to) / "versions" / f"{done.version}.json").unlink()
    with pytest.raises(
        CorruptArtifact, match="manifest that alias 'latest' points to is missing; publish that version"
    ):
        resolve(to, "latest")


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("s3://bucket/index", ("s3://bucket/index", "latest")),
        ("s3://bucket/index@stable", ("s3://bucket/index", "stable")),
        ("s3://user@host/index", ("s3://user@host/index", "latest")),
        ("/home/me@home/index@v1", ("/home/me@home/index", "v1")),
        ("/home/me@home@v1", ("/home/me@home", "v1")),
        ("index@v1", ("index", "v1")),
        ("./index", ("./index", "latest")),
        ("index@0123456789abcdef0123", ("index", "0123456789abcdef0123")),
    ],
)
def test_references_part_at_the_last_at_sign_of_the_last_name(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts


@pytest.mark.parametrize("reference", ["index@", "@latest", "/@latest", "index@a b", "index@..", "index@x\n"])
def test_references_that_cannot_be_read_are_refused(reference: str) -> None:
    with pytest.raises(UserError, match="write URI@alias or URI@version"):
        split_reference(reference)


# ---- hostile manifests


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        manifest = json.loads(data)
        change(manifest)
        return json.dumps(manifest).encode()

    return apply


def with_path(path: str) -> Callable[[bytes], bytes]:
    return damaged(lambda manifest: manifest["files"][0].update(path=path))


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "not text": lambda _: b"\xff\xfe\x00",
    "a list": lambda _: b"[]",
    "deep": lambda _: b"[" * 100_000,
    "deep facts": lambda _: b'{"schema_version":1,"files":[],"facts":{"x":' + b"[" * 900 + b"]" * 900 + b"}}",
    "parent folder": with_path("../../etc/passwd"),
    "inner parent": with_path("shards/../../x"),
    "absolute": with_path("/etc/passwd"),
    "empty path": with_path(""),
    "dot file": with_path("shards/.hidden"),
    "backslash": with_path("shards\\x"),
    "newline": with_path("index.json\n"),
    "nul": with_path("index\0json"),
    "twice": damaged(lambda manifest: manifest["files"].append(manifest["files"][0])),
    "hash is a path": damaged(lambda manifest: manifest["files"][0].update(sha256="../" * 21 + "x")),
    "hash in capitals": damaged(lambda manifest: manifest["files"][0].update(sha256="A" * 64)),
    "other object": damaged(lambda manifest: manifest["files"][0].update(sha256="a" * 64)),
    "size as text": damaged(lambda manifest: manifest["files"][0].update(size="12")),
    "negative size": damaged(lambda manifest: manifest["files"][0].update(size=-1)),
    "extra key": damaged(lambda manifest: manifest.update(run="rm")),
    "other facts": damaged(lambda manifest: manifest["facts"].update(decode="other")),
    "later schema": damaged(lambda manifest: manifest.update(schema_version=2)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(name: str, tmp_path: Path, to: str) -> None:
    done = publish(build(tmp_path / "a"), to, "latest")
    path = Path(to) / "versions" / f"{done.version}.json"
    path.write_bytes(HOSTILE[name](path.read_bytes()))
    with pytest.raises(CorruptArtifact, match=f"{done.version}.json: ") as caught:
        open_version(to)
    assert "\n" not in str(caught.value)


def test_manifests_and_aliases_that_are_too_large_are_not_parsed(tmp_path: Path, to: str) -> None:
    done = publish(build(tmp_path / "a"), to, "latest")
    with (Path(to) / "versions" / f"{done.version}.json").open("r+b") as file:
        file.truncate(versions.MANIFEST_LIMIT + 1)  # sparse: it costs no disk
    with pytest.raises(CorruptArtifact, match="larger than 67,108,864 bytes"):
        resolve(to, "latest")
    with (Path(to) / "aliases" / "latest.json").open("r+b") as file:
        file.truncate(ALIAS_LIMIT + 1)
    with pytest.raises(CorruptArtifact, match="too large for an alias"):
        resolve(to, "latest")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version": "../../x"}', b"null"])
def test_a_damaged_alias_is_refused_and_not_overwritten(data: bytes, tmp_path: Path, to: str) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    path = Path(to) / "aliases" / "latest.json"
    path.write_bytes(data)
    for use in (lambda: resolve(to, "latest"), lambda: publish(build(tmp_path / "b", b"b"), to, "latest")):
        with pytest.raises(CorruptArtifact, match=r"latest\.json: "):
            use()
    assert path.read_bytes() == data


# ---- stores that are not on this machine: S3's way, taken here by a local store that counts as remote


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Local objects are fetched as those of S3 are; the URIs that were fetched."""
    fetched: list[str] = []
    plain = cached.fetch

    def counting(uri: str, *arguments: Any) -> None:
        fetched.append(uri)
        plain(uri, *arguments)

    monkeypatch.setattr(cached, "_in_place", lambda _: False)
    monkeypatch.setattr(cached, "fetch", counting)
    return fetched


def test_a_remote_version_is_fetched_once(
    tmp_path: Path, to: str, cache: Path, remote: list[str], hashed: list[Path]
) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    hashed.clear()
    assert contents(to) == FILES
    assert len(remote) == len(FILES)
    paths = open_version(to).paths.values()
    assert len(remote) == len(FILES)
    assert hashed == []  # hashed while it was fetched, and a receipt since
    assert {path.parent for path in paths} == {cache / "objects"}
    publish(build(tmp_path / "b", b"new vectors"), to, "latest")
    assert contents(to)["shards/00000.faiss"] == b"new vectors"
    assert len(remote) == len(FILES) + 1


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path: Path, to: str, cache: Path, remote: list[str]) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    open_version(to)
    shard = FILES["shards/00000.faiss"]
    (cache / "objects" / hashlib.sha256(shard).hexdigest()).write_bytes(shard[::-1])
    assert contents(to) == FILES
    assert len(remote) == len(FILES) + 1


@pytest.mark.parametrize("damage", [lambda data: data[::-1], lambda data: data[:-1], lambda data: data * 2, None])
@pytest.mark.usefixtures("remote")
def test_a_damaged_remote_object_never_enters_the_cache(
    damage: Callable[[bytes], bytes] | None, tmp_path: Path, to: str, cache: Path
) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    path = object_path(to, FILES["shards/00000.faiss"])
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(CorruptArtifact, match=f"{path.name}: .*publish that version again"):
        open_version(to)
    assert not (cache / "objects" / path.name).exists()


def test_many_openers_fetch_an_object_once(tmp_path: Path, to: str, remote: list[str]) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_version, [to] * 4))
    assert len(remote) == len(FILES)
    assert all(one.path("index.json").read_bytes() == FILES["index.json"] for one in opened)


@pytest.mark.usefixtures("remote")
def test_a_cache_that_cannot_hold_remote_objects_is_one_clear_line(tmp_path: Path, to: str) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the cache cannot be written .* set CXR_CACHE to a folder"):
        open_version(to, cache=str(tmp_path / "file" / "cache"))


def test_a_cache_on_s3_is_refused(tmp_path: Path, to: str) -> None:
    publish(build(tmp_path / "a"), to, "latest")
    with pytest.raises(UserError, match="s3://bucket/cache: the cache must be a local folder"):
        open_version(to, cache="s3://bucket/cache")


def test_a_full_disk_during_publish_leaves_the_old_version_serving(tmp_path: Path) -> None:
    disk = tmp_path / "tiny"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command: a full disk cannot be made here")
    if done.returncode:
        pytest.skip(f"a tiny disk cannot be mounted here: {done.stderr.strip()}")
    try:
        to = str(disk / "published")
        publish(build(tmp_path / "a"), to, "latest")
        large = build(tmp_path / "b", os.urandom(200_000))
        with pytest.raises(UserError, match="no space left: free some and run the same command again"):
            publish(large, to, "latest")
        assert contents(to) == FILES
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert publish(large, to, "latest").generation == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
