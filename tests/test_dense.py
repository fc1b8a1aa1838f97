"""Pictures with a class for every pixel: scenes, crops that move both alike, folders of labels, what is refused."""

import shutil
import struct
import zlib

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import generator, seeds, write_pairs
from PIL import Image

from plumbing import dense
from plumbing.crops import crop_boxes, random_resized_crop
from plumbing.dense import bits_of, crop_pairs, load_dense, nearest_pixels, read_labels, resize_labels, scenes
from plumbing.errors import UserError
from plumbing.scenes import DRAWS, MOST, render_scenes
from plumbing.shapes import SHAPES, Brush, outlines

# --- scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_depend_on_seed_and_index_alone():
    some, fewer, other = render_scenes(70, 64, 3), render_scenes(5, 64, 3), render_scenes(5, 64, 4)
    for a, b, c in zip(some, fewer, other, strict=True):
        assert torch.equal(a[:5], b)
        assert not torch.equal(a[:5], c)


def test_a_scene_shows_one_to_five_objects_each_of_them_in_part():
    images, instances, objects = render_scenes(200, 40)
    assert (images.dtype, instances.dtype, objects.dtype) == (torch.uint8, torch.uint8, torch.int64)
    counts = (objects >= 0).sum(dim=1)
    assert set(counts.tolist()) == set(range(1, MOST + 1))
    for seen, kinds, count in zip(instances, objects, counts.tolist(), strict=True):
        assert set(seen.unique().tolist()) == set(range(count + 1))
        assert torch.bincount(seen.flatten().int())[1:].min() >= 40**2 / 400
        assert kinds[:count].max() < len(SHAPES) and (kinds[count:] == -1).all()
    # What stands out is where the map says so.
    inside = torch.stack([x[:, m].float().mean(dim=1) for x, m in zip(images, instances == 1, strict=True)])
    outside = torch.stack([x[:, m].float().mean(dim=1) for x, m in zip(images, instances == 0, strict=True)])
    assert ((inside - outside).abs().amax(dim=1) > 15).float().mean() > 0.9


def test_later_objects_lie_before_earlier_ones_and_hidden_ones_are_left_out():
    """Object by object, pixel by pixel, from the numbers that are drawn."""
    size, left_out, outline = 20, 0, outlines()
    _, instances, objects = render_scenes(150, size)
    draws = torch.from_numpy(np.random.Generator(np.random.Philox(0)).random((150, DRAWS))).float()
    for row, seen, kinds in zip(draws, instances, objects, strict=True):
        bodies, labels = [], []
        for j in range(1 + int(row[0] * MOST)):
            brush = Brush(row[None, 10 + 12 * j : 22 + 12 * j], size, *outline)
            labels.append(int(brush.vary(0, len(SHAPES))))
            place = [brush.vary(*limits) for limits in ((0.3, 0.65), (-0.3, 0.3), (-0.65, 0.65), (-0.65, 0.65))]
            bodies.append(brush.inside(torch.tensor(labels[-1:]), *place)[0][0] > 0.5)
        kept, free = [], torch.ones(size, size, dtype=torch.bool)
        for j in reversed(range(len(bodies))):
            shown = int((bodies[j] & free).sum())
            if shown >= max(3, size**2 / 400) and shown >= 0.1 * int(bodies[j].sum()):
                kept.insert(0, j)
                free &= ~bodies[j]
        expected = torch.zeros(size, size, dtype=torch.uint8)
        for number, j in enumerate(kept):
            expected[bodies[j]] = number + 1
        assert torch.equal(seen, expected)
        assert kinds.tolist() == ([labels[j] for j in kept] + [-1] * MOST)[:MOST]
        left_out += len(bodies) - len(kept)
    assert left_out > 3


def test_scenes_are_the_same_drawing_at_any_size():
    small, large = render_scenes(20, 32), render_scenes(20, 96)
    means = large[0].float().unfold(2, 3, 3).unfold(3, 3, 3).mean(dim=(-1, -2))
    assert (means - small[0].float()).abs().mean() < 4
    assert torch.equal(small[2], large[2])
    assert (large[1][:, 1::3, 1::3] == small[1]).float().mean() > 0.985


def test_a_class_map_is_the_class_of_the_object_that_is_seen():
    data = scenes(6, 20, seed=1)
    for seen, kinds, found in zip(data.instances, data.objects, data.maps, strict=True):
        expected = [[0 if n == 0 else int(kinds[n - 1]) + 1 for n in row] for row in seen.tolist()]
        assert found.tolist() == expected
    assert data.classes[0] == "background" and data.classes[1:] == list(SHAPES)
    pixels = scenes(150, 24).images.float().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(pixels.mean(dim=1), torch.tensor(data.mean), atol=0.05, rtol=0)
    torch.testing.assert_close(pixels.std(dim=1), torch.tensor(data.std), atol=0.05, rtol=0)


def test_scenes_to_train_on_and_to_test_on_are_others(monkeypatch):
    asked = []
    monkeypatch.setattr(dense, "scenes", lambda *args: asked.append(args))
    for split, seed in (("train", 0), ("labelled", 0), ("test", 0), ("train", 1)):
        load_dense("scenes", split=split, image_size=24, seed=seed)
    assert asked == [(4096, 24, 0, "cpu"), (4096, 24, 0, "cpu"), (1024, 24, 1, "cpu"), (4096, 24, 2, "cpu")]


# --- nearest, and crops ----------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_nearest_pixels_are_those_that_centres_lie_in(seed, height, width, size, mirrored):
    labels = torch.randint(9, (height, width), generator=generator(seed))
    top, left, h, w = crop_boxes(
        torch.tensor([float(height)]), torch.tensor([float(width)]), (0.1, 1.0), generator=generator(seed)
    )[0].double()
    left, w = (left + w, -w) if mirrored else (left, w)
    rows = nearest_pixels(top[None], h[None], height, size)
    columns = nearest_pixels(left[None], w[None], width, size)
    found = dense.take_nearest(labels[None], rows, columns)[0]
    assert torch.equal(found, reference.nearest(labels, *(float(x) for x in (top, left, h, w)), size))


def test_whole_labels_are_resized_by_one_rule():
    labels = torch.arange(12).view(1, 3, 4)
    assert torch.equal(resize_labels(labels, 3, 4), labels)
    assert resize_labels(labels, 6, 8)[0, ::2, ::2].tolist() == labels[0].tolist()
    assert resize_labels(labels, 1, 2).tolist() == [[[5, 7]]]


def blocks_of_colours(seed, count=3, cells=2, side=12):
    """Pictures whose grey is 60 times their label, in four blocks, and these labels."""
    labels = torch.randint(5, (count, cells, cells), generator=generator(seed))
    labels = labels.repeat_interleave(side, 1).repeat_interleave(side, 2).to(torch.uint8)
    return (60 * labels)[:, None].repeat(1, 3, 1, 1), labels


def fit_each_other(images, labels):
    """Whether a pixel far from a border between two labels has the grey of its own."""
    around = labels.unfold(1, 9, 1).unfold(2, 9, 1).flatten(3)  # (B, h - 8, w - 8, 81)
    far = around.amin(dim=-1) == around.amax(dim=-1)
    errors = (images - 60 / 255 * labels[:, None]).abs().amax(dim=1)[:, 4:-4, 4:-4][far]
    return len(errors) > 20 and float(errors.max()) < 0.02


@given(seeds, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["", "bicubic"]))
def test_crops_move_pictures_and_labels_alike(seed, flip, interpolation):
    images, labels = blocks_of_colours(seed)
    crop = (0.4, 1.0, interpolation)
    pictures, found = crop_pairs(images, labels, 24, crop, flip, generator(seed))
    assert (found.dtype, found.shape) == (torch.int64, (3, 24, 24))
    assert fit_each_other(pictures, found)
    assert torch.equal(pictures, random_resized_crop(images, 24, crop, flip=flip, generator=generator(seed)))


def test_batches_in_memory_are_those_of_the_plan():
    data = scenes(6, 16)
    plan = [(5, [3, 1]), (6, [0, 5])]
    batches = list(data.train_batches(plan, 12, (0.5, 1.0)))
    again = crop_pairs(data.images[[0, 5]], data.maps[[0, 5]], 12, (0.5, 1.0), 0.5, generator(6))
    assert len(batches) == 2 and all(torch.equal(a, b) for a, b in zip(batches[1], again, strict=True))
    images, labels = next(data.plain_batches([2], 8))
    assert images.shape == (1, 3, 8, 8) and torch.equal(labels, resize_labels(data.maps[[2]], 8, 8).long())
    images, labels = next(data.whole_batches([2], 8))
    assert images.shape == (1, 3, 8, 8) and torch.equal(labels, data.maps[[2]].long())
    assert len(data) == 6 and data.labels.tolist() == [0] * 6


# --- label pictures --------------------------------------------------------------------------------------------------


def save_png(path, values, bits):
    """A grey PNG of any depth, which Pillow cannot write."""
    rows = b"".join(b"\0" + bytes([16 * a + b for a, b in zip(row[::2], row[1::2], strict=True)]) for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, 0, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data)


def test_labels_are_the_numbers_of_the_file(tmp_path):
    """A palette's indices as they are; 16 bits; 255 and 65535 are none."""
    path, values = tmp_path / "a.png", np.array([[0, 1], [2, 9]], dtype=np.uint8)
    image = Image.fromarray(values)
    image.save(path)
    assert read_labels(path).tolist() == values.tolist()
    image.putpalette([7 * i % 256 for i in range(768)])
    image.save(path)
    with Image.open(path, formats=["PNG"]) as saved:
        assert saved.mode == "P"
    assert read_labels(path).tolist() == values.tolist()
    Image.fromarray(np.array([[0, 254], [255, 65535]], dtype=np.uint16)).save(path)
    assert read_labels(path).tolist() == [[0, 254], [255, 255]]
    assert read_labels(path, zero_is_nothing=True).tolist() == [[255, 253], [255, 255]]
    assert read_labels(path).dtype == np.uint8


def test_palettes_of_few_bits_have_their_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 3], [11, 0]], dtype=np.uint8))
    image.putpalette(list(range(36)))
    image.save(tmp_path / "a.png")
    assert bits_of(tmp_path / "a.png") == 4
    assert read_labels(tmp_path / "a.png").tolist() == [[0, 3], [11, 0]]


def test_scenes_too_small_to_show_shapes_are_refused():
    with pytest.raises(UserError, match="scenes of 8 x 8 pixels are too small to show shapes; give --image-size 16"):
        render_scenes(1, 8)


def test_what_holds_no_labels_is_refused(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, [[0, 1], [2, 15]], 4)
    with pytest.raises(ValueError, match="grey labels of 4 bits, expected 8 or 16"):
        read_labels(path)
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(ValueError, match="a PNG of mode RGB holds no labels, expected a PNG, grey or with a palette"):
        read_labels(path)
    Image.new("L", (2, 2)).save(path, "JPEG")
    with pytest.raises(ValueError, match="a JPEG of mode L holds no labels"):
        read_labels(path)
    Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match="the label 300 is beyond 254"):
        read_labels(path)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("training", "validation"), ("train", "val")])
def test_folders_give_pictures_and_labels_that_fit_each_other(tmp_path, parts, capsys):
    write_pairs(tmp_path, parts)
    (tmp_path / "images" / parts[0] / "notes.txt").write_text("a note")
    train, test = (load_dense(tmp_path, split=split) for split in ("labelled", "test"))
    told = capsys.readouterr().out
    assert told.count("1 other files or folders below") == told.count("notes.txt") == 2  # names come from train
    assert (len(train), len(test)) == (4, 2)
    assert train.classes == test.classes == ["0", "1", "2"]
    images, labels = next(train.plain_batches(range(4), 24))
    assert images.shape == (4, 3, 24, 24) and labels.dtype == torch.int64 and fit_each_other(images, labels)
    images, labels = next(test.whole_batches([1], 56))
    assert images.shape == (1, 3, 56, 80) and labels.shape == (1, 28, 40)
    plan = [(seed, [0, 1, 2, 3]) for seed in range(3)]
    first = list(train.train_batches(plan, 24, (0.4, 1.0), 0.5))
    assert all(fit_each_other(*pair) for pair in first)
    assert {len(pair[1].unique()) for pair in first} == {3}
    for (a, b), (c, d) in zip(first, train.train_batches(plan, 24, (0.4, 1.0), 0.5), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    never, always = (next(train.train_batches(plan, 24, (0.4, 1.0), flip)) for flip in (0.0, 1.0))
    assert all(torch.equal(a, b.flip(-1)) for a, b in zip(never, always, strict=True))


def test_ade20k_counts_from_one_and_names_its_classes(tmp_path):
    home = write_pairs(tmp_path / "ADEChallengeData2016", first=0)
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.2\t5\t5\twall", "2\t0.1\t5\t5\tbuilding, edifice"]
    (home / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    for data in (load_dense("ade20k", tmp_path), load_dense("ade20k", home, "test"), load_dense(home)):
        assert data.classes == ["wall", "building"]
        assert next(data.plain_batches([0], 14))[1].unique().tolist() == [0, 1, 255]
    (home / "objectInfo150.txt").unlink()
    assert load_dense("ade20k", tmp_path).classes == ["1", "2"]
    with pytest.raises(UserError, match="no ade20k at .*annotations; give the --root that holds its images and anno"):
        load_dense("ade20k", home / "annotations")


def test_a_folder_without_parts_holds_some_out_and_may_name_classes(tmp_path):
    write_pairs(tmp_path, ("",), (30,))
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nsnow\n")
    train, test = load_dense(tmp_path), load_dense(tmp_path, split="test")
    assert train.classes == ["sky", "sea", "sand", "snow"]
    assert len(train) + len(test) == 30 and 1 <= len(test) <= 6 and not set(train.paths) & set(test.paths)
    (tmp_path / "classes.txt").write_text("sky\nsky\nsea\n")
    with pytest.raises(UserError, match=r"classes.txt lists 3 classes, expected 1 to 255 different names, a line each"):
        load_dense(tmp_path)


def test_names_of_classes_are_told_apart_and_fit_their_labels(tmp_path):
    table, listed = tmp_path / "objectInfo150.txt", tmp_path / "classes.txt"
    assert dense.names_of(tmp_path) == []
    listed.write_bytes(b"\xef\xbb\xbfsky\r\n sea \r\nred\x0b\x1b[31m\n\xff\n\n\n")
    assert dense.names_of(tmp_path) == ["sky", "sea", r"red\x0b\x1b[31m", r"\xff"]
    listed.write_text("sky\n\nsea\n")
    with pytest.raises(UserError, match=r"line 2 of .*classes.txt is blank; give a name in each, from label 0 on"):
        dense.names_of(tmp_path)
    table.write_text("\ufeff1\t.1\tdoor\n2\t.1\tscreen, crt\n3\t.1\tscreen door\n4\t.1\tscreen, silver\n", "utf-8")
    assert dense.names_of(tmp_path) == ["door", "screen 2", "screen door", "screen 4"]
    rows = [f"{i + 1}\t.1\tclass{i}" for i in range(256)]
    table.write_text("\n".join(rows))
    with pytest.raises(UserError, match="objectInfo150.txt lists 256 classes, expected 1 to 255 different names, a li"):
        dense.names_of(tmp_path)
    table.write_text("\n".join(rows[:255]))
    assert len(dense.names_of(tmp_path)) == 255
    table.write_text("1\tdoor 3\n2\twall\n3\tdoor\n4\tdoor")
    with pytest.raises(UserError, match="lists 4 classes, expected 1 to 255 different"):
        dense.names_of(tmp_path)


def spoil_size(root):
    Image.new("L", (28, 40)).save(root / "annotations" / "training" / "1.png")
    return r"1 of 4 images cannot be read: .*images/training/1.png \(its labels .*1.png are 28 x 40, the picture is"


def spoil_label(root):
    (root / "classes.txt").write_text("sky\nsea")
    return r"4 of 4 images .*0.png \(.*annotations/training/0.png has the label 2, there are 2 classes\)"


def spoil_missing(root):
    (root / "annotations" / "training" / "1.png").unlink()
    return r"images/training/1.png \(it has no labels, no file .*annotations/training/1.png\); mend or remove"


def spoil_depth(root):
    save_png(root / "annotations" / "training" / "1.png", [[0, 1] * 10] * 14, 4)
    return r"1.png \(its labels .*annotations/training/1.png: grey labels of 4 bits, expected 8 or 16\)"


def spoil_picture(root):
    (root / "images" / "training" / "1.png").write_bytes(b"GIF89a")
    return r"images/training/1.png \(GIF, expected JPEG, PNG or WebP\)"


def spoil_all(root):
    for path in (root / "images" / "training").iterdir():
        path.unlink()
    return r"no image below .*images/training; expected JPEG, PNG or WebP"


def spoil_part(root):
    (root / "images" / "validation").rename(root / "images" / "others")
    return r"images holds training alone; expected training and validation, or neither"


def spoil_folder(root):
    (root / "annotations").rename(root / "masks")
    return r"no folder .*annotations; expected pictures in images and labels in annotations"


def spoil_everything_ignored(root):
    for path in (root / "annotations" / "training").iterdir():
        Image.new("L", (40, 28), 255).save(path)
    return r"no pixel of the 4 pictures to train on of .* has a label: 255 is ignored; give labels in .*annotations$"


def spoil_split(root):
    shutil.rmtree(root / "images" / "validation")
    for path in (root / "images" / "training").iterdir():
        path.rename(root / "images" / path.name) if path.name == "0.png" else path.unlink()
    (root / "images" / "training").rmdir()
    return r"images/0.png is the only picture below .*images; give one more, to test on$"


SPOILS = [
    spoil_split,
    spoil_size,
    spoil_label,
    spoil_missing,
    spoil_depth,
    spoil_picture,
    spoil_all,
    spoil_part,
    spoil_folder,
]


@pytest.mark.parametrize("spoil", [*SPOILS, spoil_everything_ignored])
def test_bad_folders_are_one_line_with_the_file(tmp_path, spoil, capsys):
    message = spoil(write_pairs(tmp_path))
    for _ in range(2):  # what was found is remembered, what is bad is looked at again
        with pytest.raises(UserError, match=message) as error:
            load_dense(tmp_path)
        assert "\n" not in str(error.value)
    if spoil in (spoil_size, spoil_missing, spoil_depth, spoil_picture):
        data = load_dense(tmp_path, skip_bad_images=True)
        assert [path[-5:] for path in data.paths] == ["0.png", "2.png", "3.png"]
        assert [path[-5:] for path in data.annotations] == ["0.png", "2.png", "3.png"]
        assert "1 of 4 images are left out, they cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("names", [None, "sky\nsea\nsand"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_any_label_is_refused(tmp_path, split, names):
    part = "validation" if split == "test" else "training"
    for path in (write_pairs(tmp_path) / "annotations" / part).iterdir():
        Image.new("L", (40, 28), 255).save(path)
    if names:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=f"no pixel of the [24] pictures to {split} on of .* has a label: 255 is"):
        load_dense(tmp_path, split=split)


def test_a_name_that_is_no_data_is_refused():
    with pytest.raises(UserError, match="no pictures with labels of pixels 'shapes'; give scenes, ade20k, coco, or a"):
        load_dense("shapes")
