"""train.py's command line: what it prints, what it refuses, and what a refused start leaves behind."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make import log_of, narrow_networks, same_weights, shapes, write_folders

import magma
import train
from common import METHODS
from plumbing.asked import ELSEWHERE
from plumbing.settings import read_flags

README = Path(train.__file__).with_name("README.md")

SMALL = "--image-size 8 --mask-ratio 0.5 --epochs 1 --batch-size 1024 --probe-every 0"  # on shapes


def run_main(*argv, capsys):
    code = train.main([str(x) for x in argv])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("magna", "unknown method 'magna'; did you mean 'magma'? choose from "),
        ("--epochs 1 magma", "give the method first: python train.py METHOD --epochs 1 magma"),
        ("magma --data {tmp}/none", "no folder {tmp}/none; give a folder of pictures"),
        ("mlo_mae --image-size 16 --start {tmp}/none.pt", "there is no file {tmp}/none.pt"),
        ("magma --data cifar11", "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
        ("magma --epoch 3", "unknown flag '--epoch'; did you mean --epochs?"),
        ("magma --epochs three", "argument --epochs: invalid int value: 'three'"),
        ("magma --data cifar10 --root {tmp}", "no cifar10 at {tmp}/cifar-10-batches-bin; give the --root that holds"),
        ("magma --data imagenet100 --root {tmp}", "no folder {tmp}/train; expected {tmp}/train/<class>/*"),
        ("magma --image-size 30", "image size 30 x 30 is not a multiple of the patch size 4"),
        ("magma --image-size 8 --batch-size 5000", "a batch of 5000 is larger than the data set of 4096"),
        ("magma --image-size -4", "--image-size -4 makes no sense; give 1 or more"),
        ("magma --image-size 8 --patch 0", "a transformer of width 96, 6 blocks, 3 heads"),
        ("magma --image-size 8 --decoder-dim 30 --decoder-heads 3", "a 2-D sine-cosine code needs a width divisible"),
        ("magma --model vit_huge", "unknown --model 'vit_huge'"),
        ("magma --device tpu", "device 'tpu' cannot be used here"),
        ("magma --image-size 8 --out {tmp}/..", "{tmp}/.. exists; add --resume to go on with it, or choose another"),
    ],
)
def test_train_answers_a_mistake_with_one_line_and_code_2(argv, message, tmp_path, capsys):
    code, output = run_main(*argv.format(tmp=tmp_path).split(), capsys=capsys)
    assert code == 2
    assert output.err.startswith("error: " + message.format(tmp=tmp_path))
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err


@pytest.mark.parametrize("name", [*ELSEWHERE, "U-MAE", "masked_finola"])
def test_a_method_that_a_flag_makes_of_another_is_named_with_its_command(name, capsys):
    code, output = run_main(name, "--epochs", "1", capsys=capsys)
    message, command = output.err.splitlines()[0].split("; try: python train.py ")
    assert code == 2 and message == f"error: unknown method {name!r}"
    method, *flags = command.split()
    module = importlib.import_module(method)
    config = read_flags(module.Config, module.RECIPES, flags)
    assert config.out == f"runs/{name.lower().replace('-', '').replace('_', '')}"


def test_mae_is_the_command_of_the_readme(capsys):
    assert "`python train.py magma --lam 0 --out runs/mae`" in README.read_text()
    assert run_main("mae", capsys=capsys)[1].err.endswith("; try: python train.py magma --lam 0 --out runs/mae\n")


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_train_lists_its_methods(argv, capsys):
    code, output = run_main(*argv, capsys=capsys)
    assert code == 0
    for name in METHODS:
        assert re.search(rf"^  {name} +\S+", output.out, flags=re.MULTILINE)


def test_train_help_lists_the_flags_of_a_method(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["magma", "--help"])
    assert stop.value.code == 0
    assert "--e-st" in capsys.readouterr().out


# --- notes at the start ----------------------------------------------------------------------------------------------

FEW = "--patch 4 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --image-size 16 --probe-every 0 --workers 0"
FEW = [*FEW.split(), "--amp", "off", "--device", "cpu"]


def train_few(images, method, *flags, capsys):
    """Train on so few pictures of 16 x 16 -> what is printed, and the notes in it."""
    with narrow_networks(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "load_data", lambda *_, image_size, **__: shapes(images, image_size))
        code, output = run_main(method, *FEW, *flags, capsys=capsys)
    assert code == 0, output.err
    return output.out, [line for line in output.out.splitlines() if line.startswith("note: ")]


def test_a_run_of_one_step_learns_and_says_what_it_leaves_out(tmp_path, capsys):
    out = tmp_path / "run"
    text, notes = train_few(56, "magma", "--epochs", "1", "--out", out, capsys=capsys)
    assert notes == [
        "note: --epochs 1 shortens the recipe of 24: --warmup-epochs 2 -> 0, --e-st 5 -> 0, --e-dur 100 -> 4",
        "note: an epoch takes 32 of 56 images, each time others; a smaller --batch-size can take more",
    ]
    assert "learning rate 0.0015\n" in text and "0 of 1 done, 1 steps each" in text
    line, settings = log_of(out)[-1], json.loads((out / "config.json").read_text())
    assert line["lr"] == pytest.approx(0.0015)
    assert line["loss"] == pytest.approx(line["mae"] + line["manifold"], rel=1e-5) and line["manifold"] > 0
    assert (settings["warmup_epochs"], settings["e_st"], settings["e_dur"]) == (0, 0, 4)


def test_a_shortened_run_goes_on_with_the_same_flags(tmp_path, capsys):
    flags = ["--epochs", "8", "--batch-size", "16", "--out", tmp_path / "run"]
    real, calls = magma.reconstruction_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 10:
            raise ZeroDivisionError
        return real(*args)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(magma, "reconstruction_loss", interrupted)
        train_few(64, "magma", *flags, capsys=capsys)
    capsys.readouterr()
    assert [line["epoch"] for line in log_of(tmp_path / "run")[1:]] == [0, 1, 2]
    _, notes = train_few(64, "magma", *flags, "--resume", capsys=capsys)
    assert notes == [
        "note: --epochs 8 shortens the recipe of 24: --warmup-epochs 2 -> 1, --e-st 5 -> 2, --e-dur 100 -> 33"
    ]
    assert log_of(tmp_path / "run")[-1]["epoch"] == 8


def test_the_learning_rate_at_the_start_is_the_highest_that_the_run_has(tmp_path, capsys):
    flags = ["--epochs", "2", "--warmup-epochs", "4", "--batch-size", "16"]
    text, notes = train_few(64, "mixedae", *flags, "--out", tmp_path / "run", capsys=capsys)
    rates = [line["lr"] for line in log_of(tmp_path / "run")[2:]]
    assert rates == pytest.approx([12e-3 / 16 * step / 16 for step in (3, 7)])  # the last steps of both epochs
    assert f"learning rate {rates[1]:.3g}\n" in text
    assert notes == [
        "note: --warmup-epochs 4 takes all of --epochs 2: the learning rate does not reach its peak",
    ]


@pytest.mark.parametrize(
    ("method", "images", "batch", "said"),
    [("mixedae", 35, 32, False), ("mixedae", 36, 32, True), ("mixedae", 64, 32, False), ("mlo_mae", 71, 12, False)],
)
def test_images_that_an_epoch_leaves_out_are_told_where_they_are_more_than_a_tenth(
    method, images, batch, said, tmp_path, capsys
):
    """MLO-MAE counts the images of its second level, and its first sees more: nothing is told there."""
    flags = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", batch, "--out", tmp_path / "run"]
    _, notes = train_few(images, method, *flags, capsys=capsys)
    told = f"note: an epoch takes {batch} of {images} images, each time others; a smaller --batch-size can take more"
    assert notes == [told] * said


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
    *table, after = output.out.splitlines()[-5:]
    assert after == (
        f"see {tmp_path}/run/report.html; next: "
        f"python evaluate.py {tmp_path}/run --protocol linear pictures --untrained --pixels"
    )
    assert table[0].split() == ["accuracy", "(%)", "linear", "kNN"]
    _, untrained, trained = log_of(tmp_path / "run")
    for row, name, line in zip(
        table[1:],
        ("trained encoder", "untrained encoder", "raw pixels"),
        (trained, untrained, untrained["pixels"]),
        strict=True,
    ):
        assert row[:20].strip() == name
        assert row[20:].split() == [f"{line['linear']:.1f}", f"{line['knn']:.1f}"]


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "fit", lambda *_: {"trained": {"linear": 1.0}})
    monkeypatch.setattr(train, "write_report", lambda folder: None)
    monkeypatch.setattr(train, "load_data", lambda *_, **__: shapes())
    code, output = run_main("magma", "--image-size", "8", "--out", tmp_path / "a $b run", capsys=capsys)
    assert code == 0
    assert f"evaluate.py '{tmp_path}/a $b run' --protocol" in output.out


def test_a_start_without_matplotlib_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """The pictures need it: that is told before anything is written."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, output = run_main("magma", *SMALL.split(), "--probe-every", "1", "--out", tmp_path / "run", capsys=capsys)
    assert code == 2 and output.err.startswith("error: pictures need matplotlib")
    assert not (tmp_path / "run").exists()


def test_train_hands_on_seed_and_data_flags(monkeypatch):
    made, asked = [], []
    monkeypatch.setattr(train, "fit", lambda method, *_: made.append(method.state_dict()) or {})
    monkeypatch.setattr(train, "write_report", lambda folder: None)
    monkeypatch.setattr(train, "load_data", lambda name, **options: asked.append((name, options)) or shapes())
    for seed in (0, 1, 1):
        flags = ["--seed", str(seed), "--skip-bad-images", "--download", "--root", "there", "--image-size", "8"]
        assert train.main(["magma", *flags, "--max-pixels", "9", "--workers", "5", "--device", "cpu"]) == 0
    assert (len(made), len(asked)) == (3, 6)
    assert same_weights(made[1], made[2])
    assert not same_weights(made[0], made[1])
    wanted = {"root": "there", "image_size": 8, "download": True, "skip_bad_images": True, "max_pixels": 9}
    wanted |= {"workers": 5, "device": torch.device("cpu")}
    assert [options["split"] for _, options in asked[:2]] == ["train", "test"]
    assert all(name == "shapes" and wanted.items() <= options.items() for name, options in asked)


def test_train_reads_class_folders_of_the_users_own(tmp_path, capsys):
    write_folders(tmp_path / "mine", train=4, size=(40, 40), ending="jpg")
    flags = "--model vit_micro --image-size 32 --epochs 1 --batch-size 8 --workers 1 --decoder-depth 1"
    flags = ["magma", "--data", tmp_path / "mine", *flags.split(), "--out"]
    with narrow_networks():
        code, output = run_main(*flags, tmp_path / "run", capsys=capsys)
    assert code == 0, output.err
    bad = next((tmp_path / "mine" / "train" / "bee").iterdir())
    bad.write_bytes(bad.read_bytes()[:300])
    code, output = run_main(*flags, tmp_path / "run2", capsys=capsys)
    assert code == 2
    assert output.err.startswith(f"error: 1 of 8 images cannot be read: {bad} (")


def test_train_ends_with_code_1_when_the_loss_is_not_finite(tmp_path, capsys, monkeypatch):
    def infinite(prediction, *_):
        return prediction.sum() * float("inf")

    monkeypatch.setattr(magma, "reconstruction_loss", infinite)
    code, output = run_main("magma", *SMALL.split(), "--out", tmp_path / "run", capsys=capsys)
    assert code == 1
    assert output.err.startswith("error: step 0: loss")
    assert "no checkpoint was written" in output.err


def test_torchrun_trains_on_two_processes(tmp_path):
    flags = [*SMALL.split(), "--probe-every", "1", "--probe-images", "100"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    command += ["magma", *flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained encoder") == 2  # one table: trained and untrained
    assert "2 process(es)" in done.stdout
    assert "Warning:" not in done.stderr
    assert np.isfinite(log_of(tmp_path / "run")[-1]["loss"])


# --- a start that was refused ----------------------------------------------------------------------------------------

LATE = [  # settings that only the data, the plan or the optimiser can refuse, and what to give instead
    ("mixedae", "--batch-size 30", "--batch-size 30 gives each process and part 30 images", "--batch-size 32"),
    ("mixedae", "--batch-size 64", "a batch of 64 is larger than the data set of 40", "--batch-size 32"),
    ("mlo_mae", "--batch-size 32", "a batch of 32 is larger than the ", "--batch-size 4"),
    ("magma", "--layers -1 5", "--layers -1 5: give two or more different blocks", "--layers -2 5"),
]


@pytest.mark.parametrize(("method", "wrong", "message", "right"), LATE)
def test_a_start_that_was_refused_leaves_nothing_that_blocks_the_next(
    method, wrong, message, right, tmp_path, monkeypatch, capsys
):
    """The same command with one flag mended runs, into the same folder."""
    loaded, out = [], tmp_path / "run"
    monkeypatch.setattr(train, "load_data", lambda *_, image_size, **__: loaded.append(1) or shapes(40, image_size))
    small = "--image-size 16 --patch 4 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --epochs 1 --probe-every 0"
    flags = [method, *small.split(), "--out", out]
    code, output = run_main(*flags, *wrong.split(), capsys=capsys)
    assert code == 2
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1
    assert not out.exists()
    with narrow_networks({"dim": 24, "depth": 6, "heads": 3}):
        code, output = run_main(*flags, *right.split(), capsys=capsys)
    assert code == 0, output.err
    assert (out / "encoder.pt").exists()
    assert len(loaded) >= 2
