"""How a dataclass becomes flags, help and checks."""

import dataclasses
import importlib
import re
import typing
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import plumbing.settings
from common import METHODS
from plumbing.errors import UserError
from plumbing.settings import (
    FREE_FIELDS,
    TrainConfig,
    check_batch,
    check_least,
    check_positive,
    choices_of,
    field_comments,
    field_types,
    flag_parser,
    read_flags,
)

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
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--pair", "1"], "argument --pair: expected 2 arguments"),
        (["stray"], "'stray' stands alone"),
        (["--lr", "3"], "unknown flag '--lr'; did you mean --base-lr?"),
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


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs 0 makes no sense; give 1 or more"),
        ({"clip": -1.0}, "--clip -1.0 makes no sense; give 0 or more"),
        ({"base_lr": float("nan")}, "--base-lr nan makes no sense"),
        ({"probe_images": -5}, "--probe-images -5 makes no sense"),
        ({"seed": -1}, "--seed -1 makes no sense"),
        ({"amp": "bf61"}, "unknown --amp 'bf61'; did you mean 'bf16'"),
        ({"crop_min": 0.0}, "--crop-min 0.0 is not a share of the image"),
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
    with pytest.raises(UserError, match="a batch of 10 is larger than the data set of 9; lower --batch-size"):
        check_batch(TrainConfig(batch_size=10), 9)
    check_batch(TrainConfig(batch_size=10, accumulate=5), 10)
    monkeypatch.setattr(plumbing.settings, "world_size", lambda: 4)
    with pytest.raises(UserError, match="a batch of 10 does not divide by 4 processes x 1 parts"):
        check_batch(TrainConfig(batch_size=10))


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
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= FREE_FIELDS
    for name, kind in field_types(TrainConfig).items():
        for choice in choices_of(kind):
            assert getattr(TrainConfig(**{name: choice}), name) == choice
