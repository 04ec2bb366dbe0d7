"""Backbones: what they promise about names, weights and normalisation."""

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from cxr_retrieval.network.backbones import BACKBONES, build_backbone, group_norm
from cxr_retrieval.training.weights import read_weights

SIZE = 64


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state dict as a published colour classifier has it: prefix, 3-channel stem, statistics, classifier."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic", num_labels=7
    )
    model = ResNetForImageClassification(config).train()
    model(torch.rand(8, 3, SIZE, SIZE))
    return model.state_dict()


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_of_the_last_stages_from_shallow_to_deep(name):
    backbone = build_backbone(name, steps=3).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 1, SIZE, SIZE))
    strides = (14, 14, 14) if name.startswith("dinov2") else (8, 16, 32)
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, SIZE // stride, SIZE // stride)
        for channels, stride in zip(backbone.channels, strides, strict=True)
    ]


def test_a_published_vision_transformer_gives_a_grey_image_the_same_maps():
    """RAD-DINO and its like: a DINOv2 of 518 pixels for colour images, under the names that it was published with."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    colour = Dinov2Model(Dinov2Config(image_size=518)).eval()
    now = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    published = {}
    for key, value in colour.state_dict().items():
        for new, old in now.items():
            key = key.replace(f"attention.{new}", f"attention.{old}")
        published[key] = value
    images = torch.rand(1, 1, 70, 70)
    backbone = build_backbone("dinov2_base", steps=2, weights=published).eval()
    with torch.no_grad():
        expected = colour(images.expand(1, 3, 70, 70)).last_hidden_state[:, 1:]
        found = backbone(images)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def published_forward(weights: dict[str, torch.Tensor], colour_B3HW: torch.Tensor) -> list[torch.Tensor]:
    """EfficientNet-Lite0 written plainly over the published tensors: the maps that end each stride from 4 on."""

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int, bends: bool = True) -> torch.Tensor:
        kernel = weights[f"{conv}.weight"]
        side, groups = kernel.shape[2], x.shape[1] if kernel.shape[1] == 1 else 1
        over = max(0, side - stride)  # the sides here are multiples of every stride
        x = F.pad(x, (over // 2, over - over // 2) * 2)
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        statistics = [weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *statistics, training=False, eps=1e-3)
        return F.relu6(x) if bends else x

    x, found = layer(colour_B3HW, "_conv_stem", "_bn0", 2), []
    halves = {1, 3, 5, 11}
    for number in range(16):
        block, before = f"_blocks.{number}.", x
        if number in halves and number > 1:
            found.append(x)
        if number:
            x = layer(x, f"{block}_expand_conv", f"{block}_bn0", 1)
        x = layer(x, f"{block}_depthwise_conv", f"{block}_bn1", 2 if number in halves else 1)
        x = layer(x, f"{block}_project_conv", f"{block}_bn2", 1, bends=False)
        x = x + before if x.shape == before.shape else x
    return [*found, x]


@pytest.mark.parametrize("normalisation", ["batch", "frozen_batch"])
def test_the_imagenet_weights_give_a_grey_image_the_maps_that_their_network_gives(normalisation):
    weights = safetensors.torch.load(read_weights("imagenet"))
    images = torch.rand(2, 1, SIZE, 2 * SIZE)
    backbone = build_backbone("efficientnet_lite0", 4, weights, normalisation).eval()
    with torch.no_grad():
        expected, found = published_forward(weights, images.expand(-1, 3, -1, -1)), backbone(images)
    assert [tuple(maps.shape[1:]) for maps in found] == [(24, 16, 32), (40, 8, 16), (112, 4, 8), (320, 2, 4)]
    torch.testing.assert_close(found, tuple(expected), atol=1e-3, rtol=1e-4)
    assert found[-1].std() > 0.1, "trained weights, and no zeros"


@pytest.mark.parametrize("name", BACKBONES)
def test_whatever_can_be_trained_has_a_gradient(name):
    """Workers that share a training wait for the gradient of every parameter."""
    backbone = build_backbone(name, steps=3).train()
    sum(maps.square().mean() for maps in backbone(torch.rand(2, 1, SIZE, SIZE))).backward()
    assert [key for key, value in backbone.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_count_from_the_deepest_stage(steps):
    assert build_backbone("resnet18_half", steps).channels == [32, 64, 128, 256][-steps:]


def test_unknown_backbone_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet18half'; nearest: resnet18_half"):
        build_backbone("resnet18half", 3)


@pytest.mark.parametrize(
    ("arguments", "words"), [({"steps": 5}, "steps must be 1 to 4"), ({"normalisation": "grup"}, "'grup'")]
)
def test_settings_out_of_range_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_backbone("resnet18_half", **{"steps": 3} | arguments)


@pytest.mark.parametrize("normalisation", ["batch", "frozen_batch"])
def test_colour_weights_give_a_grey_image_the_same_maps(published, normalisation):
    from transformers import AutoBackbone, ResNetConfig

    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic")
    config.out_features = ["stage4"]
    colour = AutoBackbone.from_config(config).eval()
    keys = {key.removeprefix("resnet."): value for key, value in published.items()}
    colour.load_state_dict({key: value for key, value in keys.items() if not key.startswith("classifier")})
    grey = build_backbone("resnet18_half", 1, published, normalisation).eval()
    images_B1HW = torch.rand(2, 1, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(
            grey(images_B1HW)[0], colour(images_B1HW.expand(-1, 3, -1, -1)).feature_maps[0], atol=1e-4, rtol=1e-4
        )


KEY = "encoder.stages.1.layers.0.layer.0.convolution.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(f"resnet.{KEY}"), f"key '{KEY}' is missing"),
        (lambda w: w.update({"resnet.extra": torch.zeros(1)}), "key 'extra' is unexpected"),
        (lambda w: w.update({f"resnet.{KEY}": torch.zeros(64, 31, 3, 3)}), rf"key '{KEY}' has shape \[64, 31, 3, 3\]"),
    ],
)
def test_wrong_weights_are_refused_by_the_name_of_the_key(published, change, words):
    weights = dict(published)
    change(weights)
    with pytest.raises(ValueError, match=words):
        build_backbone("resnet18_half", 3, weights, "batch")


def test_statistics_are_refused_where_there_is_no_place_for_them(published):
    with pytest.raises(ValueError, match=r"running_mean' is unexpected \(group norm has no statistics"):
        build_backbone("resnet18_half", 3, published, "group")


def test_frozen_statistics_do_not_move_and_nothing_of_them_is_learnt(published):
    backbone = build_backbone("resnet18_half", 3, published, "frozen_batch").train()
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.rand(4, 1, SIZE, SIZE) * 9)
    assert all(torch.equal(before[name], buffer) for name, buffer in backbone.named_buffers())
    assert not any("normalization" in name for name, _ in backbone.named_parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())


def test_training_with_frozen_statistics_that_nobody_gave_is_refused(published):
    backbone = build_backbone("resnet18_half", 3, normalisation="frozen_batch")
    with pytest.raises(ValueError, match="needs given weights"):
        backbone.train()(torch.rand(2, 1, SIZE, SIZE))
    # Reading a trained model back is giving them.
    backbone.load_state_dict(build_backbone("resnet18_half", 3, published, "frozen_batch").state_dict())
    backbone.train()(torch.rand(2, 1, SIZE, SIZE))


@pytest.mark.parametrize("channels", [3, 6, 32, 100, 256, 2048])
def test_groups_divide_the_channels(channels):
    assert channels % group_norm(channels).num_groups == 0
