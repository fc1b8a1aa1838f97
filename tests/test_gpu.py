"""A GPU computes what a CPU does: steps, precision, resume, one NCCL process, kernels, and nothing that makes it wait.

python -m pytest tests/test_gpu.py                        on the first GPU; without one, all of it is skipped
GPU_TESTS_ON=cpu python -m pytest tests/test_gpu.py -rs   the same code on a CPU, but for what only a GPU has
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import os
import shutil
import signal
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from make import generator, log_of, narrow_networks, rand, randn, same_weights, shapes, vit, write_folders
from torch import nn

import common
import ebm_pretrain
from plumbing.crops import crop_boxes, random_resized_crop, resize
from plumbing.datasets import read_folders
from plumbing.encoders import load_encoder
from plumbing.errors import Stopped
from plumbing.probes import knn_accuracy, ridge_accuracy
from plumbing.processes import agree, average, gather, on_rank_zero, start_distributed, synchronize_norms
from plumbing.settings import read_flags
from protocols.frozen import class_cosines, davies_bouldin
from protocols.heads import LinearHeads
from protocols.settings import settings_of
from protocols.training import Classifier

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: products that are the same each time
ON = os.environ.get("GPU_TESTS_ON", "cuda")
HERE = ON == "cpu" or torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not HERE, reason="torch sees no GPU; GPU_TESTS_ON=cpu rehearses these tests on a CPU")
only_on_gpu = pytest.mark.skipif(ON == "cpu", reason="only a GPU has this")

CASES = {  # laptop sizes, with small batches
    "magma": "--e-st 0 --uniformity 0.01 --batch-size 16",
    "magma simclr": "--ssl simclr --e-st 0 --batch-size 16",
    "magma vicreg": "--ssl vicreg --e-st 0 --batch-size 16",
    "mixedae": "--batch-size 16",
    "finola": "--batch-size 16",
    "finola masked_b": "--variant masked_b --recompute --batch-size 16",
    "ebm_pretrain": "--batch-size 16",
    "mlo_mae": "--batch-size 8 --unrolling 2 --update-every 1",
    "mlo_mae adamw": "--hypergradient adamw --batch-size 8 --unrolling 2 --update-every 1",
}


@pytest.fixture(scope="module")
def device():
    """The device as a command would get it."""
    return start_distributed(ON)


def build(case, *flags, data=None):
    """The method of a case, the same weights each time, on the CPU; and its settings."""
    module = importlib.import_module(case.split()[0])
    config = read_flags(module.Config, module.RECIPES, [*CASES[case].split(), *flags])
    torch.manual_seed(0)
    method = getattr(module, common.METHODS[module.__name__])(config, data or shapes(80, config.image_size))
    return method, config


def batch_of(method, config, device):
    """One batch as `update` gets it: images (B, 3, H, W), or (B, 2, 3, H, W) for two views, and labels."""
    pictures = shapes(config.batch_size * (getattr(config, "unrolling", -1) + 2), config.image_size)
    images = pictures.images / 255
    images = images if method.views == 1 else torch.stack([images, images.flip(-1)], dim=1)
    return images.to(device), pictures.labels.to(device)


@contextlib.contextmanager
def draws_of_a_cpu():
    """While this is on, random tensors are drawn on the CPU and moved: the same seed gives the same on any device."""

    def on_cpu(draw):
        return lambda *args, device="cpu", **options: draw(*args, **options).to(device)

    with contextlib.ExitStack() as stack:
        for name in ("rand", "randn", "randint"):
            stack.enter_context(mock.patch.object(torch, name, on_cpu(getattr(torch, name))))
        yield


@contextlib.contextmanager
def exact_convolutions():
    """While this is on, no convolution of float32 is computed in TF32."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def state_of(method):
    """Every parameter as it is now, on the CPU: {name: tensor}."""
    return {name: p.detach().cpu().clone() for name, p in method.named_parameters()}


@functools.cache
def trained(case, name, amp, count=2, dtype=torch.float32):
    """`count` steps of a case on a device: losses, the gradients of every step of the optimiser, and the weights."""
    device = torch.device(name)
    method, config = build(case, "--amp", amp)
    before, gradients, losses = state_of(method), [], []
    method.to(device, dtype).train()
    images, labels = batch_of(method, config, device)
    stepper = common.Stepper(method.optimizer(config), config, device, steps_per_epoch=10)

    def keep(*_):
        with_gradient = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        gradients.append({name: gradient.cpu().clone() for name, gradient in with_gradient.items()})

    stepper.optimizer.register_step_pre_hook(keep)
    with draws_of_a_cpu(), exact_convolutions():
        for step in range(count):
            stepper.set_rate(step + 1)
            torch.manual_seed(step)
            losses.append(float(method.update(method, [(images.to(dtype), labels)], stepper)["loss"]))
    after = state_of(method)
    moved = {name: after[name] - x for name, x in before.items()}
    return {"losses": losses, "gradients": gradients, "moved": moved, "scale": stepper.scaler.get_scale()}


def length(tensors):
    """The Euclidean length of all of them together."""
    return torch.stack([x.double().norm() for x in tensors]).norm()


def assert_near(found, wanted, share):
    """Two dicts of tensors that differ by at most a share of the wanted length: together, and name by name too.

    A name whose tensor is tiny beside all others is measured by a thousandth of their length: a key's bias has no
    gradient but rounding.
    """
    assert found.keys() == wanted.keys()
    whole = length(wanted.values())
    assert length([found[name] - x for name, x in wanted.items()]) <= share * whole
    for name, x in wanted.items():
        assert length([found[name] - x]) <= 3 * share * torch.maximum(length([x]), 1e-3 * whole), name


def relative_error(found, wanted):
    """|found - wanted| / |wanted|, in float64 on the CPU."""
    wanted = wanted.detach().cpu().double()
    return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_float32_steps_are_those_of_a_cpu(case, device):
    """Losses to 0.1 %, gradients to 0.2 %, changes of the weights to 10 %, as AdamW makes 1 of a gradient of rounding.

    FINOLA's gradients to 20 %: where one of its many ReLUs sits at its kink, rounding decides. So it has the next test.
    """
    assert_same_steps(*(trained(case, name, "off") for name in (str(device), "cpu")), 0.2 if "finola" in case else 2e-3)


@pytest.mark.parametrize("case", ["finola", "finola masked_b"])
def test_two_float64_steps_of_finola_are_those_of_a_cpu(case, device):
    """Gradients to 0.01 %; the loss alone is computed in float32."""
    assert_same_steps(*(trained(case, name, "off", 2, torch.float64) for name in (str(device), "cpu")), 1e-4)


def assert_same_steps(here, cpu, share):
    assert here["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert len(here["gradients"]) == len(cpu["gradients"]) >= 2
    for found, wanted in zip(here["gradients"], cpu["gradients"], strict=True):
        assert_near(found, wanted, share)
    differences = [here["moved"][name] - x for name, x in cpu["moved"].items()]
    assert length(differences) <= 0.1 * length(cpu["moved"].values()) > 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_has_the_loss_of_float32(case, amp, device):
    """To 5 % in the first step; all is finite, the scaler's scale is positive, and the weights move."""
    half, full = trained(case, str(device), amp, 4), trained(case, str(device), "off")
    assert half["losses"][0] == pytest.approx(full["losses"][0], rel=0.05)
    assert all(x.isfinite().all() for x in half["moved"].values())
    assert torch.tensor(half["losses"]).isfinite().all()
    assert half["scale"] > 0
    assert 0.3 * length(full["moved"].values()) < length(half["moved"].values())


def test_float32_keeps_its_digits(device):
    """As `pick_precision` says: no TF32, neither in products nor in convolutions; it has 3e-4, float32 3e-7."""
    x, weight = randn(64, 256), randn(256, 256, seed=1)
    maps, kernel = randn(4, 16, 12, 12), randn(16, 16, 3, 3, seed=1)
    product, convolved = (
        f(a.float().to(device), b.float().to(device))
        for f, a, b in ((torch.matmul, x, weight), (F.conv2d, maps, kernel))
    )
    assert relative_error(product, x @ weight) < 1e-5
    assert relative_error(convolved, F.conv2d(maps, kernel)) < 1e-5


@only_on_gpu
def test_accumulation_saves_memory(device):
    peaks = {}
    for parts in (1, 2, 4):
        method, config = build("magma", "--batch-size", "256", "--accumulate", str(parts))
        method.to(device).train()
        stepper = common.Stepper(method.optimizer(config), config, device)
        batches = list(zip(*(x.chunk(parts) for x in batch_of(method, config, device)), strict=True))
        for _ in range(2):  # the first step makes the optimiser's state
            torch.cuda.reset_peak_memory_stats(device)
            method.update(method, batches, stepper)
        peaks[parts] = torch.cuda.max_memory_allocated(device) / 2**20
    print("peak memory of a step in MB, by --accumulate:", {parts: round(peak) for parts, peak in peaks.items()})
    assert peaks[4] < peaks[2] < peaks[1]


# --- runs ------------------------------------------------------------------------------------------------------------


def fit(case, out, device, *flags, stop_after=None, looks=lambda model: None):
    """Train a narrow network of a case through `common.fit`, two epochs of three steps -> the method.

    SIGTERM comes in step `stop_after`, counted from 0; `looks` sees what `update` is given as the model.
    """
    with narrow_networks():
        settings = ["--epochs", "2", "--warmup-epochs", "0", "--probe-every", "0", "--out", str(out), *flags]
        size, count = (64, 48) if case.startswith("finola") else (32, 40 if case.startswith("mlo_mae") else 48)
        data = shapes(count, size)
        data = dataclasses.replace(data, images=data.images.to(device), labels=data.labels.to(device), masks=None)
        method, config = build(case, *settings, data=data)
        method.to(device)
        update, steps = method.update, iter(range(100))

        def watched(model, batches, stepper):
            looks(model)
            if next(steps) == stop_after:
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # it would end the tests
                os.kill(os.getpid(), signal.SIGTERM)
            return update(model, batches, stepper)

        method.update = watched
        common.fit(method, data, data, config)
        return method


@pytest.fixture
def deterministic():
    """While this is on, an operation gives the same each time or raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("case", CASES)
def test_resume_matches_uninterrupted_run_bit_for_bit(case, device, tmp_path):
    try:
        whole = fit(case, tmp_path / "whole", device)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        pytest.skip(str(error).split(",")[0])
    with pytest.raises(Stopped, match="stopped by SIGTERM after 2 steps"):
        fit(case, tmp_path / "cut", device, stop_after=1)
    resumed = fit(case, tmp_path / "cut", device, "--resume")
    assert same_weights(whole.state_dict(), resumed.state_dict())
    losses = [[line["loss"] for line in log_of(tmp_path / name)[2:]] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    if case != "magma simclr":
        return
    images = rand(4, 3, 32, 32)  # what was written there is read without a GPU
    there = whole.encoder.eval()(images.to(device))
    assert relative_error(there, load_encoder(tmp_path / "cut" / "encoder.pt")(images)) < 1e-4


def test_probes_and_pictures_of_a_run_are_made(device, tmp_path):
    for case in ("magma", "ebm_pretrain", "finola masked_b"):
        out = tmp_path / case.replace(" ", "-")
        fit(case, out, device, "--probe-every", "2")
        assert (out / "pictures.png").stat().st_size > 0
        assert 0 <= log_of(out)[-1]["linear"] <= 100


# --- one process that talks to itself --------------------------------------------------------------------------------


class Several(int):
    """The number 1 that passes for more than one: what several processes do is then done by a single one."""

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False

    def __hash__(self):
        return 1

    def __reduce__(self):
        return int, (1,)


@pytest.fixture
def processes(device, tmp_path, monkeypatch):
    """A group of one process, by NCCL on a GPU and gloo on a CPU, in which `world_size() > 1` holds.

    So each exchange is really called, with one rank: that ranks are added up in the right order is tested with gloo in
    tests/test_processes.py.
    """
    options = {"backend": "gloo"} if device.type == "cpu" else {"backend": "nccl", "device_id": device}
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(store=store, rank=0, world_size=1, timeout=timedelta(seconds=60), **options)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: Several(1))
    yield
    monkeypatch.undo()
    gc.collect()  # what still holds the group, before the group goes
    dist.destroy_process_group()


@pytest.mark.usefixtures("processes")
def test_a_group_of_one_hears_itself(device):
    """average, agree, on_rank_zero (objects) and gather (all_gather, and all_reduce backwards) on the device."""
    x = rand(3, 2).to(device).requires_grad_()
    assert torch.equal(average(x), x) and average(x) is not x
    assert agree(15, device) == 15
    assert on_rank_zero(lambda: {"step": 7}) == {"step": 7}
    gathered = gather(x)
    assert torch.equal(gathered, x) and gathered.grad_fn is not None
    gathered.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.usefixtures("processes")
@only_on_gpu
def test_synchronized_batch_norm_is_batch_norm(device):
    """`synchronize_norms` in a group of one, whose exchange does take place: output, gradients and averages."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).to(device)
    synchronized = synchronize_norms(copy.deepcopy(plain), device)
    assert type(synchronized[1]) is nn.SyncBatchNorm
    images, out = rand(8, 3, 9, 9).to(device), []
    for model in (plain, synchronized):
        with exact_convolutions():
            y = model(images)
            (y * rand(*y.shape, seed=1).to(device)).sum().backward()
        out.append(
            [y.detach(), model[1].weight.grad, model[1].running_mean, model[1].running_var, model[0].weight.grad]
        )
    for wanted, found in zip(*out, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def alone(device, tmp_path):
    """A run without a group, to compare with: made before the group is."""
    return fit("magma simclr", tmp_path / "alone", device, *VICREG)


VICREG = ("--ssl", "vicreg", "--gather", "--projector-dim", "32", "--amp", "off", "--accumulate", "2")


def test_a_run_in_a_group_of_one_is_a_run_alone(alone, processes, device, tmp_path):
    """DDP, no_sync, batch norms of VICReg's projector, --gather, the loop's own exchanges: losses to 1 %."""
    seen = []
    together = fit("magma simclr", tmp_path / "together", device, *VICREG, looks=lambda model: seen.append(type(model)))
    assert set(seen) == {nn.parallel.DistributedDataParallel}
    norms = [module for module in together.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(module) for module in norms} == {nn.BatchNorm1d if device.type == "cpu" else nn.SyncBatchNorm}
    losses = [[line["loss"] for line in log_of(tmp_path / name)[2:]] for name in ("alone", "together")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert_near(state_of(together), state_of(alone), 0.02)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # inductor gives advice
@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="torch.compile needs a C compiler")
def test_compiled_magma_has_the_loss_of_the_eager_one(device):
    """Loss to 1e-4 and gradients to 1 %, with the same mask, which inductor draws as torch does if it is asked to."""
    from torch._inductor import config as inductor  # here, since importing it takes a while

    found = []
    with narrow_networks({"dim": 24, "depth": 3, "heads": 3}), inductor.patch(fallback_random=True):
        method, config = build("magma", "--amp", "off", "--decoder-depth", "1")
        method.to(device).train()
        images, labels = batch_of(method, config, device)
        for model in (method, torch.compile(method)):
            torch.manual_seed(0)
            loss = model(images, labels)["loss"]
            loss.backward()
            found.append((float(loss), {name: p.grad.cpu() for name, p in method.named_parameters()}))
            method.zero_grad(set_to_none=True)
    (eager, wanted), (compiled, gradients) = found
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert_near(gradients, wanted, 0.01)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 3e-5), (torch.bfloat16, 0.03), (torch.float16, 5e-3)])
@pytest.mark.parametrize(("tokens", "width"), [(17, 32), (65, 64), (197, 64)])
def test_fused_attention_is_plain_attention(dtype, share, tokens, width, device):
    """Output and gradients of `attend` against plain attention in float64, in shares of their length."""
    exact = [randn(4, 3, tokens, width, seed=seed).requires_grad_() for seed in range(3)]
    towards, found = randn(4, 3, tokens, width, seed=3), []
    here = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    for attend, qkv in ((common.attend_plainly, exact), (common.attend, here)):
        out = attend(*qkv)
        (out * towards.to(out)).sum().backward()
        found.append([out, *(x.grad for x in qkv)])
    errors = [relative_error(mine, wanted) for wanted, mine in zip(*found, strict=True)]
    print(f"attention {dtype} {tokens} x {width}: errors of output, q, k, v", [f"{x:.1e}" for x in errors])
    assert max(errors) < share


class OwnViT(common.ViT):
    """A transformer of a user's own, whose attention is torch's fused one."""


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_an_energy_of_fused_attention_has_a_second_derivative(amp, device):
    """`descent` gives it torch's plain form: the weights' gradient is that of float64 on a CPU."""
    torch.manual_seed(0)
    encoder, images = OwnViT(16, 4, dim=24, depth=2, heads=3), rand(4, 3, 16, 16)
    exact = ebm_pretrain.Energy(encoder, images)
    energy, gradients = copy.deepcopy(exact).to(device), []
    exact.double()
    for model, x in ((exact, images.double()), (energy, images.to(device))):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp == "bf16" and model is energy):
            (restored,) = ebm_pretrain.restore(model, x, 1, 10.0)
        F.smooth_l1_loss(restored, torch.zeros_like(restored)).backward()
        gradients.append({name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None})
    assert length(gradients[0].values()) > 0
    share = 1e-3 if amp == "off" else 0.05
    assert length([gradients[1][name] - x for name, x in gradients[0].items()]) < share * length(gradients[0].values())


# --- nothing that makes a GPU wait -----------------------------------------------------------------------------------


@contextlib.contextmanager
def waits():
    """A list of the project's lines in which the CPU waits for the GPU while this is on."""
    found, ours = [], (ROOT, ROOT / "plumbing", ROOT / "tests")

    def note(message, *_):
        if "synchronizing" in str(message) and "prototype" not in str(message):
            frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent in ours]
            place = frames[-2] if frames[-1].name == "note" else frames[-1]
            found.append(f"{Path(place.filename).name}:{place.lineno}: {place.line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@only_on_gpu
def test_a_wait_is_seen(device):
    with waits() as found:
        assert float(torch.ones(1, device=device)) == 1
    assert found and found[0].startswith("test_gpu.py:")


STEPS = [(case, "--amp", "bf16") for case in CASES] + [("magma", "--amp", "fp16", "--clip", "1")]
STEPS += [("ebm_pretrain", "--task", "gridded"), ("finola masked_b", "--variant", "masked_e")]


@only_on_gpu
@pytest.mark.parametrize("case", STEPS, ids=" ".join)
def test_no_step_waits_for_the_gpu(case, device):
    """`update` on batches that are there, once two steps have warmed up; the loop itself reads the log now and then."""
    method, config = build(*case)
    method.to(device).train()
    stepper, batch = common.Stepper(method.optimizer(config), config, device), batch_of(method, config, device)
    for _ in range(2):
        method.update(method, [batch], stepper)
    with waits() as found:
        for _ in range(2):
            method.update(method, [batch], stepper)
    assert not found, "the CPU waits for the GPU here:\n" + "\n".join(dict.fromkeys(found))


@only_on_gpu
def test_no_batch_waits_for_the_gpu(device):
    data = shapes(64, 32)
    data = dataclasses.replace(data, images=data.images.to(device), labels=data.labels.to(device))
    batches = data.train_batches([(seed, torch.arange(16)) for seed in range(4)], 32)
    next(batches)
    with waits() as found:
        list(batches)
    assert not found, "the CPU waits for the GPU here:\n" + "\n".join(dict.fromkeys(found))


# --- what stands beside the methods ----------------------------------------------------------------------------------


def test_probes_give_what_they_give_on_a_cpu(device):
    """Accuracies to half a point, of 400 features; and the measures of clusters."""
    labels = torch.arange(600) % 5
    features = 4 * randn(5, 24)[labels] + 6 * randn(600, 24, seed=1)
    features, found = features.float(), []
    for name in ("cpu", device):
        x, y = features.to(name), labels.to(name)
        parts = x[:200], y[:200], x[200:], y[200:]
        wide = torch.cat([x, x.roll(1, 0).square(), randn(600, 200, seed=2).float().to(name)], dim=1)  # D > N
        row = [knn_accuracy(*parts), ridge_accuracy(*parts, 5)]
        row.append(ridge_accuracy(wide[:200], y[:200], wide[200:], y[200:], 5))
        found.append([*row, *(100 * value for value in (davies_bouldin(x, y), *class_cosines(x, y)))])
    assert 25 < min(found[0][:2]) and max(found[0][:2]) < 100
    assert found[1] == pytest.approx(found[0], abs=0.5)


def test_crops_are_within_the_image_and_drawn_by_a_seed(device):
    generators = [torch.Generator(device).manual_seed(seed) for seed in (0, 0, 1)]
    sides = torch.full((256,), 40.0, device=device), torch.full((256,), 30.0, device=device)
    boxes, again, others = (crop_boxes(*sides, (0.2, 1.0), generator=drawn) for drawn in generators)
    assert torch.equal(boxes, again) and not torch.equal(boxes, others)
    top, left, height, width = boxes.unbind(dim=1)
    assert (boxes >= 0).all() and (top + height <= 40.001).all() and (left + width <= 30.001).all()
    share, aspect = height * width / 1200, width / height
    assert (share > 0.199).all() and (share <= 1.001).all() and (aspect > 0.7499).all() and (aspect < 1.3334).all()
    assert share.std() > 0.15


def test_crops_of_the_same_draw_are_those_of_a_cpu(device):
    images = shapes(16, 40).images
    with draws_of_a_cpu():
        here, there = (
            random_resized_crop(images.to(name), 32, generator=generator(0)).cpu() for name in (device, "cpu")
        )
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
    assert here.min() >= 0 and here.max() <= 1
    torch.testing.assert_close(resize(images.to(device), 24).cpu(), resize(images, 24), rtol=0, atol=1e-5)


def test_images_of_files_arrive_as_they_are(device, tmp_path):
    """Through pinned memory, where there is a GPU."""
    write_folders(tmp_path)
    plan, batches = [(seed, torch.arange(6)) for seed in range(2)], []
    for name in ("cpu", device):
        data = read_folders(tmp_path, "train", device=name)
        batches.append([*data.train_batches(plan, 16, flip=0.0), *data.plain_batches(range(6), 16)])
    for (wanted, labels), (found, others) in zip(*batches, strict=True):
        assert found.device.type == others.device.type == device.type
        torch.testing.assert_close(found.cpu(), wanted)  # a GPU divides by 255 by a product
        assert torch.equal(others.cpu(), labels)


def test_a_finetuning_step_moves_encoder_and_head(device):
    """With RandAugment, erasing, mixup and cutmix, whose draws partly come from the CPU."""
    given = {"data": "x", "image_size": 32, "erase": 0.25, "drop_path": 0.1}
    encoder = vit(image_size=32, patch=8)
    config = settings_of("finetune", given, "magma", encoder.dim, 10**6)
    method = Classifier("finetune", encoder, LinearHeads(encoder.dim, 10), 10, config).to(device).train()
    stepper, before = common.Stepper(method.optimizer(config), config, device), state_of(method)
    images, labels = shapes(64, 32).images / 255, torch.arange(64) % 10
    torch.manual_seed(0)
    loss = method.update(method, [(images.to(device), labels.to(device))], stepper)["loss"]
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in state_of(method).values())
    moved = {name.split(".")[0] for name, x in state_of(method).items() if not torch.equal(x, before[name])}
    assert moved == {"encoder", "head"}
    pictures = method.pictures(images[:8].to(device))
    assert pictures.shape == (8, 5, 3, 32, 32) and pictures.isfinite().all()


def test_a_masked_autoencoder_takes_a_mask_of_its_device(device):
    """Prediction of the same mask, to 1e-4, with the fused attention of the device."""
    model = common.MaskedAutoencoder(vit(image_size=32, patch=8), 16, 1, 2, 0.5).eval()
    images, mask = rand(4, 3, 32, 32), common.random_mask(4, 16, 0.5, generator(0))
    wanted = model(images, mask).prediction
    found = model.to(device)(images.to(device), mask.to(device)).prediction
    assert relative_error(found, wanted) < 1e-4
