"""The update of the centres against its equation, however a batch is dealt out; and the centres as state.

Shapes: B images, C classes, D dimensions, T tables = (step, pass) pairs.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.losses.centres import Centres

TABLES, CLASSES, DIMENSIONS, RATE = 2, 5, 8, 0.5


def reference_update(centres, z, targets, rate):
    """Wen et al. 2016, eq. 4, multi-label, for one table."""
    moved = []
    for j, c_j in enumerate(centres):
        images = [z_i for z_i, t_i in zip(z, targets, strict=True) if t_i[j] == 1]
        delta = [sum(c - z_i[d] for z_i in images) / (1 + len(images)) for d, c in enumerate(c_j)]
        new = [c - rate * step for c, step in zip(c_j, delta, strict=True)]
        length = math.sqrt(sum(c * c for c in new))
        moved.append([c / length for c in new])
    return moved


def make(seed=0, rate=RATE):
    return Centres(TABLES, CLASSES, DIMENSIONS, rate, seed=seed)


def make_batch(images=12, seed=1):
    """Unit embeddings of each table, and targets whose last class is never present."""
    generator = torch.Generator().manual_seed(seed)
    z_TBD = F.normalize(torch.randn(TABLES, images, DIMENSIONS, generator=generator), dim=2)
    targets_BC = torch.randint(-1, 2, (images, CLASSES), generator=generator, dtype=torch.int8)
    targets_BC[:, -1] = -(torch.arange(images) % 2).to(torch.int8)
    return z_TBD, targets_BC


def accumulate(centres, z_TBD, targets_BC):
    for table, z_BD in enumerate(z_TBD):
        centres.accumulate(table, z_BD, targets_BC)


def after_one_step():
    centres = make()
    accumulate(centres, *make_batch())
    centres.reduce()
    centres.apply()
    return centres


def test_centres_begin_as_unit_vectors_that_the_seed_alone_decides():
    first, second, other = make(3), make(3), make(4)
    assert first.vectors_TCD.shape == (TABLES, CLASSES, DIMENSIONS)
    assert first.vectors_TCD.dtype == torch.float32
    assert first.vectors_TCD.equal(second.vectors_TCD)
    assert not first.vectors_TCD.equal(other.vectors_TCD)
    assert (first.vectors_TCD.norm(dim=2) - 1).abs().max() < 1e-6


def test_drawing_centres_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make()
    assert torch.rand(3).equal(expected)


@settings(max_examples=40)
@given(
    images=st.integers(0, 9), seed=st.integers(0, 2**32 - 1), rate=st.floats(0.0, 1.0), length=st.sampled_from([1, 3])
)
def test_update_is_its_equation(images, seed, rate, length):
    centres = make(seed % 100, rate)
    before_TCD = centres.vectors_TCD.clone()
    z_TBD, targets_BC = make_batch(images, seed)
    z_TBD = z_TBD * length
    accumulate(centres, z_TBD, targets_BC)
    centres.reduce()
    centres.apply()
    for before_CD, after_CD, z_BD in zip(before_TCD, centres.vectors_TCD, z_TBD, strict=True):
        expected_CD = reference_update(before_CD.tolist(), z_BD.tolist(), targets_BC.tolist(), rate)
        assert (after_CD.double() - torch.tensor(expected_CD, dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_in_any_number_of_micro_batches_gives_the_same_centres(parts):
    whole = after_one_step()
    z_TBD, targets_BC = make_batch()
    split = make()
    for part_B in torch.arange(12).chunk(parts):
        accumulate(split, z_TBD[:, part_B], targets_BC[part_B])
    split.reduce()
    split.apply()
    assert (whole.vectors_TCD - split.vectors_TCD).abs().max() < 1e-6


@pytest.mark.parametrize("cut", [0, 1, 6])
def test_any_split_over_two_workers_gives_the_same_centres(cut):
    whole = after_one_step()
    z_TBD, targets_BC = make_batch()
    first, second = make(), make()
    accumulate(first, z_TBD[:, :cut], targets_BC[:cut])
    accumulate(second, z_TBD[:, cut:], targets_BC[cut:])
    total = first.pending() + second.pending()
    for worker in (first, second):
        worker.pending().copy_(total)
        worker.apply()
    assert first.vectors_TCD.equal(second.vectors_TCD)
    assert (whole.vectors_TCD - first.vectors_TCD).abs().max() < 1e-6


def test_workers_exchange_one_flat_tensor_of_sums_once(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", sent.append)
    centres = make()
    accumulate(centres, *make_batch())
    centres.reduce()
    assert len(sent) == 1
    assert sent[0] is centres.pending()
    assert sent[0].shape == (TABLES, CLASSES, DIMENSIONS + 1)
    assert sent[0].is_contiguous()
    with pytest.raises(AssertionError, match="reduce twice"):
        centres.reduce()


def test_a_finding_without_positives_stays_bit_for_bit():
    before_TCD, after_TCD = make().vectors_TCD, after_one_step().vectors_TCD
    assert after_TCD[:, -1].equal(before_TCD[:, -1])
    assert (after_TCD[:, :-1] != before_TCD[:, :-1]).any(dim=2).all()

    # Not even brought back to unit length.
    longer = make()
    longer.vectors_TCD.mul_(1.01)
    before_TCD = longer.vectors_TCD.clone()
    longer.apply()
    assert longer.vectors_TCD.equal(before_TCD)


def test_a_skipped_step_leaves_centres_and_the_next_step_as_if_it_had_not_been():
    centres = make()
    before_TCD = centres.vectors_TCD.clone()
    accumulate(centres, *make_batch(seed=9))
    centres.reduce()
    centres.drop()
    assert centres.vectors_TCD.equal(before_TCD)
    assert not centres.pending().any()

    accumulate(centres, *make_batch())
    centres.reduce()
    centres.apply()
    assert centres.vectors_TCD.equal(after_one_step().vectors_TCD)


def test_sums_are_cleared_by_the_update():
    centres = after_one_step()
    assert not centres.pending().any()
    before_TCD = centres.vectors_TCD.clone()
    centres.reduce()
    centres.apply()
    assert centres.vectors_TCD.equal(before_TCD)


def test_a_move_without_a_direction_leaves_the_centre():
    centres = make(rate=1.0)
    before_TCD = centres.vectors_TCD.clone()
    present_BC = torch.ones(1, CLASSES, dtype=torch.int8)
    # With one positive and rate 1 the centre goes to unit(c + z): nowhere for z = -c, and nowhere sane for NaN.
    centres.pending()[0, :, :-1] = -before_TCD[0].double()
    centres.pending()[0, :, -1] = 1
    centres.accumulate(1, torch.full((1, DIMENSIONS), torch.nan), present_BC)
    centres.apply()
    assert centres.vectors_TCD.equal(before_TCD)


def test_sums_keep_no_gradient_and_take_half_precision_under_autocast():
    z_TBD, targets_BC = make_batch()
    half_TBD = z_TBD.bfloat16()
    plain, cast = make(), make()
    accumulate(plain, half_TBD.float(), targets_BC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulate(cast, half_TBD.requires_grad_(), targets_BC)
        cast.reduce()
        plain.apply()
        cast.apply()
    assert not cast.pending().requires_grad
    assert not cast.vectors_TCD.requires_grad
    assert cast.vectors_TCD.equal(plain.vectors_TCD)


def test_resuming_continues_bit_for_bit():
    straight, resumed = after_one_step(), make(seed=77)
    state = straight.state_dict()
    accumulate(resumed, *make_batch(seed=5))
    resumed.load_state_dict(state)
    assert not resumed.pending().any()
    assert resumed.vectors_TCD.equal(straight.vectors_TCD)
    for step in range(3):
        for centres in (straight, resumed):
            accumulate(centres, *make_batch(seed=20 + step))
            centres.reduce()
            centres.apply()
    assert resumed.vectors_TCD.equal(straight.vectors_TCD)
    # What was saved is a copy: steps taken while a checkpoint is being written do not change it.
    assert state["vectors"].equal(after_one_step().vectors_TCD)


def test_saving_within_a_step_is_an_error():
    centres = make()
    accumulate(centres, *make_batch())
    with pytest.raises(AssertionError, match="within a step"):
        centres.state_dict()
    centres.apply()
    assert set(centres.state_dict()) == {"vectors"}


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    centres = make()
    before_TCD = centres.vectors_TCD.clone()
    with pytest.raises(ValueError, match=r"'vectors' are torch.float32 \[2, 4, 8\].*\[2, 5, 8\]"):
        centres.load_state_dict(Centres(TABLES, 4, DIMENSIONS, RATE).state_dict())
    with pytest.raises(ValueError, match="float64"):
        centres.load_state_dict({"vectors": before_TCD.double()})
    with pytest.raises(ValueError, match="centers"):
        centres.load_state_dict({"centers": before_TCD})
    assert centres.vectors_TCD.equal(before_TCD)


def test_geometry_gives_known_angles():
    centres = Centres(2, 3, 3, RATE)
    centres.vectors_TCD[0] = torch.eye(3)
    centres.vectors_TCD[1] = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]])
    orthogonal, opposed = centres.geometry()
    assert (orthogonal.mean_cosine, orthogonal.min_cosine, orthogonal.max_cosine) == (0.0, 0.0, 0.0)
    assert orthogonal.mean_angle_degrees == pytest.approx(90.0)
    assert opposed.mean_cosine == pytest.approx(-1 / 3)
    assert (opposed.min_cosine, opposed.max_cosine) == (-1.0, 0.0)
    assert opposed.mean_angle_degrees == pytest.approx((180 + 90 + 90) / 3)
    assert [table.mean_cosine for table in Centres(2, 1, 3, RATE).geometry()] == [0.0, 0.0]
    first_two = centres.geometry(torch.tensor([True, True, False]))
    assert [table.mean_cosine for table in first_two] == [0.0, -1.0], "those that nothing moves do not count"


def test_collapse_of_one_table_is_reported_for_that_table():
    centres = make()
    assert [table.collapsed for table in centres.geometry()] == [False, False]
    # Embeddings in one cone, whatever their findings, draw every centre onto its axis.
    generator = torch.Generator().manual_seed(0)
    present_BC = torch.ones(20, CLASSES, dtype=torch.int8)
    for _ in range(20):
        cone_BD = torch.ones(20, DIMENSIONS) + 0.3 * torch.randn(20, DIMENSIONS, generator=generator)
        centres.accumulate(1, F.normalize(cone_BD, dim=1), present_BC)
        centres.apply()
    assert [table.collapsed for table in centres.geometry()] == [False, True]


def test_settings_and_batches_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        make(rate=1.5)
    with pytest.raises(ValueError, match="classes is 0"):
        Centres(1, 0, 4, RATE)
    z_TBD, targets_BC = make_batch()
    with pytest.raises(ValueError, match=r"embeddings must be \[B, 8\]"):
        make().accumulate(0, z_TBD[0, :, :4], targets_BC)
    with pytest.raises(ValueError, match=r"targets must be \[12, 5\]"):
        make().accumulate(0, z_TBD[0], targets_BC[:, :4])


def test_moving_to_a_device_keeps_centres_and_sums():
    centres = make()
    accumulate(centres, *make_batch())
    moved = centres.to("cpu")
    assert moved is centres
    moved.apply()
    assert moved.vectors_TCD.equal(after_one_step().vectors_TCD)
