"""Judge the encoder of a run: by its features as they are, by probes, by fine-tuning, and by pictures.

python evaluate.py RUN                                             kNN and a linear probe, on the run's own data
python evaluate.py RUN --protocol knn linear clusters --untrained --pixels     beside the two baselines
python evaluate.py RUN --protocol linear --data cifar100 --root DIR            transfer to another data set
python evaluate.py RUN --protocol linear --recipe mae --base-lrs 0.03 0.1 0.3  several learning rates in one pass
python evaluate.py RUN --protocol tran1 finetune --recipe finola   a transformer decoder, then all weights, from it
python evaluate.py RUN --protocol finetune --scratch               the same network from random weights
python evaluate.py RUN --protocol pictures                         reconstructions, attention, keys, features, curves
python evaluate.py RUN --protocol features --data DIR              features of pictures, a row each, and their names
python evaluate.py RUN --protocol export                           the weights for timm, and the lines that load them
python evaluate.py RUN RUN ...                                     a table and a chart of several runs
torchrun --nproc_per_node=8 evaluate.py RUN --protocol finetune    many GPUs, or many CPU processes
python evaluate.py --help                                          all flags

RUN is a run folder. Its encoder.pt is all that is needed, but for reconstructions, which take last.pt; config.json
tells the data and the method's recipe. Prints a table and appends one JSON line a protocol to RUN/eval.jsonl.

Protocol     what it does                                                   where, in protocols/
knn          votes of the nearest training images                           frozen.py: run_knn
linear       one linear layer by gradient descent                           frozen.py: fit_on_features
tran1/tran4  one or four transformer blocks on frozen tokens (FINOLA)       heads.py: TransformerHead
finetune     every weight, with augmentation and layer-wise learning rates  training.py: Classifier
segment      a class for each pixel, on data of its own (built-in scenes)   segmentation.py: Segmenter
detect       boxes and classes by DETR, on data of its own (scenes, COCO)   detect.py: Detector
clusters     do classes form clusters: figures without any training         frozen.py: davies_bouldin, class_cosines
pictures     what there is to see                                           figures.py
finola       FINOLA's curvature, differential equations and embeddings      finola_figures.py
energy       chains of an energy, what they leave of the error              energy_figures.py
hypergradient  gradients of MLO-MAE's masks beside that of its real cycle   hypergradient.py
layers       which neighbours images keep from block to block               layers.py
relatives    what tells MixedAE the relatives of a patch: pictures or codes  relatives.py
features     features of every picture, in files                            features.py
export       weights for timm                                               export.py

The recipes are the papers' (protocols/settings.py names the tables); docs/evaluating.md says what they leave open.
"""

import functools
import itertools
import sys
import time
from pathlib import Path

import torch

from common import load_data
from plumbing.command import run_command
from plumbing.datasets import DATASETS, load_tests
from plumbing.encoders import load_encoder
from plumbing.errors import UserError, unknown
from plumbing.files import append_line, json_text
from plumbing.pictures import plain_style
from plumbing.processes import on_rank_zero, rank, start_distributed
from plumbing.report import write_report
from plumbing.run_files import read_settings, refuse_among_pictures, refuse_taken
from plumbing.settings import flag_parser, given_flags
from plumbing.tables import format_table
from protocols.compare import check_comparison, compare
from protocols.dense import data_of, fitted_to, run_any
from protocols.drawing import BESIDE, DRAWING
from protocols.export import export_encoder
from protocols.heads import width_of
from protocols.rows import Subject
from protocols.run_folders import check_finished, check_labels, check_tests, note_other_pictures, notes_on, record
from protocols.settings import PROTOCOLS, RECIPES, Config, settings_of
from protocols.training import applies, folder_of, trains_on_images

HELP = ("python evaluate.py RUN [RUN ...] [--protocol NAME ...] [--any-field value]",)
HELP += (f"Protocols: {' '.join(PROTOCOLS)}. Recipes change defaults: RUN --protocol NAME --help shows what holds.",)


def evaluate(argv: list):
    """Run the command line. Raises UserError for a run, data or protocol that is wrong."""
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if not runs:
        if argv and argv[0] not in ("-h", "--help"):
            raise UserError(f"give the run folder first: python evaluate.py RUN {' '.join(argv)}")
        flag_parser(Config, *HELP).print_help()
        return
    asked = [word for word in argv[len(runs) :] if word not in ("-h", "--help")]
    given, with_help = given_flags(Config, asked, *HELP), len(runs) + len(asked) < len(argv)
    if len(runs) == 1 or with_help:
        return judge(Path(runs[0]), given, with_help)
    out = given.pop("out", "")
    start_distributed(given.get("device", Config.device))
    on_rank_zero(lambda: check_comparison(runs, out, given))
    for run in runs if given else ():
        if rank() == 0:
            print(f"{run}:")
        judge(Path(run), given)
    if rank() == 0:
        compare(runs, out)


def judge(run_folder: Path, given: dict, with_help: bool = False):
    """Run the protocols that are asked for on one run, or show what holds for them."""
    if not run_folder.is_dir():
        raise UserError(f"no run folder {run_folder}; give one that train.py wrote, such as runs/magma-shapes")
    if not (run_folder / "encoder.pt").exists():
        raise UserError(f"{run_folder} holds no encoder.pt: a run writes it at the end of its first epoch")
    protocols, known = protocols_of(given), read_settings(run_folder / "config.json")
    load, given = data_of(protocols, given, load_data, run_folder / "encoder.pt")
    check_tests(protocols, given.get("test_data", ""))
    if known.get("recipe") == "photos":
        given = {"recipe": "photos"} | given
    if with_help:
        return show_help(protocols, given, known, load_encoder(run_folder / "encoder.pt"))
    if protocols == ["export"]:  # without any data
        return export_encoder(run_folder, given)
    of_run = "data" not in given
    if of_run:
        if "data" not in known:
            raise UserError(f"{run_folder} has no config.json to tell the data set; give --data")
        if known["data"] not in DATASETS and not Path(known["data"]).is_dir():
            raise UserError(f"{run_folder} was trained on the folder {known['data']}, which is not here; give --data")
        given = {"data": known["data"], "root": given.get("root", known.get("root", "data"))} | given
    device = start_distributed(given.get("device", Config.device))
    encoder = load_encoder(run_folder / "encoder.pt", image_size=given.get("image_size", 0)).to(device)
    size = encoder.fields.get("image_size", given.get("image_size") or known.get("image_size"))
    if size is None:
        raise UserError(f"{run_folder} has no config.json to tell the size of the images; give --image-size")
    if not isinstance(size, int):
        raise UserError(f"{run_folder} has an encoder of {size[0]} x {size[1]} images; give a square --image-size")
    own_out, given = "out" not in given, {"out": str(run_folder)} | given | {"image_size": size}
    names = ("root", "image_size", "download", "skip_bad_images", "max_pixels")
    options = {name: given[name] for name in names if name in given}
    options |= {"device": device, "workers": given.get("workers", Config.workers)}
    first_split = "train" if protocols == ["features"] else "labelled"
    train = load(given["data"], split=first_split, **options)
    check_labels(protocols, train)
    if elsewhere := given.get("test_data"):
        given = given | {"resume": True}  # a protocol that trains must have ended: it is read
        reading = {x: options[x] for x in ("skip_bad_images", "max_pixels", "workers", "device") if x in options}
        test = load_tests(elsewhere, train.classes, **reading)
    else:
        test = load(given["data"], split="test", **options)
    if of_run and rank() == 0:
        note_other_pictures(run_folder, train.listing)
    method, width = known.get("method", ""), width_of(encoder)
    configs = {protocol: settings_of(protocol, given, method, width, len(train)) for protocol in protocols}
    configs = {protocol: fitted_to(encoder, protocol, config) for protocol, config in configs.items()}
    if not own_out:
        refuse_among_pictures(Path(given["out"]), next(iter(configs.values())))
    subjects = subjects_of(encoder, train, test, device, next(iter(configs.values())), protocols)
    check_folders(configs, subjects)
    table = {subject.name: {} for subject in subjects}
    try:
        run_all(configs, subjects, table, run_folder, known)
    finally:
        if rank() == 0 and any(table.values()):
            print(format_table({name: values for name, values in table.items() if values}))
            for line in notes_on(table, protocols):
                print(line)
    if rank() == 0 and (own_out or any(table.values())):
        write_report(run_folder)


def show_help(protocols: list, given: dict, known: dict, encoder):
    """The flags, with the values that the last of some protocols takes for this run where they are not given."""
    # No data are read: a size that passes, and more images than any batch.
    config = settings_of(protocols[-1], {"image_size": 1} | given, known.get("method", ""), width_of(encoder), 2**53)
    config.image_size = given.get("image_size", Config.image_size)
    recipe = f" by the recipe {config.recipe!r}" if config.recipe else ""
    flag_parser(config, HELP[0], f"Defaults are those of --protocol {protocols[-1]}{recipe}.").print_help()


def protocols_of(given: dict) -> list:
    """The protocols that are asked for, in the order of PROTOCOLS: a decoder is probed before it is fine-tuned."""
    protocols = given.get("protocol", Config.protocol)
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(unknown("protocol", protocol, PROTOCOLS))
    protocols = sorted(set(protocols), key=PROTOCOLS.index)
    if len(protocols) > 1 and {"features", "export"} & set(protocols):
        raise UserError(f"--protocol {protocols[-1]} is a command of its own: it judges nothing; give it alone")
    recipes = sorted({name for protocol in protocols for name in RECIPES.get(protocol, ())})
    if given.get("recipe") and given["recipe"] not in recipes:
        raise UserError(unknown(f"recipe of {' '.join(protocols)}", given["recipe"], recipes or ["none"]))
    return protocols


def subjects_of(encoder, train, test, device, config: Config, protocols: list) -> list:
    """The rows of the table: the run's encoder, and the baselines that are asked for."""
    subjects = [Subject("trained", encoder, train, test, device)]
    if config.untrained or (config.scratch and "finetune" in protocols):
        torch.manual_seed(config.seed)
        untrained = type(encoder)(**encoder.fields).to(device).eval()
        subjects.append(Subject("untrained", untrained, train, test, device))
    if config.pixels:
        subjects.append(Subject("pixels", None, train, test, device))
    return subjects


def check_folders(configs: dict, subjects: list):
    """Raise UserError where a run folder is taken, before hours are spent on what comes first."""
    for protocol, config in configs.items():
        for subject in subjects:
            if applies(protocol, subject, config) and trains_on_images(protocol, subject, config):
                out = folder_of(protocol, subject, config)
                if config.test_data:
                    on_rank_zero(functools.partial(check_finished, protocol, out, config))
                elif not config.resume:
                    on_rank_zero(functools.partial(refuse_taken, out))


def run_all(configs: dict, subjects: list, table: dict, run_folder: Path, known: dict):
    """Every protocol on every subject: fills the table and eval.jsonl."""
    for protocol, config in configs.items():
        started, results = time.perf_counter(), {}
        if protocol in DRAWING:
            several = protocol in BESIDE
            looked_at = subjects if several else subjects[0]
            draw = functools.partial(DRAWING[protocol], run_folder, known, looked_at, config)
            with plain_style():
                written, found = on_rank_zero(draw)
            for path in written if rank() == 0 else ():
                print(f"wrote {path}")
            if not found:
                continue
            results = found if several else {"trained": found}
            for name, values in results.items():
                table[name] |= values
        for subject in subjects if protocol not in DRAWING else ():
            if applies(protocol, subject, config):
                found = run_any(protocol, subject, config)
                results[subject.name] = found
                table[subject.name] |= found
        if rank() == 0:
            line = record(run_folder, protocol, config, subjects[0], results, time.perf_counter() - started)
            append_line(run_folder / "eval.jsonl", json_text(line))


def main(argv: list) -> int:
    return run_command(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
