#!/usr/bin/env bash
# torch 2.13.0: interpolate(mode="bicubic", antialias=True) is another cubic, also where nothing is made smaller.
#
# Antialiasing widens a kernel where pictures shrink, so it ought to change nothing where they grow; in bilinear mode it
# does not. In bicubic mode the flag also swaps the kernel: Keys' cubic with a = -0.75 without it, with a = -0.5 with it,
# as in Pillow, and weights past the border go to the rest rather than to a repeated edge. The documentation speaks of
# agreement with Pillow "for downsampling". So position embeddings that a vision transformer enlarges for bigger pictures
# differ between code that passes antialias=True (timm, by default) and code that does not (MAE's release).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pillow==12.3.0
cat > "$work/look.py" <<'PY'
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

print("torch", torch.__version__.split("+")[0])


def enlarged(image, mode, antialias):
    return interpolate(image[None, None], size=(28, 28), mode=mode, antialias=antialias)[0, 0]


def keys(distance, a):
    """Keys' cubic kernel, at the four cells around a place."""
    d = abs(distance)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    return near if d <= 1 else far if d < 2 else 0.0


torch.manual_seed(0)
image = torch.randn(14, 14)
pillow = torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize((28, 28), Image.Resampling.BICUBIC)))
for mode in ("bilinear", "bicubic"):
    apart = float((enlarged(image, mode, True) - enlarged(image, mode, False)).abs().max())
    print(f"{mode}, 14 x 14 to 28 x 28: largest difference by antialias {apart:.4f}")
    assert apart > 0.1 if mode == "bicubic" else apart < 1e-5
for antialias in (False, True):
    gap = float((enlarged(image, "bicubic", antialias) - pillow).abs().max())
    print(f"bicubic, antialias={antialias}: largest difference from Pillow {gap:.6f}")
    assert (gap < 1e-4) == antialias

spot = torch.zeros(14, 14)
spot[7] = 1.0  # a line: what it spreads to along the other side is the kernel itself
for antialias, a in ((False, -0.75), (True, -0.5)):
    found = enlarged(spot, "bicubic", antialias)[10:20, 14]
    wanted = [keys((row + 0.5) / 2 - 0.5 - 7, a) for row in range(10, 20)]
    print(f"bicubic, antialias={antialias}: the kernel is Keys' with a = {a}")
    assert np.allclose(found, wanted, atol=1e-5)
PY
"$work/env/bin/python" "$work/look.py"
