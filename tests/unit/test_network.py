"""The progressive network: shapes, unit length, gradients, workers, names."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cxr_retrieval.network.attention import crop_and_resize, heat_map, sum_activations
from cxr_retrieval.network.norm import SyncedStandardise, UsualMaps
from cxr_retrieval.network.progressive import (
    HEAT_SIDE,
    Output,
    ProgressiveNetwork,
    embedding_names,
    embedding_sizes,
    embeddings,
    jigsaw,
    uncentred,
)
from cxr_retrieval.network.steps import CROP, WHOLE

FINDINGS, STEPS, DIMENSIONS, SIZE, BATCH = 14, 3, 16, 64, 6


def network(seed: int = 0, **settings) -> ProgressiveNetwork:
    torch.manual_seed(seed)
    return ProgressiveNetwork("resnet18_half", FINDINGS, **{"dimensions": DIMENSIONS} | settings)


def images(number: int = BATCH, seed: int = 1, side: int = SIZE) -> Tensor:
    return torch.randn(number, 1, side, side, generator=torch.Generator().manual_seed(seed))


def some_loss(output: Output) -> Tensor:
    """Uses every output with a gradient; a mean over the batch, neither symmetric nor linear."""
    weights = torch.linspace(-1, 1, output.z_PSBD[0, 0, 0].numel())
    z = (output.z_PSBD * weights).sum(-1).square().mean()
    return z + output.logits_PSBC.square().mean() + output.joint_PBC.sigmoid().mean()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: threads that wait for each other cost more than they bring, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained_a_little() -> ProgressiveNetwork:
    model = network().train()
    for seed in range(2):
        model(images(seed=seed))
    return model.eval()


def test_one_forward_gives_both_passes_of_every_step(trained_a_little):
    with torch.no_grad():
        output = trained_a_little(images())
    assert output.z_PSBD.shape == (2, STEPS, BATCH, DIMENSIONS)
    assert output.logits_PSBC.shape == (2, STEPS, BATCH, FINDINGS)
    assert output.joint_PBC.shape == (2, BATCH, FINDINGS)
    assert output.heat_BHW.shape == (BATCH, HEAT_SIDE, HEAT_SIDE)
    assert output.boxes_B4.shape == (BATCH, 4)
    torch.testing.assert_close(output.z_PSBD.norm(dim=-1), torch.ones(2, STEPS, BATCH))


def test_the_second_pass_sees_the_crop(trained_a_little):
    with torch.no_grad():
        output = trained_a_little(images())
        crops_B1HW = crop_and_resize(images(), output.boxes_B4, (SIZE, SIZE))
        torch.testing.assert_close(trained_a_little(crops_B1HW).joint_PBC[WHOLE], output.joint_PBC[CROP])


def test_a_given_box_replaces_the_crop(trained_a_little):
    whole_B4 = torch.tensor([[0, 0, SIZE, SIZE]]).repeat(BATCH, 1)
    with torch.no_grad():
        output = trained_a_little(images(), whole_B4)
    torch.testing.assert_close(output.joint_PBC[WHOLE], output.joint_PBC[CROP])
    assert torch.equal(output.boxes_B4, whole_B4)


@pytest.mark.parametrize("normalisation", ["group", "batch"])
def test_the_loss_reaches_every_parameter_the_screen_included(normalisation):
    model = network(normalisation=normalisation).train()
    some_loss(model(images())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("step", range(STEPS))
def test_each_step_alone_teaches_its_screen(step):
    model = network().train()
    model(images()).logits_PSBC[WHOLE, step].square().mean().backward()
    assert all(p.grad.any() for p in model.screens[step].parameters())


@pytest.mark.parametrize(("side", "fine"), [(64, [0]), (128, [0, 1]), (32, [0])])
def test_maps_of_too_few_places_do_not_say_where_to_look(side, fine):
    model = network().eval()
    with torch.no_grad():
        for step in model.steps:
            torch.nn.init.normal_(step.classifier.weight)
        maps = model.backbone(images(2, side=side))
        maps = [step.neck(screen(stage)) for step, screen, stage in zip(model.steps, model.screens, maps, strict=True)]
        activations = [model.steps[step].activations(maps[step]) for step in fine]
        usual_CGG = torch.randn(FINDINGS, HEAT_SIDE, HEAT_SIDE)
        model.usual.mean.copy_(usual_CGG)
        output = model(images(2, side=side))
        expected = heat_map(sum_activations(activations, HEAT_SIDE) - usual_CGG, output.joint_PBC[WHOLE])
    torch.testing.assert_close(output.heat_BHW, expected)


def test_of_a_silent_finding_every_image_has_the_same_score_and_no_place_speaks():
    model = network().eval()
    silent_C = torch.zeros(FINDINGS, dtype=torch.bool)
    silent_C[2] = True
    model.silence(silent_C)
    output = model(images())
    assert output.joint_PBC[..., 2].unique().numel() == output.logits_PSBC[..., 2].unique().numel() == 1
    assert output.joint_PBC[..., 1].unique().numel() > 1
    maps = torch.randn(2, model.steps[0].classifier.in_features, 4, 4)
    assert (model.steps[0].activations(maps)[:, 2] == 0).all()


def test_one_step_is_enough():
    with torch.no_grad():
        output = network(steps=1).eval()(images(2))
    assert output.heat_BHW.shape == (2, HEAT_SIDE, HEAT_SIDE)
    assert tuple(embeddings(output)) == embedding_names(1)


def test_a_row_does_not_depend_on_its_companions_in_evaluation(trained_a_little):
    with torch.no_grad():
        together, alone = trained_a_little(images()), trained_a_little(images()[2:3])
    torch.testing.assert_close(together.z_PSBD[:, :, 2:3], alone.z_PSBD, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.joint_PBC[:, 2:3], alone.joint_PBC, atol=1e-5, rtol=1e-4)
    assert torch.equal(together.boxes_B4[2:3], alone.boxes_B4)


def test_evaluation_is_deterministic_and_survives_the_state_dict(trained_a_little):
    other = network(seed=9).eval()
    other.load_state_dict(trained_a_little.state_dict())
    with torch.no_grad():
        first, second, third = trained_a_little(images()), trained_a_little(images()), other(images())
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_outputs_are_float32_of_unit_length_under_autocast(trained_a_little):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = trained_a_little(images(2))
    assert {t.dtype for t in output[:4]} == {torch.float32}
    torch.testing.assert_close(output.z_PSBD.norm(dim=-1), torch.ones(2, STEPS, 2))


@pytest.mark.parametrize(
    "wrong", [{"crop_threshold": 1.0}, {"crop_minimum": 0.0}, {"dimensions": 0}, {"steps": 0}, {"backbone": "vgg"}]
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        ProgressiveNetwork(**{"backbone": "resnet18_half", "findings": FINDINGS} | wrong)


# Named embeddings


def test_embeddings_come_in_the_order_of_their_names_and_have_unit_length(trained_a_little):
    with torch.no_grad():
        named = embeddings(trained_a_little(images()))
    assert tuple(named) == embedding_names(STEPS)
    assert embedding_names(2) == ("step1", "step2", "global", "local", "combined", "profile", "global_profile")
    assert {name: v.shape[1] for name, v in named.items()} == embedding_sizes(STEPS, DIMENSIONS, FINDINGS)
    assert embedding_sizes(2, 8, 3) == {
        **{"step1": 8, "step2": 8, "global": 16, "local": 16, "combined": 32, "profile": 3},
        "global_profile": 19,
    }
    for vector_BE in named.values():
        torch.testing.assert_close(vector_BE.norm(dim=1), torch.ones(BATCH))


def test_centred_embeddings_lose_the_common_direction(trained_a_little):
    with torch.no_grad():
        output = trained_a_little(images())
    means = {name: vector.mean(0) for name, vector in uncentred(output).items()}
    found = embeddings(output, means)
    joined_BE = torch.cat([found["global"], found["profile"]], dim=1) / 2**0.5
    torch.testing.assert_close(found.pop("global_profile"), joined_BE)
    for name, vector_BE in found.items():
        torch.testing.assert_close(vector_BE.norm(dim=1), torch.ones(BATCH))
        difference_BE = uncentred(output)[name] - means[name]
        torch.testing.assert_close(vector_BE, difference_BE / difference_BE.norm(dim=1, keepdim=True))
    del means["local"]
    with pytest.raises(ValueError, match="centring lacks local"):
        embeddings(output, means)


# Jigsaw


def test_jigsaw_moves_patches_and_changes_none():
    images_B1HW = torch.arange(2 * 6 * 9.0).view(2, 1, 6, 9)
    shuffled_B1HW = jigsaw(images_B1HW, 3, torch.Generator().manual_seed(0))
    assert not torch.equal(shuffled_B1HW, images_B1HW)

    def patches(x):
        return [
            sorted(x[b, 0, r : r + 2, c : c + 3].flatten().tolist() for r in (0, 2, 4) for c in (0, 3, 6))
            for b in (0, 1)
        ]

    assert patches(shuffled_B1HW) == patches(images_B1HW)
    assert torch.equal(jigsaw(images_B1HW, 3, torch.Generator().manual_seed(0)), shuffled_B1HW)
    assert torch.equal(jigsaw(images_B1HW, 1), images_B1HW)
    with pytest.raises(ValueError, match="6 x 9 do not divide into 2 x 2"):
        jigsaw(images_B1HW, 2)


# Standardisation, and workers


def test_standardised_embeddings_have_mean_0_and_variance_1_and_evaluation_follows():
    x_BD = torch.randn(64, 5) * 3 + 40
    layer = SyncedStandardise(5)
    y_BD = layer(x_BD)
    torch.testing.assert_close(y_BD.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(y_BD.var(0, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)
    # One update replaces the initial statistics, so that short runs evaluate with true ones.
    torch.testing.assert_close(layer.running_mean, x_BD.mean(0))
    torch.testing.assert_close(layer.running_var, x_BD.var(0), atol=1e-2, rtol=1e-3)
    layer(x_BD + 1)
    torch.testing.assert_close(layer.running_mean, x_BD.mean(0) + 0.5)
    assert torch.equal(layer.eval()(x_BD)[:1], layer(x_BD[:1]))


def test_standardisation_agrees_with_batch_norm_in_values_and_gradients():
    one, other = (torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    weights = torch.randn(9, 4)
    a, b = SyncedStandardise(4)(one), nn.BatchNorm1d(4, affine=False)(other)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


SHARES = (slice(0, 3), slice(3, 8))  # of workers, unequal on purpose


def standardise_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 4, generator=generator) + 2, torch.randn(8, 4, generator=generator)


def maps(step: int) -> Tensor:
    return torch.randn(8, 2, 2, 2, generator=torch.Generator().manual_seed(step)) + 3


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        x_BD, weights_BD = (tensor[SHARES[rank]] for tensor in standardise_inputs())
        x_BD.requires_grad_()
        layer = SyncedStandardise(4)
        y_BD = layer(x_BD)
        (y_BD * weights_BD).sum().backward()
        standardised = {"y": y_BD.detach(), "grad": x_BD.grad, **layer.state_dict()}
        usual = UsualMaps(2, 2)
        for step in range(2):
            usual(maps(step)[SHARES[rank]])

        results = {}
        for normalisation in ("group", "batch"):
            model = network(normalisation=normalisation).train()
            parallel = DistributedDataParallel(model, find_unused_parameters=False)
            for _ in range(2):  # a second step is where DDP complains of a parameter that got no gradient
                model.zero_grad()
                loss = some_loss(parallel(images()[rank * 3 : rank * 3 + 3]))
                loss.backward()
            results[normalisation] = {name: p.grad for name, p in model.named_parameters()}
        found = {"standardised": standardised, "usual": usual.state_dict(), "grads": results}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_standardisation_on_two_workers_is_that_of_the_whole_batch(two_workers):
    x_BD, weights_BD = standardise_inputs()
    x_BD.requires_grad_()
    layer = SyncedStandardise(4)
    y_BD = layer(x_BD)
    (y_BD * weights_BD).sum().backward()
    for share, result in zip(SHARES, two_workers, strict=True):
        found = result["standardised"]
        torch.testing.assert_close(found["y"], y_BD[share].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["grad"], x_BD.grad[share], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["running_mean"], layer.running_mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["running_var"], layer.running_var, atol=1e-5, rtol=1e-5)


def test_what_maps_usually_show_is_taken_out_and_is_that_of_all_workers(two_workers):
    layer = UsualMaps(2, 2)
    first = layer(maps(0))
    torch.testing.assert_close(first, maps(0) - maps(0).mean(0), atol=1e-5, rtol=1e-5)
    layer(maps(1))
    torch.testing.assert_close(layer.mean, (maps(0).mean(0) + maps(1).mean(0)) / 2)
    for result in two_workers:
        torch.testing.assert_close(result["usual"]["mean"], layer.mean)
    before = layer.mean.clone()
    torch.testing.assert_close(layer.eval()(maps(2)[:1]), maps(2)[:1] - before)
    assert torch.equal(layer.mean, before), "evaluation learns nothing"


def test_two_workers_with_group_norm_have_the_gradients_of_one(two_workers):
    model = network().train()
    for _ in range(2):
        model.zero_grad()
        some_loss(model(images())).backward()
    for result in two_workers:
        for name, p in model.named_parameters():
            torch.testing.assert_close(result["grads"]["group"][name], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_two_workers_with_batch_norm_step_and_agree(two_workers):
    one, other = (result["grads"]["batch"] for result in two_workers)
    assert all(torch.equal(one[name], other[name]) for name in one)
