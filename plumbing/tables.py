"""The one table that training and evaluating end with."""

import math

COLUMNS = {  # what a result is called, and its digits; another one goes by its own name, with one digit
    "knn": ("kNN", 1),
    "held_out_loss": ("held-out loss", 4),
    "effective_rank": ("effective rank", 1),
    "psnr": ("PSNR", 1),
    "psnr_of_mean": ("mean image", 1),
    "dz/dx": ("dz/dx", 3),
    "dz/dy": ("dz/dy", 3),
    "laplacian": ("laplacian", 3),
    "orders": ("orders", 3),
    "curvature": ("curvature", 3),
    "encoder_curvature": ("encoder curvature", 3),
    "encoder_seam": ("encoder seam", 1),
    "davies_bouldin": ("Davies-Bouldin", 2),
    "cosine_ratio": ("cosine ratio", 3),
    "cosine_gap": ("cosine gap", 3),
    "neighbours_kept": ("neighbours kept", 3),
    "rank_of_last": ("rank of last block", 1),
    "homologous": ("homologous keys", 3),
    "miou": ("mean IoU", 1),
    "pixel_accuracy": ("pixel accuracy", 1),
}
ROWS = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
ROWS |= {"started": "encoder at the start"}  # of a run with --start
UNTITLED = ("same_class_cosine", "other_class_cosine", "restored_lower_", "clean_lower_")  # not shown
UNTITLED += ("norm_of_", "iou_", "block_", "case_", "step_", "descends_", "way_", "embedding_")


def column_of(name: str) -> tuple[str, int]:
    """Title and digits of a result."""
    if name.startswith("left_"):  # of the squared error, after a restoration
        return f"left of {name.removeprefix('left_').replace('_', ' ')}", 3
    if name.startswith("cosine_of_"):  # a gradient, with that of the real cycle
        return f"cosine of {name.removeprefix('cosine_of_').replace('_', ' ')}", 3
    return COLUMNS.get(name, (name, 1))


def cell(value, digits: int) -> str:
    """A value as text: a dash for none (None, nan), a pair as mean ± deviation, a text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"
    known = isinstance(value, int | float) and not math.isnan(value)
    return f"{value:.{digits}f}" if known else "-"


def table_rows(results: dict, corner: str = "") -> list[list[str]]:
    """{row: {result: value}} as rows of texts, the titles first: a dash where a row has no such result."""
    names = list(dict.fromkeys(name for row in results.values() for name in row if not name.startswith(UNTITLED)))
    columns = [column_of(name) for name in names]
    rows = [[corner, *(title for title, _ in columns)]]
    for row, values in results.items():
        found = [cell(values.get(name), digits) for name, (_, digits) in zip(names, columns, strict=True)]
        rows.append([ROWS.get(row, row), *found])
    return rows


def format_table(results: dict, corner: str = "") -> str:
    """{row: {result: value}} as text, in columns."""
    rows = table_rows(results, corner)
    first, *others = ([len(text) for text in column] for column in zip(*rows, strict=True))
    widths = [max(20, *first), *(max(10, titles + 3, *(n + 2 for n in cells)) for titles, *cells in others)]
    lines = []
    for head, *cells in rows:
        lines.append(f"{head:<{widths[0]}}" + "".join(f"{x:>{w}}" for x, w in zip(cells, widths[1:], strict=True)))
    return "\n".join(lines)
