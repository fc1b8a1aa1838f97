#!/usr/bin/env bash
# matplotlib 3.11.2 cuts pixel values in [0, 1] off where torchvision's save_image rounds them.
#
# Both `matplotlib.image.imsave` and `Figure.figimage` write a float picture as the integer part of 255 x. A picture that
# was read from 8 bits comes back unchanged, so nothing is noticed there. Values in between, as a network makes them,
# are half a level too dark on average, and 0.5 is 127. torchvision adds a half before the cast, so the same
# reconstruction, saved by both, differs in half of its pixels. Who writes pictures by matplotlib and measures them
# later (PSNR from files, a comparison of two repositories) should round to uint8 first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet matplotlib==3.11.2 numpy==2.4.6 pillow==13.0.0
"$work/env/bin/python" - <<'P'
import io

import matplotlib
import numpy as np
from matplotlib import image
from matplotlib.figure import Figure
from PIL import Image


def saved(picture):
    """What a PNG holds of a float picture (H, W, 3), written by imsave and by figimage."""
    height, width = picture.shape[:2]
    files = io.BytesIO(), io.BytesIO()
    image.imsave(files[0], picture, format="png")
    figure = Figure(figsize=((width + 0.1) / 100, (height + 0.1) / 100), dpi=100)
    figure.figimage(picture, 0, 0)
    figure.savefig(files[1], format="png")
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]


levels = np.repeat(np.arange(256)[None, :, None], 3, axis=2)  # (1, 256, 3)
noise = np.random.default_rng(0).random((64, 64, 3))
print("matplotlib", matplotlib.__version__)
for name, found in zip(("imsave", "figimage"), saved(levels / 255), strict=True):
    assert (found == levels).all(), name
print("a picture of 8 bits comes back unchanged from both")
for name, found in zip(("imsave", "figimage"), saved(noise), strict=True):
    assert (found == np.floor(255 * noise)).all(), name
    rounded = np.floor(255 * noise + 0.5)  # what torchvision.utils.save_image writes
    share, shift = (found != rounded).mean(), (found - 255 * noise).mean()
    assert 0.48 < share < 0.52 and -0.51 < shift < -0.49, (name, share, shift)
    print(f"{name}: the integer part of 255 x; {100 * share:.0f} % of the values are not the nearest, mean {shift:.2f}")
for name, found in zip(("imsave", "figimage"), saved(np.full((2, 2, 3), 0.5)), strict=True):
    assert (found == 127).all(), name
print("0.5 becomes 127 in both")
P
