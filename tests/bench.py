"""Measure what docs/speed.md claims about speed: each line is a ratio of two versions timed in turn, in one process.

python tests/bench.py                        all of it, some minutes on two cores
python tests/bench.py regularizer crop       only these
python tests/bench.py --threads 1 crop       with another number of threads
python tests/bench.py --against ../old recipes     another checkout's code beside this one's

On a CPU what counts is the time of the process, not the clock's: other programs disturb it less.

attention     plain attention against the fused kernel
amp           a masked-autoencoder step with the default --amp auto against float32
regularizer   MAGMA's term against a training step, and against the obvious B x B x D version
crop          batched random resized crops against grid_sample and against Pillow, image by image
loop          all that a training step does besides forward, backward and optimiser
probe         a linear probe on features that are kept against one that encodes in every epoch
features      20,000 small JPEGs to features against decoding alone; the memory for 1,000 and for 20,000
loader        JPEG files to random resized crops of 224 x 224, decoding alone, and torchvision's where it is installed;
              --pictures FOLDER for class folders of one's own
knn           exact nearest neighbours of 10,000 features among 50,000, and by faiss where faiss-cpu is installed
augment       RandAugment, erasing, mixup and cutmix of a batch against a fine-tuning step
mixed         MixedAE's step against MAE's, and top-k against plain attention
finola        FINOLA's map in its parallel form against position by position
memory        FINOLA's step at the paper's size with --recompute and without, with --against by that checkout, too: time
              and growth of a process with 2 and 8 images
energy        an energy step of N = 2 against a plain forward and backward pass of the same transformer: time, memory,
              and how far a process grows by the laptop recipe, with --against also by that checkout's
levels        a cycle of MLO-MAE, two steps of level I and one each of II and III, against two steps of MAE, and with
              --against beside a cycle of that checkout
recipes       with --against: a step of each laptop recipe, beside the same by that checkout; are the losses equal;
              --only METHOD for that one alone
profile       what a step of each laptop recipe does with its time, with --against also that checkout's
detection     FINOLA's detection at 800 x 1333: multiply-adds and parameters beside the published ones, and a step of
              two pictures: time, and growth of a process
gpu           on a GPU: the five methods at the papers' sizes, and MAE against a plain loop, in at most --seconds; with
              --device cpu the same code at small sizes
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import io
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import ebm_pretrain
import evaluate
import finola
import magma
import mixedae
import mlo_mae
from plumbing.boxes import Targets
from plumbing.class_folders import IMAGENET, is_image
from plumbing.crops import crop_boxes, random_resized_crop
from plumbing.datasets import STATISTICS, load_data
from plumbing.encoders import save_encoder
from plumbing.images import FolderImages, MemoryImages
from plumbing.probes import knn_accuracy
from plumbing.processes import pick_precision, start_distributed
from plumbing.run_files import read_log
from plumbing.settings import read_flags
from protocols.detect import Detector
from protocols.heads import LinearHeads, one_hot
from protocols.rows import Subject
from protocols.settings import settings_of
from protocols.training import Classifier, run_protocol


def wait():
    """Until a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(*functions, rounds: int = 7, times: int = 1) -> list:
    """Seconds of a call of each function, round by round: a list for each. They take turns, `times` calls each."""
    for function in functions:
        function()
    wait()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    found = [[] for _ in functions]
    for _ in range(rounds):
        for function, kept in zip(functions, found, strict=True):
            start = clock()
            for _ in range(times):
                function()
            wait()
            kept.append((clock() - start) / times)
    return found


def seconds(*functions, rounds: int = 7) -> list:
    """Median seconds of each function; they take turns, so that a busy moment hits all alike."""
    return [statistics.median(kept) for kept in in_turn(*functions, rounds=rounds)]


def ratio(ours: list, others: list) -> str:
    """The median of the ratios of two versions, round by round, and the smallest and the largest."""
    ratios = sorted(x / y for x, y in zip(ours, others, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def code_at(folder: str) -> types.SimpleNamespace:
    """`common` and the five methods of another checkout, beside those of this one."""
    names = ("common", *common.METHODS)

    def imported():
        return [name for name in sys.modules if name.partition(".")[0] in (*names, "plumbing", "protocols")]

    ours = {name: sys.modules.pop(name) for name in imported()}
    sys.path.insert(0, folder)
    try:
        return types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(folder)
        for name in imported():
            del sys.modules[name]
        sys.modules.update(ours)


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


def write_jpegs(root: Path, count: int):
    """Pictures of 160 x 120 with a few large patches of colour, one of twenty to test on."""
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        picture = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120))
        picture.save(root / ("train" if i % 20 else "val") / f"{i:06d}.jpg")


def decode_and_encode(root: str, run: str) -> tuple:
    """Seconds to decode all pictures of a folder alone, and by --protocol features; MB at the most. In a process."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the processes that decode, as outside of here
    splits = [load_data(root, split=split, workers=8) for split in ("train", "test")]
    found = []
    for work in (
        lambda: [len(x) for data in splits for x, _ in data.plain_batches(range(len(data)), 32, 32)],
        lambda: evaluate.main([run, "--protocol", "features", "--data", root, "--device", "cpu", "--out", root]),
    ):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return *found, most_memory()


def features(device):
    row("features of JPEGs by vit_micro, one thread", "decoding alone", "features", "ratio", "most memory")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # where it is remembered which pictures are good
        encoder = common.ViT(32, 4, **common.VIT_SIZES["vit_micro"])
        save_encoder(encoder, Path(folder) / "encoder.pt")
        for count in (1_000, 20_000):
            write_jpegs(root := Path(folder) / f"{count}", count)
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                alone, spent, memory = pool.submit(decode_and_encode, str(root), folder).result()
            rates = [f"{count / x:,.0f} a second" for x in (alone, spent)]
            row(f"  {count:,} pictures", *rates, f"{spent / alone:.2f}", f"{memory:.0f} MB")


def write_photographs(root: Path, count: int):
    """JPEGs of 500 x 375 in two classes, with structure of every size, as photographs have it; 60 KB each, about."""
    generator = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((375, 500, 3))
        for part in (4, 8, 16, 32, 64, 128, 256):
            noise = Image.fromarray(generator.integers(0, 256, (part, part, 3), dtype=np.uint8))
            picture += (np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) - 127.5) / part**0.5
        (root / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray((127.5 + picture).clip(0, 255).astype(np.uint8)).save(
            root / f"{i % 2}" / f"{i}.jpg", quality=92
        )


def torchvision_batches(root: str, chosen: list, size: int):
    """Batches of 64 pictures of class folders as torchvision makes them for training; None where it is not there."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import datasets, transforms

    steps = (
        transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(**IMAGENET),
    )
    data = torch.utils.data.Subset(datasets.ImageFolder(root, transforms.Compose(steps)), chosen)
    return torch.utils.data.DataLoader(data, batch_size=64)


def loader(device, pictures=None):
    """In this process, without workers: what one core does; batches end up normalized."""
    with contextlib.ExitStack() as stack:
        root = pictures or stack.enter_context(tempfile.TemporaryDirectory())
        if not pictures:
            write_photographs(Path(root), 64)
        paths = sorted(str(path) for path in Path(root).rglob("*") if is_image(path.name))
        chosen = (list(range(len(paths))) * 256)[:256]
        data = FolderImages(paths, torch.zeros(len(paths)).long(), [], **IMAGENET)
        plan = list(enumerate(torch.tensor(chosen).split(64)))
        encoder = common.ViT(224, 16, **common.VIT_SIZES["vit_micro"], **IMAGENET)

        def ours(normalize):
            for images, _ in data.train_batches(plan, 224):
                normalize(images)

        versions = [
            lambda: [Image.open(paths[i], formats=["JPEG"]).load() for i in chosen],
            lambda: ours(lambda images: images.sub_(encoder.mean).div_(encoder.std)),
            lambda: ours(encoder.normalize),
        ]
        if batches := torchvision_batches(root, chosen, 224):
            versions.append(lambda: [None for _ in batches])
        found = in_turn(*versions, rounds=9)
    row("JPEG files to 224 x 224, images a second", "", "ours / torchvision")
    for name, spent in zip(
        ("decoding alone", "ours, normalized in place", "ours, by an encoder's normalize", "torchvision"),
        found,
        strict=False,
    ):
        beside = ratio(found[3], spent) if batches and name.startswith("ours") else ""
        row(f"  {name}", f"{256 / statistics.median(spent):,.0f}", f"   {beside}")


def faiss_accuracy(bank, bank_labels, queries, labels, k: int = 10):
    """`knn_accuracy` by faiss's exact search, with the same vote; None where it is not installed."""
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    votes = one_hot(bank_labels[torch.from_numpy(index.search(queries.numpy(), k)[1])], 100).sum(dim=1)
    return 100 * float((votes.argmax(dim=1) == labels).float().mean())


def knn(device):
    row("10,000 among 50,000 features of width 192, k = 10", "ours", "product alone", "faiss", "  ours / faiss")
    bank, queries = torch.randn(50_000, 192, device=device), torch.randn(10_000, 192, device=device)
    labels = torch.randint(0, 100, (60_000,), device=device)
    parts = (bank, labels[:50_000], queries, labels[50_000:])
    versions = [lambda: knn_accuracy(*parts), lambda: [part @ bank.T for part in queries.split(335)]]
    if faiss_accuracy(bank[:200], labels[:200], queries[:10], labels[:10]) is None:
        versions = in_turn(*versions, rounds=7)
        return row("  all exact", *(f"{statistics.median(x):.2f} s" for x in versions), "not here")
    found = in_turn(*versions, lambda: faiss_accuracy(*parts), rounds=7)
    row("  all exact", *(f"{statistics.median(x):.2f} s" for x in found), f"  {ratio(found[0], found[2])}")
    row("  of the whole process", f"{most_memory() / 1e3:.2f} GB")


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


def finola_step(code, batch: int, **fields):
    """A function that makes a step of FINOLA at the paper's size in bf16, by `code` of `code_at`; it gives the loss."""
    config = code.finola.Config(batch_size=batch, amp="bf16", **fields)
    torch.manual_seed(0)
    data = types.SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3)
    method = code.finola.FinolaAutoencoder(config, data).train()
    stepper = code.common.Stepper(method.optimizer(config), config, torch.device("cpu"))
    images = torch.rand(batch, 3, config.image_size, config.image_size)
    return lambda: float(method.update(method, [(images, None)], stepper)["loss"])


def grown_by_finola(folder: str, batch: int, fields: dict) -> tuple:
    """MB by which two steps make a process grow, the most MB that it holds, seconds of the second step, the losses."""
    start_distributed("cpu")
    torch.set_num_threads(1)
    step = finola_step(code_at(folder), batch, **fields)
    before, losses = most_memory(), [step()]  # the second step has the optimiser's state beside it
    started = time.process_time()
    losses.append(step())
    return most_memory() - before, most_memory(), time.process_time() - started, losses


def memory(device, against=None):
    """On a CPU, whatever the device; a process of its own for each number."""
    here, pool = str(Path(__file__).resolve().parents[1]), multiprocessing.get_context("spawn")
    versions = {"--recompute": (here, {}), "--no-recompute": (here, {"recompute": False})}
    versions |= {against: (against, {})} if against else {}
    row("FINOLA, MF-W2880, 3072 channels, 256 pixels, bf16", "grows by", "holds", "step", "MB an image", "  losses")
    for name, (folder, fields) in versions.items():
        grown = {}
        for batch in (2, 8):
            with pool.Pool(1) as worker:
                grown[batch], most, spent, losses = worker.apply(grown_by_finola, (folder, batch, fields))
            each = f"{(grown[8] - grown[2]) / 6:.0f}" if batch == 8 else ""
            cells = (f"{grown[batch]:.0f} MB", f"{most:.0f} MB", f"{spent:.1f} s", each)
            row(f"  {name}, {batch} images", *cells, "  " + " ".join(f"{x:.6f}" for x in losses))
    ours, *others = in_turn(*(finola_step(code_at(x), 2, **fields) for x, fields in versions.values()), rounds=3)
    for name, other in zip(list(versions)[1:], others, strict=True):
        row(f"  a step of 2 images, beside {name}", f"{statistics.median(ours):.1f} s", "", "", ratio(ours, other))
    this = types.SimpleNamespace(**globals())
    again, once = in_turn(*(laptop_step(this, "finola", torch.device("cpu"), recompute=x) for x in (True, False)))
    label = "  a step of the laptop recipe, beside --no-recompute"
    row(label, f"{statistics.median(again):.2f} s", "", "", ratio(again, once))
    method = magma.Magma(magma.Config(lam=0.0), MemoryImages(None, None, [], (0.5,) * 3, (0.25,) * 3))

    def forward(images):
        with torch.autocast("cpu", torch.bfloat16):
            return method(images)["loss"]

    kept = [kept_for_backward(lambda count=count: forward(torch.rand(count, 3, 224, 224))) for count in (2, 6)]
    row("MAE, vit_base 224/16, bf16: kept for backward", "", "", "", f"{(kept[1] - kept[0]) / 4:.0f}")


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


def grown_by_recipe(folder: str, name: str, fields: dict) -> float:
    """MB by which three steps of a laptop recipe make a process grow; called in a process of its own."""
    start_distributed("cpu")
    step, before = laptop_step(code_at(folder), name, torch.device("cpu"), **fields), most_memory()
    for _ in range(3):
        step()
    return most_memory() - before


def growth(name: str, against=None, **fields):
    """The row of `grown_by_recipe` for this checkout, and for another."""
    folders, cells = [str(Path(__file__).resolve().parents[1]), *([against] if against else [])], []
    for folder in folders:
        with multiprocessing.get_context("spawn").Pool(1) as worker:
            cells.append(worker.apply(grown_by_recipe, (folder, name, fields)))
    ratios = [f"{cells[0] / cells[1]:.2f}"] if against else []
    what = ", ".join([name, *(f"{key} {value}" for key, value in fields.items())])
    row(f"  a process grows by: {what}", *(f"{x:.0f} MB" for x in cells), *ratios)


def energy(device, against=None):
    """Two restorations and their loss against one plain forward and backward pass of the same network and attention.

    The floor is what products alone cost. A plain pass takes those of the forward three times. A restoration takes
    those with weights 6 times (forward 1, its pixel gradient 1, backward through both 4), those of the attention, whose
    factors are both activations, 9 times (1, 2, 6). With weights alone the floor is 4.0.
    """
    shares = ("energy / plain", "floor", "over floor", "memory kept", "of all steps", "differences")
    row("energy step, N = 2", "energy", "plain", *shares)
    data = MemoryImages(None, None, [], (0.5,) * 3, (0.25,) * 3)
    for model, size, patch, batch in (("vit_tiny", 32, 4, 64), ("vit_small", 224, 16, 16)):
        images = torch.rand(batch, 3, size, size, device=device)
        for amp in ("off", "bf16"):
            config = ebm_pretrain.Config(model=model, image_size=size, patch=patch, grid=patch, amp=amp)
            torch.manual_seed(0)
            method = ebm_pretrain.EnergyPretraining(config, data).to(device)
            stepper = common.Stepper(method.optimizer(config), config, device)
            weights = torch.randn(batch, method.encoder.dim, device=device)

            at_once = types.SimpleNamespace(autocast=stepper.autocast, backward=stepper.backward, step=method.zero_grad)

            def step(method=method, images=images, stepper=at_once):  # all but the optimiser
                method.update(method, [(images, None)], stepper)

            def restoring(method=method, stepper=stepper, images=images, first=False):
                with stepper.autocast():
                    clean, x = method.prepare(images)
                    return method(images, chain=(clean, x, x) if first else ())["loss"]

            def plain(method=method, stepper=stepper, images=images, weights=weights):
                with stepper.autocast():  # any gradient on its features
                    return (method.energy.features(images) * weights).sum()

            def differences(method=method, stepper=stepper, images=images):
                with stepper.autocast():
                    by_central_difference(method, images)

            versions = (step, lambda f=plain: f().backward(), differences)
            spent, usual, other = seconds(*versions, rounds=5)
            kept = [kept_for_backward(f) for f in (functools.partial(restoring, first=True), restoring, plain)]
            label = f"  {model} {size}/{patch}, batch {batch}, {'fp32' if amp == 'off' else amp}"
            attention = (1 + math.prod(method.encoder.grid)) / (6 * method.encoder.dim)
            floor = 2 * (6 + 9 * attention) / (3 + 3 * attention)  # `attention` in units of the products with weights
            ratios = [f"{x:.2f}" for x in (spent / usual, floor, spent / usual / floor)]
            times = [f"{x * 1e3:.0f} ms" for x in (spent, usual)]
            row(label, *times, *ratios, *(f"{x / kept[2]:.1f} x" for x in kept[:2]), f"{other / usual:.2f}")
    for amp in ("bf16", "off"):
        growth("ebm_pretrain", against, amp=amp)


def cycle(device, levels: int, **fields):
    """A function that makes one cycle of MLO-MAE on random images: without level III where `levels` is one less."""
    config = mlo_mae.Config(**mlo_mae.LAPTOP | {"unrolling": 2, "batch_size": 64} | fields)
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


def three_levels(device, other=None, against=None):
    if other is not None:
        row("MLO-MAE's cycle with level III", "ours", "the other", "losses", "  ours / the other")
        for fields in ({"unrolling": 1}, {"unrolling": 2}, {"unrolling": 1, "amp": "off"}):
            beside("mlo_mae", device, other, rounds=9, **fields)
        growth("mlo_mae", against, unrolling=1)
    row("MLO-MAE's cycle E, E, C, T, batch 64", "cycle", "two MAE steps", "ratio", "--update-every 5", "memory")
    pool = multiprocessing.get_context("spawn")
    for model, decoder in (("vit_micro", (96, 2, 3)), ("vit_tiny", (192, 4, 3))):
        size = {"model": model, **dict(zip(("decoder_dim", "decoder_depth", "decoder_heads"), decoder, strict=True))}
        for amp, kind in (("off", "exact"), ("off", "finite_difference"), ("bf16", "exact"), ("bf16", "adamw")):
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


def laptop_step(code, name: str, device, **fields):
    """A function that makes a step of the laptop recipe on one batch, for `code` of `code_at`; it gives the loss."""
    module = getattr(code, name)
    config = module.Config(**module.RECIPES["shapes"] | fields)
    count = config.batch_size * (getattr(config, "unrolling", -1) + 2)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10 * config.batch_size) % 10  # some are kept for level III
    known = {"images": None, "labels": labels, "classes": list("abcdefghij"), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.manual_seed(0)
    method = getattr(module, common.METHODS[name])(config, types.SimpleNamespace(**known)).to(device).train()
    method.start_epoch(config.epochs - 1)  # a term that begins later is on
    views = () if method.views == 1 else (method.views,)
    images = torch.rand(count, *views, 3, config.image_size, config.image_size, generator=generator).to(device)
    stepper, labels = code.common.Stepper(method.optimizer(config), config, device), labels[:count].to(device)

    def step():
        torch.manual_seed(0)  # the same masks in each
        return float(method.update(method, [(images, labels)], stepper)["loss"])

    return step


def beside(name: str, device, other, rounds: int = 9, **fields):
    """A row: a step of a laptop recipe, and the same step by another checkout."""
    steps = [laptop_step(code, name, device, **fields) for code in (types.SimpleNamespace(**globals()), other)]
    same = "equal" if steps[0]() == steps[1]() else "differ"
    ours, others = in_turn(*steps, rounds=rounds, times=2)
    times = [f"{1e3 * statistics.median(x):.1f} ms" for x in (ours, others)]
    row(f"  {', '.join([name, *(f'{k} {v}' for k, v in fields.items())])}", *times, same, f"  {ratio(ours, others)}")


def recipes(device, other=None, only=""):
    row("a step of the laptop recipe", "ours", "the other", "losses", "  ours / the other")
    if other is None:
        return print("  needs --against CHECKOUT")
    for name in [only] if only else common.METHODS:
        beside(name, device, other)


OPERATIONS = {  # kinds of operations, and what of their names tells them
    "products": r"mm$|_bmm|convolution|mkldnn|native_conv",
    "softmax": r"softmax|attention",
    "norms": r"norm",
    "activations": r"gelu|relu|silu|sigmoid",
    "optimiser": r"adam|Optimizer",
    "copies, casts": r"copy_|clone|cat$|fill_|zero_|gather|scatter|index|_to_copy",
    "sums, scales": r"add|sub|mul|div|sum|mean|pow|square|sqrt|rsqrt|neg|exp|where|maximum|abs|clamp|tanh|threshold",
}


def profile(device, other=None):
    row("share of a step's time, laptop recipe", *OPERATIONS, "the rest", "calls")
    for name in common.METHODS:
        for label, code in (
            {"": types.SimpleNamespace(**globals())} | ({"the other: ": other} if other else {})
        ).items():
            step = laptop_step(code, name, device)
            step()
            with torch.profiler.profile() as seen:
                step()
            spent, calls = dict.fromkeys([*OPERATIONS, "the rest"], 0.0), 0
            for event in seen.key_averages():
                kind = next((kind for kind, known in OPERATIONS.items() if re.search(known, event.key)), "the rest")
                spent[kind] += event.self_cpu_time_total
                calls += event.count
            whole = sum(spent.values())
            row(f"  {label}{name}", *(f"{100 * x / whole:.0f} %" for x in spent.values()), calls)


PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # products in bf16, dense, a second

DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
SMALL_VIT = {"model": "vit_micro", "image_size": 32, "patch": 4} | DECODER
SMALL_FINOLA = {"width": "micro", "image_size": 64, "channels": 64, "upsampler_width": 32}
PAPERS = {  # name: method, batch, settings besides the papers' (the defaults); settings for a CPU, in batches of 8
    "MAE, vit_base 224/16": (magma, 256, {"lam": 0.0}, SMALL_VIT),
    "MAGMA, vit_base 224/16": (magma, 256, {"e_st": 0}, SMALL_VIT),
    "MixedAE, vit_base 224/16": (mixedae, 256, {}, SMALL_VIT),
    "energy, N = 2, vit_small 224/16": (ebm_pretrain, 256, {}, SMALL_VIT | {"grid": 4}),
    "MLO-MAE, cycle E, C, T, vit_base 224/16": (mlo_mae, 128, {}, SMALL_VIT | {"hidden": 32}),
    "FINOLA, MF-W2880, 3072 channels, 256 pixels": (finola, 128, {}, SMALL_FINOLA),
}


def paper_step(name: str, device, share: int = 1):
    """A step of a method of PAPERS in bf16 on one batch, a `share`th of the paper's -> method, function, images."""
    module, batch, fields, smaller = PAPERS[name]
    batch, fields = (8, fields | smaller) if device.type == "cpu" else (batch // share, fields)
    config = module.Config(**{"batch_size": batch, "amp": "bf16"} | fields)
    labels = torch.arange(10 * batch) % 10  # some are kept for level III
    torch.manual_seed(0)
    data = MemoryImages(None, labels, list("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
    method = getattr(module, common.METHODS[module.__name__])(config, data).to(device).train()
    count = batch * (getattr(config, "unrolling", -1) + 2)
    images = torch.rand(count, 3, config.image_size, config.image_size, device=device)
    stepper, labels = common.Stepper(method.optimizer(config), config, device), labels[:count].to(device)
    return method, lambda: method.update(method, [(images, labels)], stepper), images


class Operations(TorchDispatchMode):
    """Floating-point operations of the products, convolutions and attention that run while this is on, in `total`.

    By the formulas of torch's FlopCounterMode, whose hooks on modules do not bear gradients taken within `forward`.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(function) -> int:
    with Operations() as counted:
        function()
    return counted.total


def peak_memory(function, device, besides: int = 0) -> str:
    """The most memory of a GPU that is held during a call, without `besides` bytes that others hold."""
    if device.type != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return f"{(torch.cuda.max_memory_allocated(device) - besides) / 1e9:.1f} GB"


def utilisation(flops: int, spent: float, device) -> str:
    """Share of the card's peak in bf16 (MFU); "-" where that is not known."""
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return f"{100 * flops / spent / peak:.1f} %" if peak else "-"


class PlainMAE(torch.nn.Module):
    """MAE as one would write it first, for `gpu`; its parameters come in the order of those of `MaskedAutoencoder`."""

    def __init__(self, size, patch, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads, mean, std):
        super().__init__()
        patches, nn = (size // patch) ** 2, torch.nn
        self.patch, self.visible, self.mean, self.std = patch, patches - round(0.75 * patches), mean, std
        self.mask_token, self.cls_token = (nn.Parameter(torch.zeros(1, 1, width)) for width in (decoder_dim, dim))
        self.embed = nn.Linear(3 * patch**2, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_decoder = nn.Linear(dim, decoder_dim)
        self.decoder = nn.ModuleList(PlainBlock(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.last, self.head = nn.LayerNorm(decoder_dim, eps=1e-6), nn.Linear(decoder_dim, 3 * patch**2)
        for name, width in (("positions", dim), ("decoder_positions", decoder_dim)):
            self.register_buffer(name, common.sincos_positions(size // patch, size // patch, width))

    def forward(self, images, noise):
        batch, _, size, _ = images.shape
        p, side = self.patch, size // self.patch
        x = ((images - self.mean) / self.std).reshape(batch, 3, side, p, side, p)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, side**2, -1)
        target = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        order = noise.argsort(dim=1)
        back, keep = order.argsort(dim=1), order[:, : self.visible]
        x = self.embed(x) + self.positions
        x = torch.gather(x, 1, keep[:, :, None].repeat(1, 1, x.shape[-1]))
        x = torch.cat([self.cls_token.expand(batch, -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.to_decoder(self.norm(x))
        hidden = self.mask_token.to(x.dtype).repeat(batch, side**2 - self.visible, 1)
        full = torch.cat([x[:, 1:], hidden], dim=1)
        full = torch.gather(full, 1, back[:, :, None].repeat(1, 1, x.shape[-1])) + self.decoder_positions
        x = torch.cat([x[:, :1], full], dim=1)
        for block in self.decoder:
            x = block(x)
        error = (self.head(self.last(x[:, 1:])).float() - target).square().mean(-1)
        mask = (back >= self.visible).float()
        return (error * mask).sum() / mask.sum()


class PlainBlock(torch.nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        nn, self.heads = torch.nn, heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.fc1 = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def plain_loop(method, images):
    """A step of the same MAE with the same weights in a plain loop, after a look that its loss is the same."""
    config, vit, device = method.config, method.encoder, images.device
    size = (config.image_size, config.patch, vit.dim, len(vit.blocks), vit.blocks[0].heads)
    decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
    model = PlainMAE(*size, *decoder, vit.mean.clone(), vit.std.clone()).to(device)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), method.autoencoder.parameters(), strict=True):
            mine.copy_(theirs)
        some, noise = images[:4], torch.rand(4, len(vit.positions), device=device)
        ours = method(some, mask=common.mask_from_noise(noise, config.mask_ratio))["mae"]
        torch.testing.assert_close(model(some, noise), ours, rtol=1e-3, atol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.base_lr, betas=config.betas, weight_decay=0.05)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(images, torch.rand(len(images), len(vit.positions), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def against_plain_loop(method, step, images):
    """MAE and a plain loop take turns: two rows."""
    device, count = images.device, len(images)
    held = torch.cuda.memory_allocated(device) - images.nbytes if device.type == "cuda" else 0  # by ours
    plain = plain_loop(method, images)
    ours, theirs = in_turn(step, plain, times=2)
    spent, ratios = statistics.median(theirs), [b / a for a, b in zip(ours, theirs, strict=True)]
    cells = (count, f"{count / spent:,.0f}", f"{1e3 * spent:.0f}", "-", peak_memory(plain, device, held))
    row("    a plain loop over the same network", *cells)
    cells = [f"{x:.2f} x" for x in (statistics.median(ratios), min(ratios), max(ratios))]
    row("    ours is faster: median, least, most", *cells)


def crop_rates(images):
    """Crops of pictures a seventh larger: ours, all at once, against Pillow, one by one in one process."""
    count, _, size, _ = images.shape
    side = size * 8 // 7
    raw = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    pictures, there = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in raw], raw.to(images.device)
    boxes = crop_boxes(*torch.full((2, count), float(side))).tolist()

    def one_by_one():
        out = []
        for picture, (top, left, h, w) in zip(pictures, boxes, strict=True):
            box = (left, top, min(left + w, side), min(top + h, side))
            out.append(np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box)))
        return torch.from_numpy(np.stack(out)).to(images.device)

    found = in_turn(lambda: random_resized_crop(there, size), one_by_one, rounds=3)
    rates = [f"{count / statistics.median(spent):,.0f}" for spent in found]
    row("    crops a second: ours, Pillow one by one", *rates)


def measure_paper(name: str, device):
    """A row of the table for a method of PAPERS, in parts of the batch where the memory does not hold it."""
    for share in (1, 2, 4):
        try:
            method, step, images = paper_step(name, device, share)
            step()
            flops, memory = flops_of(step), peak_memory(step, device)
            (rounds,) = in_turn(step, rounds=3, times=2)
            spent = statistics.median(rounds)
            cells = (len(images), f"{len(images) / spent:,.0f}", f"{1e3 * spent:.0f}")
            row(f"  {name}", *cells, utilisation(flops, spent, device), memory)
            if name.startswith("MAE"):
                against_plain_loop(method, step, images)
                crop_rates(images)
            return
        except torch.OutOfMemoryError:
            row(f"  {name}: out of memory", PAPERS[name][1] // share)
        except RuntimeError as error:  # the others are measured all the same
            print(f"  {name}: {str(error).splitlines()[0]}")
            return
        method = step = images = None  # what was held goes before the next try
        torch.cuda.empty_cache()


def gpu(device, budget: float = 90.0):
    """The papers' steps, batches on the device; what no time is left for in `budget` seconds is named."""
    began, skipped = time.perf_counter(), []
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU: small sizes, to try the code")
    row("a step in bf16", "images", "images/s", "ms", "MFU", "peak memory")
    for name in PAPERS:
        if time.perf_counter() - began > 0.75 * budget:
            skipped.append(name)
            continue
        measure_paper(name, device)
        torch.cuda.empty_cache()
    print(f"skipped for want of time: {'; '.join(skipped) or 'nothing'} ({time.perf_counter() - began:.0f} s)")


def detection_step(head: str, width: str, sides: tuple, count: int = 2, **fields):
    """A detector, a function that makes a step of FINOLA's recipe, and one that gives its answers; noise."""
    torch.manual_seed(0)
    config = settings_of("detect", {"data": "coco", "image_size": 800, "head": head} | fields, "finola", 2880, 10**5)
    method = Detector(common.MobileFormer(width), [str(i) for i in range(91)], config).train()
    images, boxes = torch.rand(count, 3, *sides), 0.1 + 0.3 * torch.rand(count, 7, 4)
    targets = Targets(torch.randint(91, (count, 7)), boxes, torch.ones(count, 2))
    stepper = common.Stepper(method.optimizer(config), config, torch.device("cpu"))
    return method, lambda: method.update(method, [(images, targets)], stepper), lambda: method.find(images, targets)


def grown_by_detection(fields: dict) -> tuple:
    """MB by which two steps make a process grow, and seconds of the second; called in a process of its own."""
    start_distributed("cpu")
    torch.set_num_threads(1)
    _, step, _ = detection_step(**fields)
    before = most_memory()
    step()
    started = time.process_time()
    step()
    return most_memory() - before, time.process_time() - started


def detection(device):
    """FINOLA's detection at 800 x 1333, padded to 800 x 1344, on a CPU whatever the device."""
    published = {("2880", "mf522"): (77.5, 34.6), ("2880", "mf211"): (77.5, 15.7), ("720", "mf522"): (5.6, 31.1)}
    row("800 x 1344: G multiply-adds, published at 1333", "encoder", "published", "decoder", "published")
    for (width, head), (of_encoder, of_head) in published.items():
        # In bf16 attention is plain on a CPU, and so counted.
        method, _, answer = detection_step(head, width, (800, 1344), count=1, amp="bf16")
        total, images = flops_of(answer) / 2e9, torch.rand(1, 3, 800, 1344)
        with torch.no_grad():
            alone = flops_of(lambda method=method, images=images: method.encoder(images)) / 2e9
        row(f"  MF-W{width}, {head}", f"{alone:.1f}", of_encoder, f"{total - alone:.1f}", of_head)
        sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (method.encoder, method.head)]
        row("    M parameters", f"{sizes[0]:.1f}", "", f"{sizes[1]:.1f}")
    row("a step of 2 pictures, MF-W2880, mf522", "grows by", "process time")
    for name, fields in {"frozen": {}, "fine-tuned": {"recipe": "finola_finetune"}}.items():
        given = {"head": "mf522", "width": "2880", "sides": (800, 1344)} | fields
        with multiprocessing.get_context("spawn").Pool(1) as worker:
            grown, spent = worker.apply(grown_by_detection, (given,))
        row(f"  {name}", f"{grown:.0f} MB", f"{spent:.1f} s")


BENCHES = {"attention": attention, "amp": amp, "regularizer": regularizer, "crop": crop, "loop": loop}
BENCHES |= {
    "probe": probe,
    "loader": loader,
    "knn": knn,
    "augment": augment,
    "mixed": mixed,
    "finola": autoregression,
    "energy": energy,
}
BENCHES |= {"features": features, "levels": three_levels, "recipes": recipes, "profile": profile}
BENCHES |= {"memory": memory, "detection": detection, "gpu": gpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHES) + "; all by default, gpu on a GPU")
    parser.add_argument("--against", metavar="CHECKOUT", help="a folder with another version of this project")
    parser.add_argument("--pictures", metavar="FOLDER", help="loader: class folders of JPEG files")
    parser.add_argument("--only", choices=common.METHODS, help="recipes: this method alone")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=90, help="how long gpu may take")
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
    wanted = {"recipes": args.against is not None, "gpu": device.type == "cuda"}
    other = code_at(args.against) if args.against else None
    given = {"gpu": {"budget": args.seconds}, "energy": {"against": args.against}}
    given |= {"recipes": {"other": other, "only": args.only}, "levels": {"other": other, "against": args.against}}
    given |= {"loader": {"pictures": args.pictures}, "memory": {"against": args.against}, "profile": {"other": other}}
    for name in args.names or [name for name in BENCHES if wanted.get(name, True)]:
        print()
        BENCHES[name](device, **given.get(name, {}))


if __name__ == "__main__":
    main()
