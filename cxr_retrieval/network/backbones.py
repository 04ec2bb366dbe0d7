"""Backbones by name: greyscale images in, the feature maps of the last S stages out.

B images, C channels, H W map sides, S progressive steps.

The networks are those of Hugging Face `transformers`, built from a configuration, and `efficientnet`: nothing is
downloaded here.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_retrieval.network.efficientnet import HEAD, PUBLISHED, EfficientNetLite0

Normalisation = Literal["group", "batch", "frozen_batch"]

_STAGES = 4
_CLASSIFIER = ("classifier.", "pooler.", "layernorm.")


@dataclass(frozen=True)
class _Architecture:
    make: Callable[[int], nn.Module]
    """The network that gives the maps of its last so many stages."""
    prefix: str = ""
    """What the keys of a whole published model begin with."""
    heads: tuple[str, ...] = _CLASSIFIER
    """What the keys of a published classifier begin with that a backbone has no place for."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of keys in published weights, and what they are called now; in this order."""


def _of_transformers(model_type: str, stages: tuple[str, ...], settings: Mapping[str, Any], steps: int) -> nn.Module:
    from transformers import AutoBackbone, AutoConfig  # takes seconds: not for those who only want names

    config = AutoConfig.for_model(model_type, num_channels=1, out_features=list(stages[-steps:]), **settings)
    body: nn.Module = AutoBackbone.from_config(config)
    return body


def _convolutional(model_type: str, **settings: Any) -> _Architecture:
    stages = ("stage1", "stage2", "stage3", "stage4")
    return _Architecture(partial(_of_transformers, model_type, stages, settings), f"{model_type}.")


_BASIC: dict[str, Any] = {"depths": [2, 2, 2, 2], "layer_type": "basic"}
_ARCHITECTURES = {
    "resnet18_half": _convolutional("resnet", embedding_size=32, hidden_sizes=[32, 64, 128, 256], **_BASIC),
    "resnet18": _convolutional("resnet", embedding_size=64, hidden_sizes=[64, 128, 256, 512], **_BASIC),
    "resnet50": _convolutional(
        "resnet",
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
    ),
    "efficientnet_lite0": _Architecture(EfficientNetLite0, heads=HEAD, renamed=PUBLISHED),
    "convnextv2_tiny": _convolutional("convnextv2", hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3]),
    # A plain vision transformer: what chest X-ray foundation models are, RAD-DINO among them.
    "dinov2_base": _Architecture(
        partial(
            _of_transformers,
            "dinov2",
            ("stage3", "stage6", "stage9", "stage12"),
            {"image_size": 518, "reshape_hidden_states": True, "use_mask_token": False},
        ),
        "dinov2.",
        # Trained without masks, its token for them would be a parameter without a gradient, which DDP does not forgive.
        (*_CLASSIFIER, "embeddings.mask_token"),
        renamed={
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
        },
    ),
}
BACKBONES: tuple[str, ...] = tuple(_ARCHITECTURES)

# Keys of a backbone that no published classifier has.
_OPTIONAL = ("num_batches_tracked", "hidden_states_norms.")


class FrozenBatchNorm2d(nn.Module):
    """Batch norm that uses given statistics and a given affine part, and learns neither.

    It is no subclass of torch's batch norm, so that a conversion to `SyncBatchNorm` leaves it alone.

    Raises:
        ValueError: in training, if no statistics were loaded (mean 0 and variance 1 would normalise nothing).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.given = False
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.given = True

    def forward(self, features_BCHW: Tensor) -> Tensor:
        if self.training and not self.given:
            raise ValueError("normalisation 'frozen_batch' needs given weights; train from scratch with 'group'")
        return F.batch_norm(
            features_BCHW, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm (Wu and He 2018) with at most 16 groups of at least 4 channels, whose number divides `channels`."""
    return nn.GroupNorm(next(n for n in range(min(16, max(1, channels // 4)), 0, -1) if channels % n == 0), channels)


def new_norm(channels: int, normalisation: Normalisation) -> nn.Module:
    """The normalisation of layers that come without given weights: there is nothing yet that could be frozen."""
    return nn.BatchNorm2d(channels) if normalisation == "batch" else group_norm(channels)


class Backbone(nn.Module):
    """The last S stages of a network.

    `channels` lists the channels of each, from shallow to deep.
    """

    def __init__(self, name: str, body: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.channels = channels

    def forward(self, images_B1HW: Tensor) -> tuple[Tensor, ...]:
        """`images_B1HW`, float -> S maps [B, channels[s], H / stride, W / stride], from shallow to deep.

        The strides of four stages are 4, 8, 16 and 32; a vision transformer has one, 14 (sides are cut to multiples).
        """
        return tuple(self.body(images_B1HW).feature_maps)


def build_backbone(
    name: str, steps: int, weights: Mapping[str, Tensor] | None = None, normalisation: Normalisation = "group"
) -> Backbone:
    """A backbone of `BACKBONES` that gives its last `steps` (1 to 4) feature maps.

    Weights: keys as in `transformers`, of the backbone alone or of a whole published model (its prefix and classifier
    are left out). A 3-channel stem is summed to one channel, which is exact for a grey image that was given to all
    three, normalised alike.

    Normalisation is what replaces the batch norms of a ResNet (the others have layer norms, which stay):
      - `group`: independent of the batch, so of the number of workers too; as fast as batch norm on a CPU.
      - `batch`: torch's own, for large batches; under DDP the caller converts to SyncBatchNorm. The whole image and its
        crop pass through the same layers, so running statistics mix both, with the crop (last) weighing 53%.
      - `frozen_batch`: statistics and affine part of the given weights, never updated.

    Raises:
        ValueError: unknown name (with the nearest ones), `steps` or `normalisation` out of range, or weights of
            another network: the first missing, unexpected or wrong-shaped key is named.
    """
    if name not in _ARCHITECTURES:
        near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.3) or BACKBONES
        raise ValueError(f"unknown backbone {name!r}; nearest: {', '.join(near)}")
    if not 1 <= steps <= _STAGES:
        raise ValueError(f"steps must be 1 to {_STAGES}, got {steps}")
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"unknown normalisation {normalisation!r}; one of {', '.join(get_args(Normalisation))}")
    architecture = _ARCHITECTURES[name]
    body: Any = architecture.make(steps)
    if normalisation != "batch":
        _replace_batch_norms(body, normalisation)
    if weights is not None:
        _load(body, weights, architecture, name)
    return Backbone(name, body, list(body.channels))


def _replace_batch_norms(module: nn.Module, normalisation: Normalisation) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = normalisation == "frozen_batch"
            channels = child.num_features
            setattr(module, name, FrozenBatchNorm2d(channels, child.eps) if frozen else group_norm(channels))
        else:
            _replace_batch_norms(child, normalisation)


def _load(body: nn.Module, weights: Mapping[str, Tensor], architecture: _Architecture, name: str) -> None:
    expected = body.state_dict()
    given = {}
    for key, value in weights.items():
        stripped = key.removeprefix(architecture.prefix)
        for published, now in architecture.renamed.items():
            stripped = stripped.replace(published, now)
        is_head = stripped not in expected and stripped.startswith(architecture.heads)
        is_counter = stripped not in expected and stripped.endswith("num_batches_tracked")
        if not (is_head or is_counter):
            given[stripped] = value
    for key, tensor in expected.items():
        if key not in given:
            if any(part in key for part in _OPTIONAL):
                continue
            raise ValueError(f"weights do not fit backbone {name}: key {key!r} is missing")
        is_grey_kernel = tensor.dim() == 4 and tensor.shape[1] == 1
        if is_grey_kernel and given[key].shape == (tensor.shape[0], 3, *tensor.shape[2:]):
            given[key] = given[key].sum(dim=1, keepdim=True)
        if given[key].shape != tensor.shape:
            shapes = f"{list(given[key].shape)}, expected {list(tensor.shape)}"
            raise ValueError(f"weights do not fit backbone {name}: key {key!r} has shape {shapes}")
    for key in given:
        if key not in expected:
            hint = " (group norm has no statistics: use batch or frozen_batch)" if "running_" in key else ""
            raise ValueError(f"weights do not fit backbone {name}: key {key!r} is unexpected{hint}")
    body.load_state_dict(given, strict=False)
