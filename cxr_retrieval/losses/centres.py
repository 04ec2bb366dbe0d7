"""The centres of CCLoss: one unit vector per (step, pass) and class, moved by their own rule and by no gradient.

The update is that of Wen et al. 2016 (center loss), eq. 4, for many findings an image, as in the design's section
"The method". After each optimizer step, with sums over the images of all workers and all micro-batches of the step:

    Delta_j = sum_i 1[j in P_i] (c_j - z_i) / (1 + sum_i 1[j in P_i]),    c_j <- unit(c_j - alpha Delta_j)

The training loop calls, in order: `accumulate` once per micro-batch and table in train mode; after the last backward of
the step `reduce`, on every worker; then `apply` where the optimizer stepped, `drop` where it was skipped.

Shapes: B images, C classes (findings, and No Finding where it has a centre), D dimensions, T tables: one per
(step, pass).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cxr_retrieval.losses.targets import PRESENT

COLLAPSED = 0.9  # mean cosine: plain means of overlapping findings end at 0.93 to 0.98 unless embeddings are centred


@dataclass(frozen=True)
class Geometry:
    """How the centres of one table lie: cosines, in [-1, 1], and angles between centres of different classes."""

    mean_cosine: float
    min_cosine: float
    max_cosine: float
    mean_angle_degrees: float

    @property
    def collapsed(self) -> bool:
        """Whether the centres lie on nearly one point; the mean cosine of random ones is near 0."""
        return self.mean_cosine > COLLAPSED


class Centres:
    """Centres of every table, and what the running optimizer step has gathered for their next move.

    A plain class and no module: DDP would overwrite its buffers with those of rank 0. Every worker holds the same
    centres, because all start from one seed and apply the same reduced sums.

    `vectors_TCD`: the centres, float32 [T, C, D] of unit length, to be read; it changes in place.
    """

    def __init__(
        self,
        tables: int,
        classes: int,
        dimensions: int,
        rate: float,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Random unit vectors, the same for a seed on every worker and device.

        `rate` alpha in [0, 1]: 0 leaves the centres where they are. Raises ValueError for a rate out of range or a
        size below 1.
        """
        for name, size in (("tables", tables), ("classes", classes), ("dimensions", dimensions)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate is {rate}; it must be in [0, 1]")
        self.rate = rate
        # Always drawn on the CPU: generators of other devices give other numbers.
        generator = torch.Generator().manual_seed(seed)
        drawn_TCD = torch.randn(tables, classes, dimensions, generator=generator, dtype=torch.float64)
        self.vectors_TCD = F.normalize(drawn_TCD, dim=2).float().to(device)
        # E = D + 1: sums of z in [..., :D], counts in [..., D]. In float64 the order of summation, and so the number of
        # workers and of micro-batches, is lost in the rounding to float32.
        self._pending_TCE = torch.zeros(tables, classes, dimensions + 1, dtype=torch.float64, device=device)
        self._gathering = False
        self._reduced = False

    @torch.no_grad()
    def accumulate(self, table: int, z_BD: Tensor, targets_BC: Tensor) -> None:
        """Add a micro-batch to the sums of one table. No gradient is kept; unknown and absent findings add nothing.

        `z_BD`: embeddings of unit length, any floating type. `targets_BC`: integers in {-1, 0, 1}, from
        `centre_targets`. Raises ValueError when a shape fits neither the other nor the centres.
        """
        assert not self._reduced, "accumulate after reduce: apply or drop the step first"
        _, classes, dimensions = self.vectors_TCD.shape
        if z_BD.dim() != 2 or z_BD.shape[1] != dimensions:
            raise ValueError(f"embeddings must be [B, {dimensions}], got {list(z_BD.shape)}")
        if targets_BC.shape != (len(z_BD), classes):
            raise ValueError(f"targets must be [{len(z_BD)}, {classes}], got {list(targets_BC.shape)}")
        present_CB = (targets_BC == PRESENT).double().T
        # sum (c_j - z_i) = count * c_j - sum z_i, for c_j does not move within a step: c_j joins in `apply`.
        self._pending_TCE[table, :, :-1] += present_CB @ z_BD.double()
        self._pending_TCE[table, :, -1] += present_CB.sum(dim=1)
        self._gathering = True

    def pending(self) -> Tensor:
        """The live sums of the running step, float64 [T, C, D + 1], contiguous: sums of z, then the counts.

        Adding those of all workers gives those of the whole batch.
        """
        return self._pending_TCE

    def reduce(self) -> None:
        """Sum `pending` over the workers of the default process group, in one all-reduce; nothing with one worker.

        Every worker must call it once a step, also one whose micro-batches had no finding.
        """
        assert not self._reduced, "reduce twice in a step would count every image twice"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._pending_TCE)
            self._gathering = True
        self._reduced = True

    @torch.no_grad()
    def apply(self) -> None:
        """Move the centres by the sums of the step, which are then cleared.

        A centre without positives stays, bit for bit; so does one whose move leaves no direction (its length is 0 or
        not finite).
        """
        sums_TCD, counts_TC1 = self._pending_TCE[..., :-1], self._pending_TCE[..., -1:]
        centres_TCD = self.vectors_TCD.double()
        delta_TCD = (counts_TC1 * centres_TCD - sums_TCD) / (1.0 + counts_TC1)
        moved_TCD = centres_TCD - self.rate * delta_TCD
        length_TC1 = moved_TCD.norm(dim=2, keepdim=True)
        moves_TC1 = (counts_TC1 > 0) & (length_TC1 > 0) & length_TC1.isfinite()
        self.vectors_TCD.copy_(torch.where(moves_TC1, (moved_TCD / length_TC1).float(), self.vectors_TCD))
        self.drop()

    def drop(self) -> None:
        """Forget the sums of the step, as when the optimizer step was skipped; the centres stay, bit for bit."""
        self._pending_TCE.zero_()
        self._gathering = False
        self._reduced = False

    def begin_as(self, tables: slice, others: slice) -> None:
        """Put the centres of `tables` where those of `others`, as many, are.

        For a pass that joins late: random centres would pull each class somewhere for as long as they take to move.
        """
        assert not self._gathering, "begin_as within a step: its sums are of centres elsewhere"
        self.vectors_TCD[tables] = self.vectors_TCD[others].clone()

    def geometry(self, learnt_C: Tensor | None = None) -> list[Geometry]:
        """How the centres of each table lie, T entries; all 0 where there is only one class.

        `learnt_C`: the classes whose centres count, bool; None is all. Others stay at random places, and would hide a
        collapse.
        """
        vectors_TCD = self.vectors_TCD if learnt_C is None else self.vectors_TCD[:, learnt_C]
        classes = vectors_TCD.shape[1]
        if classes < 2:
            return [Geometry(0.0, 0.0, 0.0, 0.0) for _ in vectors_TCD]
        row, column = torch.triu_indices(classes, classes, offset=1)
        found = []
        for vectors_CD in vectors_TCD.double().cpu():
            cosines = (vectors_CD @ vectors_CD.T)[row, column].clamp(-1.0, 1.0)
            angle = cosines.acos().rad2deg().mean().item()
            found.append(Geometry(cosines.mean().item(), cosines.min().item(), cosines.max().item(), angle))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the centres, `{"vectors": float32 [T, C, D]}`; taken between steps, so there are no sums to save.

        The rate is a setting and comes from the config.
        """
        assert not self._gathering, (
            "state_dict within a step: the sums of other workers would be lost; apply or drop first"
        )
        return {"vectors": self.vectors_TCD.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved centres, bit for bit, and forget pending sums.

        Raises ValueError, and changes nothing, when an entry is missing or unknown, or its shape or type is not that of
        these centres.
        """
        if set(state) != {"vectors"}:
            raise ValueError(f"the state of centres has one entry, 'vectors', but this one has {sorted(state)}")
        saved = state["vectors"]
        if saved.shape != self.vectors_TCD.shape or saved.dtype != torch.float32:
            raise ValueError(
                f"saved centres 'vectors' are {saved.dtype} {list(saved.shape)}, but these settings make "
                f"torch.float32 {list(self.vectors_TCD.shape)} (tables, classes, dimensions)"
            )
        self.vectors_TCD.copy_(saved)
        self.drop()

    def to(self, device: torch.device | str) -> "Centres":
        """Move centres and sums to a device, in place; returns itself."""
        self.vectors_TCD = self.vectors_TCD.to(device)
        self._pending_TCE = self._pending_TCE.to(device)
        return self
