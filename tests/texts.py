"""README and docs in pieces, for the tests that ask whether they are true: pages, code, tables, commands."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def prose(text):
    """A text without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def blocks(text, language):
    """The blocks of code in a language; "" for those without one, such as what a command prints."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


def code_in(text):
    """What stands between backticks, in one line each."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def section(text, title):
    """What stands below a heading, up to the next of its kind."""
    found = re.search(rf"^(##+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return found[2]


def tables(text):
    """Every table as a list of its rows, each {title of a column: cell}."""
    found = []
    for part in re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE):
        titles, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in part.splitlines()]
        found.append([dict(zip(titles, row, strict=True)) for row in rows])
    return found


def commands(text):
    """Every command line of a text, in its blocks and between backticks, without comments."""
    lines = [part.strip() for block in blocks(text, "bash") for line in block.splitlines() for part in line.split("&&")]
    lines += [code.removeprefix("OMP_NUM_THREADS=1 ") for code in code_in(text)]
    lines = [re.sub(r"^torchrun \S+ ", "python ", re.sub(r"\s+#.*", "", line)) for line in lines]
    return [line for line in dict.fromkeys(lines) if re.match(r"python \S+ .|python tests/", line)]
