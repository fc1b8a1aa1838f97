"""Folders of pictures: which classes and pictures there are, what is left out, what is refused."""

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import threading
from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import write_folders, write_tinyimagenet
from PIL import Image

from plumbing.checking import cache_folder, survey
from plumbing.class_folders import IMAGENET100, held_out, is_image, is_leftover
from plumbing.datasets import load_data
from plumbing.errors import UserError, printable


def test_folders_name_the_files_that_are_left_out(tmp_path, capsys):
    write_folders(tmp_path)
    (tmp_path / "train" / "ant" / "note.txt").write_text("an ant")
    (tmp_path / "train" / "bee" / "bee.mp4").write_bytes(b"GIF89a")
    assert len(load_data(str(tmp_path))) == 6
    assert re.match(
        r"note: 2 other files or folders below .*train are left out, such as .*note.txt\n$", capsys.readouterr().out
    )
    assert len(load_data(str(tmp_path), split="test")) == 4
    assert capsys.readouterr().out == ""


def test_folders_list_classes_and_files_in_order(tmp_path):
    write_folders(tmp_path)
    train, test = (load_data(str(tmp_path), split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(test) == 4
    images, labels = next(train.plain_batches(range(6), 8))
    assert images.shape == (6, 3, 8, 8)
    assert torch.equal(labels, train.labels)
    torch.testing.assert_close(images[:, 0, 4, 4] * 255, 40.0 + 60 * labels)


def test_folders_refuse_what_is_not_a_data_set(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'cifar11'; did you mean 'cifar10'"):
        load_data("cifar11")
    with pytest.raises(UserError, match=r"no image \(.jpg .* below "):
        load_data(str(tmp_path))
    with pytest.raises(UserError, match="no folder .*train; expected"):
        load_data("imagenet", tmp_path)
    write_folders(tmp_path)
    (tmp_path / "val" / "wasp").mkdir()
    with pytest.raises(UserError, match="class 'wasp' of .*val is not in .*train"):
        load_data(str(tmp_path), split="test")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder .*empty holds no image \(.jpg .jpeg .jpe .jfif .png .webp\)"):
        load_data(str(tmp_path))


def test_imagenet100_picks_its_classes_from_a_larger_set(tmp_path, capsys):
    assert len(set(IMAGENET100)) == 100
    write_folders(tmp_path, ("n01440764", "n02869837", "n01749939"))
    data = load_data("imagenet100", tmp_path)
    assert data.classes == ["n01749939", "n02869837"]
    assert "holds 2 of the 100 classes" in capsys.readouterr().out
    assert {Path(path).parent.name for path in data.paths} == set(data.classes)
    assert len(load_data("imagenet", tmp_path).classes) == 3


def test_imagenet100_needs_one_of_its_classes(tmp_path):
    with pytest.raises(UserError, match="holds none of the 100 classes"):
        load_data("imagenet100", write_folders(tmp_path))


# --- what lies among the pictures ------------------------------------------------------------------------------------

LEFT_BY_OTHERS = [".ipynb_checkpoints", ".git", ".AppleDouble", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"]


@pytest.mark.parametrize("name", LEFT_BY_OTHERS)
def test_what_programs_leave_behind_is_no_class_and_no_picture(name, tmp_path, capsys):
    root = write_folders(tmp_path)
    picture = next((root / "train" / "ant").iterdir()).read_bytes()
    for part in ("train", "val"):
        (root / part / name).mkdir()
        (root / part / name / "0 é-checkpoint.png").write_bytes(picture)
    (root / "train" / "bee" / name).mkdir()  # as notebooks do in each folder that they open a file of
    (root / "train" / "bee" / name / "1.png").write_bytes(picture)
    (root / "train" / "bee" / "._0.png").write_bytes(b"\x00\x05\x16\x07")  # what macOS keeps beside a file
    (root / "train" / "bee" / "Thumbs.db").write_bytes(b"")
    data = load_data(str(root))
    assert data.classes == ["ant", "bee"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert f"note: 4 other files or folders below {root / 'train'} are left out" in capsys.readouterr().out
    assert len(load_data(str(root), split="test")) == 4


@pytest.mark.parametrize("name", LEFT_BY_OTHERS)
def test_what_programs_leave_behind_is_no_class_of_tinyimagenet(name, tmp_path, capsys):
    home = write_tinyimagenet(tmp_path)
    for folder in (home / "train" / name / "images", home / "train" / "n01" / "images" / name):
        folder.mkdir(parents=True)
        (folder / "n01_0.JPEG").write_bytes((home / "train" / "n01" / "images" / "n01_0.JPEG").read_bytes())
    (home / "train" / "n02" / "images" / "._n02_0.JPEG").write_bytes(b"\x00\x05\x16\x07")
    assert load_data("tinyimagenet", tmp_path).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert f"1 other files or folders in {home / 'train'} are left out, such as {name}" in capsys.readouterr().out
    assert load_data("tinyimagenet", tmp_path, "test").labels.tolist() == [1, 0, 1, 0]


def test_names_of_classes_are_no_leftovers():
    assert not any(map(is_leftover, (*IMAGENET100, "cat", "a.b", "_", "__init__", "eadir", "trash", "~cat")))


@pytest.mark.parametrize(("name", "count"), [("imagenet", 1000), ("tinyimagenet", 200)])
def test_a_named_set_has_no_more_classes_than_it_has(name, count, tmp_path, capsys):
    home = write_tinyimagenet(tmp_path).parent if name == "tinyimagenet" else write_folders(tmp_path, ("n01", "n02"))
    train = home / "tiny-imagenet-200" / "train" if name == "tinyimagenet" else home / "train"
    load_data(name, home)
    assert f"holds 2 of the {count} classes of {name}" in capsys.readouterr().out
    for i in range(count - 1):
        (train / f"n1{i:05}").mkdir()
    with pytest.raises(UserError, match=rf"train holds {count + 1} class folders, {name} has {count} classes; remove"):
        load_data(name, home)


def test_pictures_at_any_depth_below_a_class_folder_are_of_that_class(tmp_path, capsys):
    root = write_folders(tmp_path)
    deeper = root / "train" / "bee" / "images" / "2019"
    deeper.mkdir(parents=True)
    (deeper / ".ipynb_checkpoints").mkdir()
    for path in sorted((root / "train" / "bee").glob("*.png"))[:2]:
        (deeper / ".ipynb_checkpoints" / path.name).write_bytes(path.read_bytes())
        path.rename(deeper / path.name)
    data = load_data(str(root))
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [Path(path).parent for path in data.paths[4:]] == [deeper, deeper]
    left_out = (
        f"note: 1 other files or folders below {root / 'train'} are left out, such as {deeper}/.ipynb_checkpoints"
    )
    assert left_out in capsys.readouterr().out


def test_pictures_beside_the_folders_make_them_no_classes(tmp_path, capsys):
    root = write_folders(tmp_path)
    loose = root / "train" / "loose.png"
    loose.write_bytes((root / "train" / "bee" / "0 é.png").read_bytes())
    data = load_data(str(root))
    assert (data.classes, data.labels.tolist()) == ([], [-1] * 7)
    beside = f"note: pictures lie beside the folders of {root / 'train'}, such as loose.png"
    note = f"{beside}: so the folders are not taken for classes\n"
    assert note in capsys.readouterr().out
    assert len(load_data("imagenet", root)) == 6  # where the folders are known to be classes
    assert f"1 other files or folders below {root / 'train'} are left out, such as {loose}" in capsys.readouterr().out


def test_classes_without_a_picture_are_told(tmp_path, capsys):
    root = write_folders(tmp_path, ("ant", "bee", "wasp"))
    for path in (root / "val" / "ant").iterdir():
        path.unlink()
    for path in (root / "train" / "bee").iterdir():
        path.write_bytes(b"x")
    assert len(load_data(str(root), split="test")) == 4
    assert capsys.readouterr().out == f"note: {root / 'val'} has no image of 1 of the 3 classes, such as 'ant'\n"
    assert load_data(str(root), skip_bad_images=True).labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert f"note: {root / 'train'} has no image of 1 of the 3 classes, such as 'bee'\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "imagenet"])
def test_a_flat_split_is_refused_with_the_number_of_its_pictures(name, tmp_path):
    """As the validation pictures of ImageNet come."""
    root = write_folders(tmp_path)
    for path in sorted((root / "val").rglob("*.png")):
        path.rename(root / "val" / f"{path.parent.name}{path.name}")
    for folder in ("ant", "bee"):
        (root / "val" / folder).rmdir()
    with pytest.raises(
        UserError, match=r"no image \(.*\) in a class folder of .*val, but 4 beside these; move each into"
    ):
        load_data(name or str(root), root, split="test")


def test_the_folder_above_is_asked_for_where_train_itself_is_given(tmp_path, monkeypatch):
    root = write_folders(tmp_path / "set")
    with pytest.raises(UserError, match=rf"train has val beside it: give the folder above, {root}$"):
        load_data(str(root / "train"))
    monkeypatch.chdir(root / "train")
    with pytest.raises(UserError, match=rf"has val beside it: give the folder above, {root}$"):
        load_data(".")
    with pytest.raises(UserError, match="no folder .*; give the --root that holds them$"):
        load_data("imagenet", tmp_path)


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".jpe", ".jfif", ".png", ".WebP"])
def test_pictures_of_every_ending_are_read(ending, tmp_path):
    root = write_folders(tmp_path)
    for path in sorted((root / "train" / "bee").iterdir()):
        path.rename(path.with_suffix(ending))
    assert len(load_data(str(root))) == 6


# --- links, and what may not be read ---------------------------------------------------------------------------------


def test_class_folders_and_pictures_may_be_links(tmp_path):
    root, other = write_folders(tmp_path / "set"), write_folders(tmp_path / "other", ("wasp",))
    (root / "train" / "wasp").symlink_to(other / "train" / "wasp")
    (root / "train" / "bee" / "link.png").symlink_to(other / "train" / "wasp" / "0 é.png")
    assert load_data(str(root)).labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("target", "reason"), [("nowhere", "No such file"), ("link", "Too many levels")])
def test_a_class_that_leads_nowhere_is_refused(target, reason, tmp_path):
    """Else the labels of all that follow would be others, and nothing would say so."""
    root = write_folders(tmp_path)
    link = root / "train" / "link"
    link.symlink_to(target)
    for split in ("train", "test"):
        with pytest.raises(UserError, match=rf"^the data of {root} cannot be read \(.*{reason}.*{link}'\)$"):
            load_data(str(root), split=split)


def test_one_folder_under_two_names_is_refused(tmp_path):
    root = write_folders(tmp_path)
    (root / "train" / "wasp").symlink_to("bee")
    with pytest.raises(UserError, match=r"train.bee and .*train.wasp are one folder, linked: remove one of them"):
        load_data(str(root))


@pytest.mark.parametrize("target", ["..", ".", "bee/deeper", "../../set"])
def test_a_class_that_holds_images_of_another_is_refused(target, tmp_path):
    """A link to a folder above would give all images a second class, those to test on as well."""
    root = write_folders(tmp_path / "set")
    (root / "train" / "bee" / "deeper").mkdir()
    (root / "train" / "bee" / "deeper" / "1.png").write_bytes((root / "train" / "bee" / "0 é.png").read_bytes())
    (root / "train" / "link").symlink_to(target)
    with pytest.raises(UserError, match="train.link is a link to .*, whose images have a class already: remove it$"):
        load_data(str(root))


def test_linked_folders_are_not_entered(tmp_path, capsys):
    """They could lead into another class, or round in a circle; class folders and pictures may be links."""
    root = write_folders(tmp_path)
    for name, target in (("circle", "circle"), ("up", ".."), ("other", "../ant"), ("a.jpg", "../ant")):
        (root / "train" / "bee" / name).symlink_to(target)
    with pytest.raises(UserError, match="1 of 7 images cannot be read: .*circle"):
        (root / "train" / "bee" / "circle.jpg").symlink_to("circle.jpg")
        load_data(str(root))
    (root / "train" / "bee" / "circle.jpg").unlink()
    assert load_data(str(root)).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "note: 4 other files" in capsys.readouterr().out


def test_training_pictures_as_test_pictures_are_told(tmp_path, capsys):
    root = write_folders(tmp_path)
    for path in sorted((root / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "val").rmdir()
    (root / "val").symlink_to("train")
    assert len(load_data(str(root), split="test")) == 6
    assert "is judged by images that it was trained on" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["train", "train/bee", "."])
def test_a_folder_that_may_not_be_read_is_one_line(part, tmp_path, monkeypatch):
    root = write_folders(tmp_path)
    closed, asked = os.path.normpath(root / part), []

    def refuse(really):  # whoever runs the tests may be allowed all
        def look(path=".", *args, **kwargs):
            if not isinstance(path, int) and os.path.normpath(os.fspath(path)) == closed:
                asked.append(path)
                raise PermissionError(13, "Permission denied", str(path))
            return really(path, *args, **kwargs)

        return look

    with monkeypatch.context() as patched:
        for name in ("stat", "scandir", "listdir"):
            patched.setattr(os, name, refuse(getattr(os, name)))
        with pytest.raises(UserError, match=rf"the data of {root} cannot be read \(.*Permission denied: '{closed}'\)$"):
            load_data(str(root))
    assert asked


def test_a_limit_on_threads_is_one_line(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    root = write_folders(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(UserError, match=r"cannot be read \(no thread to read images in: can't start new thread\)$"):
            load_data(str(root))


def test_processes_that_see_different_pictures_are_stopped(tmp_path):
    for place in ("here", "there"):
        write_folders(tmp_path / place / "set")
    places = [str(tmp_path / place) for place in ("here", "there")]
    assert processes.start(processes.data_of_two_disks, *places) == [6, 6]
    (tmp_path / "there" / "set" / "train" / "bee" / "0 é.png").unlink()
    said = processes.start(processes.data_of_two_disks, *places)
    assert said == ["the processes see different images; do the folders change, or differ between machines?"] * 2


# --- folders of any kind ---------------------------------------------------------------------------------------------

ODD_NAMES = [
    "a",
    "B",
    "b",
    "é",
    "e\u0301",
    "caf\udce9",
    "a b",
    "a\nb",
    "x.jpg",
    "train",
    "val",
    "-",
    "'",
    ".x",
    "@eaDir",
]
ENDINGS = [".jpg", ".JPG", ".jpeg", ".png", ".webp", ".jfif", ".txt", ".jpg~", ""]


def pictures_as_bytes():
    """Small pictures of each format, and what is none."""
    good = []
    for ending, mode in (("jpeg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("png", "1")):
        buffer = io.BytesIO()
        Image.new(mode, (5, 7), 1).save(buffer, ending)
        good.append(buffer.getvalue())
    return good, [b"", b"x", b"GIF89a", good[0][:40], good[1][:30], b"%!PS-Adobe-3.0 EPSF-3.0"]


GOOD, BAD = pictures_as_bytes()


def plant(folder, draw, depth=0):
    """A random tree of pictures and of what lies among them; now and then something is in the way of reading it."""
    for _ in range(draw.randrange(2, 5)):
        path = folder / (draw.choice(ODD_NAMES) + (draw.choice(ENDINGS) if depth else ""))
        kind = draw.choices(
            ["good", "folder", "bad", "link", "pipe", "closed"], [30, 3 if depth else 150, 1, 1, 0.3, 0.3]
        )[0]
        if os.path.lexists(path):
            continue
        if kind in ("good", "bad"):
            path.write_bytes(draw.choice(GOOD if kind == "good" else BAD))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(draw.choice(["nowhere", path.name, "..", ".", *os.listdir(folder)]))
        else:
            path.mkdir()
            if depth < 3:
                plant(path, draw, depth + 1)
            path.chmod(0 if kind == "closed" else 0o755)


def load_planted(root, seed):
    """Both splits of a random folder, and a first batch: how many were data, and how many were refused by one line.

    What is data holds every good picture that lies in a class folder, under the name of that folder and no other.
    """
    draw, kinds = random.Random(seed), {"read": 0, "refused": 0}
    root.mkdir()
    for part in ("train", "val"):
        (root / part).mkdir()
        plant(root / part, draw)
    if draw.random() < 0.5:  # the same classes
        for name in os.listdir(root / "val"):
            if draw.random() < 0.9 and name not in os.listdir(root / "train"):
                with contextlib.suppress(PermissionError):  # a closed folder stays where it is
                    (root / "val" / name).rename(root / "train" / name)
    for split in ("train", "test"):
        try:
            data = load_data(str(root), split=split, skip_bad_images=seed % 2 == 0)
            home, places = root / ("train" if split == "train" else "val"), {}
            for path, label in zip(data.paths, data.labels.tolist(), strict=True):
                name = data.classes[label] if data.classes else ""
                assert label >= 0 if data.classes else label == -1
                assert Path(path).relative_to(home).parts[0] == name or not data.classes
                assert places.setdefault(os.path.realpath(os.path.dirname(path)), name) == name  # one place, one class
            picked = set(map(os.path.realpath, data.paths))
            for path in home.glob("*/*"):
                wanted = is_image(path.name) and not is_leftover(path.parent.name)
                if wanted and path.is_file() and path.read_bytes() in GOOD:
                    assert os.path.realpath(path) in picked
            assert data.classes == sorted(data.classes)
            ((images, labels),) = data.train_batches([(0, list(range(min(4, len(data)))))], 8)
            assert images.shape[1:] == (3, 8, 8) and torch.equal(labels, data.labels[:4])
            kinds["read"] += 1
        except UserError as error:
            assert "\n" not in printable(str(error))
            kinds["refused"] += 1
    return kinds


def test_random_folders_are_read_in_full_or_refused_by_one_line(tmp_path):
    found = [load_planted(tmp_path / str(seed), seed) for seed in range(60)]
    assert sum(kinds["read"] for kinds in found) > 15
    assert sum(kinds["refused"] for kinds in found) > 15


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [b"caf\xe9", b"\xff\xfe", b"a\nb", b"\x1b[31mred", b"tab\t", "\u200b".encode(), b"'\"$(x);", b" ", b"%s{0}"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_the_system_allows_is_read_and_shown(name, tmp_path, capsys):
    root = write_folders(tmp_path / "set")
    old = os.fsencode(root / "train" / "bee")
    os.rename(old, old[:-3] + name)
    os.rename(os.fsencode(root / "val" / "bee"), os.fsencode(root / "val") + b"/" + name)
    folder = root / "train" / "ant"
    os.rename(folder / "0 é.png", os.fsencode(folder) + b"/" + name + b".png")
    with open(os.fsencode(folder) + b"/" + name + b".txt", "w"):
        pass
    train, test = (load_data(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 4)
    assert os.fsdecode(name) in train.classes
    assert train.listing.count(b"\n") == 6
    next(train.plain_batches(range(6), 8))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("note: 1 other files")
    said.encode()
    broken = os.fsencode(folder) + b"/" + name + b".png"
    with open(broken, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(UserError) as error:
        load_data(str(root))
    shown = printable(str(error.value))
    assert shown.isprintable()
    shown.encode()


@given(st.binary(max_size=20))
def test_printable_keeps_what_can_be_shown_and_escapes_the_rest(raw):
    text = os.fsdecode(raw)
    shown = printable(text)
    assert shown.isprintable()
    assert [c for c in text if c.isprintable()] == [c for c in shown if c in text] or not text.isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_printable_writes_a_byte_as_its_number():
    assert printable(os.fsdecode(b"caf\xe9 \n\x1b[0m")) == r"caf\xe9 \n\x1b[0m"
    assert printable("café 日本") == "café 日本"


# --- where it is remembered which pictures are good, and which pictures they are -------------------------------------


def test_without_a_home_nothing_is_remembered_and_no_folder_is_made(tmp_path, monkeypatch, capsys):
    root = write_folders(tmp_path / "set")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id without an entry, and no HOME
    assert cache_folder() is None
    assert [len(load_data(str(root), split=split)) for split in ("train", "test")] == [6, 4]
    assert list((tmp_path / "work").iterdir()) == []
    assert capsys.readouterr().out.count("note: there is no home folder") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() is None


@given(data=st.data())
def test_survey_tells_names_and_sizes_below_the_root_alone(tmp_path_factory, data):
    sizes = data.draw(st.dictionaries(st.text("abé", min_size=1, max_size=3), st.integers(0, 50), min_size=1))
    listings, digests = [], []
    for _ in range(2):
        root = tmp_path_factory.mktemp("set")
        for name, size in sizes.items():
            (root / name).write_bytes(b"x" * size)
        lines, digest = survey([str(root / name) for name in sizes], root)
        listings.append(lines)
        digests.append(digest)
    assert listings[0] == listings[1] == [f"{size}\t{name}\n".encode() for name, size in sizes.items()]
    assert digests[0] != digests[1]  # which are good is remembered for one folder
    changed = root / data.draw(st.sampled_from(sorted(sizes)))
    os.utime(changed, ns=(1, 1))
    lines, digest = survey([str(root / name) for name in sizes], root)
    assert lines == listings[1] and digest != digests[1]
    changed.unlink()
    assert survey([str(root / name) for name in sizes], root)[0] != listings[1]


@pytest.mark.parametrize("spelling", [".", "../set", "{root}", "{root}/", "./", "../set/../set"])
def test_a_listing_does_not_tell_how_the_folder_was_spelled(spelling, tmp_path, monkeypatch):
    root = write_folders(tmp_path / "set")
    monkeypatch.chdir(root)
    lines = load_data(spelling.format(root=root)).listing.decode().splitlines()
    assert [line.split("\t")[1] for line in lines] == [
        f"train/{name}/{i} é.png" for name in ("ant", "bee") for i in range(3)
    ]


@pytest.mark.parametrize(
    "text", ["[Infinity]", "[NaN]", "[1, 2", "5", '{"a": 1}', "null", '["x"]', "[-1, 99]", "\xff", "[[1]]"]
)
def test_a_damaged_memory_of_good_pictures_makes_all_be_looked_at(text, tmp_path):
    root = write_folders(tmp_path)
    load_data(str(root))
    memory = cache_folder() / "checked-images"
    (root / "train" / "bee" / "1 é.png").write_bytes(b"x")
    with pytest.raises(UserError, match="1 of 6 images cannot be read"):
        load_data(str(root))
    newest = max(memory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.read_text() == "[4]"
    newest.write_text(text, encoding="latin-1")
    if text != "[-1, 99]":  # this is one, of other pictures
        with pytest.raises(UserError, match="1 of 6 images cannot be read"):
            load_data(str(root))


# --- pictures without labels -----------------------------------------------------------------------------------------


def flatten(root):
    """The pictures of class folders side by side."""
    for path in sorted(root.rglob("*.png")):
        path.rename(root / f"{path.parent.name} {path.name}")
    for folder in sorted(root.rglob("*"), reverse=True):
        if folder.is_dir():
            folder.rmdir()


def only_train(root):
    shutil.rmtree(root / "val")


def without_train(root):
    only_train(root)
    for folder in list((root / "train").iterdir()):
        folder.rename(root / folder.name)
    (root / "train").rmdir()


def one_deep_folder(root):
    flatten(root)
    (root / "2019" / "05").mkdir(parents=True)
    for path in sorted(root.glob("*.png")):
        path.rename(root / "2019" / "05" / path.name)


KINDS = {  # what becomes of train/ant, train/bee, val/ant, val/bee: classes, is there a val
    "flat": (flatten, [], False),
    "one folder, deep": (one_deep_folder, [], False),
    "flat train and val": (lambda root: [flatten(root / part) for part in ("train", "val")], [], True),
    "train alone": (only_train, ["ant", "bee"], False),
    "flat train alone": (lambda root: (only_train(root), flatten(root / "train")), [], False),
    "classes without train": (without_train, ["ant", "bee"], False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_many_kinds_are_read(kind, tmp_path, capsys):
    root = write_folders(tmp_path / "set", train=20, val=5)
    change, classes, has_val = KINDS[kind]
    every = {path.read_bytes() for path in root.rglob("*.png")}
    change(root)
    left = list(root.rglob("*.png"))
    train, test = (load_data(str(root), split=split) for split in ("train", "test"))
    assert train.classes == test.classes == classes
    assert sorted([*train.paths, *test.paths]) == sorted(map(str, left))
    for data in (train, test):
        names = [Path(path).parent.name for path in data.paths]
        assert data.labels.tolist() == ([classes.index(name) for name in names] if classes else [-1] * len(names))
    if has_val:
        assert (len(train), len(test)) == (40, 10)
    else:
        assert 1 <= len(test) <= 0.2 * len(left)
    said = capsys.readouterr().out
    assert (f"{len(test)} of {len(left)} pictures are held out" in said) == (not has_val)
    assert ("note: no labels: " in said) == (not classes)
    images, labels = next(train.train_batches([(0, torch.arange(4))], 8))
    assert images.shape == (4, 3, 8, 8) and torch.equal(labels, train.labels[:4])
    assert {Path(path).read_bytes() for path in left} <= every


@given(st.sets(st.text("abc/é.", min_size=1, max_size=6), min_size=1, max_size=60), st.text("xyz", min_size=1))
def test_a_picture_that_is_added_moves_no_other_one(names, added):
    before, after = held_out(sorted(names)), held_out([*names, added])
    assert 1 <= len(before) <= len(names)
    share = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) < 0.05 * 2**64}
    assert before == share or (not share and len(before) == 1)
    if share:
        assert after - {added} == before
    assert held_out(sorted(names, reverse=True)) == before


def test_the_share_that_is_held_out_is_five_percent_and_has_a_limit():
    assert 900 < len(held_out([str(i) for i in range(20_000)])) < 1100
    many = held_out([str(i) for i in range(120_000)])
    assert len(many) == 5000
    assert many < {str(i) for i in range(120_000) if int(hashlib.sha256(b"%d" % i).hexdigest()[:16], 16) < 0.05 * 2**64}


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path, capsys):
    """Such as those of a phone, which would else be missed by nobody."""
    root = write_folders(tmp_path / "set")
    for name in (".DS_Store", "IMG_1.HEIC", "IMG_2.heic", "a.gif"):
        (root / "train" / "bee" / name).touch()
    load_data(str(root))
    said = capsys.readouterr().out
    like = (
        f"note: 3 pictures like {root / 'train' / 'bee' / 'IMG_1.HEIC'} are left out: convert them to JPEG to have them"
    )
    assert like in said and "note: 1 other files" in said
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").touch()
    with pytest.raises(UserError, match=r"no image .* below .*phone, but 1 like .*IMG_1.HEIC; convert them to JPEG$"):
        load_data(str(tmp_path / "phone"))


def test_folders_beside_train_are_named(tmp_path, capsys):
    root = write_folders(tmp_path)
    for name, file in (("car", "1.png"), ("notes", "a.txt"), (".git", "1.png")):
        (root / name).mkdir()
        (root / name / file).write_bytes((root / "train" / "bee" / "0 é.png").read_bytes())
    assert len(load_data(str(root))) == 6
    assert f"note: train and val alone are read of {root}, and not {root / 'car'}" in capsys.readouterr().out


def test_one_picture_alone_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is the only picture below .*; give one more, to test on"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("flat", [False, True])
def test_the_spelling_of_a_folder_does_not_change_what_is_held_out(flat, tmp_path, monkeypatch):
    root = write_folders(tmp_path, ("ant", "bee"), train=20).joinpath("train").rename(tmp_path / "photos")
    for path in sorted(root.rglob("*.png")) if flat else ():
        path.rename(root / f"{path.parent.name}{path.name}")
    monkeypatch.chdir(root)
    found = [[load_data(x, split=split) for split in ("train", "test")] for x in (str(root), ".", "../photos")]
    assert {tuple(data.listing for data in splits) for splits in found} == {tuple(data.listing for data in found[0])}
    assert b"./" not in found[1][0].listing
