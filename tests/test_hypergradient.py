"""Which way MLO-MAE's masking network should go: autograd through a cycle of AdamW's steps, and what is beside it."""

import copy
import json
import shutil
from types import SimpleNamespace

import make
import pytest
import reference
import torch
from make import narrow_networks, rand, randn, tiny_levels
from PIL import Image

import evaluate
import train
from common import Stepper
from mlo_mae import moved, split_labelled
from plumbing.shapes import render_shapes
from protocols.hypergradient import (
    CYCLES,
    FORMS,
    adamw_step,
    chart_of,
    cosines_and_norms,
    gradients_of,
    head_by_encoder,
    rates_of,
)


def test_the_step_is_torchs_and_has_a_slope_everywhere():
    """AdamW, with decay, element by element as in the reference; an element without any gradient so far is no nan."""
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    weight, gradient, m = (randn(5, seed=i) for i in range(3))
    v, zero = rand(5, seed=3, dtype=torch.float64), torch.tensor([1.0, 1, 1, 1, 0])
    gradient, m, v = (x * zero for x in (gradient, m, v))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.3, **options)
    optimizer.state[parameter] = {"step": torch.tensor(6.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    parameter.grad = gradient.clone()
    optimizer.step()
    gradient.requires_grad_()
    after, state = adamw_step(weight, gradient, m, v, torch.tensor(6.0), 0.1, decay=0.3, **options)
    torch.testing.assert_close(after.detach(), parameter.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state["exp_avg_sq"].detach(), optimizer.state[parameter]["exp_avg_sq"])
    assert state["step"] == 7
    (slope,) = torch.autograd.grad(after.sum(), gradient)
    again = gradient.detach().requires_grad_()
    other, _, _ = reference.adamw_step(weight, again, m, v, 7, 0.1, decay=0.3, **options)
    torch.testing.assert_close(slope, torch.autograd.grad(other.sum(), again)[0])
    assert slope[4] == pytest.approx(-0.1 * 0.1 / (1 - 0.9**7) / 1e-8)


def of_training():
    """A method in float64 with an optimiser that has taken a few steps, and a cycle's images and labels."""
    method = tiny_levels(unrolling=2, weight_decay=0.3, base_lr=0.02, head_lr=0.04, mask_lr=0.02).double()
    optimizer = method.optimizer(method.config)
    images, labels = rand(16, 3, 16, 16, seed=1, dtype=torch.float64), torch.arange(16) % 10
    stepper = Stepper(optimizer, method.config, torch.device("cpu"))
    for _ in range(3):
        method.update(method, [(images, labels)], stepper)
    return method, optimizer, images, labels


def test_gradients_of_a_cycle():
    """The written-out cycle is the derivative of what the method does, by a difference of two real cycles; AdamW's form
    is that of its last step.
    """
    method, optimizer, images, labels = of_training()
    before = copy.deepcopy(method.state_dict())
    found = gradients_of(method, optimizer, images, labels)
    assert list(found) == [*FORMS, *CYCLES]
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    torch.testing.assert_close(found["adamw"], found["last_step"], rtol=1e-6, atol=1e-10)
    cosines, norms = cosines_and_norms([found])
    assert cosines[0].diagonal().tolist() == pytest.approx([1] * 7)
    assert norms[0].tolist() == pytest.approx([float(g.norm()) for g in found.values()])
    assert (cosines[0, 0, 2:5] < 0.999).all()  # all but the difference point elsewhere
    assert not torch.allclose(found["code"], found["no_factors"], rtol=1e-4)

    masking = method.weights("masking.", copy=True)
    towards = {name: randn(*p.shape, seed=i) for i, (name, p) in enumerate(masking.items())}
    parts = list(zip(images.split(4), labels.split(4), strict=True))

    def loss_after(share):
        again, other = copy.deepcopy((method, optimizer))
        again.load_state_dict(again.state_dict() | moved(masking, towards, share))
        for group, rate in zip(other.param_groups, rates_of(method.config, other), strict=True):
            group["lr"] = rate
        stepper = Stepper(other, again.config, torch.device("cpu"))
        for part, _ in parts[:2]:
            again.train_autoencoder(part, parts[2], stepper)
        again.train_head(*parts[2], stepper)
        return float(again(*parts[3], 3).detach())

    slope = float(found["all_steps"] @ torch.cat([towards[name].flatten() for name in masking]))
    assert slope == pytest.approx((loss_after(1e-6) - loss_after(-1e-6)) / 2e-6, rel=1e-3)


def test_two_gradients_tell_the_length_of_both_terms():
    a, b = randn(9), randn(9, seed=1)
    found = head_by_encoder(0.1 * (a - 0.3 * b), a - b, 0.1, 0.3)
    assert found == pytest.approx(float(b.norm() / a.norm()))


def test_the_chart_tells_the_cosines():
    cosines = torch.eye(7, dtype=torch.float64).repeat(3, 1, 1)
    cosines[:, 1, 5] = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64)
    left, right = chart_of(cosines, "title").axes
    assert [text.get_text() for text in left.texts][7:14] == ["0.00", "1.00", "0.00", "0.00", "0.00", "0.30", "0.00"]
    assert right.get_lines()[1].get_xydata().tolist() == [[1, 0.1], [1, 0.2], [1, 0.6]]
    assert [text.get_text() for text in left.get_yticklabels()][-2:] == ["last step", "all steps"]


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains MLO-MAE for an epoch on a folder of pictures, and returns the run."""
    folder = tmp_path_factory.mktemp("runs")
    images, _, _ = render_shapes(60, 16)
    for i, image in enumerate(images):
        place = folder / "data" / ("train" if i < 48 else "val") / str(i % 4)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    base = ["--data", str(folder / "data"), "--workers", "0", "--epochs", "1", "--amp", "off", "--probe-every", "0"]
    base += ["--epoch-steps", "3"]
    for name, value in make.SMALL_LEVELS.items():
        base += [f"--{name.replace('_', '-')}", str(value)] if name not in ("amp", "epochs", "workers") else []

    def trained(name, *flags):
        if not (folder / name).exists():
            assert train.main(["mlo_mae", *base, *flags, "--out", str(folder / name)]) == 0
        return str(folder / name)

    with narrow_networks():
        yield trained


def test_a_run_is_looked_into(run, capsys):
    argv = [run("mlo", "--seed", "3"), "--protocol", "hypergradient", "--max-steps", "2"]
    assert evaluate.main(argv) == 0
    shown = capsys.readouterr().out
    assert (
        "the head's term is" in shown
        and "mean cosines in 2 cycles" in shown
        and "cosine of no factors" in shown
        and "norm_of" not in shown
    )
    assert "cosines.png" in shown and "steps.png" in shown
    assert "change of level III's loss" in shown and "step_last" not in shown
    with open(f"{argv[0]}/eval.jsonl") as file:
        found = json.loads(file.readlines()[-1])["results"]["trained"]
    assert found["cosine_of_adamw"] == pytest.approx(1, abs=1e-4)
    assert found["norm_of_adamw"] == pytest.approx(found["norm_of_last_step"], rel=1e-3)
    # A step against a gradient lowers the loss by its length, as long as it is short.
    assert found["step_last_adamw"] == pytest.approx(-found["norm_of_adamw"], rel=1e-2)
    assert found["step_cycle_all_steps"] == pytest.approx(-found["norm_of_all_steps"], rel=1e-2)
    assert found["step_half"] == pytest.approx(0.5, abs=1e-2) and found["step_last_adamw_lowered"] == 1


def test_what_level_three_sees_is_what_it_saw_in_training(run, monkeypatch):
    """The split of the labelled images is drawn by the seed of the run, not by that of the protocol."""
    seen = []
    monkeypatch.setattr("protocols.hypergradient.LevelPlan", lambda *a: seen.append(a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.evaluate([run("mlo", "--seed", "3"), "--protocol", "hypergradient"])
    _, config, trained_on, held_out = seen[0]
    data = SimpleNamespace(labels=torch.arange(48) // 12, classes=list("abcd"))
    splits = [split_labelled(data, SimpleNamespace(seed=seed, validation=0.2)) for seed in (3, 0)]
    assert held_out.tolist() == splits[0][0].tolist() != splits[1][0].tolist()
    assert trained_on.tolist() == splits[0][1].tolist() and config.batch_size == 4


def test_the_protocol_wants_three_levels(run, tmp_path, capsys):
    shutil.copytree(run("mlo", "--seed", "3"), tmp_path / "blo")
    path = tmp_path / "blo" / "config.json"
    path.write_text(path.read_text().replace('"mlo"', '"blo"'))
    assert evaluate.main([str(tmp_path / "blo"), "--protocol", "hypergradient"]) == 2
    assert "is for --objective mlo, and this run has blo" in capsys.readouterr().err


def test_the_optimiser_must_be_there(run, tmp_path, capsys):
    shutil.copytree(run("mlo", "--seed", "3"), tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "last.pt")
    for state in (None, checkpoint["optimizer"] | {"state": {}}):
        torch.save(checkpoint | {"optimizer": state}, tmp_path / "run" / "last.pt")
        assert evaluate.main([str(tmp_path / "run"), "--protocol", "hypergradient"]) == 2
        assert "is not that of config.json, or has taken no step" in capsys.readouterr().err
