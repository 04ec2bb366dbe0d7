"""A corpus through a model: every part of the corpus becomes one part of the embeddings, streamed by Ray Data.

Actors load the model once and embed one part at a time, in the order of its rows. What is stored is what the network
says (the unit vectors of every step and pass, the joint finding logits, the crop), in float16; the named embeddings
are derived from it, so another choice of embedding needs no second pass over the images.

A part embeds every row of its corpus part, duplicates too: which row is a duplicate can change when the archive grows,
the part cannot. Readers leave them out.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from cxr_retrieval import artifacts, storage
from cxr_retrieval.artifacts import Artifact, Draft, Equation
from cxr_retrieval.config import EmbeddingSettings
from cxr_retrieval.corpus.parts import ROWS_FILE
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.errors import UserError
from cxr_retrieval.network.steps import PASSES
from cxr_retrieval.progress import Progress
from cxr_retrieval.training.model import KIND as MODEL_KIND
from cxr_retrieval.training.model import Model

KIND, PART_KIND = "embeddings", "embedding-part"
EMBEDDINGS_FILE = "embeddings.parquet"
ADDS_UP = Equation("prepared", ("embedded",))


def embedding_schema(steps: int, dimensions: int, findings: int) -> pa.Schema:
    """Rows in the order of the corpus part: z is [P, S, D] and joint [P, C] flattened, crop x, y, w, h in pixels.

    `pixel_id` is the first half of the hash of the prepared pixels: it binds a row to its image without a name.
    """
    return pa.schema(
        [
            ("pixel_id", pa.int64()),
            ("z", pa.list_(pa.float16(), PASSES * steps * dimensions)),
            ("joint", pa.list_(pa.float16(), PASSES * findings)),
            ("crop", pa.list_(pa.int32(), 4)),
        ]
    )


def embeddings_draft(workspace: str, model: Artifact, corpus: Corpus) -> Draft:
    """The embeddings of a corpus by a model: their identity and their place.

    The model counts by its bytes: trained anew under the same settings it may be another, and its vectors too.
    """
    folder = storage.join(workspace, "embeddings")
    return Draft.under(folder, KIND, {}, (model.manifest["content_id"], corpus.artifact.input_id))


def embeddings_id(model: str, corpus: str) -> str:
    """What those embeddings are known by, as an evaluation of them tells: of a model's content id and a corpus' id."""
    return artifacts.input_id(KIND, {}, (model, corpus))


def embed(settings: EmbeddingSettings, workspace: str, model_uri: str, corpus: Corpus) -> tuple[Artifact, bool]:
    """The embeddings of a corpus by a model, and whether anything had to be done.

    Raises UserError when the model was trained on images decoded by another recipe.
    """
    model = artifacts.load(model_uri, MODEL_KIND)
    if model.manifest["decode_recipe_id"] != corpus.recipe.id:
        raise UserError(
            f"model {model_uri} has decode recipe {model.manifest['decode_recipe_id']}, but corpus"
            f" {corpus.artifact.uri} was prepared under {corpus.recipe.id}: prepare it with the model's corpus.size and"
            " corpus.fit"
        )
    draft = embeddings_draft(workspace, model, corpus)
    folder = storage.join(storage.parent(draft.uri), "parts")
    ids = [part["input_id"] for part in corpus.artifact.manifest["parts"]]
    parts = [Draft.under(folder, PART_KIND, {}, (model.manifest["content_id"], part)) for part in ids]
    done = artifacts.find(draft.uri)
    if done:
        return done, False
    draft.begin()
    found = list(storage.read_ahead(artifacts.find, [part.uri for part in parts]))
    with Progress.of(workspace, draft, "embed", _rows(corpus), before=_rows(corpus, found)) as progress:
        finished = _embed_parts(parts, found, settings, model_uri, corpus, progress)
        excluded = corpus.artifact.counts["duplicates"]
        counts = {
            "prepared": corpus.rows,
            "embedded": sum(part.counts["embedded"] for part in finished) - excluded,
            "duplicates_left_out": excluded,
        }
        facts = {"decode_recipe_id": corpus.recipe.id, "model": model.input_id}
        return draft.finish([], counts, [ADDS_UP], finished, **facts), True


def _rows(corpus: Corpus, found: list[Artifact | None] | None = None) -> int:
    """Rows of the corpus' parts, duplicates too; only of those whose embeddings were found, if they are given."""
    parts = corpus.artifact.manifest["parts"]
    return sum(part["counts"]["prepared"] for n, part in enumerate(parts) if found is None or found[n])


def _embed_parts(
    parts: list[Draft],
    found: list[Artifact | None],
    settings: EmbeddingSettings,
    model_uri: str,
    corpus: Corpus,
    progress: Progress,
) -> list[Artifact]:
    """All parts of the embeddings; those not `found` are embedded."""
    missing = [number for number, part in enumerate(found) if part is None]
    if missing:
        tasks = [
            {"rows": corpus.files[n], "uri": parts[n].uri, "inputs": list(parts[n].inputs), "model": model_uri}
            for n in missing
        ]
        results = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
            _Embedder,  # type: ignore[arg-type]  # an actor class: Ray's types know functions only
            fn_constructor_args=(settings.batch_size,),
            compute=ray.data.ActorPoolStrategy(size=min(_workers(settings), len(tasks))),
            num_cpus=0 if _gpus() else 1,
            num_gpus=1 if _gpus() else 0,
        )
        for result in results.iter_rows():
            storage.add_retries(result["retries"])
            if result["error"]:
                raise UserError(result["error"])
            progress.advance(result["embedded"])
    return list(storage.read_ahead(lambda n: found[n] or artifacts.load(parts[n].uri, PART_KIND), range(len(parts))))


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _workers(settings: EmbeddingSettings) -> int:
    return settings.workers or _gpus() or max(1, int(ray.cluster_resources()["CPU"]))


class _Embedder:
    """Opens the model once, in an actor, and embeds one part at a call."""

    def __init__(self, batch_size: int) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self._batch_size = batch_size
        self._model: Model | None = None

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        before = storage.retries()
        try:
            if self._model is None:
                self._model = Model.open(task["model"])
                if torch.cuda.is_available():
                    self._model.network.cuda()
                elif ray.get_gpu_ids():
                    raise UserError(
                        "embed: a worker was given a GPU that its PyTorch cannot use: install a build of PyTorch for"
                        " that GPU on the nodes, or start their Ray with --num-gpus=0"
                    )
            part = Draft(task["uri"], PART_KIND, {}, tuple(task["inputs"])).begin()
            counts = embed_part(part, task["rows"], self._model, self._batch_size).counts
        except UserError as error:  # returned: Ray Data keeps the text of what is raised, and loses what it was
            return {"embedded": 0, "retries": storage.retries() - before, "error": str(error)}
        return {"embedded": counts["embedded"], "retries": storage.retries() - before, "error": ""}


def embed_part(part: Draft, rows_uri: str, model: Model, batch_size: int) -> Artifact:
    """Embed every row of one shard, in order, and write the part whole."""
    network = model.facts["network"]
    schema = embedding_schema(network["steps"], network["dimensions"], len(model.findings))
    rows = 0
    with (
        part.staged(EMBEDDINGS_FILE) as (local, entry),
        pq.ParquetWriter(local, schema, compression="zstd") as writer,
        storage.arrow_reader(rows_uri) as file,
    ):
        for batch in pq.ParquetFile(file).iter_batches(batch_size, columns=["pixel_sha256", "pixels"]):
            table = pa.Table.from_batches([batch])
            output = model.forward(pixels_of(table, model.recipe.size).copy())
            z_BE = output.z_PSBD.movedim(2, 0).flatten(1)
            joint_BE = output.joint_PBC.movedim(1, 0).flatten(1)
            columns = [
                pa.array(_pixel_ids(table["pixel_sha256"]), pa.int64()),
                _fixed(z_BE.cpu().numpy().astype(np.float16), schema.field("z").type),
                _fixed(joint_BE.cpu().numpy().astype(np.float16), schema.field("joint").type),
                _fixed(output.boxes_B4.cpu().numpy().astype(np.int32), schema.field("crop").type),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            rows += table.num_rows
    return part.finish([entry.value], {"embedded": rows})


def _fixed(values_BE: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_BE.reshape(-1)), type=kind)


@dataclass(frozen=True)
class Embedded:
    """Rows of one part: images `[N]`, what the network said about them, and the corpus' facts that were asked for."""

    z_PSND: torch.Tensor
    joint_PNC: torch.Tensor
    crop_N4: np.ndarray
    facts: pa.Table


def read_part(embeddings: Artifact, corpus: Corpus, part: int, model: Model, columns: list[str]) -> Embedded:
    """One part of the embeddings beside `columns` of its corpus rows, duplicates left out.

    Raises AccountingError where the two do not hold the same images in the same order.
    """
    network = model.facts["network"]
    with storage.arrow_reader(storage.join(embeddings.part_uris[part], EMBEDDINGS_FILE)) as file:
        table = pq.read_table(file)
    with storage.arrow_reader(storage.join(corpus.artifact.part_uris[part], ROWS_FILE)) as file:
        facts = pq.read_table(file, columns=["pixel_sha256", *(name for name in columns if name != "pixel_sha256")])
    if not np.array_equal(table["pixel_id"].to_numpy(), _pixel_ids(facts["pixel_sha256"])):
        raise artifacts.AccountingError(f"part {part} of {embeddings.uri} holds other images than the corpus")
    keep = np.setdiff1d(np.arange(table.num_rows), corpus.left_out(part))
    table, facts = table.take(pa.array(keep)), facts.take(pa.array(keep))
    shape = (len(keep), PASSES, network["steps"], network["dimensions"])
    z_NPSD = torch.as_tensor(_matrix(table["z"], np.float32).reshape(shape))
    joint_NPC = torch.as_tensor(_matrix(table["joint"], np.float32).reshape(len(keep), PASSES, len(model.findings)))
    return Embedded(z_NPSD.movedim(0, 2), joint_NPC.movedim(0, 1), _matrix(table["crop"], np.int32), facts)


def _pixel_ids(hashes: pa.ChunkedArray) -> np.ndarray:
    return np.array([int.from_bytes(value[:8], "big", signed=True) for value in hashes.to_pylist()], np.int64)


def _matrix(column: pa.ChunkedArray, kind: Any) -> np.ndarray:
    flat = np.asarray(pa.concat_arrays(column.chunks).flatten()) if column.num_chunks else np.zeros(0)
    return flat.astype(kind).reshape(len(column), column.type.list_size)
