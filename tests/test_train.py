"""The command line, run folders, resuming, faults, and several processes."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import test_common
import torch
from PIL import Image

import common
import magma
import train
from common import MemoryImages, NonFiniteLoss, UserError

ROOT = Path(train.__file__).parent
DATA = MemoryImages(*common.render_shapes(40, 8)[:2], list(common.SHAPES), (0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
SMALL = "--image-size 8 --mask-ratio 0.5 --epochs 1 --batch-size 1024 --probe-every 0"  # on shapes
TINY = "--image-size 8 --mask-ratio 0.5 --epochs 4 --batch-size 8 --probe-every 2 --e-st 1 --e-dur 2 --base-lr 0.03"


def tiny_config(out, *flags):
    return common.read_flags(magma.Config, magma.RECIPES, [*TINY.split(), "--out", str(out), *flags])


def fit(out, *flags, method_class=magma.Magma, data=DATA):
    config = tiny_config(out, *flags)
    torch.manual_seed(config.seed)
    method = method_class(config, data)
    return method, common.fit(method, data, DATA, config)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def without_times(log):
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "command", "config")} for line in log]


def test_the_loop_scales_the_learning_rate_of_each_group(tmp_path):
    seen = []

    class Scaled(magma.Magma):
        def optimizer(self, config):
            optimizer = super().optimizer(config)
            optimizer.param_groups[1]["lr_scale"] = 3.0
            return optimizer

        def update(self, model, batches, stepper):
            seen.append([group["lr"] for group in stepper.optimizer.param_groups])
            return super().update(model, batches, stepper)

    fit(tmp_path / "run", "--probe-every", "0", method_class=Scaled)
    assert seen[-1][0] > 0
    for plain, scaled in seen:
        assert scaled == pytest.approx(3 * plain)


# --- the command line ------------------------------------------------------------------------------------------------


def run_main(*argv, capsys):
    code = train.main([str(x) for x in argv])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("magna", "unknown method 'magna'; did you mean 'magma'? choose from "),
        ("--epochs 1 magma", "give the method first: python train.py METHOD --epochs 1 magma"),
        ("magma --data {tmp}/none", "no folder {tmp}/none; expected one with train/<class>/*"),
        ("mlo_mae --start {tmp}/none.pt", "there is no file {tmp}/none.pt"),
        ("magma --data cifar11", "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
        ("magma --epoch 3", "unknown flag '--epoch'; did you mean --epochs?"),
        ("magma --epochs three", "argument --epochs: invalid int value: 'three'"),
        ("magma --data cifar10 --root {tmp}", "no cifar10 at {tmp}/cifar-10-batches-bin; give the --root that holds"),
        ("magma --data imagenet100 --root {tmp}", "no folder {tmp}/train; expected {tmp}/train/<class>/*"),
        ("magma --image-size 30", "image size 30 x 30 is not a multiple of the patch size 4"),
        ("magma --batch-size 5000", "a batch of 5000 is larger than the data set of 4096"),
        ("magma --image-size -4", "--image-size -4 makes no sense; give 1 or more"),
        ("magma --patch 0", "a transformer of width 96, 6 blocks, 3 heads and patch 0 cannot be built"),
        ("magma --decoder-dim 30 --decoder-heads 3", "a 2-D sine-cosine code needs a width divisible by 4, not 30"),
        ("magma --model vit_huge", "unknown --model 'vit_huge'"),
        ("magma --device tpu", "device 'tpu' cannot be used here"),
        ("magma --out {tmp}", "{tmp} exists; add --resume to go on with it, or choose another folder by --out"),
    ],
)
def test_train_answers_a_mistake_with_one_line_and_code_2(argv, message, tmp_path, capsys):
    code, output = run_main(*argv.format(tmp=tmp_path).split(), capsys=capsys)
    assert code == 2
    assert output.err.startswith("error: " + message.format(tmp=tmp_path))
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_train_lists_its_methods(argv, capsys):
    code, output = run_main(*argv, capsys=capsys)
    assert code == 0
    for name in train.METHODS:
        assert re.search(rf"^  {name} +\S+", output.out, flags=re.MULTILINE)


def test_train_help_lists_the_flags_of_a_method(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["magma", "--help"])
    assert stop.value.code == 0
    assert "--e-st" in capsys.readouterr().out


def test_train_runs_a_method_by_name_and_prints_the_table(tmp_path, capsys):
    flags = [*SMALL.split(), "--probe-every", "1", "--probe-images", "200"]
    code, output = run_main("magma", *flags, "--out", tmp_path / "run", capsys=capsys)
    assert code == 0, output.err
    for text in (
        "method      magma: 0.7",
        "data        shapes: 4096 images, 10 classes, size 8",
        "1 process(es)",
        "batch       1024 images, 1 part(s); learning rate 0.048",
        "epochs      0 of 1 done, 4 steps each",
        "lam=1.0",
    ):
        assert text in output.out
    table = output.out.splitlines()[-4:]
    assert table[0].split() == ["accuracy", "(%)", "kNN", "linear"]
    assert [row[:20].strip() for row in table[1:]] == ["trained encoder", "untrained encoder", "raw pixels"]
    assert all(re.fullmatch(r" +\d+\.\d +\d+\.\d", row[20:]) for row in table[1:])


def test_train_hands_on_seed_and_data_flags(monkeypatch):
    made, asked = [], []
    monkeypatch.setattr(common, "fit", lambda method, *_: made.append(method.state_dict()) or {})
    monkeypatch.setattr(common, "load_data", lambda name, **options: asked.append((name, options)) or DATA)
    for seed in (0, 1, 1):
        flags = ["--seed", str(seed), "--skip-bad-images", "--download", "--root", "there", "--image-size", "8"]
        assert train.main(["magma", *flags]) == 0
    assert same_weights(made[1], made[2])
    assert not same_weights(made[0], made[1])
    wanted = {"root": "there", "image_size": 8, "download": True, "skip_bad_images": True}
    assert [options["split"] for _, options in asked[:2]] == ["train", "test"]
    assert all(name == "shapes" and wanted.items() <= options.items() for name, options in asked)


def test_train_reads_class_folders_of_the_users_own(tmp_path, capsys):
    test_common.write_folders(tmp_path / "mine", train=4, size=(40, 40), ending="jpg")
    flags = "--model vit_micro --image-size 32 --epochs 1 --batch-size 8 --workers 1 --decoder-depth 1"
    code, output = run_main(
        "magma", "--data", tmp_path / "mine", *flags.split(), "--out", tmp_path / "run", capsys=capsys
    )
    assert code == 0, output.err
    bad = next((tmp_path / "mine" / "train" / "bee").iterdir())
    bad.write_bytes(bad.read_bytes()[:300])
    code, output = run_main(
        "magma", "--data", tmp_path / "mine", *flags.split(), "--out", tmp_path / "run2", capsys=capsys
    )
    assert code == 2
    assert output.err.startswith(f"error: 1 of 8 images cannot be read: {bad} (")


# --- run folders -----------------------------------------------------------------------------------------------------


def test_fit_writes_a_run_folder(tmp_path):
    out = tmp_path / "run"
    method, results = fit(out)
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "config.json",
        "log.jsonl",
        "last.pt",
        "encoder.pt",
        "pictures.png",
    }
    assert json.loads((out / "config.json").read_text())["lam"] == 1.0
    log = log_of(out)
    assert log[0]["versions"]["torch"] == torch.__version__
    assert log[0]["config"]["epochs"] == 4
    assert "command" in log[0]
    assert [line["epoch"] for line in log[1:]] == [0, 1, 2, 3, 4]
    assert [("knn" in line) for line in log[1:]] == [True, False, True, False, True]
    assert set(log[2]) == {"epoch", "loss", "mae", "manifold", "uniformity", "lr", "images_per_second"}
    for line in log[2:]:  # e_st = 1, e_dur = 2: in the second and third epoch
        extra = line["loss"] - line["mae"]
        assert extra == pytest.approx(line["manifold"] if line["epoch"] in (2, 3) else 0.0, abs=1e-5)
        assert line["manifold"] > 0
    assert results["trained"] == {"knn": log[-1]["knn"], "linear": log[-1]["linear"]}
    assert results["pixels"] == log[1]["pixels"]
    images = DATA.images[:3].float() / 255
    torch.testing.assert_close(common.load_encoder(out / "encoder.pt")(images), method.encoder.eval()(images))
    with Image.open(out / "pictures.png") as picture:
        assert picture.size == (3 * (128 + 4), 8 * (128 + 4))


def test_the_same_seed_gives_the_same_log_and_another_seed_another(tmp_path):
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, "--seed", str(seed))
        logs.append(without_times(log_of(tmp_path / name)))
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_each_step_has_draws_of_its_own(tmp_path):
    class Drawing(magma.Magma):
        def update(self, model, batches, stepper):
            drawn.append(float(torch.rand(())))
            return super().update(model, batches, stepper)

    drawn = []
    fit(tmp_path / "run", "--probe-every", "0", method_class=Drawing)
    assert len(set(drawn)) == len(drawn) == 20


def test_an_existing_run_is_never_overwritten(tmp_path):
    fit(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="run exists; add --resume"):
        fit(tmp_path / "run")
    with pytest.raises(UserError, match=r"run was trained otherwise \(base_lr 0.03 -> 0.1, lam 1.0 -> 2.0\)"):
        fit(tmp_path / "run", "--resume", "--base-lr", "0.1", "--lam", "2")
    fewer = MemoryImages(DATA.images[:35], DATA.labels[:35], DATA.classes, DATA.mean, DATA.std)
    with pytest.raises(UserError, match=r"was trained otherwise \(images 40 -> 35\)"):
        fit(tmp_path / "run", "--resume", data=fewer)
    with pytest.raises(UserError, match=r"was trained otherwise \(precision .* -> torch.float16\)"):
        fit(tmp_path / "run", "--resume", "--amp", "fp16")
    (tmp_path / "run" / "last.pt").write_bytes(before[tmp_path / "run" / "last.pt"][:1000])
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint"):
        fit(tmp_path / "run", "--resume")
    torch.save([1, 2], tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint of a run"):
        fit(tmp_path / "run", "--resume")
    (tmp_path / "run" / "last.pt").unlink()
    with pytest.raises(UserError, match=r"run holds an encoder but no last\.pt"):
        fit(tmp_path / "run", "--resume")
    before.pop(tmp_path / "run" / "last.pt")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_of_another_method_is_refused(tmp_path):
    fit(tmp_path / "run")

    class Other(magma.Magma):
        name = "other"

    with pytest.raises(UserError, match=r"was trained otherwise \(method magma -> other\)"):
        fit(tmp_path / "run", "--resume", method_class=Other)


def test_a_run_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run folder .*file/run \(Not a directory\)"):
        fit(tmp_path / "file" / "run")


def test_without_probes_there_are_no_results(tmp_path):
    _, results = fit(tmp_path / "run", "--probe-every", "0")
    assert results == {}
    assert common.format_results(results).count("\n") == 0


# --- faults ----------------------------------------------------------------------------------------------------------


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
    method, results = fit(tmp_path / "run")
    assert "nothing is left to do" not in capsys.readouterr().out
    again, results_again = fit(tmp_path / "run", "--resume", "--recipe", "shapes")
    assert "the run is finished: nothing is left to do" in capsys.readouterr().out
    assert results == results_again and same_weights(method.state_dict(), again.state_dict())


@pytest.mark.parametrize("step", [0, 1, 7, 10, 19])
@pytest.mark.parametrize("flags", [(), ("--ssl", "vicreg", "--projector-dim", "16"), ("--save-every", "3")])
def test_resume_matches_uninterrupted_run(tmp_path, step, flags):
    """Bit for bit: weights, optimiser and log, wherever the run stopped (5 steps an epoch)."""
    whole, results = fit(tmp_path / "whole", *flags)
    with pytest.raises(Stop):
        fit(tmp_path / "cut", *flags, method_class=stopping_at(step))
    resumed, results_again = fit(tmp_path / "cut", "--resume", *flags)
    assert same_weights(whole.state_dict(), resumed.state_dict())
    assert results == results_again
    assert without_times(log_of(tmp_path / "whole")) == without_times(log_of(tmp_path / "cut"))
    checkpoints = [common.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut")]
    moments = [[s["exp_avg_sq"] for s in c["optimizer"]["state"].values()] for c in checkpoints]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_a_run_that_stopped_between_checkpoint_and_log_line_probes_again(tmp_path, monkeypatch):
    whole, _ = fit(tmp_path / "whole")
    count = itertools.count()

    def probe(*args, **kwargs):
        if next(count) == 2:  # untrained encoder and pixels come first
            raise Stop
        return real(*args, **kwargs)

    real = common.probe
    with monkeypatch.context() as patched:
        patched.setattr(common, "probe", probe)
        with pytest.raises(Stop):
            fit(tmp_path / "cut")
    assert common.load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 10
    assert log_of(tmp_path / "cut")[-1]["epoch"] == 1
    resumed, _ = fit(tmp_path / "cut", "--resume")
    assert same_weights(whole.state_dict(), resumed.state_dict())
    assert [line["epoch"] for line in log_of(tmp_path / "cut")[1:]] == [0, 1, 2, 3, 4]
    for a, b in zip(log_of(tmp_path / "whole")[1:], log_of(tmp_path / "cut")[1:], strict=True):
        assert {k: a[k] for k in ("epoch", "loss", "manifold") if k in a} == {
            k: b[k] for k in a if k in ("epoch", "loss", "manifold")
        }


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Exploding(magma.Magma):
        def forward(self, images, labels=None, mask=None):
            out = super().forward(images, labels, mask)
            calls.append(1)
            return out | {"loss": out["loss"] * (float("nan") if len(calls) == 8 else 1.0)}

    calls = []
    with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan, mae [\d.]+, .*the last good checkpoint is .*last\.pt"):
        fit(tmp_path / "run", "--probe-every", "0", method_class=Exploding)
    state = common.load_checkpoint(tmp_path / "run" / "last.pt")
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
        fit(tmp_path / "run", "--probe-every", "0", method_class=Exploding)
    assert common.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


def test_train_ends_with_code_1_when_the_loss_is_not_finite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(magma, "reconstruction_loss", lambda prediction, *_: prediction.sum() * float("inf"))
    code, output = run_main("magma", *SMALL.split(), "--out", tmp_path / "run", capsys=capsys)
    assert code == 1
    assert output.err.startswith("error: step 0: loss")
    assert "no checkpoint was written" in output.err


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifold", "uniformity", "contrastive", "vicreg", "sum"])
def test_gathered_loss_on_two_ranks_has_the_gradient_of_one_process(name):
    z = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = z.clone().requires_grad_()
    loss = processes.coupled_loss(name, *whole)
    loss.backward()
    for part in processes.start(processes.gradient_of_gathered_loss, name, z):
        torch.testing.assert_close(part["loss"], loss.detach())
        torch.testing.assert_close(part["gradient"], whole.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fields", [{"gather": True}, {"gather": False}, {"gather": False, "accumulate": 2}])
def test_two_ranks_have_the_gradient_of_one_process(fields):
    """With --gather that of the whole batch; without, the mean of the gradients of each part on its own."""
    import test_magma

    fields |= {"uniformity": 0.5}
    images, mask = test_magma.pictures(8, 8), common.random_mask(8, 4, 0.5, torch.Generator().manual_seed(0))
    parts = 1 if fields["gather"] else 2 * fields.get("accumulate", 1)
    method = test_magma.tiny(**fields | {"gather": False})
    for part, hidden in zip(images.chunk(parts), mask.chunk(parts), strict=True):
        (method(part, mask=hidden)["loss"] / parts).backward()
    want = {name: p.grad for name, p in method.named_parameters()}
    for gradients in processes.start(processes.gradients_of_magma, fields, images, mask):
        assert gradients.keys() == want.keys()
        for name, gradient in gradients.items():
            assert (gradient - want[name]).norm() < 1e-4 * want[name].norm(), name


def test_fit_on_two_ranks_keeps_the_weights_equal_and_resumes(tmp_path):
    flags = [*TINY.split(), "--out", str(tmp_path / "run")]
    first, second = processes.start(processes.fit_tiny, str(tmp_path), flags)
    assert same_weights(first["weights"], second["weights"])
    assert first["rows"] == second["rows"] == 3
    assert [line["epoch"] for line in log_of(tmp_path / "run")[1:]] == [0, 1, 2, 3, 4]
    again, _ = processes.start(processes.fit_tiny, str(tmp_path), [*flags, "--resume"])
    assert same_weights(first["weights"], again["weights"])


def test_torchrun_trains_on_two_processes(tmp_path):
    flags = [*SMALL.split(), "--probe-every", "1", "--probe-images", "100"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    command += ["magma", *flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained encoder") == 2  # one table: trained and untrained
    assert "2 process(es)" in done.stdout
    assert "Warning:" not in done.stderr
    assert np.isfinite(log_of(tmp_path / "run")[-1]["loss"])
