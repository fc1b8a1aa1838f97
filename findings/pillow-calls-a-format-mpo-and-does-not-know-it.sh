#!/usr/bin/env bash
# Pillow 13.0.0 opens MPO files and calls their format "MPO", but "MPO" among `formats=` of Image.open is a KeyError.
#
# `image.format` of a stereo or burst picture of a phone is "MPO", and `registered_extensions()` gives "MPO" for .mpo. Yet
# the format has no decoder of its own: that of JPEG reads it, `python3 -m PIL` does not list it, and an allow-list that
# names it fails with KeyError: 'MPO' (no UnidentifiedImageError) as soon as Pillow gets to that entry: JPEG files pass
# where JPEG stands before it, PNG files fail where PNG stands behind it. In the order JPEG, PNG, MPO all pass, which
# hides it. So a list made from the formats that a folder's pictures report breaks for the others. List JPEG alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet pillow==13.0.0
"$work/env/bin/python" - <<'P'
import io

import PIL
from PIL import Image


def opened(kind, formats):
    """The format of a file of this kind, opened by these decoders, or the type of the error."""
    file = io.BytesIO()
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(file, kind, **({"save_all": True, "append_images": pictures[1:]} if kind == "MPO" else {}))
    try:
        return Image.open(io.BytesIO(file.getvalue()), formats=formats).format
    except Exception as error:
        return type(error).__name__


Image.init()
print("Pillow", PIL.__version__, "has MPO for .mpo:", Image.registered_extensions()[".mpo"] == "MPO")
expected = {
    ("MPO", ("JPEG",)): "MPO",
    ("MPO", ("MPO",)): "KeyError",
    ("JPEG", ("JPEG", "MPO", "PNG")): "JPEG",
    ("PNG", ("JPEG", "MPO", "PNG")): "KeyError",
    ("PNG", ("JPEG", "PNG", "MPO")): "PNG",
    ("PNG", ("JPEG", "TIFF", "PNG")): "PNG",  # any other name that does not fit is passed over
}
for (kind, formats), want in expected.items():
    found = opened(kind, formats)
    assert found == want, (kind, formats, found)
    print(f"a {kind} file with formats={list(formats)}: {found}")
P
