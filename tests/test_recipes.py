"""The settings of the protocols: recipes of the papers, flags over them, and what makes no sense."""

import dataclasses
import math

import pytest

from plumbing.errors import UserError
from plumbing.run_files import LATER
from plumbing.settings import field_comments
from protocols.settings import Config, result_names, settings_of


def check(config, **expected):
    assert {name: getattr(config, name) for name in expected} == expected


def recipe(protocol, name="", dim=768, **given):
    given |= {"image_size": 224, "data": "x"} | ({"recipe": name} if name else {})
    return settings_of(protocol, given, "magma", dim, 10**6)


def test_linear_recipes_are_those_of_the_papers():
    """MAGMA, "Evaluation protocol"; FINOLA, Table 13; MAE, Table 10."""
    magma = {"optimizer": "sgd", "base_lr": 0.1, "epochs": 100, "milestones": (60, 80), "batch_size": 256}
    check(recipe("linear"), recipe="magma", **magma)
    shared = {"base_lr": 0.1, "weight_decay": 0.0, "epochs": 90, "warmup_epochs": 10, "milestones": ()}
    shared |= {"batchnorm": True}
    check(recipe("linear", "finola"), optimizer="sgd", batch_size=4096, pool="mean", **shared)
    check(recipe("linear", "mae"), optimizer="lars", batch_size=16384, momentum=0.9, pool="cls", **shared)
    for name, cached in (("magma", True), ("finola", False), ("mae", False)):
        check(recipe("linear", name), cache=cached, crop_min=0.08, flip=0.5, randaugment=0.0, smoothing=0.0)


def test_what_maes_code_does_besides_is_off_unless_asked_for():
    """So that runs from before these settings go on: LATER has the value that they had."""
    config, off = recipe("linear", "mae"), {"crop_clamp": False, "interpolation": "", "positions": "fixed"}
    off |= {"fc_norm": False}
    check(config, **off)
    assert {name: LATER[name] for name in off} == off
    assert recipe("linear", "mae", crop_clamp=True, interpolation="bicubic").crop == (0.08, 1.0, "bicubic", True)
    assert config.crop == (0.08, 1.0, "", False)


@pytest.mark.parametrize("protocol", ["tran1", "tran4"])
@pytest.mark.parametrize(("dim", "dropout", "erase"), [(720, 0.1, 0.0), (1440, 0.2, 0.0), (2880, 0.2, 0.25)])
def test_transformer_recipes_are_finolas_table_13(protocol, dim, dropout, erase):
    """FINOLA, Table 13."""
    shared = {"optimizer": "adamw", "base_lr": 5e-4, "weight_decay": 0.1, "batch_size": 4096, "warmup_epochs": 10}
    shared |= {"epochs": 200, "randaugment": 9.0, "smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0}
    check(recipe(protocol, dim=dim), dropout=dropout, erase=erase, **shared)


FINETUNE = {"optimizer": "adamw", "weight_decay": 0.05, "betas": (0.9, 0.999), "warmup_epochs": 5, "randaugment": 9.0}
FINETUNE |= {"smoothing": 0.1}


@pytest.mark.parametrize(
    ("name", "rate", "decay", "erase"),
    [("mae", 1e-3, 0.75, 0.0), ("ebm", 1e-3, 0.75, 0.0), ("mixedae", 5e-4, 0.7, 0.0), ("mae_code", 5e-4, 0.65, 0.25)],
)
def test_finetune_recipes_are_those_of_the_papers(name, rate, decay, erase):
    """MAE, Table 9, and its release; Energy-inspired pretraining, Table A; MixedAE, Table A2."""
    strong = {"batch_size": 1024, "epochs": 100, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1, "head": "linear"}
    check(recipe("finetune", name), base_lr=rate, layer_decay=decay, erase=erase, **FINETUNE | strong)


def test_the_fine_tuning_of_mixedaes_vit_l_is_its_own():
    """MixedAE, Table A2 (L)."""
    strong = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1, "layer_decay": 0.7}
    for dim, rate, batch, epochs in ((768, 5e-4, 1024, 100), (1024, 1e-3, 512, 50)):
        config = settings_of("finetune", {"image_size": 224, "data": "x"}, "mixedae", dim, 10**6)
        check(config, recipe="mixedae", base_lr=rate, batch_size=batch, epochs=epochs, **FINETUNE | strong)


def test_small_sets_are_fine_tuned_for_5000_steps_of_sgd():
    """MixedAE, appendix B, downstream classification: the learning rate of a step is one of the four."""
    config = recipe("finetune", "mixedae_small")
    check(config, optimizer="sgd", weight_decay=0.0, layer_decay=1.0, mixup=0.0, cutmix=0.0, randaugment=0.0)
    assert config.epochs * config.epoch_steps == 5000
    assert config.base_lr * config.batch_size / 256 in (1e-3, 3e-3, 1e-2, 3e-2)


def test_mlo_mae_is_fine_tuned_on_cifar_as_its_appendix_says():
    """MLO-MAE, appendix B.4; elsewhere it follows MAE (B.3)."""
    for data, name in (("cifar10", "mlo_mae_cifar"), ("cifar100", "mlo_mae_cifar"), ("imagenet", "mae")):
        config = settings_of("finetune", {"image_size": 32, "data": data}, "mlo_mae", 768, 10**6)
        assert config.recipe == name
    config = recipe("finetune", "mlo_mae_cifar")
    check(config, optimizer="adamw", weight_decay=5e-5, batch_size=64, epochs=100, crop_pad=4, flip=0.5)
    check(config, mixup=0.0, cutmix=0.0, randaugment=0.0, erase=0.0, layer_decay=1.0, drop_path=0.0)
    assert config.base_lr * config.batch_size / 256 == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("dim", "decay", "epochs", "mixup", "cutmix"),
    [(720, 0.9, 200, 0.0, 0.0), (1440, 0.9, 150, 0.2, 0.25), (2880, 0.85, 100, 0.8, 1.0)],
)
def test_finetune_recipe_of_finola_is_its_table_14(dim, decay, epochs, mixup, cutmix):
    """FINOLA, Table 14."""
    config = recipe("finetune", "finola", dim)
    check(config, base_lr=5e-4, batch_size=512, dropout=0.2, erase=0.25, head="tran1", drop_path=0.0, **FINETUNE)
    check(config, layer_decay=decay, epochs=epochs, mixup=mixup, cutmix=cutmix)


def test_recipes_keep_their_shape_with_fewer_epochs():
    check(recipe("linear", epochs=10), milestones=(6, 8), warmup_epochs=0)
    check(recipe("finetune", "mae", epochs=20), warmup_epochs=1)
    check(recipe("finetune", "mae", epochs=20, warmup_epochs=7), warmup_epochs=7)


@pytest.mark.parametrize(
    ("protocol", "given", "notes"),
    [
        ("linear", {"epochs": 10}, ["linear: --epochs 10 shortens the recipe of 100: --milestones 60 80 -> 6 8"]),
        (
            "linear",
            {"epochs": 200},
            ["linear: --epochs 200 lengthens the recipe of 100: --milestones 60 80 -> 120 160"],
        ),
        ("linear", {"epochs": 1, "milestones": (1,)}, ["linear: --milestones 1: --epochs 1 ends before the last one"]),
        ("linear", {"epochs": 100}, []),
        ("finetune", {"epochs": 20}, []),  # told by the loop
        ("knn", {"epochs": 2}, []),
    ],
)
def test_what_moves_with_the_epochs_of_a_protocol_is_told_once(protocol, given, notes, capsys):
    config = recipe(protocol, **given)
    assert capsys.readouterr().out.splitlines() == [f"note: {text}" for text in notes]
    if protocol == "finetune":
        assert config.notes() == ["--epochs 20 shortens the recipe of 100: --warmup-epochs 5 -> 1"]


def test_a_recipe_is_used_where_it_exists():
    for protocol, name in (("linear", "mae"), ("tran1", "finola"), ("finetune", "mae"), ("knn", "")):
        assert recipe(protocol, "mae").recipe == name
    assert recipe("linear", "ebm").recipe == "magma"


@pytest.mark.parametrize(
    ("method", "name"), [("finola", "finola"), ("mixedae", "mixedae"), ("ebm_pretrain", "ebm"), ("magma", "mae")]
)
def test_fine_tuning_follows_the_method(method, name):
    assert settings_of("finetune", {"image_size": 8, "data": "x"}, method, 8, 9999).recipe == name


def test_flags_have_the_last_word():
    check(recipe("linear", "mae", epochs=3, batch_size=64), epochs=3, batch_size=64, optimizer="lars")
    assert recipe("tran1", base_lrs=(0.1, 0.2)).base_lrs == ()  # for linear alone


@pytest.mark.parametrize(("protocol", "given", "size"), [("finetune", {}, 100), ("finetune", {"accumulate": 3}, 99)])
def test_a_batch_that_exceeds_the_images_is_all_of_them(protocol, given, size, capsys):
    config = settings_of(protocol, {"image_size": 8, "data": "x"} | given, "magma", 8, 100)
    assert config.batch_size == size
    assert f"a batch of 1024 exceeds the 100 images, one of {size} it is" in capsys.readouterr().out


def test_several_learning_rates_have_a_result_each():
    assert result_names("linear", Config(image_size=8, base_lrs=(0.1, 0.1))) == ["linear 0.1"]
    assert result_names("linear", Config(image_size=8, base_lrs=(0.1, 0.2))) == ["linear 0.1", "linear 0.2"]
    assert result_names("linear", Config(image_size=8)) == ["linear"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "cosin"}, "unknown --metric 'cosin'; did you mean 'cosine'? choose from euclidean, cosine"),
        ({"optimizer": "adam"}, "unknown --optimizer 'adam'; did you mean 'adamw'? choose from sgd, lars, adamw"),
        ({"pool": "max"}, "unknown --pool 'max'; choose from cls, mean"),
        ({"head": "tran2"}, "unknown --head 'tran2'; did you mean 'tran"),
        ({"drop_path": 1.0}, "--drop-path 1.0 makes no sense; give at least 0, less than 1"),
        ({"randaugment": 11.0}, "--randaugment 11.0 makes no sense; give 0 to 10"),
        ({"cutmix": math.inf}, "--cutmix inf makes no sense; give 0 to inf"),
        ({"mixup": -1.0}, "--mixup -1.0 makes no sense; give 0 to inf"),
        ({"smoothing": math.nan}, "--smoothing nan makes no sense; give at least 0, less than 1"),
        ({"k": 0}, "--k 0 makes no sense; give more than 0"),
        ({"base_lr": 0.0}, "--base-lr 0.0 makes no sense; give more than 0"),
        ({"epochs": 0}, "--epochs 0 makes no sense; give 1 or more"),
        ({"accumulate": 0}, "--accumulate 0 makes no sense; give 1 or more"),
        ({"batch_size": 100, "accumulate": 3}, "a batch of 100 does not divide by 1 processes x 3 parts"),
    ],
)
def test_settings_refuse_what_makes_no_sense(given, message):
    with pytest.raises(UserError) as error:
        settings_of("finetune", {"image_size": 8, "data": "x"} | given, "magma", 8, 100)
    assert str(error.value).startswith(message)


def test_a_learning_rate_of_several_must_be_positive():
    with pytest.raises(UserError, match=r"--base-lrs \(0.1, 0.0\) makes no sense; give more than 0"):
        settings_of("linear", {"image_size": 8, "data": "x", "base_lrs": (0.1, 0.0)}, "magma", 8, 100)


def test_comments_help_with_every_flag():
    comments = field_comments(Config)
    assert all(
        comments[field.name] for field in dataclasses.fields(Config) if field.name not in ("epochs", "image_size")
    )
