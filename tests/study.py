"""The fair table: every method on the same pictures, with an encoder of one size, several seeds.

python tests/study.py costs --root DIR                   CPU seconds of a step of each row, once, into costs.json
python tests/study.py table --root DIR                   equal passes over the pictures: trains and judges all rows
python tests/study.py table --root DIR --equal seconds   equal CPU seconds: those of MAE
python tests/study.py write                              both tables and the chart into docs/results.md
python tests/study.py table --root DIR --rows mae umae --seeds 0   some of it; other flags go to every training

DIR holds CIFAR-10's cifar-10-batches-bin, of any number of pictures. A run is a folder ROW-seedS in --out, as train.py
makes them (with ROW-Eepochs-seedS where equal seconds ask for other epochs). Stopped, by Ctrl-C or a kill, the same
command goes on; finished runs are left as they are. Several commands in one --out share the runs among them.
"""

import argparse
import contextlib
import datetime
import importlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several commands share a machine best so
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench import in_turn

import evaluate
import train
from common import METHODS, Stepper, load_data
from plumbing.asked import read_configs
from plumbing.command import run_command
from plumbing.curves import panels
from plumbing.datasets import find_home
from plumbing.errors import NonFiniteLoss, UserError
from plumbing.files import json_text, write_atomically
from plumbing.pictures import plain_style
from plumbing.processes import note, start_distributed
from plumbing.run_files import lock_run, versions
from plumbing.settings import Parser
from plumbing.tables import cell
from protocols.compare import Recorded, curve, read_run

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """A row of the table. `passes`: how often an epoch of its loop shows the pictures to the encoder."""

    title: str
    method: str
    flags: str
    passes: float = 1


# Each method's recipe for CIFAR-10 on a laptop holds where no flag is given here: learning rates, betas, decays, what
# is probed (the mean of the patches, of MLO-MAE the CLS token), bf16 where the processor has it.
COMMON = "--data cifar10 --crop-min 0.2 --warmup-epochs {warmup}"  # crops as MAE's; others' recipes had 0.3 and 0.5
VIT = "--model vit_micro --patch 4 --image-size 32"
DECODER = VIT + " --decoder-dim 64 --decoder-depth 2 --decoder-heads 4"  # MLO-MAE's recipe had 96 and 3 heads
# MAGMA's term falls with the batch as 1 / B: its weight of 1 in the paper is for 256 images. B / 256 is as strong.
# It acts from a sixth of the run on, for two thirds of it, as in the recipe of 30 epochs.
TERM = "--lam {strength} --e-st {start} --e-dur {lasts}"
TERM_64, TERM_128 = TERM.replace("{strength}", "0.25"), TERM.replace("{strength}", "0.5")
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
    "finola": Row("FINOLA", "finola", "--width micro --image-size 64"),  # its own encoder, and four times the pixels
    "finola-e": Row("Masked FINOLA-E", "finola", "--width micro --image-size 64 --variant masked_e"),
    "finola-b": Row("Masked FINOLA-B", "finola", "--width micro --image-size 64 --variant masked_b"),
    "simclr": Row("SimCLR", "magma", f"{VIT} --ssl simclr --lam 0"),  # batches of 128: its recipe's
    "m-simclr": Row("M-SimCLR", "magma", f"{VIT} --ssl simclr {TERM_128}"),
    "vicreg": Row("VICReg", "magma", f"{VIT} --ssl vicreg --lam 0"),
    "m-vicreg": Row("M-VICReg", "magma", f"{VIT} --ssl vicreg {TERM_128}"),
    "energy": Row("energy, mixed tasks", "ebm_pretrain", VIT),
    "energy-sr": Row("energy, super-resolution", "ebm_pretrain", f"{VIT} --task super_resolution"),  # its best task
    "mlo-mae": Row("MLO-MAE", "mlo_mae", DECODER, LEVELS),
    "blo-mae": Row("BLO-MAE", "mlo_mae", f"{DECODER} --objective blo", LEVELS),
}
# The fine-tuning of docs/results.md, on a tenth of the labels: its rate of 2e-3 (4e-3 for a batch of 128), but
# batches of 32, since there are few pictures, and 10 epochs, a minute. One recipe for all, MAE's.
FINETUNE = "--data cifar10 --recipe mae --epochs 10 --batch-size 32 --warmup-epochs 2 --crop-min 0.4 --randaugment 0"
FINETUNE += " --mixup 0 --cutmix 0 --drop-path 0 --base-lr 16e-3"  # Mobile-Former has no drop path
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"


def passes_of(name: str, epochs: int) -> int:
    """Epochs of a row that show it the pictures as often as so many epochs of MAE."""
    return max(1, round(epochs / ROWS[name].passes))


def epochs_of(name: str, asked, costs: dict) -> int:
    """Epochs of a row: those of equal passes over the pictures, or of as many CPU seconds as MAE takes for them."""
    if asked.equal == "passes":
        return passes_of(name, asked.epochs)
    return max(1, round(asked.epochs * costs["mae"]["epoch"] / costs[name]["epoch"]))


def folder_of(name: str, seed: int, asked, costs: dict) -> Path:
    """The run folder. Both tables share a run where they ask for the same epochs."""
    epochs = epochs_of(name, asked, costs)
    longer = "" if epochs == passes_of(name, asked.epochs) else f"-{epochs}epochs"
    return Path(asked.out) / f"{name}{longer}-seed{seed}"


def flags_of(name: str, epochs: int, asked) -> list:
    """What stands behind `train.py METHOD`: the common flags, the row's, then the command's own."""
    parts = {"warmup": round(epochs / 15), "start": round(epochs / 6), "lasts": max(1, round(epochs * 2 / 3))}
    words = f"{COMMON} {ROWS[name].flags}".format(**parts).split()
    return [
        *words,
        "--epochs",
        str(epochs),
        "--probe-every",
        str(max(1, epochs // 6)),
        "--root",
        asked.root,
        *asked.rest,
    ]


def step_of(name: str, asked):
    """A function that makes a row's next step as `common.fit` does, crops among it, where MAGMA's term acts; and the
    steps of an epoch.
    """
    module = importlib.import_module(ROWS[name].method)
    config = read_configs(ROWS[name].method, module.Config, module.RECIPES, flags_of(name, asked.epochs, asked))[0]
    device = start_distributed(config.device)
    data = load_data(config.data, split="train", root=config.root, image_size=config.image_size, device=device)
    torch.manual_seed(0)
    method = getattr(module, METHODS[ROWS[name].method])(config, data).to(device).train()
    method.start_epoch(config.epochs // 2)
    plan = method.plan(len(data), config)
    stepper = Stepper(method.optimizer(config), config, device, len(plan))
    stepper.set_rate(len(plan))
    batches = data.train_batches(plan.after(0), config.image_size, config.crop, config.flip, method.views)
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
    """{row: {"step", "epoch"}}; {} without costs.json. Raises UserError where equal seconds need what is not there."""
    path = Path(asked.out) / "costs.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else {}
    if asked.equal == "seconds" and (lacking := [name for name in ("mae", *asked.rows) if name not in found]):
        raise UserError(f"{path} does not tell what {lacking[0]} costs; first: python tests/study.py costs")
    return found


def run_of(folder: Path, epochs: int) -> tuple[str, Recorded | None]:
    """Whether a run is "finished", has "diverged", or neither: ""; and what it has on record."""
    with contextlib.suppress(UserError):
        run = read_run(folder)
        ended = run.log[-1]["epoch"] == epochs and "linear" in run.log[-1]
        return "diverged" if (folder / "diverged.txt").exists() else "finished" * ended, run
    return "", None


def tuned(run: Recorded, subject: str):
    """Accuracy of "trained" or "untrained" after fine-tuning, None where it is not there yet."""
    lines = [x["results"] for x in run.evaluations if Path(x["settings"].get("root", "")).name == "tenth"]
    return lines[-1].get(subject, {}).get("finetune") if lines else None


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
            if not run_of(folder, epochs)[0]:
                go_on = ["--resume"] * folder.exists()
                words = [ROWS[name].method, *flags_of(name, epochs, asked), "--seed", seed, "--out", folder, *go_on]
                try:
                    as_typed("train.py", train.train, words)
                except NonFiniteLoss as error:  # it stays as it is, and is counted as such
                    (folder / "diverged.txt").write_text(f"{error}\n")
            # The untrained encoder once for each kind of encoder.
            for subject in ("trained", *["untrained"] * (name in ("mae", "finola"))):
                state, run = run_of(folder, epochs)
                if state == "finished" and tuned(run, subject) is None:
                    words = [folder, "--protocol", "finetune", *FINETUNE.split(), "--root", tenth_of(asked)]
                    words += ["--seed", seed, "--resume", *["--scratch"] * (subject == "untrained")]
                    as_typed("evaluate.py", evaluate.evaluate, words)


def as_typed(program: str, command, words: list):
    """command(words), while run folders record that command line rather than this program's."""
    before, sys.argv = sys.argv, [program, *map(str, words)]
    try:
        command(sys.argv[1:])
    finally:
        sys.argv = before


def tenth_of(asked) -> Path:
    """A folder in CIFAR-10's layout with every tenth picture of each class, the same for all, and all test pictures."""
    place, home = Path(asked.out) / "tenth", find_home("cifar10", Path(asked.root))
    if not place.exists():
        made = Path(tempfile.mkdtemp(dir=asked.out))
        (made / home.name).mkdir()
        for file in home.glob("*_batch*.bin"):
            rows = np.fromfile(file, dtype=np.uint8).reshape(-1, 3073)  # a label and a picture each
            tenth = np.concatenate([rows[rows[:, 0] == label][::10] for label in range(10)])
            (rows if file.name == "test_batch.bin" else tenth).tofile(made / home.name / file.name)
        with contextlib.suppress(OSError):  # another command was faster
            made.rename(place)
    return place


def machine() -> str:
    """What this runs on, as far as a program can tell."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}{gpu}"


def told(values: list) -> str:
    """Mean ± deviation of a sample, of the values that there are."""
    values = [value for value in values if isinstance(value, int | float) and not math.isnan(value)]
    return cell((statistics.fmean(values), statistics.stdev(values)) if len(values) > 1 else [*values, None][0], 1)


def line_of(title: str, runs: list, subject: str, *ends) -> str:
    """A row of the table: the last line of each log, or the first for the untrained encoder; the fine-tuning."""
    logged = [run.log[-1 if subject == "trained" else 0] for run in runs]
    linear, knn, rank = (told([line.get(x) for line in logged]) for x in ("linear", "knn", "effective_rank"))
    return f"| {' | '.join([title, linear, knn, told([tuned(run, subject) for run in runs]), rank, *ends])} |"


def table_of(asked, costs: dict) -> tuple[list, dict]:
    """The lines of a table, and {title: finished runs} whose logs count passes and CPU seconds, for the chart."""
    lines = ["| method | linear | kNN | 10 % of labels | effective rank | epochs | CPU seconds | seeds |"]
    lines, groups, missing, after = [*lines, "|" + " --- |" * 8], {}, [], []
    for name, row in ROWS.items():
        epochs, cost = epochs_of(name, asked, costs), costs.get(name, {}).get("epoch")
        found = [run_of(folder_of(name, seed, asked, costs), epochs) for seed in asked.seeds]
        done, diverged = ([run for state, run in found if state == x] for x in ("finished", "diverged"))
        if not done + diverged:
            missing.append(row.title)
            continue
        seeds = f"{len(done)} of {len(asked.seeds)}" + f", {len(diverged)} diverged" * bool(diverged)
        lines.append(line_of(row.title, done, "trained", str(epochs), f"{epochs * cost:.0f}" if cost else "-", seeds))
        if done and name in ("mae", "finola"):
            title = "untrained" if name == "mae" else "untrained, FINOLA's"
            after.append(line_of(title, done, "untrained", "0", "0", seeds))
        if done and name == "mae":
            pixels = done[0].log[0]["pixels"]
            after.append(f"| pixels | {told([pixels['linear']])} | {told([pixels['knn']])} | - | - | - | - | - |")
        for run in done:  # the clock's seconds would tell what else the machine did
            run.log = [x | {"passes": x["epoch"] * row.passes, "seconds": cost and x["epoch"] * cost} for x in run.log]
        groups |= {row.title: done} if done else {}
    return [*lines, *after, *[f"\nNo run yet: {', '.join(missing)}."] * bool(missing)], groups


def chart_of(tables: dict):
    """The linear probe of equal passes over passes and over seconds, that of equal seconds over seconds: a Figure."""
    wanted = [("passes", "passes"), ("passes", "seconds"), ("seconds", "seconds")]
    wanted = [(equal, x) for equal, x in wanted if tables.get(equal)]
    figure, axes = panels("linear probe (%), means and deviations", len(wanted))
    for one, (equal, x) in zip(axes, wanted, strict=True):
        for title, group in tables[equal].items():
            number = [row.title for row in ROWS.values()].index(title)
            (across, middle, spread), look = curve(group, x, "linear"), {"color": f"C{number % 10}"}
            one.plot(across, middle, ("-", "--")[number // 10], label=title, marker="o", markersize=2, **look)
            one.fill_between(across, middle - spread, middle + spread, alpha=0.15, linewidth=0, **look)
        one.set(title=f"equal {equal}", xlabel={"passes": "passes over the pictures", "seconds": "CPU seconds"}[x])
    figure.set_figheight(figure.get_figheight() + 1.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def write(asked):
    """Put the tables between the markers of --page, and the chart beside it. Raises UserError where there are none."""
    page, costs, tables, text = Path(asked.page), read_costs(asked), {}, [BEGIN, ""]
    before = page.read_text() if page.exists() else ""
    if (before.count(BEGIN), before.count(END)) != (1, 1) or before.index(END) < before.index(BEGIN):
        raise UserError(f"{page} needs a line {BEGIN} and below it a line {END}, once each")
    for equal in ("passes", "seconds") if costs else ("passes",):
        lines, tables[equal] = table_of(argparse.Namespace(**vars(asked) | {"equal": equal}), costs)
        command = f"python tests/study.py table --root DIR{' --equal seconds' * (equal == 'seconds')}"
        text += [f"Equal {equal}, `{command}`:", "", *lines, ""] if tables[equal] else []
    runs = [run for groups in tables.values() for group in groups.values() for run in group]
    if not runs:
        raise UserError(f"{asked.out} holds no finished run; first: python tests/study.py table")
    torches = " and ".join(sorted({run.header.get("versions", {}).get("torch", "?") for run in runs}))
    text += [f"*{machine()}, one thread a run, torch {torches}, written {datetime.date.today()} by `study.py write`.*"]
    with plain_style():
        chart = chart_of(tables)
        write_atomically(page.with_name("study.png"), lambda file: chart.savefig(file, format="png", dpi=70))
    text += ["", "![the linear probe over passes and over seconds](study.png)", "", END]
    whole = before[: before.index(BEGIN)] + "\n".join(text) + before[before.index(END) + len(END) :]
    write_atomically(page, lambda file: file.write(whole.encode()))
    print(f"wrote {page}, {page.with_name('study.png')}")


def study(argv: list):
    """Run the command line. Raises UserError for what is wrong with it."""
    parser = Parser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=("costs", "table", "write"))
    parser.add_argument("--out", default="runs/study", help="folder of the runs")
    parser.add_argument("--root", default="data", help="folder that holds CIFAR-10")
    parser.add_argument("--equal", choices=("passes", "seconds"), default="passes", help="what all rows have alike")
    parser.add_argument("--epochs", type=int, default=60, help="MAE's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7, help="costs: how often five steps of each row are measured")
    parser.add_argument("--page", default=str(ROOT / "docs/results.md"), help="write: where the markers are")
    asked, asked.rest = parser.parse_known_args(argv)
    {"costs": measure, "table": make, "write": write}[asked.command](asked)


if __name__ == "__main__":
    sys.exit(run_command(study, sys.argv[1:]))
