#!/usr/bin/env bash
# torch 2.13.0, CPU: what randn draws after a seed depends on how many numbers are asked for, and on whether 16 divides it.
#
# One expects a longer draw to begin with the shorter one, as rand's does and numpy's. Below 16 numbers they are drawn one
# by one; from 16 on in blocks of 16 by another rule, so that nothing agrees with the short draw; and where 16 does not
# divide the count, the last 16 are drawn a second time, over numbers that were there: randn(17) shares with randn(32)
# its first number alone, randn(10001) all but the last 16. Float64 and float32 of one seed are the same numbers, but for
# rounding, below 16 and others from 16 on. So a test with tiny shapes sees no difference between a picture's noise drawn
# alone and drawn in a batch, or between two precisions, and real shapes have one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/look.py" <<'PY'
import numpy as np
import torch

print("torch", torch.__version__.split("+")[0])


def drawn(count, draw=torch.randn, **options):
    torch.manual_seed(0)
    return draw(count, **options)


def alike(count, longer):
    """How many of the first `count` numbers of a longer draw are those of a draw of `count`, of the same seed."""
    found = int((drawn(count) == drawn(longer)[:count]).sum())
    print(f"randn({count}) and the beginning of randn({longer}): {found} of {count} numbers are the same")
    return found


assert alike(8, 15) == 8
assert alike(15, 16) == 0
assert alike(16, 32) == 16
assert alike(17, 32) == 1
assert alike(10001, 10016) == 10001 - 16
for count in (8, 15, 16, 17, 10001):
    assert torch.equal(drawn(count, torch.rand), drawn(10016, torch.rand)[:count])
    shorter, longer = (np.random.default_rng(0).standard_normal(n) for n in (count, 10016))
    assert (shorter == longer[:count]).all()
print("rand, and numpy's standard_normal: always all of them")
for count in (15, 16):
    apart = float((drawn(count).double() - drawn(count, dtype=torch.float64)).abs().max())
    print(f"randn({count}), float32 beside float64: largest difference {apart:.1e}")
    assert (apart < 1e-5) == (count < 16)
PY
"$work/env/bin/python" "$work/look.py"
