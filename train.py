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

    from common import NonFiniteLoss, UserError, fit, format_results, load_data, rank, read_flags, start_distributed
    from common import unknown as unknown_name

    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nMethods:\n{method_lines()}")
        return 0
    try:
        name = argv[0]
        if name not in METHODS:
            raise UserError(unknown_name("method", name, METHODS))
        module = importlib.import_module(name)
        usage = f"python train.py {name} [--any-field value]"
        config = read_flags(module.Config, module.RECIPES, argv[1:], usage, module.__doc__.splitlines()[0])
        device = start_distributed(config.device)
        options = {"root": config.root, "image_size": config.image_size, "device": device, "seed": config.seed}
        train, test = (load_data(config.data, split=split, **options) for split in ("train", "test"))
        torch.manual_seed(config.seed)  # of the initial weights, the same on every process
        method = getattr(module, METHODS[name])(config, train).to(device)
        results = fit(method, train, test, config)
    except (UserError, NonFiniteLoss) as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("\nstopped; go on with the same command and --resume", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if results and int(os.environ.get("RANK", "0")) == 0:
        print(format_results(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
