"""Building a sharded index from embeddings: shards in parallel on Ray, one shared quantizer, proven before it is done.

A shard holds the rows of neighbouring parts of the corpus, and is an artifact of its own: no shuffle is needed, a task
holds one shard at the most, a build that was killed goes on, and a corpus that grew or lost a patient builds only the
shards that changed. Lists and codes are trained once for a model and a number of lists and kept: shards built today and
a year ago compare. The driver holds ids while it looks for equal ones, and no vector.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact, Draft, Equation
from cxr_retrieval.config import IndexSettings
from cxr_retrieval.console import say
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.files import MODEL, SHARD_KIND, SHARD_PART_FILES, located
from cxr_retrieval.index.plan import FLOAT_BYTES, IndexPlan, plan_index, shard_bytes, whole_parts
from cxr_retrieval.index.proof import prove
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, Trained, index_of, list_sizes, train
from cxr_retrieval.index.shards import INDEX_FILE
from cxr_retrieval.index.source import (
    FACTS,
    THUMBNAIL_GROUP,
    Source,
    find_collisions,
    sidecar_of,
    thumbnails_of,
    vectors_of,
)
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.progress import Progress
from cxr_retrieval.runtime import reserved_memory
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, Model

KIND, QUANTIZER_KIND = "index", "index-quantizer"
EMPTY_FILE = "empty.faiss"  # a trained index without rows: what a shard begins with
ADDS_UP = Equation("embedded", ("indexed", "id_collisions"))


@dataclass(frozen=True)
class _Shard:
    """Parts of the corpus that make one shard; `left_out` are rows of each whose id another image has, by part.

    Rows are numbered within their part, duplicates left out.
    """

    draft: Draft
    parts: range
    rows: int
    left_out: Mapping[int, Sequence[int]]


def index_draft(settings: IndexSettings, workspace: str, source: Source, pseudonyms: Pseudonyms) -> Draft:
    """The index that would be built: its identity and its place."""
    shaping = {
        "embedding": source.embedding,
        "pseudonymised": pseudonyms.key_id,
        **settings.model_dump(exclude={"name", "embedding"}),
    }
    return Draft.under(_builds(settings, workspace), KIND, shaping, (source.embeddings.input_id,))


def _builds(settings: IndexSettings, workspace: str) -> str:
    return storage.join(workspace, "indexes", settings.name, "builds")


def build_index(
    settings: IndexSettings, workspace: str, source: Source, pseudonyms: Pseudonyms
) -> tuple[Artifact, bool]:
    """The index of an embedded corpus, and whether anything had to be done.

    Raises UserError when its recall against exact search stays below the target.
    """
    draft = index_draft(settings, workspace, source, pseudonyms)
    done = artifacts.find(draft.uri)
    if done:
        return done, False
    draft.begin()
    model = Model.open(source.model_uri)
    rows = sum(source.part_rows())
    plan = plan_index(rows, _dimensions(model, source.embedding), settings)
    collisions = find_collisions(source, pseudonyms)
    quantizer, trained = _trained(plan, settings, workspace, source)
    shards = _shards(plan, settings, workspace, source, pseudonyms, collisions, quantizer)
    found = list(storage.read_ahead(artifacts.find, [shard.draft.uri for shard in shards]))
    before = sum(shard.rows for shard, made in zip(shards, found, strict=True) if made)
    with Progress.of(workspace, draft, "index", rows, "rows", before=before) as progress:
        finished = _build_shards(shards, found, plan, source, pseudonyms, trained, progress)
        indexed = sum(shard.counts["indexed"] for shard in finished)
        counts = {"embedded": rows, "indexed": indexed, "id_collisions": sum(map(len, collisions.values()))}
        ADDS_UP.check(counts)  # before the proof, which takes long
        sizes = np.asarray([shard.manifest["list_sizes"] for shard in finished], np.int64).sum(axis=0)
        facts = _facts(plan, source, model, pseudonyms, indexed, len(finished)) | {"list_sizes": _histogram(sizes)}
        files = [
            draft.write(f"{MODEL}{name}", _model_file(source.model_uri, name)) for name in (MODEL_FILE, WEIGHTS_FILE)
        ]
        if quantizer:
            files.append(draft.write(QUANTIZER_FILE, quantizer.read(QUANTIZER_FILE)))
        proof = prove(located(draft.uri, files, finished), facts, settings)
        facts |= {
            "probes": proof.probes,
            "filter_probes": proof.filter_probes,
            "proof": asdict(proof),
        }
        files.append(draft.write(INDEX_FILE, json.dumps(facts, indent=1, sort_keys=True).encode()))
        return draft.finish(
            files,
            counts,
            [ADDS_UP],
            finished,
            recall=proof.recall,
            probes=proof.probes,
            shards=len(finished),
            factory=plan.factory,
        ), True


def _shards(
    plan: IndexPlan,
    settings: IndexSettings,
    workspace: str,
    source: Source,
    pseudonyms: Pseudonyms,
    collisions: Mapping[int, Sequence[int]],
    quantizer: Artifact | None,
) -> list[_Shard]:
    """The shards of a corpus, by their identity: what their rows are, and what they were trained with."""
    folder = storage.join(_builds(settings, workspace), "parts")
    ids = [part["input_id"] for part in source.embeddings.manifest["parts"]]
    sizes = source.part_rows()
    found = []
    for parts in whole_parts(source.archive_rows(), plan.shard_rows):
        rows = sum(sizes[part] for part in parts)
        if not rows:
            continue  # nothing of these parts was good, or is left
        left_out = {part: collisions[part] for part in parts if part in collisions}
        excluded = [source.corpus.left_out(part).tolist() for part in parts]
        shaping = {
            "embedding": source.embedding,
            "pseudonymised": pseudonyms.key_id,
            "factory": plan.factory,
            "left_out": hashlib.sha256(json.dumps([excluded, [*left_out.items()]]).encode()).hexdigest(),
        }
        inputs = [*(ids[part] for part in parts), *([quantizer.manifest["content_id"]] if quantizer else [])]
        found.append(_Shard(Draft.under(folder, SHARD_KIND, shaping, inputs), parts, rows, left_out))
    return found


def _build_shards(
    shards: Sequence[_Shard],
    found: Sequence[Artifact | None],
    plan: IndexPlan,
    source: Source,
    pseudonyms: Pseudonyms,
    trained: Any,
    progress: Progress,
) -> list[Artifact]:
    """All shards; those not `found` are built, each in a task of its own."""
    build = ray.remote(max_retries=3)(_build_shard)
    waiting = [
        build.options(memory=reserved_memory(shard_bytes(shard.rows, plan.dimensions))).remote(
            shard, plan, source, pseudonyms, trained
        )
        for shard, made in zip(shards, found, strict=True)
        if not made
    ]
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        rows, retries = ray.get(ready)
        storage.add_retries(retries)
        progress.advance(rows)
    return [made or artifacts.load(shard.draft.uri, SHARD_KIND) for shard, made in zip(shards, found, strict=True)]


def _histogram(sizes: np.ndarray) -> list[int]:
    """How many lists are empty, then how many hold 1, 2 to 3, 4 to 7, ... rows."""
    counts: list[int] = np.bincount([int(size).bit_length() for size in sizes]).tolist()
    return counts


def _facts(
    plan: IndexPlan, source: Source, model: Model, pseudonyms: Pseudonyms, rows: int, shards: int
) -> dict[str, Any]:
    return {
        "embedding": source.embedding,
        "dimensions": plan.dimensions,
        "rows": rows,
        "shards": shards,
        "factory": plan.factory,
        "lists": plan.lists,
        "candidates": plan.code.candidates,
        "plan": {
            "why": plan.why,
            "index_bytes": plan.bytes,
            "vector_bytes": plan.code.bytes,
            "shard_rows": plan.shard_rows,
            "latency_ms": plan.latency_ms,
        },
        "findings": model.findings,
        "decode_recipe": model.recipe.to_json(),
        "decode_recipe_id": model.recipe.id,
        "corpus": source.corpus.artifact.input_id,
        "model": source.embeddings.manifest["model"],
        "pseudonymised": pseudonyms.key is not None,
    }


def _model_file(uri: str, name: str) -> bytes:
    return artifacts.load(uri, "model").read(name)


def _dimensions(model: Model, embedding: str) -> int:
    if embedding not in model.embedding_names:
        raise UserError(f"index.embedding={embedding!r} is none of the model's: {', '.join(model.embedding_names)}")
    return model.embedding_sizes[embedding]


def _trained(plan: IndexPlan, settings: IndexSettings, workspace: str, source: Source) -> tuple[Artifact | None, Any]:
    """What the shards share, trained in a task where it is not there yet: the artifact, and a reference to its content;
    none for an exact index.

    Its identity is what it is for (the model, the embedding, lists and codes), not the rows it saw: trained on what the
    corpus held at first, it serves as the corpus grows, until so many more rows take more lists. The even sample is
    read in parallel and goes from task to task, past the driver.
    """
    if not plan.lists:
        return None, None
    shaping = {
        "embedding": source.embedding,
        "factory": plan.factory,
        "dimensions": plan.dimensions,
        "training": settings.training,
    }
    model = artifacts.load(source.model_uri, "model").manifest["content_id"]
    folder = storage.join(workspace, "indexes", settings.name, "quantizers")
    draft = Draft.under(folder, QUANTIZER_KIND, shaping, (model,))
    if artifacts.find(draft.uri) is None:
        say(f"index: training {plan.factory} on a sample of {plan.training_rows:,} rows")
        sample = ray.remote(max_retries=3)(_sample)
        firsts = np.cumsum([0, *source.part_rows()])
        groups = whole_parts(source.part_rows(), plan.shard_rows)
        samples = [sample.remote(parts, int(firsts[parts.start]), plan, source) for parts in groups]
        # As floats, and what is read of it meanwhile.
        memory = reserved_memory(2 * FLOAT_BYTES * plan.dimensions * plan.training_rows)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        if gpus and not hasattr(faiss, "StandardGpuResources"):
            say("index: this build of FAISS has no GPU support: lists are trained on CPUs beside an idle GPU")
            gpus = 0
        training = ray.remote(max_retries=3)(_train_quantizer).options(memory=memory, num_gpus=gpus)
        storage.add_retries(ray.get(training.remote(plan, draft, source.corpus.artifact.input_id, *samples)))
    quantizer = artifacts.load(draft.uri, QUANTIZER_KIND)
    return quantizer, ray.put(Trained(quantizer.read(QUANTIZER_FILE), quantizer.read(EMPTY_FILE)))


def _sample(parts: range, first: int, plan: IndexPlan, source: Source) -> np.ndarray:
    """Of an even sample of the corpus, as large as is planned, the rows that lie in `parts`, which begin with row
    `first`: float16 [N, D]. Runs in a Ray task."""
    model = Model.open(source.model_uri)
    taken = []
    for part in parts:
        vectors_ND, _, _ = vectors_of(source, model, part, [])
        rows_N = np.arange(first, first + len(vectors_ND))
        # Where the count of rows to take goes up: so many of all, and as far apart as may be.
        taken.append(vectors_ND[rows_N * plan.training_rows % plan.rows < plan.training_rows])
        first += len(vectors_ND)
    return np.concatenate(taken)


def _train_quantizer(plan: IndexPlan, draft: Draft, corpus: str, *sample: np.ndarray) -> int:
    """Train on a sample of a corpus and write what comes of it; returns repeated requests. Runs in a Ray task."""
    before = storage.retries()
    sample_ND = np.concatenate(sample)
    trained = train(plan, sample_ND)
    draft.begin()
    files = [draft.write(QUANTIZER_FILE, trained.quantizer), draft.write(EMPTY_FILE, trained.empty)]
    draft.finish(files, {"sample": len(sample_ND)}, trained_on=corpus)
    return storage.retries() - before


def _build_shard(
    shard: _Shard, plan: IndexPlan, source: Source, pseudonyms: Pseudonyms, trained: Trained | None
) -> tuple[int, int]:
    """Build one shard and write it whole; returns its rows and repeated requests. Runs in a Ray task."""
    before = storage.retries()
    model = Model.open(source.model_uri)
    vectors: list[np.ndarray] = []
    sidecars: list[pa.Table] = []
    thumbnails: list[pa.Table] = []
    for part in shard.parts:
        vectors_ND, crops_N4, facts = vectors_of(source, model, part, FACTS)
        tables = sidecar_of(facts, crops_N4, pseudonyms), thumbnails_of(source.corpus, part)
        assert len(vectors_ND) == len(tables[0]) == len(tables[1]), "a shard lost rows"
        kept = np.setdiff1d(np.arange(len(vectors_ND)), shard.left_out.get(part, ()))
        vectors.append(vectors_ND[kept])
        for table, taken in zip(tables, (sidecars, thumbnails), strict=True):
            taken.append(table if len(kept) == len(table) else table.take(kept))
    rows_ND = np.concatenate(vectors)
    draft, array = shard.draft.begin(), io.BytesIO()
    np.save(array, rows_ND, allow_pickle=False)
    files = [draft.write(SHARD_PART_FILES["rows"], array.getvalue())]
    index = index_of(plan, rows_ND, trained)
    with draft.staged(SHARD_PART_FILES["faiss"]) as (local, entry):
        faiss.write_index(index, str(local))
    files.append(entry.value)
    for kind, parts, group in (("sidecar", sidecars, None), ("thumbnails", thumbnails, THUMBNAIL_GROUP)):
        with draft.staged(SHARD_PART_FILES[kind]) as (local, entry):
            pq.write_table(pa.concat_tables(parts), local, compression="zstd", row_group_size=group)
        files.append(entry.value)
    sizes = list_sizes(index).tolist() if trained else []
    draft.finish(files, {"indexed": len(rows_ND)}, list_sizes=sizes)
    return len(rows_ND), storage.retries() - before
