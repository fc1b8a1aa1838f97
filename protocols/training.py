"""The protocols that encode each image anew, with crops, flips and more: each a run of its own. And which run when."""

import copy
import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from common import Method, ViT, fit, gradient_if
from plumbing.errors import UserError, reason_of
from plumbing.files import load_checkpoint
from plumbing.probes import features_of, labelled, pooled_features
from plumbing.processes import autocast, note, on_rank_zero
from plumbing.run_files import data_name
from protocols.augment import mix_labels, rand_augment, random_erase
from protocols.frozen import run_clusters, run_knn, run_linear, without_value
from protocols.heads import (
    LinearHeads,
    accuracies,
    add_drop_path,
    head_groups,
    layer_groups,
    make_head,
    make_optimizer,
    mean_before_norm,
    note_diverged,
    one_hot,
    soft_loss,
    token_features,
    width_of,
)
from protocols.rows import Subject
from protocols.settings import DENSE_PROTOCOLS, OUTSIDE, Config, changed, result_names


def run_protocol(protocol: str, subject: Subject, config: Config) -> dict:
    """One protocol on one subject -> {result: value}."""
    if trains_on_images(protocol, subject, config):
        if protocol == "finetune" and subject.name == "untrained":
            config = changed(config, layer_decay=1.0)  # it would all but freeze random lower layers
        return train_classifier(protocol, subject, config)
    if protocol == "linear":
        return run_linear(subject, config)
    return on_rank_zero(lambda: {"knn": run_knn, "clusters": run_clusters}[protocol](subject, config))


def trains_on_images(protocol: str, subject: Subject, config: Config) -> bool:
    """Whether a protocol encodes images anew in each epoch, as a run of its own."""
    return protocol in DENSE_PROTOCOLS or (
        subject.encoder is not None
        and (protocol in ("tran1", "tran4", "finetune") or (protocol == "linear" and not config.cache))
    )


def applies(protocol: str, subject: Subject, config: Config) -> bool:
    """Whether a protocol has a meaning for a subject."""
    if subject.encoder is None:
        return protocol in ("knn", "linear", "clusters", "segment")
    if subject.name == "untrained" and not config.untrained:
        return protocol == "finetune"  # the subject is there for --scratch alone
    return not (protocol == "finetune" and config.scratch and subject.name == "trained")


class OnEncoder(Method):
    """An encoder, frozen or not, and a head that a subclass puts on it, trained by the loop that all methods share."""

    def __init__(self, encoder: nn.Module, frozen: bool, config: Config):
        super().__init__()
        self.encoder, self.frozen, self.config = encoder, frozen, config
        encoder.requires_grad_(not frozen)
        if not frozen and config.drop_path:
            add_drop_path(encoder, config.drop_path)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()  # its norms keep their statistics
        return self

    def optimizer(self, config: Config) -> torch.optim.Optimizer:
        if self.frozen:
            return make_optimizer(head_groups(self.head, config), config)
        rates = (config.layer_decay, config.weight_decay, config.decay_on)
        return make_optimizer(layer_groups(self.encoder, self.head, *rates), config)


class Classifier(OnEncoder):
    """An encoder and a head, trained on labels of whole images."""

    captions = ("image", *["augmented"] * 4)

    def __init__(self, protocol: str, encoder: nn.Module, head: nn.Module, classes: int, config: Config):
        super().__init__(encoder, frozen=protocol != "finetune", config=config)
        self.name, self.head, self.classes = protocol, head, classes
        self.origin = digest(encoder) if self.frozen else digest(encoder) + digest(head)
        self.features = pooled_features if isinstance(head, LinearHeads) else token_features
        if protocol == "finetune" and config.fc_norm:
            if not isinstance(encoder, ViT) or not isinstance(head, LinearHeads) or encoder.pool == "cls":
                raise UserError("--fc-norm is for a ViT with --pool mean and --head linear; leave it out")
            self.features, head.norm = mean_before_norm, nn.LayerNorm(encoder.dim, eps=1e-6)
            encoder.norm.requires_grad_(False)  # it is left out; DDP takes no parameter without a gradient

    @torch.no_grad()
    def augment(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What comes after crop and flip: RandAugment, erasing, then mixup or cutmix with their targets."""
        config = self.config
        mean, std = self.encoder.mean.to(images), self.encoder.std.to(images)  # (3, 1, 1), of the data that it knows
        with torch.autocast(images.device.type, enabled=False):
            if config.randaugment:
                images = rand_augment(images, mean, config.randaugment)
            if config.erase:
                images = random_erase(images, config.erase, mean, std)
            if config.mixup or config.cutmix:
                images, targets = mix_labels(images, targets, config.mixup, config.cutmix)
        return images, targets

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (heads, B, classes)."""
        with gradient_if(not self.frozen):
            features = self.features(self.encoder, images)
        return self.head(features)

    def forward(self, images: Tensor, labels: Tensor) -> dict:
        images, targets = self.augment(images, one_hot(labels, self.classes, self.config.smoothing))
        return {"loss": soft_loss(self.logits(images), targets)}

    def probe(self, encode, train, test, config) -> dict:
        """Accuracy on the test images: {"accuracy": ...}, or one for each of several learning rates."""

        def classify(images):
            with autocast(config.amp, images.device):
                return self.logits(images).transpose(0, 1)  # (B, heads, classes)

        logits, labels = features_of(classify, test, labelled(test), config.image_size)
        names = result_names("accuracy", config)
        if not len(labels):  # none to be right about
            return dict.fromkeys(names, math.nan)
        return dict(zip(names, accuracies(logits.unbind(dim=1), labels), strict=True))

    def pictures(self, images: Tensor) -> Tensor:
        """Rows of an image and four of its augmentations (flips and crops come before): (B, 5, 3, H, W)."""
        targets = torch.zeros(len(images), 1, device=images.device)
        return torch.stack([images] + [self.augment(images, targets)[0] for _ in range(4)], dim=1).clamp(0, 1)


def digest(module: nn.Module) -> str:
    """Ten characters that tell one set of weights from another."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:10]


def train_classifier(protocol: str, subject: Subject, config: Config) -> dict:
    """The protocols that encode each image anew: linear without cache, tran1, tran4, finetune.

    Each is a run of its own, in a folder <protocol>-<data> of the run's: with a log, checkpoints, and --resume. nan
    where the encoder's weights are not finite.
    """
    if not all(parameter.isfinite().all() for parameter in subject.encoder.parameters()):
        return without_value(subject, result_names(protocol, config), "its weights are not finite")
    subject.use_pool(config)
    subject.kept.clear()  # features that are kept would take memory from the training
    classes, kind = len(subject.train.classes), config.head if protocol == "finetune" else protocol
    torch.manual_seed(config.seed)
    std = 2e-5 if protocol == "finetune" else 0.01
    head = make_head(kind, subject.encoder.dim, classes, config, std, width_of(subject.encoder))
    if protocol == "finetune" and kind != "linear":
        start_from_probe(head, kind, subject, config)
    learned = protocol == "finetune" and config.positions == "learned"
    encoder = learn_positions(subject.encoder) if learned else copy.deepcopy(subject.encoder)
    method = Classifier(protocol, encoder, head, classes, config).to(subject.device)
    config = fit_in_folder(protocol, method, subject, config)
    result = on_rank_zero(lambda: method.probe(None, subject.train, subject.test, config))
    return note_diverged({name.replace("accuracy", protocol): value for name, value in result.items()})


def fit_in_folder(protocol: str, method: Method, subject: Subject, config: Config) -> Config:
    """Train a method as a run in its protocol's own folder, then set it to be judged -> the settings of that run."""
    # What the training does not depend on must not keep it from being resumed.
    fields = {name: getattr(Config, name) for name in OUTSIDE} | {"out": str(folder_of(protocol, subject, config))}
    config = changed(config, protocol=(protocol,), **fields)
    fit(method, subject.train, subject.test, config)
    method.eval()
    return config


def learn_positions(encoder: nn.Module) -> ViT:
    """A transformer of the same weights that learns its positions too, from where they are (MAE's code)."""
    if not isinstance(encoder, ViT):
        raise UserError(f"--positions learned is for a ViT, this encoder is a {type(encoder).__name__}; leave it out")
    found = ViT(**encoder.fields | {"learned_positions": True})
    found.load_state_dict(encoder.state_dict() | {"positions": encoder.positions.detach()})
    return found.train(encoder.training)


def start_from_probe(head: nn.Module, kind: str, subject: Subject, config: Config):
    """FINOLA, Appendix C: fine-tuning takes the decoder from where the finished probe of the same encoder ended."""
    path = folder_of(kind, subject, config) / "last.pt"
    state = load_checkpoint(path) if path.exists() else {}
    try:
        found = state["identity"]
        steps = found.get("epoch_steps") or found["images"] // found["batch_size"]
        last = steps * found["epochs"]
        fits = (found["origin"], found["data"], state["step"]) == (digest(subject.encoder), config.data, last)
        weights = {name[5:]: value for name, value in state["weights"].items() if name.startswith("head.")}
    except (KeyError, TypeError, AttributeError, ArithmeticError):  # no file, or one of something else
        fits = False
    if fits:
        try:
            head.load_state_dict(weights)
        except (TypeError, RuntimeError) as error:
            reason = reason_of(error)
            raise UserError(f"{path} does not fit ({reason}); remove its folder and make it anew") from None
    else:
        how = "the same without --finetune" if kind == "detect" else f"--protocol {kind}"
        note(f"{path} holds no finished probe of this encoder; {how} makes one to start from")


def folder_of(protocol: str, subject: Subject, config: Config) -> Path:
    """The run folder of a protocol that trains on images."""
    stage = "-finetune" if protocol == "detect" and config.finetune else ""  # which starts from the other one's end
    name = f"{protocol}{stage}-{data_name(config.data)}"
    return Path(config.out) / (name if subject.name == "trained" else f"{name}-{subject.name}")
