"""What the tests of several processes run: each function starts in every rank of a gloo group."""

import gc
import math
import os
import resource
import signal
import sys
import tempfile
import types
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

# A process that imports everything once, and of which each new process is a copy: real processes, in no time.
LATE = ["torch._dynamo", "torch._decomp.decompositions_for_jvp", "matplotlib.figure", "matplotlib.backends.backend_agg"]
FILES = [*ROOT.glob("plumbing/*.py"), *ROOT.glob("protocols/*.py")]
ROOMS = [f"{path.parent.name}.{path.stem}" for path in sorted(FILES)]
PRELOADED = ["processes", "make", "reference", "train", "evaluate", "pytest", *ROOMS, *LATE]
mp.get_context("forkserver").set_forkserver_preload(PRELOADED)


def start(function, *args, ranks=2):
    """Run function(*args) in each of several processes and return what each one returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (function, args, ranks, folder), nprocs=ranks, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _enter(rank, function, args, ranks, folder):
    gc.freeze()  # looking for garbage among all that was imported would copy it, page by page
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
    gc.freeze()
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


def train_with_fault(argv, hits, fault="", at=0, victim=-1):
    """train.py's command line on 40 small pictures; something goes wrong on one rank or (-1) on all; the exit code.

    After step `at`: kill (SIGKILL), die (exit code 9), SIGTERM, SIGINT, SIGUSR1, twice (Ctrl-C, and again), full (no
    more room on the disk), nan (a loss that is none). In the save number `at`: half (SIGKILL in the middle of a file).
    When a worker has decoded `at` images: group (SIGTERM to the process and its workers, as a cluster does).
    Each thing that takes another's place leaves a file "<rank> <name>" in the folder `hits` when it is called.
    """
    from make import narrow_networks, shapes

    import plumbing.images
    import plumbing.processes
    import plumbing.runs
    import train

    def hit(name):
        (Path(hits) / f"{plumbing.processes.rank()} {name}").touch()

    def load_data(name, root, split, image_size, device, **_):
        hit("load_data")
        return shapes(40, image_size, seed=split == "test")

    def decode(*args):
        decoded.append(1)
        if len(decoded) == at:
            hit(fault)
            os.killpg(0, signal.SIGTERM)
        return decode_image(*args)

    if "--data" not in argv:
        train.load_data = load_data
    train.write_report = lambda folder: None  # its charts would take as long as the run
    decoded, decode_image = [], plumbing.images.decode_image
    if fault == "group":
        os.setpgid(0, 0)
        plumbing.images.decode_image = decode
    add, save, saved = plumbing.runs.Meter.add, torch.save, []

    def later():
        hit("monotonic")
        return 1e9

    def add_and_fail(self, step, values):
        if step != at or victim not in (-1, plumbing.processes.rank()):
            return add(self, step, values)
        hit(fault)
        add(self, step, values | {"loss": values["loss"] * float("nan")} if fault == "nan" else values)
        if fault == "die":
            os._exit(9)
        elif fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        elif fault != "nan":
            number = {"kill": signal.SIGKILL, "twice": signal.SIGINT}.get(fault) or getattr(signal, fault)
            os.kill(os.getpid(), number)
            if fault == "twice":
                plumbing.processes.time = types.SimpleNamespace(monotonic=later)
                os.kill(os.getpid(), number)

    def save_half(state, file):
        saved.append(file)
        if len(saved) == at:
            hit(fault)
            os.write(file.fileno(), b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    if fault == "half":
        torch.save = save_half
    elif fault not in ("", "group"):
        plumbing.runs.Meter.add = add_and_fail
    with narrow_networks():
        return train.main(argv)


def data_of_two_disks(*places):
    """How many images the folder "set" has, or what refuses it, where each process works in a place of its own."""
    from plumbing.datasets import load_data
    from plumbing.errors import UserError

    os.chdir(places[dist.get_rank()])
    try:
        return len(load_data("set"))
    except UserError as error:
        return str(error)


def features_with_fault(argv, hits, fault, at):
    """evaluate.py's command line; where batch number `at` of features is to be written, kill (SIGKILL, after half of
    it) or full (no more room on the disk). A file named after the fault in the folder `hits` tells that it came."""
    import evaluate
    import protocols.features

    append, seen = protocols.features.append, []

    def append_and_fail(file, rows):
        seen.append(1)
        if len(seen) == at:
            (Path(hits) / fault).touch()
            if fault == "kill":
                os.write(file.fileno(), rows.tobytes()[: rows.nbytes // 2 + 3])
                os.kill(os.getpid(), signal.SIGKILL)
            size = os.fstat(file.fileno()).st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
        append(file, rows)

    protocols.features.append = append_and_fail
    return evaluate.main(argv)


def mine(x):
    """This rank's share of the rows of a global batch: ranks see different data, or the test could not fail."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def talk():
    """What the ways in which processes speak to each other give on this rank."""
    from plumbing.errors import OtherProcessFailed, UserError
    from plumbing.processes import agree, average, on_every_rank, on_rank_zero, rank

    def fail(error):
        raise error

    calls, errors, x = [], [], torch.tensor([1.0, 3.0]) * (rank() + 1)
    told = on_rank_zero(lambda: calls.append(1) or {"step": 7})
    for error in (UserError("a mistake"), KeyError("a fault")):
        try:
            on_rank_zero(lambda error=error: fail(error))
        except (UserError, KeyError, OtherProcessFailed) as found:
            errors.append(f"{type(found).__name__}: {found}")
    numbers = [agree(pair[rank()]) for pair in ((0, 0), (0, 15), (2, 0))]
    each = on_every_rank(lambda: {"rank": rank()})
    for error in (UserError("of the second"), KeyError("a fault")):
        try:
            on_every_rank(lambda error=error: fail(error) if rank() else 1)
        except (UserError, KeyError, OtherProcessFailed) as found:
            errors.append(f"{type(found).__name__}: {found}")
    found = {"told": told, "each": each, "calls": len(calls), "errors": errors, "mean": average(x), "x": x}
    return found | {"numbers": numbers}


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
    from plumbing.processes import gather

    local = [mine(x).clone().requires_grad_() for x in z]
    loss = coupled_loss(name, *(gather(x) for x in local))
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
    from make import tiny_magma

    method = tiny_magma(**fields)
    method.view = lambda views: views  # as they are
    accumulate = fields.get("accumulate", 1)
    model = torch.nn.parallel.DistributedDataParallel(method)

    parts = [list(x.chunk(accumulate)) for x in (mine(images), mine(mask))]
    call = lambda images, labels: model(images, mask=labels)  # the mask comes in the place of the labels
    call.no_sync = model.no_sync
    recorder = Recorder(method)
    method.update(call, list(zip(*parts, strict=True)), recorder)
    return recorder.gradients


def fit_tiny(out, flags):
    """Train through `fit` on this rank; returns the weights."""
    from make import fit_magma

    method, results = fit_magma(out, *flags)
    return {"weights": method.state_dict(), "rows": len(results)}


def fit_without_labels(out, flags):
    """What `fit` returns of Magma on built-in pictures without labels."""
    from make import fit_magma, unlabelled

    return fit_magma(out, *flags, data=unlabelled())[1]


def evaluate_main(argv):
    """Run evaluate.py's command line on this rank, in the group that is already there; returns the exit code."""
    import evaluate

    evaluate.evaluate(argv)
    return 0


def gradients_of_mixedae(images, assignment):
    """The gradients that DDP leaves behind after one backward of MixedAE on this rank's share of the groups."""
    from make import tiny_mixedae

    method = tiny_mixedae()
    model = torch.nn.parallel.DistributedDataParallel(method)
    model(mine(images), assignment=mine(assignment))["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters()}


def gradients_of_finola(images, fields):
    """The gradients that DDP leaves behind after one backward of FINOLA on this rank's share of the images."""
    from make import tiny_finola

    method = tiny_finola(**fields).double()
    model = torch.nn.parallel.DistributedDataParallel(method)
    model(mine(images))["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters()}


def gradients_of_energy(images):
    """A step of the energy under DDP, in two accumulated parts of this rank's share: gradients, log alpha, and how
    often gradients were averaged.
    """
    from make import tiny_energy
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    method, averaged = tiny_energy(task="super_resolution"), []
    model = torch.nn.parallel.DistributedDataParallel(method)
    model.register_comm_hook(None, lambda _, bucket: averaged.append(bucket.is_last()) or allreduce_hook(None, bucket))

    recorder = Recorder(method)
    method.update(model, [(part, None) for part in mine(images).chunk(2)], recorder)
    return recorder.gradients | {"alpha": method.log_alpha.item(), "averaged": sum(averaged)}


def fit_detector(out, flags):
    """The protocol `detect` on a few scenes, in this rank of several or alone: weights at its start and end, results.

    Then, by its probe, the AP of answers that are near the truth, of five pictures and of one, and of answers that are
    not finite but on rank 0. A batch norm, whose mean is this rank, stands beside the network.
    """
    from unittest import mock

    from make import vit

    from plumbing.boxes import scenes_with_boxes
    from plumbing.processes import rank
    from protocols import detect
    from protocols.rows import Subject
    from protocols.settings import settings_of

    def small(shapes, classes, config):
        return detect.PlainDecoder(16, classes, config.queries, depth=1, width=16)

    def made(*given):
        methods.append(detector(*given))
        start.update({name: x.clone() for name, x in methods[0].state_dict().items()})
        return methods[0]

    def near(images, targets):
        """The truth, some of it lost, moved or of another class, by what is in the picture."""
        draw = torch.frac(images.mean(dim=(1, 2, 3))[:, None] * 1e4 + torch.arange(targets.labels.shape[1]) * 0.37)
        labels = torch.where((targets.labels < 0) | (draw < 0.2), 10, (targets.labels + (draw > 0.9)) % 10)
        logits = (1 + 3 * draw)[..., None] * torch.nn.functional.one_hot(labels, 11)
        return logits[None], (targets.boxes + 0.04 * draw[..., None] * targets.boxes)[None]

    train, test = scenes_with_boxes(8, 16), scenes_with_boxes(5, 16, seed=1)
    given = {"image_size": 16, "data": "scenes", "out": str(out), "amp": "off"} | flags
    config, encoder = settings_of("detect", given, "magma", 16, len(train)), vit(image_size=16).eval()
    subject = Subject("trained", encoder, train, test, torch.device("cpu"))
    methods, start, detector = [], {}, detect.Detector
    with mock.patch.multiple(detect, make_decoder=small, Detector=made):
        found = detect.run_detect(subject, config)
    (method,) = methods
    method.answers, method.norm = near, torch.nn.BatchNorm1d(2)
    method.norm.running_mean += rank()
    five = method.probe(None, train, test, config, shared=True)
    one = method.probe(None, train, scenes_with_boxes(1, 16, seed=2), config, shared=True)
    if rank():
        method.answers = lambda *x: tuple(math.nan * y for y in near(*x))
    nothing = method.probe(None, train, test, config, shared=True)
    results = {"found": found, "five": five, "one": one, "nothing": nothing}
    return results | {"start": start, "weights": method.state_dict()}


def fit_energy(flags, stop_after=0):
    """Train an energy through `fit`, on this rank of several or alone; returns the weights."""
    from make import shapes

    import ebm_pretrain
    from common import fit
    from plumbing.settings import read_flags

    config, data = read_flags(ebm_pretrain.Config, {}, flags), shapes(32, 16, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(config.seed)
    method = ebm_pretrain.EnergyPretraining(config, data)
    if stop_after:

        def start_epoch(epoch):
            if epoch == stop_after:
                raise KeyboardInterrupt

        method.start_epoch = start_epoch
    fit(method, data, data, config)
    return method.state_dict()


def gradients_of_levels(images, labels, fields):
    """The gradients of every level of one cycle on this rank's share of each level's batch."""
    from make import LevelRecorder, tiny_levels

    method = tiny_levels(unrolling=1, **fields)
    recorder = LevelRecorder(method)
    parts = [torch.cat([mine(part) for part in x.split(4)]) for x in (images, labels)]
    method.update(method, [tuple(parts)], recorder)
    return {name: gradient for step in recorder.steps for name, gradient in step.items()}
