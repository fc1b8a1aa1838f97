"""Charts: panels in rows, and the curves of a run."""

import math

from plumbing.errors import printable
from plumbing.tables import column_of

UNDRAWN = ("epoch", "seconds", "lr", "images_per_second")  # what a log has beside curves
BLOCKS = "manifold_"  # before what MAGMA logs of two blocks, which `layer_map` draws


def panels(title: str, count: int = 1, size: tuple = (5.2, 3.8)) -> tuple:
    """A figure of so many panels, at most three in a row: (Figure, [Axes, ...]); `size` of each in inches."""
    from matplotlib.figure import Figure  # here, since importing it takes a while

    across = min(3, count)
    down = math.ceil(count / across)
    figure = Figure((across * size[0], down * size[1]), dpi=100, layout="constrained")
    # Whatever stands between two $ in the name of a folder is no formula, and a byte that is no letter no glyph.
    title = printable(title)
    figure.suptitle(title, parse_math=False, fontsize=min(13, 110 * across * size[0] / len(title)))
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for one in axes[:count]:
        one.grid(alpha=0.3)
    return figure, axes[:count]


def wide(values: list) -> bool:
    """Whether an axis had better be logarithmic: all values are positive, and they span more than two decades."""
    return 0 < 100 * min(values) < max(values)


def learning_curves(log: list, title: str, known: dict):
    """All that a log follows over the epochs, the accuracies in one panel; None where it has too few epochs.

    Of a MAGMA run (`known` is its config.json), the epochs in which the regulariser acts are shaded.
    """
    curves = {}
    for line in log:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in UNDRAWN and not name.startswith(BLOCKS):
                curves.setdefault(name, []).append((line["epoch"], value))
    if len(curves.get("loss", ())) < 2:
        return None
    probes = {name: curves.pop(name) for name in ("knn", "linear", "accuracy") if name in curves}
    groups = [{"loss": curves.pop("loss")}, probes, *[{name: points} for name, points in curves.items()]]
    groups = [group for group in groups if group]
    figure, axes = panels(title, len(groups))
    for one, group in zip(axes, groups, strict=True):
        for name, points in group.items():
            one.plot(*zip(*points, strict=True), marker="o", markersize=3, label=column_of(name)[0])
        one.set(title=column_of(name)[0], xlabel="epoch")
        one.locator_params(axis="x", integer=True)
        values = [value for points in group.values() for _, value in points]
        if group is probes:
            one.set(title="probes", ylabel="accuracy (%)", ylim=(0, None))
            one.legend(loc="lower right")
        elif wide(values):
            one.set_yscale("log")
    if span := regularised(known, log[-1]["epoch"]):
        for one in axes:
            shade = one.axvspan(*span, color="tab:orange", alpha=0.12, linewidth=0, label="regulariser on")
        axes[0].legend(handles=[shade])
    return figure


def layer_map(log: list, title: str, known: dict):
    """MAGMA's regulariser between each block and the next, over the epochs (Fig. 3); None without two of --log-layers.

    Dashed lines stand before and behind the epochs in which it acts (`known` is config.json of the run).
    """
    lines = [line for line in log if any(name.startswith(BLOCKS) for name in line)]
    if len(lines) < 2:
        return None
    names = [name for name in lines[0] if name.startswith(BLOCKS)]
    values = [[line.get(name, math.nan) for line in lines] for name in names]  # a row for each pair of blocks
    figure, (axes,) = panels(title, size=(7.2, 4.8))
    axes.grid(visible=False)
    place = (lines[0]["epoch"] - 0.5, lines[-1]["epoch"] + 0.5, 0.5, len(names) + 0.5)
    scale = "log" if wide([value for row in values for value in row]) else "linear"
    figure.colorbar(axes.imshow(values, norm=scale, origin="lower", aspect="auto", extent=place), label="regulariser")
    for end in regularised(known, log[-1]["epoch"]) or ():
        axes.axvline(end + 0.5, color="white", linestyle="--")
    axes.set_yticks(range(1, len(names) + 1), [name.removeprefix(BLOCKS).replace("_", " to ") for name in names])
    axes.set(xlabel="epoch", ylabel="blocks")
    axes.locator_params(axis="x", integer=True)
    return figure


def regularised(known: dict, last: int) -> tuple | None:
    """Where MAGMA's regulariser acts (Eq. 1) on an axis of epochs that are over, or None: nowhere up to epoch `last`.

    `e_st` counts epochs from 0, the log from 1: its first epoch lies between the points e_st and e_st + 1.
    """
    start, lasts = known.get("e_st"), known.get("e_dur")
    wanted = known.get("method") == "magma" and (known.get("lam") or known.get("inverse"))
    if not wanted or not isinstance(start, int) or not isinstance(lasts, int):
        return None
    end = min(start + lasts, last)
    return (start, end) if start < end else None
