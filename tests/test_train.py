"""train.py's command line: what it prints, what it refuses, and what a refused start leaves behind."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from make import log_of, same_weights, shapes, write_folders

import magma
import train
from common import METHODS

SMALL = "--image-size 8 --mask-ratio 0.5 --epochs 1 --batch-size 1024 --probe-every 0"  # on shapes


def run_main(*argv, capsys):
    code = train.main([str(x) for x in argv])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("magna", "unknown method 'magna'; did you mean 'magma'? choose from "),
        ("--epochs 1 magma", "give the method first: python train.py METHOD --epochs 1 magma"),
        ("magma --data {tmp}/none", "no folder {tmp}/none; expected one with train/<class>/*"),
        ("mlo_mae --image-size 16 --start {tmp}/none.pt", "there is no file {tmp}/none.pt"),
        ("magma --data cifar11", "unknown dataset 'cifar11'; did you mean 'cifar10'?"),
        ("magma --epoch 3", "unknown flag '--epoch'; did you mean --epochs?"),
        ("magma --epochs three", "argument --epochs: invalid int value: 'three'"),
        ("magma --data cifar10 --root {tmp}", "no cifar10 at {tmp}/cifar-10-batches-bin; give the --root that holds"),
        ("magma --data imagenet100 --root {tmp}", "no folder {tmp}/train; expected {tmp}/train/<class>/*"),
        ("magma --image-size 30", "image size 30 x 30 is not a multiple of the patch size 4"),
        ("magma --image-size 8 --batch-size 5000", "a batch of 5000 is larger than the data set of 4096"),
        ("magma --image-size -4", "--image-size -4 makes no sense; give 1 or more"),
        ("magma --image-size 8 --patch 0", "a transformer of width 96, 6 blocks, 3 heads and patch 0 cannot be built"),
        ("magma --image-size 8 --decoder-dim 30 --decoder-heads 3", "a 2-D sine-cosine code needs a width divisible"),
        ("magma --model vit_huge", "unknown --model 'vit_huge'"),
        ("magma --device tpu", "device 'tpu' cannot be used here"),
        ("magma --image-size 8 --out {tmp}", "{tmp} exists; add --resume to go on with it, or choose another"),
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
    for name in METHODS:
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
    *table, after = output.out.splitlines()[-5:]
    assert after == (
        f"see {tmp_path}/run/pictures.png; next: "
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
    ("magma", "--layers -1 5", "--layers (-1, 5): give two or more different blocks", "--layers -2 5"),
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
    code, output = run_main(*flags, *right.split(), capsys=capsys)
    assert code == 0, output.err
    assert (out / "encoder.pt").exists()
    assert len(loaded) >= 2
