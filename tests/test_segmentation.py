"""Segmentation: mean IoU against loops, maps and heads of every encoder, the loss, windows, the whole protocol."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import MapEncoder, generator, rand, randn, seeds, vit, write_pairs

import evaluate
from common import MobileFormer
from ebm_pretrain import ConvNeXt, Swin
from plumbing.dense import DenseImages
from plumbing.encoders import save_encoder
from plumbing.errors import Stopped, UserError
from plumbing.files import load_checkpoint
from plumbing.run_files import read_log
from protocols import segmentation
from protocols.dense import data_of
from protocols.heads import token_features
from protocols.rows import Subject
from protocols.run_folders import notes_on
from protocols.segmentation import (
    LinearMapHead,
    PyramidHead,
    RawPatches,
    Segmenter,
    class_colours,
    class_ious,
    confusion,
    maps_of,
    mean_iou,
    pixel_accuracy,
    pixel_loss,
    run_segment,
    starts,
)
from protocols.settings import settings_of

# --- figures ---------------------------------------------------------------------------------------------------------


def tensors(*lists):
    return [torch.tensor(values) for values in lists]


@given(seeds, st.integers(1, 4), st.integers(0, 12))
def test_mean_iou_matches_sets_of_pixels(seed, classes, pixels):
    prediction = torch.randint(classes, (pixels,), generator=generator(seed))
    truth = torch.randint(classes, (pixels,), generator=generator(seed + 1))
    truth[torch.rand(pixels, generator=generator(seed)) < 0.2] = 255
    found = confusion(prediction, truth, classes)
    expected = reference.mean_iou(prediction.tolist(), truth.tolist(), classes)
    assert mean_iou(found) == pytest.approx(expected, nan_ok=True, abs=1e-12)
    halves = [confusion(p, t, classes) for p, t in zip(prediction.chunk(2), truth.chunk(2), strict=True)]
    assert torch.equal(sum(halves), found)
    counted = truth != 255
    right = (prediction == truth)[counted].double().mean()
    assert pixel_accuracy(found) == pytest.approx(float(right), nan_ok=True)


def test_confusion_has_the_truth_in_rows_over_the_whole_data():
    """Over the data set, not image by image; a class that nowhere occurs does not count, nor does ignored truth."""
    prediction, truth = tensors([[0, 0, 0, 1], [0, 1, 1, 1]], [[0, 0, 0, 0], [0, 1, 1, 1]])
    found = confusion(prediction, truth, 3)
    assert found.tolist() == [[4, 1, 0], [0, 3, 0], [0, 0, 0]]
    assert found.dtype == torch.int64
    assert mean_iou(found) == pytest.approx(0.775)
    assert math.isnan(class_ious(found)[2])
    prediction, truth = tensors([0, 0, 1, 2], [0, 1, 1, 2])
    assert class_ious(confusion(prediction.to(torch.uint8), truth.to(torch.uint8), 3)).tolist() == [0.5, 0.5, 1.0]
    assert mean_iou(confusion(*tensors([1], [0]), 3)) == 0  # only predicted: it counts
    assert math.isnan(mean_iou(confusion(*tensors([1, 0], [255, 255]), 2)))


@pytest.mark.parametrize(("prediction", "truth"), [([0], [2]), ([2], [0]), ([0], [-1])])
def test_confusion_refuses_labels_beyond_the_classes(prediction, truth):
    with pytest.raises(ValueError, match="a label lies outside 0 to 1"):
        confusion(*tensors(prediction, truth), 2)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_over_all_pixels_with_ignored_ones_as_zero():
    logits, labels = randn(2, 3, 2, 3), torch.randint(3, (2, 2, 3), generator=generator(0))
    labels[0, 0, 1] = labels[1, 1, 2] = 255
    torch.testing.assert_close(pixel_loss(logits, labels), reference.pixel_loss(logits, labels))


def test_parts_of_a_batch_count_alike_and_ignored_ones_never_give_nan():
    """So two processes have the gradient of one, wherever the ignored pixels lie."""
    logits, labels = randn(4, 3, 2, 2).requires_grad_(), torch.zeros(4, 8, 8, dtype=torch.uint8)
    labels[:2], labels[2] = 255, 1
    whole = torch.autograd.grad(pixel_loss(logits, labels), logits)[0]
    parts = [pixel_loss(x, y) / 2 for x, y in zip(logits.chunk(2), labels.chunk(2), strict=True)]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], whole)
    none = pixel_loss(logits, torch.full_like(labels, 255))
    assert float(none.detach()) == 0 and not torch.autograd.grad(none, logits)[0].any()


# --- maps and heads --------------------------------------------------------------------------------------------------

ENCODERS = {
    "vit": (lambda: vit(image_size=16, depth=6), [(16, 4)] * 4),
    "mobile_former": (lambda: MobileFormer("micro"), [(32, 8), (48, 4), (256, 2)]),
    "convnext": (lambda: ConvNeXt((8, 12, 16), (1, 2, 1), 2), [(8, 16), (12, 8), (16, 4)]),
    "swin": (lambda: Swin(8, (1, 1, 2), (1, 2, 2), 2, 2), [(8, 16), (16, 8), (32, 4)]),
    "map": (MapEncoder, [(8, 4)]),
    "raw": (lambda: RawPatches(4), [(48, 4)]),
}
SIZES = {"mobile_former": 32, "convnext": 32, "swin": 32, "map": 8}


@pytest.mark.parametrize("kind", ENCODERS)
def test_maps_of_every_encoder_end_with_its_own_features(kind):
    make, shapes = ENCODERS[kind]
    torch.manual_seed(0)
    encoder, size = make().eval(), SIZES.get(kind, 16)
    images = rand(2, 3, size, size)
    maps = maps_of(encoder, images)
    assert [tuple(x.shape) for x in maps] == [(2, dim, side, side) for dim, side in shapes]
    own = token_features(encoder, images) if kind == "vit" else encoder(images).flatten(2).movedim(1, 2)
    torch.testing.assert_close(maps[-1].flatten(2).movedim(1, 2), own)
    assert len({float(x.detach().sum()) for x in maps}) == len(maps)


def test_a_vit_gives_the_blocks_that_mmsegmentation_takes():
    encoder, images = vit(image_size=16, depth=12), rand(1, 3, 16, 16)
    hidden = encoder.encode(encoder.embed(images), hidden=True)[1]
    for found, block in zip(maps_of(encoder, images), (3, 5, 7), strict=False):
        torch.testing.assert_close(found[0, :, 1, 2], hidden[block][0, 1 + 4 + 2])


class VectorEncoder(MapEncoder):
    def forward(self, images):
        return super().forward(images).mean(dim=(2, 3))


def test_an_encoder_without_a_map_is_refused():
    with pytest.raises(UserError, match="a VectorEncoder, gives one vector an image and no map to segment by"):
        maps_of(VectorEncoder(), rand(1, 3, 8, 8))


def settings(out, size=16, **given):
    """The settings of the protocol for a few small pictures."""
    quick = {"epochs": 1, "epoch_steps": 2, "batch_size": 4, "warmup_epochs": 0, "image_size": size, "amp": "off"}
    given = quick | {"data": "scenes", "out": str(out)} | given
    return settings_of("segment", given, "magma", 16, 8)


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("head", ["linear", "pyramid"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_heads_take_every_encoder_and_reach_every_weight(kind, head, finetune, tmp_path):
    torch.manual_seed(0)
    size, encoder = SIZES.get(kind, 16), ENCODERS[kind][0]()
    method = Segmenter(encoder, ["a", "b", "c"], settings(tmp_path, size, head=head, finetune=finetune)).train()
    assert encoder.training == finetune
    before = copy.deepcopy(encoder.state_dict())
    labels = torch.randint(3, (4, size, size), generator=generator(0))
    method(rand(4, 3, size, size), labels)["loss"].backward()
    assert [name for name, p in method.head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all((p.grad is not None) == finetune for name, p in encoder.named_parameters())
    if not finetune:
        assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    grouped = {id(p) for group in method.optimizer(method.config).param_groups for p in group["params"]}
    assert grouped == {id(p) for p in (method if finetune else method.head).parameters()}
    found = method.eval().scores(rand(1, 3, size, size))
    assert found.shape == (1, 3, size, size) and found.isfinite().all()


def test_the_linear_head_is_one_layer_at_every_place():
    torch.manual_seed(0)
    head, maps = LinearMapHead([(5, 2, 3)], 4).double(), [randn(2, 9, 4, 4), randn(2, 5, 2, 3)]
    weight, bias = head.classify.weight[:, :, 0, 0], head.classify.bias
    torch.testing.assert_close(head(maps)[1, :, 1, 2], weight @ maps[1][1, :, 1, 2] + bias)
    norm = LinearMapHead([(5, 2, 3)], 4, batchnorm=True).double().train().norm(maps[1])
    torch.testing.assert_close(norm.std(dim=(0, 2, 3), correction=0), torch.ones(5).double(), atol=1e-5, rtol=0)


def test_a_pyramid_joins_every_map_at_the_size_of_the_finest():
    torch.manual_seed(0)
    head = PyramidHead([(3, 8, 8), (4, 4, 4), (5, 2, 2)], 6, 8, 32, 0.0)
    maps = [x.float().requires_grad_() for x in (randn(1, 3, 8, 8), randn(1, 4, 4, 4), randn(1, 5, 2, 2))]
    found = head(maps)
    assert found.shape == (1, 6, 8, 8)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(found.square().sum(), maps))
    pooled = []
    for pool in head.pools:
        pool.register_forward_hook(lambda _, inputs, __: pooled.append(inputs[0]))
    head(maps)
    assert [x.shape[-1] for x in pooled] == [1, 2, 3, 6]
    torch.testing.assert_close(pooled[0][..., 0, 0], maps[2].mean(dim=(2, 3)))
    # Maps of one size become 4, 2, 1 and 1/2 times as large, but no finer than cells of 4 pixels.
    for side, sizes in ((64, [16, 8, 4, 2]), (32, [8, 8, 4, 2]), (8, [4, 4, 4, 2])):
        head = PyramidHead([(3, 4, 4)] * 4, 6, 8, side)
        scaled = [scale(rand(1, 3, 4, 4)) for scale in head.rescales]
        assert [x.shape[-1] for x in scaled] == sizes
        assert head.eval()([rand(1, 3, 4, 4, seed=i) for i in range(4)]).shape == (1, 6, sizes[0], sizes[0])


def test_the_auxiliary_head_counts_by_its_weight(tmp_path):
    losses = []
    for weight in (0.0, 0.4, 0.8):
        torch.manual_seed(0)
        method = Segmenter(vit(image_size=16), ["a", "b"], settings(tmp_path, head="pyramid", aux_weight=weight))
        losses.append(float(method.eval()(rand(2, 3, 16, 16), torch.zeros(2, 16, 16).long())["loss"].detach()))
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1]) and losses[1] - losses[0] > 0.2


# --- windows ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 40))
def test_windows_cover_every_place_two_thirds_of_a_window_apart(size, more):
    """MMSegmentation's MAE: 341 of 512."""
    assert starts(1000, 512) == [0, 341, 488]
    found = starts(size + more, size)
    assert found[0] == 0 and found[-1] == more and len(set(found)) == len(found)
    assert all(0 < b - a <= max(1, size * 2 // 3) for a, b in itertools.pairwise(found))


def test_scores_of_large_pictures_are_those_of_windows_in_their_places(tmp_path):
    method = Segmenter(RawPatches(1), ["red", "green", "blue"], settings(tmp_path, batchnorm=False)).eval()
    with torch.no_grad():
        method.head.classify.weight.copy_(torch.eye(3)[..., None, None])
    for shape in ((16, 16), (16, 37), (25, 18)):
        images = rand(2, 3, *shape)
        torch.testing.assert_close(method.scores(images), images)


# --- the protocol ----------------------------------------------------------------------------------------------------


def coloured(count, size=16, seed=0):
    """Pictures of two halves, whose class is which channel is bright."""
    maps = torch.randint(3, (count, 1, 2), generator=generator(seed)).repeat_interleave(size // 2, 2)
    maps = maps.expand(-1, size, -1).contiguous().to(torch.uint8)
    bright = torch.nn.functional.one_hot(maps.long(), 3).movedim(-1, 1)
    images = (60 * rand(count, 3, size, size, seed=seed) + 150 * bright).to(torch.uint8)
    return DenseImages(images, maps, ["red", "green", "blue"], (0.5,) * 3, (0.25,) * 3)


def subject(encoder, name="trained"):
    return Subject(name, encoder and encoder.eval(), coloured(8), coloured(6, seed=1), torch.device("cpu"))


@pytest.mark.parametrize(("encoder", "head"), [("vit", "linear"), ("vit", "pyramid"), (None, "linear")])
def test_a_head_learns_and_is_judged_on_all_test_pictures(encoder, head, tmp_path, monkeypatch, capsys):
    quick = {"epoch_steps": 25, "base_lr": 1.0, "batch_size": 8, "head": head, "crop_min": 0.8}
    drawn, save = [], segmentation.save_pictures
    monkeypatch.setattr(segmentation, "save_pictures", lambda rows, *a: drawn.append(rows) or save(rows, *a))
    row = "trained" if encoder else "pixels"
    judged = subject(encoder and vit(image_size=16), row)
    found = run_segment(judged, settings(tmp_path, **quick))
    assert found["miou"] > 70 and found["pixel_accuracy"] > 80
    assert found.keys() == {"miou", "pixel_accuracy", "iou_red", "iou_green", "iou_blue"}
    assert found["miou"] == pytest.approx(sum(found[f"iou_{name}"] for name in ("red", "green", "blue")) / 3)
    out = tmp_path / ("segment-scenes" if encoder else "segment-scenes-pixels")
    assert (out / "predictions.png").exists() and str(out / "predictions.png") in capsys.readouterr().out
    images, truth, guess = drawn[0].unbind(dim=1)
    assert torch.equal(images, judged.test.images.float() / 255)
    assert torch.equal(truth, class_colours(3)[judged.test.maps.long()].movedim(-1, 1))
    assert (guess == truth).all(dim=1).float().mean() == pytest.approx(found["pixel_accuracy"] / 100, abs=1e-4)


def test_a_run_goes_on_to_the_weights_of_one_that_was_not_stopped(tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        given = {"head": "pyramid", "finetune": True, "epochs": 2, "drop_path": 0.0}
        config, judged = settings(tmp_path / name, **given), subject(vit(image_size=16))
        if name == "stopped":
            with monkeypatch.context() as patched, pytest.raises(Stopped):
                patched.setattr(Segmenter, "start_epoch", stop_before_the_second)
                run_segment(judged, config)
            config = dataclasses.replace(config, resume=True)
        run_segment(judged, config)
    states = [load_checkpoint(tmp_path / x / "segment-scenes" / "last.pt")["weights"] for x in ("whole", "stopped")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(
        not torch.equal(value, vit(image_size=16).state_dict()[name[8:]])
        for name, value in states[0].items()
        if name.startswith("encoder.")
    )
    assert len(read_log(tmp_path / "stopped" / "segment-scenes" / "log.jsonl")[1]) == 3
    with pytest.raises(UserError, match=r"was trained otherwise \(head pyramid -> linear\)"):
        run_segment(judged, dataclasses.replace(config, head="linear"))


def stop_before_the_second(self, epoch):
    if epoch:
        raise Stopped("stopped", 15)


@pytest.mark.parametrize("diverged", [False, True])
def test_a_head_diverged_only_where_its_scores_are_not_finite(tmp_path, capsys, diverged):
    judged = subject(None, "pixels")
    method = Segmenter(RawPatches(4), judged.test.classes, settings(tmp_path)).eval()
    if diverged:
        torch.nn.init.constant_(method.head.classify.bias, math.nan)
    else:
        judged.test.maps[:] = 255
    found = method.probe(None, judged.train, judged.test, method.config)
    assert found.keys() == {"miou", "pixel_accuracy"} and all(math.isnan(x) for x in found.values())
    told = capsys.readouterr().out
    assert ("the head diverged" in told) == diverged
    assert ("no pixel of the test pictures has a label" in told) != diverged


def test_pictures_in_which_all_is_ignored_train_and_are_judged_without_nan(tmp_path):
    judged = subject(vit(image_size=16))
    judged.train.maps[:] = 255
    found = run_segment(judged, settings(tmp_path))
    assert all(line.get("loss", 0) == 0 for line in read_log(tmp_path / "segment-scenes" / "log.jsonl")[1])
    assert 0 <= found["miou"] < 50


def test_what_diverged_has_no_value(tmp_path, capsys):
    encoder = vit(image_size=16)
    with torch.no_grad():
        encoder.norm.weight[0] = math.nan
    assert all(math.isnan(x) for x in run_segment(subject(encoder), settings(tmp_path)).values())
    assert "its weights are not finite, so no mean IoU, pixel accuracy" in capsys.readouterr().out
    with pytest.raises(UserError, match="--crop-pad 2 is for images without labels of pixels; give --crop-pad 0"):
        run_segment(subject(vit(image_size=16)), settings(tmp_path, crop_pad=2))


@pytest.mark.parametrize(
    ("method", "data", "recipe"),
    [("mlo_mae", "scenes", "scenes"), ("mlo_mae", "ade20k", "mlo_mae"), ("mixedae", "ade20k", "mixedae")]
    + [("ebm_pretrain", "DIR", "ebm"), ("magma", "DIR", "mae"), ("finola", "DIR", "scenes")],
)
def test_each_method_has_the_recipe_of_its_paper_on_ade20k(method, data, recipe):
    config = settings_of("segment", {"image_size": 512, "data": data}, method, 768, 20210)
    assert config.recipe == recipe
    if recipe == "scenes":
        assert (config.finetune, config.head) == (False, "linear")
        return
    assert (config.finetune, config.head, config.epochs * config.epoch_steps) == (True, "pyramid", 160_000)
    expected = {
        "mlo_mae": (8, 1e-4, 0.65),
        "mixedae": (16, 3e-4, 0.65),
        "ebm": (16, 1e-4, 0.65),
        "mae": (16, 1e-4, 0.65),
    }
    rate = config.base_lr * config.batch_size / 256
    assert (config.batch_size, pytest.approx(rate), config.layer_decay) == expected[recipe]
    large = settings_of("segment", {"image_size": 512, "data": data}, method, 1024, 20210)
    assert large.layer_decay == (0.75 if recipe == "mixedae" else 0.65)


def test_dense_protocols_have_data_of_their_own():
    def usual(*_, **__):
        return None

    assert data_of(["knn"], {}, usual) == (usual, {})
    load, given = data_of(["segment"], {"seed": 1}, usual)
    assert load is not usual and given == {"seed": 1, "data": "scenes"}
    assert data_of(["segment"], {"data": "DIR"}, usual)[1] == {"data": "DIR"}
    with pytest.raises(UserError, match="--protocol segment has data of its own; give it alone"):
        data_of(["knn", "segment"], {}, usual)
    for protocol, head in (("segment", "tran1"), ("finetune", "pyramid")):
        with pytest.raises(UserError, match=f"unknown --head of {protocol} '{head}'"):
            settings_of(protocol, {"image_size": 16, "head": head}, "magma", 16, 8)


@pytest.mark.parametrize(("protocol", "told"), [("segment", ""), ("linear", "; probes take 128 images at most")])
def test_max_steps_claims_no_part_of_the_pictures_where_all_are_judged(tmp_path, protocol, told):
    config = dataclasses.replace(settings(tmp_path, max_steps=1), protocol=(protocol,))
    config.limit(2)
    assert config.notes()[-1] == f"--max-steps 1 leaves 1 epoch(s) of 1 steps{told}"


@pytest.mark.parametrize("protocol", ["segment", "detect"])
def test_flags_that_such_a_protocol_does_not_use_are_refused(protocol):
    def asked(data="scenes", **given):
        return settings_of(protocol, {"image_size": 16, "data": data} | given, "magma", 16, 8)

    unused = {"scratch": True, "positions": "learned", "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "cache": False}
    unused |= {"randaugment": 9.0, "erase": 0.25, "base_lrs": (0.1,), "pool": "cls"}
    for field, value in unused.items():
        flag = "--" + field.replace("_", "-")
        with pytest.raises(UserError, match=f"^{flag}: of no use to --protocol {protocol} --data scenes; leave"):
            asked(**{field: value})
    with pytest.raises(UserError, match="^--mixup --erase: of no use"):
        asked(mixup=0.8, erase=0.25)
    assert asked(mixup=0.0).mixup == 0  # asks for nothing
    crops = {"interpolation": "bicubic", "crop_clamp": True}
    assert asked(**crops).crop_clamp
    if protocol == "segment":
        assert asked("DIR", **crops).crop_clamp
    else:
        with pytest.raises(UserError, match="^--interpolation --crop-clamp: of no use to --protocol detect --data DIR"):
            asked("DIR", **crops)
    recipe = settings_of("finetune", {"image_size": 16, "data": "x", "mixup": 0.3}, "magma", 16, 8)
    assert recipe.mixup == 0.3  # which uses it


def test_weight_decay_falls_on_what_is_asked_for(tmp_path):
    for on, few in (("matrices", False), ("all", True)):
        given = {"weight_decay": 0.1, "decay_on": on}
        method = Segmenter(RawPatches(4), ["a", "b"], settings(tmp_path, **given))
        groups = method.optimizer(method.config).param_groups
        assert all(group["weight_decay"] for group in groups) == few


def test_the_iou_of_each_class_is_told_below_the_table():
    table = {"trained": {"miou": 50.0, "iou_sky": 75.0, "iou_sea": 25.0}}
    assert "IoU, trained encoder: sky 75.0, sea 25.0" in notes_on(table, ["segment"])
    many = {"trained": {f"iou_{i}": float(i) for i in range(20)}}
    told = notes_on(many, ["segment"])[0]
    assert (
        told
        == "IoU, trained encoder: 19 19.0, 18 18.0, 17 17.0, 16 16.0, 15 15.0, ..., 4 4.0, 3 3.0, 2 2.0, 1 1.0, 0 0.0"
    )


def test_the_command_reads_a_folder_like_ade20k_trains_and_evaluates(tmp_path, capsys):
    home, run = write_pairs(tmp_path / "ade", first=1), tmp_path / "run"
    (home / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t1\t1\t1\twall\n2\t1\t1\t1\tsky\n3\t1\t1\t1\tsea"
    )
    run.mkdir()
    save_encoder(vit(image_size=16), run / "encoder.pt")
    (run / "config.json").write_text('{"method": "magma", "data": "shapes", "image_size": 16}')
    argv = f"{run} --protocol segment --data {home} --recipe scenes --epochs 1 --epoch-steps 2 --batch-size 4".split()
    argv += ["--workers", "0", "--amp", "off", "--pixels", "--untrained"]
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert "mean IoU   pixel accuracy" in out and "IoU, raw pixels: wall" in out
    line = json.loads((run / "eval.jsonl").read_text())
    assert (line["protocol"], line["data"], line["train_images"], line["test_images"]) == ("segment", str(home), 4, 2)
    assert line["results"].keys() == {"trained", "untrained", "pixels"}
    assert {"miou", "pixel_accuracy", "iou_wall", "iou_sky", "iou_sea"} == line["results"]["trained"].keys()
    assert (run / "segment-ade" / "images.tsv").read_bytes().count(b"\n") == 8  # pictures and labels
    assert evaluate.main([*argv, "--protocol", "knn", "segment"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
