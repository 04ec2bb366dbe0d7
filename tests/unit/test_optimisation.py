"""One optimizer step: what moves, what a step without a finite gradient leaves alone, and when the run ends."""

import contextlib
import shutil

import pytest
import torch

from cxr_retrieval.config import LossSettings, TrainingSettings
from cxr_retrieval.errors import UserError
from cxr_retrieval.losses.centres import Centres
from cxr_retrieval.losses.targets import centre_targets
from cxr_retrieval.network.progressive import ProgressiveNetwork
from cxr_retrieval.training.objective import Objective, gather_centres
from cxr_retrieval.training.optimisation import PARTS, SKIPPED_LIMIT, Optimisation, forget_moments, optimizer_of

B, C, D, SIDE = 6, 3, 8, 64


def optimisation(pretraining_steps: int = 0, **changes: object) -> Optimisation:
    torch.manual_seed(0)
    network = ProgressiveNetwork("resnet18_half", C, steps=2, dimensions=D)
    centres = Centres(4, C + 1, D, 0.05)
    settings = TrainingSettings.model_validate({"precision": "float32", **changes})
    stepped = Optimisation(network, network, centres, settings, 100, pretraining_steps)
    if settings.precision == "float16":  # its scale and its rule are looked at here; computing in it is for GPUs
        stepped.autocast = contextlib.nullcontext
    return stepped


def step(
    stepped: Optimisation, number: int, spoil: float = 1.0, micro_batches: int = 1, brightness: float = 1.0
) -> bool:
    """A step on images of its own, times `brightness`; the loss is multiplied by `spoil`."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(B, 1, SIDE, SIDE, generator=generator) * brightness
    labels = torch.randint(0, 2, (B, C), generator=generator, dtype=torch.int8)
    objective = Objective.build(
        LossSettings(contrastive_from=0.0, no_finding="center"), labels, 2, 0.0, torch.device("cpu")
    )
    stepped.begin(number)
    for micro in range(micro_batches):
        with stepped.micro_batch(last=micro == micro_batches - 1):
            output = stepped.forward(images, crop=True)
            loss, _ = objective(output, labels, objective.ccloss(stepped.centres), stepped.progress)
            stepped.backward(spoil * loss / micro_batches)
        gather_centres(output, centre_targets(labels, "center"), stepped.centres)
    return stepped.end()


def moving(stepped: Optimisation) -> dict[str, torch.Tensor]:
    """Copies of all that a step moves: weights, their average, the centres."""
    state = {f"network.{name}": value for name, value in stepped.network.named_parameters()}
    state |= {f"averaged.{name}": value for name, value in stepped.averaged.module.named_parameters()}
    return {name: value.detach().clone() for name, value in (state | {"centres": stepped.centres.vectors_TCD}).items()}


def test_a_step_without_a_finite_gradient_moves_nothing_and_the_next_one_moves_all() -> None:
    stepped = optimisation()
    before = moving(stepped)
    assert not step(stepped, 0, spoil=float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in moving(stepped).items())
    assert step(stepped, 1)
    after = moving(stepped)
    for name in ("network.joint.weight", "averaged.joint.weight", "centres"):
        assert not torch.equal(after[name], before[name])
        assert after[name].isfinite().all()


def test_a_forward_of_infinite_numbers_leaves_nothing_behind() -> None:
    spoilt, straight = optimisation(), optimisation()
    assert not step(spoilt, 0, brightness=1e38)
    assert all(buffer.isfinite().all() for buffer in spoilt.network.buffers())
    for number in (1, 2):
        assert step(spoilt, number)
        assert step(straight, number)
    found, expected = spoilt.network.state_dict(), straight.network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_finite_gradient_for_long_ends_the_run_with_a_clear_line() -> None:
    stepped = optimisation()
    for number in range(SKIPPED_LIMIT):
        assert not step(stepped, number, spoil=float("inf"))
    with pytest.raises(
        UserError, match=r"no finite gradient in 21 steps in a row, at step 21 of 100: lower training\."
    ):
        step(stepped, SKIPPED_LIMIT, spoil=float("inf"))


def test_a_step_that_moves_forgives_those_that_were_skipped() -> None:
    stepped = optimisation()
    for number in range(SKIPPED_LIMIT):
        step(stepped, number, spoil=float("nan"))
    assert step(stepped, SKIPPED_LIMIT)
    assert stepped.skipped == 0


def test_float16_skips_what_is_too_large_for_it_until_its_scale_has_fallen_and_counts_none_of_it() -> None:
    stepped = optimisation(precision="float16")
    stepped.scaler.load_state_dict(stepped.scaler.state_dict() | {"scale": 2.0**126})  # too large for float32 too
    before = moving(stepped)
    skipped = 0
    while not step(stepped, skipped, spoil=2.0**10):
        skipped += 1
        assert stepped.skipped == 0
        assert stepped.scaler.get_scale() == 2.0 ** (126 - skipped)
        assert all(torch.equal(value, before[name]) for name, value in moving(stepped).items())
    assert skipped > 0
    assert all(value.isfinite().all() for value in moving(stepped).values())


def test_float16_whose_scale_cannot_fall_further_ends_the_run() -> None:
    stepped = optimisation(precision="float16")
    for number in range(16 + SKIPPED_LIMIT):
        assert not step(stepped, number, spoil=float("nan"))
    with pytest.raises(UserError, match="no finite gradient in 21 steps in a row"):
        step(stepped, 16 + SKIPPED_LIMIT, spoil=float("nan"))


def test_the_gradient_of_a_step_does_not_depend_on_the_scale_of_float16() -> None:
    one, other = optimisation(precision="float16"), optimisation(precision="float16")
    other.scaler.load_state_dict(other.scaler.state_dict() | {"scale": 64.0})
    one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": 1024.0})
    assert step(one, 0)
    assert step(other, 0)
    for name, value in moving(one).items():
        assert torch.equal(moving(other)[name], value), name


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_run_goes_on_from_its_state_as_if_nothing_had_been(precision: str) -> None:
    straight, first, second = (optimisation(precision=precision) for _ in range(3))
    for number in range(4):
        step(straight, number)
    for number in range(2):
        step(first, number)
    state = first.state_dict()
    assert set(state) == set(PARTS)
    second.load_state_dict(state)
    for number in range(2, 4):
        step(second, number)
    assert second.scaler.state_dict() == straight.scaler.state_dict()
    for name, value in moving(straight).items():
        assert torch.equal(moving(second)[name], value), name


def test_training_begins_anew_after_pretraining_from_its_weights_wherever_the_run_went_on() -> None:
    straight, resumed = (optimisation(pretraining_steps=2) for _ in range(2))
    for number in range(2):
        step(straight, number)
    resumed.load_state_dict(straight.state_dict())
    learnt = {name: value.detach().clone() for name, value in straight.network.named_parameters()}
    for stepped in (straight, resumed):
        assert stepped.optimizer.state
        stepped.begin(2)
        assert not stepped.optimizer.state
        assert stepped.progress == 0
        assert all(torch.equal(value, learnt[name]) for name, value in stepped.network.named_parameters())
        step(stepped, 2)
        for average, weight in zip(stepped.averaged.module.parameters(), stepped.network.parameters(), strict=True):
            assert torch.equal(average, weight), "its first step is the first of the average"
        step(stepped, 3)
    for name, value in moving(straight).items():
        assert torch.equal(moving(resumed)[name], value), name


def test_a_share_of_a_phase_is_reached_by_one_step_and_never_by_its_first() -> None:
    stepped = optimisation(pretraining_steps=40)
    for share, reached in ((0.0, []), (0.5, [70]), (0.51, [71]), (0.999, []), (1 / 60, [41])):
        found = []
        for number in range(40, 100):
            stepped.begin(number)
            if stepped.reaches(share):
                found.append(number)
        assert found == reached, share


def test_what_had_no_gradient_until_a_loss_joins_does_not_leap_when_it_does() -> None:
    def leap(forget: bool) -> float:
        """The longest move of a weight in a step, in learning rates, when a gradient joins at step 400."""
        weight = torch.nn.Parameter(torch.zeros(2, 2))
        model = torch.nn.ParameterList([weight])
        optimizer, longest = optimizer_of(model, 1e-3, 0.0), 0.0
        for number in range(500):
            if number == 400 and forget:
                forget_moments(optimizer, [weight])
            before = weight.detach().clone()
            weight.grad = torch.full_like(weight, 1e-3 if number >= 400 else 0.0)
            optimizer.step()
            longest = max(longest, float((weight.detach() - before).abs().max()) / 1e-3)
        return longest

    assert leap(forget=False) > 2
    assert leap(forget=True) == pytest.approx(1.0, abs=0.01)


def test_both_phases_warm_up_and_end_low() -> None:
    stepped = optimisation(pretraining_steps=40)
    rates, progress = [], []
    for number in range(100):
        stepped.begin(number)
        rates.append(stepped.optimizer.param_groups[0]["lr"])
        progress.append(stepped.progress)
    for first, last in ((0, 40), (40, 100)):
        peak = max(range(first, last), key=lambda number: rates[number])
        assert first < peak < first + 0.2 * (last - first)
        assert rates[first] < rates[peak] / 4
        assert rates[last - 1] < rates[peak] / 20
        assert progress[first:last] == pytest.approx([(n - first) / (last - first) for n in range(first, last)])


def test_micro_batches_add_up_to_one_step() -> None:
    whole, parts = optimisation(), optimisation()
    step(whole, 0)
    step(parts, 0, micro_batches=2)
    for name, value in moving(whole).items():
        if name != "centres":  # their sums are those of twice as many images
            torch.testing.assert_close(moving(parts)[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_a_compiled_network_trains_as_the_eager_one_and_keeps_the_names_of_its_weights() -> None:
    eager, compiled = optimisation(), optimisation(compile=True)
    for number in range(3):
        assert step(eager, number)
        assert step(compiled, number)
    for part in ("network", "averaged"):
        assert list(compiled.state_dict()[part]) == list(eager.state_dict()[part])
    for name, value in moving(eager).items():
        torch.testing.assert_close(moving(compiled)[name], value, atol=1e-3, rtol=1e-3)
    eager.load_state_dict(compiled.state_dict())


def test_compiling_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"training\.compile needs a C\+\+ compiler .* there is no 'no-such-compiler'"):
        optimisation(compile=True)
