"""Opening a published version for the first time against reading and hashing its bytes once.

  python -m benchmarks.open_version

The version lies in a local folder, its files hold random bytes: an open verifies all of them and reads none. The peer
hashes the same files, as many at once as there are cores. Each round opens with an empty cache, and then once more with
the receipts of the first open. All files are in memory before the first round, so the disk has no part in it.
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.claim import Claim, publish
from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.index import versions
from cxr_retrieval.index.build import KIND
from cxr_retrieval.index.files import SHARD_KIND, SHARD_PART_FILES
from cxr_retrieval.index.shards import INDEX_FILE

SHARDS, ROUNDS = 8, 7
# Bytes of a shard's files, in about the proportions of an index with 128 dimensions: 16 KB of thumbnail a row.
SIZES = {"faiss": 640_000, "rows": 640_000, "sidecar": 300_000, "thumbnails": 38_000_000}


def built(folder: str) -> Artifact:
    """A finished build of shards that hold random bytes."""
    random = np.random.default_rng(0)
    builds = storage.join(folder, "builds")
    shards = []
    for number in range(SHARDS):
        draft = Draft.under(storage.join(builds, "parts"), SHARD_KIND, {}, (str(number),)).begin()
        files = [draft.write(SHARD_PART_FILES[kind], random.bytes(size)) for kind, size in SIZES.items()]
        shards.append(draft.finish(files, {}))
    draft = Draft.under(builds, KIND, {}, ()).begin()
    return draft.finish([draft.write(INDEX_FILE, b"{}")], {}, (), shards)


def opened(reference: str, cache: str) -> float:
    """Seconds of one open."""
    began = time.perf_counter()
    versions.open_version(reference, cache)
    return time.perf_counter() - began


def hashed(paths: list[Path]) -> float:
    """Seconds that reading and hashing the files takes on all cores."""
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(storage.sha256, paths))
    return time.perf_counter() - began


def main() -> None:
    first, again, peers = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        reference = storage.join(folder, "published")
        versions.publish(built(folder), reference, "latest")
        version = versions.resolve(reference, "latest")
        paths = [Path(version.object_uri(entry)) for entry in version.objects]
        hashed(paths)
        for turn in range(ROUNDS):
            peers.append(hashed(paths))
            cache = storage.join(folder, f"cache-{turn}")
            first.append(opened(reference, cache))
            again.append(opened(reference, cache))
    publish(
        "open_version",
        [
            Claim.of(
                f"opening a version of {version.bytes / 1e6:,.0f} MB for the first time",
                "reading and SHA-256 of its bytes, same cores",
                0.83,
                [peer / ours for peer, ours in zip(peers, first, strict=True)],
                milliseconds_first=1000 * float(np.median(first)),
                milliseconds_hashing=1000 * float(np.median(peers)),
                milliseconds_again=1000 * float(np.median(again)),
            )
        ],
    )


if __name__ == "__main__":
    main()
