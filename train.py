"""Train a method on a data set.

python train.py magma                                   built-in pictures, a few minutes on a laptop
python train.py magma --data cifar10 --root DIR         a data set on disk
python train.py magma --data DIR --recipe photos        your own pictures, with classes or without, at laptop size
python train.py magma --data DIR                        the same, by the paper's settings for ImageNet
python train.py magma --epochs 48 --out runs/longer     any field of the method's Config is a flag
python train.py magma --resume                          go on with a run that was stopped
torchrun --nproc_per_node=8 train.py magma              many GPUs, or many CPU processes
python train.py magma --help                            all flags of a method
"""

import importlib
import shlex
import sys

import torch

from common import METHODS, fit, load_data
from plumbing.command import run_command
from plumbing.errors import UserError, unknown
from plumbing.processes import rank, start_distributed
from plumbing.run_files import run_folder
from plumbing.settings import check_batch, read_flags
from plumbing.tables import format_table

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


def method_lines() -> str:
    """Each method with the first line of its file."""
    return "\n".join(f"  {name:<14}{importlib.import_module(name).__doc__.splitlines()[0]}" for name in METHODS)


def train(argv: list):
    """Run the command line. Raises UserError for a method, a flag or data that is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nMethods:\n{method_lines()}")
        return
    name = argv[0]
    if name not in METHODS:
        if name.startswith("-"):
            raise UserError(f"give the method first: python train.py METHOD {' '.join(argv)}")
        if flags := ELSEWHERE.get(key := name.lower().replace("-", "").replace("_", "")):
            raise UserError(f"unknown method {name!r}; try: python train.py {flags} --out runs/{key}")
        raise UserError(unknown("method", name, METHODS))
    module = importlib.import_module(name)
    usage = f"python train.py {name} [--any-field value]"
    config = read_flags(module.Config, module.RECIPES, argv[1:], usage, module.__doc__.splitlines()[0])
    device = start_distributed(config.device)
    check_batch(config)  # before any data is read
    names = ("root", "image_size", "download", "skip_bad_images", "max_pixels", "workers")
    options = {name: getattr(config, name) for name in names}
    data, test = (load_data(config.data, split=split, device=device, **options) for split in ("train", "test"))
    torch.manual_seed(config.seed)  # of the initial weights, the same on every process
    method = getattr(module, METHODS[name])(config, data).to(device)
    results = fit(method, data, test, config)
    if rank() == 0 and results:
        out, seen = (shlex.quote(str(run_folder(method.name, config) / name)) for name in ("", "pictures.png"))
        print(format_table(results, "accuracy (%)" if len(data.classes) else "without labels"))
        judge = "linear pictures --untrained --pixels" if len(data.classes) else "features"
        print(f"see {seen}; next: python evaluate.py {out} --protocol {judge}")


def main(argv: list) -> int:
    return run_command(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
