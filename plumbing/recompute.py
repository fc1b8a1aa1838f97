"""Less memory for more time: a part of a network that the backward pass computes again (activation checkpointing)."""

import itertools

from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *inputs, again: bool = True):
    """module(*inputs), of which autograd keeps the inputs alone: the backward pass computes the rest a second time.

    Loss and gradients are the same. So are the buffers, among them the running statistics of batch norms: the second
    time works on copies of them. For modules that draw nothing at random, and not within torch.compile. Without `again`
    nothing is computed twice: autograd keeps all that it needs, as usual.
    """
    if not again:
        return module(*inputs)
    calls = itertools.count()

    def run(*inputs):
        if next(calls) == 0:
            return module(*inputs)
        return functional_call(module, {name: x.clone() for name, x in module.named_buffers()}, inputs)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
