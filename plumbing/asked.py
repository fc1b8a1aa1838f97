"""What train.py is asked for: a method, its settings, a run for each seed."""

import dataclasses
import typing
from pathlib import Path

from plumbing.errors import UserError, printable, unknown
from plumbing.processes import note
from plumbing.run_files import read_settings, run_folder
from plumbing.settings import Parser, TrainConfig, field_types, flag, given_flags, read_flags, words

ELSEWHERE = {  # methods that a flag makes of another: {name without - and _: method and flags}
    "mae": "magma --lam 0",
    "umae": "magma --lam 0 --uniformity 0.01",
    "mumae": "magma --uniformity 0.01",
    "simclr": "magma --ssl simclr --lam 0",
    "vicreg": "magma --ssl vicreg --lam 0",
    "blomae": "mlo_mae --objective blo",
    "maskedfinola": "finola --variant masked_b",
    "mobileformer": "finola",
    "energy": "ebm_pretrain",
}


def check_method(name: str, rest: list, methods):
    """Raise UserError for a method that does not exist, with the command that was meant where that is known."""
    if name in methods:
        return
    if name.startswith("-"):
        raise UserError(f"give the method first: python train.py METHOD {' '.join([name, *rest])}")
    if flags := ELSEWHERE.get(key := name.lower().replace("-", "").replace("_", "")):
        raise UserError(f"unknown method {name!r}; try: python train.py {flags} --out runs/{key}")
    raise UserError(unknown("method", name, methods))


def beside_settings() -> Parser:
    """The flags that are no settings of a run."""
    parser = Parser(add_help=False, allow_abbrev=False)
    text = "settings of another run, by its config.json; the other flags win"
    parser.add_argument("--config", metavar="FILE", help=text)
    text = "a run for each seed, one after the other, in folders that end in -seed0, ..."
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help=text)
    return parser


def read_configs(name: str, config_class, recipes: dict, argv: list, description: str = "") -> list[TrainConfig]:
    """The settings of each run that a command line asks for: one, or one for each of --seeds.

    Raises UserError as `read_flags`, and for a --config that is no file of this method's settings.
    """
    beside, usage = beside_settings(), f"python train.py {name} [--any-field value]"
    asked, argv = beside.parse_known_args(argv)
    saved = saved_settings(Path(asked.config), name, config_class) if asked.config else None
    config = read_flags(config_class, recipes, argv, usage, description, saved, (beside,))
    if not asked.seeds:
        return [config]
    if len(set(asked.seeds)) < len(asked.seeds) or "seed" in given_flags(config_class, argv):
        raise UserError(f"--seeds {' '.join(map(str, asked.seeds))}: give each seed once, and no --seed beside them")
    configs = []
    for seed in asked.seeds:
        configs.append(dataclasses.replace(config, seed=seed, out=f"{run_folder(name, config)}-seed{seed}"))
        configs[-1].moved = config.moved
    return configs


def saved_settings(path: Path, method: str, config_class) -> dict:
    """{field: value} of a run's config.json, each read as its flag is. Raises UserError where these are not settings.

    Without `resume`, which is no setting of a run but of a start.
    """
    path = path / "config.json" if path.is_dir() else path
    found = read_settings(path)
    if not found:
        raise UserError(f"--config {path}: there is no such file; give the config.json of a run")
    if found.get("method") != method:
        other = f"of {found['method']}" if found.get("method") else "of no method"
        raise UserError(f"--config {path} holds settings {other}, not of {method}; give the config.json of such a run")
    fields = {field.name for field in dataclasses.fields(config_class)}
    if strange := sorted(found.keys() - fields - {"method"}):
        note(f"{printable(str(path))} has settings that {method} does not know: {printable(' '.join(strange))}")
    if found.get("max_steps"):
        note(f"{printable(str(path))} is of a run cut by --max-steps {found['max_steps']}: its epochs are few")
    given, kinds = [], field_types(config_class)
    for name in sorted(found.keys() & fields - {"resume"}):
        value = tuple(found[name]) if isinstance(found[name], list) else found[name]
        if isinstance(value, dict) or isinstance(value, tuple) != (typing.get_origin(kinds[name]) is tuple):
            raise UserError(f"--config {path}: {name} {printable(str(found[name]))[:80]} is no value of {flag(name)}")
        if isinstance(value, bool):
            given.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            given += [flag(name), *map(str, value)] if value else []
        else:
            given.append(f"{flag(name)}={words(value)}")
    try:
        return given_flags(config_class, given)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
