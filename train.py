"""Train a method on a data set.

python train.py magma                                   built-in pictures, a few minutes on a laptop
python train.py magma --data cifar10 --root DIR         a data set on disk
python train.py magma --data DIR --recipe photos        your own pictures, with classes or without, at laptop size
python train.py magma --data DIR                        the same, by the paper's settings for ImageNet
python train.py magma --epochs 48 --out runs/longer     any field of the method's Config is a flag
python train.py magma --resume                          go on with a run that was stopped
python train.py magma --seeds 0 1 2                     a run for each seed
python train.py magma --config runs/x/config.json --out runs/y      the settings of another run
torchrun --nproc_per_node=8 train.py magma              many GPUs, or many CPU processes
python train.py magma --help                            all flags of a method
"""

import functools
import importlib
import shlex
import sys

import torch

from common import METHODS, fit, load_data
from plumbing.asked import check_method, read_configs
from plumbing.command import run_command
from plumbing.processes import on_rank_zero, rank, start_distributed
from plumbing.report import write_report
from plumbing.run_files import refuse_taken, run_folder
from plumbing.settings import check_batch
from plumbing.tables import format_table


def method_lines() -> str:
    """Each method with the first line of its file."""
    return "\n".join(f"  {name:<14}{importlib.import_module(name).__doc__.splitlines()[0]}" for name in METHODS)


def train(argv: list):
    """Run the command line. Raises UserError for a method, a flag or data that is wrong."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nMethods:\n{method_lines()}")
        return
    name, *flags = argv
    check_method(name, flags, METHODS)
    module = importlib.import_module(name)
    configs = read_configs(name, module.Config, module.RECIPES, flags, module.__doc__.splitlines()[0])
    config, folders = configs[0], [run_folder(name, config) for config in configs]
    device = start_distributed(config.device)
    for folder in folders if len(folders) > 1 and not config.resume else ():
        on_rank_zero(functools.partial(refuse_taken, folder))  # before hours are spent on the runs before it
    check_batch(config)  # before any data is read
    names = ("root", "image_size", "download", "skip_bad_images", "max_pixels", "workers")
    options = {name: getattr(config, name) for name in names}
    data, test = (load_data(config.data, split=split, device=device, **options) for split in ("train", "test"))
    for config in configs:
        train_one(getattr(module, METHODS[name]), config, data, test, device)
    if rank() == 0 and len(configs) > 1:
        print(f"compare them: python evaluate.py {shlex.join(map(str, folders))}")


def train_one(method_class, config, data, test, device):
    """One run, its table, and its report."""
    torch.manual_seed(config.seed)  # of the initial weights, the same on every process
    method = method_class(config, data).to(device)
    results = fit(method, data, test, config)
    if rank() == 0:
        folder = run_folder(method.name, config)
        if results:
            place, report = (shlex.quote(str(path)) for path in (folder, folder / "report.html"))
            print(format_table(results, "accuracy (%)" if len(data.classes) else "without labels"))
            judge = "linear pictures --untrained --pixels" if len(data.classes) else "features"
            print(f"see {report}; next: python evaluate.py {place} --protocol {judge}")
        write_report(folder)


def main(argv: list) -> int:
    return run_command(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
