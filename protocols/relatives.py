"""What tells MixedAE which patches of a mixture are relatives: what they show, or the segment codes added to them."""

import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from mixedae import MixedAE, homologous_contrastive, mix
from plumbing.errors import UserError
from plumbing.probes import labelled
from plumbing.processes import autocast
from plumbing.tables import ROWS
from protocols.rows import Subject, method_for
from protocols.settings import Config

CASES = {
    "as_trained": "as in training",
    "one_picture": "one picture in all places",  # the codes alone differ
    "no_codes": "without codes",
    "drawn_by_image": "codes drawn anew, by image",
    "drawn_by_code": "codes drawn anew, by code",
}


def draw_relatives(run_folder: Path, known: dict, subjects: list, config: Config) -> tuple[list, dict]:
    """A table of `cases_of` for each encoder: no paths, and figures by row."""
    subjects = [subject for subject in subjects if subject.encoder is not None]
    method = method_for("relatives", "mixedae", subjects[0], run_folder, known, config)
    if method.config.mode == "mae" or method.config.attention != "topk":
        raise UserError(
            "--protocol relatives needs mixtures and homologous attention: this run has "
            f"--mode {method.config.mode} --attention {method.config.attention}"
        )
    results, k, patches = {}, method.config.images_per_group, len(method.encoder.positions)
    floor = contrast_floor(patches, k, method.config.temperature)
    for subject in subjects:
        method.encoder.load_state_dict(subject.encoder.state_dict())
        found = cases_of(method, subject, config)
        print(f"{ROWS[subject.name]:<28}{'homologous keys':>18}{'contrast':>11}")
        for case, (accuracy, contrast) in found.items():
            print(f"{CASES[case]:<28}{accuracy:>18.3f}{contrast:>11.3f}")
        figures = {"homologous": found["as_trained"][0]}
        for case, (accuracy, contrast) in found.items():
            figures |= {f"case_{case}_homologous": accuracy, f"case_{case}_contrast": contrast}
        results[subject.name] = figures | {"case_floor": floor}
    print(f"{'chance; the least loss':<28}{1 / k:>18.3f}{floor:>11.3f}")
    return [], results


def contrast_floor(patches: int, images_per_group: int, temperature: float) -> float:
    """The least value of Eq. 7 for N patches of K images that have equally many.

    Patches of one image coincide, and the K images are as far apart as K directions can be, at cosine -1 / (K - 1)
    (Graf et al., Dissecting Supervised Contrastive Learning, 2021).
    """
    relatives, k = patches / images_per_group, images_per_group
    apart = math.exp(-(1 + 1 / (k - 1)) / temperature) if k > 1 else 0.0
    return math.log(relatives - 1 + (patches - relatives) * apart)


@torch.no_grad()
def cases_of(method: MixedAE, subject: Subject, config: Config) -> dict:
    """The share of homologous keys and the contrastive loss over the test images: {case: (share, loss)}, as CASES.

    Drawn anew, the codes part the patches in another way than the images do, and relatives are counted by either.
    The means are over mixtures; mixtures and codes are drawn by --seed. What is left of a batch makes no mixture.
    """
    k, chosen = method.config.images_per_group, labelled(subject.test, config.probe_images)
    if len(chosen) < k:
        raise UserError(f"{len(chosen)} test images do not make a mixture of {k}")
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(config.seed))
    torch.manual_seed(config.seed)
    sums, count = dict.fromkeys(CASES, torch.zeros(2, dtype=torch.float64)), 0
    for images, _ in subject.test.plain_batches(chosen[order], config.image_size):
        groups = len(images) // k
        if not groups:
            continue
        with autocast(config.amp, images.device):
            found = cases_of_batch(method, images[: groups * k])
        count += groups
        sums = {case: sums[case] + groups * torch.tensor(found[case], dtype=torch.float64) for case in CASES}
    return {case: tuple((total / count).tolist()) for case, total in sums.items()}


def cases_of_batch(method: MixedAE, images: Tensor) -> dict:
    """`cases_of` for images (B, 3, H, W), B a multiple of K."""
    k = method.config.images_per_group
    tokens = method.encoder.embed(images).unflatten(0, (-1, k))  # (G, K, N, D)
    step = k if method.config.mode == "full" else 1  # one mixture a group will do
    owners, drawn = (method.draw_assignment(len(tokens))[::step] for _ in range(2))  # (G, N) each
    mixture, alone = mix(tokens, owners), tokens[:, 0]  # (G, N, D) each
    bare = copy.copy(method)
    bare.config = dataclasses.replace(method.config, segment="off")

    def look(method, tokens, codes, relatives):
        encoded, found = method.encode(tokens, relatives, codes=codes)
        accuracy = torch.stack([accuracy for accuracy, _ in found]).float().mean()
        return float(accuracy), float(homologous_contrastive(encoded[:, 1:], relatives, method.config.temperature))

    return {
        "as_trained": look(method, mixture, owners, owners),
        "one_picture": look(method, alone, owners, owners),
        "no_codes": look(bare, mixture, owners, owners),
        "drawn_by_image": look(method, mixture, drawn, owners),
        "drawn_by_code": look(method, mixture, drawn, drawn),
    }
