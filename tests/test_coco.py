"""COCO's layout: masks as pycocotools makes them, files that are read whole or refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from plumbing.coco import (
    cut_boxes,
    find_split,
    mask_of,
    polygon_mask,
    read_annotations,
    read_coco,
    run_lengths,
    run_mask,
)
from plumbing.errors import UserError

# --- masks -----------------------------------------------------------------------------------------------------------


def square(low, high):
    return [low, low, high, low, high, high, low, high]


def test_a_polygon_has_the_pixels_that_pycocotools_gives_it():
    cases = {
        45: [0, 0, 10, 0, 0, 10],
        1: square(3.2, 3.8),
        0: [0, 0, 10, 0, 10, 0.4, 0, 0.4],
        10: [0, 0, 10, 0, 10, 0.6, 0, 0.6],
    }
    for count, polygon in cases.items():
        assert polygon_mask(polygon, 12, 20).sum() == count
    rows, columns = np.nonzero(polygon_mask(square(0.5, 10.5), 12, 20))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 10, 1, 10)


def test_a_polygon_of_slanted_sides_is_cut_at_the_picture():
    """As pycocotools 2.0.11 fills it: a kite that leaves a picture of 6 x 8 on two sides, listed from either end."""
    kite = [-2, 3, 4.3, -1.5, 9, 2.7, 3.1, 5.4]
    shown = ["..#####.", "########", "########", "#######.", ".####...", "........"]
    want = np.array([[letter == "#" for letter in row] for row in shown])
    assert (polygon_mask(kite, 6, 8) == want).all()
    assert (polygon_mask(np.reshape(kite, (4, 2))[::-1].ravel(), 6, 8) == want).all()


def test_runs_go_down_the_columns():
    mask = np.zeros((4, 3), dtype=bool)
    mask[1:3, 1] = mask[0, 2] = True
    assert (run_mask([5, 2, 1, 1, 3], 4, 3) == mask).all()
    assert (run_mask("521O2", 4, 3) == mask).all()  # what pycocotools packs it into
    assert run_mask([0, 12], 4, 3).all()
    assert run_lengths("9") == [9]
    assert run_lengths("P2") == [64]  # two letters


@pytest.mark.parametrize("counts", [[5, 2], [13, -1], [5.0, 7.0], "5", "P", "\x01", [True] * 12])
def test_runs_that_do_not_fill_the_picture_are_refused(counts):
    with pytest.raises(ValueError, match="run lengths"):
        run_mask(counts, 4, 3)


def test_a_segmentation_is_polygons_or_runs():
    both = mask_of([square(0, 2), square(1, 4)], 6, 8)
    assert both.sum() == 4 + 9 - 1  # together, and not in turn
    assert (mask_of({"size": [6, 8], "counts": [0, 48]}, 6, 8)).all()
    with pytest.raises(ValueError, match="size"):
        mask_of({"size": [8, 6], "counts": [0, 48]}, 6, 8)
    for wrong in ("abc", {"size": [6, 8]}, [[0, 0, 1, 1]], [[0, 0, 5, 0, 5, float("nan")]], [3], [[0] * 7]):
        with pytest.raises(ValueError, match=r"segmentation"):
            mask_of(wrong, 6, 8)


# --- files -----------------------------------------------------------------------------------------------------------


def content():
    """Three pictures, one of them without objects; ids with gaps, out of order; a crowd, and two boxes to be cut."""
    runs = {"size": [30, 40], "counts": [600, 300, 300]}
    packed = {"size": [20, 30], "counts": "\x30"}
    rows = [
        {"id": 7, "image_id": 9, "category_id": 44, "bbox": [5, 5, 10, 10], "area": 90.5, "iscrowd": 0},
        {"id": 3, "image_id": 9, "category_id": 2, "bbox": [20, 0, 10, 30], "area": 300, "iscrowd": 1},
        {"id": 4, "image_id": 2, "category_id": 2, "bbox": [-5, 10, 10, 30], "area": 150},
        {"id": 5, "image_id": 2, "category_id": 44, "bbox": [35, 5, 10, 5]},
        {"id": 0, "image_id": 2, "category_id": 44, "bbox": [3, 3, 0, 4], "segmentation": packed},
    ]
    rows[0]["segmentation"], rows[1]["segmentation"] = [square(5, 15)], runs
    rows[2]["segmentation"] = [square(0, 5), square(10, 12)]
    images = [{"id": i, "file_name": f"{name}.png", "width": w, "height": h} for i, name, w, h in SIZES]
    return {"images": images, "annotations": rows, "categories": [{"id": 44, "name": "cup"}, {"id": 2, "name": "cat"}]}


SIZES = [(9, "a", 40, 30), (2, "b", 30, 20), (5, "c", 16, 16)]


def write(root, data, name="train2017", pictures=True):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, str) else json.dumps(data)
    (root / "annotations" / f"instances_{name}.json").write_text(text)
    (root / name).mkdir(exist_ok=True)
    for _, picture, width, height in SIZES if pictures else ():
        Image.new("RGB", (width, height), (200, 10, 10)).save(root / name / f"{picture}.png")
    return root


def test_a_folder_is_read_in_the_order_of_its_ids(tmp_path, capsys):
    data = read_coco(write(tmp_path, content()), "train")
    assert [path.rsplit("/", 1)[1] for path in data.paths] == ["b.png", "c.png", "a.png"]
    assert data.sizes == [(20, 30), (16, 16), (30, 40)]
    assert data.classes == ["cat", "cup"]  # ids 2 and 44 are places 0 and 1
    first, empty, last = data.objects
    assert first.boxes.tolist() == [[-5, 10, 10, 30], [35, 5, 10, 5], [3, 3, 0, 4]]
    assert first.labels.tolist() == [0, 1, 1]
    assert first.area.tolist() == [150, 50, 0]  # without the field, that of the box
    assert len(empty) == 0 and empty.boxes.shape == (0, 4)
    assert last.crowd.tolist() == [False, True] and last.area.tolist() == [90.5, 300]
    assert capsys.readouterr().out.count("2 of 4 boxes have no area within their picture: these do not train") == 1
    assert len(data) == 3 and [line.rsplit(b"\t")[1] for line in data.listing.splitlines()] == [
        b"annotations/instances_train2017.json",
        *(b"train2017/" + name for name in (b"b.png", b"c.png", b"a.png")),
    ]
    read_coco(write(tmp_path, content(), "val2017"), "test")
    assert "2 of 4 boxes have no area within their picture: these are never found" in capsys.readouterr().out


def test_boxes_are_cut_to_the_picture(tmp_path):
    first = read_coco(write(tmp_path, content()), "train").objects[0]
    corners, left = cut_boxes(first.boxes, 20, 30)
    assert corners.tolist() == [[0, 10, 5, 20], [30, 5, 30, 10], [3, 3, 3, 7]]
    assert left.tolist() == [True, False, False]


def test_masks_and_classes_of_pixels(tmp_path):
    data = read_coco(write(tmp_path, content()), "train")
    masks = data.masks(2)
    assert masks.shape == (2, 30, 40) and masks.sum(axis=(1, 2)).tolist() == [100, 300]
    assert masks[1, :, 20:30].all()
    found = data.class_map(2)
    assert (found == 2).sum() == 100 and (found == 255).sum() == 300 and (found == 0).sum() == 1200 - 400
    data.objects[2].segmentations[0] = None
    assert data.masks(2)[0].sum() == 100  # of the box
    data.objects[2].boxes[0] = [15, 0, 20, 30]  # over the crowd, which is behind it
    assert (data.class_map(2) == 2).sum() == 600
    data.objects[2].crowd[1] = False  # the smaller one of two objects is in front
    assert (data.class_map(2) == 1).sum() == 300
    data.objects[2].segmentations[1] = None
    data.objects[2].boxes[1] = data.objects[2].boxes[0]  # the later of equal ones
    assert (data.class_map(2) == 1).sum() == 600 and not (data.class_map(2) == 2).any()
    with pytest.raises(ValueError, match="run lengths"):
        data.masks(0)


CHANGES = {  # what is done to the file: what is said of it
    "annotations.0.bbox=[1, 2, 3]": "annotation 7 has the bbox [1, 2, 3]",
    "annotations.0.bbox=[1, 2, 3, 1e999]": "annotation 7 has the bbox [1, 2, 3, inf]",
    "annotations.1.category_id=3": "annotation 3 has the category_id 3, which is not listed",
    "annotations.1.image_id=1": "annotation 3 has the image_id 1, which is not listed",
    "annotations.2.area=-1": "annotation 4 has the area -1",
    "annotations.2.iscrowd=2": "iscrowd 2",
    "annotations.2.id=7": "annotation 7 has an id that is taken",
    "images.1.id=9": "two of images have the id 9",
    "images.1.width=0": "id 2 of images has the width 0",
    'images.1.file_name="../b.png"': "id 2 of images has the file_name '../b.png', which no file in its folder has",
    'images.1.file_name="/b.png"': "id 2 of images has the file_name '/b.png', which no file in its folder has",
    r'images.1.file_name="\ud800.png"': r"id 2 of images has the file_name '\ud800.png', which no file",
    r'images.1.file_name="b\u0000.png"': r"id 2 of images has the file_name 'b\x00.png', which no file",
    "images.1.height=1000001": "id 2 of images has the height 1000001",
    f"annotations.0.bbox=[1, 2, 3, {10**400}]": "annotation 7 has the bbox [1, 2, 3, 100000",
    f"annotations.2.area={10**400}": "annotation 4 has the area 100000",
    "images.1.file_name=3": "id 2 of images has the file_name 3",
    'categories.0.id="44"': "one of categories has the id '44'",
    "categories=5": "has no list 'categories'",
    "images=[3]": "has no list 'images'",
    "annotations=[]": "there is nothing to find",
}


@pytest.mark.parametrize("change", CHANGES, ids=[change[:40] for change in CHANGES])
def test_a_file_that_is_wrong_is_refused_in_one_line(change, tmp_path):
    data, (place, value) = content(), change.split("=", 1)
    *way, last = [int(x) if x.isdigit() else x for x in place.split(".")]
    home = data
    for step in way:
        home = home[step]
    home[last] = json.loads(value)
    text = json.dumps(data).replace("Infinity", "1e999")
    path = write(tmp_path, text, pictures=False) / "annotations" / "instances_train2017.json"
    with pytest.raises(UserError) as error:
        read_annotations(path, tmp_path / "train2017")
    assert CHANGES[change] in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, '{"images": NaN}', "3"])
def test_a_file_that_is_no_json_is_refused(text, tmp_path):
    path = write(tmp_path, text, pictures=False) / "annotations" / "instances_train2017.json"
    with pytest.raises(UserError, match="is not JSON|has no list") as error:
        read_annotations(path, tmp_path / "train2017")
    assert "\n" not in str(error.value)


def test_pictures_that_are_missing_are_refused_or_left_out(tmp_path, capsys):
    root = write(tmp_path, content())
    (root / "train2017" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read: .*a.png .*--skip-bad-images"):
        read_coco(root, "train")
    data = read_coco(root, "train", skip_bad_images=True)
    assert len(data) == len(data.sizes) == len(data.objects) == 2 and "left out" in capsys.readouterr().out
    (root / "train2017" / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 0 boxes lies in a picture that is there"):
        read_coco(root, "train", skip_bad_images=True)


def test_pictures_of_another_size_than_their_annotations_are_refused_or_left_out(tmp_path, capsys):
    """Before anything trains; a picture that lies on its side may be annotated either way."""
    root = write(tmp_path, content())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(root / "train2017" / "b.png", exif=exif)  # upright 30 x 20
    assert len(read_coco(root, "train")) == 3
    Image.new("RGB", (20, 30)).save(root / "train2017" / "b.png")
    Image.new("RGB", (16, 15)).save(root / "train2017" / "c.png", exif=exif)
    for _ in range(2):  # what does not fit is not remembered as good
        with pytest.raises(UserError, match=r"2 of 3 .*b.png .it has 20 x 30 pixels, its annotations are for 30 x 20"):
            read_coco(root, "train")
    data = read_coco(root, "train", skip_bad_images=True)
    assert data.sizes == [(30, 40)] and "2 of 3 images are left out" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "test"])
def test_crowds_alone_are_nothing_to_find(split, tmp_path):
    data = content()
    for row in data["annotations"]:
        row["iscrowd"] = int(row["id"] != 5)  # which has no area within its picture
    with pytest.raises(UserError, match="none of its 1 boxes lies in a picture that is there .crowds") as e:
        read_coco(write(tmp_path, data, "val2017" if split == "test" else "train2017"), split)
    assert "\n" not in str(e.value)


def test_a_split_is_one_file_and_one_folder(tmp_path):
    with pytest.raises(UserError, match="no folder .*annotations"):
        find_split(tmp_path, "train")
    root = write(tmp_path / "coco", content(), "train", pictures=False)
    assert find_split(tmp_path, "train") == (root / "annotations" / "instances_train.json", root / "train")
    with pytest.raises(UserError, match="no instances_val"):
        find_split(root, "test")
    (root / "annotations" / "instances_val7.json").write_text("{}")
    with pytest.raises(UserError, match="no folder .*val7"):
        find_split(root, "test")
    (root / "images" / "val7").mkdir(parents=True)
    assert find_split(root, "test")[1] == root / "images" / "val7"
    write(root, content(), "train2017", pictures=False)
    with pytest.raises(UserError, match=r"both instances_train.json and instances_train2017.json"):
        find_split(root, "train")
