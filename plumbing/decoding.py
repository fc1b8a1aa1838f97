"""Picture files: open, decode, turn upright."""

import io
import os
import re
import stat
import struct

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from plumbing.crops import Crop, crop_box

MAX_PIXELS = 178_956_970  # the default of --max-pixels; Pillow warns of more, and calls twice that an attack
Image.MAX_IMAGE_PIXELS = None  # the limit is ours: `open_picture` holds it, and says how to raise it

FORMATS = {  # the decoders of Pillow that may read a file, by its first bytes; JPEG is that of MPO too
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
}
OTHERS = {  # what else may carry the name of a picture, to be named where it is refused
    "empty": rb"\Z",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "GIF": rb"GIF8",
    "BMP": rb"BM....\0\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(?:he|mif1|msf1)",
    "a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "Photoshop": rb"8BPS",
    "an icon": rb"\0\0[\x01\x02]\0",
    "an archive": rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf",
    "a note of macOS about another file": rb"\0\x05\x16[\0\x07]",
    "a pointer of Git LFS (git lfs pull gets the picture)": rb"version https://git-lfs",
    "SVG or XML": rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:\?xml|svg))",
    "an HTML page": rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype|!--|html|head|body))",
    "a text": rb"[\t-\r -~\x80-\xff]*\Z",
}
KINDS = {kind: re.compile(start, flags=re.DOTALL) for kind, start in (FORMATS | OTHERS).items()}
TURNS = {  # EXIF orientation: what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# --- from a file to pixels -------------------------------------------------------------------------------------------


def decode_image(path, size: int, crop=(0.08, 1.0), draws=(None,), max_pixels: int = MAX_PIXELS, whole=False) -> Tensor:
    """Read one image file -> uint8 (V, 3, size, size): a random resized crop for each of `crop_draws`.

    For None it is the centre square, with 224 / 256 of the shorter side.
    JPEG, PNG and WebP; grey, palette, CMYK, 16-bit and turned (EXIF) files come out as upright RGB. `crop` is a `Crop`,
    or the least and largest share of the image. Bicubic, unless it says otherwise. With `whole` rows below the
    crops are decoded too.
    Raises what `open_picture` does.
    """
    *scale, interpolation, clamp = Crop(*crop)
    kernel = Image.Resampling[(interpolation or "bicubic").upper()]
    with open_picture(path, max_pixels) as image:
        turn = image.info["orientation"]
        width, height = image.size[::-1] if turn >= 5 else image.size  # from 5 on it lies on its side
        boxes = []
        for draw in draws:
            if draw is None:
                side = min(height, width) * 224 / 256
                boxes.append([(height - side) / 2, (width - side) / 2, side, side])
            else:
                boxes.append(crop_box(height, width, scale, draw, clamp))
        shrink = min(min(h, w) for _, _, h, w in boxes) / size
        if shrink >= 2:  # let the decoder of JPEG skip what the crops would throw away; others have no draft
            image.draft("RGB", (int(image.size[0] / shrink), int(image.size[1] / shrink)))
        elif turn == 1 and not whole:
            lowest = max(top + h + 2 * max(1, h / size) for top, _, h, _ in boxes)  # so far the bicubic kernel reaches
            cut_below(image, int(lowest) + 32)  # and the decoder's own, of colours, a few rows
        try:
            upright = to_rgb(image)
        except OSError:  # damage that the decoder overlooks in a whole picture may stop it in a part
            if whole:
                raise
            return decode_image(path, size, crop, draws, max_pixels, whole=True)
    if turn in TURNS:
        upright = upright.transpose(TURNS[turn])
    sx, sy = upright.width / width, upright.height / height  # less than 1 after draft
    crops = []
    for top, left, h, w in boxes:
        box = (left * sx, top * sy, min((left + w) * sx, upright.width), min((top + h) * sy, upright.height))
        crops.append(upright.resize((size, size), kernel, box=box).tobytes("raw", "RGB;L"))  # each row by colours
    rows = torch.frombuffer(bytearray(b"".join(crops)), dtype=torch.uint8)
    return rows.view(len(boxes), size, 3, size).transpose(1, 2)


def cut_below(image: Image.Image, rows: int):
    """Let an opened JPEG be decoded in its first rows alone, which stay the same to the last bit; the rest is black.

    Where the frame says that it has so few, the decoder passes over what follows. One scan must hold all colours.
    """
    if image.format != "JPEG" or rows >= image.height:
        return
    with image.fp.getbuffer() as data:
        at, frame = 2, 0  # the header is as `split_jpeg` leaves it; a damaged one is none of ours
        while (marker := bytes(data[at : at + 2]))[:1] == b"\xff" and marker != b"\xff\xda":
            frame = at if marker in (b"\xff\xc0", b"\xff\xc1") else frame  # sequential
            at += 2 + int.from_bytes(data[at + 2 : at + 4])
        if frame and marker == b"\xff\xda" and data[at + 4 : at + 5] == data[frame + 9 : frame + 10]:
            data[frame + 5 : frame + 7] = rows.to_bytes(2)
            image.tile = [image.tile[0]._replace(extents=(0, 0, image.width, rows))]


def read_whole(path, max_pixels: int = MAX_PIXELS):
    """Decode a picture and throw it away. Raises what `open_picture` does."""
    with open_picture(path, max_pixels) as image:
        image.draft("RGB", (1, 1))  # a JPEG at an eighth of its resolution: faster, and shows the same damage
        to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as 8-bit RGB; 16-bit grey is scaled rather than cut off, transparency is dropped."""
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    if image.mode.startswith("I"):  # not by the largest value: brightness would depend on what else is in the picture
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def open_picture(path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a JPEG, PNG or WebP file -> the Pillow image, to be loaded; its info has the EXIF "orientation", 1 to 8.

    Pillow sees the pixels alone, no metadata: these can neither refuse a picture nor change or delay it. Of several
    frames there is the first.
    Raises OSError or ValueError for another kind of file, for more than `max_pixels` pixels and for a damaged header;
    loading it raises OSError, SyntaxError, ValueError or EOFError where its pixels are damaged.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a plain file")  # a pipe or a device could be read for ever
    with open(path, "rb") as file:
        head = file.read(256)
        kind = kind_of(head)
        if kind not in FORMATS:
            raise ValueError(f"{kind}, expected JPEG, PNG or WebP")
        if status.st_size > 8 * max_pixels + 2**26:  # PNG has 8 bytes a pixel at most; and some for the rest
            raise ValueError(f"{status.st_size} bytes are more than --max-pixels {max_pixels} can need: raise it")
        pixels, exif = {"JPEG": split_jpeg, "PNG": split_png, "WEBP": split_webp}[kind](head + file.read())
    try:
        image = Image.open(io.BytesIO(pixels), formats=[kind])
    except UnidentifiedImageError:
        raise ValueError(f"its {kind} header is damaged, or of a rare kind that Pillow cannot read") from None
    if image.mode == "P" and image.palette is None:
        raise ValueError("its palette is missing")  # Pillow would give a black picture
    width, height = image.size
    if width * height > max_pixels:
        shown = f"{width} x {height} pixels, {width * height / 1e6:.0f} megapixels"
        raise ValueError(f"{shown}: raise --max-pixels {max_pixels} to {width * height}")
    image.info["orientation"] = orientation_of(exif)
    return image


def kind_of(head: bytes) -> str:
    """What a file is, by its first bytes: a key of FORMATS, or words to refuse it with."""
    return next((kind for kind, start in KINDS.items() if start.match(head)), "of an unknown kind")


# --- pixels and metadata apart ---------------------------------------------------------------------------------------
# Each of these takes a whole file and gives a file of the same format without metadata, byte by byte the same where the
# pixels are, and its EXIF block. What is damaged stays so: Pillow judges it.


def split_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Of the header there stay tables and sizes, and two application segments that say how colours are stored."""
    header, exif, scans, start, at = [data[:2]], b"", 0, len(data), 2
    while (found := MARKER.search(data, at)) and (code := data[found.end() - 1]) != 0xD9:  # until the end of the image
        begin, at = found.span()
        if code in (0x01, 0xD8):
            continue  # has no content
        at += max(2, int.from_bytes(data[at : at + 2]))
        if code == 0xDA:
            scans, start = scans + 1, min(start, begin)
            if scans > 100:  # real files have a dozen; each takes time for the whole picture, and needs 20 bytes
                raise ValueError("a progressive JPEG of more than 100 scans")
        elif not scans and code < 0xE0:
            header.append(data[begin:at])
        elif not scans:
            content = data[begin + 4 : at]
            if code == 0xE1 and content.startswith(b"Exif\0\0"):
                exif += content[6:]  # a long one goes on in the next segment
            elif code in COLOURS and content.startswith(COLOURS[code]) and len(content) >= 12:
                header.append(data[begin:at])
    return b"".join([*header, data[start:]]), exif


MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", flags=re.DOTALL)  # of JPEG, but those that stand among the pixels
COLOURS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}


def split_png(data: bytes) -> tuple[bytes, bytes]:
    """Chunks of header, palette and pixels stay; transparency is no pixel here."""
    kept, exif, at, kind = [data[:8]], b"", 8, b""
    while at < len(data) and kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        at = end
    return b"".join(kept), exif


def split_webp(data: bytes) -> tuple[bytes, bytes]:
    """The chunk of colours stays; of an animation its canvas and its first frame."""
    chunks, at = {}, 12
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        chunks.setdefault(data[at : at + 4], data[at:end])  # the first of a kind counts
        at = end
    exif = chunks.get(b"EXIF", b"")[8:]
    body = chunks.get(b"VP8 ") or chunks.get(b"VP8L")
    if body is None:
        body = b"".join(chunks.get(kind, b"") for kind in (b"VP8X", b"ANIM", b"ANMF"))
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body, exif


def orientation_of(exif: bytes) -> int:
    """EXIF block -> orientation, 1 to 8; 1, upright, where there is none or it cannot be read.

    The block alone says it, as in browsers: a copy in XMP often is left from before somebody turned the picture.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, length = struct.unpack_from(f"{order}HHL", tiff, at)
            if tag == 0x0112 and kind in (3, 4) and length == 1:  # one 16-bit or 32-bit number
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "L"), tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # cut off
    return 1
