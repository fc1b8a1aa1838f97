#!/usr/bin/env bash
# Pillow 13.0.0 turns a 16-bit grey PNG white by convert("RGB"), where OpenCV 5.0 keeps the picture.
#
# Readers of picture folders call `Image.open(path).convert("RGB")`: torchvision's ImageFolder does, and most data
# loaders of this field. For a 16-bit grey PNG (microscopes, X-ray, depth) Pillow opens mode "I;16", and its conversion
# clips at 255 rather than divide by 257: all but the darkest 0.4 % of the range is white. There is no warning, the
# result has the right size and mode, and a network trains on blank pictures. `convert("L")` does the same. OpenCV's
# imread divides by 256. A 16-bit *colour* PNG is scaled by Pillow too, so a test with a colour picture shows nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet numpy==2.4.6 pillow==13.0.0 "opencv-python-headless==5.0.0.93"
"$work/env/bin/python" - "$work" <<'P'
import sys

import cv2
import numpy as np
import PIL
from PIL import Image

ramp = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (8, 1))  # all levels, dark to bright
path = f"{sys.argv[1]}/ramp.png"
Image.fromarray(ramp).save(path)
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__)
with Image.open(path) as image:
    assert image.mode == "I;16" and (np.asarray(image) == ramp).all()
    print("a 16-bit grey PNG opens as mode I;16 with all its values")
    for mode in ("RGB", "L"):
        found = np.asarray(image.convert(mode)).reshape(8, 256, -1)[..., 0]
        assert (found == np.minimum(ramp, 255)).all()
        print(f'convert("{mode}") clips: {100 * (found == 255).mean():.1f} % of a ramp from dark to bright is 255')
found = cv2.imread(path)[..., 0]
assert (found == ramp // 256).all()
print(f"cv2.imread divides by 256: {100 * (found == 255).mean():.1f} % is 255")
colour = np.repeat(ramp[..., None], 3, axis=2)
cv2.imwrite(path, colour)
with Image.open(path) as image:
    assert image.mode == "RGB" and (np.asarray(image) == colour // 256).all()
print("a 16-bit colour PNG is scaled by Pillow as well, by 256")
P
