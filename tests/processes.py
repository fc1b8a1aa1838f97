"""What the tests of several processes run: each function starts in every rank of a gloo group."""

import gc
import os
import resource
import signal
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


# A process that imports everything once, and of which each new process is a copy: real processes, in no time.
LIBRARIES = ["reference", "pytest", "torch._dynamo", "torch._decomp.decompositions_for_jvp"]  # torch imports these late
METHODS = ["ebm_pretrain", "finola", "magma", "mixedae", "mlo_mae", "evaluate"]
mp.get_context("forkserver").set_forkserver_preload(["processes", *LIBRARIES, *METHODS])


def start(function, *args, ranks=2):
    """Run function(*args) in each of several processes and return what each one returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (function, args, ranks, folder), nprocs=ranks, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _enter(rank, function, args, ranks, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", DeprecationWarning)  # as in conftest.py
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    gc.collect()  # what still holds the group, before the group goes
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes outlive the group, and then abort an interpreter that leaves in order


def ends(function, *args, ranks=1):
    """As `start`, for functions that may not come back: each process's exit code (-9 if it was killed) and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        started = [context.Process(target=_end, args=(rank, function, args, ranks, folder)) for rank in range(ranks)]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout=120)
        assert all(process.exitcode is not None for process in started), "a process hangs"
        texts = [(Path(folder) / f"{rank}.err").read_text() for rank in range(ranks)]
        return [process.exitcode for process in started], texts


def _end(rank, function, args, ranks, folder):
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder) / f"{rank}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of the processes that decode images, as outside the tests
    if ranks > 1:
        os.environ["RANK"] = str(rank)
        store = dist.FileStore(str(Path(folder) / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    code = function(*args)
    sys.stderr.flush()
    os._exit(code)


def train_with_fault(argv, fault="", at=0, victim=-1):
    """train.py's command line on 40 small pictures; something goes wrong on one rank or (-1) on all; the exit code.

    After step `at`: kill (SIGKILL), die (exit code 9), SIGTERM, SIGINT, SIGUSR1, twice (Ctrl-C, and again), full (no
    more room on the disk), nan (a loss that is none). In the save number `at`: half (SIGKILL in the middle of a file).
    When a worker has decoded `at` images: group (SIGTERM to the process and its workers, as a cluster does).
    """
    import common
    import train

    def load_data(name, root, split, image_size, device, **_):
        images, labels, masks = common.render_shapes(40, image_size, seed=split == "test")
        return common.MemoryImages(images, labels, list(common.SHAPES), (0.4,) * 3, (0.3,) * 3, masks)

    def decode(*args):
        decoded.append(1)
        if len(decoded) == at:
            os.killpg(0, signal.SIGTERM)
        return decode_image(*args)

    if "--data" not in argv:
        common.load_data = load_data
    decoded, decode_image = [], common.decode_image
    if fault == "group":
        os.setpgid(0, 0)
        common.decode_image = decode
    real, save, saved = common.Meter.add, torch.save, []

    def add(self, step, values):
        here = step == at and victim in (-1, common.rank())
        if here and fault == "nan":
            values = values | {"loss": values["loss"] * float("nan")}
        real(self, step, values)
        if here and fault in ("kill", "SIGTERM", "SIGINT", "SIGUSR1", "twice"):
            number = {"kill": signal.SIGKILL, "twice": signal.SIGINT}.get(fault) or getattr(signal, fault)
            os.kill(os.getpid(), number)
            if fault == "twice":
                common.time.monotonic = lambda: 1e9  # much later
                os.kill(os.getpid(), number)
        if here and fault == "die":
            os._exit(9)
        if here and fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def half(state, file):
        saved.append(file)
        if len(saved) == at:
            os.write(file.fileno(), b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    common.Meter.add, torch.save = add, half if fault == "half" else save
    return train.main(argv)


def mine(x):
    """This rank's share of the rows of a global batch: ranks see different data, or the test could not fail."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def coupled_loss(name, a, b):
    """A loss of two views that couples the images of a batch."""
    import magma

    losses = {
        "manifold": magma.manifold_loss,
        "uniformity": lambda a, b: magma.uniformity_loss(a) + 2 * magma.uniformity_loss(b),
        "contrastive": magma.contrastive_loss,
        "vicreg": magma.vicreg_loss,
        "sum": lambda a, b: (a + b).square().sum(),  # one gradient tensor goes back to both
    }
    return losses[name](a, b)


def gradient_of_gathered_loss(name, z):
    """The mean over the ranks of the gradient that each one's rows get, put in rank order: (B, ...) like z."""
    import common

    local = [mine(x).clone().requires_grad_() for x in z]
    loss = coupled_loss(name, *(common.gather(x) for x in local))
    loss.backward()
    share = torch.stack([x.grad for x in local]) / dist.get_world_size()  # DDP would divide the parameters' gradients
    parts = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, share)
    return {"loss": loss.detach(), "gradient": torch.cat(parts, dim=1)}


class Recorder:
    """A Stepper whose step keeps the gradients instead of using them."""

    def __init__(self, method):
        self.method = method

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.method.named_parameters() if p.requires_grad}


def gradients_of_magma(fields, images, mask):
    """One step of Magma under DDP on this rank's share of the images: the gradients that DDP leaves behind."""
    import test_magma

    method = test_magma.tiny(**fields)
    accumulate = fields.get("accumulate", 1)
    model = torch.nn.parallel.DistributedDataParallel(method)

    parts = [list(x.chunk(accumulate)) for x in (mine(images), mine(mask))]
    call = lambda images, labels: model(images, mask=labels)  # the mask comes in the place of the labels
    call.no_sync = model.no_sync
    recorder = Recorder(method)
    method.update(call, list(zip(*parts, strict=True)), recorder)
    return recorder.gradients


def fit_tiny(folder, flags):
    """Train through `fit` on this rank; returns the weights."""
    import test_train

    import common
    import magma

    config = common.read_flags(magma.Config, magma.RECIPES, flags)
    torch.manual_seed(config.seed)
    method = magma.Magma(config, test_train.DATA)
    results = common.fit(method, test_train.DATA, test_train.DATA, config)
    return {"weights": method.state_dict(), "rows": len(results)}


def evaluate_main(argv):
    """Run evaluate.py's command line on this rank, in the group that is already there; returns the exit code."""
    import evaluate

    evaluate.evaluate(argv)
    return 0


def gradients_of_mixedae(images, assignment):
    """The gradients that DDP leaves behind after one backward of MixedAE on this rank's share of the groups."""
    import test_mixedae

    method = test_mixedae.tiny()
    model = torch.nn.parallel.DistributedDataParallel(method)
    model(mine(images), assignment=mine(assignment))["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters()}


def gradients_of_energy(images):
    """The gradients of a step of the energy under DDP, in two accumulated parts of this rank's share; and log alpha."""
    import test_ebm_pretrain

    method = test_ebm_pretrain.tiny(task="super_resolution")
    model = torch.nn.parallel.DistributedDataParallel(method)

    recorder = Recorder(method)
    method.update(model, [(part, None) for part in mine(images).chunk(2)], recorder)
    return recorder.gradients | {"alpha": method.log_alpha.item()}


def fit_energy(flags, stop_after=0):
    """Train an energy through `fit`, on this rank of several or alone; returns the weights."""
    import common
    import ebm_pretrain

    config = common.read_flags(ebm_pretrain.Config, {}, flags)
    images, labels, _ = common.render_shapes(32, 16)
    data = common.MemoryImages(images, labels, list("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(config.seed)
    method = ebm_pretrain.EnergyPretraining(config, data)
    if stop_after:

        def start_epoch(epoch):
            if epoch == stop_after:
                raise KeyboardInterrupt

        method.start_epoch = start_epoch
    common.fit(method, data, data, config)
    return method.state_dict()


def gradients_of_levels(images, labels, fields):
    """The gradients of every level of one cycle on this rank's share of each level's batch."""
    import test_mlo_mae

    method = test_mlo_mae.tiny(unrolling=1, **fields)
    recorder = test_mlo_mae.Recorder(method)
    parts = [torch.cat([mine(part) for part in x.split(4)]) for x in (images, labels)]
    method.update(method, [tuple(parts)], recorder)
    return {name: gradient for step in recorder.steps for name, gradient in step.items()}
