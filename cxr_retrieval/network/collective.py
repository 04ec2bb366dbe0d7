"""What is added up over all workers within a forward pass, with a gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverWorkers(torch.autograd.Function):
    """torch.distributed.nn.functional.all_reduce does the same but is deprecated since torch 2.13."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum of the workers' tensors, which have one shape; the tensor itself where there is one worker.

    Its gradient is the sum of the workers' gradients: where each of them takes a loss of the whole batch, DDP's mean
    over workers is the gradient of that loss. A collective call: every worker makes it, equally often.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        summed: Tensor = _SumOverWorkers.apply(tensor)
        return summed
    return tensor
