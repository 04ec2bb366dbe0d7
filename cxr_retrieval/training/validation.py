"""What the average of the weights is worth: figures on validation patients, the training mean, where it looks.

V validation images, C findings, P passes, S steps, B images of a batch, D dimensions.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cxr_retrieval import storage
from cxr_retrieval.corpus.reading import Corpus, labels_of, pixels_of
from cxr_retrieval.corpus.splits import VALIDATION
from cxr_retrieval.evaluation.intervals import resampled_means
from cxr_retrieval.evaluation.retrieval import QueryFigures, retrieve
from cxr_retrieval.evaluation.tables import chance_levels
from cxr_retrieval.network.progressive import Output, centred, uncentred
from cxr_retrieval.training.examples import example_places
from cxr_retrieval.training.model import normalised

VALIDATION_IMAGES = 20_000  # at most, evenly drawn, that epochs are compared by
RESAMPLES = 400  # the standard error of a figure is then known to 4%
CENTRING_IMAGES = 20_000  # the training mean is taken over at most so many images


@dataclass
class Validation:
    """Looks at one network in evaluation mode, each worker at its contiguous share of the images.

    Every method but `crops` is a collective call: all workers make it, equally often, and get the same.
    """

    network: nn.Module
    corpus: Corpus
    unseen: list[str]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    batch_size: int
    rank: int
    workers: int
    retries: int = 0
    """Requests to storage that all workers have sent again, as of the last call of `figures`."""
    resampled: list[float] = field(default_factory=list)
    """mAP of the best embedding in resamples of the validation patients, as of the last call of `figures`; empty where
    no query counts. They are the same resamples in every run that is judged on the same images: differences are paired.
    """

    def figures(self, centring: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, float]] | None:
        """The headline of every named embedding; None where they are no numbers.

        Without `centring` the mean of the validation vectors themselves is subtracted: good enough to compare epochs.
        """
        vectors, labels, patients = self._vectors(centring)
        if not all(value.isfinite().all() for value in vectors.values()):
            return None
        query = (labels == 1).any(1)
        found = {
            name: retrieve(value[query], value, labels[query], labels, patients[query], patients)
            for name, value in vectors.items()
        }
        headlines = {name: _headline(figures) for name, figures in found.items()}
        best = found[max(headlines, key=lambda name: headlines[name]["map"])]
        self.resampled = _resampled(best, patients[query])
        return headlines

    def training_means(self, places: np.ndarray) -> tuple[dict[str, Tensor], int]:
        """The mean of every vector over the images at `places` (evenly drawn where they are many), and their number."""
        sums: dict[str, Tensor] = {}
        count = torch.zeros(1, dtype=torch.float64, device=self.device)
        stride = max(1, len(places) // CENTRING_IMAGES)
        for output, _ in self._embed(places[::stride]):
            for name, vector in uncentred(output).items():
                sums[name] = sums.get(name, 0.0) + vector.double().sum(0)
            count += output.z_PSBD.shape[2]
        for value in (*sums.values(), count):
            if self.workers > 1:
                dist.all_reduce(value)
        return {name: (value / count).float() for name, value in sums.items()}, int(count.item())

    def crops(self) -> list[list[int]]:
        """Where the network looks in the images that are followed: x, y, width, height of each."""
        if self._examples is None:
            return []
        self.network.eval()
        images = normalised(self._examples, self.corpus.recipe, self.device)
        with torch.inference_mode(), self.autocast():
            boxes: list[list[int]] = Output(*self.network(images)).boxes_B4.tolist()
        return boxes

    @cached_property
    def _examples(self) -> np.ndarray | None:
        """Pixels of the images that are followed, found once a run; None where no validation image has a finding."""
        places = example_places(self.corpus, self.unseen)
        return pixels_of(self.corpus.take(places, ["pixels"]), self.corpus.recipe.size).copy() if len(places) else None

    def _vectors(self, centring: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Named embeddings [V, ...], labels [V, C] and patient codes [V] of all validation images, on every worker."""
        places = self.corpus.places(VALIDATION, self.unseen)
        places = places[:: math.ceil(len(places) / VALIDATION_IMAGES)]  # every worker holds and ranks all of them
        found: dict[str, list[Tensor]] = {}
        seen: list[tuple[list[str], np.ndarray]] = []
        for output, table in self._embed(places):
            for name, vector in uncentred(output).items():
                found.setdefault(name, []).append(vector.cpu())
            seen.append((table["patient_id"].to_pylist(), labels_of(table)))
        mine = ({name: torch.cat(value).numpy() for name, value in found.items()}, seen, storage.retries())
        shares = [mine]
        if self.workers > 1:
            shares = [mine] * self.workers
            dist.all_gather_object(shares, mine)
        self.retries = sum(share[2] for share in shares)
        names = list(next(share[0] for share in shares if share[0]))
        vectors = {name: torch.as_tensor(np.concatenate([s[0][name] for s in shares if s[0]])) for name in names}
        vectors = centred(vectors, centring or {name: value.mean(0) for name, value in vectors.items()})
        patient_ids = [patient for share in shares for ids, _ in share[1] for patient in ids]
        labels = np.concatenate([labels for share in shares for _, labels in share[1]])
        assert len(patient_ids) == len(places), "validation rows were lost between workers"
        return vectors, torch.as_tensor(labels), torch.as_tensor(np.unique(patient_ids, return_inverse=True)[1])

    def _embed(self, places: np.ndarray) -> Iterator[tuple[Output, Any]]:
        """What the network says of this worker's share of `places`, with the rows."""
        self.network.eval()
        size = 2 * self.batch_size
        share = np.array_split(places, self.workers)[self.rank]
        for start in range(0, len(share), size):
            table = self.corpus.take(share[start : start + size], ["pixels", "patient_id", "findings", "unknown"])
            with torch.inference_mode(), self.autocast():
                pixels = pixels_of(table, self.corpus.recipe.size).copy()
                yield Output(*self.network(normalised(pixels, self.corpus.recipe, self.device))), table


def _resampled(figures: QueryFigures, patients_Q: Tensor) -> list[float]:
    if len(figures.ap) == 0:
        return []
    means: list[float] = resampled_means(figures.ap, patients_Q[figures.kept_Q], draws=RESAMPLES).tolist()
    return [round(mean, 6) for mean in means]


def _headline(figures: QueryFigures) -> dict[str, float]:
    """The figures that a log line and the choice need, each with its chance level, in 0 to 1; 0 where no query
    counts."""
    chance = chance_levels(figures)
    of_queries = {
        "map": figures.ap,
        "recall_at_8": figures.recall[:, -1],
        "precision_at_8": figures.precision[:, -1],
        "chance_map": chance.ap,
        "chance_recall_at_8": chance.recall[:, -1],
        "chance_precision_at_8": chance.precision[:, -1],
    }
    return {name: float(value_Q.mean()) if len(value_Q) else 0.0 for name, value_Q in of_queries.items()}
