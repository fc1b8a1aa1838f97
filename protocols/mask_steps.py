"""Does level III's loss fall where MLO-MAE's masking network T takes a step? Cycles are done again with T moved."""

import copy
import functools
import math

import torch
from torch import Tensor

from common import Stepper
from mlo_mae import MultiLevelMAE, moved
from plumbing.crops import mix_seed
from plumbing.curves import panels
from plumbing.probes import labelled
from protocols.rows import Subject
from protocols.settings import Config

# The length of a step so short that no patch enters or leaves a mask: at 1e-5 it happens once in some 20 times.
SHORT = 1e-7
FAR = 10  # a far one, in steps of the training: the longer it is, the less it depends on which patches it exchanges
OTHERS = 128  # pictures that no level has seen
READINGS = {  # what a change of the loss is measured after, and on
    "last": "T moved for the last step of level I alone, a short way",
    "cycle": "for all of its steps, a short way",
    "others": "the same, on other pictures",
    "far": "for all of its steps, a far way",
    "far_others": "the same, on other pictures",
}


class CycleAgain:
    """A cycle that can be done again with another T, from the same weights, optimiser and images.

    Masks are the most probable patches and nothing is dropped out, so there are no random numbers to repeat. In
    float64 a difference of two losses shows what a step of `SHORT` does.
    """

    def __init__(self, method: MultiLevelMAE, optimizer, rates: list, batch: tuple, others: tuple, dtype=torch.float64):
        method, optimizer = copy.deepcopy((method, optimizer))
        method.to(dtype).eval()
        for state in optimizer.state.values():
            state |= {name: state[name].to(dtype) for name in ("exp_avg", "exp_avg_sq")}
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        images, labels = (part.split(method.config.batch_size) for part in (batch[0].to(dtype), batch[1]))
        *self.unlabelled, self.training, self.validation = zip(images, labels, strict=True)
        self.others, self.masking = (others[0].to(dtype), others[1]), method.weights("masking.")
        self.start = method, optimizer

    @functools.cached_property
    def before_last(self) -> tuple:
        """The method and its optimiser before the last step of level I."""
        return self.level_one(self.start, self.unlabelled[:-1], 0.0)

    def level_one(self, start: tuple, batches: list, step: Tensor | float) -> tuple:
        """Copies of a method and its optimiser after steps of level I, with T at its weights minus `step` (W,)."""
        method, optimizer = copy.deepcopy(start)
        method.load_state_dict(self.masking_after(step), strict=False)
        stepper = Stepper(optimizer, method.config, self.others[0].device)
        for images, _ in batches:
            method.train_autoencoder(images, self.training, stepper)
        return method, optimizer

    def masking_after(self, step: Tensor | float) -> dict:
        """T's weights minus `step`, all of them in a row (W,), or 0."""
        if isinstance(step, float):
            return self.masking
        parts = step.to(self.others[0]).split([p.numel() for p in self.masking.values()])
        return moved(self.masking, {n: x.view_as(p) for (n, p), x in zip(self.masking.items(), parts, strict=True)}, -1)

    def losses(self, step: Tensor | float = 0.0, last: bool = False) -> Tensor:
        """Level III's loss on its batch and on the other pictures (2,), T moved for all steps of level I or the last.

        After the last alone the other pictures are left out.
        """
        start, batches = (self.before_last, self.unlabelled[-1:]) if last else (self.start, self.unlabelled)
        method, optimizer = self.level_one(start, batches, step)
        method.train_head(*self.training, Stepper(optimizer, method.config, self.others[0].device))
        with torch.no_grad():
            return torch.stack([method(*part, 3) for part in (self.validation, self.others)[: 1 if last else 2]])

    @torch.no_grad()
    def masks(self, step: Tensor | float = 0.0) -> Tensor:
        """The masks of the last images of level I by the encoder at the start: (B, N) of 0 and 1."""
        method = copy.deepcopy(self.start[0])
        method.load_state_dict(self.masking_after(step), strict=False)
        return method.choose(method.encoder.embed(self.unlabelled[-1][0]))[0]


def length_of_step(method: MultiLevelMAE, optimizer, rates: list) -> float:
    """How far Adam's averages would take T at these learning rates: how long a step of the training is."""
    wanted, total = set(method.masking.parameters()), 0.0
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        for p in wanted & set(group["params"]):
            state = optimizer.state[p]
            first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
            taken = rate * state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])
            total += float(taken.double().square().sum())
    return math.sqrt(total)


def directions_of(found: list, i: int, seed: int) -> dict:
    """The directions of cycle i {name: (W,)}, T goes against them: its gradients, `exact` of the cycle before (of the
    first, the last one; none where it is alone), and a random one forwards and backwards.
    """
    gradients = {name: value for name, value in found[i].items() if name != "last_step"}  # that is `adamw`
    generator = torch.Generator().manual_seed(mix_seed(seed, i, 7))
    drawn = torch.randn(len(gradients["exact"]), generator=generator, dtype=torch.float64)
    before = {"before": found[i - 1]["exact"]} if len(found) > 1 else {}
    return gradients | before | {"random": drawn, "minus_random": -drawn}


def changes_of(cycle: CycleAgain, rough: CycleAgain, directions: dict, far: float) -> tuple[Tensor, Tensor, float]:
    """What steps of T against D directions do: changes (D, READINGS), flips (D, 2), half.

    A change is that of level III's loss, divided by the length of the step. Flips are the shares in [0, 1] of the
    masked patches that a short step exchanges, and a far one. Half is what half a short step against `all_steps`
    changes, divided by what a whole one does: 0.5 where first order holds. Steps as long as `far` are taken in `rough`,
    the cycle in float32.
    """
    last, base, rough_base = cycle.losses(last=True), cycle.losses(), rough.losses()
    masks, rows, flips = cycle.masks(), [], []
    for direction in directions.values():
        unit = direction.double() / direction.double().norm()
        short, long = SHORT * unit, far * unit
        found = [(cycle.losses(short, last=True) - last) / SHORT, (cycle.losses(short) - base) / SHORT]
        rows.append(torch.cat([*found, (rough.losses(long) - rough_base) / far]).double().cpu())
        flips.append([float((cycle.masks(x) > masks).sum() / masks.sum()) for x in (short, long)])
    true = directions["all_steps"].double()
    half = float((cycle.losses(SHORT / 2 * true / true.norm()) - base)[0]) / SHORT
    return torch.stack(rows), torch.tensor(flips), half / float(rows[list(directions).index("all_steps")][1])


def look_at_steps(method, optimizer, rates: list, batches: list, found: list, subject: Subject, config: Config):
    """Print what steps of T do in cycles with gradients `found` -> changes (cycles, D, READINGS), names, figures."""
    chosen, far = labelled(subject.test, OTHERS), FAR * length_of_step(method, optimizer, rates)
    others = next(iter(subject.test.plain_batches(chosen, method.config.image_size)))
    taken = []
    for i, batch in enumerate(batches):
        cycle, rough = (CycleAgain(method, optimizer, rates, batch, others, d) for d in (torch.float64, torch.float32))
        directions = directions_of(found, i, config.seed)
        taken.append(changes_of(cycle, rough, directions, far))
    changes, flips, halves = zip(*taken, strict=True)
    changes, flips, names = torch.stack(changes), torch.stack(flips), list(directions)
    mean, error, lowered = summary(changes)
    print(f"change of level III's loss by a step of the masking network, by its length, in {len(changes)} cycles:")
    print("mean ± standard error, share of the cycles with a lower loss")
    print(f"a short way is {SHORT}, a far one {far:.3g}: as long as {FAR} steps of the training")
    for reading, meaning in READINGS.items():
        print(f"  {reading:<12} {meaning}")
    print(" " * 14 + "".join(f"{reading:>26}" for reading in READINGS))
    figures = {"step_far": far}
    for i, name in enumerate(names):
        cells = zip(mean[i].tolist(), error[i].tolist(), lowered[i].tolist(), strict=True)
        print(f"{name:<14}" + "".join(f"{m:>11.4f} ± {e:<7.4f}{100 * s:>3.0f} %" for m, e, s in cells))
        for j, reading in enumerate(READINGS):
            values = {"": mean[i, j], "_error": error[i, j], "_lowered": lowered[i, j]}
            figures |= {f"step_{reading}_{name}{part}": float(value) for part, value in values.items()}
    print(f"half a short step by all_steps does {sum(halves) / len(halves):.5f} of what a whole one does")
    figures |= {"step_half": sum(halves) / len(halves), "step_flips_short": float(flips[..., 0].max())}
    figures["step_flips_far"] = float(flips[..., 1].mean())
    print(
        f"of the masked patches, a short step exchanges {100 * figures['step_flips_short']:.2g} % at most, a far one "
        f"{100 * figures['step_flips_far']:.2g} % on the mean over directions"
    )
    return changes, names, figures


def summary(changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over cycles (cycles, ...): mean, its standard error (nan of a single cycle), share that is below 0."""
    count, mean = len(changes), changes.mean(dim=0)
    spread = (changes - mean).square().sum(dim=0) / (count - 1) if count > 1 else torch.full_like(mean, math.nan)
    return mean, (spread / count).sqrt(), (changes < 0).double().mean(dim=0)


def steps_chart(changes: Tensor, names: list, title: str):
    """A panel for each reading: the changes in each cycle, and their mean as a bar, by direction."""
    figure, axes = panels(title, len(READINGS))
    for j, (one, meaning) in enumerate(zip(axes, READINGS.values(), strict=True)):
        one.bar(range(len(names)), changes[:, :, j].mean(dim=0).tolist(), alpha=0.4)
        for i in range(len(names)):
            one.plot([i] * len(changes), changes[:, i, j].tolist(), "o", markersize=4, color="tab:blue")
        one.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=45, ha="right")
        one.set_title(meaning, fontsize=9)
        one.axhline(0, color="black", linewidth=0.8)
    for one in axes[::3]:
        one.set_ylabel("change of the loss / length of the step")
    return figure
