"""The settings of all protocols, and the recipes of the papers that fill them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from plumbing.crops import Crop
from plumbing.errors import UserError, unknown
from plumbing.processes import note, world_size
from plumbing.settings import TrainConfig, check_batch, check_least, check_positive, flag, in_proportion

PROTOCOLS = ("knn", "linear", "clusters", "pictures", "finola", "energy", "hypergradient", "layers", "relatives")
PROTOCOLS += ("tran1", "tran4", "finetune", "segment", "detect", "features", "export")
DENSE_PROTOCOLS = ("segment", "detect")  # those whose answers lie in places of a picture: protocols/dense.py
USUAL = ("knn", "linear")


@dataclass
class Config(TrainConfig):
    """The settings of all protocols; a recipe of RECIPES fills them, and flags have the last word.

    Raises UserError where one makes no sense.
    """

    protocol: tuple[str, ...] = USUAL  # one or more of those above
    recipe: str = ""  # a recipe of the protocol, by default the method's own; docs/evaluating.md lists them
    data: str = ""  # data set to evaluate on, by default that of the run, of segment and detect: scenes
    test_data: str = ""  # probes, finetune: test on <class>/* of this folder instead; what trains must have ended
    image_size: int = 0  # side of the images, 0 for what the encoder was trained with
    probe_every: int = 0  # tran1, tran4, finetune: epochs between two tests, 0 for a test at the end alone
    out: str = ""  # folder of what the protocols write, by default RUN; eval.jsonl is always in RUN
    probe_images: int = 0  # knn to relatives, but hypergradient: most images of each split to take, 0 for all
    untrained: bool = False  # also evaluate the same architecture with random weights
    pixels: bool = False  # also evaluate raw pixels (knn, linear, clusters, segment)
    scratch: bool = False  # finetune: start from random weights alone
    pool: Literal["", "cls", "mean"] = ""  # features: CLS token or mean of the patch tokens; else recipe's or encoder's
    tokens: bool = False  # features: of every patch or place (N, T, D), instead of one vector an image
    map: Literal["pca", "tsne"] = "pca"  # pictures: features in principal components; tsne draws them by t-SNE as well
    perplexity: float = 40.0  # pictures, --map tsne: how many neighbours a point has, about
    k: int = 10  # knn, layers: number of neighbours
    metric: Literal["euclidean", "cosine"] = "euclidean"  # knn: euclidean is MAGMA's
    vote: Literal["one", "distance"] = "one"  # knn: what a neighbour's vote weighs, 1 or 1 / distance (MAGMA's code)
    crop_clamp: bool = False  # crops: cut a box that does not fit, as MAE's linear probe does, instead of a new draw
    cache: bool = True  # linear: encode whole images once, rather than crops and flips in each epoch
    base_lrs: tuple[float, ...] = ()  # linear: one head for each base learning rate, instead of --base-lr
    optimizer: Literal["sgd", "lars", "adamw"] = "adamw"  # of all that train
    momentum: float = 0.9  # of sgd and lars
    batchnorm: bool = False  # linear, finetune, segment: standardise features by a batch norm without affine weights
    head: Literal["linear", "tran1", "tran4", "pyramid", "mf522", "mf211", "plain"] = "linear"  # what is trained on top
    finetune: bool = False  # segment, detect: train the encoder too, not the head alone
    queries: int = 100  # detect: boxes that the decoder gives for a picture
    aux_weight: float = 0.4  # segment --head pyramid: weight of the loss of a small head on the third map
    dropout: float = 0.0  # of the head: tran1, tran4, pyramid and plain
    layer_decay: float = 1.0  # finetune, --finetune: factor of the learning rate from a layer to the one below
    drop_path: float = 0.0  # finetune, --finetune: rate of stochastic depth in the last block
    positions: Literal["fixed", "learned"] = "fixed"  # finetune: those of a ViT, learned too as in MAE's code
    fc_norm: bool = False  # finetune: the mean over a ViT's patches first, then a new norm, as in MAE's code
    smoothing: float = 0.0  # linear, tran1, tran4, finetune: label smoothing
    mixup: float = 0.0  # tran1, tran4, finetune, linear --no-cache: alpha of mixup, 0 for off
    cutmix: float = 0.0  # tran1, tran4, finetune, linear --no-cache: alpha of cutmix, 0 for off
    randaugment: float = 0.0  # tran1, tran4, finetune, linear --no-cache: magnitude of RandAugment, of 10; 0 for off
    erase: float = 0.0  # tran1, tran4, finetune, linear --no-cache: probability of random erasing

    def check(self):
        super().check()
        check_positive(self, "k", "base_lr", "queries")
        check_least(self, perplexity=1, aux_weight=0)
        for field in ("momentum", "dropout", "drop_path", "smoothing"):
            if not 0 <= getattr(self, field) < 1:
                self.refuse(field, "at least 0, less than 1")
        limits = {"erase": 1, "layer_decay": 1, "randaugment": 10, "mixup": math.inf, "cutmix": math.inf}
        for field, most in limits.items():
            if not 0 <= getattr(self, field) <= most or getattr(self, field) == math.inf:
                self.refuse(field, f"0 to {most}")
        if not all(0 < rate < math.inf for rate in self.base_lrs):
            self.refuse("base_lrs", "more than 0")
        if self.crop_clamp and self.crop_pad:
            self.refuse_padded("--crop-clamp")

    @property
    def crop(self) -> Crop | int:
        found = super().crop
        return found if self.crop_pad else found._replace(clamp=self.crop_clamp)

    @property
    def probes_part(self) -> bool:
        """See TrainConfig. What `common.fit` trains here is judged by all test pictures."""
        return "linear" in self.protocol and self.cache

    def refuse(self, field: str, expected: str):
        raise UserError(f"--{field.replace('_', '-')} {getattr(self, field)} makes no sense; give {expected}")


def changed(config: Config, **fields) -> Config:
    """A copy of the settings with other fields, which still tells what of its recipe moved."""
    found = dataclasses.replace(config, **fields)
    found.moved = config.moved  # which is no field
    return found


OUTSIDE = ("untrained", "pixels", "scratch", "tokens", "k", "metric", "vote", "test_data")  # of no training
OUTSIDE += ("map", "perplexity")


def decoder_width(dim: int) -> int:
    """Width of FINOLA's decoder: 192, 384, 768 for encoders of width 720, 1440, 2880, or at most that."""
    return 192 if dim <= 720 else 384 if dim <= 1440 else 768


class ByWidth(NamedTuple):
    """A value of FINOLA's tables that depends on the width of its decoder: 192, 384 or 768."""

    small: Any
    middle: Any
    large: Any

    def at(self, dim: int):
        return self[(192, 384, 768).index(decoder_width(dim))]


class BySize(NamedTuple):
    """A value of a table that has one for ViT-B and one for ViT-L: a width of 1024 or more takes the second."""

    base: Any
    large: Any

    def at(self, dim: int):
        return self[dim >= 1024]


LINEAR = {"base_lr": 0.1, "weight_decay": 0.0, "crop_min": 0.08}
STRONG = {"randaugment": 9.0, "smoothing": 0.1}
FINETUNE = STRONG | {"betas": (0.9, 0.999), "weight_decay": 0.05, "batch_size": 1024, "epochs": 100, "warmup_epochs": 5}
FINETUNE |= {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1, "pool": "mean"}
TRAN = STRONG | {"base_lr": 5e-4, "weight_decay": 0.1, "batch_size": 4096, "epochs": 200, "warmup_epochs": 10}
TRAN |= {"dropout": ByWidth(0.1, 0.2, 0.2), "erase": ByWidth(0.0, 0.0, 0.25), "betas": (0.9, 0.999)}
# Ours, for folders of any size: 1,000 or 2,000 small steps.
PHOTOS = {"batch_size": 32, "epochs": 20, "epoch_steps": 50, "warmup_epochs": 2, "crop_min": 0.4, "smoothing": 0.1}
PHOTOS |= {"weight_decay": 0.05, "pool": "mean"}
# UPerNet's head on MAE, as MMSegmentation has it: a learning rate of 1e-4 for a batch of 16, 160,000 steps, of which
# 1,500 warm up.
UPERNET = {"finetune": True, "head": "pyramid", "base_lr": 1.6e-3, "betas": (0.9, 0.999), "weight_decay": 0.05}
UPERNET |= {"batch_size": 16, "epochs": 320, "epoch_steps": 500, "warmup_epochs": 3, "layer_decay": 0.65}
UPERNET |= {"drop_path": 0.1, "dropout": 0.1, "crop_min": 0.25}
# FINOLA, appendix C and Table 18: a learning rate of 1e-4 for a batch of 16, and what it leaves open as DETR has it.
DETECT = {"head": "mf522", "base_lr": 1.6e-3, "weight_decay": 1e-4, "betas": (0.9, 0.999), "batch_size": 16}
DETECT |= {"epochs": 500, "milestones": (400,), "warmup_epochs": 0, "clip": 0.1, "crop_min": 0.5, "dropout": 0.1}
RECIPES = {
    "linear": {
        # MAGMA, "Evaluation protocol"
        "magma": LINEAR
        | {"optimizer": "sgd", "batch_size": 256, "epochs": 100, "warmup_epochs": 0, "milestones": (60, 80)},
        # FINOLA, Table 13
        "finola": LINEAR
        | {"optimizer": "sgd", "batch_size": 4096, "epochs": 90, "warmup_epochs": 10}
        | {"batchnorm": True, "cache": False, "pool": "mean"},
        # MAE, Table 10
        "mae": LINEAR
        | {"optimizer": "lars", "batch_size": 16384, "epochs": 90, "warmup_epochs": 10}
        | {"batchnorm": True, "cache": False, "pool": "cls"},
        "photos": LINEAR
        | {"optimizer": "sgd", "batch_size": 32, "epochs": 20, "epoch_steps": 100, "warmup_epochs": 0}
        | {"milestones": (12, 16)},
    },
    "tran1": {"finola": TRAN, "photos": PHOTOS | {"base_lr": 8e-3}},  # FINOLA, Table 13
    "tran4": {"finola": TRAN, "photos": PHOTOS | {"base_lr": 8e-3}},
    "finetune": {
        "mae": FINETUNE | {"base_lr": 1e-3, "layer_decay": 0.75},  # MAE, Table 9, ViT-B
        "mae_code": FINETUNE | {"base_lr": 5e-4, "layer_decay": 0.65, "erase": 0.25},  # its release, ViT-B
        "ebm": FINETUNE | {"base_lr": 1e-3, "layer_decay": 0.75},  # Energy-inspired pretraining, Table A
        # MixedAE, Table A2
        "mixedae": FINETUNE
        | {"base_lr": BySize(5e-4, 1e-3), "batch_size": BySize(1024, 512), "epochs": BySize(100, 50)}
        | {"layer_decay": 0.7},
        # MixedAE, appendix B, of eleven small sets: 5,000 steps; a learning rate of 1e-2, of four that are tried
        "mixedae_small": {"optimizer": "sgd", "base_lr": 4e-2, "weight_decay": 0.0, "batch_size": 64, "pool": "mean"}
        | {"epochs": 50, "epoch_steps": 100, "warmup_epochs": 0},
        # MLO-MAE, appendix B.4, of CIFAR: a learning rate of 1e-4 for the batch of 64
        "mlo_mae_cifar": {"base_lr": 4e-4, "weight_decay": 5e-5, "batch_size": 64, "epochs": 100, "warmup_epochs": 0}
        | {"betas": (0.9, 0.999), "crop_pad": 4, "pool": "cls"},
        # FINOLA, Table 14
        "finola": FINETUNE
        | {"base_lr": 5e-4, "batch_size": 512, "epochs": ByWidth(200, 150, 100), "drop_path": 0.0, "head": "tran1"}
        | {"layer_decay": ByWidth(0.9, 0.9, 0.85), "mixup": ByWidth(0.0, 0.2, 0.8), "dropout": 0.2, "erase": 0.25}
        | {"cutmix": ByWidth(0.0, 0.25, 1.0)},
        "photos": PHOTOS | {"base_lr": 16e-3, "layer_decay": 0.75},
    },
    "segment": {
        # Ours, for any encoder and folders of any size: a linear layer on frozen maps, 600 steps; a pyramid, 1,000
        "scenes": {"base_lr": 0.16, "weight_decay": 0.0, "batch_size": 16, "epochs": 10, "epoch_steps": 60}
        | {"warmup_epochs": 1, "crop_min": 0.5, "batchnorm": True},
        "scenes_pyramid": {"base_lr": 3.2e-2, "weight_decay": 0.01, "batch_size": 16, "epochs": 10, "epoch_steps": 100}
        | {"warmup_epochs": 1, "crop_min": 0.5, "head": "pyramid"},
        "mae": UPERNET,  # He et al. 2022, by MMSegmentation's settings
        "ebm": UPERNET,  # Table C, which tells no settings: MAE's
        # MixedAE, supplement, appendix B
        "mixedae": UPERNET | {"base_lr": 4.8e-3, "layer_decay": BySize(0.65, 0.75)},
        # MLO-MAE, appendix B.6, in the code that it names
        "mlo_mae": UPERNET | {"base_lr": 3.2e-3, "batch_size": 8},
    },
}
RECIPES["detect"] = {
    "finola": DETECT,
    # Appendix C and Table 19: 200 epochs more, of encoder and decoder
    "finola_finetune": DETECT | {"finetune": True, "base_lr": 1.6e-4, "epochs": 200, "milestones": (150,)},
    # Ours: 3,000 small steps
    "scenes": DETECT
    | {"head": "plain", "queries": 10, "base_lr": 8e-3, "batch_size": 32, "epochs": 30, "epoch_steps": 100}
    | {"milestones": (), "warmup_epochs": 1, "crop_min": 1.0, "dropout": 0.0},
}
# Of protocols without a recipe: what is not Config's. Half precision would shuffle neighbours.
DEFAULTS = {"features": {"amp": "off", "batch_size": 32}, "layers": {"amp": "off"}}
OWN_RECIPE = {  # of a method's own paper; others take MAE's, the field's common ground
    "linear": {"magma": "magma", "finola": "finola"},
    "finetune": {"finola": "finola", "ebm_pretrain": "ebm", "mixedae": "mixedae"},
    "detect": {"finola": "finola"},
    "segment": {"ebm_pretrain": "ebm", "finola": "scenes", "mixedae": "mixedae", "mlo_mae": "mlo_mae"},
}
HEADS = {"finetune": ("linear", "tran1", "tran4"), "segment": ("linear", "pyramid")}  # what --head can be
HEADS |= {"detect": ("mf522", "mf211", "plain")}

# What has no effect there: a flag of these is refused, for one would think that it had.
UNUSED = ("scratch", "pool", "tokens", "map", "perplexity", "k", "metric", "vote", "cache", "base_lrs", "probe_images")
UNUSED += ("positions", "fc_norm", "smoothing", "mixup", "cutmix", "randaugment", "erase")
UNUSED = {"segment": (*UNUSED, "queries"), "detect": (*UNUSED, "batchnorm", "aux_weight")}
# What has none there, but may have with another protocol of the same command: a flag of these is told.
IDLE = dict.fromkeys(("linear", "tran1", "tran4"), ("head", "layer_decay", "drop_path", "positions", "fc_norm"))
IDLE |= {"layers": ("pool", "metric", "vote"), "relatives": ("pool", "k", "metric", "vote")}


def check_used(protocol: str, given: dict):
    """Raise UserError where a given flag asks for what segment or detect does not do."""
    unused = UNUSED.get(protocol, ())
    if protocol == "detect" and given.get("data") != "scenes":
        unused += ("interpolation", "crop_clamp")  # DETR's crops of files have their own
    if wrong := [field for field in given if field in unused and given[field] != getattr(Config, field)]:
        flags = " ".join(map(flag, wrong))
        raise UserError(f"{flags}: of no use to --protocol {protocol} --data {given.get('data')}; leave it out")


def note_idle(protocol: str, given: dict, config: Config):
    """Tell of given flags that cannot take effect with a protocol, or beside its other settings."""
    idle = {f"with --protocol {protocol}": IDLE.get(protocol, ())}
    if protocol in DENSE_PROTOCOLS and not config.finetune:
        idle["without --finetune"] = ("layer_decay", "drop_path")
    if protocol == "segment":
        idle[f"with --head {config.head}"] = ("batchnorm",) if config.head == "pyramid" else ("dropout", "aux_weight")
    if protocol == "pictures" and config.map != "tsne":
        idle["without --map tsne"] = ("perplexity",)
    for why, fields in idle.items():
        if flags := " ".join(flag(x) for x in fields if given.get(x, getattr(Config, x)) != getattr(Config, x)):
            note(f"{flags}: of no effect {why}")


def recipe_of(protocol: str, given: dict, method: str, dim: int) -> dict:
    """The recipe of a protocol, with its name: the one that is given, or else the method's own, or MAE's.

    `dim` as in `settings_of`.
    """
    if protocol not in RECIPES:
        return DEFAULTS.get(protocol, {}) | {"recipe": ""}
    recipes, own = RECIPES[protocol], OWN_RECIPE.get(protocol, {}).get(method, "mae")
    if method == "mlo_mae" and given.get("data") in ("cifar10", "cifar100"):
        own = "mlo_mae_cifar"
    if protocol in DENSE_PROTOCOLS and given.get("data") == "scenes":
        own = "scenes"
    name = next(name for name in (given.get("recipe"), own, *recipes) if name in recipes)
    values = {field: v.at(dim) if isinstance(v, ByWidth | BySize) else v for field, v in recipes[name].items()}
    return values | {"recipe": name}


def settings_of(protocol: str, given: dict, method: str, dim: int, images: int) -> Config:
    """Defaults, the protocol's recipe, the given flags. `dim` is the encoder's width, `images` how many train.

    With fewer or more epochs than the recipe's own, its warm-up and milestones move in proportion. A batch that is
    larger than the data set becomes all of it. Raises UserError for what makes no sense.
    """
    check_used(protocol, given)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    recipe = recipe_of(protocol, given, method, dim)
    moved = in_proportion(Config, recipe, given) if protocol in RECIPES else []
    recipe |= {field: after for field, _, after in moved}
    values = defaults | recipe | given | {"recipe": recipe["recipe"]}
    trained = protocol in RECIPES and not (protocol == "linear" and values["cache"])  # by `common.fit`
    parts = world_size() * values["accumulate"] if trained else 1
    if (batch := values["batch_size"]) > images:
        values["batch_size"] = images - images % max(1, parts)
        if protocol in RECIPES:
            note(f"{protocol}: a batch of {batch} exceeds the {images} images, one of {values['batch_size']} it is")
    if protocol != "linear":
        values["base_lrs"] = ()
    config = Config(**values)
    config.moved = moved
    if config.head not in (heads := HEADS.get(protocol, (config.head,))):
        raise UserError(unknown(f"--head of {protocol}", config.head, heads))
    note_idle(protocol, given, config)
    if trained:
        check_batch(config)  # `fit` holds it to --max-steps, and prints the notes of the settings
    elif protocol in RECIPES:
        config.limit(config.epoch_steps or images // config.batch_size)
        for text in config.notes():
            note(f"{protocol}: {text}")
    if config.batchnorm and config.batch_size < 2 * parts:
        raise UserError(
            f"--batchnorm needs two images in each part of a batch, {config.batch_size} are too few; try --no-batchnorm"
        )
    return config


def result_names(name: str, config: Config) -> list:
    """What the results of a protocol's heads are called: one name, or one for each of several learning rates."""
    return [f"{name} {rate:g}" for rate in dict.fromkeys(config.base_lrs)] or [name]
