"""Searches of 100 clients at once over HTTP against the same searches one after the other in one process.

  python -m benchmarks.serve

The peer opens the same index, and has neither HTTP nor clients. Every client is a thread that sends its next image when
it has the answer to the last.
"""

import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from benchmarks.embed import fresh_model
from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings, EmbeddingSettings, IndexSettings
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.index import versions
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.source import Source
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.runtime import start_ray

IMAGES, SIDE, CLIENTS, SEARCHES, ROUNDS = 2048, 128, 100, 10, 3
BOUNDARY = "a-boundary-that-no-image-holds"


def published_index(folder: str) -> tuple[str, list[bytes]]:
    """The reference of an index of phantoms by a fresh model, and a film for each client."""
    archive = phantom_archive(IMAGES, SIDE)
    corpus = Corpus(prepare(CorpusSettings(archive=archive, size=SIDE), folder)[0])
    model = fresh_model(folder, corpus)
    embedded, _ = embed(EmbeddingSettings(), folder, model, corpus)
    build, _ = build_index(IndexSettings(), folder, Source(corpus, embedded, model, "combined"), Pseudonyms(None))
    to = storage.join(folder, "published")
    versions.publish(build, to, "latest")
    films = sorted(Path(archive, "images").iterdir())[:CLIENTS]
    return to, [film.read_bytes() for film in films]


def in_process(reference: str, films: Sequence[bytes]) -> float:
    """Searches per second of one loop."""
    retriever = Retriever.open(reference)
    retriever.search(retriever.query(films[0]))
    began = time.perf_counter()
    for film in films:
        retriever.search(retriever.query(film))
    return len(films) / (time.perf_counter() - began)


def over_http(address: str, films: Sequence[bytes]) -> tuple[float, list[float]]:
    """Searches per second of a client for each film, all at once, and the seconds of every search."""
    host = urlsplit(address).netloc
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="film.png"\r\n\r\n'
    tail = f"\r\n--{BOUNDARY}--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    seconds: list[float] = []

    def client(film: bytes) -> None:
        connection = http.client.HTTPConnection(host, timeout=120)
        for _ in range(SEARCHES):
            began = time.perf_counter()
            connection.request("POST", "/v1/search", head.encode() + film + tail.encode(), headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"a search was answered {answer.status}: {text.decode()}")
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    with ThreadPoolExecutor(len(films)) as clients:
        list(clients.map(client, films))
    return len(seconds) / (time.perf_counter() - began), seconds


def main() -> None:
    start_ray()
    peers, ours, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        reference, films = published_index(folder)
        command = [sys.executable, "-m", "jobs.serve", "--index", reference, "serve.port=0"]
        log = Path(folder, "serve.log")
        with log.open("w") as written, subprocess.Popen(command, stderr=written) as server:
            try:
                while not (told := [line for line in log.read_text().splitlines() if line.startswith("search page: ")]):
                    if server.poll() is not None:
                        raise RuntimeError(f"the server ended: {log.read_text()}")
                    time.sleep(0.1)
                address = told[0].split()[2]
                over_http(address, films[:1])
                for _ in range(ROUNDS):
                    peers.append(in_process(reference, films))
                    rate, found = over_http(address, films)
                    ours.append(rate)
                    seconds += found
            finally:
                server.terminate()
    median, late = np.quantile(seconds, [0.5, 0.95])
    publish(
        "serve",
        [
            Claim.of(
                f"searches/s of {CLIENTS} clients at once over HTTP, {SIDE} x {SIDE}",
                "the same searches one after the other in one process, without HTTP",
                0.8,
                [rate / peer for rate, peer in zip(ours, peers, strict=True)],
                ours=float(np.median(ours)),
                in_process=float(np.median(peers)),
                milliseconds_p50=1000 * float(median),
                milliseconds_p95=1000 * float(late),
            )
        ],
    )


if __name__ == "__main__":
    main()
