"""How a dataclass becomes flags, help and checks."""

import dataclasses
import importlib
import re
import typing
from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import plumbing.settings
from common import METHODS
from plumbing.errors import UserError, nearest
from plumbing.settings import (
    FREE_FIELDS,
    TrainConfig,
    check_batch,
    check_least,
    check_positive,
    choices_of,
    field_comments,
    field_types,
    flag,
    flag_parser,
    read_flags,
)
from protocols.settings import Config as Evaluation

# --- flags -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Example(TrainConfig):
    """A method's configuration, for the tests of the command line."""

    epochs: int = 7  # another default
    width: int = 5  # how wide, 100% sure
    pair: tuple[float, float] = (1.0, 2.0)  # two numbers
    layers: tuple[int, ...] = (-2, -1)  # some numbers
    bright: bool = True  # a switch
    colour: Literal["", "red", "green"] = ""  # one of some; empty for none


RECIPES = {"shapes": {"width": 6}, "cifar10": {"width": 7, "epochs": 3}, "cifar10 --pair 3 4": {"width": 8}}


def flags(*argv):
    return read_flags(Example, RECIPES, list(argv))


def test_read_flags_puts_recipes_between_defaults_and_flags():
    assert (flags().width, flags().epochs) == (6, 7)
    assert flags("--data", "cifar10").epochs == 3
    assert flags("--data", "cifar10", "--width", "9").width == 9
    assert flags("--data", "cifar10", "--pair", "3", "4").width == 8
    assert flags("--data", "cifar10", "--pair", "3", "5").width == 7
    assert flags("--data", "a/folder").width == 5
    config = flags("--data", "a/folder", "--recipe", "cifar10", "--pair", "3", "4")
    assert (config.data, config.width, config.epochs) == ("a/folder", 8, 3)


def test_read_flags_reads_every_kind_of_field():
    config = flags("--layers", "-3", "0", "2", "--pair", "0.5", "4", "--no-bright", "--base-lr", "1e-2", "--compile")
    assert config.layers == (-3, 0, 2)
    assert config.pair == (0.5, 4.0)
    assert not config.bright
    assert config.base_lr == 0.01
    assert config.compile


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown flag '--epoch'; did you mean --epochs?"),
        (["--epochs=--"], "argument --epochs: "),
        (["--layers=--"], "argument --layers: "),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--pair", "1"], "argument --pair: expected 2 arguments"),
        (["stray"], "'stray' stands alone"),
        (["--lr", "3"], "unknown flag '--lr'; did you mean --base-lr?"),
        (["--warmup=3"], "unknown flag '--warmup=3'; did you mean --warmup-epochs?"),
        (["--probe-im", "3"], "unknown flag '--probe-im'; did you mean --probe-images?"),
        (["---"], "unknown flag '---'; --help lists the flags"),
        (["--recipe", "CIFAR100"], "unknown --recipe 'CIFAR100'; did you mean 'cifar10'?"),
    ],
)
def test_read_flags_refuses_what_it_does_not_know(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        flags(*argv)


def help_text():
    return re.sub(r"\s+", " ", flag_parser(Example, "", "").format_help())


def test_help_shows_comment_and_default_of_every_field():
    text = help_text()
    assert "how wide, 100% sure (default: 5)" in text
    assert "another default (default: 7)" in text
    assert "--no-bright" in text
    for field in dataclasses.fields(Example):
        assert field_comments(Example)[field.name] or field.name == "epochs"


def test_help_shows_the_defaults_of_the_recipe(capsys):
    with pytest.raises(SystemExit, match="0"):
        flags("--help", "--data", "cifar10", "--width", "9")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Defaults are those for --data cifar10 --width 9." in text
    assert "how wide, 100% sure (default: 7)" in text and "another default (default: 3)" in text


# --- schedules that are longer than the run --------------------------------------------------------------------------


METHOD_MODULES = {name: importlib.import_module(name) for name in METHODS}
EVERY_RECIPE = [(name, key) for name, module in METHOD_MODULES.items() for key in ("DIR", *module.RECIPES)]


def read(method, key, *argv):
    """The config of a method for `--data` and the flags that a recipe's key names."""
    module = METHOD_MODULES[method]
    return read_flags(module.Config, module.RECIPES, ["--data", *key.split(), *argv])


def share_of_regulariser(config):
    """The share of the run in which MAGMA's term acts."""
    return (min(config.e_st + config.e_dur, config.epochs) - config.e_st) / config.epochs


@given(st.sampled_from(EVERY_RECIPE), st.data())
def test_with_fewer_epochs_a_recipe_keeps_its_shape(recipe, data):
    """What counts epochs keeps its share of the run, to half an epoch; the rest stays; a longer run stretches nothing.

    The warm-up ends before the run does, and MAGMA's term acts.
    """
    whole = read(*recipe)
    epochs = data.draw(st.integers(1, whole.epochs + 9))
    config = read(*recipe, "--epochs", str(epochs))
    counted = {name: least for name, least in config.in_epochs if getattr(whole, name) != ()}
    rest = dataclasses.asdict(whole).keys() - counted.keys() - {"epochs"}
    assert all(getattr(config, name) == getattr(whole, name) for name in rest)
    for name, least in counted.items():
        before, after = getattr(whole, name), getattr(config, name)
        if epochs >= whole.epochs:
            assert after == before
        else:
            assert abs(after - before * epochs / whole.epochs) <= 0.5 or after == least
    assert config.warmup_epochs < epochs
    if recipe[0] == "magma" and epochs <= whole.epochs:
        assert 1 / epochs <= share_of_regulariser(config) <= share_of_regulariser(whole) + 1.01 / epochs
        assert share_of_regulariser(whole) - 1.01 / epochs <= share_of_regulariser(config)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--epochs 12", {"warmup_epochs": 1, "e_st": 2, "e_dur": 50}),
        ("--epochs 12 --e-st 9", {"warmup_epochs": 1, "e_st": 9, "e_dur": 50}),
        ("--epochs 12 --warmup-epochs 2", {"warmup_epochs": 2, "e_st": 2, "e_dur": 50}),
        ("--epochs 1 --milestones 5", {"milestones": (5,), "warmup_epochs": 0, "e_st": 0, "e_dur": 4}),
        ("--epochs 24", {"warmup_epochs": 2, "e_st": 5, "e_dur": 100}),
        ("--epochs 25", {"warmup_epochs": 2, "e_st": 5, "e_dur": 100}),
        ("--data cifar100 --epochs 3", {"warmup_epochs": 0, "e_st": 0, "e_dur": 1}),  # of 2000: 10, 60, 100
        ("--data cifar100 --epochs 200", {"warmup_epochs": 1, "e_st": 6, "e_dur": 10}),
    ],
)
def test_what_is_given_is_kept_where_epochs_shortens_a_recipe(argv, expected):
    config = read("magma", "shapes", *argv.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_milestones_of_a_recipe_move_and_stay_in_the_run():
    recipes = {"shapes": {"epochs": 100, "milestones": (60, 80)}}
    for epochs, expected in ((50, (30, 40)), (3, (2, 2)), (1, (1, 1)), (100, (60, 80)), (300, (60, 80))):
        assert read_flags(Example, recipes, ["--epochs", str(epochs)]).milestones == expected


SHORT = "--epochs 3 shortens the recipe of 24: "
NEVER = "the learning rate does not reach its peak"


@pytest.mark.parametrize(
    ("method", "argv", "notes"),
    [
        ("magma", "", []),
        ("magma", "--epochs 30", []),
        ("magma", "--epochs 3", [SHORT + "--warmup-epochs 2 -> 0, --e-st 5 -> 1, --e-dur 100 -> 12"]),
        ("magma", "--epochs 3 --warmup-epochs 1 --e-st 0 --e-dur 9", []),
        (
            "magma",
            "--epochs 30 --e-st 30",
            ["--e-st 30 is not before the end of --epochs 30: the regulariser never acts"],
        ),
        ("magma", "--epochs 30 --e-st 30 --lam 0", []),
        ("magma", "--e-dur 0", ["--e-dur 0: the regulariser never acts"]),
        ("magma", "--lam 0 --shuffle-graph", ["--shuffle-graph with --lam 0: the regulariser never acts"]),
        ("mixedae", "--epochs 3", [SHORT + "--warmup-epochs 2 -> 0"]),
        ("mixedae", "--epochs 3 --warmup-epochs 3", ["--warmup-epochs 3 takes all of --epochs 3: " + NEVER]),
        ("mixedae", "--warmup-epochs 30", ["--warmup-epochs 30 takes all of --epochs 24: " + NEVER]),
        ("mixedae", "--milestones 12 24", ["--milestones 12 24: --epochs 24 ends before the last one"]),
        ("mixedae", "--milestones 12 23", []),
        ("finola", "--epochs 5", []),  # of 9, with one of warm-up: 0.56
        ("mlo_mae", "--epochs 6 --mask-ratio-end 0.9", []),
        (
            "mlo_mae",
            "--epochs 1 --mask-ratio-end 0.9",
            [
                "--epochs 1 shortens the recipe of 6: --warmup-epochs 1 -> 0",
                "--mask-ratio-end 0.9 is never reached in a single epoch",
            ],
        ),
    ],
)
def test_notes_tell_what_moved_and_what_cannot_take_effect(method, argv, notes):
    assert read(method, "shapes", *argv.split()).notes() == notes


def test_a_config_made_in_python_is_as_it_was_made_and_its_notes_say_what_cannot_take_effect():
    config = METHOD_MODULES["magma"].Config(epochs=3)
    assert (config.warmup_epochs, config.e_st, config.e_dur) == (10, 10, 100)
    assert [line.split(" is ")[0].split(" takes ")[0] for line in config.notes()] == ["--warmup-epochs 10", "--e-st 10"]


def test_help_shows_the_defaults_of_a_shorter_run(capsys):
    with pytest.raises(SystemExit, match="0"):
        read("magma", "shapes", "--epochs", "12", "--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Defaults are those for --data shapes --epochs 12." in text
    assert "linearly (default: 1)" in text and "counted from 0 (default: 2)" in text


# --- any words -------------------------------------------------------------------------------------------------------

ODD = [
    "nan",
    "-inf",
    "1e400",
    "-0",
    "0x10",
    "1_0",
    "9" * 5000,
    "\u0663",
    "\u00b2",
    "",
    " ",
    "a\nb",
    "\x00",
    "\udce9",
    "%s",
]
ODD += ["-1", "2", "0.5", "--", "-", "--no-flip", "--epochs=", "--e-st", "--resume=1", "{}", "1,2", "[1]", "auto", "@x"]


@pytest.mark.parametrize("method", METHODS)
@given(st.data())
def test_any_words_make_a_config_or_one_clear_line(method, data):
    names = [flag(name) for name in field_types(METHOD_MODULES[method].Config)] + ["--recipe", "--protocol", "--no-amp"]
    words = st.one_of(st.sampled_from(names), st.sampled_from(ODD), st.text(max_size=4))
    argv = data.draw(st.lists(words, max_size=6))
    try:
        config = read_flags(METHOD_MODULES[method].Config, METHOD_MODULES[method].RECIPES, argv)
    except UserError as error:
        assert str(error)
    except SystemExit:
        assert "--help" in argv or "-h" in argv
    else:
        config.check()
        assert all("\n" not in line for line in config.notes())


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs 0 makes no sense; give 1 or more"),
        ({"clip": -1.0}, "--clip -1.0 makes no sense; give 0 or more"),
        ({"base_lr": float("nan")}, "--base-lr nan makes no sense"),
        ({"probe_images": -5}, "--probe-images -5 makes no sense"),
        ({"seed": -1}, "--seed -1 makes no sense"),
        ({"seed": 2**64}, "--seed 18446744073709551616 makes no sense; give at most 18446744073709551615"),
        ({"epochs": 10**400}, "--epochs 10+ makes no sense; give at most 9007199254740992"),
        ({"milestones": (1, 10**30)}, "--milestones 10+ makes no sense; give at most 9007199254740992"),
        ({"amp": "bf61"}, "unknown --amp 'bf61'; did you mean 'bf16'"),
        ({"crop_min": 0.0}, "--crop-min 0.0 is not a share of the image"),
        ({"crop_pad": -1}, "--crop-pad -1 makes no sense; give 0 or more"),
        ({"flip": 1.5}, "--flip 1.5 is not a probability"),
        ({"betas": (2.0, 0.9)}, r"--betas \(2.0, 0.9\) must both be at least 0 and less than 1"),
    ],
)
def test_a_config_refuses_what_makes_no_sense(change, message):
    """Where it is made; and `check` says the same where a setting was changed afterwards."""
    with pytest.raises(UserError, match=message):
        TrainConfig(**change)
    config = TrainConfig()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        config.check()


def test_a_config_of_a_method_is_checked_too():
    @dataclasses.dataclass
    class Stricter(Example):
        def check(self):
            super().check()
            check_least(self, width=3)
            check_positive(self, "base_lr")

    assert Stricter(width=3).width == 3
    for change, message in (
        ({"width": 2}, "--width 2 makes no sense; give 3 or more"),
        ({"base_lr": 0.0}, "--base-lr 0.0 makes no sense; give more than 0"),
        ({"epochs": 0}, "--epochs 0 makes no sense"),
        ({"colour": "rad"}, "unknown --colour 'rad'; did you mean 'red'"),
    ):
        with pytest.raises(UserError, match=message):
            Stricter(**change)


def test_a_batch_must_divide_and_fit_into_the_data(monkeypatch):
    with pytest.raises(UserError, match="a batch of 10 does not divide by 1 processes x 3 parts"):
        check_batch(TrainConfig(batch_size=10, accumulate=3))
    with pytest.raises(UserError, match="a batch of 10 is larger than the data set of 9; give --batch-size 9 or less"):
        check_batch(TrainConfig(batch_size=10), 9)
    check_batch(TrainConfig(batch_size=10, accumulate=5), 10)
    monkeypatch.setattr(plumbing.settings, "world_size", lambda: 4)
    with pytest.raises(UserError, match="a batch of 10 does not divide by 4 processes x 1 parts"):
        check_batch(TrainConfig(batch_size=10))


# --- names that do not exist ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "close"),
    [
        ("ebm_p", "ebm_pretrain"),  # begins with it
        ("ebm", "ebm_pretrain"),
        ("EBM-Pretrain", "ebm_pretrain"),
        ("mae", "mlo_mae"),  # has it as a part
        ("pretrain", "ebm_pretrain"),
        ("mixed", "mixedae"),
        ("magna", "magma"),  # is spelt like it
        ("magma.py", "magma"),
        ("resnet", ""),
        ("", ""),
        ("_", ""),
    ],
)
def test_nearest_is_the_name_that_is_meant(word, close):
    assert nearest(word, METHODS) == close


# --- choices ---------------------------------------------------------------------------------------------------------


def test_choices_are_the_values_of_a_literal_without_the_empty_one():
    assert choices_of(field_types(Example)["colour"]) == ("red", "green")
    assert choices_of(field_types(TrainConfig)["amp"]) == ("auto", "bf16", "fp16", "off")
    for kind in (int, bool, tuple[int, ...], tuple[float, float]):
        assert choices_of(kind) == ()


@given(st.text(max_size=6))
def test_any_word_that_is_no_choice_is_refused_with_the_choices(word):
    if word in ("", "red", "green"):
        assert Example(colour=word).colour == word
        return
    with pytest.raises(UserError) as error:
        Example(colour=word)
    assert str(error.value).startswith(f"unknown --colour {word!r}; ")
    assert str(error.value).endswith("choose from red, green")


def test_a_choice_is_a_flag_with_its_values_in_the_help():
    assert flags("--colour", "red").colour == "red"
    assert flags("--colour", "").colour == ""
    with pytest.raises(UserError, match="unknown --colour 'reed'; did you mean 'red'"):
        flags("--colour", "reed")
    assert "--colour {red,green} one of some; empty for none (default: )" in help_text()


def test_types_and_comments_of_a_field_come_from_the_class_that_has_it_last():
    kinds, comments = field_types(Example), field_comments(Example)
    assert kinds["pair"] == tuple[float, float] and kinds["image_size"] is int
    assert comments["epochs"] == "another default"
    assert comments["flip"] == "probability of a mirror image"
    assert list(kinds) == list(comments) == [field.name for field in dataclasses.fields(Example)]


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_a_method_is_a_flag_with_help_and_a_value_that_its_type_allows(method):
    config_class = importlib.import_module(method).Config
    parser = flag_parser(config_class, "", "")
    config = config_class()
    for name, kind in field_types(config_class).items():
        assert f"--{name.replace('_', '-')}" in parser.format_help()
        assert field_comments(config_class)[name], name
        value, inner = getattr(config, name), typing.get_args(kind)
        if typing.get_origin(kind) is tuple:
            assert all(isinstance(x, inner[0]) for x in value), name
        elif choices_of(kind):
            assert value in inner, name
        else:
            assert isinstance(value, kind), name


def test_a_config_takes_every_choice_and_remembers_its_free_fields():
    """What may differ between a run and its continuation is a field, or `--resume` would refuse for a typing error."""
    of_methods = {"start", "recompute"}
    fields = of_methods | {field.name for field in dataclasses.fields(Evaluation)}  # the loop's, and its own
    assert fields >= FREE_FIELDS
    for name, kind in field_types(TrainConfig).items():
        for choice in choices_of(kind):
            assert getattr(TrainConfig(**{name: choice}), name) == choice


@given(epochs=st.integers(1, 50), steps=st.integers(1, 40), most=st.integers(1, 300), epoch_steps=st.booleans())
def test_max_steps_takes_as_many_steps_as_fit(epochs, steps, most, epoch_steps):
    config = TrainConfig(epochs=epochs, max_steps=most, epoch_steps=steps if epoch_steps else 0, warmup_epochs=5)
    config.limit(steps)
    left = config.epoch_steps or steps
    if epochs * steps <= most:
        assert (config.epochs, left, config.warmup_epochs) == (epochs, steps, 5)
    else:
        assert most - left < config.epochs * left <= most
        assert config.epochs == 1 or left == steps
        assert config.warmup_epochs == round(Fraction(5 * config.epochs, epochs))
        assert config.probe_images == 128
    before = dataclasses.asdict(config)
    config.limit(left)
    assert dataclasses.asdict(config) == before
    assert any(text.startswith(f"--max-steps {most} leaves {config.epochs} epoch") for text in config.notes())
