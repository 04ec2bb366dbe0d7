"""The whole path: prepare, train, evaluate, index, publish, search.

  python -m jobs.pipeline --config jobs/configs/demo.yaml
  python -m jobs.pipeline --config jobs/configs/nih_small.yaml corpus.archive=DIR
  ray job submit --working-dir . -- python -m jobs.pipeline --config FILE workspace=s3://bucket/prefix

Each step is the job of that name and is skipped where it is finished. Ends with a gallery of held-out patients' images
and `summary.json` in the workspace.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cxr_retrieval import artifacts, command, console, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.assessment import EVALUATION_FILE, evaluate
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import plan_corpus, prepare
from cxr_retrieval.corpus.reading import Corpus, labels_of
from cxr_retrieval.corpus.splits import TRAIN
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.index.build import build_index
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.source import Source
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.run import model_draft, model_of, train
from jobs.evaluate import show_evaluation, warn_of_overlap
from jobs.index import index_report
from jobs.prepare import corpus_report, warn_of_corpus
from jobs.publish import destination, published_build
from jobs.search import find, gallery, read_query
from jobs.train import training_report

SUMMARY_FILE = "summary.json"
QUERY_IMAGES = 10_000  # among which the queries of the gallery are chosen


@dataclass
class Steps:
    """What each step did, for the table and the summary."""

    rows: list[list[Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    sent: int = field(default_factory=storage.retries)

    def done(self, name: str, rows_in: int, rows_out: int, where: str, worked: bool = True) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self.began, 1)
        again, self.sent = storage.retries() - self.sent, storage.retries()
        self.retries[name] = again
        state = where if worked else f"{where} (finished before)"
        self.rows.append([name, rows_in, rows_out, self.seconds[name], again, state])
        self.began = now


def run(settings: Settings, _: argparse.Namespace) -> None:
    pseudonyms = Pseudonyms.of(settings.privacy)
    start_ray(settings)
    steps = Steps()
    given = None
    if settings.model is not None:
        settings, given = model_of(settings)
    prepared, worked = prepare(settings.corpus, settings.workspace, settings.privacy)
    corpus = Corpus(prepared)
    if given:
        warn_of_overlap(settings, given, corpus)
    warn_of_corpus(prepared)
    corpus_report(settings, prepared)
    steps.done("prepare", prepared.counts["archive"], corpus.rows, prepared.uri, worked)

    model, worked = (given, False) if given else train(settings, corpus)
    if not given:
        training_report(settings, model, corpus)
    steps.done("train", model.counts["train_images"], model.counts["train_images"], model.uri, worked)

    embedded, worked = embed(settings.embedding, settings.workspace, model.uri, corpus)
    steps.done("embed", corpus.rows, embedded.counts["embedded"], embedded.uri, worked)

    evaluation, evaluated = evaluate(
        settings.evaluation, settings.workspace, model.uri, corpus, embedded, names=not settings.privacy.pseudonymise
    )
    steps.done("evaluate", evaluation.counts["images"], evaluation.counts["queries"], evaluation.uri, evaluated)

    source = Source(corpus, embedded, model.uri, settings.index.embedding or model.manifest["chosen"])
    build, worked = build_index(settings.index, settings.workspace, source, pseudonyms)
    index_report(settings, build)
    steps.done("index", build.counts["embedded"], build.counts["indexed"], build.uri, worked)

    to = destination(settings)
    published = published_build(settings, build)
    steps.done("publish", build.counts["indexed"], build.counts["indexed"], to, published.moved)

    page, queries, hits = _search(settings, corpus, f"{to}@{published.alias}")
    steps.done("search", queries, hits, page)

    console.show_table("Steps", ["step", "rows in", "rows out", "seconds", "storage retries", "where"], steps.rows)
    show_evaluation(evaluation, evaluated)
    figures = json.loads(evaluation.read(EVALUATION_FILE))
    summary = _summary(prepared, embedded, build, figures) | {
        "version": published.version,
        "alias": published.alias,
        "seconds": steps.seconds,
        "storage_retries": steps.retries,
        "gallery": page,
    }
    storage.write_bytes(storage.join(settings.workspace, SUMMARY_FILE), json.dumps(summary, indent=1).encode())
    console.say(f"summary: {storage.join(settings.workspace, SUMMARY_FILE)}")
    console.out.print(f"gallery: {page}", soft_wrap=True)


def _search(settings: Settings, corpus: Corpus, reference: str) -> tuple[str, int, int]:
    """Search the published index with images of held-out patients: the gallery, the queries asked, the hits found."""
    retriever = Retriever.open(reference)
    found = []
    for uri in query_images(corpus, settings.evaluation.split, settings.search.queries):
        query = read_query(retriever, uri)
        found.append((uri, query, find(retriever, query, settings.search)))
    page = storage.join(settings.workspace, "reports", f"gallery-{settings.index.name}-{settings.publish.alias}.html")
    storage.write_bytes(page, gallery(retriever, reference, found).encode())
    return page, len(found), sum(len(answer.cases) for _, _, answer in found)


def query_images(corpus: Corpus, split: str, count: int) -> list[str]:
    """Sources of `count` images of a split, among its first ones: so that they show many findings, a patient once."""
    table = corpus.take(corpus.places(split)[:QUERY_IMAGES], ["source_uri", "patient_id", "findings", "unknown"])
    labels = labels_of(table) == 1
    patients = np.asarray(table["patient_id"].to_pylist(), dtype=object)
    free = labels.any(1)
    shown = np.zeros(labels.shape[1])
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        worth = np.where(free, (labels / (1.0 + shown) ** 2).sum(1) / np.maximum(labels.sum(1), 1), -1.0)
        best = int(np.argmax(worth))
        chosen.append(best)
        shown += labels[best]
        free &= patients != patients[best]
    return [table["source_uri"][row].as_py() for row in chosen]


def _summary(prepared: Artifact, embedded: Artifact, build: Artifact, figures: dict[str, Any]) -> dict[str, Any]:
    counts = prepared.counts
    names = ("archive", "prepared", "quarantined", "excluded", "duplicates")
    named = figures["embeddings"]
    return {
        "rows": {name: counts[name] for name in names}
        | {"embedded": embedded.counts["embedded"], "indexed": build.counts["indexed"]},
        "shards": build.manifest["shards"],
        "recall_at": {
            name: {k: cell["value"] for k, cell in table["all"]["recall_at"].items()} for name, table in named.items()
        },
        "chance_at": {k: cell["chance"] for k, cell in named[figures["chosen"]]["all"]["recall_at"].items()},
        "precision_at_8": {name: table["all"]["precision_at"]["8"]["value"] for name, table in named.items()},
        "map": {name: table["all"]["map"]["value"] for name, table in named.items()},
        "chosen": figures["chosen"],
        "queries": figures["queries"],
        "index_recall": build.manifest["recall"],
    }


def plan(settings: Settings, _: argparse.Namespace) -> None:
    planned = plan_corpus(settings.corpus, settings.workspace, settings.privacy)
    rows = planned.archive.rows
    finished = artifacts.find(planned.draft.uri)
    left = sum(artifacts.find(part.uri) is None for part in planned.parts)
    trained = finished and artifacts.find(model_draft(settings, Corpus(finished)).uri)
    epochs = f"{settings.training.epochs} epochs"
    if settings.training.pretraining:
        epochs = f"{settings.training.pretraining} epochs of pretraining and {epochs}"
    training = sum(pc.sum(pc.equal(rows["split"], TRAIN)).as_py() or 0 for rows in planned.archive.partitions())
    unscanned = planned.archive.unscanned
    console.show_table(
        "Plan of pipeline",
        ["step", "images", "state"],
        [
            *([["prepare", unscanned, "headers to read first: what follows is not known yet"]] if unscanned else []),
            ["prepare", rows, "finished" if finished else f"{left:,} of {len(planned.parts):,} shards to do"],
            ["train", training, "finished" if trained else f"{epochs} to do"],
            ["embed, evaluate, index, publish, search", rows, "what is missing"],
        ],
    )


if __name__ == "__main__":
    command.run("pipeline", __doc__, run, plan, writes=["workspace", "publish.to"])
