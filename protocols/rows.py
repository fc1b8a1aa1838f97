"""What is judged, a row of the table each: the run's encoder, the same one untrained, raw pixels."""

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import METHODS, Method, ViT
from plumbing.errors import UserError, reason_of
from plumbing.files import load_checkpoint
from plumbing.images import FolderImages, MemoryImages
from plumbing.probes import features_of, labelled, pooled_features, raw_pixels
from plumbing.processes import autocast
from plumbing.settings import TrainConfig
from protocols.settings import Config


@dataclass
class Subject:
    """The trained encoder, the untrained one, or raw pixels (no encoder), and the images to judge it by.

    Keeps the features that it computed.
    """

    name: str  # trained, untrained or pixels
    encoder: nn.Module | None
    train: MemoryImages | FolderImages
    test: MemoryImages | FolderImages
    device: torch.device
    kept: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.own_pool = getattr(self.encoder, "pool", "")

    def use_pool(self, config: Config):
        """Let a transformer return the features that the settings ask for, or else those of its own."""
        if isinstance(self.encoder, ViT):
            self.encoder.pool = self.encoder.fields["pool"] = config.pool or self.own_pool

    def encode(self, images: Tensor, config: Config) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> features (B, D)."""
        if self.encoder is None:
            return raw_pixels(images)
        with autocast(config.amp, images.device):
            return pooled_features(self.encoder, images)

    def features(self, split: str, config: Config) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of the images that have one; computed once for each kind of feature."""
        self.use_pool(config)
        data, key = getattr(self, split), (split, getattr(self.encoder, "pool", ""))
        if key not in self.kept:
            chosen = labelled(data, config.probe_images or (20_000 if self.encoder is None else 0))
            self.kept[key] = features_of(lambda images: self.encode(images, config), data, chosen, config.image_size)
        return self.kept[key]

    def one_a_class(self, config: Config) -> Tensor:
        """The first test image of each of at most eight classes (B, 3, H, W); without classes, the first eight.

        Raises UserError where no image has a label of a class.
        """
        labels = self.test.labels.cpu() if len(self.test.classes) else torch.arange(len(self.test))
        if not (labels >= 0).any():
            raise UserError("no test image has a label, so there is none to draw")
        first = [int(torch.nonzero(labels == label)[0]) for label in labels[labels >= 0].unique()[:8]]
        return next(iter(self.test.plain_batches(first, config.image_size)))[0]


def load_method(run_folder: Path, known: dict, data) -> Method:
    """The whole method of a run, from what its config.json says (`known`) and its last.pt.

    Raises UserError where these are not of a run, or do not fit each other.
    """
    if known.get("method") not in list(METHODS):
        raise UserError(f"{run_folder} has no config.json that names its method; choose a run of train.py")
    module = importlib.import_module(known["method"])
    # The loop's own settings shape no network, and an older or edited file may have some that make no sense here.
    loop = {field.name for field in dataclasses.fields(TrainConfig)} - {"image_size"}
    names = {field.name for field in dataclasses.fields(module.Config)} - loop
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items() if name in names}
    if fields.get("start"):  # the file that the run went on from may be gone
        fields["start"] = str(run_folder / "encoder.pt")
    state = load_checkpoint(run_folder / "last.pt")
    try:
        method = getattr(module, METHODS[known["method"]])(module.Config(**fields), data)
        method.load_state_dict(state["weights"])
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (settings and weights of an edited file can fail in any way)
        reason = reason_of(error)
        raise UserError(f"config.json and last.pt of {run_folder} do not fit each other ({reason})") from None
    return method.eval()


def method_of(subject: Subject, run_folder: Path, known: dict) -> Method:
    """The method that a subject's encoder was trained by, on its device; images are normalised as the encoder does."""
    statistics = {name: subject.encoder.fields[name] for name in ("mean", "std")}
    return load_method(run_folder, known, dataclasses.replace(subject.test, **statistics)).to(subject.device)


def method_for(protocol: str, name: str, subject: Subject, run_folder: Path, known: dict, config: Config) -> Method:
    """As `method_of`, for a protocol that looks into the runs of one method, at their own size of images.

    Raises UserError for any other run, and for another size.
    """
    if known.get("method") != name or not (run_folder / "last.pt").exists():
        raise UserError(
            f"--protocol {protocol} looks into a run of {name} with its config.json and last.pt, not into {run_folder}"
        )
    method = method_of(subject, run_folder, known)
    if method.config.image_size != config.image_size:
        raise UserError(f"--protocol {protocol} needs the run's own --image-size {method.config.image_size}")
    return method
