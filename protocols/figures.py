"""Pictures of a run: what its method makes of images, where its encoder looks, how its features lie, how it learned."""

import functools
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common import METHODS, ViT, patchify, random_mask, unpatchify
from mlo_mae import MultiLevelMAE, top_mask
from plumbing.crops import resize
from plumbing.curves import layer_map, learning_curves, panels
from plumbing.errors import UserError, printable
from plumbing.files import write_atomically
from plumbing.pictures import save_pictures
from plumbing.probes import unfit
from plumbing.processes import autocast
from plumbing.run_files import data_name, read_log
from protocols.rows import Subject, method_of
from protocols.settings import Config
from protocols.tsne import tsne


def draw_pictures(run_folder: Path, known: dict, subject: Subject, config: Config) -> tuple[list, dict]:
    """Write all that there is to see of a run into its folder `pictures`; returns the paths, and no figures."""
    encoder, notes, name = subject.encoder, [], known.get("method", "encoder")
    album = Album(Path(config.out) / "pictures", f"{name} on {data_name(config.data)}")
    subject.use_pool(config)
    images = subject.one_a_class(config)

    method = None
    if known.get("method") in METHODS and (run_folder / "last.pt").exists():
        try:
            method = method_of(subject, run_folder, known)
        except UserError as error:
            notes.append(f"no reconstructions: {error}")
    else:
        notes.append("no reconstructions, these need the config.json and last.pt of a method's run")
    if method is not None and method.config.image_size == config.image_size:
        torch.manual_seed(config.seed)
        with autocast(config.amp, subject.device):
            rows = method.pictures(images)
        album.sheet("reconstructions", "reconstructions", method.captions, rows)
        if isinstance(method, MultiLevelMAE) and method.masking is not None:
            captions = ["image", "random 10 %", *[f"learned {100 * share:.0f} %" for share in SHARES]]
            album.sheet("masks", "the patches that are masked first", captions, masks_of(method, images))
    elif method is not None:
        notes.append(f"reconstructions are drawn at the run's own size, {method.config.image_size}, alone")

    if isinstance(encoder, ViT):
        attention, keys = look_inside(encoder, images)
        maps = stretch(attention, (2,)).unflatten(2, encoder.grid)  # (B, heads, h, w)
        captions = ["image", *[f"head {i + 1}" for i in range(maps.shape[1])]]
        album.sheet("attention", "attention of the CLS token, last block", captions, beside(images, maps))
        maps = key_maps(keys).unflatten(2, encoder.grid)  # (B, blocks, h, w)
        captions = ["image", *[f"block {i + 1}" for i in range(maps.shape[1])]]
        heading = "leading component of the keys, without their mean over the images"
        album.sheet("keys", heading, captions, beside(images, maps))
    else:
        notes.append("attention and keys are drawn for transformers alone")

    features, labels = subject.features("test", config)
    if reason := unfit(test=features):
        notes.append(f"no map of the features: {reason}")
    else:
        heading, classes = f"{album.title}: test features", subject.test.classes
        album.chart("features", feature_map(features, labels, classes, heading))
        if config.map == "tsne":
            heading += f" by t-SNE, perplexity {config.perplexity:g}"
            place = functools.partial(tsne, seed=config.seed, perplexity=config.perplexity)
            album.chart("tsne", feature_map(features, labels, classes, heading, place, MOST))
    title = f"{name} on {data_name(known.get('data', ''))}"  # what it was trained on
    _, log = read_log(run_folder / "log.jsonl")
    curves = learning_curves(log, title, known)
    if curves:
        album.chart("curves", curves)
    else:
        notes.append("log.jsonl has no two epochs, so no curves")
    if layers := layer_map(log, f"{title}: the term between two blocks", known):
        album.chart("layers", layers)
    for note in notes:
        print(f"note: {note}")
    return album.written, {}


# ---------------------------------------------------------------------------------------------------------------------
# Sheets of pictures, and charts
# ---------------------------------------------------------------------------------------------------------------------


SIDE = 128  # pixels of a picture in a sheet, about


class Album:
    """A folder of pictures under one title; `written` lists the files."""

    def __init__(self, folder: Path, title: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.title, self.written = folder, printable(title), []

    def sheet(self, name: str, heading: str, captions, rows: Tensor):
        """Rows of pictures (R, K, 3, H, W) in [0, 1], large ones reduced, with a caption over each column."""
        if rows.shape[-1] > SIDE:
            rows = resize(rows.flatten(0, 1).float(), SIDE).unflatten(0, rows.shape[:2])
        self.save(name, lambda path: save_pictures(rows, path, captions, f"{self.title}: {heading}"))

    def chart(self, name: str, figure):
        """A Figure of matplotlib."""
        self.save(name, lambda path: write_atomically(path, lambda file: figure.savefig(file, format="png")))

    def save(self, name: str, write):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in such letters shows as boxes
            write(self.folder / f"{name}.png")
        self.written.append(self.folder / f"{name}.png")


def heat(values: Tensor) -> Tensor:
    """Values in [0, 1] (..., H, W) as colours (..., 3, H, W) in [0, 1], from dark blue to yellow."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](values.double().cpu().clamp(0, 1).numpy())  # (..., H, W, 4)
    return torch.from_numpy(colours[..., :3]).float().movedim(-1, -3)


def beside(images: Tensor, maps: Tensor) -> Tensor:
    """Images (B, 3, H, W) with their maps (B, K, h, w) in [0, 1] as heat: rows (B, 1 + K, 3, H, W)."""
    maps = F.interpolate(maps.float().cpu(), images.shape[2:], mode="nearest")  # (B, K, H, W)
    return torch.cat([images.cpu()[:, None], heat(maps)], dim=1)


def stretch(x: Tensor, dims) -> Tensor:
    """Shift and scale to [0, 1] over some dimensions; what is all the same becomes 0."""
    low, high = x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


SHARES = (0.1, 0.25, 0.5, 0.75)  # of the patches


@torch.no_grad()
def masks_of(method: MultiLevelMAE, images: Tensor) -> Tensor:
    """MLO-MAE, Fig. 4: images (B, 3, H, W), then a tenth of their patches masked at random, as MAE does, then SHARES of
    them, the most probable ones by the masking network: rows (B, 2 + SHARES, 3, H, W). Masked is grey.
    """
    _, probability = method.choose(method.encoder.embed(images))  # (B, N)
    patch, patches = method.encoder.patch, patchify(images, method.encoder.patch)  # (B, N, P)
    masks = [random_mask(*probability.shape, SHARES[0], device=images.device)]
    masks += [top_mask(probability, share) for share in SHARES]
    rows = [unpatchify(patches.masked_fill(mask[..., None], 0.5), patch, *images.shape[2:]) for mask in masks]
    return torch.stack([images, *rows], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# What an encoder looks at
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def look_inside(encoder: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the CLS token in the last block (B, heads, N), and the keys of every block (blocks, B, N, D)."""
    keys, last = [], []

    def attention(q, k, v):
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, 1 + N, 1 + N)
        keys.append(rearrange(k[:, :, 1:], "b h n d -> b n (h d)").float().cpu())
        last[:] = [weights[:, :, 0, 1:].float().cpu()]
        return weights @ v

    encoder.encode(encoder.embed(images), attention)
    return last[0], torch.stack(keys)


def key_maps(keys: Tensor) -> Tensor:
    """The leading principal component of the keys of each block: (blocks, B, N, D) -> (B, blocks, N) in [0, 1].

    First the mean over the images is taken off the keys of each position: from the third block or so on, the largest
    difference between keys is where they are, not what is there. (A single image is left as it is.)
    """
    keys = keys.double()
    if keys.shape[1] > 1:
        keys = keys - keys.mean(dim=1, keepdim=True)
    scores = [principal_components(block.flatten(0, 1), 1).view(block.shape[:2]) for block in keys]  # each (B, N)
    return stretch(torch.stack(scores, dim=1), (0, 2))


def principal_components(x: Tensor, count: int) -> Tensor:
    """The leading principal components of rows (N, D) -> (N, count), each with its larger tail on the positive side."""
    x = x.double() - x.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    scores = x @ vectors[:, -count:].flip(1)
    return scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# How features lie
# ---------------------------------------------------------------------------------------------------------------------


MOST = 1000  # points by t-SNE, whose time grows with the square of their number


def feature_map(features: Tensor, labels: Tensor, classes: list, title: str, place=None, most: int = 0):
    """The features (N, D) of at most ten classes, coloured by class, in their two leading principal components.

    Or where place(features) -> (n, 2) puts them: at most `most` images, 0 for all, the same for any encoder.
    """
    shown = labels.unique()[:10]
    chosen = torch.nonzero(torch.isin(labels, shown))[:, 0].cpu()
    if 0 < most < len(chosen):
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:most]]
    features, labels = features.cpu()[chosen], labels.cpu()[chosen]
    points = place(features) if place else principal_components(features, 2)
    figure, (axes,) = panels(title, size=(7.2, 5.6))
    area = min(50, max(12, 15_000 / len(points)))
    for label in shown.tolist():
        axes.scatter(*points[labels == label].T.numpy(), s=area, alpha=0.7, linewidths=0, label=str(label))
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for text, dot, label in zip(legend.get_texts(), legend.legend_handles, shown.tolist(), strict=True):
        dot.set_sizes([50])
        name = str(classes[label]) if label >= 0 else "no label"
        # matplotlib's own way to give it would take what stands between two $ for a formula
        text.set(text=name if len(name) <= 24 else f"{name[:23]}…", parse_math=False)
    axes.set(xticks=[], yticks=[])
    if not place:
        axes.set(xlabel="first principal component", ylabel="second principal component")
    return figure
