"""Embed a corpus by a model and build a sharded, proven FAISS index of it.

  python -m jobs.index --config FILE corpus.archive=DIR
  ray job submit --working-dir . -- python -m jobs.index --config FILE workspace=s3://bucket/prefix

The index lies in WORKSPACE/indexes/NAME/builds until `jobs.publish` makes a version of it.
"""

import argparse

from cxr_retrieval import artifacts, command, console
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import KIND as EMBEDDINGS
from cxr_retrieval.embedding.stream import embed, embeddings_draft
from cxr_retrieval.index.build import KIND, Source, build_index, index_draft
from cxr_retrieval.index.plan import plan_index
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.model import Model
from cxr_retrieval.training.run import model_of


def run(settings: Settings, _: argparse.Namespace) -> None:
    build, worked = built_index(settings)
    show_index(build, worked)


def built_index(settings: Settings) -> tuple[Artifact, bool]:
    """The index of a trained model's corpus, embedded first where it is not. Raises UserError without that model."""
    pseudonyms = Pseudonyms.of(settings.privacy)  # before any work: a missing key is known at once
    start_ray(settings)
    settings, model = model_of(settings)
    corpus = Corpus(prepare(settings.corpus, settings.workspace)[0])
    embedded, _worked = embed(settings.embedding, settings.workspace, model.uri, corpus)
    source = Source(corpus, embedded, model.uri, settings.index.embedding or model.manifest["chosen"])
    return build_index(settings.index, settings.workspace, source, pseudonyms)


def finished_index(settings: Settings) -> Artifact:
    """The index that these settings have built. Raises UserError where it is not finished."""
    settings, model = model_of(settings)
    corpus = Corpus(find_prepared(settings.corpus, settings.workspace))
    embedded = artifacts.load(embeddings_draft(settings.workspace, model, corpus).uri, EMBEDDINGS)
    source = Source(corpus, embedded, model.uri, settings.index.embedding or model.manifest["chosen"])
    draft = index_draft(settings.index, settings.workspace, source, Pseudonyms.of(settings.privacy))
    return artifacts.load(draft.uri, KIND)


def show_index(build: Artifact, worked: bool) -> None:
    console.show_table(
        "Index" if worked else "Index (finished before, nothing to do)",
        ["embedded", "indexed", "shards", "kind", "recall@10", "where"],
        [
            [
                build.counts["embedded"],
                build.counts["indexed"],
                build.manifest["shards"],
                build.manifest["factory"],
                f"{build.manifest['recall']:.3f}",
                build.uri,
            ]
        ],
    )


def plan(settings: Settings, _: argparse.Namespace) -> None:
    settings, model = model_of(settings)
    rows = find_prepared(settings.corpus, settings.workspace).counts["prepared"]
    opened = Model.open(model.uri)
    dimensions = opened.embedding_sizes[settings.index.embedding or opened.chosen]
    planned = plan_index(rows, dimensions, settings.index.shard_rows, settings.index.exact_rows)
    console.show_table(
        "Plan of index",
        ["rows", "dimensions", "kind", "shards", "bytes"],
        [[rows, dimensions, planned.factory, len(planned.shards), planned.bytes]],
    )


if __name__ == "__main__":
    command.run("index", __doc__, run, plan)
