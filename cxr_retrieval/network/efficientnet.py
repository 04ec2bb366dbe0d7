"""EfficientNet-Lite0: the network of Tan and Le 2019 without squeeze-and-excitation and with ReLU6, for grey images.

It is here because its ImageNet weights install as a package, where a cluster has no way to a hub. B images, C channels,
H W map sides.
"""

from types import SimpleNamespace
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

# Each stage: blocks, kernel's side, stride of the first block, expansion, channels (Tan and Le 2019, table 1).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM = 32
_EPS, _MOMENTUM = 1e-3, 0.01


class _Layer(nn.Module):
    """Convolution, norm and ReLU6, padded as TensorFlow pads: what is odd goes to the right and to the bottom."""

    def __init__(
        self, given: int, made: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, bends: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, made, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(made, eps=_EPS, momentum=_MOMENTUM)
        self.bends = bends

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        H, W = maps_BCHW.shape[2:]
        over_h, over_w = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in (H, W))
        if over_h or over_w:
            maps_BCHW = F.pad(maps_BCHW, (over_w // 2, over_w - over_w // 2, over_h // 2, over_h - over_h // 2))
        maps_BCHW = self.norm(self.conv(maps_BCHW))
        return F.relu6(maps_BCHW, inplace=True) if self.bends else maps_BCHW


class _Block(nn.Module):
    """Inverted residual: wider, a convolution of each channel by itself, narrower again."""

    def __init__(self, given: int, made: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = given * expansion
        self.expand = _Layer(given, wide) if expansion > 1 else nn.Identity()
        self.depthwise = _Layer(wide, wide, kernel, stride, groups=wide)
        self.project = _Layer(wide, made, bends=False)
        self.residual = stride == 1 and given == made

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        made_BCHW = cast(Tensor, self.project(self.depthwise(self.expand(maps_BCHW))))
        return maps_BCHW + made_BCHW if self.residual else made_BCHW


# Parts of the keys of the published weights, and what they are called here.
PUBLISHED = {
    "_conv_stem": "stem.conv",
    "_blocks": "blocks",
    "_expand_conv": "expand.conv",
    "_depthwise_conv": "depthwise.conv",
    "_project_conv": "project.conv",
    "._bn0": ".expand.norm",
    "._bn1": ".depthwise.norm",
    "._bn2": ".project.norm",
    "_bn0": "stem.norm",
}
HEAD = ("_conv_head.", "_bn1.", "_fc.")


class EfficientNetLite0(nn.Module):
    """The features before the classifier's own layers: the last maps at the strides 4, 8, 16 and 32.

    `steps` (1 to 4) is how many of them, the deepest, `forward` gives; `channels` lists theirs.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.stem = _Layer(1, _STEM, 3, 2)
        blocks: list[nn.Module] = []
        last: dict[int, tuple[int, int]] = {}  # stride -> the last block there, its channels
        channels, total = _STEM, 2
        for count, kernel, stride, expansion, made in _STAGES:
            total *= stride
            for place in range(count):
                blocks.append(_Block(channels, made, kernel, stride if place == 0 else 1, expansion))
                channels = made
            last[total] = (len(blocks) - 1, made)
        self.blocks = nn.ModuleList(blocks)
        ends = list(last.values())[-steps:]
        self._ends = {block for block, _ in ends}
        self.channels = [made for _, made in ends]

    def forward(self, images_B1HW: Tensor) -> SimpleNamespace:
        """Grey images, float [B, 1, H, W] -> `feature_maps`, from shallow to deep."""
        maps_BCHW, found = self.stem(images_B1HW), []
        for number, block in enumerate(self.blocks):
            maps_BCHW = block(maps_BCHW)
            if number in self._ends:
                found.append(maps_BCHW)
        return SimpleNamespace(feature_maps=tuple(found))
