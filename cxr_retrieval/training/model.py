"""The model artifact: `weights.safetensors` and `model.json`, enough to embed an image anywhere, and never a pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from cxr_retrieval import artifacts
from cxr_retrieval.artifacts import Artifact, Draft
from cxr_retrieval.config import NetworkSettings
from cxr_retrieval.corpus.decoding import Recipe
from cxr_retrieval.errors import UserError
from cxr_retrieval.network.progressive import (
    ARCHITECTURE,
    Output,
    ProgressiveNetwork,
    embedding_names,
    embedding_sizes,
)
from cxr_retrieval.training.weights import read_weights

KIND = "model"
WEIGHTS_FILE, MODEL_FILE = "weights.safetensors", "model.json"
NETWORK, CENTRING, CENTRES = "network.", "centring.", "centres"


def build_network(settings: NetworkSettings, findings: int) -> ProgressiveNetwork:
    """A network with fresh or given weights. Raises UserError for an unknown backbone or weights of another network."""
    weights = None
    if settings.weights is not None:
        try:
            weights = safetensors.torch.load(read_weights(settings.weights))
        except safetensors.SafetensorError as error:
            raise UserError(f"network.weights={settings.weights} is not a safetensors file: {error}") from None
    try:
        network = ProgressiveNetwork(
            settings.backbone,
            findings,
            settings.steps,
            settings.dimensions,
            settings.crop_threshold,
            settings.crop_minimum,
            settings.whole_side,
            settings.crop_side,
            settings.normalisation,
            weights,
        )
    except ValueError as error:
        raise UserError(f"network: {error}") from None
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented, but not in torch's types
    return network


def normalised(pixels_BHW: np.ndarray | Tensor, recipe: Recipe, device: torch.device | str = "cpu") -> Tensor:
    """Prepared pixels `uint8 [B, H, W]` as the network sees them: float32 [B, 1, H, W], channels last."""
    pixels = torch.as_tensor(pixels_BHW).to(device)
    images = (pixels[:, None].float() / 255.0 - recipe.mean) / recipe.std
    return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Model:
    """A trained network in evaluation mode with all that its embeddings need."""

    facts: Mapping[str, Any]
    network: ProgressiveNetwork
    centring: Mapping[str, Tensor]

    @classmethod
    def open(cls, uri: str) -> "Model":
        """The model artifact at `uri`. Raises UserError where there is none or its bytes are not those written."""
        artifact = artifacts.load(uri, KIND)
        return cls.parse(artifact.read(MODEL_FILE), artifact.read(WEIGHTS_FILE))

    @classmethod
    def parse(cls, facts: bytes, weights: bytes) -> "Model":
        """A model from the bytes of its two files. Raises UserError where its network is of another architecture."""
        described = json.loads(facts)
        if (version := described.get("architecture")) != ARCHITECTURE:
            raise UserError(
                f"this model is of network architecture {version}, and this version of cxr-retrieval computes"
                f" {ARCHITECTURE}: train it again, or use the version that trained it"
            )
        settings = NetworkSettings.model_validate(described["network"] | {"weights": None})
        network = build_network(settings, len(described["findings"]))
        tensors = safetensors.torch.load(weights)
        network.load_state_dict(_without(tensors, NETWORK))
        return cls(described, network.eval(), _without(tensors, CENTRING))

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.facts["decode_recipe"])

    @property
    def findings(self) -> list[str]:
        return list(self.facts["findings"])

    @property
    def unseen(self) -> list[str]:
        """Findings that no image in training had: it was told to leave them out, or there were none."""
        told = self.facts.get("unseen", ())
        learnt = self.facts.get("learnt", self.findings)
        return [name for name in self.findings if name in told or name not in learnt]

    @property
    def chosen(self) -> str:
        """The embedding that did best on validation patients."""
        return str(self.facts["chosen"])

    @property
    def embedding_sizes(self) -> dict[str, int]:
        """Numbers of each embedding, by its name."""
        network = self.facts["network"]
        return embedding_sizes(network["steps"], network["dimensions"], len(self.findings))

    @property
    def embedding_names(self) -> tuple[str, ...]:
        return embedding_names(len(self.network.steps))

    @torch.inference_mode()
    def forward(self, pixels_BHW: np.ndarray, boxes_B4: Tensor | None = None) -> Output:
        """Both passes over prepared pixels `uint8 [B, H, W]`; `boxes_B4` replaces the network's own crop."""
        device = next(self.network.parameters()).device
        output: Output = self.network(normalised(pixels_BHW, self.recipe, device), boxes_B4)
        return output


def write_model(
    draft: Draft,
    facts: Mapping[str, Any],
    network: Mapping[str, Tensor],
    centring: Mapping[str, Tensor],
    centres_TCD: Tensor,
    counts: Mapping[str, int],
) -> Artifact:
    """Write the two files of a model and finish its artifact."""
    tensors = {NETWORK + name: tensor for name, tensor in network.items()}
    tensors |= {CENTRING + name: tensor for name, tensor in centring.items()}
    tensors[CENTRES] = centres_TCD
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files = [
        draft.write(WEIGHTS_FILE, safetensors.torch.save(plain)),
        draft.write(MODEL_FILE, json.dumps({"architecture": ARCHITECTURE, **facts}, indent=1, sort_keys=True).encode()),
    ]
    return draft.finish(
        files, counts, chosen=facts["chosen"], decode_recipe_id=Recipe.from_json(facts["decode_recipe"]).id
    )


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
