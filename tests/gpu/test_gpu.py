"""What a GPU must do as a CPU does; skipped, with the reason, where there is none."""

import pytest
import torch

from cxr_retrieval.losses.ccloss import cc_loss
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.network.progressive import ProgressiveNetwork, embeddings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
B, C, D = 8, 14, 16


def test_the_network_gives_the_same_embeddings_on_gpu_and_cpu() -> None:
    torch.manual_seed(0)
    network = ProgressiveNetwork("resnet18_half", C, dimensions=D, whole_side=64, crop_side=64).eval()
    images = torch.randn(B, 1, 128, 128)
    boxes = torch.tensor([[16, 24, 80, 72]]).repeat(B, 1)
    with torch.inference_mode():
        expected = embeddings(network(images, boxes))
        found = embeddings(network.cuda()(images.cuda(), boxes.cuda()))
    for name, vector in expected.items():
        torch.testing.assert_close(found[name].cpu(), vector, atol=2e-3, rtol=0)


def test_loss_and_centres_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    z_BD = torch.nn.functional.normalize(torch.randn(B, D, generator=generator), dim=1)
    targets_BC = torch.randint(-1, 2, (B, C), generator=generator, dtype=torch.int8)
    centres = {device: Centres(1, C, D, 0.5, device=device) for device in ("cpu", "cuda")}
    losses = {}
    for device, table in centres.items():
        z, targets = z_BD.to(device), targets_BC.to(device)
        losses[device] = cc_loss(z, table.vectors_TCD[0], targets, form="softmax").cpu()
        table.accumulate(0, z, targets)
        table.reduce()
        table.apply()
    torch.testing.assert_close(losses["cuda"], losses["cpu"])
    torch.testing.assert_close(centres["cuda"].vectors_TCD.cpu(), centres["cpu"].vectors_TCD, atol=1e-6, rtol=0)


def test_a_step_trains_in_bfloat16() -> None:
    network = ProgressiveNetwork("resnet18_half", C, dimensions=D).cuda().to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = network(torch.randn(B, 1, 128, 128, device="cuda"))
    (output.z_PSBD.sum() + output.logits_PSBC.sum() + output.joint_PBC.sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
