"""Train a method on a data set.

python train.py magma                                   built-in pictures, two minutes on a laptop
python train.py magma --data cifar10 --root DIR         a data set on disk
python train.py magma --data DIR                        your own pictures: DIR/train/<class>/*, DIR/val/<class>/*
python train.py magma --epochs 200 --resume             any field of the method's Config is a flag
torchrun --nproc_per_node=8 train.py magma              many GPUs, or many CPU processes
python train.py magma --help                            all flags of a method
"""

import importlib
import os
import sys

METHODS = {"magma": "Magma"}  # module: class


def method_lines() -> str:
    """Each method with the first line of its file."""
    return "\n".join(f"  {name:<14}{importlib.import_module(name).__doc__.splitlines()[0]}" for name in METHODS)


def main(argv: list) -> int:
    """Run the command line; returns the exit code: 0, 1 for a run that had to stop, 2 for a user's mistake."""
    import torch

    import common

    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nMethods:\n{method_lines()}")
        return 0
    try:
        name = argv[0]
        if name not in METHODS:
            raise common.UserError(common.unknown("method", name, METHODS))
        module = importlib.import_module(name)
        usage = f"python train.py {name} [--any-field value]"
        config = common.read_flags(module.Config, module.RECIPES, argv[1:], usage, module.__doc__.splitlines()[0])
        device = common.start_distributed(config.device)
        common.check_config(config)
        options = {"root": config.root, "image_size": config.image_size, "device": device}
        train, test = (common.load_data(config.data, split=split, **options) for split in ("train", "test"))
        torch.manual_seed(config.seed)  # of the initial weights, the same on every process
        method = getattr(module, METHODS[name])(config, train).to(device)
        results = common.fit(method, train, test, config)
    except (common.UserError, common.NonFiniteLoss, OSError) as error:
        number = os.environ.get("RANK", "0")
        print(f"error{f' of process {number}' if number != '0' else ''}: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, common.UserError) else 1
        if torch.distributed.is_initialized():
            os._exit(code)  # leaving in order would wait for processes that may be waiting for this one
        return code
    except KeyboardInterrupt:
        print("\nstopped; go on with the same command and --resume", file=sys.stderr)
        return 130
    if common.rank() == 0 and results:
        print(common.format_results(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
