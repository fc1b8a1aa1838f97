"""Run folders: what they hold, that they are never overwritten, and that a resumed run equals an uninterrupted one."""

import dataclasses
import itertools
import json
import os
import re
import signal

import numpy as np
import processes
import pytest
import torch
from make import TINY, fit_magma, log_of, narrow_networks, same_weights, shapes, unlabelled, without_times
from PIL import Image

import common
import magma
import mixedae
import mlo_mae
from plumbing.encoders import Encoder, load_encoder
from plumbing.errors import NonFiniteLoss, Stopped, UserError
from plumbing.files import load_checkpoint
from plumbing.runs import Meter
from plumbing.settings import read_flags
from plumbing.tables import format_table

# --- meter and log ---------------------------------------------------------------------------------------------------


def test_meter_averages_and_stops_at_a_loss_that_is_not_finite(tmp_path):
    meter = Meter()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        meter.add(step, {"loss": torch.tensor(value)})
        meter.flush(tmp_path / "last.pt")
    assert meter.means() == {"loss": 3.0}
    meter.add(7, {"loss": torch.tensor(float("nan")), "part": torch.tensor(1.5)})
    with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan, part 1.5; no checkpoint was written"):
        meter.flush(tmp_path / "last.pt")


def test_meter_goes_on_with_the_sums_of_an_unfinished_epoch(tmp_path):
    meter = Meter({"loss": 3.0, "part": 1.0}, 2)
    meter.add(5, {"loss": torch.tensor(6.0), "part": torch.tensor(2.0)})
    assert meter.means() == {"loss": 1.5, "part": 0.5}  # what waits is not read yet
    meter.flush(tmp_path / "last.pt")
    assert (meter.sums, meter.count, meter.means()) == ({"loss": 9.0, "part": 3.0}, 3, {"loss": 3.0, "part": 1.0})
    meter.flush(tmp_path / "last.pt")
    assert meter.count == 3
    assert Meter().means() == {}


# --- run folders -----------------------------------------------------------------------------------------------------


def test_fit_writes_a_run_folder(tmp_path):
    out = tmp_path / "run"
    method, results = fit_magma(out)
    files = {".lock", "config.json", "log.jsonl", "last.pt", "encoder.pt", "pictures.png"}
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "config.json").read_text())["lam"] == 1.0
    log = log_of(out)
    assert log[0]["versions"]["torch"] == torch.__version__
    assert log[0]["config"]["epochs"] == 4
    assert "command" in log[0]
    assert [line["epoch"] for line in log[1:]] == [0, 1, 2, 3, 4]
    assert [("knn" in line) for line in log[1:]] == [True, False, True, False, True]
    assert set(log[2]) == {"epoch", "loss", "mae", "manifold", "uniformity", "lr", "images_per_second", "seconds"}
    for line in log[2:]:  # e_st = 1, e_dur = 2: in the second and third epoch
        extra = line["loss"] - line["mae"]
        assert extra == pytest.approx(line["manifold"] if line["epoch"] in (2, 3) else 0.0, abs=1e-5)
        assert line["manifold"] > 0
    assert results["trained"] == {"knn": log[-1]["knn"], "linear": log[-1]["linear"]}
    assert results["pixels"] == log[1]["pixels"]
    images = shapes().images[:3].float() / 255
    torch.testing.assert_close(load_encoder(out / "encoder.pt")(images), method.encoder.eval()(images))
    with Image.open(out / "pictures.png", formats=["PNG"]) as picture:
        assert picture.size == (3 * (8 + 4) + 4, 20 + 8 * (8 + 4) + 4)  # captions above, and white between


def test_an_existing_run_is_never_overwritten(tmp_path):
    fit_magma(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="run exists; add --resume"):
        fit_magma(tmp_path / "run")
    with pytest.raises(UserError, match=r"run was trained otherwise \(base_lr 0.03 -> 0.1, lam 1.0 -> 2.0\)"):
        fit_magma(tmp_path / "run", "--resume", "--base-lr", "0.1", "--lam", "2")
    with pytest.raises(UserError, match=r"was trained otherwise \(images 40 -> 35\)"):
        fit_magma(tmp_path / "run", "--resume", data=shapes(35))
    with pytest.raises(UserError, match=r"was trained otherwise \(precision .* -> torch.float16\)"):
        fit_magma(tmp_path / "run", "--resume", "--amp", "fp16")
    (tmp_path / "run" / "last.pt").write_bytes(before[tmp_path / "run" / "last.pt"][:1000])
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint"):
        fit_magma(tmp_path / "run", "--resume")
    torch.save([1, 2], tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint of a run"):
        fit_magma(tmp_path / "run", "--resume")
    (tmp_path / "run" / "last.pt").unlink()
    with pytest.raises(UserError, match=r"run holds an encoder but no last\.pt"):
        fit_magma(tmp_path / "run", "--resume")
    before.pop(tmp_path / "run" / "last.pt")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_of_another_method_is_refused(tmp_path):
    fit_magma(tmp_path / "run")

    class Other(magma.Magma):
        name = "other"

    with pytest.raises(UserError, match=r"was trained otherwise \(method magma -> other\)"):
        fit_magma(tmp_path / "run", "--resume", method_class=Other)


def test_a_run_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run folder .*file/run \(Not a directory\)"):
        fit_magma(tmp_path / "file" / "run")


def test_without_probes_there_are_no_results(tmp_path):
    _, results = fit_magma(tmp_path / "run", "--probe-every", "0")
    assert results == {}
    assert format_table(results).count("\n") == 0


def test_the_seconds_of_a_log_are_those_of_all_its_starts(tmp_path, monkeypatch):
    """By a clock that only steps move: stopped within an epoch and resumed, the log is that of a run without a stop."""
    clock, steps, stop = [0.0], [0], [0]

    class Timed(magma.Magma):
        def update(self, *given):
            clock[0] += 2.0
            steps[0] += 1
            if steps[0] == stop[0]:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().update(*given)

    monkeypatch.setattr("plumbing.runs.time.perf_counter", lambda: clock[0])
    fit_magma(tmp_path / "whole", "--probe-every", "0", method_class=Timed)
    steps[0], stop[0] = 0, 8
    with pytest.raises(Stopped):
        fit_magma(tmp_path / "run", "--probe-every", "0", method_class=Timed)
    clock[0] += 1000.0
    fit_magma(tmp_path / "run", "--probe-every", "0", "--resume", method_class=Timed)
    for out in ("whole", "run"):
        lines = log_of(tmp_path / out)[2:]
        assert [line["seconds"] for line in lines] == [10.0, 20.0, 30.0, 40.0]  # five steps an epoch
        assert [line["images_per_second"] for line in lines] == [4] * 4
    path = tmp_path / "run" / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # a kill before the last line
    fit_magma(tmp_path / "run", "--probe-every", "0", "--resume", method_class=Timed)
    assert log_of(tmp_path / "run")[-1]["seconds"] == 40.0


def test_a_signal_after_the_last_step_is_not_swallowed(tmp_path):
    """What follows, such as the next of --seeds, must not start; and nothing is lost."""

    class Probed(magma.Magma):
        probes = 0

        def probe(self, *given):
            self.probes += 1
            if self.probes == 2:  # the first is before the first step
                os.kill(os.getpid(), signal.SIGTERM)
            return super().probe(*given)

    with pytest.raises(Stopped, match="stopped by SIGTERM after the last step; --resume goes on"):
        fit_magma(tmp_path / "run", "--probe-every", "4", method_class=Probed)
    _, results = fit_magma(tmp_path / "run", "--probe-every", "4", "--resume")
    assert log_of(tmp_path / "run")[-1]["epoch"] == 4 and results


# --- stopping and going on -------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping_at(step, error=Stop):
    """Magma that raises in the update of one step."""

    class Stopping(magma.Magma):
        def update(self, model, batches, stepper):
            done = next(counter)
            if done == step:
                raise error
            return super().update(model, batches, stepper)

    counter = itertools.count()
    return Stopping


def test_a_finished_run_says_so_and_may_name_its_recipe(tmp_path, capsys):
    method, results = fit_magma(tmp_path / "run")
    assert "nothing is left to do" not in capsys.readouterr().out
    again, results_again = fit_magma(tmp_path / "run", "--resume", "--recipe", "shapes")
    assert "the run is finished: nothing is left to do" in capsys.readouterr().out
    assert results == results_again and same_weights(method.state_dict(), again.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed: flags -> folder, method, results; made when first asked for."""
    made = {}

    def find(*flags):
        if flags not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            made[flags] = (out, *fit_magma(out, *flags))
        return made[flags]

    return find


VICREG, RARE = ("--ssl", "vicreg", "--projector-dim", "16"), ("--save-every", "3")


# 5 steps an epoch: before and after the first step, within an epoch, between two, before the last step; in one run.
@pytest.mark.parametrize(("flags", "steps"), [((), (0, 1, 7, 10, 19)), (VICREG, (7,)), (RARE, (7, 10))])
def test_resume_matches_uninterrupted_run(tmp_path, whole, flags, steps):
    """Bit for bit: weights, optimiser and log, wherever the run stopped."""
    out, method, results = whole(*flags)
    for step in steps:
        saved = tmp_path / "cut" / "last.pt"
        begun = load_checkpoint(saved)["step"] if saved.exists() else 0
        with pytest.raises(Stop):
            fit_magma(tmp_path / "cut", "--resume", *flags, method_class=stopping_at(step - begun))
    resumed, results_again = fit_magma(tmp_path / "cut", "--resume", *flags)
    assert same_weights(method.state_dict(), resumed.state_dict())
    assert results == results_again
    assert without_times(log_of(out)) == without_times(log_of(tmp_path / "cut"))
    checkpoints = [load_checkpoint(folder / "last.pt") for folder in (out, tmp_path / "cut")]
    moments = [[s["exp_avg_sq"] for s in c["optimizer"]["state"].values()] for c in checkpoints]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_a_run_that_stopped_between_checkpoint_and_log_line_probes_again(tmp_path, whole, monkeypatch):
    out, method, _ = whole()
    probed = []

    def probe(self, *rest):
        probed.append(1)
        if len(probed) == 2:  # the untrained encoder comes first
            raise Stop
        return real(self, *rest)

    real = magma.Magma.probe
    with monkeypatch.context() as patched:
        patched.setattr(magma.Magma, "probe", probe)
        with pytest.raises(Stop):
            fit_magma(tmp_path / "cut")
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 10
    assert log_of(tmp_path / "cut")[-1]["epoch"] == 1
    resumed, _ = fit_magma(tmp_path / "cut", "--resume")
    assert same_weights(method.state_dict(), resumed.state_dict())
    assert [line["epoch"] for line in log_of(tmp_path / "cut")[1:]] == [0, 1, 2, 3, 4]
    for a, b in zip(log_of(out)[1:], log_of(tmp_path / "cut")[1:], strict=True):
        assert [a.get(name) for name in ("epoch", "loss", "manifold")] == [
            b.get(name) for name in ("epoch", "loss", "manifold")
        ]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Exploding(magma.Magma):
        def forward(self, images, labels=None, mask=None):
            out = super().forward(images, labels, mask)
            calls.append(1)
            return out | {"loss": out["loss"] * (float("nan") if len(calls) == 8 else 1.0)}

    calls = []
    with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan, mae [\d.]+, .*the last good checkpoint is .*last\.pt"):
        fit_magma(tmp_path / "run", "--probe-every", "0", method_class=Exploding)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 5
    assert all(torch.isfinite(x).all() for x in state["weights"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Exploding(magma.Magma):
        def update(self, model, batches, stepper):
            out = super().update(model, batches, stepper)
            if next(counter) == 9:  # a gradient that is not finite, after a loss that is
                self.encoder.norm.bias.data.fill_(float("nan"))
            return out

    counter = itertools.count()
    with pytest.raises(NonFiniteLoss, match=r"step 9: the weights are not finite; the last good checkpoint is"):
        fit_magma(tmp_path / "run", "--probe-every", "0", method_class=Exploding)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


# --- numbers that a file can hold ------------------------------------------------------------------------------------


def test_statistics_and_settings_of_numpy_are_saved_as_plain_numbers_and_read_again(tmp_path):
    data = dataclasses.replace(shapes(), mean=np.float32([0.4, 0.4, 0.4]), std=torch.tensor([0.3, 0.3, 0.3]))
    settings = {"base_lr": np.float32(0.03), "epochs": np.int64(2), "weight_decay": np.float64(0.05), "e_st": 0}
    with narrow_networks():
        config = read_flags(magma.Config, magma.RECIPES, [*TINY.split(), "--out", str(tmp_path / "run")])
        config = dataclasses.replace(config, **settings)
        torch.manual_seed(0)
        common.fit(magma.Magma(config, data), data, shapes(), config)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 10
    assert {type(state["identity"][name]) for name in settings} == {int, float}
    assert load_encoder(tmp_path / "run" / "encoder.pt").fields["mean"] == pytest.approx((0.4,) * 3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2
    assert len(log_of(tmp_path / "run")) == 4


def test_an_encoder_that_cannot_be_built_again_ends_the_run_at_its_first_checkpoint(tmp_path):
    class Odd(common.ViT):
        def __init__(self, secret, **fields):
            super().__init__(**fields)

    class Method(magma.Magma):
        def __init__(self, config, data):
            super().__init__(config, data)
            self.autoencoder.encoder = Odd(1, **self.encoder.fields)

    try:
        with pytest.raises(UserError, match=r"encoder.pt .*secret"):
            fit_magma(tmp_path / "run", "--probe-every", "0", method_class=Method)
    finally:
        del Encoder.kinds["Odd"]
    assert len(log_of(tmp_path / "run")) == 2


def test_a_probe_without_a_value_is_null_in_the_log_and_a_dash_in_the_table(tmp_path):
    class Method(magma.Magma):
        def probe(self, *_):
            return {"knn": None, "linear": None}

    _, results = fit_magma(tmp_path / "run", "--epochs", "1", "--e-st", "0", "--e-dur", "0", method_class=Method)
    assert results["trained"] == {"linear": None, "knn": None}
    assert log_of(tmp_path / "run")[1]["knn"] is None
    assert re.search(r"trained encoder +- +-", format_table(results))


# --- pictures without labels -----------------------------------------------------------------------------------------


def test_a_run_without_labels_tells_the_held_out_loss_and_the_rank(tmp_path, capsys):
    _, results = fit_magma(tmp_path / "run", data=unlabelled())
    log = log_of(tmp_path / "run")[1:]
    assert [set(line) & {"knn", "linear", "pixels"} for line in log] == [set()] * 5
    assert [{"held_out_loss", "effective_rank"} <= set(line) for line in log] == [True, False, True, False, True]
    names = ("held_out_loss", "effective_rank")
    expected = {
        row: {name: line[name] for name in names} for row, line in (("trained", log[-1]), ("untrained", log[0]))
    }
    assert results == expected
    assert results["trained"]["held_out_loss"] < results["untrained"]["held_out_loss"]
    assert 1 <= results["trained"]["effective_rank"] <= 24
    assert re.search(r"held-out loss +effective rank\ntrained encoder", format_table(results))
    assert "40 images, no classes, size 8" in capsys.readouterr().out
    _, again = fit_magma(tmp_path / "run", "--resume", data=unlabelled())
    assert again == results


@pytest.mark.parametrize("count", [1, 7, 20])
def test_the_held_out_loss_is_that_of_batches_as_large_as_in_training(count, tmp_path):
    """With the same crops and masks each time; few pictures come several times. The last one is not seen to differ."""
    seen, test = [], unlabelled(count)

    class Method(magma.Magma):
        def forward(self, images, labels=None):
            out = super().forward(images, labels)
            if not self.training:
                seen.append((len(images), float(out["loss"]), (images.sum().item(), torch.rand(()).item())))
            return out

    with narrow_networks():
        config = read_flags(magma.Config, magma.RECIPES, [*TINY.split(), "--out", str(tmp_path / "run")])
        torch.manual_seed(0)
        results = common.fit(Method(config, unlabelled()), unlabelled(), test, config)
    batches = max(1, count // 8)
    assert [size for size, _, _ in seen] == [8] * batches * 3
    first, _, last = (seen[i * batches : (i + 1) * batches] for i in range(3))
    assert [row[2] for row in first] == [row[2] for row in last]
    for row, found in (("untrained", first), ("trained", last)):
        mean = sum(loss for _, loss, _ in found) / batches
        assert results[row]["held_out_loss"] == pytest.approx(mean, rel=1e-5)


def test_a_few_held_out_pictures_are_mixed_in_whole_groups(tmp_path):
    recipe = "--image-size 8 --epochs 1 --batch-size 8 --warmup-epochs 0 --probe-every 1 --cell 1"
    with narrow_networks():
        config = read_flags(mixedae.Config, mixedae.RECIPES, [*recipe.split(), "--out", str(tmp_path / "run")])
        torch.manual_seed(0)
        results = common.fit(mixedae.MixedAE(config, unlabelled()), unlabelled(), unlabelled(3), config)
    assert 0 < results["trained"]["held_out_loss"] < 10


def test_two_processes_tell_the_held_out_loss_without_waiting_for_each_other(tmp_path):
    """MAGMA's --gather and U-MAE's term take part from all processes in training; process 0 alone probes."""
    flags = ["--gather", "--uniformity", "0.1", "--epochs", "2", "--amp", "off"]
    two = processes.start(processes.fit_without_labels, str(tmp_path / "two"), flags)
    one = processes.start(processes.fit_without_labels, str(tmp_path / "one"), flags, ranks=1)
    assert two[0] == two[1]
    assert two[0]["untrained"] == pytest.approx(one[0]["untrained"], rel=1e-4)


def test_levels_need_labels(tmp_path):
    config = read_flags(mlo_mae.Config, mlo_mae.RECIPES, ["--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="mlo_mae learns from labels: give pictures in the folders of two classes"):
        mlo_mae.MultiLevelMAE(config, unlabelled())


def test_the_held_out_loss_is_that_of_one_schedule(tmp_path):
    """MAGMA's term acts from epoch 2 on: without learning, all figures are equal; a resumed run has the same."""
    still = ["--base-lr", "0", "--weight-decay", "0", "--probe-every", "1", "--e-st", "2", "--amp", "off"]
    fit_magma(tmp_path / "run", *still, data=unlabelled())
    found = [line["held_out_loss"] for line in log_of(tmp_path / "run")[1:]]
    assert len(found) == 5 and len(set(found)) == 1
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines[:-1]))  # a kill came between a checkpoint and its line
    fit_magma(tmp_path / "run", *still, "--resume", data=unlabelled())
    assert [line["held_out_loss"] for line in log_of(tmp_path / "run")[1:]] == found
