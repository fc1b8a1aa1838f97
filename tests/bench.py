"""Measure what docs/speed.md claims about speed: each line is a ratio of two versions timed in turn, in one process.

python tests/bench.py                        all of it, some minutes on two cores
python tests/bench.py regularizer crop       only these
python tests/bench.py --threads 1 crop       with another number of threads

attention     plain attention against the fused kernel
amp           a masked-autoencoder step with the default --amp auto against float32
regularizer   MAGMA's term against a training step, and against the obvious B x B x D version
crop          batched random resized crops against grid_sample and against Pillow, image by image
loop          all that a training step does besides forward, backward and optimiser
probe         a linear probe on features that are kept against one that encodes in every epoch
knn           exact nearest neighbours of 10,000 features among 50,000
augment       RandAugment, erasing, mixup and cutmix of a batch against a fine-tuning step
mixed         MixedAE's step against MAE's, and top-k against plain attention
finola        FINOLA's map in its parallel form against position by position
energy        an energy step of N = 2 against a plain forward and backward pass of the same transformer: time and memory
levels        a cycle of MLO-MAE, two steps of level I and one each of II and III, against two steps of MAE
"""

import argparse
import contextlib
import functools
import io
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import ebm_pretrain
import finola
import magma
import mixedae
import mlo_mae
from plumbing.crops import crop_boxes, random_resized_crop
from plumbing.datasets import STATISTICS
from plumbing.images import MemoryImages
from plumbing.probes import knn_accuracy
from plumbing.processes import pick_precision, start_distributed
from plumbing.runs import read_log
from plumbing.settings import read_flags
from protocols.heads import LinearHeads, one_hot
from protocols.rows import Subject
from protocols.settings import settings_of
from protocols.training import Classifier, run_protocol


def seconds(*functions, rounds: int = 7) -> list:
    """Median seconds of each function; they take turns, so that a busy moment hits all alike."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, kept in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def most_memory() -> float:
    """The most memory that this process has held so far, in MB; a child's `ru_maxrss` would be its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024


def row(*cells):
    print(f"{cells[0]:<52}" + "".join(f"{cell:>16}" for cell in cells[1:]), flush=True)


def training_step(device, batch: int, **fields):
    """A function that makes one optimisation step of Magma on random CIFAR-like images, after warming up."""
    config = magma.Config(**{"model": "vit_tiny", "image_size": 32, "patch": 4, "e_st": 0} | fields)
    data = MemoryImages(None, None, [], (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    method = magma.Magma(config, data).to(device)
    stepper = common.Stepper(method.optimizer(config), config, device)
    images = torch.rand(batch, 3, 32, 32, device=device)
    return lambda: method.update(method, [(images, None)], stepper)


def attention(device):
    row("attention, forward and backward", "ours", "fused", "ours / fused")
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, tokens, width in ((64, 3, 17, 64), (64, 3, 65, 64), (4, 12, 197, 64)):
            qkv = [torch.randn(batch, heads, tokens, width, device=device, dtype=dtype).requires_grad_() for _ in "qkv"]
            ours, fused = seconds(
                lambda qkv=qkv: common.attend(*qkv).sum().backward(),
                lambda qkv=qkv: F.scaled_dot_product_attention(*qkv).sum().backward(),
                rounds=15,
            )
            name = f"  {str(dtype)[6:]}, {batch} x {heads} x {tokens} x {width}"
            row(name, f"{ours * 1e3:.2f} ms", f"{fused * 1e3:.2f} ms", f"{ours / fused:.2f}")


def amp(device):
    row("product of two 2048 x 2048 matrices", "float32", "--amp auto", "speed-up")
    dtype = pick_precision("auto", device) or torch.float32
    wide, narrow = (torch.randn(2048, 2048, device=device).to(kind) for kind in (torch.float32, dtype))
    plain, auto = seconds(lambda: wide @ wide, lambda: narrow @ narrow, rounds=15)
    rates = [f"{2 * 2048**3 / spent / 1e9:,.0f} GFLOP/s" for spent in (plain, auto)]
    row("  no step can gain more than this", *rates, f"{plain / auto:.2f}")
    row("masked-autoencoder step, vit_tiny 32/4, batch 64", "float32", "--amp auto", "speed-up")
    light = {"decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 3, "lam": 0.0}
    plain, auto = seconds(training_step(device, 64, amp="off", **light), training_step(device, 64, **light), rounds=9)
    row("  decoder 192 x 4", f"{plain * 1e3:.0f} ms", f"{auto * 1e3:.0f} ms", f"{plain / auto:.2f}")


def obvious_manifold_loss(regularized, reference):
    """The same loss from all B x B x D differences, as one would write it first."""
    d = (reference[:, None] - reference[None]).square().sum(dim=-1)
    apart = ~torch.eye(len(d), dtype=torch.bool, device=d.device)
    w = torch.exp(-d / d[apart].std()) * apart
    degree = w.sum(dim=1) + 1e-4
    matrix = torch.eye(len(d), device=d.device) - w / (degree[:, None] * degree[None]).sqrt()
    return torch.trace(regularized.T @ matrix @ regularized) / len(d) ** 2


def regularizer(device):
    row("MAGMA's term, forward and backward, batch 256", "time", "share of step", "obvious / ours")
    for model, dim, decoder in (("vit_tiny", 192, (512, 8, 16)), ("vit_tiny", 192, (192, 4, 3))):
        y, x = (torch.randn(256, dim, device=device).requires_grad_() for _ in range(2))
        names = ("decoder_dim", "decoder_depth", "decoder_heads")
        step = training_step(device, 256, model=model, lam=0.0, **dict(zip(names, decoder, strict=True)))
        ours, obvious = seconds(
            lambda y=y, x=x: magma.manifold_loss(y, x).backward(),
            lambda y=y, x=x: obvious_manifold_loss(y, x).backward(),
            rounds=25,
        )
        (whole,) = seconds(step, rounds=3)
        name = f"  {model} 32/4, decoder {decoder[0]} x {decoder[1]}"
        row(name, f"{ours * 1e3:.2f} ms", f"{100 * ours / whole:.2f} %", f"{obvious / ours:.1f}")
        row("    the step itself", f"{whole * 1e3:.0f} ms")


def crop(device):
    row("random resized crop and flip, 32 x 32", "images/s", "ours is faster", "")
    images = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8, device=device)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images.cpu()]

    def grid():
        top, left, h, w = crop_boxes(*torch.full((2, 512), 32.0, device=device)).unbind(dim=1)
        zero = torch.zeros_like(w)
        rows = torch.stack([w / 32, zero, (2 * left + w) / 32 - 1], dim=1)
        columns = torch.stack([zero, h / 32, (2 * top + h) / 32 - 1], dim=1)
        theta = torch.stack([rows, columns], dim=1)
        at = F.affine_grid(theta, (512, 3, 32, 32), align_corners=False)
        return F.grid_sample(images.float() / 255, at, align_corners=False, padding_mode="border")

    def one_by_one():
        boxes = crop_boxes(*torch.full((2, 512), 32.0)).tolist()
        out = []
        for picture, (top, left, h, w) in zip(pictures, boxes, strict=True):
            box = (left, top, min(left + w, 32), min(top + h, 32))
            out.append(np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR, box=box)))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 255

    versions = (lambda: random_resized_crop(images, 32), grid, one_by_one)
    times = seconds(*versions, rounds=15)
    for name, spent in zip(("ours", "affine_grid and grid_sample", "Pillow, one by one"), times, strict=True):
        row(f"  {name}", f"{512 / spent:,.0f}", f"{spent / times[0]:.1f} x")


def loop(device):
    row("one epoch of the cifar10 laptop recipe", "per step", "share", "")
    images = torch.randint(0, 256, (6400, 3, 32, 32), dtype=torch.uint8, device=device)
    data = MemoryImages(images, torch.zeros(6400).long().to(device), ["any"], (0.5,) * 3, (0.25,) * 3)

    class Timed(magma.Magma):
        spent = 0.0

        def update(self, *args):
            start = time.perf_counter()
            out = super().update(*args)
            if device.type == "cuda":
                torch.cuda.synchronize()
            Timed.spent += time.perf_counter() - start
            return out

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--data", "cifar10", "--epochs", "1", "--probe-every", "0", "--out", str(Path(folder) / "run")]
        config = read_flags(magma.Config, magma.RECIPES, flags)
        method = Timed(config, data).to(device)
        common.fit(method, data, data, config)
        rate = read_log(Path(folder) / "run" / "log.jsonl")[1][-1]["images_per_second"]
    whole, steps = len(data) / rate, len(data) // config.batch_size
    row("  forward, backward, optimiser", f"{1e3 * Timed.spent / steps:.2f} ms", f"{100 * Timed.spent / whole:.1f} %")
    rest = whole - Timed.spent
    row("  everything else", f"{1e3 * rest / steps:.2f} ms", f"{100 * rest / whole:.1f} %")


def probe(device):
    row("linear probe of vit_micro on 4096 images, 100 epochs", "cached", "encoding anew", "speed-up")
    vit = common.ViT(32, 4, **common.VIT_SIZES["vit_micro"], **STATISTICS["shapes"]).to(device).eval()
    train, test = (common.load_data("shapes", split=split, device=device) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        given = {"data": "shapes", "image_size": 32, "crop_min": 1.0, "flip": 0.0, "out": folder, "amp": "off"}

        def run(cache: bool, epochs: int):
            """Seconds, and the accuracy; nothing is random about the images, so that the two can be compared."""
            flags = given | {"cache": cache, "epochs": epochs}
            config = settings_of("linear", flags, "magma", vit.dim, len(train))
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                found = run_protocol("linear", Subject("trained", vit, train, test, device), config)
            return time.perf_counter() - start, found["linear"]

        (long, _), (_, kept), (anew, again) = run(True, 100), run(True, 2), run(False, 2)
    row("  (encoding anew: fifty times two epochs)", f"{long:.1f} s", f"{50 * anew:.0f} s", f"{50 * anew / long:.0f}")
    row("  accuracy after two epochs", f"{kept:.2f} %", f"{again:.2f} %", "")


def knn(device):
    row("10,000 among 50,000 features of width 192, k = 10", "time", "peak memory", "")
    bank, queries = torch.randn(50_000, 192, device=device), torch.randn(10_000, 192, device=device)
    labels = torch.randint(0, 100, (60_000,), device=device)
    (spent,) = seconds(lambda: knn_accuracy(bank, labels[:50_000], queries, labels[50_000:]), rounds=3)
    row("  of the whole process", f"{spent:.2f} s", f"{most_memory() / 1e3:.2f} GB")


def augment(device):
    row("fine-tuning step, vit_tiny 32/4, batch 128", "whole step", "augmentation", "share")
    vit = common.ViT(32, 4, **common.VIT_SIZES["vit_tiny"]).to(device)
    config = settings_of("finetune", {"data": "x", "image_size": 32, "erase": 0.25}, "magma", vit.dim, 10**6)
    method = Classifier("finetune", vit, LinearHeads(vit.dim, 10), 10, config).to(device)
    stepper = common.Stepper(method.optimizer(config), config, device)
    images, labels = torch.rand(128, 3, 32, 32, device=device), torch.arange(128, device=device) % 10
    whole, part = seconds(
        lambda: method.update(method, [(images, labels)], stepper),
        lambda: method.augment(images, one_hot(labels, 10)),
    )
    row("  mae recipe with erasing", f"{whole * 1e3:.0f} ms", f"{part * 1e3:.1f} ms", f"{100 * part / whole:.1f} %")


def mixed(device):
    """MixedAE's compose step against MAE's, the same clean images, and what homologous attention adds."""
    data = MemoryImages(None, None, [], (0.5,) * 3, (0.25,) * 3)
    row("a step, forward, backward and optimiser", "MixedAE", "MAE", "MixedAE / MAE")
    small = {"model": "vit_tiny", "image_size": 32, "patch": 4}
    for name, batch, fields in (("vit_tiny 32/4", 64, small), ("vit_base 224/16", 8, {"image_size": 224})):
        images = torch.rand(batch, 3, fields["image_size"], fields["image_size"], device=device)

        def step(batch=batch, images=images, fields=fields, **switches):
            config = mixedae.Config(**{"batch_size": batch} | fields | switches)
            torch.manual_seed(0)
            method = mixedae.MixedAE(config, data).to(device)
            stepper = common.Stepper(method.optimizer(config), config, device)
            return lambda: method.update(method, [(images, None)], stepper)

        versions = {
            "": {},
            ", global attention": {"attention": "global"},
            ", and no contrast, no segments": {"attention": "global", "contrast": 0.0, "segment": "off"},
            ", MAE with the contrast": {"mode": "mae"},
        }
        mae, *times = seconds(
            step(mode="mae", contrast=0.0), *(step(**fields) for fields in versions.values()), rounds=3
        )
        for label, spent in zip(versions, times, strict=True):
            row(f"  {name}, batch {batch}{label}", f"{spent * 1e3:.0f} ms", f"{mae * 1e3:.0f} ms", f"{spent / mae:.2f}")
    row("top-k attention, a quarter of the keys", "top-k", "plain", "top-k / plain")
    plain = common.attend_plainly
    for name, batch, tokens in (("vit_tiny", 16, 64), ("vit_base", 2, 196)):
        size = common.VIT_SIZES[name]
        block = common.Block(size["dim"], size["heads"]).to(device)
        x = torch.randn(batch, tokens, size["dim"], device=device).requires_grad_()
        for dtype in (torch.bfloat16, torch.float32):
            topk = functools.partial(mixedae.topk_attention, topk=tokens // 4, select=mixedae.top_keys_fast)
            shape = (batch, size["heads"], tokens, size["dim"] // size["heads"])
            qkv = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in "qkv"]

            def whole(attention, block=block, x=x, dtype=dtype):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    block(x, attention).sum().backward()

            for label, run in (("attention", lambda f, qkv=qkv: f(*qkv).sum().backward()), ("whole block", whole)):
                ours, theirs = seconds(functools.partial(run, topk), functools.partial(run, plain), rounds=31)
                name_of = f"  {name}, {tokens} tokens, {str(dtype)[6:]}, {label}"
                row(name_of, f"{ours * 1e3:.2f} ms", f"{theirs * 1e3:.2f} ms", f"{ours / theirs:.2f}")
            scores = torch.randn(batch, size["heads"], tokens, tokens, device=device, dtype=dtype)
            select = (mixedae.top_keys_fast, mixedae.top_keys)
            ours, theirs = seconds(*(lambda f=f, s=scores, k=tokens // 4: f(s, k) for f in select), rounds=31)
            label = f"  {name}, {tokens} tokens, {str(dtype)[6:]}, choosing keys; torch"
            row(label, f"{ours * 1e3:.2f} ms", f"{theirs * 1e3:.2f} ms", f"{ours / theirs:.2f}")


def position_by_position(module: finola.Finola, q: torch.Tensor, size: int) -> torch.Tensor:
    """The obvious version of Finola.forward: both walks, each cell from the cell before it -> (B, C, S, S)."""
    centre, maps = size // 2, []
    for first, second in ((1, 0), (0, 1)):  # the axis that is walked first: columns, then rows
        cells = {(centre, centre): q}
        for axis, lines in ((first, [centre]), (second, range(size))):
            for line in lines:
                for sign, end in ((1, size - 1), (-1, 0)):
                    for place in range(centre, end, sign):
                        here, there = (
                            ((line, place), (line, place + sign)) if axis else ((place, line), (place + sign, line))
                        )
                        name = (("down", "up"), ("right", "left"))[axis][sign < 0]
                        cells[there] = finola.norm_linear(cells[here], getattr(module, name))
        maps.append(torch.stack([cells[place] for place in sorted(cells)], dim=-1).unflatten(-1, (size, size)))
    return sum(maps) / 2


def autoregression(device):
    """FINOLA's 16 x 16 map, batch 8, forward and backward."""
    row("FINOLA map, 16 x 16, batch 8", "cell by cell", "parallel", "faster", "than in fp32")
    for channels, rounds in ((256, 5), (3072, 1)):
        module = finola.Finola(channels).to(device)
        q = torch.randn(8, channels, device=device)
        torch.testing.assert_close(position_by_position(module, q, 4), module(q, 4), rtol=1e-3, atol=1e-3)
        exact = None
        for name, precision, dtype in (
            ("fp32", "highest", None),
            ('fp32, "medium"', "medium", None),
            ("bf16", "highest", torch.bfloat16),
        ):

            def run(unroll, module=module, q=q, dtype=dtype):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    z = unroll(q)
                z.square().mean().backward()
                module.zero_grad()

            torch.set_float32_matmul_precision(precision)
            versions = (functools.partial(position_by_position, module, size=16), functools.partial(module, size=16))
            slow, fast = seconds(*(functools.partial(run, f) for f in versions), rounds=rounds)
            exact = exact or slow
            label = f"  {channels} channels, {name}"
            row(label, f"{slow * 1e3:.0f} ms", f"{fast * 1e3:.0f} ms", f"{slow / fast:.1f} x", f"{exact / fast:.1f} x")
        torch.set_float32_matmul_precision("highest")


def kept_for_backward(function) -> float:
    """MB of tensors that autograd keeps for the backward pass of function(), which ends before it."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()  # alive, so that no address comes twice
    del result
    return sum(sizes.values()) / 1e6


def by_central_difference(method, images, share: float = 1e-3):
    """One training step of the energy without second derivatives: its weights get theirs from two pairs of passes.

    The loss of a step depends on the weights through the pixel gradient g alone, and its gradient is the change of
    dE/dweights along v = dloss/dg. So, for each step: g and v, then the weights' gradients at x + eps v and x - eps v.
    """
    clean, x = method.corrupt(images)
    alpha = method.step_size(x).detach()
    for _ in range(method.config.steps):
        with torch.no_grad():
            restored = x - ebm_pretrain.descent(method.energy, x, alpha)
        restored = restored.requires_grad_()
        (error,) = torch.autograd.grad(ebm_pretrain.restoration_loss([restored], clean), restored)
        eps = share / error.square().mean().sqrt()
        for sign in (-1, 1):
            (-sign * alpha / (2 * eps * method.config.steps) * method.energy(x + sign * eps * error).sum()).backward()
        x = restored.detach()


def energy(device):
    """Two restorations and their loss against one plain forward and backward pass of the same network and attention.

    The floor is what products alone cost. A plain pass takes those of the forward three times. A restoration takes
    those with weights 6 times (forward 1, its pixel gradient 1, backward through both 4), those of the attention, whose
    factors are both activations, 9 times (1, 2, 6). With weights alone the floor is 4.0.
    """
    row("energy step, N = 2", "energy", "plain", "energy / plain", "floor", "over floor", "memory kept", "differences")
    data = MemoryImages(None, None, [], (0.5,) * 3, (0.25,) * 3)
    for model, size, patch, batch in (("vit_tiny", 32, 4, 64), ("vit_small", 224, 16, 16)):
        images = torch.rand(batch, 3, size, size, device=device)
        for amp in ("off", "bf16"):
            config = ebm_pretrain.Config(model=model, image_size=size, patch=patch, grid=patch, amp=amp)
            torch.manual_seed(0)
            method = ebm_pretrain.EnergyPretraining(config, data).to(device)
            stepper = common.Stepper(method.optimizer(config), config, device)
            weights = torch.randn(batch, method.encoder.dim, device=device)

            def restoring(method=method, stepper=stepper, images=images):
                with stepper.autocast():
                    return method(images)["loss"]

            def plain(method=method, stepper=stepper, images=images, weights=weights):
                with stepper.autocast():  # any gradient on its features
                    return (method.energy.features(images) * weights).sum()

            def differences(method=method, stepper=stepper, images=images):
                with stepper.autocast():
                    by_central_difference(method, images)

            versions = (lambda f=restoring: f().backward(), lambda f=plain: f().backward(), differences)
            spent, usual, other = seconds(*versions, rounds=5)
            kept = kept_for_backward(restoring) / kept_for_backward(plain)
            label = f"  {model} {size}/{patch}, batch {batch}, {'fp32' if amp == 'off' else amp}"
            attention = (1 + math.prod(method.encoder.grid)) / (6 * method.encoder.dim)
            floor = 2 * (6 + 9 * attention) / (3 + 3 * attention)  # `attention` in units of the products with weights
            ratios = [f"{x:.2f}" for x in (spent / usual, floor, spent / usual / floor)]
            times = [f"{x * 1e3:.0f} ms" for x in (spent, usual)]
            row(label, *times, *ratios, f"{kept:.1f} x", f"{other / usual:.2f}")


def cycle(device, levels: int, **fields):
    """A function that makes one cycle of MLO-MAE on random images: without level III where `levels` is one less."""
    config = mlo_mae.Config(**mlo_mae.LAPTOP | fields)
    data = MemoryImages(None, torch.arange(640) % 10, list("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    method = mlo_mae.MultiLevelMAE(config, data).to(device)
    stepper = common.Stepper(method.optimizer(config), config, device)
    images = torch.rand(levels * config.batch_size, 3, config.image_size, config.image_size, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    return lambda: method.update(method, [(images, labels)], stepper)


def peak(fields: dict) -> float:
    """MB by which three cycles make a process grow; called in a process of its own."""
    torch.set_num_threads(2)
    run = cycle(torch.device("cpu"), 4, **fields)
    before = most_memory()
    for _ in range(3):
        run()
    return most_memory() - before


def three_levels(device):
    row("MLO-MAE's cycle E, E, C, T, batch 64", "cycle", "two MAE steps", "ratio", "--update-every 5", "memory")
    pool = multiprocessing.get_context("spawn")
    for model, decoder in (("vit_micro", (96, 2, 3)), ("vit_tiny", (192, 4, 3))):
        size = {"model": model, **dict(zip(("decoder_dim", "decoder_depth", "decoder_heads"), decoder, strict=True))}
        for amp, kind in (("off", "exact"), ("off", "finite_difference"), ("bf16", "exact")):
            fields = size | {"amp": amp, "hypergradient": kind}
            versions = [cycle(device, 4, **fields), cycle(device, 3, **fields)]
            mae = cycle(device, 3, objective="mae", **fields)
            # Level II and its share of MAE's cycle are taken off: two steps of level I alone.
            head = cycle(device, 2, objective="mae", **fields | {"unrolling": 1})
            full, without, two, one = seconds(*versions, mae, head, rounds=5)
            steps = 2 * (two - one)
            with pool.Pool(1) as worker:
                grown = worker.apply(peak, (fields,)) if device.type == "cpu" else math.nan
            label = f"  {model}, {'fp32' if amp == 'off' else amp}, {kind.replace('_', ' ')}"
            rare = (full + 4 * without) / 5
            times = [f"{full * 1e3:.0f} ms", f"{steps * 1e3:.0f} ms", f"{full / steps:.2f}", f"{rare / steps:.2f}"]
            row(label, *times, f"{grown:.0f} MB")


BENCHES = {"attention": attention, "amp": amp, "regularizer": regularizer, "crop": crop, "loop": loop}
BENCHES |= {"probe": probe, "knn": knn, "augment": augment, "mixed": mixed, "finola": autoregression, "energy": energy}
BENCHES |= {"levels": three_levels}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHES) + "; all by default")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"unknown name {min(unknown)!r}; choose from {', '.join(BENCHES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = start_distributed(args.device)
    precision = pick_precision("auto", device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()}/{os.cpu_count()} threads, auto = {precision}"
    )
    for name in args.names or BENCHES:
        print()
        BENCHES[name](device)


if __name__ == "__main__":
    main()
