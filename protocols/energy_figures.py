"""What energy-inspired pretraining learned: how its chains go, and what energies they have (its Fig. 1, 3 and 4)."""

from pathlib import Path

import torch
import torch.nn.functional as F

from ebm_pretrain import EnergyPretraining, sample
from plumbing.curves import panels
from plumbing.errors import UserError
from plumbing.probes import labelled
from plumbing.processes import autocast
from plumbing.run_files import data_name
from protocols.figures import Album
from protocols.rows import Subject, method_for
from protocols.settings import Config

CHAIN = 8  # steps that are drawn, at least; training takes two
WAY = 5  # images on the line from the corrupted image to the whole one, both ends included


def draw_energy(run_folder: Path, known: dict, subject: Subject, config: Config) -> tuple[list, dict]:
    """Chains, errors and energies of a run, into its folder `energy`; returns paths and the figures for the table."""
    method = method_for("energy", "ebm_pretrain", subject, run_folder, known, config)
    if method.config.objective != "energy" or not method.config.steps:
        raise UserError(
            "--protocol energy needs --objective energy with --steps 1 or more: this run has no chain to follow"
        )
    album = Album(Path(config.out) / "energy", f"energy on {data_name(config.data)}")
    images = subject.one_a_class(config)
    for task in method.tasks:
        torch.manual_seed(config.seed)
        _, corrupted = method.corrupt(images, task)
        chain, _ = follow(method, corrupted, config)
        rows = torch.cat([images[:, None], (chain.transpose(0, 1) * method.std + method.mean).clamp(0, 1)], dim=1)
        captions = ["image", "corrupted", *[f"step {i}" for i in range(1, len(chain))]]
        album.sheet(f"chain_{task}", task.replace("_", " "), captions, rows)
    found, steps, figures = look_into_energy(method, subject, config), method.config.steps, {}
    for task, values in found.items():
        left = share_left(values["error"])
        figures[f"left_{task}"] = float(left[steps])
        lower = {"restored": values["energy"][:, steps], "clean": values["clean"]}
        shares = {name: float((value < values["energy"][:, 0]).float().mean()) for name, value in lower.items()}
        figures |= {f"{name}_lower_{task}": share for name, share in shares.items()}
        print(
            f"{task}: of the corrupted images' squared error {100 * left[steps]:.0f} % is left after step {steps}; "
            f"energy below that of the corrupted image: restored {100 * shares['restored']:.0f} %, "
            f"clean {100 * shares['clean']:.0f} % of the images"
        )
        downhill, (falls, rises) = descends(values["energy"]), slopes(values["way"])
        figures |= {f"descends_{task}_{i + 1}": float(share) for i, share in enumerate(downhill)}
        figures |= {f"way_falls_{task}": falls, f"way_rises_{task}": rises}
        figures[f"way_cosine_{task}"] = float(values["cosine"].mean())
        beyond = f", beyond the training in {percent(downhill[steps:])} %" if steps < len(downhill) else ""
        print(f"  energy goes down in {percent(downhill[:steps])} % of the images at each step{beyond}")
        print(
            f"  straight to the whole image the energy falls all the way in {100 * falls:.0f} %, rises all the way in "
            f"{100 * rises:.0f} %; cosine of the first step with this way {figures[f'way_cosine_{task}']:.2f}"
        )
        if "foreign" in values:
            above = {"coarse": values["energy"][:, 0], "whole": values["clean"]}
            above = {name: float((values["foreign"] > value).float().mean()) for name, value in above.items()}
            figures |= {f"way_foreign_above_{name}": share for name, share in above.items()}
            print(
                f"  with the fine detail of another picture the energy is above that of the coarse image in "
                f"{100 * above['coarse']:.0f} %, above that of the whole one in {100 * above['whole']:.0f} %"
            )
    album.chart("chains", chain_curves(found, steps, f"{album.title}: along the chain"))
    return album.written, figures


def follow(method: EnergyPretraining, corrupted, config: Config) -> tuple:
    """A chain of corrupted images (B, 3, H, W), normalised, and its energies: (T + 1, B, 3, H, W), (T + 1, B)."""
    with autocast(config.amp, corrupted.device):
        return sample(method.energy, corrupted, max(CHAIN, method.config.steps), method.step_size(corrupted))


@torch.no_grad()
def look_into_energy(method: EnergyPretraining, subject: Subject, config: Config) -> dict:
    """Chains of all test images, {task: {"error": (N, T + 1), "energy": (N, T + 1), "clean": (N,)}}, rows are images.

    `error` is the mean squared error of normalised pixels along the chain, `clean` the energy of the whole image. `way`
    (N, WAY) has energies on the line from the corrupted image to the whole one, `cosine` (N,) is that of the first step
    with this line, and of coarse images `foreign` (N,) the energy with what another picture lost by being made coarse.
    """
    chosen, found = labelled(subject.test, config.probe_images), {}
    torch.manual_seed(config.seed)
    for images, _ in subject.test.plain_batches(chosen, config.image_size):
        for task in method.tasks:
            clean, corrupted = method.corrupt(images, task)
            chain, energies = follow(method, corrupted, config)
            lost, shares = clean - corrupted, [i / (WAY - 1) for i in range(1, WAY - 1)]
            with autocast(config.amp, subject.device):
                energy = method.energy(clean)
                way = [energies[0], *[method.energy(corrupted + share * lost) for share in shares], energy]
                foreign = method.energy(corrupted + lost.roll(1, 0)) if task == "super_resolution" else None
            error = (chain - clean).square().mean(dim=(2, 3, 4))
            part = {"error": error.T.cpu(), "energy": energies.T.cpu(), "clean": energy.cpu()}
            part |= {"way": torch.stack(way, dim=1).cpu(), "cosine": cosine(chain[1] - corrupted, lost).cpu()}
            part |= {} if foreign is None else {"foreign": foreign.cpu()}
            for name, value in part.items():
                found.setdefault(task, {}).setdefault(name, []).append(value)
    return {task: {name: torch.cat(parts) for name, parts in values.items()} for task, values in found.items()}


def share_left(error: torch.Tensor) -> torch.Tensor:
    """Errors along chains (N, T + 1) -> the share of the first that is left, of all images together (T + 1,)."""
    error = error.mean(dim=0)
    return error / error[0].clamp_min(1e-12)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the angle between images (B, 3, H, W), (B, 3, H, W) -> (B,)."""
    return F.cosine_similarity(a.flatten(1), b.flatten(1))


def descends(energy: torch.Tensor) -> torch.Tensor:
    """Energies along chains (N, T + 1) -> the share of the chains that each step takes down (T,)."""
    return (energy[:, 1:] < energy[:, :-1]).float().mean(dim=0)


def slopes(way: torch.Tensor) -> tuple[float, float]:
    """Energies along lines (N, K) -> the share of the lines on which they fall all the way, and rise all the way."""
    steps = way.diff(dim=1)
    return float((steps < 0).all(dim=1).float().mean()), float((steps > 0).all(dim=1).float().mean())


def percent(shares: torch.Tensor) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in shares.tolist())


def chain_curves(found: dict, steps: int, title: str):
    """Error and energy along the chains that `look_into_energy` found, task by task, with the steps of the training;
    and energy on the way to the whole image.
    """
    figure, (left, right, way) = panels(title, 3)
    for task, values in found.items():
        left.plot(share_left(values["error"]).tolist(), marker="o", markersize=3, label=task.replace("_", " "))
        above = (values["energy"] - values["clean"][:, None]).mean(dim=0)  # (T + 1,)
        right.plot(above.tolist(), marker="o", markersize=3)
        above = (values["way"] - values["clean"][:, None]).mean(dim=0)  # (WAY,)
        way.plot(torch.linspace(0, 1, len(above)).tolist(), above.tolist(), marker="o", markersize=3)
    left.set(xlabel="step", ylabel="squared error, 1 = corrupted")
    right.set(xlabel="step", ylabel="energy above that of the clean image")
    way.set(xlabel="way from the corrupted image to the whole one", ylabel="energy above that of the whole image")
    for axes in (right, way):
        axes.axhline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.axvline(steps, color="gray", linestyle=":", label="last step of the training")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
