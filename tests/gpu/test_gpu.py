"""What a GPU must do as a CPU does; skipped, with the reason, where there is none."""

import numpy as np
import pytest
import torch

from cxr_retrieval.config import IndexSettings, LossSettings, TrainingSettings
from cxr_retrieval.losses.ccloss import cc_loss
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import centre_targets
from cxr_retrieval.network.progressive import Output, ProgressiveNetwork, embeddings
from cxr_retrieval.training.objective import Objective, gather_centres
from cxr_retrieval.training.optimisation import Optimisation

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


def optimisation(**changes: object) -> Optimisation:
    torch.manual_seed(0)
    network = ProgressiveNetwork("resnet18_half", C, dimensions=D, whole_side=64, crop_side=64).cuda()
    network.to(memory_format=torch.channels_last)
    centres = Centres(6, C + 1, D, 0.05, device="cuda")
    return Optimisation(network, network, centres, TrainingSettings.model_validate(changes), total_steps=100)


def train(stepped: Optimisation, steps: int) -> list[bool]:
    """Train on a few images that stay the same; returns which steps moved the weights."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(B, 1, 128, 128, generator=generator).cuda().contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (B, C), generator=generator, dtype=torch.int8).cuda()
    objective = Objective.build(
        LossSettings(contrastive_from=0.0, no_finding="center"), labels.cpu(), 3, 0.0, torch.device("cuda")
    )
    moved = []
    for step in range(steps):
        stepped.begin(step)
        output = stepped.forward(images, crop=True)
        loss, _ = objective(output, labels, objective.ccloss(stepped.centres), stepped.progress)
        stepped.backward(loss)
        gather_centres(output, centre_targets(labels, "center"), stepped.centres)
        moved.append(stepped.end())
    return moved


def test_float16_trains_keeps_finite_weights_and_goes_on_from_its_scale() -> None:
    stepped = optimisation(precision="float16")
    before = {name: value.clone() for name, value in stepped.network.named_parameters()}
    moved = train(stepped, 20)
    assert moved[-1]
    assert sum(moved) >= 5
    assert all(value.isfinite().all() for value in stepped.network.state_dict().values())
    assert all(value.isfinite().all() for value in stepped.averaged.module.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in stepped.network.named_parameters())
    again = optimisation(precision="float16")
    again.load_state_dict(stepped.state_dict())
    assert again.scaler.get_scale() == stepped.scaler.get_scale() == 2.0**16 * 0.5 ** moved.count(False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_compiled_network_is_the_eager_one_in_embeddings_and_names(precision: str) -> None:
    eager, compiled = (optimisation(precision=precision, compile=way) for way in (False, True))
    images = torch.randn(B, 1, 128, 128, generator=torch.Generator().manual_seed(3)).cuda()
    for each in (eager, compiled):
        each.network.eval()
    with torch.no_grad(), eager.autocast():
        expected, found = (Output(*each.network(images, crop=False)) for each in (eager, compiled))
    tolerance = 2e-3 if precision == "float32" else 5e-2
    torch.testing.assert_close(found.z_PSBD, expected.z_PSBD, atol=tolerance, rtol=0)
    moved = train(compiled, 12)
    assert moved[-1]
    assert list(compiled.network.state_dict()) == list(eager.network.state_dict())
    assert list(compiled.averaged.module.state_dict()) == list(eager.network.state_dict())
    eager.load_state_dict(compiled.state_dict())


def test_lists_trained_on_a_gpu_part_rows_as_well_as_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed")
    if not faiss.get_num_gpus():
        pytest.skip("this FAISS has no GPU: install the extra `gpu` instead of `cpu`")
    from cxr_retrieval.index.plan import plan_index
    from cxr_retrieval.index.quantizer import train

    rows_ND = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
    plan = plan_index(len(rows_ND), 32, IndexSettings(latency_ms=1e-9))
    error = {}
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
        quantizer = faiss.deserialize_index(np.frombuffer(train(plan, rows_ND).quantizer, np.uint8))
        assert quantizer.ntotal == plan.lists
        error[device] = quantizer.search(rows_ND, 1)[0].mean()
    assert error["cuda"] == pytest.approx(error["cpu"], rel=0.02)
