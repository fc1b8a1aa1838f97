"""Features in files: whose rows they are, the same at any batch size, whole after a kill, never overwritten."""

import dataclasses
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import MapEncoder, seeds, settings_for, striped, subject_of, vit, write_folders, write_stl10
from PIL import Image

import evaluate
import protocols.features
from plumbing.datasets import load_data
from plumbing.decoding import decode_image
from plumbing.encoders import Encoder, save_encoder
from plumbing.errors import UserError
from plumbing.run_files import identity_of
from protocols.features import fill, read_names, rows_in, rows_of, text_of, write_features
from protocols.rows import Subject


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders of pictures that all differ: 24 to train on, 6 to test."""
    root = write_folders(tmp_path_factory.mktemp("photos") / "photos", train=12, val=3)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return root


def run_of(folder, encoder=None):
    folder.mkdir()
    save_encoder(encoder or vit(depth=3), folder / "encoder.pt")
    return folder


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / "run")


def command(run, data, *flags):
    argv = [str(run), "--protocol", "features", "--data", str(data), "--image-size", "8", "--device", "cpu"]
    return [*argv, "--workers", "0", *flags]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encoded(encoder, paths):
    with torch.no_grad():
        return encoder.eval()(torch.stack([decode_image(path, 8)[0] / 255 for path in paths])).numpy()


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_row_is_the_picture_of_its_name_and_its_label(run, data, capsys):
    assert evaluate.main(command(run, data)) == 0
    folders = [run / "features" / f"photos-{split}" for split in ("train", "test")]
    assert capsys.readouterr().out.splitlines() == [f"wrote {folder / 'features.npy'}" for folder in folders]
    for folder, count in zip(folders, (24, 6), strict=True):
        assert {path.name for path in folder.iterdir()} == {
            *(".lock", "features.json", "features.npy", "names.txt", "labels.npy", "classes.txt")
        }
        features, names = np.load(folder / "features.npy", mmap_mode="r"), read_names(folder / "names.txt")
        assert features.shape == (count, 16) and features.dtype == np.float32
        np.testing.assert_allclose(features, encoded(vit(depth=3), [data / name for name in names]), atol=1e-5)
        labels, classes = np.load(folder / "labels.npy"), read_names(folder / "classes.txt")
        assert labels.dtype == np.int64 and classes == ["ant", "bee"]
        assert [classes[label] for label in labels] == [name.split("/")[1] for name in names]
    assert not (run / "eval.jsonl").exists()


def test_the_features_are_the_same_at_any_batch_size(run, data, tmp_path):
    found = []
    for size in ("1", "7", "24", "1000"):
        assert evaluate.main(command(run, data, "--batch-size", size, "--out", str(tmp_path / size))) == 0
        found.append(np.load(tmp_path / size / "features" / "photos-train" / "features.npy"))
    assert max(np.abs(x - found[0]).max() for x in found) < 1e-5 < np.ptp(found[0], axis=0).min()


def test_precision_is_float32_unless_it_is_asked_for(run, data, tmp_path):
    """Under autocast the numbers would depend on the processor, and on the batch in the third digit."""
    folders = [tmp_path / "plain" / "features" / "photos-test", tmp_path / "bf16" / "features" / "photos-test"]
    assert evaluate.main(command(run, data, "--out", str(tmp_path / "plain"))) == 0
    assert evaluate.main(command(run, data, "--out", str(tmp_path / "bf16"), "--amp", "bf16")) == 0
    precisions = [json.loads((folder / "features.json").read_text())["precision"] for folder in folders]
    assert precisions == ["float32", "bfloat16"]
    plain, bf16 = (np.load(folder / "features.npy") for folder in folders)
    assert plain.dtype == bf16.dtype == np.float32 and 1e-5 < np.abs(plain - bf16).max() < 0.1


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_pool_is_the_one_that_is_asked_for(pool, run, data):
    assert evaluate.main(command(run, data, "--pool", pool)) == 0
    folder = run / "features" / "photos-test"
    paths = [data / name for name in read_names(folder / "names.txt")]
    np.testing.assert_allclose(np.load(folder / "features.npy"), encoded(vit(depth=3, pool=pool), paths), atol=1e-5)


def test_tokens_are_the_patches_of_a_transformer_or_the_places_of_a_map(tmp_path):
    """(N, T, D), row by row, without the CLS token; their mean over T is what stands without --tokens."""
    for name, encoder, count in (("vit", vit(pool="mean"), 4), ("map", MapEncoder(), 16)):
        subject, found = subject_of(encoder), {}
        for tokens in (False, True):
            config = settings_for("features", tmp_path / name, tokens=tokens)
            for path in write_features(tmp_path, {}, subject, config)[0]:
                found[path.parent.name] = np.load(path)
        assert list(found) == ["stripes-train", "stripes-test", "stripes-train-tokens", "stripes-test-tokens"]
        for split, images in (("train", 96), ("test", 48)):
            tokens = found[f"stripes-{split}-tokens"]
            assert tokens.shape == (images, count, encoder.dim)
            np.testing.assert_allclose(tokens.mean(axis=1), found[f"stripes-{split}"], atol=1e-5)
    one = encoder.eval()(subject.test.images[:1] / 255).detach()[0]  # (D, h, w)
    np.testing.assert_allclose(tokens[0, 6], one[:, 1, 2], atol=1e-5)


def test_all_pictures_are_taken_and_labels_stand_where_there_are_some(run, tmp_path):
    """STL-10: those without a label too, in memory, so numbered; pictures of one class have no labels."""
    write_stl10(tmp_path)
    assert evaluate.main(command(run, "stl10", "--root", str(tmp_path))) == 0
    train = run / "features" / "stl10-train"
    labels = np.load(train / "labels.npy")
    assert len(np.load(train / "features.npy")) == 11 and sorted(labels)[:5] == [-1] * 5 and min(labels[:6]) == 0
    assert read_names(train / "names.txt") == [str(i) for i in range(11)]
    one = dataclasses.replace(striped(8), classes=["all"], labels=torch.zeros(8, dtype=torch.long))
    none = dataclasses.replace(striped(8), labels=torch.full((8,), -1))
    write_features(
        tmp_path, {}, Subject("trained", vit(), one, none, torch.device("cpu")), settings_for("features", run)
    )
    for split in ("train", "test"):
        assert not {"labels.npy", "classes.txt"} & {x.name for x in (run / "features" / f"stripes-{split}").iterdir()}


def test_features_that_are_not_finite_are_told(run, data, capsys):
    encoder = vit(depth=3)
    encoder.norm.bias.data[0] = torch.nan
    save_encoder(encoder, run / "encoder.pt")
    assert evaluate.main(command(run, data)) == 0
    assert "photos-train/features.npy: the features of 24 images are not finite\n" in capsys.readouterr().out


def test_two_processes_write_what_one_does(run, data, tmp_path):
    assert evaluate.main(command(run, data, "--out", str(tmp_path / "one"))) == 0
    argv = command(run, data, "--out", str(tmp_path / "two"))
    assert processes.start(processes.evaluate_main, argv) == [0, 0]
    for split in ("train", "test"):
        one, two = (contents(tmp_path / name / "features" / f"photos-{split}") for name in ("one", "two"))
        assert one == two


# --- kills, full disks, and what is there already --------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_what_a_fault_left_is_gone_on_with(fault, run, data, tmp_path, monkeypatch, capsys):
    """In the middle of the third batch: the same files as without, and no row that is whole is computed twice."""
    assert evaluate.main(command(run, data, "--batch-size", "5", "--out", str(tmp_path / "whole"))) == 0
    argv = command(run, data, "--batch-size", "5")
    (tmp_path / "hits").mkdir()
    (code,), (text,) = processes.ends(processes.features_with_fault, argv, tmp_path / "hits", fault, 3)
    assert (tmp_path / "hits" / fault).exists()
    part = run / "features" / "photos-train" / "features.npy.part"
    assert code == (-9 if fault == "kill" else 1) and not part.with_suffix("").exists()
    assert rows_in(part, 24)[0] == (12 if fault == "kill" else 10)  # half of the batch; a few bytes of it
    if fault == "full":
        left = "what is written stays: make room and give the same command again"
        assert text == f"error: cannot write {part} (File too large); {left}\n"
    asked, encode = [], protocols.features.rows_of
    watched = lambda data, done, *rest: asked.append(done) or encode(data, done, *rest)
    monkeypatch.setattr(protocols.features, "rows_of", watched)
    assert evaluate.main(argv) == 0
    assert asked == [12 if fault == "kill" else 10, 0]
    for split in ("train", "test"):
        whole, found = (contents(out / "features" / f"photos-{split}") for out in (tmp_path / "whole", run))
        features = [np.load(out / "features" / f"photos-{split}" / "features.npy") for out in (tmp_path / "whole", run)]
        np.testing.assert_allclose(*features, atol=1e-5)  # batches begin elsewhere
        assert {name: x for name, x in whole.items() if name != "features.npy"} == {
            name: x for name, x in found.items() if name != "features.npy"
        }


@given(st.integers(0, 400), st.integers(1, 5), st.sampled_from([(3,), (2, 3)]), seeds)
def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes(cut, size, shape, seed):
    """Within a row, between two, or in the header."""
    rows = np.random.default_rng(seed).normal(size=(7, *shape)).astype("<f4")
    with tempfile.TemporaryDirectory() as folder:
        path, asked = Path(folder) / "features.npy", []
        np.save(path, rows)
        whole = path.read_bytes()
        path.unlink()
        path.with_name("features.npy.part").write_bytes(whole[:cut])

        def rows_from(done):
            asked.append(done)
            return (rows[i : i + size] for i in range(done, 7, size))

        fill(path, 7, rows_from, "rows")
        np.testing.assert_array_equal(np.load(path), rows)
        assert not path.with_name("features.npy.part").exists()
        done = max(0, cut - (len(whole) - rows.nbytes)) // rows[0].nbytes
        assert asked == ([] if done >= 7 else [done])


def test_a_finished_file_is_not_computed_again(run, data, monkeypatch, capsys):
    assert evaluate.main(command(run, data)) == 0
    before = contents(run / "features" / "photos-train")
    monkeypatch.delattr(protocols.features, "rows_of")
    capsys.readouterr()
    assert evaluate.main(command(run, data, "--batch-size", "3")) == 0
    out = capsys.readouterr().out
    assert out.count("features.npy is finished already, nothing is left to do") == 2 and "wrote" not in out
    assert contents(run / "features" / "photos-train") == before


def test_what_features_depend_on_is_never_mixed(run, data, tmp_path, capsys):
    """Another encoder, pool, size, precision, or other pictures: one line that names it, and every file stays."""
    assert evaluate.main(command(run, data)) == 0
    folder = run / "features" / "photos-train"
    before = contents(folder)
    other = vit(depth=3)
    other.norm.bias.data += 1
    save_encoder(other, tmp_path / "encoder.pt")
    more = shutil.copytree(data, tmp_path / "photos")
    (more / "train" / "ant" / "00 new.png").write_bytes((more / "train" / "ant" / "0 é.png").read_bytes())
    for flags, change in (
        (["--pool", "cls"], "(pool mean -> cls)"),
        (["--amp", "bf16"], "(precision float32 -> bfloat16)"),
        (["--image-size", "16"], "(image_size 8 -> 16)"),
        (["--data", str(more)], "(images 24 -> 25, pictures "),
        ([], "(weights "),
    ):
        if not flags:
            shutil.copy(tmp_path / "encoder.pt", run / "encoder.pt")
        capsys.readouterr()
        assert evaluate.main(command(run, data, *flags)) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {folder} holds other features {change}") and err.count("\n") == 1
        assert err.endswith("; choose another folder by --out\n")
        assert contents(folder) == before
    same = shutil.copytree(data, tmp_path / "moved" / "photos")  # a folder may be elsewhere
    save_encoder(vit(depth=3), run / "encoder.pt")
    assert evaluate.main(command(run, same)) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\x00"])
def test_a_damaged_folder_is_refused_with_one_line(text, run, data, capsys):
    assert evaluate.main(command(run, data)) == 0
    folder = run / "features" / "photos-train"
    (folder / "features.json").write_text(text)
    assert evaluate.main(command(run, data)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder / 'features.json'} cannot be read") and err.count("\n") == 1
    (folder / "features.json").unlink()
    assert evaluate.main(command(run, data)) == 2
    assert "but no features.json; choose another folder by --out" in capsys.readouterr().err


def test_a_finished_file_that_was_damaged_is_told(run, data, capsys):
    assert evaluate.main(command(run, data)) == 0
    path = run / "features" / "photos-train" / "features.npy"
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-4], b"x" * 500):
        path.write_bytes(damaged)
        assert evaluate.main(command(run, data)) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {path} is damaged (") and err.count("\n") == 1
    np.save(path, np.zeros((5, 16), dtype=np.float32))
    assert evaluate.main(command(run, data)) == 2
    assert capsys.readouterr().err == f"error: {path} has 5 rows for 24 images; remove it to make it anew\n"


class OneVector(Encoder):
    """Of a user's own: an encoder without places."""

    dim = 3

    def __init__(self, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std, image_size=image_size)

    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("encoder", "flags", "message"),
    [
        (vit, "--pool max", "unknown --pool 'max'"),
        (
            vit,
            "--pool cls --tokens",
            "--tokens takes every patch, --pool cls makes one vector of them: give one of the",
        ),
        (MapEncoder, "--pool cls", "--pool cls is for transformers, this encoder is a MapEncoder: leave it out"),
        (
            OneVector,
            "--tokens",
            "this encoder, a OneVector, gives one vector an image and no tokens: leave out --tokens, tran1 and tran4",
        ),
        (vit, "--untrained", "--protocol features takes the run's encoder alone; leave --untrained and --pixels out"),
        (vit, "--protocol features knn", "--protocol features is a command of its own"),
        (vit, "--image-size 9", "image size 9 x 9 is not a multiple of the patch size 4"),
        (vit, "--data {run}/none", "no folder {run}/none"),
        (vit, "--batch-size 0", "--batch-size 0 makes no sense"),
        (vit, "--out {run}/encoder.pt", "cannot write the run folder {run}/encoder.pt/features/photos-train"),
    ],
)
def test_features_answer_a_mistake_with_one_line(encoder, flags, message, data, tmp_path, capsys):
    run = run_of(tmp_path / "run", encoder())
    argv = command(run, data, *flags.format(run=run).split())
    assert evaluate.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.format(run=run)) and err.count("\n") == 1
    assert not list(run.rglob("features.npy"))


def test_the_settings_of_features_do_not_keep_an_older_run_from_going_on(tmp_path):
    """A run of `finetune` that began before there was --tokens has no such field."""
    method = type("Method", (), {"name": "finetune", "origin": ""})
    stepper = type("Stepper", (), {"dtype": None})
    config = settings_for("finetune", tmp_path, randaugment=0.0)
    assert "tokens" not in identity_of(method, striped(4), config, stepper)


# --- names and memory ------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1).filter(lambda name: b"\0" not in name), min_size=1))
def test_every_name_that_a_file_can_have_is_one_line_and_comes_back(names):
    """Bytes that are no UTF-8, backslashes, and all that splits lines."""

    names = [os.fsdecode(name) for name in names]
    file = io.BytesIO()
    text_of(names)(file)
    text = file.getvalue().decode("utf-8")
    assert len(text.splitlines()) == len(names) == text.count("\n")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "names.txt").write_bytes(file.getvalue())
        assert read_names(Path(folder) / "names.txt") == names


@pytest.mark.parametrize(
    "name", ["a\u2028b\x85c\x1cd\re\vf", "\\n", "a\\x41", "Screenshot at 9.41\u202fAM.png", "\U0001f600"]
)
def test_strange_names_come_back_and_plain_ones_stand_as_they_are(name, tmp_path):
    with open(tmp_path / "names.txt", "wb") as file:
        text_of([name, "train/ant/é b.png"])(file)
    assert read_names(tmp_path / "names.txt") == [name, "train/ant/é b.png"]
    lines = (tmp_path / "names.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and lines[1] == "train/ant/é b.png"
    assert (lines[0] == name) == ("\\" not in name and "\r" not in name)  # else it stands there as it is


def test_pictures_with_names_that_are_no_text_are_found_by_them(run, tmp_path):
    root = write_folders(tmp_path / "odd", train=2, val=1)
    picture = (root / "train" / "ant" / "0 é.png").read_bytes()
    for name in (b"two\nlines.png", b"\xff\xfe.png", b"back\\n.png"):
        with open(os.path.join(os.fsencode(root / "train" / "bee"), name), "wb") as file:
            file.write(picture)
    assert evaluate.main(command(run, root)) == 0
    folder = run / "features" / "odd-train"
    names = read_names(folder / "names.txt")
    assert len(names) == 7 and all(os.path.exists(os.path.join(root, name)) for name in names)
    rows = {name: row for name, row in zip(names, np.load(folder / "features.npy"), strict=True)}
    odd = ["train/bee/two\nlines.png", "train/bee/" + os.fsdecode(b"\xff\xfe.png"), "train/bee/back\\n.png"]
    for name in odd:
        np.testing.assert_allclose(rows[name], rows["train/ant/0 é.png"], atol=1e-5)


def test_the_first_rows_come_before_the_last_pictures_are_read(data, tmp_path):
    """A million pictures take no more memory than a batch: nothing is collected."""
    train = load_data(str(data), split="train", workers=0)
    subject = Subject("trained", vit(), train, train, torch.device("cpu"))
    train.paths[12] = str(tmp_path / "gone.png")
    rows = rows_of(train, 0, subject, settings_for("features", tmp_path, batch_size=4))
    assert [len(next(rows)) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(UserError, match=r"gone\.png cannot be read as an image"):
        next(rows)
