"""Runs side by side: one table and one chart. Runs that differ in their seed alone are one row."""

import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.curves import panels, wide
from plumbing.errors import UserError, printable
from plumbing.files import json_text, write_atomically
from plumbing.pictures import plain_style
from plumbing.processes import note
from plumbing.run_files import (
    LATER,
    data_name,
    digest_of,
    read_evaluations,
    read_log,
    read_settings,
    refuse_among_pictures,
    taken,
)
from plumbing.settings import FREE_FIELDS, TrainConfig, flag
from plumbing.tables import cell, column_of, format_table
from protocols.rows import Subject
from protocols.settings import DENSE_PROTOCOLS, Config, recipe_of
from protocols.training import applies, folder_of, trains_on_images

LOGGED = ("loss", "linear", "knn", "held_out_loss", "effective_rank")  # the columns from the log; minutes come last
OWN = FREE_FIELDS - {"start"} | {"seed", "method", "data"}  # what does not make two runs of one method different


@dataclass
class Recorded:
    """What a run folder has on record: its settings, its log, the last results of each protocol."""

    folder: Path
    known: dict
    header: dict
    log: list
    evaluations: list

    def values(self) -> dict:
        """{column: (value, digits)}: the last of each in the log, then what protocols found."""
        found = {}
        for name in LOGGED:
            logged = [line[name] for line in self.log if isinstance(line.get(name), int | float)]
            if logged:
                title, digits = column_of(name)
                found[title] = (logged[-1], 4 if name == "loss" else digits)
        for line in self.evaluations:
            trained = line["results"].get("trained")
            for name, value in trained.items() if isinstance(trained, dict) else ():
                if isinstance(value, int | float):
                    title, digits = column_of(name)
                    found[f"{title} ({where_from(line, self)})"] = (value, digits)
        if isinstance(seconds := self.log[-1].get("seconds"), int | float):
            found["minutes"] = (seconds / 60, 1)
        return found

    def kind(self) -> str:
        """What two runs that differ in their seed alone have in common."""
        listing = self.folder / "images.tsv"
        pictures = digest_of(listing.read_bytes()) if listing.exists() else self.known.get("data")
        settings = {name: value for name, value in (LATER | self.known).items() if name not in OWN}
        epoch, precision = self.log[-1]["epoch"], self.header.get("precision")
        return json_text([self.known.get("method"), pictures, precision, epoch, sorted(settings.items())])


def where_from(line: dict, run: Recorded) -> str:
    """What a line of eval.jsonl was made by: its recipe, or else its protocol, and its data where they are others."""
    data = "" if line.get("data") == run.known.get("data") else f", {printable(str(line.get('data')))}"
    return f"{line['settings'].get('recipe') or line['protocol']}{data}"


def read_run(folder: Path) -> Recorded:
    """Raises UserError for a folder that holds no run with a log."""
    if not folder.is_dir():
        raise UserError(f"no run folder {folder}; give one that train.py wrote, such as runs/magma-shapes")
    header, log = read_log(folder / "log.jsonl")
    if not log:
        raise UserError(f"{folder} holds no log.jsonl with an epoch; give folders that train.py wrote")
    known, found = read_settings(folder / "config.json"), read_evaluations(folder / "eval.jsonl")
    return Recorded(folder, known, json.loads(header) if header else {}, log, found)


def read_runs(folders: list) -> list[Recorded]:
    """Raises UserError for one that holds no run, and for one that is named twice."""
    places = [os.path.realpath(folder) for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{folder} is given twice; give each run once")
    return [read_run(Path(folder)) for folder in folders]


def grouped(runs: list[Recorded]) -> dict:
    """{row: runs}: those that differ in their seed alone are together, each other run has a row of its own."""
    groups = {}
    for run in runs:
        seeds = [other.known.get("seed") for other in groups.get(run.kind(), ())]
        again = seeds.count(run.known.get("seed"))  # the same run once more is no other seed
        groups.setdefault(run.kind() if not again else str(run.folder), []).append(run)
    names = [name_of(group) for group in groups.values()]
    named = zip(names, groups.values(), strict=True)
    return {name if names.count(name) == 1 else str(group[0].folder): group for name, group in named}


def name_of(group: list[Recorded]) -> str:
    """A row's name: the folder's, or what the folders of several seeds begin with."""
    names = [data_name(str(run.folder)) for run in group]
    if len(group) == 1:
        return printable(names[0])
    start = os.path.commonprefix(names).rstrip("0123456789").removesuffix("seed").rstrip("-_. ")
    return printable(f"{start or names[0]} ({len(group)} seeds)")


def row_of(group: list[Recorded]) -> dict:
    """{column: (value or (mean, deviation), digits)} of what all runs of a row have; a sample's deviation."""
    found = [run.values() for run in group]
    row = {}
    for name, (value, digits) in found[0].items():
        if all(name in other for other in found):
            several = [other[name][0] for other in found]
            row[name] = (value if len(group) == 1 else (statistics.fmean(several), statistics.stdev(several)), digits)
    return row


def planned(run: Recorded, given: dict) -> list:
    """The run folders that the protocols of `given` would make in a run."""
    rows, found = {"trained": True, "pixels": given.get("pixels")}, []
    rows["untrained"] = given.get("untrained") or given.get("scratch")
    for protocol in given["protocol"]:
        data = given.get("data", "scenes" if protocol in DENSE_PROTOCOLS else run.known.get("data", ""))
        recipe = recipe_of(protocol, given | {"data": data}, run.known.get("method", ""), 0)
        config = Config(**recipe | given | {"data": data, "image_size": 1, "out": str(run.folder)})
        for row in (row for row, asked in rows.items() if asked):
            subject = Subject(row, None if row == "pixels" else run, None, None, None)
            if applies(protocol, subject, config) and trains_on_images(protocol, subject, config):
                found.append(folder_of(protocol, subject, config))
    return found


def check_comparison(folders: list, out: str, given=()) -> tuple[list[Recorded], Path]:
    """The runs, and the folder of their comparison. `given` are the other flags.

    Raises UserError for what is no run, for flags that nothing would heed, and where `out` has a comparison of others
    or is a folder of pictures.
    """
    if given and "protocol" not in given:
        flags = " ".join(map(flag, given))
        raise UserError(f"{flags} is of no use here: several runs are compared by their logs; or add --protocol")
    runs = read_runs(folders)
    if out and os.path.isfile(out):
        raise UserError(f"--out {out} is a file; give a folder")
    if needy := [str(run.folder) for run in runs if given and not (run.folder / "encoder.pt").exists()]:
        raise UserError(f"{needy[0]} holds no encoder.pt to run a protocol on; leave it out, or --protocol")
    for run in runs if given and not {"resume", "test_data"} & set(given) else ():
        if there := next(filter(taken, planned(run, given)), None):  # before hours are spent on the runs before it
            raise UserError(f"{there} exists; add --resume to go on with it")  # --out is the comparison's
    out = Path(out) if out else runs[0].folder.parent
    for run in runs:
        refuse_among_pictures(out, TrainConfig(**{x: run.known[x] for x in ("data", "root") if x in run.known}))
    found = read_settings(out / "compare.json").get("runs")
    there = itertools.chain(*found.values()) if isinstance(found, dict) else ["?"]
    others = {os.path.realpath(folder) for folder in there} - {os.path.realpath(run.folder) for run in runs}
    if others and any((out / name).exists() for name in ("compare.json", "compare.png")):
        raise UserError(f"{out} has a comparison of other runs; choose another folder, such as --out {out / 'compare'}")
    return runs, out


def compare(folders: list, out: str = ""):
    """Print a table of runs, and write compare.png and compare.json into `out`, by default the first run's parent.

    Nothing is computed again: all is from the log.jsonl and eval.jsonl of each.
    Raises UserError for what is no run, and where `out` has a comparison of other runs.
    """
    runs, out = check_comparison(folders, out)
    groups = grouped(runs)
    rows = {name: row_of(group) for name, group in groups.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    columns.sort(key="minutes".__eq__)  # last
    texts = {name: {x: cell(*row[x]) if x in row else "-" for x in columns} for name, row in rows.items()}
    print(format_table(texts, "last on record"))
    for text in (*differences(groups), *doubts(runs), *gaps(groups)):
        note(text)
    with plain_style():
        chart = draw(groups)
    out.mkdir(parents=True, exist_ok=True)
    found = {name: {x: value for x, (value, _) in row.items()} for name, row in rows.items()}
    record = {"runs": {name: [str(run.folder) for run in group] for name, group in groups.items()}, "table": found}
    write_atomically(out / "compare.png", lambda file: chart.savefig(file, format="png"))
    write_atomically(out / "compare.json", lambda file: file.write(json_text(record, indent=2).encode() + b"\n"))
    print(f"wrote {out / 'compare.png'}, {out / 'compare.json'}")


def differences(groups: dict) -> list:
    """A line a row on the settings in which the rows differ, of those that all of them have."""
    settings = [group[0].known for group in groups.values()]
    shared = [name for name in settings[0] if name not in OWN and all(name in other for other in settings)]
    differing = [name for name in shared if any(other[name] != settings[0][name] for other in settings)]
    lines = []
    for name, known in zip(groups, settings, strict=True):
        values = [known[x] for x in differing]
        texts = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
        lines.append(f"{name}: " + "  ".join(f"{flag(x)} {y}" for x, y in zip(differing, texts, strict=True)))
    return lines if differing else []


def doubts(runs: list[Recorded]) -> list:
    """What makes figures of some runs not comparable."""
    lines = []
    for run in runs:
        wanted = run.known.get("epochs")
        if isinstance(wanted, int) and run.log[-1]["epoch"] < wanted:
            lines.append(f"{run.folder} is at epoch {run.log[-1]['epoch']} of {wanted}")
    data = dict.fromkeys(data_name(str(run.known.get("data", ""))) for run in runs)
    if len(data) > 1:
        lines.append(f"figures of the log are on each run's own data ({', '.join(data)})")
    settings = {}
    for run in runs:
        for line in run.evaluations:
            counts = {x: y for x, y in line["settings"].items() if x not in OWN - {"probe_images"}}
            settings.setdefault((line["protocol"], where_from(line, run)), []).append(counts)
            last = run.log[-1]["epoch"]
            if line.get("epoch", last) != last:
                where = f"{line['protocol']} ({where_from(line, run)}) of {run.folder}"
                lines.append(f"{where} was run after epoch {line['epoch']}, and the log is at {last}")
    for (protocol, source), several in settings.items():
        names = sorted({x for one in several for x in one if one[x] != several[0].get(x)})
        if names:
            lines.append(f"{protocol} ({source}) was not run with the same {' '.join(map(flag, names))} for all")
    return lines


def gaps(groups: dict) -> list:
    """A line for each column that only some runs of a row have, so that the row has none."""
    lines = []
    for name, group in groups.items():
        found = [run.values() for run in group]
        for column in dict.fromkeys(column for one in found for column in one):
            if lacking := [str(run.folder) for run, one in zip(group, found, strict=True) if column not in one]:
                lines.append(f"{name} has no {column}, since {lacking[0]} has none")
    return lines


def draw(groups: dict):
    """Loss, linear probe (or held-out loss) and effective rank over epochs, and below over seconds: a Figure.

    A row of several seeds is their mean, in a band of one deviation.
    """
    logs = [run.log for group in groups.values() for run in group]
    probe = "linear" if any(isinstance(line.get("linear"), int | float) for log in logs for line in log) else None
    names = ["loss", probe or "held_out_loss", "effective_rank"]
    methods = {run.known.get("method") for group in groups.values() for run in group}
    figure, axes = panels("runs side by side", 6)
    for number, (one, (x, name)) in enumerate(zip(axes, itertools.product(("epoch", "seconds"), names), strict=True)):
        values = []
        for colour, group in enumerate(groups.values()):
            across, middle, spread = curve(group, x, name)
            style = ("-", "--", ":", "-.")[colour // 10 % 4]  # matplotlib has ten colours
            one.plot(across, middle, style, color=f"C{colour}", marker="o", markersize=2)
            one.fill_between(across, middle - spread, middle + spread, color=f"C{colour}", alpha=0.2, linewidth=0)
            values += middle.tolist()
        title = "loss (each method's own)" if name == "loss" and len(methods) > 1 else column_of(name)[0]
        one.set(title=title if number < 3 else "", xlabel="epoch" if x == "epoch" else "seconds of training")
        if values and name != "linear" and wide(values):
            one.set_yscale("log")
    figure.set_figheight(figure.get_figheight() + 0.25 * math.ceil(len(groups) / 3))
    legend = figure.legend(axes[0].get_lines(), list(map(str, range(len(groups)))), loc="outside lower center", ncols=3)
    for text, name in zip(legend.get_texts(), groups, strict=True):
        text.set(text=name, parse_math=False)  # the name of a folder is no formula
    return figure


def curve(group: list[Recorded], x: str, name: str) -> tuple:
    """Where all runs of a row have a value: x, its mean, and its deviation (0 for one run), as arrays."""
    found = [{line["epoch"]: line for line in run.log if isinstance(line.get(name), int | float)} for run in group]
    epochs = [epoch for epoch in found[0] if all(epoch in lines for lines in found)]
    if x == "seconds":  # the untrained encoder has had none
        epochs = [e for e in epochs if e == 0 or all(isinstance(lines[e].get(x), int | float) for lines in found)]
        epochs = epochs if any(epochs) else []
    at = [statistics.fmean(lines[e][x] if e else 0 for lines in found) for e in epochs]
    values = np.array([[lines[e][name] for lines in found] for e in epochs]).reshape(len(epochs), len(group))
    spread = values.std(axis=1, ddof=1) if len(group) > 1 else np.zeros(len(epochs))
    return np.array(at), values.mean(axis=1) if len(epochs) else np.zeros(0), spread
