"""A small index of phantom radiographs, built and published without Ray: for searching and serving; and what tests of
indexes share."""

import datetime
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cxr_retrieval import storage
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.config import IndexSettings, NetworkSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.phantom import radiographs
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.index.build import KIND
from cxr_retrieval.index.files import shard_files
from cxr_retrieval.index.plan import plan_index
from cxr_retrieval.index.quantizer import QUANTIZER_FILE, index_of, train
from cxr_retrieval.index.shards import INDEX_FILE
from cxr_retrieval.index.source import SIDECAR, THUMBNAIL_GROUP
from cxr_retrieval.index.versions import publish
from cxr_retrieval.network.progressive import embeddings, uncentred
from cxr_retrieval.privacy import row_id
from cxr_retrieval.training.model import KIND as MODEL_KIND
from cxr_retrieval.training.model import MODEL_FILE, WEIGHTS_FILE, Model, build_network, normalised, write_model

SIZE, FILM = 64, 128
RECIPE = Recipe(SIZE, "letterbox")
NETWORK = NetworkSettings(dimensions=16)


@dataclass(frozen=True)
class Film:
    """A phantom radiograph: its PNG file, prepared pixels, and the facts of its sidecar row."""

    png: bytes
    pixels: np.ndarray
    facts: Mapping[str, Any]


def films(count: int, missing: bool = True) -> list[Film]:
    """So many phantoms. Of some the archive does not tell everything, where something may be `missing`."""
    drawn: list[Film] = []
    for patient in radiographs.patients_for(count, 0):
        for image in radiographs.draw_patient(patient, 0, FILM)[: count - len(drawn)]:
            n = len(drawn)
            done, data = cv2.imencode(".png", image.pixels)
            assert done
            pixels = RECIPE.resize(image.pixels)
            tells = not (missing and n % 7 == 3)
            facts = {
                "id": row_id(image.image_id),
                "image_id": image.image_id,
                "patient": image.patient_id,
                "study_date": datetime.date(2020, 1, 1) + datetime.timedelta(days=10 * n) if tells else None,
                "view": image.view if tells else None,
                "sex": image.sex if tells else None,
                "age_years": image.age_years if tells else None,
                "findings": list(image.findings),
                "unknown": [name for name in FINDINGS[n % 14 : n % 14 + 2] if name not in image.findings]
                if missing and n % 3 == 0
                else [],
                "source": f"images/{image.image_id}",
                "pixel_sha256": hashlib.sha256(pixels.tobytes()).digest(),
                "held_out": False,
            }
            drawn.append(Film(bytes(data), pixels, facts))
    return drawn


def model_files(workspace: Path, images: list[Film], seed: int = 0) -> tuple[bytes, bytes]:
    """`model.json` and the weights of a model that has learnt nothing."""
    torch.manual_seed(seed)
    network = build_network(NETWORK, len(FINDINGS)).eval()
    with torch.inference_mode():
        vectors = uncentred(network(normalised(np.stack([film.pixels for film in images[:16]]), RECIPE)))
    facts = {
        "network": NETWORK.model_dump(),
        "findings": list(FINDINGS),
        "chosen": "combined",
        "decode_recipe": RECIPE.to_json(),
    }
    draft = Draft.under(str(workspace / "models"), "model", {"seed": seed}, ()).begin()
    centring = {name: vector.mean(0) for name, vector in vectors.items()}
    artifact = write_model(draft, facts, network.state_dict(), centring, torch.zeros(6, 15, 16), {"steps": 0})
    return artifact.read(MODEL_FILE), artifact.read(WEIGHTS_FILE)


def build(
    workspace: Path,
    images: list[Film],
    files: tuple[bytes, bytes],
    *,
    embedding: str = "combined",
    shards: int = 2,
    lists: int = 0,
    **facts: Any,
) -> Artifact:
    """A built index of the films; `facts` replace those of `index.json`."""
    model = Model.parse(*files)
    output = model.forward(np.stack([film.pixels for film in images]))
    rows_ND = embeddings(output, model.centring)[embedding].numpy().astype(np.float16)
    crops = output.boxes_B4.tolist()
    plan = replace(plan_index(len(images), rows_ND.shape[1], IndexSettings()), lists=lists)
    trained = train(plan, rows_ND) if lists else None
    shape = {"embedding": embedding, "lists": lists, "shards": shards, "images": len(images)}
    settings = {**shape, "pseudonymised": None, **facts}
    draft = Draft.under(str(workspace / "builds"), KIND, settings, ()).begin()
    entries = [draft.write(f"model/{name}", data) for name, data in zip((MODEL_FILE, WEIGHTS_FILE), files, strict=True)]
    if trained:
        entries.append(draft.write(QUANTIZER_FILE, trained.quantizer))
    edges = np.linspace(0, len(images), shards + 1).astype(int)
    for number in range(shards):
        part, paths = slice(edges[number], edges[number + 1]), shard_files(number)
        array = io.BytesIO()
        np.save(array, rows_ND[part], allow_pickle=False)
        entries.append(draft.write(paths["rows"], array.getvalue()))
        with draft.staged(paths["faiss"]) as (local, entry):
            faiss.write_index(index_of(plan, rows_ND[part], trained), str(local))
        entries.append(entry.value)
        sidecar = [{**film.facts, "crop": crop} for film, crop in zip(images[part], crops[part], strict=True)]
        pictures = [bytes(cv2.imencode(".jpg", film.pixels)[1]) for film in images[part]]
        for kind, table, group in (
            ("sidecar", pa.Table.from_pylist(sidecar, schema=SIDECAR), 5),  # several row groups, as a large shard has
            ("thumbnails", pa.table({"jpeg": pictures}), THUMBNAIL_GROUP),
        ):
            with draft.staged(paths[kind]) as (local, entry):
                pq.write_table(table, local, row_group_size=group)
            entries.append(entry.value)
    described = {
        "embedding": embedding,
        "dimensions": plan.dimensions,
        "rows": len(images),
        "shards": shards,
        "factory": plan.factory,
        "lists": lists,
        "probes": 1,
        "filter_probes": [],
        "candidates": plan.code.candidates,
        "findings": model.findings,
        "decode_recipe": RECIPE.to_json(),
        "decode_recipe_id": RECIPE.id,
        "corpus": "0" * 20,
        "model": "1" * 20,
        "pseudonymised": False,
        "proof": {"far_distance": 1.9},
        **facts,
    }
    entries.append(draft.write(INDEX_FILE, json.dumps(described).encode()))
    return draft.finish(entries, {"indexed": len(images)}, [])


def published(workspace: Path, index: Artifact, alias: str = "latest") -> str:
    """Publish a build; the reference of the alias."""
    to = str(workspace / "indexes" / "phantoms")
    publish(index, to, alias)
    return f"{to}@{alias}"


def untrained_model(
    workspace: str, corpus: Corpus, settings: NetworkSettings, recipe: Recipe | None = None
) -> Artifact:
    """A model with fresh weights: nothing here depends on what it has learnt."""
    recipe = recipe or corpus.recipe
    torch.manual_seed(0)
    network = build_network(settings, len(FINDINGS)).eval()
    with torch.inference_mode():
        pixels = pixels_of(pq.read_table(corpus.files[0], columns=["pixels"]).slice(0, 16), corpus.recipe.size)
        vectors = uncentred(network(normalised(pixels.copy(), recipe)))
    facts = {
        "network": settings.model_dump(),
        "findings": list(FINDINGS),
        "chosen": "combined",
        "decode_recipe": recipe.to_json(),
    }
    draft = Draft("", MODEL_KIND, {"recipe": recipe.id}, ())
    draft = Draft(storage.join(workspace, "models", draft.input_id), MODEL_KIND, draft.settings, ()).begin()
    centring = {name: vector.mean(0) for name, vector in vectors.items()}
    return write_model(draft, facts, network.state_dict(), centring, torch.zeros(6, 15, 16), {"steps": 0})


def values_of(table: pa.Table) -> Iterator[bytes]:
    """Every text and binary value of a table, however deep, decompressed."""

    def walk(value: Any) -> Iterator[bytes]:
        if isinstance(value, list | tuple):
            for item in value:
                yield from walk(item)
        elif isinstance(value, dict):
            yield from walk(list(value.items()))
        elif isinstance(value, bytes):
            yield value
        elif value is not None:
            yield str(value).encode()

    yield from walk(table.to_pylist())
    yield repr(table.schema).encode()
    yield repr(table.schema.metadata).encode()
