"""The settings of the loop, and how a dataclass becomes flags, help and checks.

A field is a flag; the comment behind it is the help text (read from the source); its type says what it can be. The
values of a Literal are its choices.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import re
import typing
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from plumbing.crops import Crop
from plumbing.decoding import MAX_PIXELS
from plumbing.errors import UserError, nearest, unknown
from plumbing.files import plain
from plumbing.processes import world_size


@dataclass
class TrainConfig:
    """The settings of the loop; each method's Config adds its own. Raises UserError where one makes no sense."""

    data: str = "shapes"  # name of a data set, or a folder of pictures
    recipe: str = ""  # whose settings are taken, by default those for --data: photos is for any folder, on a laptop
    root: str = "data"  # folder that holds the files of a named data set
    download: bool = False  # fetch the files of a named data set where they are missing
    skip_bad_images: bool = False  # leave out images that cannot be read instead of stopping
    max_pixels: int = MAX_PIXELS  # largest picture that is read; more memory is needed for larger ones
    image_size: int = 224  # side of the crops, in pixels
    crop_min: float = 0.08  # smallest share of the image that a random resized crop keeps
    crop_pad: int = 0  # black pixels around an image that is cropped to its own size instead; images in memory alone
    interpolation: Literal["", "bilinear", "bicubic"] = ""  # of crops; else bilinear in memory, bicubic from files
    flip: float = 0.5  # probability of a mirror image
    epochs: int = 100  # passes over the training images, or so many times epoch_steps
    epoch_steps: int = 0  # steps of an epoch, 0 for one pass; more of them take the images several times
    max_steps: int = 0  # most steps of the run, 0 for no limit: fewer epochs or a part of one, to try a command
    batch_size: int = 256  # images a step, over all processes and accumulated parts
    accumulate: int = 1  # parts a step is cut into, to save memory
    base_lr: float = 1.5e-4  # learning rate for a batch of 256; the real one is base_lr * batch_size / 256
    warmup_epochs: int = 10  # epochs in which the learning rate rises linearly
    warmup_lr: float = 0.0  # learning rate that the warm-up starts from
    milestones: tuple[int, ...] = ()  # epochs at which the learning rate falls tenfold, instead of a cosine
    weight_decay: float = 0.05  # of AdamW, on what --decay-on says
    decay_on: Literal["matrices", "tokens", "all"] = "matrices"  # tokens: on these too (MAE's code); all (MAGMA's)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 0.0  # largest norm of the gradient, 0 for no limit
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 where the processor has it, else fp16 on a GPU
    compile: bool = False  # compile the model with torch.compile
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 8  # processes that decode image files, for each training process; at most the cores
    seed: int = 0  # of weights, order, crops and masks
    probe_every: int = 10  # epochs between two probes and pictures; the last epoch always has them, with 0 none has
    probe_images: int = 20000  # most images of each split to probe, 0 for all
    save_every: int = 1  # epochs between two checkpoints; the last epoch is always saved
    out: str = ""  # run folder; the default is runs/<method>-<data>
    resume: bool = False  # go on with the run in the run folder

    # Of the class, not fields: those that count epochs of the run, each with its least value in a short one.
    in_epochs = (("warmup_epochs", 0), ("milestones", 1))
    moved = ()  # what `in_proportion` changed
    told = ()  # what there is to know of the file that a method starts from
    probes_part = True  # whether what is trained is judged by --probe-images of the images alone

    def __post_init__(self):
        self.check()

    def check(self):
        """Raise UserError where a setting makes no sense, whatever the data; a method's Config adds its own rules."""
        for field in dataclasses.fields(self):  # numbers of numpy's would be in no file of the run
            setattr(self, field.name, plain(getattr(self, field.name), "--" + field.name.replace("_", "-")))
        check_choices(self)
        check_size(self)
        check_least(self, image_size=1, epochs=1, batch_size=1, accumulate=1, save_every=1, max_pixels=1)
        check_least(self, epoch_steps=0, max_steps=0, crop_pad=0)
        check_least(self, warmup_epochs=0, probe_every=0, probe_images=0, workers=0, seed=0)
        check_least(self, base_lr=0, warmup_lr=0, weight_decay=0, clip=0)
        if not 0 < self.crop_min <= 1:
            raise UserError(f"--crop-min {self.crop_min} is not a share of the image; give more than 0, at most 1")
        if self.interpolation and self.crop_pad:
            self.refuse_padded(f"--interpolation {self.interpolation}")
        if not 0 <= self.flip <= 1:
            raise UserError(f"--flip {self.flip} is not a probability; give 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {self.betas} must both be at least 0 and less than 1")

    def refuse_padded(self, given: str):
        raise UserError(f"{given} is of resized crops, and --crop-pad {self.crop_pad} resizes none; give --crop-pad 0")

    @property
    def crop(self) -> Crop | int:
        """What `train_batches` takes: how a resized crop is made, or the pixels around a padded one."""
        return self.crop_pad or Crop(self.crop_min, interpolation=self.interpolation)

    def limit(self, steps: int):
        """Hold the run to --max-steps, where an epoch has so many `steps`; what counts epochs shrinks in proportion."""
        if self.max_steps and self.epochs * steps > self.max_steps:
            epochs = max(1, self.max_steps // steps)
            self.moved = in_proportion(type(self), vars(self), {"epochs": epochs})
            for field, _, after in [("epochs", self.epochs, epochs), *self.moved]:
                setattr(self, field, after)
            self.epoch_steps = self.max_steps if self.max_steps < steps else self.epoch_steps
            self.probe_images = min(self.probe_images or 128, 128)  # or the probes would take longer than the steps

    def notes(self) -> list:
        """What to know of the settings that count epochs: those that were moved, and those that cannot take effect."""
        lines, epochs = list(self.told), f"--epochs {self.epochs}"
        if self.moved:
            (_, before, after), *others = self.moved
            changes = ", ".join(f"{flag(field)} {words(a)} -> {words(b)}" for field, a, b in others)
            given = f"--max-steps {self.max_steps}" if self.max_steps else epochs
            lines.append(f"{given} {'shortens' if after < before else 'lengthens'} the recipe of {before}: {changes}")
        if self.max_steps:
            part = f" of {self.epoch_steps} steps" if self.epoch_steps else ""
            probed = f"; probes take {self.probe_images or 'all'} images at most" if self.probes_part else ""
            lines.append(f"--max-steps {self.max_steps} leaves {self.epochs} epoch(s){part}{probed}")
        if self.warmup_epochs >= self.epochs:
            warmup = f"--warmup-epochs {self.warmup_epochs}"
            lines.append(f"{warmup} takes all of {epochs}: the learning rate does not reach its peak")
        if any(epoch >= self.epochs for epoch in self.milestones) and "milestones" not in [x[0] for x in self.moved]:
            lines.append(f"--milestones {words(self.milestones)}: {epochs} ends before the last one")
        return lines


FREE_FIELDS = {"recipe", "root", "download", "skip_bad_images", "max_pixels", "device", "workers", "amp"}
FREE_FIELDS |= {"max_steps", "probe_every", "probe_images", "save_every", "out", "recompute", "resume", "start"}
FREE_FIELDS |= {"tokens", "test_data"}  # of evaluate.py's settings
"""Fields that may differ between a run and its continuation; of `amp`, the precision that it stands for must not, and
of `start`, what the file holds (`Method.origin`). `recompute` changes the rounding alone."""


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def words(value) -> str:
    """A value as one would type it behind its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.cache
def field_comments(config_class) -> dict:
    """The comment behind each field of a dataclass, base classes included: {field: comment}."""
    comments = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            found = re.findall(r"^ {4}(\w+): [^#\n]*(?:# (.*))?$", inspect.getsource(cls), flags=re.MULTILINE)
            comments |= {name: text for name, text in found if text or name not in comments}
    return comments


@functools.cache
def field_types(config_class) -> dict:
    """The type of each field of a dataclass: {field: type}."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def choices_of(kind) -> tuple:
    """The values of a Literal, without the empty one that stands for a default; () for any other type."""
    return tuple(name for name in typing.get_args(kind) if name) if typing.get_origin(kind) is Literal else ()


def check_choices(config):
    """Raise UserError where a setting is not one of the choices of its type."""
    for field, kind in field_types(type(config)).items():
        if choices_of(kind) and getattr(config, field) not in typing.get_args(kind):
            raise UserError(unknown(flag(field), str(getattr(config, field)), choices_of(kind)))


def check_size(config):
    """Raise UserError where a whole number is larger than floats can count, or a seed than a generator takes."""
    for field in field_types(type(config)):
        value, most = getattr(config, field), 2**64 - 1 if field == "seed" else 2**53
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int) and number > most:
                raise UserError(f"{flag(field)} {number} makes no sense; give at most {most}")


def check_least(config, **least):
    """Raise UserError where a setting is below its least value, infinite or nan: check_least(config, steps=0)."""
    for field, bound in least.items():
        if not bound <= (value := getattr(config, field)) < math.inf:  # false for nan too
            raise UserError(f"{flag(field)} {value} makes no sense; give {bound} or more")


def check_positive(config, *fields):
    """Raise UserError where a setting is not more than 0, infinite or nan."""
    for field in fields:
        if not 0 < (value := getattr(config, field)) < math.inf:
            raise UserError(f"{flag(field)} {value} makes no sense; give more than 0")


def in_proportion(config_class, recipe: dict, given: dict) -> list:
    """What of a recipe moves where the given epochs are not its own: (field, before, after), `epochs` first.

    Each field of the class's `in_epochs` that is not given keeps its share of the run, to the nearest epoch; what was
    one epoch or more stays at its least. [] where nothing moves. Both dicts are {field: value}.
    """
    full = {field: recipe.get(field, getattr(config_class, field)) for field, _ in config_class.in_epochs}
    old = max(1, recipe.get("epochs", config_class.epochs))
    new, moved = given.get("epochs", old), []
    for field, least in config_class.in_epochs:
        values = full[field] if isinstance(full[field], tuple) else (full[field],)
        values = tuple(max(min(x, least), round(Fraction(x * new, old))) for x in values)
        after = values if isinstance(full[field], tuple) else values[0]
        if field not in given and after != full[field]:
            moved.append((field, full[field], after))
    return [("epochs", old, new), *moved] if moved else []


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: UserError."""

    def error(self, message):
        raise UserError(message)


def flag_parser(config, usage: str, description: str, beside=()) -> Parser:
    """A parser with one flag a field of a dataclass: --any-field value, --no-x for booleans, no abbreviations.

    `config` is the class, or a config whose values are the defaults that --help shows; `beside` are parsers of other
    flags.
    """
    options = {"parents": beside, "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = Parser(usage=usage, description=description, **options)
    config_class = config if isinstance(config, type) else type(config)
    comments = field_comments(config_class)
    for name, kind in field_types(config_class).items():
        shown, options = getattr(config, name), {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif choices := choices_of(kind):  # what is none of them is refused by `check_choices`, with the nearest one
            options = {"type": str, "metavar": "{" + ",".join(choices) + "}"}
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            options = {"type": inner[0], "nargs": "+" if inner[-1] is ... else len(inner)}
            shown = " ".join(map(str, shown))
        text = f"{comments[name]} (default: {shown})".replace("%", "%%").strip()
        parser.add_argument(flag(name), help=text, **options)
    return parser


def given_flags(config_class, argv: list, usage: str = "", description: str = "") -> dict:
    """Command line -> {field: value} of the flags that are there. Raises UserError for one that does not exist."""
    parser = flag_parser(config_class, usage, description)
    given, rest = parser.parse_known_args(argv)
    if rest:
        if not rest[0].startswith("-"):
            raise UserError(f"{rest[0]!r} stands alone; a value needs its flag: --any-field value")
        known = [option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"]
        close = nearest(rest[0].split("=")[0].strip("-"), known)
        hint = f"did you mean --{close}? " if close else ""
        raise UserError(f"unknown flag {rest[0]!r}; {hint}--help lists the flags")
    for name, value in vars(given).items():
        if value == []:  # argparse's reading of `--width=--`, whatever the type
            raise UserError(f"argument {flag(name)}: expected a value")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def read_flags(
    config_class,
    recipes: dict,
    argv: list,
    usage: str = "",
    description: str = "",
    saved: dict | None = None,
    beside=(),
):
    """Command line -> config: the defaults, then every recipe that fits, then the flags themselves.

    `saved`, settings {field: value} of another run, takes the place of the recipes. `beside`: see `flag_parser`.

    Where --epochs shortens the recipe, what counts epochs shrinks in proportion; `config.notes` tells it.
    A recipe's key is what one would type: "cifar100" fits --data cifar100, "cifar100 --ssl simclr" needs that flag too.
    --help prints the flags with the defaults that hold beside those given, and ends the program.
    Raises UserError for a flag or a value that does not exist.
    """
    asked = [word for word in argv if word not in ("-h", "--help")]
    given, values = given_flags(config_class, asked, usage, description), dict(saved or {})
    source, names = given.get("recipe") or given.get("data", config_class.data), {key.split()[0] for key in recipes}
    if given.get("recipe") and source not in names:
        raise UserError(unknown("--recipe", source, sorted(names)))
    if given.get("recipe") and saved:
        raise UserError(f"--recipe {source} and --config both say what the settings are; give one of them")
    for key, recipe in recipes.items() if saved is None else ():
        name, *flags = key.split()
        if name == source and given_flags(config_class, flags).items() <= given.items():
            values |= recipe
    shorter = given.get("epochs", math.inf) < values.get("epochs", config_class.epochs)
    moved = in_proportion(config_class, values, given) if shorter else []
    values |= {field: after for field, _, after in moved if field != "epochs"}
    if len(asked) < len(argv):
        source = "of --config, beside" if saved else "for"
        note = f"{description}\nDefaults are those {source} {' '.join(asked) or '--data ' + config_class.data}."
        flag_parser(config_class(**values), usage, note, beside).print_help()
        raise SystemExit(0)
    config = config_class(**values | given)
    config.moved = moved
    return config


def check_batch(config: TrainConfig, images: int | None = None):
    """Raise UserError where a batch does not divide by the processes and the accumulated parts, or exceeds the data."""
    parts = world_size() * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"a batch of {config.batch_size} does not divide by {world_size()} processes x {config.accumulate} parts; "
            f"change --batch-size or --accumulate"
        )
    if images is not None and (size := config.batch_size) > images:
        laptop = "" if config.recipe else ", or take a laptop's settings by --recipe photos"
        raise UserError(
            f"a batch of {size} is larger than the data set of {images}; give --batch-size {images} or less{laptop}"
        )
