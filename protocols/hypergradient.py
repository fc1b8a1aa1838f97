"""Which way MLO-MAE's masking network should go: the gradients that are taken for it, beside that of the real cycle.

The real cycle makes steps of AdamW. Here they are written out, and autograd goes back through all of it. What a step
along each of them is worth is in `mask_steps.py`.
"""

import copy
import dataclasses
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import Stepper
from mlo_mae import Config as LevelsConfig
from mlo_mae import LevelPlan, MultiLevelMAE, split_labelled
from plumbing.curves import panels
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from plumbing.processes import by_itself
from plumbing.run_files import data_name
from protocols.figures import Album
from protocols.mask_steps import look_at_steps, steps_chart
from protocols.rows import Subject, method_for
from protocols.settings import Config

FORMS = {  # name: settings of MLO-MAE, and whether second derivatives are taken where the steps ended
    "exact": ({"hypergradient": "exact"}, False),
    "difference": ({"hypergradient": "finite_difference"}, False),
    "no_factors": ({"hypergradient": "exact", "lr_factors": False}, False),
    "code": ({"hypergradient": "exact", "lr_factors": False}, True),
    "adamw": ({"hypergradient": "adamw"}, False),
}
CYCLES = ("last_step", "all_steps")  # of level I, in the exact derivative of a cycle of AdamW's steps
SOME = 4  # cycles to look at, without --max-steps
RATE = 0.5  # learning rates, of their peak: the middle of the cosine; those at a run's end are 0
OF_THE_LOOP = ("batch_size", "base_lr", "betas", "weight_decay", "decay_on", "crop_min", "crop_pad", "flip")
OF_THE_LOOP += ("interpolation", "epoch_steps", "seed")


def draw_hypergradient(run_folder: Path, known: dict, subject: Subject, config: Config) -> tuple[list, dict]:
    """Cosines of the gradients of some cycles, what steps along them do, and charts in a folder `hypergradient`."""
    data = dataclasses.replace(subject, test=subject.train)  # the images of the training
    method = method_for("hypergradient", "mlo_mae", data, run_folder, known, config)
    if method.config.objective != "mlo":
        raise UserError(f"--protocol hypergradient is for --objective mlo, and this run has {method.config.objective}")
    given = {name: known[name] for name in OF_THE_LOOP if name in known}
    given |= {"betas": tuple(given.get("betas", LevelsConfig.betas)), "amp": "off", "update_every": 1}
    given |= {"head_steps": 1, "fresh_head": False}  # a cycle with one step of level II, whatever the run had
    method.config = dataclasses.replace(method.config, **given)
    method.held_out, method.trained_on = split_labelled(subject.train, method.config)
    optimizer = optimizer_of(method, run_folder)
    with by_itself():
        batches = list(cycles_of(method, subject.train, config))
        found = [gradients_of(method, optimizer, *batch) for batch in batches]
    cosines, norms = cosines_and_norms(found)
    album = Album(Path(config.out) / "hypergradient", f"gradients of the masks on {data_name(config.data)}")
    album.chart("cosines", chart_of(cosines, album.title))
    print(f"mean cosines in {len(found)} cycles, the norm, and the cosine with last_step in each cycle")
    names, last = list(found[0]), list(found[0]).index("last_step")
    print(" " * 20 + "".join(f"{name[:10]:>11}" for name in names) + f"{'norm':>11}")
    for i, name in enumerate(names):
        row = "".join(f"{value:>11.3f}" for value in cosines.mean(dim=0)[i].tolist())
        print(f"{name:<20}{row}{float(norms[:, i].mean()):>11.2g}   {format_row(cosines[:, i, last])}")
    rates = rates_of(method.config, optimizer)
    lr_encoder, _, lr_head, *_ = rates
    share = sum(head_by_encoder(one["exact"], one["no_factors"], lr_encoder, lr_head) for one in found) / len(found)
    print(f"learning rates of encoder and head {lr_encoder:.3g} and {lr_head:.3g}")
    print(
        f"the head's term is {lr_head * share:.3f} times as long as the encoder's, without learning rates {share:.3f}"
    )
    with by_itself():
        changes, directions, steps = look_at_steps(method, optimizer, rates, batches, found, subject, config)
    album.chart("steps", steps_chart(changes, directions, f"{album.title}: steps along them"))
    means = cosines.mean(dim=0)[:, last].tolist()
    figures = {f"cosine_of_{name}": value for name, value in zip(names, means, strict=True) if name in FORMS}
    figures |= {f"norm_of_{n}": float(v) for n, v in zip(names, norms.mean(dim=0), strict=True)}
    return album.written, figures | steps


def optimizer_of(method: MultiLevelMAE, run_folder: Path):
    """The optimiser of a run as its last.pt has it. Raises UserError where it has none, or one that took no step."""
    optimizer, state = method.optimizer(method.config), load_checkpoint(run_folder / "last.pt").get("optimizer")
    try:
        optimizer.load_state_dict(state)
        learned = [*method.autoencoder.parameters(), *method.head.parameters(), *method.masking.parameters()]
        fits = all(optimizer.state[p]["exp_avg_sq"].shape == p.shape for p in learned)
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"the optimiser in {run_folder / 'last.pt'} is not that of config.json, or has taken no step")
    return optimizer


def format_row(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def cycles_of(method: MultiLevelMAE, data, config: Config):
    """The images and labels of so many cycles, as in training: augmented, each level from its own part of the data."""
    run = dataclasses.replace(method.config, epochs=config.max_steps or SOME, seed=config.seed)
    plan = LevelPlan(len(data), run, method.trained_on, method.held_out)
    steps = itertools.islice(plan.after(0), run.epochs)
    return data.train_batches(steps, run.image_size, run.crop, run.flip)


def rates_of(config, optimizer) -> list:
    """The learning rate of each group in the middle of a run."""
    return [RATE * config.base_lr * config.batch_size / 256 * group["lr_scale"] for group in optimizer.param_groups]


def gradients_of(method: MultiLevelMAE, optimizer, images: Tensor, labels: Tensor) -> dict:
    """All gradients of T in one cycle from the run's weights and optimiser: {name: (weights of T,)}; these stay."""
    method, optimizer = copy.deepcopy((method, optimizer))
    method.eval()
    stepper = Stepper(optimizer, method.config, images.device)
    for group, rate in zip(optimizer.param_groups, rates_of(method.config, optimizer), strict=True):
        group["lr"] = rate
    size, masking = method.config.batch_size, method.weights("masking.", copy=True)
    *unlabelled, training, validation = zip(images.split(size), labels.split(size), strict=True)
    method.config = dataclasses.replace(method.config, hypergradient="adamw")  # it keeps what the others do not need
    starts = {"all_steps": (method.weights("", copy=True), states_of(method, optimizer), unlabelled)}
    for batch in unlabelled:
        starts["last_step"] = (method.weights("", copy=True), states_of(method, optimizer), [batch])
        method.train_autoencoder(batch[0], training, stepper)
    method.train_head(*training, stepper)
    found, weights = {}, starts["last_step"][0]
    for name, (settings, at_end) in FORMS.items():
        method.config = dataclasses.replace(method.config, lr_factors=True, hypergradient="exact")
        method.config = dataclasses.replace(method.config, **settings)
        before = [method.weights(prefix) if at_end else part(weights, prefix) for prefix in ("autoencoder.", "head.")]
        gradient, _ = method.masking_gradient((unlabelled[-1][0], None), training, validation, *before, stepper)
        found[name] = gradient
    method.eval()
    for name in CYCLES:
        found[name] = through_cycle(method, *starts[name], training, validation)
    return {name: torch.cat([gradient[key].flatten() for key in masking]) for name, gradient in found.items()}


def part(weights: dict, prefix: str) -> dict:
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


def states_of(method: MultiLevelMAE, optimizer) -> dict:
    """What `adamw_step` needs to know of each parameter: {name: {...}}; copied, for the optimiser goes on."""
    found, names = {}, {p: name for name, p in method.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = {name: value.clone() for name, value in optimizer.state[p].items()}
            state |= {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
            found[names[p]] = state | {"decay": group["weight_decay"]}
    return found


def adamw_step(weight, gradient, exp_avg, exp_avg_sq, step, lr, betas, eps, decay) -> tuple:
    """A weight after a step of AdamW, and the optimiser's exp_avg, exp_avg_sq and step then; autograd sees through it.

    It goes round the square root of 0, whose slope is infinite: torch's own differentiable step has nan there.
    """
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * gradient
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient.square()
    first, second = (1 - beta ** (step.double() + 1) for beta in betas)
    v = exp_avg_sq / second
    root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
    weight = (1 - lr * decay) * weight - lr * (exp_avg / first) / (root + eps)
    return weight, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step + 1}


def through_cycle(method: MultiLevelMAE, weights: dict, states: dict, unlabelled, training, validation) -> dict:
    """The gradient by T of level III's loss after these steps of level I and one of level II (Eq. 6 to 8), AdamW's:
    autograd through all of them -> {name: tensor}.
    """
    states = dict(states)
    weights = {name: value.detach().requires_grad_() for name, value in weights.items()}
    masking = part(weights, "masking.")

    def descend(batch, level, prefix):
        moving = part(weights, prefix)
        loss = functional_call(method, weights, (*batch, level))
        gradients = torch.autograd.grad(loss, list(moving.values()), create_graph=True)
        for (name, weight), gradient in zip(moving.items(), gradients, strict=True):
            weights[name], after = adamw_step(weight, gradient, **states[name])
            states[name] = states[name] | after

    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for images, _ in unlabelled:
            descend((images, None), 1, "autoencoder.")
        descend(training, 2, "head.")
        loss = functional_call(method, weights, (*validation, 3))
        gradients = torch.autograd.grad(loss, list(masking.values()))
    return dict(zip(masking, gradients, strict=True))


def cosines_and_norms(found: list) -> tuple[Tensor, Tensor]:
    """Gradients of some cycles, {name: (W,)} each -> their cosines (cycles, names, names) and norms (cycles, names)."""
    rows = torch.stack([torch.stack(list(gradients.values())) for gradients in found]).double().cpu()
    unit = F.normalize(rows, dim=2)
    return unit @ unit.transpose(1, 2), rows.norm(dim=2)


def head_by_encoder(exact: Tensor, no_factors: Tensor, lr_encoder: float, lr_head: float) -> float:
    """How long b is beside a, where no_factors = a - b and exact = lr_encoder (a - lr_head b): the terms of Eq. 9, of
    the path through the head and of the other one, without learning rates.
    """
    b = (exact.double() / lr_encoder - no_factors.double()) / (1 - lr_head)
    return float(b.norm() / (no_factors.double() + b).norm())


def chart_of(cosines: Tensor, title: str):
    """The mean cosines as a table of colours, and the cosine of each form with the exact derivative in each cycle."""
    names = [name.replace("_", " ") for name in (*FORMS, *CYCLES)]
    figure, (left, right) = panels(title, 2)
    mean, last = cosines.mean(dim=0), len(FORMS)
    left.imshow(mean.numpy(), cmap="RdBu", vmin=-1, vmax=1)
    for i, row in enumerate(mean.tolist()):
        for j, value in enumerate(row):
            left.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.7 else "k")
    left.set_xticks(range(len(names)), names, rotation=45, ha="right")
    left.set_yticks(range(len(names)), names)
    left.grid(visible=False)
    for i in range(last):
        right.plot([i] * len(cosines), cosines[:, i, last].tolist(), "o", alpha=0.6)
    right.set_xticks(range(last), names[:last], rotation=45, ha="right")
    right.set(ylim=(-1.05, 1.05), ylabel="cosine with AdamW's cycle, last step")
    right.axhline(0, color="black", linewidth=0.8)
    return figure
