"""The files of a run folder: its log, which pictures it has, what blocks a start and what does not."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make import fit_magma, log_of, same_weights, shapes, without_times, write_cifar, write_folders

import magma
from plumbing.datasets import load_data
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from plumbing.run_files import read_log, refuse_other_pictures, rewind_log, run_folder

# --- the log ---------------------------------------------------------------------------------------------------------


def test_read_log_gives_the_text_of_the_header_and_the_epochs(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == ("", [])
    header = '{"command":  "python train.py", "config": {}}\n'
    path.write_text(
        header + '{"epoch": 0, "knn": 5.0}\n\n{"epoch": 1, "loss": NaN}\n[3]\nnull\n{"loss": 1}\n{"epoch": 2, "lo'
    )
    first, lines = read_log(path)
    assert first == header  # as it stands there, byte by byte
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines == [{"epoch": 0, "knn": 5.0}, {"epoch": 1}]  # what is no number is left out
    path.write_text('{"epoch": 3}\n')
    assert read_log(path) == ("", [{"epoch": 3}])


def test_read_log_drops_what_a_resumed_run_does_again(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"command": "x"}, *({"epoch": epoch, "loss": 1.0} for epoch in range(4))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 4, "lo')
    assert rewind_log(path, 2, "header") == lines[1:4]
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:4]
    path.write_bytes(b'\xff\xfe[1]\n[2]\n{"epoch": 1}\n')
    assert rewind_log(path, 2, '{"command": "again"}\n') == [{"epoch": 1}]
    assert path.read_text() == '{"command": "again"}\n{"epoch": 1}\n'
    path.unlink()
    assert rewind_log(path, 2, "header\n") == []


@given(
    st.lists(st.sampled_from([{"epoch": 1}, {"epoch": "1"}, {"epoch": None}, {"epoch": True}, {"epoch": 1.5}, [], 3]))
)
def test_read_log_keeps_lines_with_a_number_of_an_epoch_alone(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("run") / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(path)[1] == [line for line in lines if line == {"epoch": 1} and line["epoch"] is not True]


# --- which pictures --------------------------------------------------------------------------------------------------


def train_on(root, out, *flags):
    return fit_magma(
        out, "--data", str(root), "--recipe", "shapes", "--probe-every", "0", *flags, data=load_data(str(root))
    )


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "photos", train=5)


class Enough(Exception):
    """Two epochs were made."""


def stop_after_two(monkeypatch, root, out):
    def stop(method, epoch, really_start=magma.Magma.start_epoch):
        if epoch == 2:
            raise Enough
        really_start(method, epoch)

    with monkeypatch.context() as patched, pytest.raises(Enough):
        patched.setattr(magma.Magma, "start_epoch", stop)
        train_on(root, out)


def test_a_run_goes_on_where_its_pictures_were_moved(root, tmp_path, monkeypatch):
    train_on(root, tmp_path / "whole")
    stop_after_two(monkeypatch, root, tmp_path / "run")
    moved = tmp_path / "elsewhere" / "other name"
    moved.parent.mkdir()
    root.rename(moved)
    monkeypatch.chdir(moved.parent)
    train_on("other name", tmp_path / "run", "--resume")
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run")]
    assert states[0]["identity"]["pictures"] == states[1]["identity"]["pictures"]
    assert same_weights(*(state["weights"] for state in states))
    assert without_times(log_of(tmp_path / "whole"))[1:] == without_times(log_of(tmp_path / "run"))[1:]


def test_a_run_that_goes_on_tells_where_its_data_are_today(root, tmp_path, monkeypatch):
    stop_after_two(monkeypatch, root, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    root.rename(tmp_path / "moved")
    train_on(tmp_path / "moved", tmp_path / "run", "--resume")
    after = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name for name in after if after[name] != before[name]} == {"data", "resume"}
    assert after["data"] == str(tmp_path / "moved")


def grow(file):
    file.write_bytes(file.read_bytes() + b" ")
    return (
        rf"1 differ, first train/bee/2 é\.png \({file.stat().st_size - 1} bytes then, {file.stat().st_size} bytes now\)"
    )


def remove(file):
    size = file.stat().st_size
    file.unlink()
    return rf"1 differ, first train/bee/2 é\.png \({size} bytes then, none now\)"


def add(file):
    shutil.copy(file, file.with_name("0.png"))
    return rf"1 differ, first train/bee/0\.png \(none then, {file.stat().st_size} bytes now\)"


def rename(file):
    size = file.stat().st_size
    file.rename(file.with_name("9.png"))
    return rf"2 differ, first train/bee/2 é\.png \({size} bytes then, none now\)"


@pytest.mark.parametrize("change", [grow, remove, add, rename])
def test_other_pictures_are_refused_with_the_first_that_differs(change, root, tmp_path, monkeypatch):
    stop_after_two(monkeypatch, root, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    expected = change(root / "train" / "bee" / "2 é.png")
    with pytest.raises(UserError, match=rf"run was trained on other pictures: {expected}; give the --data of before"):
        train_on(root, tmp_path / "run", "--resume")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run" / "images.tsv").unlink()
    with pytest.raises(UserError, match="run was trained on other pictures; give the --data of before"):
        train_on(root, tmp_path / "run", "--resume")


def test_dates_and_pictures_to_test_on_may_change(root, tmp_path, monkeypatch):
    stop_after_two(monkeypatch, root, tmp_path / "run")
    os.utime(root / "train" / "bee" / "2 é.png", ns=(1, 1))
    (root / "val" / "bee" / "0 é.png").unlink()
    train_on(root, tmp_path / "run", "--resume")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


def test_other_settings_are_named_before_other_pictures(root, tmp_path, monkeypatch):
    stop_after_two(monkeypatch, root, tmp_path / "run")
    remove(root / "train" / "bee" / "2 é.png")
    with pytest.raises(
        UserError,
        match=r"trained otherwise \(lam 1.0 -> 2.0, images 10 -> 9\); go on with what it was trained with --lam 1.0$",
    ):
        train_on(root, tmp_path / "run", "--resume", "--lam", "2")


def test_a_flag_that_had_no_value_is_not_given_as_advice(root, tmp_path, monkeypatch):
    stop_after_two(monkeypatch, root, tmp_path / "run")
    changes = r"trained otherwise \(interpolation  -> bicubic, lam 1.0 -> 2.0\); go on with .* with --lam 1.0$"
    with pytest.raises(UserError, match=changes):
        train_on(root, tmp_path / "run", "--resume", "--lam", "2", "--interpolation", "bicubic")


def test_a_run_of_before_pictures_were_listed_is_known_by_its_folder(root, tmp_path, monkeypatch):
    stop_after_two(monkeypatch, root, tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    del state["identity"]["pictures"]
    torch.save(state, tmp_path / "run" / "last.pt")
    shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(UserError, match=r"was trained otherwise \(data .*photos -> .*copy\)"):
        train_on(tmp_path / "copy", tmp_path / "run", "--resume")
    train_on(root, tmp_path / "run", "--resume")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


def test_built_in_pictures_are_none_of_a_folder(root, tmp_path):
    fit_magma(tmp_path / "run", "--epochs", "1", "--e-st", "0", "--probe-every", "0")
    with pytest.raises(UserError, match=r"was trained otherwise \(data shapes -> .*photos, images 40 -> 10\)"):
        train_on(root, tmp_path / "run", "--resume", "--epochs", "1", "--e-st", "0")
    train_on(root, tmp_path / "folder")
    with pytest.raises(
        UserError, match=r"trained on other pictures: 10 differ, first train/ant/0 é.png \(\d+ bytes then, none"
    ):
        fit_magma(tmp_path / "folder", "--probe-every", "0", "--resume")


def test_a_named_set_is_known_by_its_files(tmp_path):
    write_cifar(tmp_path, "cifar10")
    files = load_data("cifar10", tmp_path).listing.splitlines()
    assert [line.split(b"\t")[1] for line in files] == [b"data_batch_1.bin", b"data_batch_2.bin"]
    assert load_data("cifar10", tmp_path / "cifar-10-batches-bin").listing.splitlines() == files
    assert load_data("cifar10", tmp_path, "test").listing.splitlines() != files


def test_names_that_are_no_text_are_told_apart(tmp_path):
    (tmp_path / "images.tsv").write_bytes(b"3\ttrain/a/caf\xe9.jpg\n4\ttrain/a/b.jpg\n")
    with pytest.raises(UserError) as error:
        refuse_other_pictures(tmp_path, b"3\ttrain/a/caf\xe8.jpg\n4\ttrain/a/b.jpg\n")
    assert "2 differ, first train/a/caf\udce8.jpg (none then, 3 bytes now)" in str(error.value)


def test_names_with_any_line_break_are_told_apart(tmp_path):
    (tmp_path / "images.tsv").write_bytes(b"3\ta/1\r2.jpg\n3\ta/1\r3.jpg\n")
    with pytest.raises(UserError, match="1 differ, first a/1\r3.jpg \\(3 bytes then, 4 bytes now"):
        refuse_other_pictures(tmp_path, b"3\ta/1\r2.jpg\n4\ta/1\r3.jpg\n")


def test_a_run_goes_on_however_its_folder_is_spelled(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    stop_after_two(monkeypatch, ".", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    train_on("photos/", tmp_path / "run", "--resume")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


def test_a_picture_that_was_left_out_and_then_mended_is_another_one(root, tmp_path, monkeypatch):
    picture = root / "train" / "bee" / "2 é.png"
    good = picture.read_bytes()
    picture.write_bytes(b"x" * len(good))

    def go(*flags):
        data = load_data(str(root), skip_bad_images=True)
        flags = ("--data", str(root), "--recipe", "shapes", "--probe-every", "0", *flags)
        return fit_magma(tmp_path / "run", *flags, data=data)

    go()
    picture.write_bytes(good)
    with pytest.raises(UserError, match=rf"1 differ, first train/bee/2 é.png \(none then, {len(good)} bytes now\)"):
        go("--resume")


# --- where it is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("shapes", "shapes"),
        ("set/photos", "photos"),
        ("set/photos/", "photos"),
        (".", "work"),
        ("..", "above"),
        ("/", "root"),
    ],
)
def test_a_run_folder_is_called_by_the_folder_of_its_data(data, name, tmp_path, monkeypatch):
    (tmp_path / "above" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "work")
    assert str(run_folder("magma", magma.Config(data=data))) == f"runs/magma-{name}"
    assert str(run_folder("magma", magma.Config(data=data, out="x"))) == "x"


@pytest.mark.parametrize(
    "place", ["photos/train/run", "photos/train/bee/run", "photos/val/run", "link", "photos/train"]
)
def test_no_run_is_written_among_its_pictures(place, root, tmp_path):
    """Its pictures.png would be a picture of one class more."""
    (tmp_path / "link").symlink_to("photos/train/new")
    before = sorted(root.rglob("*"))
    for flags in ((), ("--resume",)):
        with pytest.raises(UserError, match=rf"^the folder .*{place} lies among the images of .*photos.(train|val); "):
            train_on(root, tmp_path / place, *flags)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("place", ["", "run", "bee/run"])
@pytest.mark.parametrize("flat", [False, True])
def test_no_run_is_written_into_a_folder_that_is_all_pictures(place, flat, root, tmp_path):
    for path in sorted((root / "train").rglob("*.png")):
        kept = root / (path.name if flat else path.parent.name) / (path.parent.name if flat else path.name)
        new = root / f"{path.parent.name} {path.name}" if flat else kept
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=r"^the folder .* lies among the images of .*photos; choose another"):
        train_on(root, root / place)
    assert sorted(root.rglob("*")) == before
    train_on(root, tmp_path / "run")


def test_a_run_may_be_written_beside_its_pictures(root):
    train_on(root, root / "trained")
    assert load_data(str(root)).classes == ["ant", "bee"]


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_link_that_leads_nowhere_is_no_run(flags, tmp_path):
    (tmp_path / "run").symlink_to("/nonexistent/folder")
    with pytest.raises(UserError, match="cannot write the run folder .*run .*; choose another by --out"):
        fit_magma(tmp_path / "run", *flags)


def test_what_a_run_says_can_be_printed_anywhere(tmp_path, capsys):
    root = write_folders(tmp_path / "caf\udce9", train=5)
    train_on(root, tmp_path / "r\udce9sult")
    said = capsys.readouterr().out
    said.encode()
    assert r"caf\xe9: 10 images" in said and r"writes" in said and r"r\xe9sult" in said


# --- what blocks a start ---------------------------------------------------------------------------------------------


class Refusing:
    """Pictures that are refused when the first batch is asked for."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def train_batches(self, *_, **__):
        yield from ()
        raise UserError("these pictures cannot be read")


def test_a_start_that_is_refused_is_not_in_the_way_of_the_next(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="cannot be read"):
        fit_magma(out, data=Refusing(shapes()))
    assert [path.name for path in out.iterdir()] == [".lock"]
    fit_magma(out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="run exists; add --resume"):
        fit_magma(out)
    (out / "last.pt").unlink()
    with pytest.raises(UserError, match="holds an encoder but no last.pt"):
        fit_magma(out, "--resume")
    before.pop(out / "last.pt")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_start_that_is_refused_removes_nothing_that_was_there(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("log.jsonl", "images.tsv", "pictures.png"):
        (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(UserError, match="cannot be read"):
        fit_magma(tmp_path / "run", "--resume", "--probe-every", "0", data=Refusing(shapes()))
    assert {"images.tsv", "pictures.png", "log.jsonl"} < {path.name for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "run" / "pictures.png").read_text() == "mine"


@pytest.mark.parametrize("save_every", ["1", "9"])
def test_a_run_that_is_refused_later_keeps_what_it_has(save_every, tmp_path, monkeypatch):
    def refuse(method, epoch, really_start=magma.Magma.start_epoch):
        if epoch == 2:
            raise UserError("no more")
        really_start(method, epoch)

    flags = ("--probe-every", "0", "--save-every", save_every)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="no more"):
        patched.setattr(magma.Magma, "start_epoch", refuse)
        fit_magma(tmp_path / "run", *flags)
    assert (tmp_path / "run" / "last.pt").exists() == (save_every == "1")
    assert len(log_of(tmp_path / "run")) == 4
    fit_magma(tmp_path / "run", *flags, "--resume")


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "config.json.tmp"]])
def test_a_folder_without_a_run_blocks_nothing(left, tmp_path):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    fit_magma(tmp_path / "run", "--epochs", "1", "--e-st", "0", "--probe-every", "0")
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("left", ["log.jsonl", "last.pt", "encoder.pt", "holiday.jpg", "sub/x"])
def test_a_folder_with_anything_in_it_is_not_written_to(left, tmp_path):
    path = tmp_path / "run" / left
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(UserError, match="run exists"):
        fit_magma(tmp_path / "run")
    assert [*(tmp_path / "run").rglob("*.*")] == [x for x in [path] if "." in x.name]


# --- checkpoints that somebody changed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value"),
    [("step", -3), ("step", "x"), ("step", None), ("step", 2.0), ("step", True), ("identity", []), ("identity", None)],
)
def test_a_checkpoint_without_step_or_identity_is_refused(part, value, changed_run):
    torch.save(load_checkpoint(changed_run / "kept.pt") | {part: value}, changed_run / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint of a run"):
        fit_magma(changed_run, "--probe-every", "0", "--resume")


ODD = st.sampled_from([None, -1, 10**9, "x", [], {}, [1], {"loss": "x"}, {"loss": None}, {3: 4}, float("nan"), True])


def test_a_checkpoint_of_more_steps_than_the_run_has_is_refused(changed_run):
    torch.save(load_checkpoint(changed_run / "kept.pt") | {"step": 10**9}, changed_run / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is at step 1000000000 of 20; choose another folder by --out"):
        fit_magma(changed_run, "--probe-every", "0", "--resume")


@settings(max_examples=15)
@example(part="identity", value={3: 4})
@given(part=st.sampled_from(["step", "sums", "count", "weights", "optimizer", "scaler", "identity"]), value=ODD)
def test_a_checkpoint_with_odd_parts_is_one_clear_error(changed_run, part, value):
    torch.save(load_checkpoint(changed_run / "kept.pt") | {part: value}, changed_run / "last.pt")
    try:
        fit_magma(changed_run, "--probe-every", "0", "--resume")
    except UserError as error:
        assert "last.pt" in str(error) or "was trained otherwise" in str(error)


@pytest.fixture(scope="module")
def changed_run(tmp_path_factory):
    """A run in the middle of its last epoch, of which kept.pt is a copy of the checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit_magma(folder, "--probe-every", "0")
    state = load_checkpoint(folder / "last.pt")
    state |= {"step": 18, "count": 3, "sums": dict.fromkeys(("loss", "mae"), 1.0)}
    torch.save(state, folder / "kept.pt")
    return folder
