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
    "curvature": ("curvature", 3),
    "davies_bouldin": ("Davies-Bouldin", 2),
    "cosine_ratio": ("cosine ratio", 3),
    "cosine_gap": ("cosine gap", 3),
}
ROWS = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
UNTITLED = ("same_class_cosine", "other_class_cosine", "restored_lower_", "clean_lower_")  # not shown; these begin so


def column_of(name: str) -> tuple[str, int]:
    """Title and digits of a result."""
    if name.startswith("left_"):  # of the squared error, after a restoration
        return f"left of {name.removeprefix('left_').replace('_', ' ')}", 3
    return COLUMNS.get(name, (name, 1))


def format_table(results: dict, corner: str = "") -> str:
    """{row: {result: value}} as text: a dash where a row has no such result, or one without a value (None, nan)."""
    names = list(dict.fromkeys(name for row in results.values() for name in row if not name.startswith(UNTITLED)))
    columns = [column_of(name) for name in names]
    widths = [max(10, len(title) + 3) for title, _ in columns]
    lines = [f"{corner:<20}" + "".join(f"{title:>{w}}" for (title, _), w in zip(columns, widths, strict=True))]
    for row, values in results.items():
        cells = []
        for name, (_, digits), width in zip(names, columns, widths, strict=True):
            value = values.get(name)
            text = "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
            cells.append(f"{text:>{width}}")
        lines.append(f"{ROWS[row]:<20}" + "".join(cells))
    return "\n".join(lines)
