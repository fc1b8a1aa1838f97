#!/usr/bin/env bash
# Pillow 13.0.0: a PNG of labels 0 to 15 in 4 bits comes back as 0, 17, 34, ... where it is grey, and as it is with a palette.
#
# Tools that make files small write label maps of few classes in 4 or 2 bits a pixel. Grey ones are opened as 8-bit grey and
# stretched to 0 to 255, as is right for a picture: label 1 becomes 17, of 2 bits 85. The same numbers as places of a
# palette are left alone. In both cases the mode, L or P, is that of an 8-bit file, so nothing shows that the numbers have
# changed, but that some "classes" are beyond the list. Eight bits in the header of the file have to be asked for.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
cat > "$work/look.py" <<'PY'
import io
import struct
import zlib

import numpy as np
import PIL
from PIL import Image

print("Pillow", PIL.__version__)
LABELS = [0, 1, 2, 3]


def png(bits, palette):
    """One row of LABELS, as a PNG of so many bits a pixel: grey, or with a palette."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    number = 0
    for label in LABELS:
        number = number << bits | label
    row = b"\0" + number.to_bytes(len(LABELS) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(LABELS), 1, bits, 3 if palette else 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header)]
    parts += [chunk(b"PLTE", bytes(range(3 * 2**bits)))] if palette else []
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")])


for bits, factor in ((8, 1), (4, 17), (2, 85)):
    for palette in (False, True):
        if bits == 8 and palette:
            continue
        image = Image.open(io.BytesIO(png(bits, palette)))
        found = np.asarray(image)[0].tolist()
        kind = "places of a palette" if palette else "grey"
        print(f"labels {LABELS} in {bits} bits, {kind}: mode {image.mode}, numbers {found}")
        assert image.mode == ("P" if palette else "L")
        assert found == [label * (1 if palette else factor) for label in LABELS]
PY
"$work/env/bin/python" "$work/look.py"
