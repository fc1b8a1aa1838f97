"""The page of the fair table (study.py): tables and a chart, and study.json, what is known of each run."""

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from plumbing.curves import panels
from plumbing.errors import UserError
from plumbing.files import json_text, write_atomically
from plumbing.pictures import plain_style
from plumbing.run_files import digest_of
from plumbing.tables import cell
from protocols.compare import curve, read_run

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"


@dataclasses.dataclass
class Result:
    """What the page needs to know of a run that is "finished" or has "diverged", its `state`.

    `log` has the lines with a linear probe, `tenth` the accuracy of "trained" and "untrained" after fine-tuning.
    """

    state: str
    pictures: str  # a digest of their listing
    machine: str
    precision: str
    torch: str
    log: list
    tenth: dict


class Entry(NamedTuple):
    """A row with its results, one a seed, None where there is none.

    `passes` over the pictures and `cost`, CPU seconds, are those of an epoch; without `untrained`, the encoder before
    training has no row of its own.
    """

    title: str
    untrained: str
    passes: float
    cost: float | None
    epochs: int
    runs: list


def result_of(folder: Path, epochs: int) -> Result | None:
    """What a run folder has on record; None before its end, if it has not diverged."""
    try:
        run = read_run(folder)
    except UserError:
        return None
    diverged, last = (folder / "diverged.txt").exists(), run.log[-1]
    if not diverged and not (last["epoch"] == epochs and "linear" in last):
        return None
    listing = folder / "images.tsv"
    names = ("epoch", "linear", "knn", "effective_rank", "pixels")
    log = [{name: line[name] for name in names if name in line} for line in run.log if "linear" in line]
    tunings = [x["results"] for x in run.evaluations if Path(x["settings"].get("root", "")).name == "tenth"]
    accuracies = {subject: found.get("finetune") for subject, found in (tunings or [{}])[-1].items()}
    return Result(
        state="diverged" if diverged else "finished",
        pictures=digest_of(listing.read_bytes()) if listing.exists() else "",
        machine=machine(),
        precision=run.header.get("precision", "").replace("None", "float32").removeprefix("torch."),
        torch=run.header.get("versions", {}).get("torch", ""),
        log=log,
        tenth={subject: value for subject, value in accuracies.items() if value is not None},
    )


def read_record(path: Path) -> dict:
    """What study.json knows: {"costs": {row: {"epoch": CPU seconds}}, "runs": {name: Result}}; empty without it."""
    known = json.loads(path.read_text()) if path.exists() else {"costs": {}, "runs": {}}
    return known | {"runs": {name: Result(**fields) for name, fields in known["runs"].items()}}


def write_record(path: Path, costs: dict, runs: dict):
    """A line a run."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json_text(dataclasses.asdict(runs[name]))}" for name in sorted(runs))
    text = f'{{"costs": {json_text(costs)},\n"runs": {{\n{lines}\n}}}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def machine() -> str:
    """What this runs on, as far as a program can tell."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}{gpu}"


def told(values: list) -> str:
    """Mean ± deviation of a sample, of the values that there are; one alone as it is, and a dash for none."""
    values = [value for value in values if isinstance(value, int | float) and not math.isnan(value)]
    if len(values) > 1:
        return cell((statistics.fmean(values), statistics.stdev(values)), 1)
    return cell(values[0] if values else None, 1)


def line_of(title: str, runs: list, subject: str, *ends) -> str:
    """A row of the table: the last line of each log, or the first for the untrained encoder; the fine-tuning."""
    logged = [run.log[-1 if subject == "trained" else 0] for run in runs]
    linear, knn, rank = (told([line.get(x) for line in logged]) for x in ("linear", "knn", "effective_rank"))
    return f"| {' | '.join([title, linear, knn, told([run.tenth.get(subject) for run in runs]), rank, *ends])} |"


def with_counts(run: Result, entry: Entry) -> Result:
    """The result, but its log counts passes and CPU seconds: the clock's would tell what else the machine did."""
    log = []
    for line in run.log:
        seconds = line["epoch"] * entry.cost if entry.cost else None
        log.append(line | {"passes": line["epoch"] * entry.passes, "seconds": seconds})
    return dataclasses.replace(run, log=log)


def table_of(entries: list[Entry]) -> tuple[list, dict]:
    """The lines of a table, and {title: finished runs} whose logs count passes and CPU seconds, for the chart."""
    lines = ["| method | linear | kNN | 10 % of labels | effective rank | epochs | CPU seconds | seeds |"]
    lines, groups, after, pixels = [*lines, "|" + " --- |" * 8], {}, [], []
    for entry in entries:
        done, diverged = ([run for run in entry.runs if run and run.state == x] for x in ("finished", "diverged"))
        seeds = f"{len(done)} of {len(entry.runs)}" + f", {len(diverged)} diverged" * bool(diverged)
        if done or diverged:
            cost = f"{entry.epochs * entry.cost:.0f}" if entry.cost else "-"
            lines.append(line_of(entry.title, done, "trained", str(entry.epochs), cost, seeds))
        begun = [run for run in done if run.log[0]["epoch"] == 0]  # of others the end alone is known
        if begun and entry.untrained:
            after.append(line_of(entry.untrained, begun, "untrained", "0", "0", seeds))
            pixels = pixels or [run.log[0]["pixels"] for run in begun if "pixels" in run.log[0]][:1]
        if done:
            groups[entry.title] = [with_counts(run, entry) for run in done]
    after += [f"| pixels | {told([x['linear']])} | {told([x['knn']])} | - | - | - | - | - |" for x in pixels]
    missing = "; ".join(entry.title for entry in entries if not any(entry.runs))
    return [*lines, *after, *[f"\nNo finished run yet: {missing}."] * bool(missing)], groups


def chart_of(tables: dict, titles: list):
    """The linear probe of equal passes over passes and over seconds, that of equal seconds over seconds: a Figure.

    `tables` is {"passes" or "seconds": {title: results}}; a title's place in `titles` is its colour. Results with less
    in their logs than others of the row, as the end alone, are left out.
    """
    wanted = [("passes", "passes"), ("passes", "seconds"), ("seconds", "seconds")]
    wanted = [(equal, x) for equal, x in wanted if tables.get(equal)]
    figure, axes = panels("linear probe (%), means and deviations", len(wanted))
    for one, (equal, x) in zip(axes, wanted, strict=True):
        for title, several in tables[equal].items():
            group = [run for run in several if len(run.log) == max(len(other.log) for other in several)]
            (across, middle, spread), number = curve(group, x, "linear"), titles.index(title)
            look = {"color": f"C{number % 10}"}  # matplotlib has ten
            ends = len(across) <= 2  # of a curve of which nothing else is known: no line
            style = {"linestyle": "" if ends else ("-", "--")[number // 10], "markersize": 4 if ends else 2}
            one.plot(across, middle, label=title, marker="o", **style, **look)
            if not ends:
                one.fill_between(across, middle - spread, middle + spread, alpha=0.15, linewidth=0, **look)
        one.set(title=f"equal {equal}", xlabel={"passes": "passes over the pictures", "seconds": "CPU seconds"}[x])
    figure.set_figheight(figure.get_figheight() + 1.2)
    lines = {line.get_label(): line for one in axes for line in one.get_lines()}  # a panel may lack some
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    return figure


def write_page(page: Path, entries: dict, flags: str = ""):
    """Put the tables of {"passes" or "seconds": entries} between a page's markers, and study.png beside it.

    `flags` of the commands are told with them.

    Raises UserError where the page has no such place, no run is finished, or some saw other pictures than others.
    """
    before, tables, text = page.read_text() if page.exists() else "", {}, [BEGIN, ""]
    if (before.count(BEGIN), before.count(END)) != (1, 1) or before.index(END) < before.index(BEGIN):
        raise UserError(f"{page} needs a line {BEGIN} and below it a line {END}, once each")
    for equal, several in entries.items():
        lines, tables[equal] = table_of(several)
        command = f"python tests/study.py table --root DIR{' --equal seconds' * (equal == 'seconds')}{flags}"
        text += [f"Equal {equal}, `{command}`:", "", *lines, ""] if tables[equal] else []
    runs = [run for groups in tables.values() for group in groups.values() for run in group]
    if not runs:
        raise UserError(f"no run is finished yet; first: python tests/study.py table --root DIR{flags}")
    if len({run.pictures for run in runs}) > 1:
        record = page.with_name("study.json")
        raise UserError(f"{record} has runs on other pictures than these; remove it, or give another --page")
    machines, precisions, torches = (
        " and ".join(sorted({getattr(run, name) for run in runs} - {""})) for name in ("machine", "precision", "torch")
    )
    where = f"{machines}, one thread a run, {precisions}, torch {torches}, {datetime.date.today()}"
    text += [f"*{where}; `python tests/study.py write{flags}`.*", ""]
    with plain_style():
        chart = chart_of(tables, [entry.title for entry in entries["passes"]])
        write_atomically(page.with_name("study.png"), lambda file: chart.savefig(file, format="png", dpi=70))
    text += ["![the linear probe over passes and over CPU seconds](study.png)", "", END]
    whole = before[: before.index(BEGIN)] + "\n".join(text) + before[before.index(END) + len(END) :]
    write_atomically(page, lambda file: file.write(whole.encode()))
    print(f"wrote {page}, {page.with_name('study.png')}")
