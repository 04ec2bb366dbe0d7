"""The files of an index: what they are called in a version, and where a build keeps them.

A build has files of its own (what it is, its model, its quantizer), and shards that are artifacts of their own, which
other builds may share. A version names them all in one list, shards by their number.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact, FileEntry

# What a shard is made of, by its file in the shard's own folder.
SHARD_PART_FILES = {
    "faiss": "index.faiss",
    "rows": "rows.npy",
    "sidecar": "sidecar.parquet",
    "thumbnails": "thumbnails.parquet",
}


SHARD_KIND = "index-shard"
SHARDS, MODEL = "shards/", "model/"  # what the names of shards' and of the model's files in an index begin with


@dataclass(frozen=True)
class Located:
    """A file of an index: where it is, and what it must be, under its name in the index."""

    uri: str
    entry: FileEntry


def shard_files(number: int) -> dict[str, str]:
    """Names of one shard's files in the index."""
    return {
        kind: f"{SHARDS}{number:05d}.{ending}"
        for kind, ending in {
            "faiss": "faiss",
            "rows": "rows.npy",
            "sidecar": "parquet",
            "thumbnails": "thumbnails.parquet",
        }.items()
    }


def sidecars(names: Container[str]) -> Iterator[str]:
    """Those of an index's file names that are sidecars, in the order of their shards."""
    return takewhile(names.__contains__, (shard_files(number)["sidecar"] for number in count()))


def located(uri: str, files: Sequence[FileEntry], shards: Sequence[Artifact]) -> dict[str, Located]:
    """All files of an index by their names: its own, at `uri`, and those of its shards in their order."""
    found = {entry.path: Located(storage.join(uri, entry.path), entry) for entry in files}
    for number, shard in enumerate(shards):
        entries = {entry.path: entry for entry in shard.files}
        for kind, name in shard_files(number).items():
            entry = entries[SHARD_PART_FILES[kind]]
            found[name] = Located(storage.join(shard.uri, entry.path), FileEntry(name, entry.size, entry.sha256))
    return found


def files_of(build: Artifact) -> dict[str, Located]:
    """All files of a finished build by their names."""
    return located(build.uri, build.files, [artifacts.load(uri, SHARD_KIND) for uri in build.part_uris])
