"""DETR's loss against a slow version, decoders that see the picture alone, and the whole protocol on COCO's layout."""

import dataclasses
import json
import math
from unittest import mock

import pytest
import reference
import torch
from make import randn, vit
from PIL import Image

import evaluate
from common import MobileFormer
from plumbing.boxes import BoxImages, Targets, scenes_with_boxes, targets_of
from plumbing.encoders import save_encoder
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from protocols import detect
from protocols.dense import data_of
from protocols.detect import (
    Detector,
    KeptPictures,
    MobileFormerDecoder,
    PlainDecoder,
    detection_loss,
    draw_boxes,
    fitting,
    mask_like,
    note_missing,
    pairs_of,
)
from protocols.rows import Subject
from protocols.segmentation import maps_of
from protocols.settings import Config, settings_of


def answers(layers=2, batch=3, queries=4, classes=3, seed=0):
    """Logits and boxes in float64, and what is in the pictures: 2, 0 and 3 objects."""
    logits = 2 * randn(layers, batch, queries, classes + 1, seed=seed)
    boxes = 0.1 + 0.4 * torch.rand(layers, batch, queries, 4, generator=torch.Generator().manual_seed(seed)).double()
    labels = torch.tensor([[2, -1, 0], [-1, -1, -1], [1, 1, 0]])[:batch]
    truth = 0.1 + 0.4 * torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(seed + 1))[:batch]
    return logits, boxes, Targets(labels, truth, torch.ones(batch, 2))


def test_the_loss_is_that_of_a_loop_over_pictures():
    """DETR, Eq. 1 and 2: the best pairs of all ways to choose them, each layer with pairs of its own."""
    for seed in range(3):
        logits, boxes, targets = answers(seed=seed)
        there = [row >= 0 for row in targets.labels]
        labels = [row[x].tolist() for row, x in zip(targets.labels, there, strict=True)]
        truths = [row[x] for row, x in zip(targets.boxes.double(), there, strict=True)]
        layers = [reference.detection_loss(*layer, labels, truths) for layer in zip(logits, boxes, strict=True)]
        found = detection_loss(logits, boxes, targets)
        assert found["loss"].item() == pytest.approx(sum(a + 5 * b + 2 * c for a, b, c in layers), rel=1e-5)
        told = [found[name].item() for name in ("class_loss", "distance", "overlap")]
        assert told == pytest.approx(layers[-1], rel=1e-5)


def test_the_loss_does_not_depend_on_how_many_processes_share_a_batch(monkeypatch):
    """What DDP takes, the mean of the gradients of two processes, is the gradient of the whole batch."""
    logits, boxes, targets = (x.requires_grad_() if i < 2 else x for i, x in enumerate(answers(batch=2)))
    whole = torch.autograd.grad(detection_loss(logits, boxes, targets)["loss"], (logits, boxes))
    asked, parts = (
        [],
        [(logits[:, i : i + 1], boxes[:, i : i + 1], Targets(*(x[i : i + 1] for x in targets))) for i in (0, 1)],
    )
    monkeypatch.setattr(detect, "average", lambda x: asked.append(x) or x)
    for part in parts:
        detection_loss(*part)
    mean = (asked[0] + asked[1]) / 2
    monkeypatch.setattr(detect, "average", lambda x: mean)
    halves = sum(detection_loss(*part)["loss"] for part in parts) / 2
    for one, other in zip(torch.autograd.grad(halves, (logits, boxes)), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_of_nothing_and_of_what_is_not_finite():
    logits, boxes, targets = answers()
    empty = targets._replace(labels=torch.full_like(targets.labels, -1))
    found = detection_loss(logits.requires_grad_(), boxes, empty)
    found["loss"].backward()
    assert found["distance"] == found["overlap"] == 0 and found["class_loss"] > 0 and logits.grad.isfinite().all()
    bad = logits.detach().clone()
    bad[0, 0, 0, 0] = math.nan
    waited = []
    with mock.patch.object(detect, "average", lambda x: waited.append(len(x)) or x):
        found = detection_loss(bad.requires_grad_(), boxes.requires_grad_(), targets)
    assert all(value.isnan() for value in found.values())
    assert waited == [len(logits) + 1]  # as with finite costs: other processes wait for it
    assert all(x is not None for x in torch.autograd.grad(found["loss"], (bad, boxes)))  # DDP wants all of them
    assert pairs_of(bad.detach(), boxes, targets) is None


def test_a_step_makes_the_loss_of_the_same_pictures_smaller():
    """Gradients reach every weight of the decoder, and none of a frozen encoder."""
    torch.manual_seed(0)
    data = scenes_with_boxes(4, 32)
    config = Config(protocol=("detect",), image_size=32, head="plain", queries=6, batch_size=4, amp="off")
    method = Detector(vit(image_size=32, patch=8), data.classes, config)
    method.head = PlainDecoder(16, len(data.classes), queries=6, depth=2, width=32)
    method.train()
    before = {name: x.clone() for name, x in method.encoder.state_dict().items()}
    ((images, targets),) = data.train_batches([(0, range(4))], 32, (1.0, 1.0), 0.0)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = method(images, targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert [name for name, p in method.head.named_parameters() if p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert all(torch.equal(x, before[name]) for name, x in method.encoder.state_dict().items())
    assert not method.encoder.training and method.head.training


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("head", ["plain", "mf211"])
def test_kept_maps_are_those_of_the_pictures(head, flip, monkeypatch):
    """A frozen encoder that sees each picture and its mirror image once trains a decoder as one that sees them anew."""
    monkeypatch.setitem(detect.DEPTHS, "mf211", (1, 0, 0))
    data = scenes_with_boxes(6, 32)
    torch.manual_seed(0)
    encoder = vit(image_size=32, patch=8) if head == "plain" else MobileFormer("micro")
    method = Detector(
        encoder, data.classes, Config(image_size=32, head=head, queries=6, batch_size=3, amp="off")
    ).eval()
    kept, plan = KeptPictures(**vars(data), detector=method), [(5, [4, 0, 2]), (6, [1, 3, 5])]
    assert len(kept) == 6 and kept.classes == data.classes and kept.truth(2)["boxes"].equal(data.truth(2)["boxes"])
    seen = []
    monkeypatch.setattr(detect, "maps_of", lambda *x: seen.append(x) or maps_of(*x))
    assert not list(kept.train_batches([], 32)) and not seen  # a run at its end
    own = list(kept.train_batches(plan, 32, (1.0, 1.0), flip))
    assert len(seen) == 2 and not seen.clear()  # upright and mirrored, once
    anew = list(data.train_batches(plan, 32, (1.0, 1.0), flip))
    for (numbers, targets), (images, same), (_, indices) in zip(own, anew, plan, strict=True):
        assert numbers.tolist() == [i + 6 * int(flip) for i in indices]
        torch.testing.assert_close(tuple(targets), tuple(same))
        method.zero_grad()
        found = method(numbers, targets)
        assert not seen
        found["loss"].backward()
        gradients = [x.grad.clone() for x in method.head.parameters() if x.grad is not None]
        method.zero_grad()
        other = method(images, same)
        other["loss"].backward()
        torch.testing.assert_close(found, other)
        others = [x.grad for x in method.head.parameters() if x.grad is not None]
        torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-5)
        assert len(seen) == 1 and not seen.clear()


def test_mirrored_and_upright_pictures_are_drawn_anew_in_each_batch():
    data = scenes_with_boxes(4, 32)
    config = Config(image_size=32, head="plain", queries=3, batch_size=4)
    kept = KeptPictures(**vars(data), detector=Detector(vit(image_size=32, patch=8), data.classes, config).eval())
    rows = [kept.train_batches([(seed, range(4))], 32) for seed in (1, 2, 1)]
    first, second, again = (next(row)[0].tolist() for row in rows)
    assert first == again != second and {i % 4 for i in first} == set(range(4)) and max(first) > 3


@pytest.mark.parametrize(
    ("given", "kind"), [({}, KeptPictures), ({"crop_min": 0.9}, BoxImages), ({"finetune": True}, BoxImages)]
)
def test_maps_of_whole_pictures_alone_are_kept(given, kind, tmp_path, monkeypatch):
    def stop(protocol, method, subject, config):
        raise InterruptedError(type(subject.train).__name__)

    monkeypatch.setattr(detect, "fit_in_folder", stop)
    data = scenes_with_boxes(3, 32)
    own = {"data": "scenes", "crop_min": 1.0, "image_size": 32, "head": "plain", "out": str(tmp_path)}
    subject = Subject("trained", vit(image_size=32, patch=8), data, data, torch.device("cpu"))
    with pytest.raises(InterruptedError, match=f"^{kind.__name__}$"):
        detect.run_detect(subject, Config(**own | given))


def test_other_classes_to_test_on_are_refused():
    data = scenes_with_boxes(3, 32)
    other = dataclasses.replace(data, classes=data.classes[::-1])
    subject = Subject("trained", vit(image_size=32, patch=8), data, other, torch.device("cpu"))
    with pytest.raises(UserError, match="10 classes train, 10 are tested on; mend what differs, first: their order"):
        detect.run_detect(subject, Config(data="scenes", image_size=32, head="plain"))


def test_the_plain_decoder_sees_the_picture_alone():
    torch.manual_seed(0)
    decoder = PlainDecoder(8, classes=3, queries=5, depth=2, width=16).eval()
    maps, mask = [randn(2, 8, 4, 6, dtype=torch.float32)], torch.ones(2, 8, 12, dtype=torch.bool)
    mask[:, :, 8:] = False
    logits, boxes = decoder(maps, mask)
    assert (logits.shape, boxes.shape) == ((2, 2, 5, 4), (2, 2, 5, 4)) and 0 < boxes.min() < boxes.max() < 1
    other = maps[0].clone()
    other[..., 4:] = 7
    torch.testing.assert_close(decoder([other], mask)[0], logits)
    other[..., 3] = 7
    assert not torch.allclose(decoder([other], mask)[0], logits)
    assert mask_like(mask, maps[0])[0].tolist() == [[True] * 4 + [False] * 2] * 4
    turned = decoder([maps[0].flip(3)], torch.ones_like(mask))[0]  # it knows left from right
    assert not torch.allclose(turned, decoder(maps, torch.ones_like(mask))[0], atol=1e-4)


def test_mobile_formers_decoder_has_maps_that_are_0_outside():
    torch.manual_seed(0)
    decoder = MobileFormerDecoder((1, 0, 1), 8, 4, classes=3, queries=5).eval()
    maps = [randn(1, 4, 8, 8, dtype=torch.float32), randn(1, 8, 4, 4, dtype=torch.float32)]
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[:, 32:] = False
    with torch.no_grad():
        logits, boxes = decoder(maps, mask)
        assert logits.shape == (2, 1, 5, 4) and boxes.shape == (2, 1, 5, 4)
        fine, coarse = maps[0].clone(), maps[1].clone()
        fine[:, :, 4:], coarse[:, :, 2:] = 0, 0
        torch.testing.assert_close(decoder([fine, coarse], torch.ones_like(mask))[0], logits)


def test_padding_has_the_mean_colour():
    """An encoder without context gives the picture's own cells the same features, whatever is padded."""
    config = Config(protocol=("detect",), image_size=32, head="plain", queries=3, batch_size=2, amp="off")
    method = Detector(vit(image_size=32, patch=8, mean=(0.2, 0.3, 0.4)), ["a"], config)
    seen = []
    method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.encoder.embed = lambda images, embed=method.encoder.embed: seen.append(images) or embed(images)
    images = torch.zeros(1, 3, 32, 32)
    method.find(images, Targets(torch.zeros(1, 1).long(), torch.zeros(1, 1, 4), torch.tensor([[1.0, 0.5]])))
    assert seen[-1][0, :, 0, 31].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert seen[-1][0, :, 0, 15].tolist() == [0, 0, 0]


def test_the_best_class_of_each_query_is_found(monkeypatch):
    """Boxes come in pixels of each picture, cut to it; a perfect answer has an AP of 100."""
    data = scenes_with_boxes(3, 32)
    config = Config(protocol=("detect",), image_size=32, head="plain", queries=5, batch_size=2, amp="off")
    method = Detector(vit(image_size=32, patch=8), data.classes, config).eval()

    def perfect(images, targets):
        labels = torch.where(targets.labels < 0, len(data.classes), targets.labels)
        logits = 20 * torch.nn.functional.one_hot(labels, len(data.classes) + 1).float()
        return torch.stack([-logits, logits]), torch.stack([torch.rand_like(targets.boxes), targets.boxes])

    monkeypatch.setattr(method, "answers", perfect)
    found = method.probe(None, data, data, config)
    assert found["AP"] == pytest.approx(100) and found["AP50"] == pytest.approx(100) and math.isnan(found["APl"])
    method.shown = next(data.plain_batches(range(3), 32))[1]
    rows = method.pictures(next(data.plain_batches(range(3), 32))[0])
    assert rows.shape == (3, 2, 3, 32, 32) and torch.equal(rows[:, 0], rows[:, 1])
    monkeypatch.setattr(method, "answers", lambda *x: tuple(y * math.nan for y in perfect(*x)))
    assert all(map(math.isnan, method.probe(None, data, data, config).values()))


def test_a_rim_is_drawn_around_each_box():
    image = draw_boxes(torch.zeros(3, 10, 12), torch.tensor([[2.0, 3.0, 6.0, 8.0]]), torch.tensor([[1.0, 0.5, 0.0]]))
    shown = image[0].int()
    assert shown.sum() == 2 * 4 + 2 * 3 and shown[3, 2:6].all() and shown[7, 2:6].all() and shown[3:8, 2].all()
    assert image[1].max() == 0.5 and image[2].max() == 0
    draw_boxes(
        torch.zeros(3, 10, 12), torch.tensor([[-5.0, -5.0, 50.0, 50.0], [12.0, 10.0, 12.0, 10.0]]), torch.ones(2, 3)
    )


def test_the_recipes_are_the_papers():
    """FINOLA, appendix C: 500 epochs at 1e-4, a tenth after 400; then 200 of all weights at 1e-5, a tenth after 150."""
    for recipe, rate, epochs, milestone in (("finola", 1e-4, 500, 400), ("finola_finetune", 1e-5, 200, 150)):
        config = settings_of("detect", {"recipe": recipe, "image_size": 800, "data": "coco"}, "finola", 2880, 118_287)
        assert config.base_lr * config.batch_size / 256 == pytest.approx(rate) and config.batch_size == 16
        assert (config.epochs, config.milestones, config.weight_decay) == (epochs, (milestone,), 1e-4)
        assert (config.head, config.queries, config.finetune) == ("mf522", 100, recipe != "finola")
    assert settings_of("detect", {"image_size": 64, "data": "scenes"}, "magma", 96, 4096).recipe == "scenes"
    assert settings_of("detect", {"image_size": 800, "data": "coco"}, "magma", 96, 4096).recipe == "finola"


def coco(root):
    """Four pictures in COCO's layout, for both splits."""
    (root / "annotations").mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "width": 48 + 8 * i, "height": 40} for i in range(4)]
    rows = [{"id": i, "image_id": i, "category_id": 3 + i % 2, "bbox": [5, 6, 20 + i, 18]} for i in range(3)]
    text = json.dumps(
        {"images": images, "annotations": rows, "categories": [{"id": i, "name": str(i)} for i in (3, 4)]}
    )
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(text)
        for image in images:
            picture = Image.new("RGB", (image["width"], 40), (90, 60, 30))
            picture.paste((200, 220, 240), (5, 6, 25, 24))
            picture.save(root / split / image["file_name"])
    return root


def test_the_protocol_runs_on_a_folder_frozen_and_then_fine_tuned(tmp_path, capsys, monkeypatch):
    """With FINOLA's decoder on Mobile-Former; fine-tuning starts from where the frozen run ended, and both go on."""
    monkeypatch.setitem(detect.DEPTHS, "mf211", (1, 0, 0))  # a third of the weights
    run, data = tmp_path / "run", coco(tmp_path / "data")
    run.mkdir()
    torch.manual_seed(0)
    save_encoder(MobileFormer("micro"), run / "encoder.pt")
    argv = [str(run), "--protocol", "detect", "--data", str(data), "--image-size", "64", "--head", "mf211"]
    small = {"batch-size": 4, "epochs": 1, "queries": 4, "workers": 0, "amp": "off", "probe-every": 0}
    argv += [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert evaluate.main(argv) == 0
    said = capsys.readouterr().out
    assert "boxes are drawn in" in said and "AP50" in said
    folder = run / "detect-data"
    with Image.open(folder / "found.png", formats=["PNG"]) as drawn:
        assert drawn.size[0] > 100
    frozen = load_checkpoint(folder / "last.pt")["weights"]
    assert evaluate.main([*argv, "--recipe", "finola_finetune", "--base-lr", "1e-30"]) == 0
    assert "holds no finished probe" not in capsys.readouterr().out
    tuned = load_checkpoint(run / "detect-finetune-data" / "last.pt")["weights"]
    assert torch.equal(tuned["head.queries"], frozen["head.queries"])  # at a learning rate of all but 0
    means = [name for name in tuned if name.startswith("encoder.") and name.endswith("running_mean")]
    assert means and all(torch.equal(tuned[name], frozen[name]) for name in means)
    assert evaluate.main([*argv, "--resume"]) == 0 and "nothing is left to do" in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines] == ["detect"] * 3 and lines[0]["results"] == lines[2]["results"]
    assert 0 <= lines[0]["results"]["trained"]["AP"] <= 100 and lines[0]["results"]["trained"]["APl"] is None


def test_a_transformer_keeps_its_size_and_what_was_trained_is_recorded(tmp_path, capsys):
    """Where --image-size says nothing: 800 pixels would be 10,000 patches of 8."""
    run, data = tmp_path / "run", coco(tmp_path / "data")
    run.mkdir()
    save_encoder(vit(image_size=32, patch=8), run / "encoder.pt")
    argv = [str(run), "--protocol", "detect", "--data", str(data), "--head", "mf211", "--max-steps", "1"]
    small = {"batch-size": 4, "epochs": 1, "queries": 4, "workers": 0, "amp": "off", "probe-every": 0}
    assert evaluate.main(argv + [word for name, value in small.items() for word in (f"--{name}", str(value))]) == 0
    said = capsys.readouterr().out
    assert said.count("plain it is") == said.count("all are fitted into 32 x 32; --image-size says another") == 1
    line = json.loads((run / "eval.jsonl").read_text())["settings"]
    for settings in (line, json.loads((run / "detect-data" / "config.json").read_text())):
        assert (settings["head"], settings["image_size"]) == ("plain", 32)


def test_a_mobile_former_has_pictures_of_the_papers_size(tmp_path):
    save_encoder(MobileFormer("micro"), tmp_path / "encoder.pt")
    for given, side in (({}, 800), ({"image_size": 64}, 64)):
        found = data_of(["detect"], {"data": "DIR"} | given, None, tmp_path / "encoder.pt")[1]
        assert found == {"data": "DIR", "image_size": side}


def test_no_truth_is_not_called_divergence(capsys):
    data = scenes_with_boxes(2, 16)
    note_missing({"AP": math.nan}, data)
    assert "diverged" in capsys.readouterr().out
    data.objects.fill_(-1)
    note_missing({"AP": math.nan}, data)
    assert "no object but crowds" in (said := capsys.readouterr().out) and "diverged" not in said


def test_a_decoder_that_does_not_fit_is_said(capsys):
    config = Config(protocol=("detect",), image_size=32, head="mf522", queries=3, batch_size=2)
    method = Detector(vit(image_size=32, patch=8), ["a"], config)
    assert isinstance(method.head, PlainDecoder) and method.config.head == "plain" and config.head == "mf522"
    assert capsys.readouterr().out.count("plain it is") == 1
    assert fitting(MobileFormer("micro"), config) is config
    assert targets_of(torch.zeros(1, 1).long(), torch.ones(1, 1, 4), None).labels.tolist() == [[-1]]
