"""Building a sharded index from embeddings: shards in parallel on Ray, one shared quantizer, proven before it is done.

A shard is a contiguous range of embedded rows, so no shuffle is needed and a task holds one shard at the most. The task
that trains the quantizer holds its sample. The driver holds ids while it looks for equal ones, and no vector.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact, Draft, Equation, FileEntry
from cxr_retrieval.config import IndexSettings
from cxr_retrieval.console import say
from cxr_retrieval.corpus.preparation import ROWS_FILE
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.embedding.stream import read_part
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.plan import FLOAT_BYTES, IndexPlan, Shard, plan_index, shard_bytes
from cxr_retrieval.index.proof import prove
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, Trained, index_of, list_sizes, train
from cxr_retrieval.index.shards import INDEX_FILE, shard_files
from cxr_retrieval.network.progressive import Output, embeddings
from cxr_retrieval.privacy import Pseudonyms, row_id
from cxr_retrieval.progress import Progress
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, Model

KIND = "index"
ADDS_UP = Equation("embedded", ("indexed", "id_collisions"))
THUMBNAIL_SIDE, THUMBNAIL_QUALITY, THUMBNAIL_GROUP = 256, 85, 64
FACTS = [
    "image_id",
    "patient_id",
    "study_date",
    "view",
    "sex",
    "age_years",
    "findings",
    "unknown",
    "source_uri",
    "pixel_sha256",
    "split",
]
SIDECAR = pa.schema(
    [
        ("id", pa.int64()),
        ("image_id", pa.string()),
        ("patient", pa.string()),
        ("study_date", pa.date32()),
        ("view", pa.string()),
        ("sex", pa.string()),
        ("age_years", pa.int16()),
        ("findings", pa.list_(pa.string())),
        ("unknown", pa.list_(pa.string())),
        ("crop", pa.list_(pa.int32(), 4)),
        ("source", pa.string()),
        ("pixel_sha256", pa.binary(32)),
        ("held_out", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Source:
    """What an index is built from. Small enough to send to a worker; everything heavy is read where it is needed."""

    corpus: Corpus
    embeddings: Artifact
    model_uri: str
    embedding: str

    def part_rows(self) -> list[int]:
        """Rows of every part, duplicates left out."""
        parts = self.embeddings.manifest["parts"]
        return [part["counts"]["embedded"] - len(self.corpus.excluded.get(n, ())) for n, part in enumerate(parts)]


def index_draft(settings: IndexSettings, workspace: str, source: Source, pseudonyms: Pseudonyms) -> Draft:
    """The index that would be built: its identity and its place."""
    shaping = {
        "embedding": source.embedding,
        "pseudonymised": pseudonyms.key_id,
        **settings.model_dump(exclude={"name", "embedding"}),
    }
    folder = storage.join(workspace, "indexes", settings.name, "builds")
    return Draft.under(folder, KIND, shaping, (source.embeddings.input_id,))


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
    dimensions = _dimensions(model, source.embedding)
    plan = plan_index(rows, dimensions, settings)
    collisions = find_collisions(source, pseudonyms)
    files, trained = _train(plan, draft, source)
    build = ray.remote(max_retries=3)(_build_shard)
    waiting = [
        build.options(memory=shard_bytes(shard.stop - shard.start, dimensions)).remote(
            draft, shard, plan, source, pseudonyms, collisions, trained
        )
        for shard in plan.shards
    ]
    indexed, sizes = 0, np.zeros(plan.lists, np.int64)
    with Progress.of(workspace, draft, "index", rows, "rows") as progress:
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            built: _Built = ray.get(ready)
            storage.add_retries(built.retries)
            files += built.files
            indexed += built.rows
            sizes += built.list_sizes
            progress.advance(built.rows)
        counts = {"embedded": rows, "indexed": indexed, "id_collisions": len(collisions)}
        ADDS_UP.check(counts)  # before the proof, which takes long
        facts = _facts(plan, source, model, pseudonyms, indexed) | {"list_sizes": _histogram(sizes)}
        files += [
            draft.write(f"model/{name}", _model_file(source.model_uri, name)) for name in (MODEL_FILE, WEIGHTS_FILE)
        ]
        proof = prove(draft.uri, facts, files, settings)
        facts |= {
            "probes": proof.probes,
            "filter_probes": [[setting.passing, setting.probes] for setting in proof.filtered],
            "proof": asdict(proof),
        }
        files.append(draft.write(INDEX_FILE, json.dumps(facts, indent=1, sort_keys=True).encode()))
        return draft.finish(
            files,
            counts,
            [ADDS_UP],
            recall=proof.recall,
            probes=proof.probes,
            shards=len(plan.shards),
            factory=plan.factory,
        ), True


def _histogram(sizes: np.ndarray) -> list[int]:
    """How many lists are empty, then how many hold 1, 2 to 3, 4 to 7, ... rows."""
    counts: list[int] = np.bincount([int(size).bit_length() for size in sizes]).tolist()
    return counts


def _facts(plan: IndexPlan, source: Source, model: Model, pseudonyms: Pseudonyms, rows: int) -> dict[str, Any]:
    return {
        "embedding": source.embedding,
        "dimensions": plan.dimensions,
        "rows": rows,
        "shards": len(plan.shards),
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


def _vectors(source: Source, model: Model, part: int, columns: list[str]) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Unit vectors float16 [N, D], crops [N, 4] and facts of one part."""
    embedded = read_part(source.embeddings, source.corpus, part, model, columns)
    empty = embedded.z_PSND.new_zeros(0)
    output = Output(embedded.z_PSND, empty, embedded.joint_PNC, empty, empty)
    vectors = embeddings(output, model.centring)[source.embedding].numpy()
    return vectors.astype(np.float16), embedded.crop_N4, embedded.facts


def _overlaps(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(part, first, last) of the parts that hold rows `start` to `stop`, rows numbered inside the part."""
    offset = 0
    for part, size in enumerate(sizes):
        first, last = max(start - offset, 0), min(stop - offset, size)
        if first < last:
            yield part, first, last
        offset += size


def _train(plan: IndexPlan, draft: Draft, source: Source) -> tuple[list[FileEntry], Any]:
    """Train what the shards share, in one task: its file, and a reference to it; none for an exact index.

    The even sample is read in parallel and goes from task to task, past the driver.
    """
    if not plan.lists:
        return [], None
    say(f"index: training {plan.factory} on a sample of {plan.training_rows:,} rows")
    stride = max(1, plan.rows // plan.training_rows)
    sample = ray.remote(max_retries=3)(_sample)
    parts = [sample.remote(shard, stride, source) for shard in plan.shards]
    # As floats, and what is read of it meanwhile.
    memory = 2 * FLOAT_BYTES * plan.dimensions * plan.training_rows
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    training = ray.remote(max_retries=3)(_train_quantizer).options(memory=memory, num_gpus=gpus, num_returns=2)
    written, trained = training.remote(plan, draft, *parts)
    entry, retries = ray.get(written)
    storage.add_retries(retries)
    return [entry], trained


def _sample(shard: Shard, stride: int, source: Source) -> np.ndarray:
    """Every `stride`th row of the corpus that lies in the shard, float16 [N, D]. Runs in a Ray task."""
    model = Model.open(source.model_uri)
    taken, place = [], shard.start
    for part, first, last in _overlaps(source.part_rows(), shard.start, shard.stop):
        vectors_ND, _, _ = _vectors(source, model, part, [])
        taken.append(vectors_ND[first:last][(-place) % stride :: stride])
        place += last - first
    return np.concatenate(taken)


def _train_quantizer(plan: IndexPlan, draft: Draft, *sample: np.ndarray) -> tuple[tuple[FileEntry, int], Trained]:
    """Train on a sample and write the quantizer's file. Runs in a Ray task."""
    before = storage.retries()
    trained = train(plan, np.concatenate(sample))
    return (draft.write(QUANTIZER_FILE, trained.quantizer), storage.retries() - before), trained


def find_collisions(source: Source, pseudonyms: Pseudonyms) -> list[int]:
    """Embedded rows whose id an earlier row has already: they are left out of the index and counted.

    Holds 24 bytes a row. With 63 bits one collision is to be expected among some four thousand million images.
    """
    ids = []
    for part, uri in enumerate(source.corpus.files):
        with storage.arrow_reader(uri) as file:
            names = pq.read_table(file, columns=["image_id"])["image_id"].to_pylist()
        left_out = source.corpus.excluded.get(part, set())
        kept = (name for row, name in enumerate(names) if row not in left_out)
        ids.append(np.fromiter((row_id(pseudonyms.name("image", name)) for name in kept), np.int64))
    every = np.concatenate(ids)
    ordered = np.sort(every)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    places = np.flatnonzero(np.isin(every, twice)) if len(twice) else np.empty(0, np.int64)
    _, first = np.unique(every[places], return_index=True)
    later: list[int] = np.delete(places, first).tolist()
    return later


@dataclass(frozen=True)
class _Built:
    rows: int
    files: list[FileEntry]
    list_sizes: np.ndarray
    retries: int


def _build_shard(
    draft: Draft,
    shard: Shard,
    plan: IndexPlan,
    source: Source,
    pseudonyms: Pseudonyms,
    collisions: list[int],
    trained: Trained | None,
) -> _Built:
    """Build one shard and write its four files. Runs in a Ray task."""
    before = storage.retries()
    model = Model.open(source.model_uri)
    vectors, sidecars, thumbnails = [], [], []
    for part, first, last in _overlaps(source.part_rows(), shard.start, shard.stop):
        vectors_ND, crops_N4, facts = _vectors(source, model, part, FACTS)
        vectors.append(vectors_ND[first:last])
        sidecars.append(_sidecar(facts.slice(first, last - first), crops_N4[first:last], pseudonyms))
        thumbnails.append(_thumbnails(source.corpus, part, first, last))
    rows_ND, sidecar, pictures = np.concatenate(vectors), pa.concat_tables(sidecars), pa.concat_tables(thumbnails)
    assert len(rows_ND) == len(sidecar) == len(pictures) == shard.stop - shard.start, "a shard lost rows"
    dropped = [row - shard.start for row in collisions if shard.start <= row < shard.stop]
    if dropped:
        kept = np.setdiff1d(np.arange(len(rows_ND)), dropped)
        rows_ND, sidecar, pictures = rows_ND[kept], sidecar.take(kept), pictures.take(kept)
    paths = shard_files(shard.number)
    array = io.BytesIO()
    np.save(array, rows_ND, allow_pickle=False)
    files = [draft.write(paths["rows"], array.getvalue())]
    index = index_of(plan, rows_ND, trained)
    with draft.staged(paths["faiss"]) as (local, entry):
        faiss.write_index(index, str(local))
    files.append(entry.value)
    for kind, table, group in (("sidecar", sidecar, None), ("thumbnails", pictures, THUMBNAIL_GROUP)):
        with draft.staged(paths[kind]) as (local, entry):
            pq.write_table(table, local, compression="zstd", row_group_size=group)
        files.append(entry.value)
    sizes = list_sizes(index) if trained else np.zeros(0, np.int64)
    return _Built(len(rows_ND), files, sizes, storage.retries() - before)


def _sidecar(facts: pa.Table, crops_N4: np.ndarray, pseudonyms: Pseudonyms) -> pa.Table:
    """What a hit shows and a filter needs, with names as they may be known outside the corpus."""
    images = [pseudonyms.name("image", name) for name in facts["image_id"].to_pylist()]
    columns = {
        "id": [row_id(name) for name in images],
        "image_id": images,
        "patient": [pseudonyms.name("patient", name) for name in facts["patient_id"].to_pylist()],
        "crop": crops_N4.tolist(),
        "source": [pseudonyms.name("source", name) for name in facts["source_uri"].to_pylist()],
        "held_out": [split != "train" for split in facts["split"].to_pylist()],
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else facts[field.name].combine_chunks().cast(field.type)
        for field in SIDECAR
    ]
    return pa.Table.from_arrays(arrays, schema=SIDECAR)


def _thumbnails(corpus: Corpus, part: int, first: int, last: int) -> pa.Table:
    """JPEGs of rows `first` to `last` of a part, duplicates left out, at most 256 pixels a side."""
    left_out = corpus.excluded.get(part, set())
    found: list[bytes] = []
    row = seen = 0
    with storage.arrow_reader(storage.join(corpus.artifact.part_uris[part], ROWS_FILE)) as file:
        for batch in pq.ParquetFile(file).iter_batches(THUMBNAIL_GROUP, columns=["pixels"]):
            for pixels in pixels_of(pa.Table.from_batches([batch]), corpus.recipe.size):
                if row not in left_out:
                    if first <= seen < last:
                        found.append(_jpeg(pixels))
                    seen += 1
                row += 1
    return pa.table({"jpeg": pa.array(found, pa.binary())})


def _jpeg(pixels: np.ndarray) -> bytes:
    if max(pixels.shape) > THUMBNAIL_SIDE:
        pixels = cv2.resize(pixels, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, THUMBNAIL_QUALITY])
    assert done, "an 8-bit grey image always encodes"
    return bytes(data)
