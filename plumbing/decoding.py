"""Picture files: open, decode, turn upright."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from plumbing.crops import crop_boxes


def decode_image(path, size: int, scale=(0.08, 1.0), seeds=(None,)) -> Tensor:
    """Read one image file -> uint8 (V, 3, size, size): a random resized crop a seed, the centre square for None.

    JPEG, PNG and WebP; grey, palette, CMYK, 16-bit and turned (EXIF) files come out as upright RGB. Bicubic.
    Raises OSError, SyntaxError, ValueError or struct.error where the file is damaged.
    """
    with Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation: on its side
        width, height = image.size[::-1] if turned else image.size
        boxes = []
        for seed in seeds:
            if seed is None:
                side = min(height, width) * 224 / 256
                boxes.append([(height - side) / 2, (width - side) / 2, side, side])
            else:
                sides, generator = torch.tensor([[height], [width]]).float(), torch.Generator().manual_seed(seed)
                boxes.append(crop_boxes(*sides, scale, generator=generator)[0].tolist())
        shrink = min(min(h, w) for _, _, h, w in boxes) / size
        if image.format == "JPEG" and shrink >= 2:  # let the decoder skip what the crops would throw away
            image.draft("RGB", (int(image.size[0] / shrink), int(image.size[1] / shrink)))
        upright = to_rgb(ImageOps.exif_transpose(image))
    sx, sy = upright.width / width, upright.height / height  # less than 1 after draft
    crops = []
    for top, left, h, w in boxes:
        box = (left * sx, top * sy, min((left + w) * sx, upright.width), min((top + h) * sy, upright.height))
        crops.append(np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=box)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; 16-bit grey is scaled rather than cut off, transparency is dropped."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        values = values / 257 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_whole(path):
    """Decode a picture and throw it away. Raises what `decode_image` does."""
    with Image.open(path) as image:
        image.draft("RGB", (1, 1))  # a JPEG at an eighth of its resolution: faster, and shows the same damage
        to_rgb(ImageOps.exif_transpose(image))
