"""Which neighbours the images keep from block to block of a transformer: what MAGMA's term is there for.

A block's vector of an image is the mean of its patch tokens, as MAGMA's term has it (`magma.image_features`); here no
patch is masked.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from common import ViT
from magma import image_features, manifold_loss
from plumbing.curves import panels
from plumbing.errors import UserError
from plumbing.probes import effective_rank, features_of, labelled, moderate, smallest
from plumbing.processes import autocast, note
from plumbing.run_files import data_name
from plumbing.tables import ROWS
from protocols.figures import Album
from protocols.rows import Subject
from protocols.settings import Config

SHOWN = {"next": "shared with the next block", "last": "shared with the last block", "rank": "effective rank"}
COLUMNS = SHOWN | {"rank_centred": "rank, centred", "spread": "spread", "counted": "counted"}  # of a block: printed
GRAPH = 256  # images of a graph: the batch of MAGMA's largest experiments


def draw_layers(run_folder: Path, known: dict, subjects: list, config: Config) -> tuple[list, dict]:
    """A table of the blocks of each encoder, and a chart of them in a folder `layers`: paths, and figures by row."""
    subjects = [subject for subject in subjects if subject.encoder is not None]
    if not isinstance(subjects[0].encoder, ViT):
        kind = type(subjects[0].encoder).__name__
        raise UserError(f"--protocol layers looks at the blocks of a transformer; {run_folder} holds a {kind}")
    blocks = {subject.name: blocks_of(subject, config) for subject in subjects}
    album = Album(Path(config.out) / "layers", f"neighbours along the blocks on {data_name(config.data)}")
    album.chart("layers", chart_of(blocks, album.title))
    for name, rows in blocks.items():
        print(f"{ROWS[name]}: {config.k} nearest neighbours")
        print("block" + "".join(f"{title:>{len(title) + 3}}" for title in COLUMNS.values()))
        for i, row in enumerate(rows, 1):
            cells = [f"{row[key]:>{len(title) + 3}.3f}" for key, title in COLUMNS.items()]
            print(f"{i:<5}" + "".join(cells).replace("nan", "  -"))
    note("counted: the share of a block's variance that MAGMA's term counts, by the graph of the block before")
    return album.written, {name: figures_of(rows) for name, rows in blocks.items()}


def figures_of(rows: list) -> dict:
    """What `blocks_of` found, for the table and the record: of the last two blocks, and of each by its number."""
    found = {"neighbours_kept": rows[-2]["next"] if len(rows) > 1 else math.nan, "rank_of_last": rows[-1]["rank"]}
    return found | {f"block_{i}_{key}": value for i, row in enumerate(rows, 1) for key, value in row.items()}


def blocks_of(subject: Subject, config: Config) -> list:
    """A dict a block with the keys of COLUMNS, over the test images; nan where there is nothing to tell.

    `next` and `last` are shares in [0, 1] of the nearest neighbours that two blocks have in common; `rank` is that of
    the vectors as they are, `rank_centred` without their mean; `spread` is their root mean square distance to it;
    `counted` is what the function of that name tells of the block and the one before.
    """
    encoder, chosen = subject.encoder, labelled(subject.test, config.probe_images)
    if config.k >= len(chosen):
        raise UserError(f"--k {config.k} neighbours of {len(chosen)} test images, of which one is the image itself")

    def encode(images):
        with autocast(config.amp, images.device):
            hidden = encoder.encode(encoder.embed(images), hidden=True)[1]
        return torch.cat([image_features(block.float()) for block in hidden], dim=1)  # (B, depth D)

    layers = features_of(encode, subject.test, chosen, config.image_size)[0].unflatten(1, (-1, encoder.dim))
    layers = list(layers.unbind(dim=1))  # of every block (N, D)
    if not all(bool(layer.isfinite().all()) for layer in layers):
        note(f"{ROWS[subject.name]}: features are not finite, so no neighbours")
        return [dict.fromkeys(COLUMNS, math.nan)] * len(layers)
    near = [neighbours(layer, config.k) for layer in layers]
    rows = []
    for i, layer in enumerate(layers):
        centred = layer.double() - layer.double().mean(dim=0)
        after = i + 1 < len(layers)
        row = {"next": shared(near[i], near[i + 1]) if after else math.nan}
        row |= {"last": shared(near[i], near[-1]) if after else math.nan}
        row |= {"rank": effective_rank(layer), "rank_centred": effective_rank(centred)}
        row |= {"spread": float(centred.norm() / len(centred) ** 0.5)}
        rows.append(row | {"counted": counted(layer, layers[i - 1]) if i else math.nan})
    return rows


def neighbours(features: Tensor, k: int, chunk: int = 0) -> Tensor:
    """The k nearest other rows of each row, euclidean: (N, D) -> (N, k); float64, for layers may nearly collapse."""
    z = features.double()
    z = z / moderate(z.abs().max())
    z = z - z.mean(dim=0)
    norms, found = z.square().sum(dim=1), []
    for rows in torch.arange(len(z), device=z.device).split(chunk or max(1, 2**23 // len(z))):
        distances = torch.addmm(norms, z[rows], z.T, alpha=-2)  # up to a constant a row
        distances[torch.arange(len(rows)), rows] = math.inf
        found.append(smallest(distances, k))
    return torch.cat(found)


def shared(a: Tensor, b: Tensor) -> float:
    """The share in [0, 1] of neighbours that are in both lists: (N, k), (N, k)."""
    return float((a[:, :, None] == b[:, None]).any(dim=2).double().mean())


def counted(later: Tensor, earlier: Tensor) -> float:
    """The share of a block's variance that MAGMA's term counts, by graphs of the block before: (N, D), (N, D').

    Small where images differ that are no neighbours, and those alone; 1 where the graph tells nothing, so that the term
    is the variance itself.
    """
    order = torch.randperm(len(later), generator=torch.Generator().manual_seed(0)).to(later.device)
    graphs, shares = [part for part in order.split(GRAPH) if len(part) >= min(GRAPH, len(order))], []
    for part in graphs:
        y = later[part].double()
        y = y - y.mean(dim=0)
        term = manifold_loss(y, earlier[part].double()) * len(part) ** 2
        shares.append(float(term / y.square().sum()))
    return sum(shares) / len(shares)


def chart_of(blocks: dict, title: str):
    """Neighbours in common with the next and the last block, and the effective rank, a line for each encoder."""
    figure, axes = panels(title, len(SHOWN))
    for one, (key, label) in zip(axes, SHOWN.items(), strict=True):
        for name, rows in blocks.items():
            one.plot(range(1, len(rows) + 1), [row[key] for row in rows], marker="o", markersize=3, label=ROWS[name])
        one.set(xlabel="block", ylabel=label, ylim=(0, None if key == "rank" else 1))
        one.locator_params(axis="x", integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
