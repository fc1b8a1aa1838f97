#!/usr/bin/env bash
# torch 2.13.0, CPU: whether attention can be differentiated twice depends on dropout, on the mode and on needless dims.
#
# An energy that is descended, a gradient penalty or a hypergradient needs the derivative of a gradient. torch's own
# transformer layer has one while it trains with its default dropout of 0.1, but neither after eval() nor with a dropout
# of 0: the code that trained cannot sample. The reason is which kernel the same call takes. scaled_dot_product_attention
# picks a fused one, whose backward has no derivative, for (batch, heads, tokens, width) without dropout; plain steps,
# which have all derivatives, with dropout, for (batch, tokens, width), or where a mask asks for a gradient.
# nn.MultiheadAttention has one with need_weights=True, its default, and none with need_weights=False.
# The first gradient is right everywhere; asking for the second raises RuntimeError.
# sdpa_kernel(SDPBackend.MATH) makes all of them work.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/look.py" <<'PY'
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)


def twice(name, expected, call, *shape):
    """Whether the gradient of call's output by its input has a derivative itself."""
    x = torch.randn(shape, requires_grad=True)
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    try:
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found = bool(second.isfinite().all())
    except RuntimeError as error:
        assert "is not implemented" in str(error), error
        found = False
    print(f"{name:<48}{'a second derivative' if found else 'none'}")
    assert found == expected


def layer(dropout, train):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True).train(train)


def attend(**options):
    return lambda x: scaled_dot_product_attention(x, x, x, **options)


heads = nn.MultiheadAttention(8, 2, batch_first=True)
mask = torch.zeros(5, 5)
twice("TransformerEncoderLayer, as made, train()", True, layer(0.1, True), 2, 5, 8)
twice("TransformerEncoderLayer, as made, eval()", False, layer(0.1, False), 2, 5, 8)
twice("TransformerEncoderLayer(dropout=0), train()", False, layer(0.0, True), 2, 5, 8)
twice("MultiheadAttention", True, lambda x: heads(x, x, x)[0], 2, 5, 8)
twice("MultiheadAttention, need_weights=False", False, lambda x: heads(x, x, x, need_weights=False)[0], 2, 5, 8)
twice("attention, 4 dimensions", False, attend(), 2, 3, 5, 8)
twice("attention, 3 dimensions", True, attend(), 2, 5, 8)
twice("attention, 4 dimensions, dropout", True, attend(dropout_p=0.1), 2, 3, 5, 8)
twice("attention, 4 dimensions, a mask", False, attend(attn_mask=mask), 2, 3, 5, 8)
twice("attention, 4 dimensions, a mask with a gradient", True, attend(attn_mask=mask.requires_grad_()), 2, 3, 5, 8)
with sdpa_kernel(SDPBackend.MATH):
    twice("TransformerEncoderLayer, eval(), plain steps", True, layer(0.1, False), 2, 5, 8)
PY
"$work/env/bin/python" "$work/look.py"
