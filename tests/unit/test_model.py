"""The model artifact: what is written is what is opened, bit for bit, and what does not fit is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from cxr_retrieval.artifacts import Artifact, CorruptArtifact, Draft
from cxr_retrieval.config import NetworkSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.errors import UserError
from cxr_retrieval.network.progressive import ARCHITECTURE, embeddings, uncentred
from cxr_retrieval.training.model import KIND, MODEL_FILE, WEIGHTS_FILE, Model, build_network, normalised, write_model

SIZE, IMAGES = 64, 4
RECIPE = Recipe(SIZE, "letterbox")
NETWORK = NetworkSettings(backbone="resnet18_half", steps=3, dimensions=16, crop_side=48)
KEY = "encoder.stages.1.layers.0.layer.0.convolution.weight"


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (IMAGES, SIZE, SIZE), np.uint8)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A network that has seen some images, its centring, and its artifact."""
    torch.manual_seed(0)
    network = build_network(NETWORK, len(FINDINGS))
    network.train()
    network(normalised(pixels(1), RECIPE))
    network.eval()
    with torch.inference_mode():
        centring = {name: v.mean(0) for name, v in uncentred(network(normalised(pixels(1), RECIPE))).items()}
    facts = {
        "network": NETWORK.model_dump(),
        "findings": list(FINDINGS),
        "chosen": "combined",
        "decode_recipe": RECIPE.to_json(),
        "corpus": "0123456789",
    }
    draft = Draft(str(tmp_path_factory.mktemp("models") / "model"), KIND, {"seed": 0}, ("0123456789",)).begin()
    centres_TCD = torch.randn(6, 15, 16)
    return network, centring, write_model(draft, facts, network.state_dict(), centring, centres_TCD, {"steps": 1})


def copied(artifact: Artifact, folder: Path) -> Path:
    for path in Path(artifact.uri).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_opened_model_gives_the_embeddings_of_the_one_written(written):
    network, centring, artifact = written
    with torch.inference_mode():
        expected = embeddings(network(normalised(pixels(), RECIPE)), centring)
    model = Model.open(artifact.uri)
    found = embeddings(model.forward(pixels()), model.centring)
    assert tuple(found) == tuple(expected) == model.embedding_names
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.network.training


def test_an_image_is_embedded_alike_alone_and_in_company(written):
    model = Model.open(written[2].uri)
    together = embeddings(model.forward(pixels()), model.centring)
    alone = embeddings(model.forward(pixels()[2:3]), model.centring)
    for name, vector in alone.items():
        torch.testing.assert_close(vector[0], together[name][2], atol=1e-4, rtol=0, msg=name)


def test_model_json_says_what_a_reader_needs(written):
    artifact = written[2]
    facts = json.loads((Path(artifact.uri) / MODEL_FILE).read_text())
    assert facts["findings"] == list(FINDINGS)
    assert Recipe.from_json(facts["decode_recipe"]) == RECIPE
    assert facts["chosen"] == artifact.manifest["chosen"] == "combined"
    assert artifact.manifest["decode_recipe_id"] == RECIPE.id
    assert facts["corpus"] == "0123456789"
    assert NetworkSettings.model_validate(facts["network"]) == NETWORK
    model = Model.open(artifact.uri)
    assert (model.recipe, model.chosen, model.findings) == (RECIPE, "combined", list(FINDINGS))


def test_a_model_of_another_architecture_is_refused(written):
    _, _, artifact = written
    facts = json.loads(artifact.read(MODEL_FILE)) | {"architecture": ARCHITECTURE - 1}
    with pytest.raises(UserError, match=f"architecture {ARCHITECTURE - 1}.* train it again"):
        Model.parse(json.dumps(facts).encode(), artifact.read(WEIGHTS_FILE))


def test_nothing_in_the_artifact_can_be_executed(written):
    artifact = written[2]
    names = {path.name for path in Path(artifact.uri).iterdir()}
    assert names == {"plan.json", "manifest.json", MODEL_FILE, WEIGHTS_FILE}
    for path in Path(artifact.uri).iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))  # torch.save's archive, and a bare pickle
        if path.name == WEIGHTS_FILE:
            assert set(safetensors.torch.load(data)) >= {"centres", "centring.combined"}
        else:
            json.loads(data)


@pytest.mark.parametrize("file", [WEIGHTS_FILE, MODEL_FILE])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_refused_by_the_name_of_the_file(written, tmp_path, file, where):
    path = copied(written[2], tmp_path) / file
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=rf"{file}: the bytes are not those of the manifest"):
        Model.open(str(tmp_path))


def test_a_missing_file_and_an_unfinished_model_are_refused(written, tmp_path):
    folder = copied(written[2], tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE}: the file that the manifest names is missing"):
        Model.open(str(tmp_path))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no finished model at .*: it is unfinished"):
        Model.open(str(tmp_path))
    with pytest.raises(UserError, match="it is not there"):
        Model.open(str(tmp_path / "nowhere"))


# Given weights


@pytest.fixture(scope="module")
def given_weights():
    torch.manual_seed(7)
    body = build_network(NETWORK, len(FINDINGS)).backbone.body
    return {name: tensor.clone().contiguous() for name, tensor in body.state_dict().items()}


def saved(weights, folder: Path) -> NetworkSettings:
    safetensors.torch.save_file(weights, folder / "backbone.safetensors")
    return NETWORK.model_copy(update={"weights": str(folder / "backbone.safetensors")})


def test_given_backbone_weights_are_loaded(given_weights, tmp_path):
    torch.manual_seed(8)
    network = build_network(saved(given_weights, tmp_path), len(FINDINGS))
    loaded = network.backbone.body.state_dict()
    assert set(loaded) == set(given_weights)
    assert all(torch.equal(loaded[name], given_weights[name]) for name in given_weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update({KEY: torch.zeros(64, 31, 3, 3)}), rf"key '{KEY}' has shape \[64, 31, 3, 3\], expected"),
        (lambda w: w.pop(KEY), f"key '{KEY}' is missing"),
        (lambda w: w.update({"extra": torch.zeros(1)}), "key 'extra' is unexpected"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_name_of_the_key(given_weights, tmp_path, change, words):
    weights = dict(given_weights)
    change(weights)
    with pytest.raises(UserError, match=words):
        build_network(saved(weights, tmp_path), len(FINDINGS))


def test_weights_that_are_not_there_or_no_safetensors_are_refused_by_the_name_of_the_file(tmp_path):
    file = tmp_path / "backbone.safetensors"
    settings = NETWORK.model_copy(update={"weights": str(file)})
    with pytest.raises(UserError, match=r"network\.weights=.*backbone\.safetensors: there is no such file"):
        build_network(settings, len(FINDINGS))
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"network\.weights=.*backbone\.safetensors is not a safetensors file"):
        build_network(settings, len(FINDINGS))


def test_an_unknown_backbone_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"unknown backbone 'resnet18half'; nearest: resnet18_half"):
        build_network(NETWORK.model_copy(update={"backbone": "resnet18half"}), len(FINDINGS))


def test_the_seed_fixes_the_initial_weights():
    def drawn(seed: int):
        torch.manual_seed(seed)
        return build_network(NETWORK, len(FINDINGS)).state_dict()

    one, same, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_pixels_are_normalised_by_the_recipe():
    images_B1HW = normalised(np.asarray([[[0, 255], [51, 204]]], np.uint8), Recipe(2, "stretch"))
    torch.testing.assert_close(images_B1HW, torch.tensor([[[[-2.0, 2.0], [-1.2, 1.2]]]]))
