"""What FINOLA's own analysis looks at: its Fig. 5, Eq. 2, 4 and 9 on real images, and appendix E."""

from pathlib import Path

import torch
from torch import Tensor

from finola import (
    FinolaAutoencoder,
    gaussian_curvature,
    gaussian_samples,
    interpolate,
    laplacian_residual,
    mirror,
    orders_residual,
    pde_residuals,
    peak_curvature,
    principal_reconstructions,
    psnr,
)
from plumbing.curves import panels, wide
from plumbing.probes import labelled
from plumbing.processes import autocast
from plumbing.run_files import data_name
from protocols.figures import Album, beside, stretch
from protocols.rows import Subject, method_for
from protocols.settings import Config

COMPONENTS = (1, 4, 16, 64, 192, 768)  # that are drawn, and all; the text of Fig. 15 names 192 alone
SOME = 256  # embeddings, at most, whose pictures are looked at
CURVATURES = {  # two readings of Fig. 5's features: which map is bent; what is in the names of files before it
    "curvature": ("curvature of the map that the upsampler is given", ""),
    "encoder curvature": ("curvature of the encoder's map of the whole image", "encoder_"),
}


def draw_finola(run_folder: Path, known: dict, subject: Subject, config: Config) -> tuple[list, dict]:
    """FINOLA's analysis of a run, into its folder `finola`; returns the paths and the figures for the table."""
    method = method_for("finola", "finola", subject, run_folder, known, config)
    album = Album(Path(config.out) / "finola", f"{method.config.variant} on {data_name(config.data)}")
    images, found = subject.one_a_class(config), look_into_finola(method, subject, config)
    if "q" in found:
        with torch.no_grad(), autocast(config.amp, subject.device):
            own = method.embed(images, method.middle(images)).float()
        draw_embeddings(method, found["q"], own, images, album)
        some = found["q"][:: -(-len(found["q"]) // SOME)].to(subject.device)  # of all classes, if they are in order
        embedded = look_at_embeddings(method, some, method.middle(images))
        print("appendix E: " + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in embedded.items()))
    else:
        print("note: masked_b has no vector q, so no embeddings and no residuals")
    if method.config.norm != "channel":
        print("note: residuals are those of Eq. 2, which has the channel norm, so there are none")
    residuals = {name: found[name].sort().values for name in ("dz/dx", "dz/dy", "laplacian", "orders") if name in found}
    if residuals:
        lines = {f"{name}: median {values.median():.2f}": values for name, values in residuals.items()}
        labels = {"xlabel": "test images, sorted", "ylabel": "relative residual"}
        equations = "Eq. 2, 4 and 5" if "laplacian" in residuals else "Eq. 2"
        album.chart("residuals", ranked(f"{album.title}: residuals of {equations}", lines, **labels))
    if residuals and "laplacian" not in residuals:
        print("note: A and B unroll fewer than three cells a side, so Eq. 4 is not measured; a finer map has more")
    if "curvature" in found:
        with torch.no_grad():
            bent = (method.feature_map(images, method.middle(images)).float(), method.encoder(images).float())
        for (name, (title, prefix)), z in zip(CURVATURES.items(), bent, strict=True):
            draw_curvature(found[name], z, images, title, prefix, album)
    else:
        print(f"note: a map of {method.size} x {method.size} is too small for curvature; give a larger --image-size")
    figures = {"psnr": float(found["psnr"].mean()), "psnr_of_mean": float(found["psnr of mean"].mean())}
    figures |= {f"embedding_{name}": value for name, value in (embedded if "q" in found else {}).items()}
    figures |= {name: float(values.median()) for name, values in residuals.items()}
    bent = [name for name in CURVATURES if name in found]
    figures |= {name.replace(" ", "_"): float(found[name][:, 0].median()) for name in bent}
    figures |= {name.replace(" ", "_"): 100 * float(found[name].mean()) for name in ("seam", "encoder seam") if bent}
    return album.written, figures


@torch.no_grad()
def look_into_finola(method: FinolaAutoencoder, subject: Subject, config: Config) -> dict:
    """What the analysis of FINOLA needs of all test images: {name: tensor}, one row an image.

    PSNR of the reconstruction and of the mean training image, both outside the visible block in masked variants, where
    it lies in the middle; the residuals of Eq. 2, and of Eq. 4 and 5 in the quadrant right of and below q where it has
    three cells a side; each image's peak curvatures, sorted, at most 256, of this map and of the encoder's map of the
    whole image, and the shares of channels that bend most at a seam (`seams`); the vectors q.
    """
    found = {}

    def batches(data):
        chosen = labelled(data, config.probe_images)
        return ((images, len(chosen)) for images, _ in data.plain_batches(chosen, config.image_size))

    mean = sum(images.double().sum(dim=0) / count for images, count in batches(subject.train)).float()  # (3, H, W)
    row, column = method.place
    for images, _ in batches(subject.test):
        corner = method.middle(images)
        with autocast(config.amp, subject.device):
            z = method.feature_map(images, corner)
            others = method.decode(z)
        mask, z = method.scored(images, corner), z.float()
        part = {"psnr": psnr(images, others, mask), "psnr of mean": psnr(images, mean.expand_as(images), mask)}
        if method.config.variant != "masked_b":
            with autocast(config.amp, subject.device):
                part["q"] = method.embed(images, corner).float()
        if method.config.variant != "masked_b" and method.config.norm == "channel":
            part["dz/dx"], part["dz/dy"] = pde_residuals(z, method.finola, method.place)
            if min(method.size - row, method.size - column) >= 3:  # the quadrant that A and B unroll
                right, down = method.finola.right, method.finola.down
                quadrant = z[:, :, row:, column:]
                part["laplacian"] = laplacian_residual(quadrant, right, down)
                part["orders"] = orders_residual(quadrant, right, down)
        if method.size >= 3:
            with autocast(config.amp, subject.device):
                bent = (z, method.encoder(images).float())
            for name, x, seam in zip(CURVATURES, bent, seams(method), strict=True):
                part[name] = peak_curvature(x).sort(dim=1, descending=True).values[:, :256]
                cells = gaussian_curvature(x).abs().flatten(2).argmax(dim=2).cpu()  # (B, C)
                part[name.replace("curvature", "seam")] = seam.flatten()[cells].float().mean(dim=1)
        for name, value in part.items():
            found.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def seams(method: FinolaAutoencoder) -> tuple[Tensor, Tensor]:
    """Where maps bend whatever the image shows, cells (S, S), bool: that of the upsampler, and that of the encoder.

    An unrolled map beside q, where the matrices meet; a block-wise one on both sides of the visible block's edge; the
    encoder's in its two outermost rings, for convolutions pad.
    """
    size, place = method.size, torch.arange(method.size)

    def ring(row: float, column: float) -> Tensor:  # how far from there a cell is, in rows or columns
        return (place - row).abs()[:, None].maximum((place - column).abs()[None])

    middle, block = (size - 1) / 2, size // 4 + (size // 2 - 1) / 2
    unrolled, edge = ring(*method.place) <= 1, (ring(block, block) - size // 2 / 2).abs() < 1
    return edge if method.config.variant == "masked_b" else unrolled, ring(middle, middle) > middle - 2


def draw_curvature(peaks: Tensor, z: Tensor, images: Tensor, title: str, prefix: str, album: Album):
    """Fig. 5 by the peaks (N, K) of all test images, and the channels of maps z (B, C, S, S) that bend most."""
    quartiles = peaks.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)  # (3, K)
    lines = dict(zip(("lower quartile", "median of the images", "upper quartile"), quartiles, strict=True))
    labels = {"xlabel": "channels, sorted", "ylabel": "peak curvature"}
    album.chart(f"{prefix}curvature", ranked(f"{album.title}: {title}", lines, **labels))
    top = peak_curvature(z).topk(min(6, z.shape[1]), dim=1).indices  # (B, K)
    maps = stretch(z[torch.arange(len(z))[:, None], top], (2, 3))  # (B, K, S, S)
    captions = ["image", *[f"rank {i + 1}" for i in range(top.shape[1])]]
    album.sheet(f"{prefix}surfaces", f"channels of the largest {title}", captions, beside(images, maps))


@torch.no_grad()
def pictures_of(method: FinolaAutoencoder, q: Tensor, corner: Tensor | None) -> Tensor:
    """What the upsampler makes of embeddings (N, C): (N, 3, H, W) in [0, 1]; `corner` is that of a masked variant."""
    parts = [(part, None if corner is None else corner[:1].expand(len(part), -1)) for part in q.split(64)]
    return torch.cat([method.decode(method.unroll(*part)).float().clamp(0, 1) for part in parts])


def look_at_embeddings(method: FinolaAutoencoder, q: Tensor, corner: Tensor | None = None) -> dict:
    """Appendix E in figures, by the pictures of embeddings q (N, C) of N images, two or more, and of what they become.

    * contrast_of_mean (Fig. 13): deviation of the picture of the mean, over that of the pictures; 0 is one grey.
    * mirror (Fig. 13): correlation of pictures less the mean's with those of the mirrors; -1: colours reversed.
    * mixture (Fig. 14): squared distance of the picture half way between two embeddings from half of both pictures, by
      that of these two from there: 0 is what mixing the pictures gives, 1 as far off as either of them.
    * roughness_of_samples (Fig. 12): of Gaussian samples, over that of the pictures: a sum of squared differences of
      neighbours, over the variance.
    * sixteenth (Fig. 15): of the squared distance of pictures from the mean's, what C / 16 principal components, 192 of
      3072, make up; 1 is all of it.
    """
    mean, others = q.mean(dim=0), q.roll(-1, dims=0)
    samples = gaussian_samples(q, len(q), torch.Generator().manual_seed(0))
    (few,) = principal_reconstructions(q, mean, torch.cov(q.T), [max(1, q.shape[1] // 16)])
    kinds = (mean[None], q, mirror(q, mean), (q + others) / 2, samples, few)
    grey, plain, mirrored, mixed, drawn, coarse = (pictures_of(method, x, corner).double() for x in kinds)
    halves = (plain + plain.roll(-1, dims=0)) / 2
    both = torch.stack([(plain - grey).flatten(), (mirrored - grey).flatten()])
    return {
        "contrast_of_mean": float(grey.std() / plain.flatten(1).std(dim=1).mean()),
        "mirror": float(torch.corrcoef(both)[0, 1]),
        "mixture": float((mixed - halves).square().mean() / (plain - halves).square().mean()),
        "roughness_of_samples": float(roughness(drawn) / roughness(plain)),
        "sixteenth": float(1 - (coarse - plain).square().mean() / (grey - plain).square().mean()),
    }


def roughness(pictures: Tensor) -> Tensor:
    """Squared differences of neighbours over the variance of a picture (B, 3, H, W), the mean of all: 4 for noise."""
    steps = sum(pictures.diff(dim=i).square().flatten(1).mean(dim=1) for i in (2, 3))
    return (steps / pictures.flatten(2).var(dim=2).mean(dim=1)).mean()


@torch.no_grad()
def draw_embeddings(method: FinolaAutoencoder, q: Tensor, own: Tensor, images: Tensor, album: Album):
    """Appendix E: what the upsampler makes of embeddings that belong to no image.

    q (N, C) are those of all test images, `own` (B, C) those of `images`.
    """
    device, corner, count = images.device, method.middle(images), len(images)
    q, mean = q.to(device), q.mean(dim=0).to(device)

    def decoded(vectors):  # (K, B, C) -> rows of an image and what its vectors become, (B, 1 + K, 3, H, W)
        pictures = pictures_of(method, vectors.flatten(0, 1), corner).unflatten(0, vectors.shape[:2])
        return torch.cat([images[:, None], pictures.transpose(0, 1)], dim=1)

    rows = decoded(interpolate(own, mirror(own, mean), 5))
    captions = ["image", "q", "", "mean", "", "mirror"]
    album.sheet("mean", "from q over the mean embedding to its mirror", captions, rows)
    rows = decoded(interpolate(own, own.roll(-1, dims=0), 5))
    rows = torch.cat([rows, images.roll(-1, dims=0)[:, None]], dim=1)
    captions = ["first", "q of the first", "", "half way", "", "q of the second", "second"]
    album.sheet("interpolations", "between two embeddings", captions, rows)
    samples = gaussian_samples(q, 6 * count, torch.Generator().manual_seed(0)).unflatten(0, (6, count))
    album.sheet("samples", "an image, and Gaussian samples", ["image", *["sample"] * 6], decoded(samples))
    counts = [k for k in COMPONENTS if k < q.shape[1]] + [q.shape[1]]
    vectors = principal_reconstructions(own, mean, torch.cov(q.T), counts)
    captions = ["image", *[f"K = {k}" for k in counts]]
    album.sheet("components", "the top K principal components", captions, decoded(vectors))


def ranked(title: str, lines: dict, **labels):
    """A chart of curves {name: values (N,)} over the places 1 to N."""
    figure, (axes,) = panels(title, size=(6.4, 4.4))
    for name, values in lines.items():
        axes.plot(range(1, len(values) + 1), values.tolist(), label=name)
    if wide(torch.cat(list(lines.values())).tolist()):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(**labels)
    axes.legend()
    return figure
