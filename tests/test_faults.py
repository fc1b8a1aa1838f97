"""What happens when something goes wrong: kills, signals, full disks, damaged files, strange flags and pictures."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import (
    log_of,
    narrow_networks,
    same_weights,
    shapes,
    without_times,
    write_cifar,
    write_folders,
    write_stl10,
    write_tinyimagenet,
)
from PIL import Image

import common
import plumbing.images
import plumbing.runs
import train
from common import METHODS
from plumbing.command import run_command
from plumbing.datasets import load_data
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from plumbing.run_files import lock_run
from plumbing.settings import choices_of, field_types

RUN = "--epochs 2 --batch-size 8 --probe-every 0 --workers 0 --warmup-epochs 0 --amp off --device cpu"
DECODER = "--image-size 16 --model vit_micro --patch 4 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
FLAGS = {
    "ebm_pretrain": "--image-size 16 --patch 8 --grid 8 --scale 4 --model vit_micro --task mixed",
    "finola": "--image-size 32 --width micro --channels 16 --upsampler-width 16 --upsampler-blocks 1",
    "magma": f"{DECODER} --e-st 1 --e-dur 1",
    "mixedae": DECODER,
    "mlo_mae": f"{DECODER} --hidden 8 --validation 0.4 --update-every 2",
}


def flags_of(method, out, *more):
    return [method, *RUN.split(), *FLAGS[method].split(), "--out", str(out), *more]


def run(method, out, *more, fault="", at=0, victim=-1, ranks=1):
    """Exit codes and what stands on stderr, of a run in which the fault, and nothing else, did happen."""
    with tempfile.TemporaryDirectory() as hits:
        argv = flags_of(method, out, *more)
        codes, texts = processes.ends(processes.train_with_fault, argv, hits, fault, at, victim, ranks=ranks)
        expected = set() if "--data" in more else {f"{rank} load_data" for rank in range(ranks)}
        if fault:  # where all are victims, the first may fall before the others
            expected |= {f"{max(victim, 0)} {fault}"} | ({"0 monotonic"} if fault == "twice" else set())
        assert expected <= set(os.listdir(hits)), f"what was to go wrong did not: {texts}"
    return codes, texts


def weights_of(out):
    state = load_checkpoint(out / "last.pt")
    moments = {f"{i} {name}": x for i, s in state["optimizer"]["state"].items() for name, x in s.items()}
    return state["weights"] | moments


def epochs_of(out):
    """The lines of the epochs, without what depends on the clock."""
    return without_times(log_of(out)[1:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed: (method, ranks) -> folder, made when first asked for."""
    made = {}

    def find(method, ranks=1):
        if (method, ranks) not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert run(method, out, ranks=ranks)[0] == [0] * ranks
            made[method, ranks] = out
        return made[method, ranks]

    return find


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed in its second epoch: to be copied, not written into."""
    out = tmp_path_factory.mktemp("killed") / "run"
    assert run("magma", out, fault="kill", at=6)[0] == [-9]
    return out


# --- kills and signals -----------------------------------------------------------------------------------------------


def test_the_flags_cover_every_method():
    assert FLAGS.keys() == METHODS.keys()


# With two processes the methods whose step is not the usual one, and the one with batch norms.
@pytest.mark.parametrize(
    ("method", "ranks"), [*((method, 1) for method in FLAGS), ("finola", 2), ("ebm_pretrain", 2), ("mlo_mae", 2)]
)
def test_a_killed_run_resumes_to_the_same_weights(method, ranks, whole, tmp_path):
    """SIGKILL after a step, and in the middle of writing a file; four kills in a run of MAGMA, fewer in the others'."""
    steps = 3 if method == "mlo_mae" else 5
    kills = [("kill", 1), ("half", 1), ("kill", steps + 1), ("half", 2)]
    if method != "magma":  # what is written differs, how it is written does not
        kills = kills[1:3] if ranks == 1 else kills[2:3]
    for i, (fault, at) in enumerate(kills):
        codes, texts = run(method, tmp_path / "run", *["--resume"] * (i > 0), fault=fault, at=at, ranks=ranks)
        assert codes[0] == -9, texts
    codes, texts = run(method, tmp_path / "run", "--resume", ranks=ranks)
    assert codes == [0] * ranks, texts
    expected = whole(method, ranks)
    assert same_weights(weights_of(tmp_path / "run"), weights_of(expected))
    assert epochs_of(tmp_path / "run") == epochs_of(expected)
    encoders = [load_checkpoint(out / "encoder.pt")["weights"] for out in (tmp_path / "run", expected)]
    assert same_weights(*encoders)


@pytest.mark.parametrize(  # within an epoch, and at its end
    ("at", "name", "code"), [(2, "SIGTERM", 143), (4, "SIGTERM", 143), (2, "SIGINT", 130), (4, "SIGUSR1", 138)]
)
def test_a_signal_ends_the_current_step_and_saves(at, name, code, whole, tmp_path):
    codes, (text,) = run("magma", tmp_path / "run", fault=name, at=at)
    assert codes == [code]
    assert text == f"stopped by {name} after {at + 1} steps; go on with the same command and --resume\n"
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == at + 1
    assert run("magma", tmp_path / "run", "--resume") == ([0], [""])
    assert same_weights(weights_of(tmp_path / "run"), weights_of(whole("magma")))
    assert epochs_of(tmp_path / "run") == epochs_of(whole("magma"))


def test_a_signal_to_one_process_of_two_stops_both_after_the_same_step(whole, tmp_path):
    codes, (first, second) = run("magma", tmp_path / "run", fault="SIGTERM", at=2, victim=1, ranks=2)
    assert codes == [143, 143]
    assert first.startswith("stopped by SIGTERM after 3 steps")
    assert second == ""
    assert run("magma", tmp_path / "run", "--resume", ranks=2)[0] == [0, 0]
    assert same_weights(weights_of(tmp_path / "run"), weights_of(whole("magma", 2)))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    codes, (text,) = run("magma", tmp_path / "run", fault="twice", at=6)
    assert codes == [130]
    assert text == "\nstopped at once; what trains goes on from its last checkpoint, if any, by --resume\n"
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


def test_a_signal_to_the_workers_too_saves(tmp_path):
    root = write_folders(tmp_path / "set", train=16, ending="jpg")
    flags = ["--data", str(root), "--workers", "1", "--epochs", "3"]
    assert run("magma", tmp_path / "whole", *flags) == ([0], [""])
    codes, (text,) = run("magma", tmp_path / "run", *flags, fault="group", at=60)
    assert codes == [143]
    assert text.startswith("stopped by SIGTERM after ") and text.count("\n") == 1
    assert 1 <= load_checkpoint(tmp_path / "run" / "last.pt")["step"] < 9
    assert run("magma", tmp_path / "run", *flags, "--resume") == ([0], [""])
    assert same_weights(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_clear_error_and_keeps_the_checkpoint(whole, tmp_path):
    codes, (text,) = run("magma", tmp_path / "run", fault="full", at=6)
    assert codes == [1]
    path = tmp_path / "run" / "last.pt"
    assert text == f"error: cannot write {path} (File too large); the file of before is intact\n"
    assert load_checkpoint(path)["step"] == 5
    assert not list(path.parent.glob("*.tmp"))
    assert run("magma", tmp_path / "run", "--resume")[0] == [0]
    assert same_weights(weights_of(tmp_path / "run"), weights_of(whole("magma")))


def test_a_full_disk_at_the_first_checkpoint_leaves_none(tmp_path):
    codes, (text,) = run("magma", tmp_path / "run", fault="full", at=0)
    assert codes == [1]
    assert text.endswith("; nothing was written\n")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json", "log.jsonl"}


def test_a_run_folder_has_one_writer(tmp_path):
    assert run("magma", tmp_path / "run", fault="kill", at=6)[0] == [-9]
    with lock_run(tmp_path / "run", resume=True):
        before = (tmp_path / "run" / "last.pt").read_bytes()
        codes, (text,) = run("magma", tmp_path / "run", "--resume")
        assert codes == [2]
        assert text.startswith(f"error: another process is writing {tmp_path / 'run'}; ")
        assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert run("magma", tmp_path / "run", "--resume")[0] == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["weights"].pop("autoencoder.encoder.norm.bias"), "does not fit this version"),
        (lambda state: state.pop("optimizer"), "does not fit this version"),
        (lambda state: state["optimizer"]["param_groups"].pop(), "does not fit this version"),
        (lambda state: state.pop("step"), "is not a checkpoint of a run"),
        (lambda state: state["identity"].pop("lam"), r"was trained otherwise (lam None -> 1.0)"),
        (lambda state: state["identity"].update(method="finola"), "was trained otherwise (method finola -> magma)"),
        (lambda state: state["identity"].update(batch_size=16), "was trained otherwise (batch_size 16 -> 8)"),
    ],
)
def test_a_foreign_or_older_checkpoint_is_refused_and_not_touched(change, message, killed, tmp_path):
    out = shutil.copytree(killed, tmp_path / "run")
    state = load_checkpoint(out / "last.pt")
    change(state)
    torch.save(state, out / "last.pt")
    before = {path: path.read_bytes() for path in out.iterdir()}
    codes, (text,) = run("magma", out, "--resume")
    assert codes == [2]
    assert text.startswith("error: ") and message in text and text.count("\n") == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before


# --- several processes -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_on_one_process_stops_all_at_the_same_step(tmp_path):
    codes, texts = run("magma", tmp_path / "run", fault="nan", at=6, victim=1, ranks=2)
    assert codes == [1, 1]
    for number, text in enumerate(texts):
        assert text.startswith(f"error{' of process 1' if number else ''}: step 6: loss nan, mae ")
        assert f"the last good checkpoint is {tmp_path / 'run' / 'last.pt'}" in text
        assert text.count("\n") == 1
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other(victim, tmp_path):
    codes, texts = run("magma", tmp_path / "run", fault="die", at=6, victim=victim, ranks=2)
    assert (codes[victim], codes[1 - victim]) == (9, 1)
    assert "another process is gone (" in texts[1 - victim]
    assert texts[1 - victim].count("\n") == 1
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


def test_torchrun_ends_within_a_minute_of_a_dead_process(tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    hits = tmp_path / "hits"
    hits.mkdir()
    call = f"processes.train_with_fault({flags_of('magma', tmp_path / 'run')!r}, {str(hits)!r}, 'die', 6, 1)"
    script.write_text(f"import sys\nsys.path.insert(0, {tests!r})\nimport processes\nsys.exit({call})\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert (hits / "1 die").exists()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


def test_too_little_memory_is_one_clear_line(capsys):
    assert run_command(lambda _: torch.empty(10**15), []) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: not enough memory (") and text.endswith(
        "; lower --batch-size, or raise --accumulate\n"
    )
    assert run_command(lambda _: np.empty(10**18), []) == 1
    assert capsys.readouterr().err.startswith("error: Unable to allocate ")


# --- data ------------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "cifar10": lambda root: write_cifar(root, "cifar10"),
    "cifar100": lambda root: write_cifar(root, "cifar100"),
    "stl10": write_stl10,
    "tinyimagenet": write_tinyimagenet,
    "folders": lambda root: write_folders(root, ending="jpg", size=(90, 60)),
}


@given(st.sampled_from(sorted(LAYOUTS)), st.data())
def test_damaged_files_are_named_or_read_but_never_a_traceback(layout, data):
    """Any file of any data set, cut, grown or with bytes flipped: a UserError, or data that can be read to the end."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        LAYOUTS[layout](root)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["cut", "grow", "flip", "empty", "gone"]))
        if kind == "gone":
            path.unlink()
        else:
            grown = content[:place] + data.draw(st.binary(min_size=1, max_size=40)) + content[place:]
            flipped = content[:place] + bytes(255 - x for x in content[place : place + 5]) + content[place + 5 :]
            path.write_bytes({"cut": content[:place], "grow": grown, "flip": flipped, "empty": b""}[kind])
        for split in ("train", "test"):
            try:
                found = load_data(folder if layout == "folders" else layout, root, split)
                assert -1 <= int(found.labels.min()) and int(found.labels.max()) < len(found.classes)
                list(found.plain_batches(range(len(found)), 8))
            except UserError as error:
                assert "\n" not in str(error)


def test_pictures_of_any_size_and_name_are_read(tmp_path):
    root = write_folders(tmp_path / "büder und co", classes=("eine klasse", "ölçü 猫"), train=1, val=1)
    for i, size in enumerate([(1, 1), (20_000, 10), (3, 4000)]):
        Image.new("RGB", size, (200, 10 * i, 0)).save(root / "train" / "ölçü 猫" / f"bild nr. {i} ñ.png")
    (root / "train" / "ölçü 猫" / "notes.txt").write_text("not a picture, and not taken for one")
    data = load_data(str(root))
    assert (len(data), data.classes) == (5, ["eine klasse", "ölçü 猫"])
    (images, _), *_ = data.plain_batches(range(5), 8)
    torch.testing.assert_close(images[-3:, 0], torch.full((3, 8, 8), 200 / 255))
    ((crops, _),) = data.train_batches([(1, list(range(5)))], 8)
    assert crops.shape == (5, 3, 8, 8)


def test_what_only_looks_like_a_picture_is_named_at_once(tmp_path):
    """A text, a pipe that nobody writes to, a device without end, a link to a file that is no picture."""
    root = write_folders(tmp_path / "set")
    strange = [root / "train" / "bee" / f"{name}.jpg" for name in ("text", "pipe", "device", "secret")]
    strange[0].write_text("no picture")
    os.mkfifo(strange[1])
    strange[2].symlink_to("/dev/zero")
    (tmp_path / "secret").write_text("root:x:0:0")
    strange[3].symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="^4 of 10 images cannot be read: ") as error:
        load_data(str(root))
    assert all(str(path) in str(error.value) for path in strange)
    assert "root:x" not in str(error.value)
    assert len(load_data(str(root), skip_bad_images=True)) == 6


def test_one_class_is_enough_to_train(tmp_path, capsys):
    root = write_folders(tmp_path / "set", classes=("one",), train=8, val=2)
    flags = ["--data", str(root), "--probe-every", "1", "--epochs", "1"]
    assert train.main(flags_of("magma", tmp_path / "run", *flags)) == 0
    assert {"held_out_loss", "effective_rank"} < set(epochs_of(tmp_path / "run")[-1])
    assert "without labels" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_vanishes_during_a_run_is_named(workers, tmp_path, capsys):
    root = write_folders(tmp_path / "set", train=8)
    victim, real = min((root / "train" / "bee").iterdir()), common.learning_rate

    def rate(step, *rest):
        victim.unlink(missing_ok=True)
        return real(step, *rest)

    flags = ["--data", str(root), "--epochs", "9", "--workers", str(workers)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(common, "learning_rate", rate)
        assert train.main(flags_of("magma", tmp_path / "run", *flags)) == 2
    assert not victim.exists()
    assert f"error: {victim} cannot be read as an image (" in capsys.readouterr().err


def test_a_decoding_process_that_dies_is_one_clear_error(tmp_path, monkeypatch, capsys):
    root, parent, real = write_folders(tmp_path / "set", train=8), os.getpid(), plumbing.images.decode_image

    def decode(path, *rest):
        if os.getpid() != parent and "3 " in str(path):
            (tmp_path / "hit").touch()
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
        return real(path, *rest)

    monkeypatch.setattr(plumbing.images, "decode_image", decode)
    assert train.main(flags_of("magma", tmp_path / "run", "--data", str(root), "--workers", "2")) == 1
    assert (tmp_path / "hit").exists()
    text = capsys.readouterr().err
    assert text.startswith("error: a process that decodes images died (DataLoader worker (pid")
    assert text.count("\n") == 1


# --- settings --------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """One step was made."""


def enough(self, step, values):
    raise Enough


@given(st.sampled_from(sorted(FLAGS)), st.data())
def test_no_value_of_any_flag_gives_a_traceback(method, data):
    """A run with up to three strange settings makes a step, or ends with code 1 or 2 and one line."""
    kinds = field_types(importlib.import_module(method).Config)
    free = {"data", "root", "download", "out", "device", "resume", "skip_bad_images", "compile", "start"}
    values = ["-1", "0", "1", "2", "3", "7", "0.5", "-0.5", "nan", "inf", "1e-30", "1e30", "text", ""]
    flags, loaded = [], []

    def small_data(name, root, split, image_size, device, **_):
        loaded.append(split)
        if image_size > 256:
            raise UserError("larger than this test wants to draw")
        return shapes(16, image_size)

    for name in data.draw(st.lists(st.sampled_from(sorted(kinds.keys() - free)), max_size=3, unique=True)):
        if kinds[name] is bool:
            flags.append(data.draw(st.sampled_from(["--", "--no-"])) + name.replace("_", "-"))
        else:
            count = len(typing.get_args(kinds[name])) if typing.get_origin(kinds[name]) is tuple else 1
            value = st.sampled_from([*values, *choices_of(kinds[name])])
            flags += ["--" + name.replace("_", "-"), *data.draw(st.lists(value, min_size=count, max_size=count))]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "load_data", small_data)
        patched.setattr(plumbing.runs.Meter, "add", enough)
        errors = io.StringIO()
        with narrow_networks(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = train.main([*flags_of(method, f"{folder}/run"), *flags])
            except Enough:
                assert loaded == ["train", "test"]
                return
        assert code in (1, 2), (code, flags)
        assert code == 1 or not Path(folder, "run").exists(), flags  # what was refused leaves nothing behind
        assert errors.getvalue().startswith("error: ") and errors.getvalue().count("\n") == 1, errors.getvalue()
