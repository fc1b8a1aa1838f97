"""Train a method on a data set.

python train.py magma                                   built-in pictures, a few minutes on a laptop
python train.py magma --data cifar10 --root DIR         a data set on disk
python train.py magma --data DIR                        your own pictures: DIR/train/<class>/*, DIR/val/<class>/*
python train.py magma --data DIR --recipe shapes        the same, at laptop size
python train.py magma --epochs 48 --out runs/longer     any field of the method's Config is a flag
python train.py magma --resume                          go on with a run that was stopped
torchrun --nproc_per_node=8 train.py magma              many GPUs, or many CPU processes
python train.py magma --help                            all flags of a method
"""

import importlib
import sys

import torch

import common

METHODS = {
    "ebm_pretrain": "EnergyPretraining",
    "finola": "FinolaAutoencoder",
    "magma": "Magma",
    "mixedae": "MixedAE",
    "mlo_mae": "MultiLevelMAE",
}  # module: class


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
            raise common.UserError(f"give the method first: python train.py METHOD {' '.join(argv)}")
        raise common.UserError(common.unknown("method", name, METHODS))
    module = importlib.import_module(name)
    usage = f"python train.py {name} [--any-field value]"
    config = common.read_flags(module.Config, module.RECIPES, argv[1:], usage, module.__doc__.splitlines()[0])
    device = common.start_distributed(config.device)
    common.check_config(config)
    common.check_batch(config)
    options = {"root": config.root, "image_size": config.image_size, "device": device}
    options |= {"download": config.download, "skip_bad_images": config.skip_bad_images}
    data, test = (common.load_data(config.data, split=split, **options) for split in ("train", "test"))
    torch.manual_seed(config.seed)  # of the initial weights, the same on every process
    method = getattr(module, METHODS[name])(config, data).to(device)
    results = common.fit(method, data, test, config)
    if common.rank() == 0 and results:
        print(common.format_results(results))


def main(argv: list) -> int:
    return common.run_command(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
