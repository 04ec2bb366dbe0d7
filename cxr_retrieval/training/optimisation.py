"""One optimizer step: precision, clipping, the rule for steps to skip, the average of the weights, the centres.

It needs PyTorch only, so that it is the same, and is tested, wherever PyTorch is. B images, H W sides in pixels.
"""

import atexit
import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cxr_retrieval.config import TrainingSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.network.progressive import Output, ProgressiveNetwork

SKIPPED_LIMIT = 20  # optimizer steps in a row without a finite gradient that end the run
LONGEST_GRADIENT = 5.0  # a longer one is cut to this length
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # where PyTorch keeps what it has compiled
PARTS = ("network", "averaged", "optimizer", "scaler", "centres")  # of an `Optimisation`, in its state
Tensors = tuple[Tensor, ...] | list[Tensor]


class Optimisation:
    """A network with all that moves in an optimizer step: weights, their average, the optimizer, the centres.

    Its state is that of the plain network, whether it is compiled or not and however many workers share the work.

    A step is `begin`, then for every micro-batch, inside `micro_batch`, `forward` and `backward`, then `end`.
    """

    def __init__(
        self,
        network: ProgressiveNetwork,
        model: nn.Module,
        centres: Centres,
        settings: TrainingSettings,
        total_steps: int,
        pretraining_steps: int = 0,
    ) -> None:
        """`model` is what is called in training: the network itself, or DDP around it.

        The first `pretraining_steps` of `total_steps` are a phase of their own, with its own warm-up and cosine.

        Raises UserError where the network is to be compiled and there is no compiler.
        """
        self.network, self.model, self.centres = network, model, centres
        self.settings, self.total_steps, self.pretraining_steps = settings, total_steps, pretraining_steps
        self.step = 0
        self.skipped = 0
        self._buffers: list[Tensor] = []  # running statistics before the step
        device = next(network.parameters()).device
        self.autocast = autocast_of(settings.precision, device)
        # Gradients of float16 are kept from vanishing by a scale on the loss, which falls whenever one is infinite.
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.averaged = AveragedModel(network, multi_avg_fn=running_average(settings.averaging), use_buffers=True)
        self.optimizer = optimizer_of(model, settings.learning_rate, settings.weight_decay)
        if settings.compile:
            _compile(network)

    @property
    def progress(self) -> float:
        """The share of the steps of the running phase that has gone by, in [0, 1]."""
        done, steps = self._place()
        return done / steps

    def reaches(self, share: float) -> bool:
        """Whether the running step is the first one after `share` of its phase, and not the phase's first."""
        return reaches(*self._place(), share)

    def _place(self) -> tuple[int, int]:
        """Steps of the running phase: those that have gone by, and all."""
        if self.step < self.pretraining_steps:
            return self.step, self.pretraining_steps
        return self.step - self.pretraining_steps, self.total_steps - self.pretraining_steps

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, from 0; with the first one after pretraining, begin anew from the weights.

        The average leaves out the weights of pretraining. So does the optimizer: the classifiers' gradients were 0 all
        the while, and over second moments of 0, which a later step no longer makes up for, their first step would be
        several times too long.
        """
        self.step = step
        if step == self.pretraining_steps > 0:
            self.optimizer.state.clear()
            self.averaged.n_averaged.zero_()
        self.model.train()
        # A forward with infinite numbers leaves them in running statistics, where they would stay for ever.
        self._buffers = [buffer.clone() for buffer in self.network.buffers()]
        share = rate_share(*self._place(), self.settings.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: workers add up their gradients in the last one of a step."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def forward(self, images_B1HW: Tensor, *, crop: bool) -> Output:
        """The network in training mode and in the precision of the settings."""
        with self.autocast():
            return Output(*self.model(images_B1HW, crop=crop))

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients those of a micro-batch's loss, a scalar, and already its share of the step's."""
        self.scaler.scale(loss).backward()

    def end(self) -> bool:
        """Move weights, average and centres, or none of them (nor running statistics) where the gradient is not finite:
        whether they moved.

        It is the same on every worker, because gradients are averaged before they are measured. Raises UserError after
        SKIPPED_LIMIT steps in a row; those that float16 skips while the scale of its loss can still fall do not count.
        """
        self.centres.reduce()
        self.scaler.unscale_(self.optimizer)
        finite = bool(nn.utils.clip_grad_norm_(self.model.parameters(), LONGEST_GRADIENT).isfinite())
        if finite:
            self.optimizer.step()
            self.averaged.update_parameters(self.network)
            self.centres.apply()
            self.skipped = 0
        else:
            self.centres.drop()
            for buffer, before in zip(self.network.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
            self.skipped += not (self.scaler.is_enabled() and self.scaler.get_scale() > 1.0)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped > SKIPPED_LIMIT:
            raise self.lost(f"no finite gradient in {self.skipped} steps in a row")
        return finite

    def lost(self, what: str) -> UserError:
        """The error of a run whose weights are worth nothing any more; `what` says by what."""
        return UserError(
            f"{what}, at step {self.step + 1:,} of {self.total_steps:,}: lower training.learning_rate, or look at"
            " network.weights: either begins a run of its own; the last good checkpoint of this one stays where it is"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, taken between steps."""
        return {name: getattr(self, name).state_dict() for name in PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])


def _compile(network: ProgressiveNetwork) -> None:
    """Compile the backbone, which is nearly all of the work, in place: parameters keep their names.

    The crop is left alone: it looks for the largest component in as many rounds as that takes.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"training.compile needs a C++ compiler on every node that trains, and there is no {compiler!r}:"
            " install it, or leave the setting out"
        )
    if CACHE not in os.environ:
        # Every process compiles for itself: one that is killed meanwhile leaves half a library in the common folder,
        # and whoever finds it there fails.
        os.environ[CACHE] = tempfile.mkdtemp(prefix="cxr-compiled-")
        atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
    network.backbone.compile()


def running_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """How an average of weights follows them: by 1 - `decay` a step, and faster in the first steps, whose weights are
    not worth keeping. Whole numbers (counts of batches) are taken over as they are.
    """

    def follow(averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        share = 1.0 - min(decay, (1.0 + float(steps)) / (10.0 + float(steps)))
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.lerp_(weight, share)
            else:
                average.copy_(weight)

    return follow


def optimizer_of(model: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}], lr=rate, fused=True
    )


def forget_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Let parameters that had no gradient until now begin as in the optimizer's first step.

    Over second moments of 0, which a later step no longer makes up for, their first steps would be several times too
    long.
    """
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def reaches(done: int, steps: int, share: float) -> bool:
    """Whether the step after `done` of so many is the first one after `share` of them, and not the very first."""
    return done > 0 and (done - 1) / steps < share <= done / steps


def rate_share(step: float, total: float, warmup_share: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine to a hundredth."""
    warmup = warmup_share * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def autocast_of(setting: str, device: torch.device) -> Any:
    """A factory of autocast contexts. `auto` is bfloat16 only where the hardware computes in it."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    dtype = PRECISIONS["bfloat16" if fast else "float32"] if setting == "auto" else PRECISIONS[setting]
    lower = dtype is not torch.float32
    return lambda: torch.autocast(device.type, dtype=dtype if lower else torch.bfloat16, enabled=lower)
