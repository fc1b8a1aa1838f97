"""The fair table: every method on the same pictures, with an encoder of one size, several seeds.

python tests/study.py costs --root DIR                   CPU seconds of a step of each row, once, into costs.json
python tests/study.py table --root DIR                   equal passes over the pictures: trains and judges all rows
python tests/study.py table --root DIR --equal seconds   equal CPU seconds: those of MAE
python tests/study.py write                              both tables and the chart into docs/results.md; study.json
python tests/study.py table --root DIR --rows mae umae --seeds 0   some of it; other flags go to every training

DIR holds CIFAR-10's cifar-10-batches-bin, of any number of pictures. A run is a folder ROW-seedS in --out, as train.py
makes them (with ROW-Eepochs-seedS where equal seconds ask for other epochs). Stopped, by Ctrl-C or a kill, the same
command goes on; finished runs are left as they are. Several commands in one --out share the runs among them. `write`
puts what it needs of each finished run into study.json, beside the page. From there it takes runs that are not in --out
any more, and `table` the costs: so another seed can be added later, on another machine, by `table --seeds 2` without
`costs` before it (these could ask for other epochs).
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several commands share a machine best so
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench import in_turn
from study_page import Entry, machine, read_record, result_of, write_page, write_record

import evaluate
import train
from common import METHODS, Stepper, load_data
from plumbing.asked import read_configs
from plumbing.command import run_command
from plumbing.datasets import find_home
from plumbing.errors import NonFiniteLoss, UserError
from plumbing.files import json_text, write_atomically
from plumbing.processes import note, start_distributed
from plumbing.run_files import lock_run, versions
from plumbing.settings import Parser

ROOT = Path(__file__).resolve().parents[1]
load_once = functools.cache(load_data)  # the training pictures, for all rows


class Row(NamedTuple):
    """A row of the table. `passes`: how often an epoch of its loop shows the pictures to the encoder."""

    title: str
    method: str
    flags: str
    passes: float = 1

    def epochs(self, passes: int) -> int:
        return max(1, round(passes / self.passes))


# Each method's recipe for CIFAR-10 on a laptop holds where no flag is given here: learning rates, betas, decays, what
# is probed (the mean of the patches, of MLO-MAE the CLS token), bf16 where the processor has it.
COMMON = "--data cifar10 --crop-min 0.2 --warmup-epochs {warmup}"  # crops as MAE's; others' recipes had 0.3 and 0.5
VIT = "--model vit_micro --patch 4 --image-size 32"
DECODER = VIT + " --decoder-dim 64 --decoder-depth 2 --decoder-heads 4"  # MLO-MAE's recipe had 96 and 3 heads
# MAGMA's term falls with the batch as 1 / B: its weight of 1 in the paper is for 256 images. B / 256 is as strong.
# It acts from a sixth of the run on, for two thirds of it, as in the recipe of 30 epochs.
TERM_64, TERM_128 = (f"--lam {lam} --e-st {{start}} --e-dur {{lasts}}" for lam in (64 / 256, 128 / 256))
# An epoch of MLO-MAE is one pass of level II over 80 % of the pictures (the rest is level III's), and for each step of
# it the recipe has five of level I, which pretrains: 5 x 0.8 passes.
LEVELS = 4.0
ROWS = {  # from cheap to dear
    "mae": Row("MAE", "magma", f"{DECODER} --lam 0"),
    "umae": Row("U-MAE", "magma", f"{DECODER} --lam 0 --uniformity 0.01"),  # U-MAE's weight
    "m-mae": Row("M-MAE (MAGMA)", "magma", f"{DECODER} {TERM_64}"),
    "mu-mae": Row("MU-MAE", "magma", f"{DECODER} {TERM_64} --uniformity 0.01"),
    "mixedae": Row("MixedAE", "mixedae", DECODER),
    "naive": Row("naive mixing", "mixedae", f"{DECODER} --attention global --segment off --contrast 0"),  # Table A4a
    "mlo-mae": Row("MLO-MAE", "mlo_mae", DECODER, LEVELS),
    # FINOLA has its own encoder, Mobile-Former, which takes the pictures at twice their side.
    "finola-e": Row("Masked FINOLA-E", "finola", "--width micro --image-size 64 --variant masked_e"),
    "finola-b": Row("Masked FINOLA-B", "finola", "--width micro --image-size 64 --variant masked_b"),
    "blo-mae": Row("BLO-MAE", "mlo_mae", f"{DECODER} --objective blo", LEVELS),
    "simclr": Row("SimCLR", "magma", f"{VIT} --ssl simclr --lam 0"),  # batches of 128: its recipe's
    "m-simclr": Row("M-SimCLR", "magma", f"{VIT} --ssl simclr {TERM_128}"),
    "vicreg": Row("VICReg", "magma", f"{VIT} --ssl vicreg --lam 0"),
    "m-vicreg": Row("M-VICReg", "magma", f"{VIT} --ssl vicreg {TERM_128}"),
    "finola": Row("FINOLA", "finola", "--width micro --image-size 64"),
    "energy": Row("energy, mixed tasks", "ebm_pretrain", f"{VIT} --task mixed"),
    "energy-sr": Row("energy, super-resolution", "ebm_pretrain", f"{VIT} --task super_resolution"),  # its best task
}
UNTRAINED = {"mae": "untrained", "finola-e": "untrained, FINOLA's"}  # whose encoders before training have a row too
EPOCHS = 60  # of MAE
# The fine-tuning of docs/results.md, on a tenth of the labels: its rate of 2e-3 (4e-3 for a batch of 128), but
# batches of 32, since there are few pictures, and 10 epochs, a minute. One recipe for all, MAE's.
FINETUNE = "--data cifar10 --recipe mae --epochs 10 --batch-size 32 --warmup-epochs 2 --crop-min 0.4 --randaugment 0"
FINETUNE += " --mixup 0 --cutmix 0 --drop-path 0 --base-lr 16e-3"  # Mobile-Former has no drop path


def epochs_of(name: str, asked, costs: dict) -> int:
    """Epochs of a row: those of equal passes over the pictures, or of as many CPU seconds as MAE takes for them.

    Costs a tenth apart or less count as the same: they are measured no better.
    """
    ratio = costs["mae"]["epoch"] / costs[name]["epoch"] if asked.equal == "seconds" else 0
    if not ratio or abs(ratio - 1) <= 0.1:
        return ROWS[name].epochs(asked.epochs)
    return max(1, round(asked.epochs * ratio))


def folder_of(name: str, seed: int, asked, costs: dict) -> Path:
    """The run folder. Both tables share a run where they ask for the same epochs."""
    epochs, usual = epochs_of(name, asked, costs), ROWS[name].epochs(asked.epochs)
    return Path(asked.out) / f"{name}{f'-{epochs}epochs' * (epochs != usual)}-seed{seed}"


def flags_of(name: str, epochs: int, asked) -> list:
    """What stands behind `train.py METHOD`: the common flags, the row's, then the command's own."""
    parts = {"warmup": round(epochs / 15), "start": round(epochs / 6), "lasts": max(1, round(epochs * 2 / 3))}
    words = f"{COMMON} {ROWS[name].flags}".format(**parts).split()
    words += ["--epochs", str(epochs), "--probe-every", str(max(1, epochs // 6)), "--root", asked.root]
    return words + asked.rest


def step_of(name: str, asked):
    """A function that makes a step of a row as `common.fit` does, where MAGMA's term acts; the steps of an epoch."""
    module = importlib.import_module(ROWS[name].method)
    config = read_configs(ROWS[name].method, module.Config, module.RECIPES, flags_of(name, asked.epochs, asked))[0]
    device = start_distributed(config.device)
    data = load_once(config.data, root=config.root, device=device)
    torch.manual_seed(0)
    method = getattr(module, METHODS[ROWS[name].method])(config, data).to(device).train()
    method.start_epoch(config.epochs // 2)
    plan = method.plan(len(data), config)
    stepper = Stepper(method.optimizer(config), config, device, len(plan))
    stepper.set_rate(len(plan))
    view = config.image_size, config.crop, config.flip, method.views
    batches = itertools.chain.from_iterable(data.train_batches(plan.after(0), *view) for _ in itertools.count())
    return lambda: method.update(method, [next(batches)], stepper), len(plan)


def measure(asked):
    """Write costs.json: CPU seconds (the clock's on a GPU) of a row's step and epoch. Raises UserError where it is."""
    path = Path(asked.out) / "costs.json"
    if path.exists():
        raise UserError(f"{path} is there, and runs may rest on it; remove it to measure anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    steps, costs = {name: step_of(name, asked) for name in asked.rows}, {}
    # Five steps at a time, since MLO-MAE's masks learn in every fifth.
    found = in_turn(*(step for step, _ in steps.values()), rounds=asked.rounds, times=5)
    for (name, (_, count)), kept in zip(steps.items(), found, strict=True):
        costs[name] = {"step": statistics.median(kept), "epoch": statistics.median(kept) * count}
        print(f"{name:<12}{costs[name]['step']:9.3f} s a step{costs[name]['epoch']:9.1f} s an epoch")
    text = json_text({"rows": costs, "machine": machine(), "versions": versions()}, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_costs(asked) -> dict:
    """{row: {"epoch": CPU seconds}} of costs.json, of study.json for rows that it lacks. Raises UserError without."""
    path = Path(asked.out) / "costs.json"
    found = read_record(record_of(asked))["costs"] | (json.loads(path.read_text())["rows"] if path.exists() else {})
    if asked.equal == "seconds" and (lacking := [name for name in ("mae", *asked.rows) if name not in found]):
        how = "remove it, and measure all rows" if path.exists() else "first"
        raise UserError(f"{path} does not tell what {lacking[0]} costs; {how}: python tests/study.py costs --root DIR")
    return found


def record_of(asked) -> Path:
    return Path(asked.page).with_name("study.json")


def make(asked):
    """Train and judge what is not there yet: all rows of the first seed, cheap ones first, then those of the next."""
    out, costs = Path(asked.out), read_costs(asked)
    order = sorted(asked.rows, key=lambda name: costs.get(name, {}).get("epoch", 0) / ROWS[name].passes)
    for seed, name in itertools.product(asked.seeds, order):
        folder, epochs = folder_of(name, seed, asked, costs), epochs_of(name, asked, costs)
        try:
            claim = lock_run(out / "claims" / folder.name, resume=True)  # for its evaluations, too
        except UserError:
            note(f"another command has {folder}, or {out} cannot be written")
            continue
        with claim:
            if not result_of(folder, epochs):
                go_on = ["--resume"] * folder.exists()
                words = [ROWS[name].method, *flags_of(name, epochs, asked), "--seed", seed, "--out", folder, *go_on]
                try:
                    with recorded("train.py", *words) as argv:
                        train.train(argv)
                except NonFiniteLoss as error:  # it stays as it is, and is counted as such
                    (folder / "diverged.txt").write_text(f"{error}\n")
            for subject in ("trained", *["untrained"] * (name in UNTRAINED)):
                result = result_of(folder, epochs)
                if result and result.state == "finished" and subject not in result.tenth:
                    tenth = tenth_of(asked, out / "claims" / folder.name)
                    words = [folder, "--protocol", "finetune", *FINETUNE.split(), "--root", tenth]
                    words += ["--seed", seed, "--resume", *["--scratch"] * (subject == "untrained")]
                    with recorded("evaluate.py", *words) as argv, contextlib.suppress(NonFiniteLoss):
                        evaluate.evaluate(argv)


@contextlib.contextmanager
def recorded(*words):
    """While this is on, run folders record these words as the command, rather than this program's; gives the flags."""
    with mock.patch("sys.argv", [str(word) for word in words]):
        yield sys.argv[1:]


def tenth_of(asked, claim: Path) -> Path:
    """A folder in CIFAR-10's layout with every tenth picture of each class, the same for all, and all test pictures.

    Each file is written in `claim`, a folder that no other command writes, then moved to its place. So it is whole, or
    not there and made anew: after a kill, or by several commands at once.
    """
    place, home = Path(asked.out) / "tenth", find_home("cifar10", Path(asked.root))
    (place / home.name).mkdir(parents=True, exist_ok=True)
    for file in home.glob("*_batch*.bin"):
        made, wanted = claim / file.name, place / home.name / file.name
        if not wanted.exists():
            rows = np.fromfile(file, dtype=np.uint8).reshape(-1, 3073)  # a label and a picture each
            tenth = np.concatenate([rows[rows[:, 0] == label][::10] for label in range(10)])
            (rows if file.name == "test_batch.bin" else tenth).tofile(made)
            made.replace(wanted)
        made.unlink(missing_ok=True)  # what a kill has left, if another command made the file since
    return place


def write(asked):
    """Both tables and the chart into --page, from the runs of --out and those that study.json has; these into it."""
    costs, entries, known = read_costs(asked), {}, read_record(record_of(asked))["runs"]
    for equal in ("passes", "seconds"):
        asked.equal, entries[equal] = equal, []
        for name in asked.rows if equal == "passes" else sorted(costs.keys() & {*asked.rows}, key=asked.rows.index):
            epochs, cost, runs = epochs_of(name, asked, costs), costs.get(name, {}).get("epoch"), []
            for seed in asked.seeds:
                key, found = f"{name}-{epochs}epochs-seed{seed}", result_of(folder_of(name, seed, asked, costs), epochs)
                known |= {key: found} if found else {}
                runs.append(known.get(key))
            entries[equal].append(
                Entry(ROWS[name].title, UNTRAINED.get(name, ""), ROWS[name].passes, cost, epochs, runs)
            )
    write_page(Path(asked.page), entries, "" if asked.epochs == EPOCHS else f" --epochs {asked.epochs}")
    write_record(record_of(asked), {name: {"epoch": cost["epoch"]} for name, cost in costs.items()}, known)


def study(argv: list):
    """Run the command line. Raises UserError for what is wrong with it."""
    parser = Parser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=("costs", "table", "write"))
    parser.add_argument("--out", default="runs/study", help="folder of the runs")
    parser.add_argument("--root", default="data", help="folder that holds CIFAR-10")
    parser.add_argument("--equal", choices=("passes", "seconds"), default="passes", help="what all rows have alike")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="MAE's, the same for table and write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7, help="costs: how often five steps of each row are measured")
    parser.add_argument(
        "--page", default=str(ROOT / "docs/results.md"), help="where the markers are; study.json beside it"
    )
    asked, asked.rest = parser.parse_known_args(argv)
    if asked.command == "write" and asked.rest:
        raise UserError(f"{asked.rest[0]} is no flag of write; leave it out")
    if any(word.split("=")[0] == "--max-steps" for word in asked.rest):
        raise UserError("--max-steps would end runs that then count as unfinished; give --epochs")
    {"costs": measure, "table": make, "write": write}[asked.command](asked)


if __name__ == "__main__":
    sys.exit(run_command(study, sys.argv[1:]))
