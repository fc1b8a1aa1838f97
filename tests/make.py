"""What the tests are made of: seeded tensors, small modules and methods, and data sets in their official layouts."""

import contextlib
import dataclasses
import functools
import json
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import common
import ebm_pretrain
import finola
import magma
import mixedae
import mlo_mae
import plumbing.runs
from plumbing.datasets import ARCHIVES, CIFAR
from plumbing.encoders import Encoder
from plumbing.images import MemoryImages
from plumbing.pictures import save_pictures
from plumbing.settings import read_flags
from plumbing.shapes import SHAPES, render_shapes
from protocols.rows import Subject
from protocols.settings import settings_of

seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def images_of(count, size=16, seed=0):
    """Pictures of noise (count, 3, size, size) in [0, 1]."""
    return rand(count, 3, size, size, seed=seed)


def shapes(count=40, size=8, mean=(0.4,) * 3, std=(0.3,) * 3, seed=0):
    """A data set of a few built-in pictures."""
    images, labels, masks = render_shapes(count, size, seed)
    return MemoryImages(images, labels, list(SHAPES), mean, std, masks)


def unlabelled(count=40, size=8):
    """Built-in pictures without labels, as those of a flat folder."""
    data = shapes(count, size)
    return dataclasses.replace(data, labels=torch.full_like(data.labels, -1), classes=[])


def statistics(mean=(0.5,) * 3, std=(0.25,) * 3):
    """A data set of which nothing but mean and deviation is known: what a method is built from."""
    return MemoryImages(None, None, [], mean, std)


# --- modules and methods, the same weights each time -----------------------------------------------------------------


def vit(**fields):
    torch.manual_seed(0)
    return common.ViT(**{"image_size": 8, "patch": 4, "dim": 16, "depth": 2, "heads": 2} | fields)


def autoencoder(**fields):
    return common.MaskedAutoencoder(vit(**fields), decoder_dim=8, decoder_depth=1, decoder_heads=2, mask_ratio=0.5)


def tiny_magma(**fields):
    """Magma on 8 x 8 pictures."""
    laptop = magma.RECIPES["shapes"] | {"image_size": 8, "patch": 4, "mask_ratio": 0.5, "e_st": 0, "amp": "off"}
    torch.manual_seed(0)
    return magma.Magma(magma.Config(**laptop | {"projector_dim": 16} | fields), shapes(10))


def tiny_mixedae(**fields):
    """MixedAE on pictures of 16 x 16, in groups of two."""
    small = {"model": "vit_micro", "image_size": 16, "patch": 4, "decoder_dim": 16, "decoder_depth": 1}
    small |= {"decoder_heads": 2, "batch_size": 8, "images_per_group": 2}
    torch.manual_seed(0)
    return mixedae.MixedAE(mixedae.Config(**small | fields), statistics())


def tiny_finola(**fields):
    """FINOLA on pictures of 64 x 64, with 16 channels."""
    small = {"width": "micro", "image_size": 64, "channels": 16, "upsampler_width": 16, "upsampler_blocks": 1}
    torch.manual_seed(0)
    return finola.FinolaAutoencoder(finola.Config(**small | fields), statistics())


ENERGY_DATA = statistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def tiny_energy(encoder=None, **fields):
    """The energy method with a small transformer, on pictures of 16 x 16."""
    small = {"image_size": 16, "patch": 4, "grid": 4, "scale": 4, "amp": "off", "batch_size": 4, "base_lr": 0.1}
    small |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "workers": 0}
    torch.manual_seed(0)
    encoder = encoder or vit(image_size=16, mean=ENERGY_DATA.mean, std=ENERGY_DATA.std)
    return ebm_pretrain.EnergyPretraining(ebm_pretrain.Config(**small | fields), ENERGY_DATA, encoder)


SMALL_LEVELS = {"image_size": 16, "patch": 4, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "hidden": 8}
SMALL_LEVELS |= {"batch_size": 4, "base_lr": 0.64, "head_lr": 1.28, "mask_lr": 0.64, "amp": "off", "workers": 0}
SMALL_LEVELS |= {"model": "vit_micro", "epochs": 2}


def tiny_levels(**fields):
    """MLO-MAE with a transformer of two narrow blocks, on sixty pictures of 16 x 16."""
    torch.manual_seed(0)
    with mock.patch.dict(common.VIT_SIZES, vit_micro={"dim": 16, "depth": 2, "heads": 2}):
        config = mlo_mae.Config(**SMALL_LEVELS | fields)
        return mlo_mae.MultiLevelMAE(config, shapes(60, 16, (0.5,) * 3, (0.25,) * 3))


class LevelRecorder:
    """A Stepper of plain gradient descent for MLO-MAE that keeps the gradients of every step in `steps`, a dict by the
    parameter's name each; with `moves` False the weights stay. With --hypergradient adamw the steps are those of AdamW,
    which has already taken two.
    """

    def __init__(self, method, moves=True):
        self.method, self.moves, self.dtype, self.steps = method, moves, None, []
        self.scaler, self.adamw = torch.amp.GradScaler("cpu", enabled=False), method.optimizer(method.config)
        self.param_groups, self.state = self.adamw.param_groups, self.adamw.state
        for group in self.param_groups:
            group["lr"] = method.config.base_lr * group["lr_scale"]
            for i, p in enumerate(group["params"] if method.config.hypergradient == "adamw" else ()):
                m, v = 0.01 * randn(*p.shape, seed=i, dtype=p.dtype), 1e-3 * rand(*p.shape, seed=i, dtype=p.dtype)
                self.state[p] = {"step": torch.tensor(2.0), "exp_avg": m, "exp_avg_sq": v + 1e-4}

    @property
    def optimizer(self):
        return self

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def step(self):
        found = {name: p.grad.clone() for name, p in self.method.named_parameters() if p.grad is not None}
        self.steps.append(found)
        if self.state:
            self.adamw.step()
        for group in self.param_groups if self.moves and not self.state else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] * parameter.grad
        self.zero_grad()

    def zero_grad(self, set_to_none=True):
        self.method.zero_grad(set_to_none=True)


NARROW = {"dim": 24, "depth": 2, "heads": 3}
NARROW_ROWS = [("stem", 0, 8), ("lite", 16, 8), ("down", 16, 8), ("down", 24, 16), ("down", 48, 16), ("same", 48, 16)]


@contextlib.contextmanager
def narrow_networks(size=NARROW):
    """While this is on, the smallest encoders that a command can name are smaller still, and pictures.png is not
    enlarged.
    """
    former, save = {"token_dim": 16, "head": 32, "rows": NARROW_ROWS}, functools.partial(save_pictures, side=8)
    vits = mock.patch.dict(common.VIT_SIZES, vit_micro=size)
    formers = mock.patch.dict(common.MOBILE_FORMERS, micro=former)
    with vits, formers, mock.patch.object(plumbing.runs, "save_pictures", save):
        yield


# --- small runs ------------------------------------------------------------------------------------------------------

TINY = "--image-size 8 --mask-ratio 0.5 --epochs 4 --batch-size 8 --probe-every 2 --e-st 1 --e-dur 2 --base-lr 0.03"


def fit_magma(out, *flags, method_class=magma.Magma, data=None, size=NARROW):
    """Train Magma on forty pictures of 8 x 8, five steps an epoch -> the method and what `fit` returns."""
    with narrow_networks(size):
        config = read_flags(magma.Config, magma.RECIPES, [*TINY.split(), "--out", str(out), *flags])
        torch.manual_seed(config.seed)
        method = method_class(config, data or shapes())
        return method, common.fit(method, data or shapes(), shapes(), config)


def log_of(out):
    """The lines of a run's log, the first with its command."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(log):
    """A log without what differs between two runs that are the same: speed, and where they were written."""
    other = ("images_per_second", "seconds", "command", "config")
    return [{k: v for k, v in line.items() if k not in other} for line in log]


def write_run(folder, method="magma", epochs=2, linear=(10.0, 30.0), seconds=5.0, evaluations=(), **changes):
    """A run folder as train.py leaves it, without weights: the untrained encoder's line, then one for each epoch."""
    folder.mkdir(parents=True)
    config = {"magma": magma, "mixedae": mixedae}[method].Config(epochs=max(2, epochs), out=str(folder))
    known = {"method": method} | dataclasses.asdict(config) | changes
    lines = [{"command": "train.py", "precision": "torch.float32"}, {"epoch": 0, "linear": linear[0], "knn": 9.0}]
    for epoch in range(1, epochs + 1):
        lines.append({"epoch": epoch, "loss": 4.0 / epoch, "seconds": epoch * seconds, "images_per_second": 7})
    lines[-1] |= {"linear": linear[1], "knn": 11.0, "effective_rank": 20.0}
    (folder / "config.json").write_text(json.dumps(known))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return folder


def judged(protocol="linear", value=50.0, data="shapes", **settings):
    """A line of eval.jsonl."""
    settings = {"recipe": "magma", "epochs": 100} | settings
    results = {"trained": {protocol: value}, "untrained": {protocol: 1.0}}
    return {"protocol": protocol, "data": data, "results": results, "settings": settings}


def same_weights(a, b):
    """Whether two states hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


# --- what the protocols judge ----------------------------------------------------------------------------------------

QUICK = {"epochs": 2, "batch_size": 32, "base_lr": 8e-3, "warmup_epochs": 0}


def striped(count, seed=0, size=8):
    """Pictures of three classes that a probe can tell apart: which channel is bright."""
    labels = torch.arange(count) % 3
    bright = 120 * F.one_hot(labels, 3)[:, :, None, None]
    pictures = (60 * images_of(count, size, seed) + bright).to(torch.uint8)
    return MemoryImages(pictures, labels, ["red", "green", "blue"], (0.5,) * 3, (0.25,) * 3)


class MapEncoder(Encoder):
    """An encoder that returns a map (B, D, H, W), as a convolutional one does."""

    dim = 8

    def __init__(self, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3):
        super().__init__(mean, std, image_size=image_size)
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.ModuleList([nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)])

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return x


def subject_of(encoder, name="trained"):
    """An encoder, or None for raw pixels, with 96 striped pictures to train on and 48 to test."""
    return Subject(name, encoder and encoder.eval(), striped(96), striped(48, seed=1), torch.device("cpu"))


def settings_for(protocol, out, **given):
    """The settings of a protocol for `subject_of`."""
    given = {"image_size": 8, "data": "stripes", "out": str(out), "amp": "off"} | given
    return settings_of(protocol, given, "magma", 16, 96)


# --- data sets in their official layouts -----------------------------------------------------------------------------


def write_cifar(root, name, counts=(5, 3), test=4, seed=0):
    """CIFAR-10 or -100 in the official binary layout; returns the records of every file."""
    folder, (_, label_bytes, classes, _) = ARCHIVES[name][0], CIFAR[name]
    home = root / folder
    home.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    files = [(f"data_batch_{i + 1}.bin", n) for i, n in enumerate(counts)] + [("test_batch.bin", test)]
    if name == "cifar100":
        files = [("train.bin", sum(counts)), ("test.bin", test)]
    records = {}
    for file, count in files:
        rows = rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
        rows[:, :label_bytes] = rng.integers(0, 20 if name == "cifar100" else 10, (count, label_bytes))
        rows[:, label_bytes - 1] = rng.integers(0, classes, count)
        rows.tofile(home / file)
        records[file] = rows
    return records


def write_stl10(root, train=6, test=4, unlabeled=5, seed=0):
    """STL-10 in the official binary layout; returns the pictures of each part as (N, 3, row, column)."""
    home = root / "stl10_binary"
    home.mkdir()
    rng, pictures = np.random.default_rng(seed), {}
    for part, count in (("train", train), ("test", test), ("unlabeled", unlabeled)):
        pictures[part] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        pictures[part].transpose(0, 1, 3, 2).tofile(home / f"{part}_X.bin")  # column by column
        if part != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(home / f"{part}_y.bin")
    (home / "class_names.txt").write_text("\n".join(f"name{i}" for i in range(10)) + "\n")
    return pictures


def write_tinyimagenet(root, wnids=("n02", "n01"), train=3, val=2):
    """Tiny-ImageNet in the official layout; returns its folder."""
    home = root / "tiny-imagenet-200"
    rows = []
    for label, wnid in enumerate(wnids):
        (home / "train" / wnid / "images").mkdir(parents=True)
        for i in range(train):
            mode = "L" if i == 0 else "RGB"  # some of the official files are grey
            colour = 50 * label + 10 * i if mode == "L" else (50 * label + 10 * i, 200, 100)
            path = home / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            Image.new(mode, (64, 64), colour).save(path, quality=95)
        rows += [(f"val_{label + 2 * i}.JPEG", wnid, label) for i in range(val)]
    (home / "val" / "images").mkdir(parents=True)
    for file, _, label in rows:
        Image.new("RGB", (64, 64), (50 * label, 30, 30)).save(home / "val" / "images" / file, quality=95)
    lines = [f"{file}\t{wnid}\t0\t32\t44\t62\n" for file, wnid, _ in sorted(rows)]
    (home / "val" / "val_annotations.txt").write_text("".join(lines))
    (home / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttabby, tabby cat\n\n")
    return home


def write_folders(root, classes=("ant", "bee"), train=3, val=2, size=(40, 30), ending="png"):
    """Class folders of flat pictures, each class and file with its own colour."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (40 + 60 * label, 30 + 20 * i, 90 if split == "train" else 200)
                Image.new("RGB", size, colour).save(root / split / name / f"{i} é.{ending}")
    return root


def write_pairs(root, parts=("training", "validation"), counts=(4, 2), size=(40, 28), classes=3, first=0):
    """A folder of ADE20K's layout: grey pictures of 60 times the label, in quarters; `first` is the least label."""
    for part, count in zip(parts, counts, strict=True):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for i in range(count):
            labels = np.arange(4).reshape(2, 2) + i
            labels = (labels % classes).repeat(size[1] // 2, 0).repeat(size[0] // 2, 1).astype(np.uint8)
            Image.fromarray(60 * labels).convert("RGB").save(root / "images" / part / f"{i}.png")
            Image.fromarray(labels + np.uint8(first)).save(root / "annotations" / part / f"{i}.png")
    return root


def write_coco(root, splits=("train2017", "val2017"), count=4, size=(40, 28), masks=True, **changes):
    """A folder in COCO's layout: grey pictures with a red square of category 7 on a larger blue one of category 3.

    The first picture has no object, the second a crowd at its right edge instead of the blue square. `masks` False
    leaves the field out; `changes` are fields of the first annotation.
    """
    (root / "annotations").mkdir(parents=True)
    width, height = size
    names = [f"{i}.png" for i in range(count)]
    images = [{"id": 10 + i, "file_name": name, "width": width, "height": height} for i, name in enumerate(names)]
    rows = []
    for i in range(1, count):
        crowd = {"size": [height, width], "counts": [height * (width - 5), height * 5]}  # the last five columns
        blue, red = [4, 4, 24, 20], [8 + i, 8, 10, 8]
        for category, box, colour_mask in ((7, red, None), (3, blue, crowd if i == 1 else None)):
            x, y, w, h = box
            outline = colour_mask or [[x, y, x + w, y, x + w, y + h, x, y + h]]
            row = {"image_id": 10 + i, "category_id": category, "bbox": box, "iscrowd": int(bool(colour_mask))}
            rows.append({"id": 1 + len(rows), **row, "segmentation": outline})
    for row in rows if not masks else ():
        del row["segmentation"]
    rows[0] |= changes
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
    text = json.dumps({"images": images, "annotations": rows, "categories": categories})
    for split in splits:
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(text)
        for i, name in enumerate(names):
            picture = Image.new("RGB", size, (90, 90, 90))
            if i > 1:
                picture.paste((20, 20, 230), (4, 4, 28, 24))
            if i:
                picture.paste((230, 20, 20), (8 + i, 8, 18 + i, 16))
            picture.save(root / split / name)
    return root
