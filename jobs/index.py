"""Embed a corpus by a model and build a sharded, proven FAISS index of it.

  python -m jobs.index --config FILE corpus.archive=DIR
  python -m jobs.index --plan --rows 10000000 --dimensions 768     what would be built, without corpus or model
  ray job submit --working-dir . -- python -m jobs.index --config FILE workspace=s3://bucket/prefix

The index lies in WORKSPACE/indexes/NAME/builds until `jobs.publish` makes a version of it; its page in
WORKSPACE/reports/index.
"""

import argparse
import json

from cxr_retrieval import artifacts, command, console, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import KIND as EMBEDDINGS
from cxr_retrieval.embedding.stream import embed, embeddings_draft
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.build import KIND, build_index, index_draft
from cxr_retrieval.index.files import files_of
from cxr_retrieval.index.plan import GIB, IndexPlan, plan_index
from cxr_retrieval.index.shards import INDEX_FILE
from cxr_retrieval.index.source import Source
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.report.index import write_index_page
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.model import Model
from cxr_retrieval.training.run import model_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, help="with --plan: for so many rows instead of the corpus'")
    parser.add_argument("--dimensions", type=int, help="with --plan --rows: numbers of a vector")


def run(settings: Settings, options: argparse.Namespace) -> None:
    if options.rows is not None or options.dimensions is not None:
        raise UserError("--rows and --dimensions are for --plan: what is built follows the corpus and the model")
    build, worked = built_index(settings)
    show_index(build, worked)
    console.say(f"report: {index_report(settings, build)}")


def index_report(settings: Settings, build: Artifact) -> str:
    """Write the page of an index; returns where it is."""
    page = storage.join(settings.workspace, "reports", "index", f"{build.input_id}.html")
    facts = json.loads(build.read(INDEX_FILE))
    sizes = {name: file.entry.size for name, file in files_of(build).items()}
    storage.write_bytes(page, write_index_page(settings.index.name, build.input_id, facts, sizes).encode())
    return page


def built_index(settings: Settings) -> tuple[Artifact, bool]:
    """The index of a trained model's corpus, embedded first where it is not. Raises UserError without that model."""
    pseudonyms = Pseudonyms.of(settings.privacy)  # before any work: a missing key is known at once
    start_ray(settings)
    settings, model = model_of(settings)
    corpus = Corpus(prepare(settings.corpus, settings.workspace, settings.privacy)[0])
    embedded, _worked = embed(settings.embedding, settings.workspace, model.uri, corpus)
    source = Source(corpus, embedded, model.uri, settings.index.embedding or model.manifest["chosen"])
    return build_index(settings.index, settings.workspace, source, pseudonyms)


def finished_index(settings: Settings) -> Artifact:
    """The index that these settings have built. Raises UserError where it is not finished."""
    settings, model = model_of(settings)
    corpus = Corpus(find_prepared(settings.corpus, settings.workspace, settings.privacy))
    embedded = artifacts.load(embeddings_draft(settings.workspace, model, corpus).uri, EMBEDDINGS)
    source = Source(corpus, embedded, model.uri, settings.index.embedding or model.manifest["chosen"])
    draft = index_draft(settings.index, settings.workspace, source, Pseudonyms.of(settings.privacy))
    return artifacts.load(draft.uri, KIND)


def show_index(build: Artifact, worked: bool) -> None:
    console.show_table(
        "Index" if worked else "Index (finished before, nothing to do)",
        ["embedded", "indexed", "shards", "kind", "probes", "recall@10", "where"],
        [
            [
                build.counts["embedded"],
                build.counts["indexed"],
                build.manifest["shards"],
                build.manifest["factory"],
                build.manifest["probes"],
                f"{build.manifest['recall']:.3f}",
                build.uri,
            ]
        ],
    )


def plan(settings: Settings, options: argparse.Namespace) -> None:
    show_plan(plan_index(*_size(settings, options), settings.index))


def _size(settings: Settings, options: argparse.Namespace) -> tuple[int, int]:
    """Rows and dimensions: those asked for, or those of the corpus and the model."""
    if (options.rows is None) != (options.dimensions is None):
        raise UserError("--rows and --dimensions go together: a plan needs both, or takes both from corpus and model")
    if options.rows is not None:
        if min(options.rows, options.dimensions) < 1:
            raise UserError("--rows and --dimensions must be at least 1")
        return options.rows, options.dimensions
    settings, model = model_of(settings)
    opened = Model.open(model.uri)
    dimensions = opened.embedding_sizes[settings.index.embedding or opened.chosen]
    return find_prepared(settings.corpus, settings.workspace, settings.privacy).counts["prepared"], dimensions


def show_plan(planned: IndexPlan) -> None:
    """Print what would be built, and why, in a sentence for every choice."""
    console.show_table(
        f"Plan of index: {planned.rows:,} rows of {planned.dimensions:,} dimensions",
        ["kind", "lists", "probes", "bytes a vector", "GiB", "shards", "rows of a shard", "ms a search", "core hours"],
        [
            [
                planned.factory,
                planned.lists,
                planned.probes,
                planned.code.bytes,
                f"{planned.bytes / GIB:.3g}",
                planned.shards,
                planned.shard_rows,
                f"{planned.latency_ms:.3g}",
                f"{planned.build_hours:,.2f}",
            ]
        ],
    )
    for choice, reason in planned.why.items():
        console.out.print(f"{choice}: {reason}", soft_wrap=True)


if __name__ == "__main__":
    command.run("index", __doc__, run, plan, arguments)
