#!/usr/bin/env bash
# torch 2.13.0: through a step of AdamW(differentiable=True), the gradient is nan as soon as one weight has none.
#
# `differentiable=True` is for hypergradients: autograd goes back through the step to what made the gradient. The step
# itself is right, also for a weight whose gradient is exactly 0 (a dead ReLU, an unused row of a table): its decay alone
# moves it. But going back meets sqrt(0), whose slope is infinite, times 0, which is nan; and since one number, a learned
# learning rate or mask, usually stands behind all gradients, that one weight makes its whole derivative nan, though only
# the other weight was asked for. Adam and RMSprop do the same; plain SGD does not. Who differentiates through Adam's
# step has to write it out and take the root where it is not 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/look.py" <<'PY'
import math

import torch

print("torch", torch.__version__.split("+")[0])


def look(kind, gradient, **options):
    """The weights after a step, and the derivative of the first one by a factor of all gradients."""
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True) * 1.0
    optimizer = kind([weights], lr=0.1, differentiable=True, **options)
    weights.grad = factor * torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    (slope,) = torch.autograd.grad(weights[0], factor)
    print(f"{kind.__name__}, gradients {gradient}: weights {weights.tolist()}, derivative of the first {float(slope)}")
    return weights.tolist(), float(slope)


for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop):
    _, slope = look(kind, [1.0, 0.5])
    assert math.isfinite(slope)
    weights, slope = look(kind, [1.0, 0.0])
    assert all(math.isfinite(w) for w in weights) and math.isnan(slope)
_, slope = look(torch.optim.SGD, [1.0, 0.0])
assert abs(slope + 0.1) < 1e-12
PY
"$work/env/bin/python" "$work/look.py"
