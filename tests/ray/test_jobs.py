"""Promises of the jobs from an archive to a search, run by their command lines."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cxr_retrieval import storage
from cxr_retrieval.artifacts import MANIFEST, Draft
from cxr_retrieval.config import NetworkSettings
from cxr_retrieval.corpus.decoding import Limits, Recipe, decode
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.index import cache
from cxr_retrieval.index.aliases import list_aliases
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.versions import list_versions
from cxr_retrieval.network.progressive import uncentred
from cxr_retrieval.privacy import KEY_VARIABLE
from cxr_retrieval.training.model import KIND as MODEL_KIND
from cxr_retrieval.training.model import build_network, normalised, write_model
from tests.commands import done, job

IMAGES = 96
SMALL = [
    "corpus.partition_images=32",
    "corpus.row_group_images=16",
    "index.shard_rows=40",
    "evaluation.draws=100",
    "embedding.workers=1",
]
PUBLIC = "privacy.pseudonymise=false"

pytestmark = pytest.mark.usefixtures("ray_session", "environment")


@dataclass(frozen=True)
class World:
    workspace: str
    archive: Path
    model: str
    index: str
    words: list[str]
    """Settings under which the index was built and published."""

    @property
    def image(self) -> str:
        """An image with a finding of a patient who has several images."""
        rows = label_rows(self.archive)
        patients = [row["Patient ID"] for row in rows]
        name = next(
            row["Image Index"]
            for row in rows
            if row["Finding Labels"] != "No Finding" and patients.count(row["Patient ID"]) > 2
        )
        return str(self.archive / "images" / name)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.delenv(KEY_VARIABLE, raising=False)
        yield


def untrained_model(workspace: str, archive: Path, size: int = 64) -> str:
    """A model with fresh weights: nothing here depends on what it has learnt."""
    settings, recipe = NetworkSettings(dimensions=16), Recipe(size, "letterbox")
    files = sorted((archive / "images").iterdir())[:12]
    pixels = np.stack([decode(path.read_bytes(), recipe, Limits(32, 10**8)).pixels for path in files])
    torch.manual_seed(0)
    network = build_network(settings, len(FINDINGS)).eval()
    with torch.inference_mode():
        vectors = uncentred(network(normalised(pixels, recipe)))
    facts = {"network": settings.model_dump(), "findings": list(FINDINGS), "chosen": "combined"}
    facts["decode_recipe"] = recipe.to_json()
    facts["label_tables"] = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in archive.glob("*.csv"))
    facts["split"] = {"split": "hash", "split_seed": 0, "validation_share": 0.1, "test_share": 0.2}
    draft = Draft("", MODEL_KIND, {"recipe": recipe.id}, ())
    draft = Draft(storage.join(workspace, "models", draft.input_id), MODEL_KIND, draft.settings, ()).begin()
    centring = {name: vector.mean(0) for name, vector in vectors.items()}
    return write_model(draft, facts, network.state_dict(), centring, torch.zeros(6, 15, 16), {"steps": 0}).uri


@pytest.fixture(scope="module")
def world(phantom_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    workspace = str(tmp_path_factory.mktemp("jobs") / "workspace")
    model = untrained_model(workspace, phantom_archive)
    words = [f"workspace={workspace}", f"corpus.archive={phantom_archive}", f"model={model}", *SMALL, PUBLIC]
    index = f"{workspace}/indexes/chest"
    done("publish", *words)
    return World(workspace, phantom_archive, model, index, words)


def search(world: World, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done("search", *words, "--index", world.index, "--json"))
    return found


def patient_of(path: str) -> str:
    return str(int(Path(path).name[:8]))


# ---- from archive to version


def test_publishing_builds_what_is_missing_and_the_second_time_does_nothing(world: World) -> None:
    assert list(list_aliases(world.index)) == ["latest"]
    (version,) = list_versions(world.index)
    again = done("publish", *world.words)
    assert "served before, nothing to do" in again
    assert version in again
    assert f"{world.index}@latest" in re.sub(r"[\s\u2502\u2503]", "", again)
    assert list_versions(world.index) == [version]


def test_index_says_what_it_built(world: World) -> None:
    shown = done("index", *world.words)
    assert "finished before, nothing to do" in shown
    assert re.search(rf"{IMAGES} . +{IMAGES} . +3 . SQfp16 +. +1 . 1\.000", shown), shown


def test_another_archive_is_all_test_and_has_no_archive_gallery(world: World) -> None:
    shown = done("evaluate", *world.words)
    assert "chosen on validation patients: combined" not in shown  # it goes to standard error
    assert "Recall@2" in shown
    (file,) = Path(world.workspace, "reports", "evaluation").glob("*/evaluation.json")
    figures = json.loads(file.read_bytes())
    assert figures["images"] == IMAGES
    for tables in (*figures["embeddings"].values(), *figures["floors"].values()):
        assert set(tables) == {"all", "findings", "same_view"}
    assert "finished before, nothing to do" in done("evaluate", *world.words)


def test_a_model_evaluated_on_the_archive_it_learnt_from_is_no_held_out_figure_and_says_so(
    world: World, tmp_path: Path
) -> None:
    warning = "warning: the model was trained on this very archive by another split"
    assert warning in job("evaluate", *world.words).err
    assert warning not in job("evaluate", *world.words, "corpus.split=hash", f"workspace={tmp_path}").err


def test_plans_say_what_would_run_and_leave_no_trace(world: World, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(world.workspace).rglob("*")}
    assert "Plan of index" in done("index", *world.words, "--plan")
    assert "Plan of evaluate" in done("evaluate", *world.words, "--plan")
    assert "Plan of publish" in done("publish", *world.words, "--plan")
    assert "Plan of search" in done("search", world.image, "--index", world.index, "--plan")
    assert {path: path.stat().st_mtime_ns for path in Path(world.workspace).rglob("*")} == before
    words = [f"workspace={tmp_path / 'none'}", f"corpus.archive={world.archive}"]
    assert "Plan of prepare" in done("prepare", *words, "--plan")
    assert not (tmp_path / "none").exists()


def test_without_a_key_a_pseudonymised_index_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    workspace, short_key = tmp_path / "none", tmp_path / "key"
    short_key.write_text("too short\n")
    for name in ("prepare", "index", "publish", "pipeline"):
        words = [f"workspace={workspace}", f"corpus.archive={world.archive}"]
        assert "set CXR_PRIVACY_KEY or privacy.key_file" in job(name, *words).error
        assert "16 bytes" in job(name, *words, f"privacy.key_file={short_key}").error
    assert not workspace.exists()


def test_a_model_that_is_not_there_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    words = [word for word in world.words if not word.startswith("model=")]
    for name in ("evaluate", "index"):
        assert "no finished model at" in job(name, *words, f"model={tmp_path / 'none'}").error
    assert "is a corpus" in job("index", *words, f"model={a_corpus(world)}").error


def a_corpus(world: World) -> Path:
    (found,) = Path(world.workspace, "corpora", "chest").glob(f"*/{MANIFEST}")
    return found.parent


# ---- searching


def test_json_has_everything_that_is_known_of_a_hit(world: World) -> None:
    (found,) = search(world, world.image)
    assert set(found) == {
        *("image", "known_as", "findings", "scores", "crop"),
        *("passing", "nothing_similar", "warning", "hits"),
    }
    assert (found["image"], found["known_as"]) == (world.image, Path(world.image).name)
    assert set(found["scores"]) == set(FINDINGS)
    assert len(found["hits"]) == 8
    assert found["passing"] >= len(found["hits"])
    assert (found["nothing_similar"], found["warning"]) == (False, None)
    fields = "rank distance image_id patient study_date view sex age_years findings crop source shard row shared"
    labels = {row["Image Index"]: row for row in label_rows(world.archive)}
    for rank, hit in enumerate(found["hits"], start=1):
        assert set(hit) == set(fields.split())
        assert hit["rank"] == rank
        label = labels[hit["image_id"]]
        assert hit["findings"] == [name for name in FINDINGS if name in label["Finding Labels"].split("|")]
        assert (hit["patient"], hit["view"]) == (label["Patient ID"], label["View Position"])
        assert (hit["sex"], hit["age_years"]) == (label["Patient Gender"], int(label["Patient Age"]))
        assert hit["shared"] == [name for name in hit["findings"] if name in found["findings"]]
        assert Path(hit["source"]).is_file()
    distances = [hit["distance"] for hit in found["hits"]]
    assert distances == sorted(distances)


def label_rows(archive: Path) -> list[dict[str, str]]:
    (table,) = archive.glob("Data_Entry*.csv")
    return list(csv.DictReader(table.read_text().splitlines()))


def test_the_own_patient_is_left_out_unless_asked_for(world: World) -> None:
    own = patient_of(world.image)
    (default,) = search(world, world.image)
    assert own not in {hit["patient"] for hit in default["hits"]}
    (asked,) = search(world, world.image, "search.exclude_own_patient=false")
    assert asked["hits"][0]["image_id"] == Path(world.image).name
    assert asked["hits"][0]["distance"] < 0.01
    other = default["hits"][0]["patient"]
    (left,) = search(world, world.image, "--patient", other)
    assert not {own, other} & {hit["patient"] for hit in left["hits"]}
    assert len(left["hits"]) == 8


def test_every_hit_is_another_patient_where_one_of_each_is_asked_for(world: World) -> None:
    (every,) = search(world, world.image, "-k", "500")
    patients = list(dict.fromkeys(hit["patient"] for hit in every["hits"]))
    (once,) = search(world, world.image, "-k", "500", "--one-per-patient")
    assert [hit["patient"] for hit in once["hits"]] == patients
    assert len(patients) < len(every["hits"])


def test_k_larger_than_the_index_gives_all_there_is(world: World) -> None:
    own = sum(patient_of(path.name) == patient_of(world.image) for path in (world.archive / "images").iterdir())
    (found,) = search(world, world.image, "-k", "500")
    assert len(found["hits"]) == len({hit["image_id"] for hit in found["hits"]}) == IMAGES - own
    (found,) = search(world, world.image, "-k", "500", "search.exclude_own_patient=false")
    assert len(found["hits"]) == IMAGES
    assert len(search(world, world.image, "-k", "3")[0]["hits"]) == 3


@pytest.mark.parametrize("k", ["0", "-1", "1001"])
def test_a_number_of_hits_that_makes_no_sense_is_refused(k: str, world: World) -> None:
    assert f"search.k={k}" in job("search", world.image, "--index", world.index, "-k", k).error


def test_several_queries_are_answered_in_order(world: World) -> None:
    images = sorted(str(path) for path in (world.archive / "images").iterdir())[:3]
    assert [found["image"] for found in search(world, *images)] == images


def test_a_table_shows_the_hits_and_marks_shared_findings(world: World) -> None:
    (found,) = search(world, world.image)
    shown = done("search", world.image, "--index", f"{world.index}@latest")
    for hit in found["hits"]:
        assert hit["image_id"] in shown
        assert f"{hit['distance']:.3f}" in shown
    assert f"{', '.join(found['findings'])} (* shared)" in " ".join(shown.split())
    for hit in found["hits"]:
        for name in hit["findings"]:
            assert (f"{name}*" in shown) == (name in found["findings"])


def test_a_version_is_as_good_as_an_alias(world: World) -> None:
    (version,) = list_versions(world.index)
    words = [world.image, "--json", "--index"]
    assert done("search", *words, f"{world.index}@{version}") == done("search", *words, f"{world.index}@latest")


def test_thumbnails_decode(world: World) -> None:
    retriever = Retriever.open(world.index)
    for case in retriever.search(retriever.query(Path(world.image).read_bytes()), 96).cases:
        picture = cv2.imdecode(np.frombuffer(retriever.thumbnail(case), np.uint8), cv2.IMREAD_UNCHANGED)
        assert picture.shape == (64, 64)


def test_a_gallery_opens_offline_and_holds_its_images(world: World, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    outcome = job("search", world.image, "--index", world.index, "--gallery", str(page))
    assert outcome.code == 0
    assert str(page) in outcome.err
    html = page.read_text()
    assert not re.search(r"https?://|@import|url\(|<link", html)
    pictures = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    assert len(pictures) >= 1 + 8
    for picture in pictures:
        assert cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_UNCHANGED) is not None
    for hit in search(world, world.image)[0]["hits"]:
        assert hit["image_id"] in html


def test_a_pseudonymised_index_answers_without_a_name_of_the_archive(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a key of sixteen bytes or more")
    to, page = tmp_path / "published", tmp_path / "out.html"
    words = [word for word in world.words if word != PUBLIC]
    done("publish", *words, f"publish.to={to}")
    monkeypatch.delenv(KEY_VARIABLE)  # who searches needs no key
    shown = done("search", world.image, "--index", str(to), "--json", "--gallery", str(page), "-k", "96")
    (found,) = json.loads(shown)
    stems = [path.stem for path in (world.archive / "images").iterdir()]
    texts = [json.dumps(found["hits"]), found["known_as"], page.read_text()]
    texts += [path.read_text() for path in to.rglob("*.json")]
    assert not [stem for stem in stems for text in texts if stem in text]
    assert not [text for text in texts if str(world.archive) in text]
    assert all(re.fullmatch("[0-9a-f]{20}", hit["patient"]) for hit in found["hits"])
    own = sum(patient_of(stem) == patient_of(world.image) for stem in stems)
    assert len(found["hits"]) == IMAGES - own  # the own patient is known by the picture


@pytest.mark.parametrize("kind", ["colour", "sixteen bits", "jpeg", "palette", "not square"])
def test_queries_may_be_of_any_usual_kind(kind: str, world: World, tmp_path: Path) -> None:
    grey = cv2.imread(world.image, cv2.IMREAD_GRAYSCALE)
    path = tmp_path / ("query.jpg" if kind == "jpeg" else "query.png")
    if kind == "colour":
        cv2.imwrite(str(path), cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))
    elif kind == "sixteen bits":
        cv2.imwrite(str(path), windowed(grey).astype(np.uint16) * 40 + 1000)
    elif kind == "jpeg":
        cv2.imwrite(str(path), grey, [cv2.IMWRITE_JPEG_QUALITY, 95])
    elif kind == "palette":
        Image.fromarray(grey).convert("P").save(path)
    else:
        cv2.imwrite(str(path), grey[16:-16])
    (found,) = search(world, str(path), "search.exclude_own_patient=false")
    assert len(found["hits"]) == 8
    if kind in ("colour", "palette"):  # the same pixels: the image is known
        assert found["known_as"] == Path(world.image).name
    if kind == "jpeg":
        assert found["hits"][0]["image_id"] == Path(world.image).name
    if kind == "sixteen bits":  # as the 8-bit export through the same window is answered
        cv2.imwrite(str(tmp_path / "export.png"), windowed(grey))
        (export,) = search(world, str(tmp_path / "export.png"), "search.exclude_own_patient=false")
        assert found["hits"] == export["hits"]


def windowed(grey: np.ndarray) -> np.ndarray:
    return cv2.normalize(grey, None, 0, 255, cv2.NORM_MINMAX)


def test_a_name_of_a_file_with_spaces_and_brackets_is_a_name(world: World, tmp_path: Path) -> None:
    path = tmp_path / "a film [PA] :x:.png"
    shutil.copy(world.image, path)
    assert search(world, str(path))[0]["image"] == str(path)
    assert path.name in " ".join(done("search", str(path), "--index", world.index).split())


def test_searching_without_an_image_or_an_index_is_refused(world: World) -> None:
    assert "no image to search with" in job("search", "--index", world.index).error
    missing = job("search", world.image)
    assert missing.code == 2
    assert "--index" in missing.err


def test_an_unknown_alias_names_those_that_exist(world: World) -> None:
    line = job("search", world.image, "--index", f"{world.index}@nonsense").error
    assert "there is no alias 'nonsense'; it has latest" in line


def test_searching_needs_no_cluster(world: World) -> None:
    code = (
        "import runpy, sys; sys.argv[0] = 'jobs.search'; runpy.run_module('jobs.search', run_name='__main__');"
        "ray = sys.modules.get('ray'); assert ray is None or not ray.is_initialized()"
    )
    words = [world.image, "--index", world.index, "--json", "-k", "2"]
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads(ended.stdout)
    here = search(world, world.image, "-k", "2")[0]["hits"]
    for there, hit in zip(found["hits"], here, strict=True):
        # Another process may have another number of threads, and round otherwise.
        assert there.pop("distance") == pytest.approx(hit.pop("distance"), abs=1e-5)
    assert found["hits"] == here


def test_the_embedded_rows_are_those_of_the_archive(world: World) -> None:
    embedded: list[int] = []
    for path in Path(world.workspace, "embeddings", "parts").glob("*/embeddings.parquet"):
        embedded += pq.read_table(path, columns=["pixel_id"])["pixel_id"].to_pylist()
    prepared: list[bytes] = []
    for path in Path(world.workspace, "corpora").glob("*/parts/*/rows.parquet"):
        prepared += pq.read_table(path, columns=["pixel_sha256"])["pixel_sha256"].to_pylist()
    assert sorted(embedded) == sorted(int.from_bytes(value[:8], "big", signed=True) for value in prepared)
    assert len(embedded) == len(list((world.archive / "images").iterdir()))
