"""A step of MLO-MAE's masking network and the cycle below it done again: what it does to level III's loss."""

import math

import pytest
import torch
from make import rand, tiny_levels

from common import Stepper
from protocols.hypergradient import gradients_of, rates_of
from protocols.mask_steps import (
    READINGS,
    CycleAgain,
    changes_of,
    directions_of,
    length_of_step,
    steps_chart,
    summary,
)


@pytest.fixture(scope="module")
def looked():
    """A method in float64 after three cycles, its optimiser, rates, a batch, others, gradients of two cycles."""
    method = tiny_levels(unrolling=2, weight_decay=0.3, base_lr=0.02, head_lr=0.04, mask_lr=0.02).double()
    optimizer = method.optimizer(method.config)
    labels, stepper = torch.arange(16) % 10, Stepper(optimizer, method.config, torch.device("cpu"))
    images = [rand(16, 3, 16, 16, seed=i, dtype=torch.float64) for i in range(3)]
    for _ in range(3):
        method.update(method, [(images[0], labels)], stepper)
    found = [gradients_of(method, optimizer, x, labels) for x in images[:2]]
    rates = rates_of(method.config, optimizer)
    return method, optimizer, rates, (images[0], labels), (images[2], labels), found


def test_a_short_step_does_what_the_derivative_says(looked):
    """Along AdamW's exact direction -length * norm, along each other one by its angle; after the last step of level I
    and after all of them; half a step half as much. The method and its optimiser stay.
    """
    method, optimizer, rates, batch, others, found = looked
    before = {name: value.clone() for name, value in method.state_dict().items()}
    cycles = [CycleAgain(method, optimizer, rates, batch, others, dtype) for dtype in (torch.float64, torch.float32)]
    directions = directions_of(found, 0, seed=0)
    changes, flips, half = changes_of(*cycles, directions, 0.1)
    assert list(directions)[-4:] == ["all_steps", "before", "random", "minus_random"] and "last_step" not in directions
    assert changes.shape == (9, len(READINGS)) and flips[:, 0].tolist() == [0] * 9 and flips[:, 1].max() > 0
    for i, direction in enumerate(directions.values()):
        unit = direction.double() / direction.double().norm()
        for j, name in enumerate(("last_step", "all_steps")):
            assert changes[i, j] == pytest.approx(-float(unit @ found[0][name]), rel=1e-2, abs=1e-7)
    names = list(directions)
    assert changes[names.index("adamw"), 0] == pytest.approx(-float(found[0]["adamw"].norm()), rel=1e-3)
    assert half == pytest.approx(0.5, abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    torch.testing.assert_close(directions["before"], found[1]["exact"])
    assert "before" not in directions_of(found[:1], 0, seed=0)  # a cycle alone has none before it
    assert torch.equal(directions["random"], -directions["minus_random"])
    assert torch.equal(directions["random"], directions_of(found, 0, seed=0)["random"])
    assert not torch.equal(directions["random"], directions_of(found, 1, seed=0)["random"])


def test_the_cycle_that_is_done_again_is_that_of_the_training(looked):
    """Levels I and II by `update`, with the masking network moved; then level III's loss, on both kinds of pictures."""
    method, optimizer, rates, batch, others, found = looked
    cycle = CycleAgain(method, optimizer, rates, batch, others)
    step = 0.3 * found[0]["exact"] / found[0]["exact"].norm()
    for group, rate in zip(cycle.start[1].param_groups, rates, strict=True):
        assert group["lr"] == rate
    again, other = cycle.level_one(cycle.start, [], step)
    moved = torch.cat([p.flatten() for p in method.masking.parameters()]) - step
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in again.masking.parameters()]), moved.detach())
    again.learn_masks = lambda *_: None
    again.update(again, [batch], Stepper(other, again.config, torch.device("cpu")))
    again.eval()
    expected = torch.stack([again(*part, 3).detach() for part in ((batch[0][12:], batch[1][12:]), others)])
    torch.testing.assert_close(cycle.losses(step), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(cycle.losses(), expected, rtol=1e-9)


def test_a_far_step_is_as_long_as_one_of_the_training(looked):
    """By Adam's averages, at these rates: the step that the optimiser takes where the gradient is the first average."""
    method, optimizer, rates, *_ = looked
    total = 0.0
    for p in method.masking.parameters():
        state = optimizer.state[p]
        m, v = state["exp_avg"] / (1 - 0.9**3), state["exp_avg_sq"] / (1 - 0.95**3)
        total += float((rates[4] * m / (v.sqrt() + 1e-15)).square().sum())
    assert length_of_step(method, optimizer, rates) == pytest.approx(math.sqrt(total))


def test_the_table_and_the_chart():
    changes = torch.tensor([[[-1.0], [2.0]], [[-3.0], [0.0]], [[1.0], [1.0]]], dtype=torch.float64)
    mean, error, lowered = summary(changes)
    assert mean.flatten().tolist() == [-1, 1] and lowered.flatten().tolist() == pytest.approx([2 / 3, 0])
    assert error.flatten().tolist() == pytest.approx([2 / math.sqrt(3), 1 / math.sqrt(3)])
    assert summary(changes[:1])[1].isnan().all()
    axes = steps_chart(changes.expand(3, 2, len(READINGS)), ["exact", "all_steps"], "title").axes
    assert [axis.get_title() for axis in axes] == list(READINGS.values())
    assert [bar.get_height() for bar in axes[2].patches] == [-1, 1]
    assert axes[0].get_lines()[1].get_xydata().tolist() == [[1, 2], [1, 0], [1, 1]]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["exact", "all steps"]
