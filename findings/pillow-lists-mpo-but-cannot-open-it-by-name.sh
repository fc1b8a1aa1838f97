#!/usr/bin/env bash
# Pillow 13.0.0 opens MPO files and calls their format "MPO", but "MPO" among `formats=` of Image.open is a KeyError.
#
# `Image.open(file, formats=[...])` restricts which decoders may read a file; its documentation points to
# `python3 -m PIL` for the names, which lists MPO (the stereo and burst pictures of phones and cameras). Yet MPO has no
# decoder of its own: the one of JPEG reads it. So an allow-list that names MPO lets JPEG files pass while an entry
# before it fits, and fails with KeyError: 'MPO' (no UnidentifiedImageError) for a PNG that is listed after it. In the
# order JPEG, PNG, MPO everything passes, which hides it. To read MPO, list JPEG alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet pillow==13.0.0
"$work/env/bin/python" -m PIL > "$work/listed"
grep -q "^MPO image/mpo" "$work/listed" && echo "python -m PIL lists MPO"
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


print("Pillow", PIL.__version__)
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
