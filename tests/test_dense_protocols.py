"""Segmentation and detection as whole runs: masks of COCO, resumed runs, two processes, flags without effect."""

import json
import math
from unittest import mock

import numpy as np
import processes
import pytest
import torch
from make import log_of, same_weights, vit, write_coco
from PIL import Image

import evaluate
from common import MobileFormer
from plumbing.dense import load_dense
from plumbing.encoders import save_encoder
from plumbing.errors import Stopped, UserError
from plumbing.files import load_checkpoint
from protocols.dense import fitted_to
from protocols.detect import Detector
from protocols.segmentation import Segmenter
from protocols.settings import changed, settings_of


def run_of(folder, encoder):
    """A run folder that holds an encoder."""
    folder.mkdir()
    save_encoder(encoder, folder / "encoder.pt")
    return folder


def stop_before_the_second(self, epoch):
    if epoch:
        raise Stopped("stopped", 15)


# --- COCO's masks as classes of pixels -------------------------------------------------------------------------------


def test_masks_of_coco_are_class_maps(tmp_path, capsys):
    """0 is the background, categories count from 1 in the order of their ids, the smaller object is on top; a crowd is
    ignored, and a picture without objects is background.
    """
    write_coco(tmp_path / "coco")
    for data in (load_dense("coco", tmp_path), load_dense(tmp_path / "coco", split="test")):
        assert (data.classes, len(data)) == (["background", "blue", "red"], 4)
        maps = [labels[0] for _, labels in data.whole_batches(range(4), 28)]
        assert maps[0].shape == (28, 40) and not maps[0].any()
        expected = torch.zeros(4, 28, 40, dtype=torch.long)
        for i in (2, 3):
            expected[i, 4:24, 4:28] = 1
        for i in (1, 2, 3):
            expected[i, 8:16, 8 + i : 18 + i] = 2
        expected[1, :, 35:] = 255
        assert torch.equal(torch.stack(maps), expected)
    assert "note" not in capsys.readouterr().out
    (images, labels), *_ = data.train_batches([(0, [2, 3, 2, 3])], 24, (0.3, 1.0))
    for colour, label in (([20, 20, 230], 1), ([230, 20, 20], 2)):  # crops and flips move both alike
        near = (images - torch.tensor(colour)[:, None, None] / 255).abs().amax(dim=1) < 0.05
        assert near.sum() > 50 and ((labels == label)[near]).float().mean() > 0.9


def test_a_picture_on_its_side_has_the_masks_of_either_way(tmp_path):
    root, exif = write_coco(tmp_path, size=(30, 30)), Image.Exif()
    exif[0x0112] = 6
    path = root / "train2017" / "3.png"
    text = root / "annotations" / "instances_train2017.json"
    text.write_text(text.read_text().replace('"3.png", "width": 30', '"3.png", "width": 40'))
    for stored, turned in (((40, 30), False), ((30, 40), True)):
        Image.fromarray(np.indices(stored[::-1])[0].astype(np.uint8)).save(path, exif=exif)
        ((images, labels),) = load_dense(root).whole_batches([3], 30)
        assert images.shape == (1, 3, 30, 40) and labels.shape == (1, 30, 40)
        rows, columns = images[0, 0].diff(dim=0).abs().sum(), images[0, 0].diff(dim=1).abs().sum()
        assert (columns > rows) == turned


def test_objects_without_a_mask_have_their_box_and_it_is_told(tmp_path, capsys):
    data = load_dense(write_coco(tmp_path, masks=False, bbox=[35, 20, 1e14, 1e14], area=9))
    assert "instances_train2017.json: 5 of 5 objects have no mask: their boxes stand for it" in capsys.readouterr().out
    found = data.read(1)
    assert (found[20:, 35:] == 2).all() and (found == 2).sum() == 8 * 5


BAD = {  # a field of the first annotation: what is said of it
    "segmentation": [
        ([[0, 0, 1, 1]], "annotation 1: a polygon of its segmentation is not x, y of three or more corners; mend"),
        ([[0, 0, 1e14, 0, 5, 5]], "annotation 1: a polygon of its segmentation is not x, y of three or more"),
        ({"size": [28, 40], "counts": [5, 6]}, "annotation 1: its run lengths do not fill 28 x 40 pixels; mend or"),
        ({"size": [40, 28], "counts": [1120]}, r"annotation 1: its mask has a size of \[40, 28\], the picture of \[28"),
        (5, "annotation 1: its segmentation is neither polygons nor runs; mend or remove it"),
    ],
    "category_id": [(4, "annotation 1 has the category_id 4, which is not listed")],
    "bbox": [([1, 2, 3], r"annotation 1 has the bbox \[1, 2, 3\], expected x, y, width, height")],
}


@pytest.mark.parametrize(("field", "value", "message"), [(field, *case) for field in BAD for case in BAD[field]])
def test_a_mask_that_cannot_be_drawn_is_one_line_before_any_training(tmp_path, field, value, message):
    root = write_coco(tmp_path, **{field: value})
    with pytest.raises(UserError, match=message) as error:
        load_dense(root)
    assert str(root / "annotations" / "instances_train2017.json") in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_segmentation_of_coco_is_refused(tmp_path):
    path = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    known = json.loads(path.read_text())

    def refused(match, **changes):
        path.write_text(json.dumps(known | changes))
        with pytest.raises(UserError, match=match) as error:
            load_dense(tmp_path)
        assert "\n" not in str(error.value)

    crowds = [row | {"iscrowd": 1} for row in known["annotations"]]
    refused(r"no object lies in a picture that is there \(crowds do not count\)", annotations=crowds)
    many = [{"id": i, "name": str(i)} for i in range(255)]
    refused("lists 255 categories, expected at most 254 of different names", categories=many)
    (tmp_path / "train2017" / "2.png").unlink()
    refused(r"1 of 4 images cannot be read: .*2.png .*--skip-bad-images")
    path.write_text(json.dumps(known | {"categories": [{"id": i, "name": "cat"} for i in (3, 7)]}))
    data = load_dense(tmp_path, skip_bad_images=True)
    assert data.classes == ["background", "cat 1", "cat 2"] and len(data) == 3
    path.unlink()
    with pytest.raises(UserError, match="annotations holds no instances_train"):
        load_dense(tmp_path)
    with pytest.raises(UserError, match="no folder .*annotations; expected COCO's instances_train2017.json"):
        load_dense("coco", tmp_path / "train2017")


def test_the_command_segments_coco_and_goes_on(tmp_path, capsys, monkeypatch):
    """One epoch of the linear head; one that was stopped ends with the same weights."""
    write_coco(tmp_path / "data")
    run, weights = run_of(tmp_path / "run", vit(image_size=16)), []
    argv = f"{run} --protocol segment --data coco --root {tmp_path}/data --recipe scenes --epochs 2".split()
    argv += ["--epoch-steps", "2", "--batch-size", "4", "--workers", "0", "--amp", "off", "--out"]
    for out, more in (("whole", ["--pixels"]), ("stopped", ["--resume"])):
        if out == "stopped":
            with monkeypatch.context() as patched:
                patched.setattr(Segmenter, "start_epoch", stop_before_the_second)
                assert evaluate.main([*argv, str(tmp_path / out)]) == 128 + 15
        assert evaluate.main([*argv, str(tmp_path / out), *more]) == 0
        weights.append(load_checkpoint(tmp_path / out / "segment-coco" / "last.pt")["weights"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert "IoU, raw pixels: background" in capsys.readouterr().out
    first, second = (json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines())
    assert first["results"]["trained"] == second["results"]["trained"] and first["data"] == "coco"
    assert {"miou", "pixel_accuracy", "iou_background", "iou_blue", "iou_red"} == first["results"]["trained"].keys()
    assert b"annotations/instances_train2017.json" in (tmp_path / "whole" / "segment-coco" / "images.tsv").read_bytes()
    path = tmp_path / "data" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"red"', '"green"'))
    assert evaluate.main([*argv, str(tmp_path / "third")]) == 2
    assert "3 classes train, 3 are tested on; mend what differs, first: green" in capsys.readouterr().err


# --- detection -------------------------------------------------------------------------------------------------------

FEW = {"epochs": 2, "epoch_steps": 2, "batch_size": 4, "warmup_epochs": 0, "milestones": (), "queries": 5}
FEW |= {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "base_lr": 3.2, "weight_decay": 0.0, "flip": 0.0}


def test_two_processes_detect_as_one_does(tmp_path):
    """The steps, of plain gradient descent, are those of one process, and so is AP, over the pictures of both."""
    one = processes.fit_detector(tmp_path / "one", FEW)
    assert 10 < one["five"]["AP"] < 90 and 10 < one["one"]["AP"]
    for part in processes.start(processes.fit_detector, tmp_path / "two", FEW):
        for name, start in one["start"].items():
            moved, apart = (x["weights"][name] - start for x in (one, part))
            assert (moved - apart).norm() <= 1e-4 * moved.norm(), name
        assert moved.norm() > 0 and part["weights"].keys() == one["weights"].keys()
        assert part["weights"]["norm.running_mean"].tolist() == [0, 0]  # process 0's
        for name in ("found", "five", "one"):
            assert part[name] == pytest.approx(one[name], nan_ok=True, rel=1e-9), name
        assert all(map(math.isnan, part["nothing"].values()))


def test_detection_goes_on_to_the_weights_of_one_that_was_not_stopped(tmp_path):
    whole = processes.fit_detector(tmp_path / "whole", FEW | {"optimizer": "adamw"})
    with mock.patch.object(Detector, "start_epoch", stop_before_the_second), pytest.raises(Stopped):
        processes.fit_detector(tmp_path / "stopped", FEW | {"optimizer": "adamw"})
    again = processes.fit_detector(tmp_path / "stopped", FEW | {"optimizer": "adamw", "resume": True})
    assert same_weights(whole["weights"], again["weights"])
    assert whole["found"] == pytest.approx(again["found"], nan_ok=True)
    assert len(log_of(tmp_path / "stopped" / "detect-scenes")) == 4


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "given", "told"),
    [
        (
            "segment",
            {"layer_decay": 0.75, "drop_path": 0.1},
            "--layer-decay --drop-path: of no effect without --finetune",
        ),
        ("detect", {"drop_path": 0.1, "batchnorm": False}, "--drop-path: of no effect without --finetune"),
        ("detect", {"layer_decay": 0.75, "finetune": True}, ""),
        ("segment", {"recipe": "mae", "layer_decay": 0.5}, ""),  # which fine-tunes
        ("segment", {"recipe": "mae", "finetune": False}, ""),  # the decay is the recipe's
        ("segment", {"recipe": "scenes_pyramid", "batchnorm": True}, "--batchnorm: of no effect with --head pyramid"),
        ("segment", {"batchnorm": True, "layer_decay": 1.0, "aux_weight": 0.4}, ""),
        ("segment", {"dropout": 0.1, "aux_weight": 1.0}, "--dropout --aux-weight: of no effect with --head linear"),
        ("detect", {"dropout": 0.1}, ""),
        ("finetune", {"layer_decay": 0.5, "data": "x"}, ""),
        (
            "layers",
            {"metric": "cosine", "vote": "distance", "pool": "cls", "k": 5},
            "--pool --metric --vote: of no effect with --protocol layers",
        ),
        ("relatives", {"k": 5}, "--k: of no effect with --protocol relatives"),
        ("relatives", {"k": 10}, ""),
        ("linear", {"head": "tran1", "fc_norm": True}, "--head --fc-norm: of no effect with --protocol linear"),
        ("pictures", {"perplexity": 5.0}, "--perplexity: of no effect without --map tsne"),
        ("pictures", {"perplexity": 5.0, "map": "tsne"}, ""),
        ("knn", {"metric": "cosine", "vote": "distance", "pool": "cls", "k": 5}, ""),
    ],
)
def test_flags_that_have_no_effect_are_told_in_a_line(protocol, given, told, capsys):
    settings_of(protocol, {"image_size": 16, "data": "scenes"} | given, "magma", 16, 5000)
    assert capsys.readouterr().out == (f"note: {told}\n" if told else "")


def test_settings_that_are_changed_still_tell_what_of_the_recipe_moved():
    config = settings_of("finetune", {"image_size": 16, "data": "x", "epochs": 15}, "magma", 16, 5000)
    assert changed(config, layer_decay=1.0).notes() == config.notes() != []


@pytest.mark.parametrize(
    ("encoder", "given", "told"),
    [
        (MobileFormer("micro"), {"head": "mf211", "dropout": 0.3}, "--dropout: of no effect with --head mf211"),
        (MobileFormer("micro"), {"crop_min": 0.3}, ""),
        (MobileFormer("micro"), {"head": "plain", "dropout": 0.3}, ""),
        (vit(), {"head": "plain", "crop_min": 0.3}, "--crop-min: of no effect with an encoder of pictures of one size"),
        (vit(), {"head": "mf211", "dropout": 0.3}, "--head mf211 reads two maps"),  # and takes plain
        (vit(), {"data": "scenes", "crop_min": 0.3}, ""),
    ],
)
def test_flags_of_detection_that_an_encoder_leaves_idle_are_told(encoder, given, told, capsys):
    config = settings_of("detect", {"image_size": 16, "data": "coco"} | given, "magma", 16, 5000)
    fitted_to(encoder, "detect", config)
    said = capsys.readouterr().out
    assert said.startswith(f"note: {told}") and said.count("\n") == 1 if told else not said
