"""Pictures with boxes: what moves the picture moves the boxes, in memory and in files."""

import json

import numpy as np
import pytest
import torch
from make import rand
from PIL import Image

from plumbing import boxes
from plumbing.boxes import BoxFolder, BoxImages, Targets, draw_window, fitted, load_boxes, scenes_with_boxes, targets_of
from plumbing.errors import UserError
from plumbing.scenes import render_scenes


def picture_of(corners, height=20, width=30):
    """A black picture, uint8 (3, H, W), white in boxes x0 y0 x1 y1."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in corners:
        image[:, y0:y1, x0:x1] = 255
    return image


def brightness(image, box):
    """The mean inside a box (centre x, y, width, height in shares) of a picture (3, H, W), and the mean outside."""
    height, width = image.shape[1:]
    x, y, w, h = (box * torch.tensor([width, height] * 2)).tolist()
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    inside = ((rows - y).abs() < h / 2)[:, None] & ((columns - x).abs() < w / 2)
    return float(image[:, inside].mean()), float(image[:, ~inside].mean())


def memory(corners, labels, height=20, width=30):
    images = torch.stack([picture_of(c, height, width) for c in corners])
    corners = torch.tensor(corners, dtype=torch.float32)
    area = (corners[..., 2:] - corners[..., :2]).prod(dim=-1)
    return BoxImages(images, torch.tensor(labels), corners, area, ["a", "b"], (0.5,) * 3, (0.5,) * 3)


def test_scenes_have_the_box_of_what_is_seen():
    data = scenes_with_boxes(40, 24, seed=3)
    _, instances, labels = render_scenes(40, 24, seed=3)
    assert torch.equal(data.objects, labels) and (labels[:, -1] >= 0).any() and (labels[:, 1] < 0).any()
    for i in range(40):
        truth, count = data.truth(i), int((labels[i] >= 0).sum())
        assert len(truth["boxes"]) == len(truth["labels"]) == count and not truth["crowd"].any()
        for n in range(count):
            rows, columns = np.nonzero(instances[i].numpy() == n + 1)
            x, y, w, h = truth["boxes"][n].tolist()
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert truth["area"][n] == len(rows)


def test_boxes_in_memory_move_with_the_picture():
    """A white box on black is where its target is, however it is cut and mirrored; one that is cut off is none."""
    data = memory([[[3, 2, 13, 10], [0, 0, 0, 0]]], [[1, -1]])
    plan, seen, gone = [(seed, [0]) for seed in range(60)], set(), 0
    for images, targets in data.train_batches(plan, 40, (0.1, 0.6), 0.5):
        assert images.shape == (1, 3, 40, 40) and targets.labels.shape == (1, 2) and targets.labels[0, 1] == -1
        if targets.labels[0, 0] < 0:
            gone += 1
            assert images.max() < 0.7 and targets.boxes.abs().max() == 0  # a smoothed rim at most
            continue
        inside, outside = brightness(images[0], targets.boxes[0, 0])
        around = 1 - float(targets.boxes[0, 0, 2:].prod())
        thin = targets.boxes[0, 0, 2:].min() < 0.15  # nothing but a smoothed rim
        assert thin or inside > 0.85 and (around < 1e-4 or around * outside < 0.06), (inside, outside)
        seen.add(round(float(targets.boxes[0, 0, 0]), 3))
    assert gone and len(seen) > 10
    ((image, targets),) = data.plain_batches([0], 40)
    torch.testing.assert_close(targets.boxes[0, 0], torch.tensor([8 / 30, 6 / 20, 10 / 30, 8 / 20]))
    assert brightness(image[0], targets.boxes[0, 0])[0] > 0.9 and data.size(0) == (20, 30)


def test_all_flips_or_none():
    data = memory([[[6, 5, 12, 15]]], [[0]])
    for flip, centre in ((0.0, 9 / 30), (1.0, 21 / 30)):
        ((_, targets),) = data.train_batches([(0, [0])], 30, (1.0, 1.0), flip)
        x, _, w, _ = targets.boxes[0, 0].tolist()
        whole = 20 * 4 / 3 / 30  # an aspect of 4 / 3 at most is kept, in the middle
        assert x == pytest.approx((centre - 0.5) / whole + 0.5, abs=1e-5) and w == pytest.approx(
            6 / 30 / whole, abs=1e-5
        )


def test_targets_are_split_as_the_pictures_are():
    targets = targets_of(torch.arange(6).view(3, 2), rand(3, 2, 4).sort(dim=-1).values, torch.ones(3, 2))
    first, second = targets.chunk(2)
    assert isinstance(first, Targets) and [len(x) for x in (first.labels, second.labels)] == [2, 1]
    assert torch.equal(torch.cat([first.boxes, second.boxes]), targets.boxes)
    assert targets.to("cpu", torch.float64).boxes.dtype == torch.float64
    empty = targets_of(torch.tensor([[0, 1]]), torch.tensor([[[0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 1.5, 0.9]]]), None)
    assert empty.labels.tolist() == [[-1, 1]]
    torch.testing.assert_close(empty.boxes[0], torch.tensor([[0, 0, 0, 0], [0.75, 0.7, 0.5, 0.4]]))


def test_the_mask_is_what_the_picture_fills():
    targets = targets_of(torch.zeros(2, 1).long(), torch.zeros(2, 1, 4), torch.tensor([[1.0, 0.5], [0.3, 1.0]]))
    mask = targets.mask(4, 6)
    assert mask[0].all(dim=0).tolist() == [True] * 3 + [False] * 3
    assert mask[1].all(dim=1).tolist() == [True, False, False, False] and mask[1].sum() == 6


# --- files -----------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_detr():
    """torchvision's rule in DETR's release: the shorter side to 800, the longer to 1333 at most."""
    assert fitted(480, 640, 800, 1333) == (800, 1066)
    assert fitted(640, 480, 800, 1333) == (1066, 800)
    assert fitted(400, 1000, 800, 1333) == (533, 1332)
    assert fitted(500, 500, 800, 1333) == (800, 800)


def test_no_side_is_longer_than_the_longest():
    """Not by rounding either: what is longer would be cut off where all pictures are padded to one square."""
    assert fitted(100, 300, 32, 32) == (11, 32) and fitted(300, 100, 32, 32) == (32, 11)
    assert fitted(300, 2, 32, 32) == (32, 1) and fitted(2, 3000, 32, 53) == (1, 53)
    for long in range(1, 200, 3):
        for size in (1, 7, 32):
            assert max(fitted(20, long, size, size)) <= size and min(fitted(20, long, size, size)) >= 1


def test_windows_are_those_of_detr():
    windows = [draw_window(480, 640, 800, seed) for seed in range(300)]
    whole = [w for w in windows if (w.height, w.width) == (480, 640)]
    assert 100 < len(whole) < 200 and {w.top for w in whole} == {0}
    assert {w.rows for w in whole} == set(range(480, 801, 32))
    for w in windows:
        assert 0 <= w.top <= w.top + w.height <= 480.001 and 0 <= w.left <= w.left + w.width <= 640.001
        assert min(w.rows, w.columns) in range(480, 801, 32) or max(w.rows, w.columns) in (1332, 1333)
        assert w.rows / w.columns == pytest.approx(w.height / w.width, rel=0.01)
    small = [w for w in windows if w not in whole]
    assert (
        384 / 600 * 480 - 1e-6 < min(w.height for w in small) < 384 / 500 * 480 and max(w.height for w in small) == 480
    )
    half = draw_window(480, 640, 400, 5)
    assert half[:4] == draw_window(480, 640, 800, 5)[:4] and half.rows == draw_window(480, 640, 800, 5).rows // 2


def folder(root, corners, sizes):
    """A folder of COCO's layout, for both splits: pictures (W, H) that are white in one box each, the last a crowd."""
    rows, images = [], []
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
    for i, ((x0, y0, x1, y1), (width, height)) in enumerate(zip(corners, sizes, strict=True)):
        pixels = picture_of([(x0, y0, x1, y1)], height, width).permute(1, 2, 0).numpy()
        for split in ("train2017", "val2017"):
            Image.fromarray(pixels).save(root / split / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        bbox = [x0, y0, x1 - x0, y1 - y0]
        rows.append({"id": 2 * i, "image_id": i, "category_id": 5, "bbox": bbox, "area": 7})
        rows.append({"id": 2 * i + 1, "image_id": i, "category_id": 5, "bbox": [0, 0, 2, 2], "iscrowd": 1})
    text = json.dumps({"images": images, "annotations": rows, "categories": [{"id": 5, "name": "box"}]})
    for split in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root


PLACES, PICTURES = [(6, 5, 20, 15), (10, 20, 30, 60)], [(30, 20), (40, 80)]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("coco"), PLACES, PICTURES)


def test_boxes_of_files_move_with_the_picture(coco):
    data = load_boxes(str(coco), split="train")
    assert isinstance(data, BoxFolder) and data.classes == ["box"] and len(data) == 2 and len(data.labels) == 2
    plan, mirrored = [(seed, [0, 1]) for seed in range(12)], 0
    for images, targets in data.train_batches(plan, 64):
        assert images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0 and 0 <= images.min() <= images.max() <= 1
        for n, (image, filled) in enumerate(zip(images, targets.filled, strict=True)):
            rows, columns = (filled * torch.tensor(image.shape[1:])).round().int().tolist()
            assert image[:, rows:].sum() == 0 and image[:, :, columns:].sum() == 0
            assert targets.labels[n].tolist() in ([0, -1], [-1, -1])  # the crowd does not train
            if targets.labels[n, 0] == 0 and targets.boxes[n, 0, 2:].min() > 0.15:
                inside, outside = brightness(image[:, :rows, :columns], targets.boxes[n, 0])
                assert inside > 0.75 and outside < 0.25, (inside, outside)
                mirrored += n == 0 and bool(targets.boxes[n, 0, 0] > 0.55)
    assert mirrored
    again = next(iter(data.train_batches(plan[3:4], 64)))
    before = list(data.train_batches(plan[:4], 64))[3]
    assert torch.equal(again[0], before[0]) and torch.equal(again[1].boxes, before[1].boxes)


def test_whole_pictures_of_files_and_their_truth(coco):
    data = load_boxes("coco", coco, split="test")
    (first, one), (second, two) = data.plain_batches([0, 1], 32)
    assert first.shape == (1, 3, 32, 64) and second.shape == (1, 3, 64, 32)  # 32 x 48 and 53 x 26
    torch.testing.assert_close(one.filled, torch.tensor([[1, 48 / 64]]))
    torch.testing.assert_close(two.filled, torch.tensor([[52 / 64, 26 / 32]]))
    torch.testing.assert_close(one.boxes[0, 0], torch.tensor([13 / 30, 0.5, 14 / 30, 0.5]))
    truth = data.truth(0)
    assert truth["boxes"].tolist() == [[6, 5, 14, 10], [0, 0, 2, 2]] and truth["area"].tolist() == [7, 4]
    assert truth["crowd"].tolist() == [False, True] and data.size(1) == (80, 40)
    data.square = True  # for encoders of pictures of one size
    ((both, targets),) = data.plain_batches([0, 1], 32, batch=2)
    assert both.shape == (2, 3, 32, 32)
    torch.testing.assert_close(targets.filled, torch.tensor([[21 / 32, 31 / 32], [1, 0.5]]))


def test_a_picture_of_another_size_than_its_annotations_is_refused(coco):
    data = load_boxes(str(coco), split="train")
    data.sizes = [(21, 30), *data.sizes[1:]]
    with pytest.raises(UserError, match=r"0.png .*it has 30 x 20 pixels, its annotations are for 30 x 21"):
        next(iter(data.plain_batches([0], 32)))


def test_a_turned_picture_is_upright_where_its_annotations_are(tmp_path):
    root = folder(tmp_path / "data", PLACES, PICTURES)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    for i in (0, 1):
        path = root / "train2017" / f"{i}.png"
        Image.open(path, formats=["PNG"]).transpose(
            Image.Transpose.ROTATE_90 if i else Image.Transpose.ROTATE_180
        ).save(path, exif=exif)
    data = load_boxes(str(root), split="train")
    for i in (0, 1):  # the first one's annotations are of the file as it is stored
        ((image, targets),) = data.plain_batches([i], 32)
        rows, columns = (targets.filled[0] * torch.tensor(image.shape[2:])).int().tolist()
        inside, outside = brightness(image[0, :, :rows, :columns], targets.boxes[0, 0])
        assert (inside > 0.9 and outside < 0.1) if i else outside < 0.4


@pytest.mark.parametrize("name", ["", "shapes", "no/such/folder"])
def test_unknown_data_is_refused(name):
    with pytest.raises(UserError, match="give scenes, coco, or a folder"):
        load_boxes(name)


def test_a_run_over_many_epochs_is_planned_step_by_step(coco):
    """The plan of all epochs is not held in memory: one batch asks for few steps ahead."""
    asked = []

    def plan():
        for seed in range(10_000):
            asked.append(seed)
            yield seed, [0]

    next(load_boxes(str(coco), split="train").train_batches(plan(), 32))
    assert len(asked) < 10
    assert boxes.CELL == 32
