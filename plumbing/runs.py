"""A run: begin, log, save, stop, go on."""

import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from plumbing.crops import mix_seed
from plumbing.encoders import check_encoder, save_encoder
from plumbing.errors import NonFiniteLoss, Stopped, UserError, printable, what_is_left
from plumbing.files import append_line, json_text, load_checkpoint, write_atomically
from plumbing.images import FolderImages, shuffled
from plumbing.pictures import check_drawing, save_pictures
from plumbing.probes import pooled_features, probe, raw_pixels
from plumbing.processes import agree, by_itself, note, noted_signals, on_rank_zero, rank, world_size
from plumbing.run_files import (
    identity_of,
    lock_run,
    log_header,
    measured,
    open_run,
    refuse_among_pictures,
    rewind_log,
    run_folder,
    write_settings,
)
from plumbing.settings import TrainConfig

SHOWN = ("loss", "knn", "linear", "accuracy", "miou", "AP50", "held_out_loss", "effective_rank")  # at each probe


class Meter:
    """Means of logged scalars over an epoch, read from the device every few steps: each read waits for it."""

    def __init__(self, sums: dict | None = None, count: int = 0):
        self.sums, self.count, self.waiting = dict(sums or {}), count, []

    def add(self, step: int, values: dict):
        self.waiting.append((step, values))

    def flush(self, checkpoint: Path):
        """Fold in what waits, averaged over the processes; raise NonFiniteLoss where the loss is not finite."""
        if not self.waiting:
            return
        names = list(self.waiting[0][1])
        table = torch.stack([torch.stack([values[name] for name in names]) for _, values in self.waiting])
        if world_size() > 1:  # one bad rank stops all, at the same step
            dist.all_reduce(table)
            table /= world_size()
        for (step, _), row in zip(self.waiting, table.tolist(), strict=True):
            if not math.isfinite(row[names.index("loss")]):
                terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, row, strict=True))
                raise NonFiniteLoss(f"step {step}: {terms}; {what_is_left(checkpoint)}")
            for name, value in zip(names, row, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
        self.waiting = []

    def means(self) -> dict:
        return {name: total / max(1, self.count) for name, total in self.sums.items()}


def restore_run(method, stepper, out: Path, first_step: int) -> tuple[Meter, float | None]:
    """Put back weights, optimiser and loss scaler of a checkpoint; returns the sums of its unfinished epoch, and the
    seconds of training so far, None where an older run did not count them.
    """
    state = load_checkpoint(out / "last.pt")
    total = stepper.config.epochs * stepper.steps
    if first_step > total:
        raise UserError(f"{out / 'last.pt'} is at step {first_step} of {total}; choose another folder by --out")
    if state["step"] != first_step:
        raise UserError(f"{out / 'last.pt'} is at step {state['step']} here, at step {first_step} on process 0")
    try:
        method.load_state_dict(state["weights"])
        stepper.optimizer.load_state_dict(state["optimizer"])
        stepper.scaler.load_state_dict(state["scaler"])
        sums = {name: float(value) for name, value in state["sums"].items()}
        return Meter(sums, int(state["count"])), state.get("seconds")
    except torch.OutOfMemoryError:
        raise  # `run_command` says what to do
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{out / 'last.pt'} does not fit this version ({reason}); choose another folder by --out"
        ) from None


class Run:
    """A run folder while it is written: locked, begun or gone on with, logged, saved, and stopped by a signal.

    To be used as a context. `method` and `stepper` are a `common.Method` and a `common.Stepper`. `first_step` is the
    step to go on from, 0 for a new run.
    Raises UserError where the folder is taken or holds another run.
    """

    def __init__(self, method, stepper, train, test, config):
        self.method, self.stepper, self.config, self.steps = method, stepper, config, stepper.steps
        self.train, self.test, self.device = train, test, stepper.device
        if config.crop_pad and isinstance(train, FolderImages):
            raise UserError(f"--crop-pad {config.crop_pad} is for images of one size in memory, not for files; give 0")
        self.out = run_folder(method.name, config)
        self.identity = identity_of(method, train, config, stepper)
        self.read_back = False  # whether what was saved has been read again, once a run
        self.often = 1 if self.device.type == "cpu" else 10  # steps between two readings of the device: each waits

    def __enter__(self):
        config, out = self.config, self.out
        with contextlib.ExitStack() as stack:

            def lock():  # of process 0
                if config.probe_every:
                    check_drawing()  # before there is a folder
                refuse_among_pictures(out, config)
                stack.enter_context(lock_run(out, config.resume))

            on_rank_zero(lock)
            self.signals = stack.enter_context(noted_signals())
            listing = getattr(self.train, "listing", b"")
            mine = [out / name for name in ("config.json", "log.jsonl", "images.tsv", "pictures.png")]
            self.to_remove = [] if any(path.exists() for path in mine) else mine
            self.first_step = on_rank_zero(lambda: open_run(out, self.identity, config, listing))
            stack.push(self.leave_no_trace)
            self.meter, self.log, epoch, self.seconds = Meter(), [], self.first_step // self.steps, 0.0
            if self.first_step:
                self.meter, self.seconds = restore_run(self.method, self.stepper, out, self.first_step)
                header = log_header(self.identity, config)
                self.log = on_rank_zero(lambda: rewind_log(out / "log.jsonl", epoch, header))
            total, batch = config.epochs * self.steps, config.batch_size
            if rank() == 0:
                print_start(self.method, self.train, config, self.stepper, out, epoch, self.steps)
            watched = None if rank() == 0 else True  # None: only where a person is watching
            bar = tqdm(
                total=total * batch, initial=self.first_step * batch, unit="img", unit_scale=True, disable=watched
            )
            self.bar = stack.enter_context(bar)
            if rank() == 0:
                if self.first_step:
                    self.save_weights()  # a kill may have come just before
                    write_settings(out, self.method.name, config)
                if self.first_step == total:
                    print("the run is finished: nothing is left to do")
                if not self.log or self.log[-1]["epoch"] < epoch:
                    self.log_epoch(epoch, **self.so_far())  # or a kill came between a checkpoint and its line
            if self.first_step % self.steps == 0:  # its sums were those of a finished epoch, for the line in the log
                self.meter = Meter()
            self.started, self.done = time.perf_counter(), 0
            self.closing = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.closing.__exit__(*error)
        if self.signals and error[0] is None:  # after the last step; what follows must not swallow it
            name = signal.Signals(self.signals[0]).name
            raise Stopped(f"stopped by {name} after the last step; --resume goes on", self.signals[0])

    def leave_no_trace(self, _, error, __):
        """A start that is refused before its first step is not in the way of the next."""
        if isinstance(error, UserError) and rank() == 0:
            for path in self.to_remove:
                path.unlink(missing_ok=True)

    def note(self, step: int, values: dict):
        """What a step made: scalars to log. Raises NonFiniteLoss, and Stopped after a signal, when all is saved."""
        self.to_remove = []
        self.meter.add(step, values)
        self.done += self.config.batch_size
        if step % self.often == 0:
            self.meter.flush(self.out / "last.pt")
        asked = step % self.often == 0 or world_size() == 1
        if asked and (number := agree(self.signals[0] if self.signals else 0, self.device)):
            self.stop(step + 1, number)
        if step % 10 == 0:
            loss, rate = self.meter.means()["loss"], self.stepper.rate(step)
            self.bar.set_postfix(epoch=step // self.steps + 1, loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self.bar.update(self.config.batch_size)

    def end_epoch(self, epoch: int):
        """Save, probe, draw and log an epoch that is over, counted from 1. Raises NonFiniteLoss."""
        self.meter.flush(self.out / "last.pt")
        self.check_weights(epoch * self.steps - 1)
        if rank() == 0:
            speed = round(self.done / (time.perf_counter() - self.started))
            self.count_time()
            if epoch % self.config.save_every == 0 or epoch == self.config.epochs:
                self.save(epoch * self.steps)  # before the probe, which may fail
            self.log_epoch(epoch, images_per_second=speed, **self.so_far())
        self.meter, self.started, self.done = Meter(), time.perf_counter(), 0

    def count_time(self):
        """Add what has passed since it was counted last, without probes, to the seconds of training."""
        now = time.perf_counter()
        self.seconds = None if self.seconds is None else self.seconds + now - self.started
        self.started = now

    def so_far(self) -> dict:
        """The seconds of training for the log: over all starts, of a run that counted them from its first step."""
        return {"seconds": round(self.seconds, 2)} if self.seconds else {}

    def results(self) -> dict:
        """What was measured (`measured`)."""
        started = bool(getattr(self.config, "start", ""))
        return measured(on_rank_zero(lambda: self.log), bool(len(self.train.classes)), started)

    def log_epoch(self, epoch: int, **extra):
        """One line of the log, with probes and pictures where they are due; epoch 0 is the untrained encoder."""
        config, method = self.config, self.method
        line = {"epoch": epoch, **self.meter.means()}
        line |= ({"lr": self.stepper.rate(epoch * self.steps - 1)} if epoch else {}) | extra
        if config.probe_every and (epoch == config.epochs or epoch % config.probe_every == 0):
            method.eval()
            line |= method.probe(self.encode, self.train, self.test, config)
            if not len(self.train.classes):
                line["held_out_loss"] = self.held_out_loss()
            if epoch == 0 and "knn" in line:
                line["pixels"] = probe(raw_pixels, self.train, self.test, config.image_size, config.probe_images)
            some, _ = next(iter(self.test.plain_batches(range(min(8, len(self.test))), config.image_size)))
            torch.manual_seed(config.seed)
            with torch.no_grad(), self.stepper.autocast():
                rows = method.pictures(some)
            save_pictures(rows, self.out / "pictures.png", method.captions)
            method.train()
        self.log.append(line)
        append_line(self.out / "log.jsonl", json_text(line))
        shown = {name: line[name] for name in SHOWN if line.get(name) is not None}
        if len(shown) > 1 or (shown and self.bar.disable):
            shown = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            tqdm.write(f"epoch {epoch}/{config.epochs}  {shown}")

    def held_out_loss(self) -> float:
        """The loss on at most 512 pictures that are not trained on, cropped, mixed and masked the same way each time.

        In batches as large as those of training in one process, since a loss may depend on their size: a few pictures
        come several times.
        """
        config, method, losses = self.config, self.method, []
        method.start_epoch(config.epochs - 1)  # the loss of the last epoch, whichever it is now
        size = min(config.batch_size // config.accumulate, 512)
        size -= size % getattr(method, "group", 1)  # MixedAE mixes groups of so many
        order = shuffled(len(self.test), max(1, min(512, len(self.test)) // size) * size, config.seed)
        plan = [(mix_seed(config.seed, i, 4), part) for i, part in enumerate(order.split(size))]
        batches = self.test.train_batches(plan, config.image_size, config.crop, config.flip, method.views)
        for (seed, _), (images, labels) in zip(plan, batches, strict=True):
            torch.manual_seed(seed)
            with torch.no_grad(), self.stepper.autocast(), by_itself():
                losses.append(method(images, labels)["loss"].float())
        return float(torch.stack(losses).mean())

    def encode(self, images: Tensor) -> Tensor:
        with self.stepper.autocast():
            return pooled_features(self.method.encoder, images)

    def save(self, step: int):
        """Write last.pt, all that is needed to go on from a step, and encoder.pt."""
        state = {"identity": self.identity, "step": step, "sums": self.meter.sums, "count": self.meter.count}
        state |= {"weights": self.method.state_dict(), "optimizer": self.stepper.optimizer.state_dict()}
        state |= {"scaler": self.stepper.scaler.state_dict()}
        state |= {"seconds": self.seconds}
        write_atomically(self.out / "last.pt", lambda file: torch.save(state, file))
        self.save_weights()

    def save_weights(self):
        write_atomically(self.out / "encoder.pt", lambda file: save_encoder(self.method.encoder, file))
        if not self.read_back:
            load_checkpoint(self.out / "last.pt")
            check_encoder(self.out / "encoder.pt")
            self.read_back = True

    def check_weights(self, step: int):
        """A loss that is finite may have a gradient that is not."""
        if not all(bool(p.isfinite().all()) for p in self.method.parameters()):
            raise NonFiniteLoss(f"step {step}: the weights are not finite; {what_is_left(self.out / 'last.pt')}")

    def stop(self, done: int, number: int):
        """What a signal asks for: a checkpoint, and one line on how to go on."""
        self.meter.flush(self.out / "last.pt")
        self.count_time()
        self.check_weights(done - 1)
        on_rank_zero(lambda: self.save(done))
        self.bar.close()
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name} after {done} steps; go on with the same command and --resume", number)


def print_start(method, train, config: TrainConfig, stepper, out: Path, epoch: int, steps: int):
    """What is about to run, so that a wrong setting is seen in the first second."""
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (method, method.encoder)]
    device, precision = stepper.device, str(stepper.dtype or torch.float32).removeprefix("torch.")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    peak = max(stepper.rate(step) for step in (0, min(config.warmup_epochs * steps, config.epochs * steps - 1)))
    print(f"method      {method.name}: {millions[0]:.2f} M parameters, encoder {millions[1]:.2f} M")
    data = printable(config.data)
    print(f"data        {data}: {len(train)} images, {len(train.classes) or 'no'} classes, size {config.image_size}")
    print(f"device      {device} ({place}), {precision}, {world_size()} process(es)")
    print(f"batch       {config.batch_size} images, {config.accumulate} part(s); learning rate {peak:.3g}")
    print(f"epochs      {epoch} of {config.epochs} done, {steps} steps each; writes {printable(str(out))}")
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    shown = "  ".join(f"{name}={value}" for name, value in own.items() if name not in TrainConfig.__dataclass_fields__)
    print(f"settings    {shown}", flush=True)
    for text in config.notes():
        note(text)
    taken = len(train) // config.batch_size * config.batch_size
    if taken == steps * config.batch_size and taken < 0.9 * len(train):  # a method may count its epochs otherwise
        note(f"an epoch takes {taken} of {len(train)} images, each time others; a smaller --batch-size can take more")
