"""The report of a run: one page of HTML that needs no other file, no network and no script."""

import base64
import contextlib
import html
import io
import json
from pathlib import Path

from PIL import Image

from plumbing.curves import learning_curves
from plumbing.decoding import open_picture
from plumbing.errors import UserError, printable
from plumbing.files import write_atomically
from plumbing.pictures import plain_style
from plumbing.run_files import data_name, measured, read_evaluations, read_log, read_settings, sound
from plumbing.tables import table_rows

FOLDERS = (".", "pictures", "finola", "energy", "hypergradient", "layers")  # of a run, where there may be pictures
UNSHOWN = ("curves.png", "compare.png")  # drawn anew; of other runs too
MOST = 60  # pictures
ROOM = 1_300_000  # bytes of all pictures together, before base64 makes four of three
STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8d8d8, #444); --quiet: light-dark(#555, #aaa); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, figcaption { overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
p, figcaption { color: var(--quiet); margin: .4rem 0; }
table { border-collapse: collapse; margin: 0 0 1.2rem; }
figure, .wide { overflow-x: auto; }
.chart { min-width: 46rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
tr:first-child th { font-weight: 600; }
tr:not(:first-child) th { font-weight: 400; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; background: white; }
dl { columns: 17rem; column-gap: 2rem; margin: 0; }
dl div { break-inside: avoid; display: flex; justify-content: space-between; gap: 1rem; }
dt { color: var(--quiet); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(out: Path) -> Path:
    """Write report.html of a run folder from the files in it, and return its path.

    Settings, tables, curves and pictures, in less than 2 MB. What is not there, or cannot be read, is left out.
    Raises UserError for a config.json that is none, OSError where the file cannot be written.
    """
    known, (header, log) = read_settings(out / "config.json"), read_log(out / "log.jsonl")
    title = printable(f"{known.get('method', 'encoder')} on {data_name(known.get('data', ''))}")
    parts = [f"<h1>{text(title)}</h1>", f"<p>{text(state_of(known, log))}</p>"]
    labels = any("knn" in line for line in log)
    if results := measured(log, labels, bool(known.get("start"))):
        epoch = max(line["epoch"] for line in log if ("knn" if labels else "effective_rank") in line)
        caption = "linear: ridge regression on frozen features" if labels else "without labels"
        parts += ["<h2>What it learned</h2>", table(results, f"after epoch {epoch}; {caption}")]
    if found := read_evaluations(out / "eval.jsonl"):
        parts += ["<h2>How it was judged</h2>", *(table(line["results"], caption_of(line)) for line in found)]
    pictures = pictures_of(out, known, log, title)
    share = ROOM // max(1, len(pictures))
    for heading, caption, image in pictures:
        parts += [f"<h2>{text(heading)}</h2>"] * bool(heading) + [figure(image, caption, share)]
    settings = "".join(f"<div><dt>{text(x)}</dt><dd>{text(shown(y))}</dd></div>" for x, y in known.items())
    parts += ["<h2>Settings</h2>", f"<dl>{settings}</dl>"] * bool(settings)
    first = json.loads(header) if header else {}
    if first:
        versions = sound(first).get("versions")
        made = ", ".join(f"{x} {y}" for x, y in versions.items()) if isinstance(versions, dict) else ""
        command = text(f"python {shown(first['command'])}")
        parts += ["<h2>To make it again</h2>", f"<pre>{command}</pre>", f"<p>{text(made)}</p>"]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
{chr(10).join(parts)}
</html>
"""
    write_atomically(out / "report.html", lambda file: file.write(page.encode()))
    return out / "report.html"


def text(value) -> str:
    """Text as HTML: nothing in it is a tag, and what no terminal shows is escaped."""
    return html.escape(printable(str(value)))


def shown(value) -> str:
    """A setting as text, of at most 2,000 letters."""
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return "–" if value in ("", None) else str(value)[:2000]


def state_of(known: dict, log: list) -> str:
    """One line on how far a run is."""
    if not log:
        return "No log of its training is here."
    line = f"{log[-1]['epoch']} of {known.get('epochs', '?')} epochs"
    seconds = log[-1].get("seconds")
    return line + (f", {seconds / 60:.1f} minutes of training" if isinstance(seconds, int | float) else "")


def table(results: dict, caption: str) -> str:
    """{row: {result: value}} as a table of HTML."""
    head, *rows = table_rows({row: values for row, values in results.items() if isinstance(values, dict)})
    lines = ["<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>"]
    for name, *cells in rows:
        lines.append(f"<tr><th>{text(name)}</th>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>")
    return f"<p>{text(caption)}</p><div class=wide><table>{''.join(lines)}</table></div>"


def caption_of(line: dict) -> str:
    """What a line of eval.jsonl is the result of."""
    recipe = line["settings"].get("recipe")
    data = data_name(str(line.get("data", "")))
    made = [f"recipe {recipe}"] * bool(recipe) + [f"after epoch {line.get('epoch')}"] * ("epoch" in line)
    return ", ".join([f"{line['protocol']} on {data}", *made])


def pictures_of(out: Path, known: dict, log: list, title: str) -> list:
    """(heading, caption, PNG) of all that there is to see of a run: its curves, then its pictures."""
    found, heading = [], "Pictures"
    try:
        with plain_style():
            if chart := learning_curves(log, title, known):
                chart.savefig(file := io.BytesIO(), format="png")
                found.append(("How it learned", "", file.getvalue()))
    except UserError:
        pass  # there is no matplotlib
    paths = [path for folder in FOLDERS for path in sorted((out / folder).glob("*.png")) if path.name not in UNSHOWN]
    for path in paths[:MOST]:
        with contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):  # a damaged one is left out
            open_picture(path).load()
            found.append((heading, str(path.relative_to(out)), path.read_bytes()))
            heading = ""
    return found


def figure(png: bytes, caption: str, share: int) -> str:
    """A picture within the page, in at most `share` bytes: as it is, or else as a JPEG, smaller if need be."""
    kind, content, side = "png", png, 1600
    if len(png) > share:
        kind, image = "jpeg", Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")
    while len(content) > share and side > 32:
        image.thumbnail((side, side))
        image.save(file := io.BytesIO(), "JPEG", quality=85)
        content, side = file.getvalue(), side * 3 // 4
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    # Where the page is narrow, wide charts are moved rather than made too small to read. A PNG tells its width there.
    kind = ' class="chart"' if int.from_bytes(png[16:20], "big") > 1000 else ""
    name = text(caption or "curves of the log")
    return f'<figure><img{kind} src="{source}" alt="{name}"><figcaption>{text(caption)}</figcaption></figure>'
