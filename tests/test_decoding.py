"""Picture files: what is opened, decoded and turned upright, and the check of every file."""

import ast
import io
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import seeds, write_folders, write_tinyimagenet
from PIL import Image

import plumbing.checking
import plumbing.decoding
from plumbing.crops import crop_draws
from plumbing.datasets import load_data
from plumbing.decoding import MAX_PIXELS, cut_below, decode_image, open_picture, orientation_of, read_whole, to_rgb
from plumbing.errors import UserError, reason_of
from plumbing.images import FolderImages

ROOT = Path(__file__).resolve().parents[1]

# --- files to look at ------------------------------------------------------------------------------------------------


def noise(height=40, width=56, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind, **options):
    """The bytes of a picture file; what can be without loss is."""
    options |= {
        "JPEG": {"quality": 95},
        "MPO": {"quality": 99, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True, "method": 0},
    }.get(kind, {})
    image, file = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content, right=True):
    """A chunk of PNG, with a right or a wrong checksum."""
    checksum = zlib.crc32(kind + content) ^ (not right)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def segment(code, content):
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


def after_header(content, *parts):
    """A JPEG or PNG file with parts in the place for metadata."""
    place = 2 if content.startswith(b"\xff\xd8") else 33
    return content[:place] + b"".join(parts) + content[place:]


def exif_block(*entries, order=">"):
    """A block of entries (tag, type, count, the four bytes of the value)."""
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}LH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHL", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


def turned(orientation, order=">", long=False):
    """The entry that says how a picture lies."""
    value = struct.pack(order + "L", orientation) if long else struct.pack(order + "H", orientation) + bytes(2)
    return (0x0112, 4 if long else 3, 1, value)


def with_exif(content, exif):
    """A picture file with an EXIF block, whatever that holds."""
    if content.startswith(b"\xff\xd8"):
        return after_header(content, segment(0xE1, b"Exif\0\0" + exif))
    if content.startswith(b"\x89PNG"):
        return after_header(content, chunk(b"eXIf", exif))
    size, shown = struct.pack("<I", len(exif)), Image.open(io.BytesIO(content), formats=["WEBP"]).size
    canvas = b"".join(struct.pack("<I", side - 1)[:3] for side in shown)
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + canvas
    body = b"WEBP" + canvas + content[12:] + b"EXIF" + size + exif + b"\0" * (len(exif) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pixels_of(content, path):
    """What a file of these bytes shows, upright: (H, W, 3)."""
    path.write_bytes(content)
    image = open_picture(path)
    turn = plumbing.decoding.TURNS.get(image.info["orientation"])
    image = to_rgb(image)
    return np.asarray(image if turn is None else image.transpose(turn))


def centre_of(path):
    return decode_image(path, 24)[0]


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "transparent palette"])
def test_decode_image_turns_every_kind_of_picture_into_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (32, 1))
    ending = "jpg" if mode == "CMYK" else "png"
    path = tmp_path / f"picture.{ending}"
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "transparent palette":
        Image.fromarray(grey).convert("P").save(path, transparency=b"\x80" * 256)
    else:
        Image.fromarray(grey).convert(mode).save(path, **({"quality": 95} if ending == "jpg" else {}))
    image = decode_image(path, 28)[0]
    assert image.shape == (3, 28, 28)
    assert image.dtype == torch.uint8
    want = torch.from_numpy(grey[2:-2, 2:-2].copy()).float()
    if mode == "1":  # dithered
        want, image = want.mean(), image.float().mean()
    assert (image.float() - want).abs().max() < 12


def test_decode_image_lets_jpeg_skip_pixels_but_none_that_the_crop_needs(tmp_path, monkeypatch):
    stripes = (128 + 120 * np.sin(np.arange(800) * 2 * np.pi / 36)).astype(np.uint8)
    Image.fromarray(np.tile(stripes, (600, 1))).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    sizes, drafts = [], []
    for crops in ([None], crop_draws([1]), crop_draws([2, 3, 4])):
        with monkeypatch.context() as patched:
            patched.setattr(plumbing.decoding, "to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
            fast = decode_image(tmp_path / "a.jpg", 96, (0.3, 1.0), crops).float()
        with monkeypatch.context() as patched:
            patched.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: drafts.append(1))
            slow = decode_image(tmp_path / "a.jpg", 96, (0.3, 1.0), crops).float()
        assert fast.shape == (len(crops), 3, 96, 96)
        assert (fast - slow).abs().mean() < 6
    assert len(sizes) == len(drafts) == 3
    assert max(sizes) < (800, 600)


def test_grey_of_16_bits_is_scaled_the_same_in_every_picture(tmp_path):
    """Dark ones too: a stretch by the largest value would make pictures of a series differ in brightness."""
    dark = np.full((8, 8), 200, np.uint16)
    assert (pixels_of(encoded(dark, "PNG"), tmp_path / "a.png") == 0).all()
    bright = np.full((8, 8), 200 * 257, np.uint16)
    assert (pixels_of(encoded(bright, "PNG"), tmp_path / "a.png") == 200).all()


def test_the_command_for_12_bits_in_docs_data_brightens_them_once(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    (command,) = [part for part in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "uint16" in part]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "DIR" / "train" / "ant"
    folder.mkdir(parents=True)
    grey = np.tile(np.linspace(0, 4095, 64).round().astype(np.uint16), (64, 1))
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(noise()).save(folder / "b.png")
    assert 6 < centre_of(folder / "a.png").float().mean() < 9
    for _ in range(2):
        subprocess.run([sys.executable, "-c", command], check=True)
        assert abs(centre_of(folder / "a.png").float().mean() - 127) < 2
        assert (pixels_of((folder / "b.png").read_bytes(), tmp_path / "b.png") == noise()).all()


# --- what is opened --------------------------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
REFUSED = {  # kind: the beginning of such a file, or the name of Pillow's encoder
    "PostScript": POSTSCRIPT,
    "TIFF": "TIFF",
    "BMP": "BMP",
    "GIF": "GIF",
    "AVIF": "AVIF",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "PDF": b"%PDF-1.4\n",
    "SVG or XML": b"<?xml version='1.0'?><svg></svg>",
    "an HTML page": b"\n<!DOCTYPE html><title>404</title>",
    "an archive": b"PK\x03\x04 and more",
    "a pointer of Git LFS (git lfs pull gets the picture)": b"version https://git-lfs.github.com/spec/v1\noid",
    "a text": "kein Bild, nur Wörter".encode(),
    "empty": b"",
    "of an unknown kind": b"\x00\x01\x02\x03" * 9,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_jpeg_png_or_webp_is_refused_by_name_and_kind(tmp_path, kind):
    root, content = write_folders(tmp_path / "set", train=1, val=1), REFUSED[kind]
    path = root / "train" / "ant" / "z.jpg"
    path.write_bytes(encoded(noise(), content) if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        load_data(str(root))
    what = f"{path} ({kind}, expected JPEG, PNG or WebP)"
    assert str(error.value) == f"1 of 3 images cannot be read: {what}; mend or remove them, or add --skip-bad-images"
    with pytest.raises(UserError, match=re.escape(f"{kind}, expected JPEG, PNG or WebP")):
        list(FolderImages([path], torch.zeros(1).long(), ["ant"], (0.5,) * 3, (0.5,) * 3).plain_batches([0], 8))


@pytest.mark.parametrize("name", ["z.jpg", "z.png", "z.webp"])
def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch, name):
    """Pillow would run Ghostscript where a file begins like PostScript."""
    started = []
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\necho started >> '{tmp_path}/log'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    doors = [(os, name) for name in dir(os) if re.match(r"exec[lv]|posix_spawn|spawn[lv]|system|popen", name)]
    assert len(doors) >= 16
    for module, door in [*doors, (subprocess, "Popen")]:
        monkeypatch.setattr(module, door, lambda *args, **_: started.append(args) or 1 / 0)
    root = write_folders(tmp_path / "set", train=1, val=1)
    (root / "train" / "ant" / name).write_bytes(POSTSCRIPT)
    with pytest.raises(UserError, match=rf"{re.escape(name)} \(PostScript, expected"):
        load_data(str(root))
    with pytest.raises(ValueError, match="PostScript"):
        decode_image(root / "train" / "ant" / name, 8)
    home = write_tinyimagenet(tmp_path)
    (home / "train" / "n01" / "images" / "z.JPEG").write_bytes(POSTSCRIPT)
    with pytest.raises(UserError, match=r"z\.JPEG \(PostScript, expected"):
        load_data("tinyimagenet", tmp_path)
    assert started == []
    assert not (tmp_path / "log").exists()


def test_every_opening_of_a_picture_names_the_formats():
    """In the tests too. Every other door of Pillow and matplotlib is closed."""
    found = 0
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        if not re.search(r"imread|getexif|exif_transpose|Image\s*\.\s*open", text):
            continue  # parsing all takes seconds
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name.split(".")[-1] not in ("imread", "getexif", "exif_transpose"), f"{path}: {name}"
            if re.fullmatch(r"(?:.*\.)?Image\.open", name):
                found += 1
                assert "formats" in [keyword.arg for keyword in node.keywords], f"{path}, line {node.lineno}"
    assert found >= 7


def test_what_a_file_is_counts_not_what_its_name_says(tmp_path):
    plain = noise()
    for kind in ("PNG", "WEBP"):
        assert (pixels_of(encoded(plain, kind), tmp_path / "a.jpg") == plain).all()


def test_the_first_of_several_frames_is_taken(tmp_path):
    first, second = Image.fromarray(noise()), Image.fromarray(noise(seed=1))
    for kind in ("PNG", "WEBP", "MPO"):
        content = encoded(first, kind, save_all=True, append_images=[second, second], exif=exif_block(turned(1)))
        shown = pixels_of(content, tmp_path / "a.jpg")
        assert abs(shown.astype(int) - noise()).mean() < (2 if kind == "MPO" else 1e-9)
        if kind != "MPO":
            assert (pixels_of(content[:-2000], tmp_path / "a.jpg") == noise()).all()  # a later frame may be damaged


# --- metadata --------------------------------------------------------------------------------------------------------

LARGE = zlib.compress(bytes(100_000_000), 9)
ODD = {  # kind, name: what stands in the place for metadata
    ("JPEG", "resolution that is a text"): [segment(0xE1, b"Exif\0\0" + exif_block((0x011A, 2, 4, b"abc\0")))],
    ("JPEG", "resolution over 0"): [segment(0xE1, b"Exif\0\0" + exif_block((0x011A, 5, 1, bytes(4))))],
    ("JPEG", "EXIF that is cut off"): [segment(0xE1, b"Exif\0\0" + exif_block(turned(6))[:14])],
    ("JPEG", "notes of the maker that lead nowhere"): [
        segment(0xE1, b"Exif\0\0" + exif_block((0x8769, 4, 1, b"\0\0\0\x1a"), (0x927C, 7, 9000, b"\0\0\xff\xff")))
    ],
    ("JPEG", "index of frames without content"): [segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\0")],
    ("JPEG", "index of frames that are not there"): [
        segment(0xE2, b"MPF\0" + exif_block((0xB001, 4, 1, b"\0\0\0\2"), (0xB002, 7, 32, b"\0\0\xff\0")))
    ],
    ("JPEG", "short JFIF"): [segment(0xE0, b"JFIF\0")],
    ("JPEG", "short Adobe"): [segment(0xEE, b"Adobe")],
    ("JPEG", "profile without number"): [segment(0xE2, b"ICC_PROFILE\0")],
    ("JPEG", "profile in no order"): [segment(0xE2, b"ICC_PROFILE\0\2\2ab"), segment(0xE2, b"ICC_PROFILE\0\7\2ab")],
    ("JPEG", "Photoshop that is cut off"): [segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\4abc")],
    ("JPEG", "comment"): [segment(0xFE, b"\xff\xd9\xff\xda" * 200)],
    ("PNG", "much text"): [chunk(b"zTXt", b"key\0\0" + LARGE)],
    ("PNG", "many texts"): [chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1_000_000)))] * 65,
    ("PNG", "much foreign text"): [chunk(b"iTXt", b"key\0\1\0\0\0" + LARGE)],
    ("PNG", "text of an unknown kind"): [chunk(b"zTXt", b"key\0\7abc")],
    ("PNG", "large profile"): [chunk(b"iCCP", b"name\0\0" + LARGE)],
    ("PNG", "profile without name"): [chunk(b"iCCP", b"")],
    ("PNG", "wrong checksums"): [chunk(kind, b"key\0value", right=False) for kind in (b"tEXt", b"pHYs", b"prVt")],
    ("PNG", "short chunks"): [chunk(kind, b"") for kind in (b"cHRM", b"gAMA", b"pHYs", b"sRGB", b"tRNS", b"eXIf")],
    ("PNG", "animation without frames"): [chunk(b"acTL", bytes(8)), chunk(b"fcTL", b"\0\0\0\7")],
    ("PNG", "animation in no order"): [chunk(b"acTL", b"\0\0\0\2" * 2), chunk(b"fcTL", b"\0\0\0\7" * 7)],
    ("WEBP", "EXIF of noise"): [bytes(range(99))],
    ("WEBP", "EXIF without content"): [b""],
}


@pytest.mark.parametrize(("kind", "name"), ODD, ids=[": ".join(key) for key in ODD])
def test_odd_metadata_neither_refuse_nor_change_a_picture(tmp_path, capfd, kind, name):
    """Nor are they named: Pillow does not see them, so it has nothing to warn of. Warnings are errors in the tests."""
    plain, path = encoded(noise(), kind), tmp_path / "a.jpg"
    odd = with_exif(plain, *ODD[kind, name]) if kind == "WEBP" else after_header(plain, *ODD[kind, name])
    want = pixels_of(plain, path)
    tracemalloc.start()
    assert (pixels_of(odd, path) == want).all()
    assert tracemalloc.get_traced_memory()[1] < 1e6 + 4 * len(odd)
    tracemalloc.stop()
    read_whole(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_stands_behind_a_picture_does_not_count(tmp_path, kind):
    """Such as the film behind a photograph of a telephone."""
    content = encoded(noise(), kind)
    want = pixels_of(content, tmp_path / "a.jpg")
    tail = np.random.default_rng(0).bytes(5000)
    assert (pixels_of(content + tail, tmp_path / "a.jpg") == want).all()


def renumbered(content, numbers):
    """A JPEG whose three components have other numbers; a decoder guesses from these what they are."""
    parts = [bytearray(part) for part in parts_of(content)]
    for i, number in enumerate(numbers):
        for part in parts:
            if part[1] in (0xC0, 0xDA):
                part[10 + 3 * i if part[1] == 0xC0 else 5 + 2 * i] = number
    return b"".join(parts)


def test_jpeg_keeps_what_says_how_its_colours_are_stored(tmp_path):
    """The segments of JFIF (luma and chroma) and of Adobe (here red, green and blue) are no metadata."""
    for options, numbers in (({}, b"RGB"), ({"keep_rgb": True}, b"\1\2\3")):
        content = encoded(noise(), "JPEG", **options)
        want, misleading = pixels_of(content, tmp_path / "a.jpg"), renumbered(content, numbers)
        assert len(misleading) == len(content) and misleading != content
        assert (pixels_of(misleading, tmp_path / "a.jpg") == want).all()
    cmyk = encoded(Image.frombytes("CMYK", (40, 56), noise(40, 56, 4)), "JPEG")
    with Image.open(io.BytesIO(cmyk), formats=["JPEG"]) as reference:
        assert (pixels_of(cmyk, tmp_path / "a.jpg") == np.asarray(reference.convert("RGB"))).all()


# --- orientation -----------------------------------------------------------------------------------------------------

LYING = {  # orientation: how the rows and columns of an upright picture are stored, of EXIF's table
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_the_one_that_was_saved_upright(tmp_path, kind, order):
    upright, path = noise(), tmp_path / "a.jpg"
    odd = [(0x011A, number, 1, b"abc\0") for number in range(14)]  # resolution, of every type that there is
    for orientation, lay in LYING.items():
        lying = encoded(np.ascontiguousarray(lay(upright)), kind, **({"subsampling": 0} if kind == "JPEG" else {}))
        for entry in odd if orientation in (1, 6) else odd[2:3]:
            exif = exif_block(entry, turned(orientation, order, long=orientation % 2), order=order)
            shown = pixels_of(with_exif(lying, exif), path)
            assert shown.shape == upright.shape
            assert abs(shown.astype(int) - upright).max() <= (40 if kind == "JPEG" else 0)
            assert decode_image(path, 24).shape == (1, 3, 24, 24)


@pytest.mark.parametrize("kind", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"mode": "L"}])
def test_what_lies_below_a_crop_is_not_decoded_and_changes_no_bit(tmp_path, monkeypatch, kind):
    picture = Image.fromarray(noise(200, 150)).convert(kind.get("mode", "RGB"))
    picture.save(tmp_path / "a.jpg", quality=90, **{key: x for key, x in kind.items() if key != "mode"})
    for draws in (*crop_draws(range(12))[:, None], crop_draws([1, 2])):
        found = decode_image(tmp_path / "a.jpg", 60, (0.05, 0.6), draws)
        with monkeypatch.context() as patched:
            patched.setattr(plumbing.decoding, "cut_below", lambda image, _: None)
            assert torch.equal(found, decode_image(tmp_path / "a.jpg", 60, (0.05, 0.6), draws))
    image = open_picture(tmp_path / "a.jpg")
    cut_below(image, 80)
    assert image.tile[0].extents == (0, 0, 150, 200 if "progressive" in kind else 80)


def test_a_picture_that_fails_only_in_part_is_decoded_whole(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded(noise(), "JPEG"))
    want = decode_image(tmp_path / "a.jpg", 30)
    monkeypatch.setattr(plumbing.decoding, "cut_below", lambda image, _: image.fp.truncate(500))
    assert torch.equal(decode_image(tmp_path / "a.jpg", 30), want)


def test_a_jpeg_with_a_scan_for_each_colour_is_decoded_whole(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(noise(), "JPEG"))
    image = open_picture(tmp_path / "a.jpg")
    with image.fp.getbuffer() as data:
        data[bytes(data).index(b"\xff\xda") + 4] = 1
    cut_below(image, 8)
    assert image.tile[0].extents == (0, 0, 56, 40)


def test_turned_pictures_are_read_at_low_resolution_too(tmp_path, monkeypatch):
    """Width and height change places before the crop is chosen, and the crop is where it would be upright."""
    upright = np.asarray(Image.fromarray(noise(12, 16)).resize((800, 600), Image.Resampling.BICUBIC))
    (tmp_path / "1.jpg").write_bytes(encoded(upright, "JPEG"))
    sizes = []
    for orientation, lay in LYING.items():
        path = tmp_path / f"{orientation}.jpg"
        exif = exif_block(turned(orientation))
        path.write_bytes(with_exif(encoded(np.ascontiguousarray(lay(upright)), "JPEG"), exif))
        for crop in (None, *crop_draws([1, 2])):
            with monkeypatch.context() as patched:
                patched.setattr(plumbing.decoding, "to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
                shown = decode_image(path, 48, (0.5, 1.0), [crop])
            want = decode_image(tmp_path / "1.jpg", 48, (0.5, 1.0), [crop])
            assert (shown.float() - want.float()).abs().mean() < 2
    assert len(sizes) == 24
    assert max(max(size) for size in sizes) <= 400


@given(st.binary(max_size=60), st.sampled_from([b"", b"Exif\0\0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]))
def test_whatever_is_no_exif_means_upright(anything, start):
    assert 1 <= orientation_of(start + anything) <= 8
    whole = exif_block((0x0100, 3, 1, bytes(4)), turned(6))
    assert orientation_of(whole) == orientation_of(b"Exif\0\0" + whole) == 6
    assert {orientation_of(whole[:length]) for length in range(len(whole) - 8)} == {1}


def test_exif_that_goes_on_in_a_second_segment_is_read(tmp_path):
    upright, exif = noise(), exif_block(turned(6))
    lying = encoded(np.ascontiguousarray(LYING[6](upright)), "JPEG")
    parts = [segment(0xE1, b"Exif\0\0" + part) for part in (exif[:14], exif[14:])]
    assert pixels_of(after_header(lying, *parts), tmp_path / "a.jpg").shape == upright.shape


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_means_upright(value):
    assert orientation_of(exif_block(turned(value))) == 1
    assert orientation_of(exif_block((0x0112, 2, 2, b"6\0\0\0"))) == 1  # a text
    assert orientation_of(exif_block((0x0112, 3, 2, b"\0\6\0\6"))) == 1  # two numbers


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"MM", exif_block(turned(6))[:19], bytes(70), noise(1, 90, 1).tobytes()])
def test_exif_that_cannot_be_read_changes_no_pixel(tmp_path, kind, exif):
    plain = encoded(noise(), kind)
    want = pixels_of(plain, tmp_path / "a.jpg")
    assert (pixels_of(with_exif(plain, exif), tmp_path / "a.jpg") == want).all()


# --- damaged pixels and sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_whose_end_is_missing_is_refused(tmp_path, kind):
    content, path = encoded(noise(), kind), tmp_path / "a.jpg"
    end = len(content) - (20 if kind == "PNG" else 0)  # behind the pixels of PNG are two checksums and an empty chunk
    for length in (20, 40, end // 2, end - 200, end - 2):
        path.write_bytes(content[:length])
        with pytest.raises((OSError, ValueError, SyntaxError)):
            read_whole(path)
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode_image(path, 8)


def test_a_palette_picture_without_its_palette_is_refused(tmp_path):
    """Pillow takes all its colours for black."""
    content = encoded(Image.fromarray(noise()).convert("P"), "PNG")
    start = content.index(b"PLTE") - 4
    size = 12 + struct.unpack(">I", content[start : start + 4])[0]
    (tmp_path / "a.png").write_bytes(content[:start] + content[start + size :])
    with pytest.raises(ValueError, match="its palette is missing"):
        centre_of(tmp_path / "a.png")


def test_a_jpeg_of_a_thousand_scans_is_refused_at_once(tmp_path):
    """Each is a few bytes of the file, and work for the whole picture."""
    content = encoded(Image.new("RGB", (640, 640)), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    (tmp_path / "a.jpg").write_bytes(content[:-2] + 1000 * last + content[-2:])
    with pytest.raises(ValueError, match="more than 100 scans"):
        read_whole(tmp_path / "a.jpg")
    behind = 40_000 * segment(0xDA, b"")  # is no part of the picture
    assert pixels_of(content + behind, tmp_path / "a.jpg").shape == (640, 640, 3)


def header_of(width, height, kind):
    """A file that claims to hold a picture of a size, and no pixels of it."""
    if kind == "PNG":
        numbers = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", numbers) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    numbers = struct.pack(">BHHB", 8, height, width, 1)
    return b"\xff\xd8" + segment(0xC0, numbers + b"\1\x11\0") + segment(0xDA, b"\1\1\0\0\x3f\0")


@pytest.mark.parametrize(("kind", "width", "height"), [("PNG", 100_000, 100_000), ("JPEG", 65_000, 65_000)])
def test_a_size_that_a_header_claims_takes_no_memory(tmp_path, kind, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(header_of(width, height, kind))
    shown = f"{width} x {height} pixels, {width * height / 1e6:.0f} megapixels: raise --max-pixels {MAX_PIXELS} to "
    for read in (read_whole, centre_of):
        with pytest.raises(ValueError, match=shown):
            read(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_max_pixels_is_the_largest_picture_that_is_read(tmp_path, kind):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(noise(40, 56), kind))
    for read in (read_whole, lambda path, limit: decode_image(path, 8, max_pixels=limit)):
        read(path, 40 * 56)
        with pytest.raises(ValueError, match="56 x 40 pixels, 0 megapixels: raise --max-pixels 2239 to 2240"):
            read(path, 40 * 56 - 1)


def test_max_pixels_of_a_data_set_holds_for_the_check_and_for_each_batch(tmp_path):
    root = write_folders(tmp_path / "set", train=2, val=1, size=(40, 30))
    path = root / "train" / "ant" / "big.png"
    Image.new("RGB", (50, 30)).save(path)
    data = load_data(str(root), max_pixels=1500)
    assert (len(data), data.max_pixels) == (5, 1500)
    with pytest.raises(UserError, match=r"^1 of 5 images cannot be read: .*big\.png \(50 x 30 pixels.*-pixels 1499 to"):
        load_data(str(root), max_pixels=1499)  # what is remembered of a larger limit does not count
    small = load_data(str(root), max_pixels=1499, skip_bad_images=True)
    assert len(small) == 4
    assert len(load_data(str(root), max_pixels=1500)) == 5
    data.max_pixels = 1499
    for batches in (data.plain_batches(range(5), 8), data.train_batches([(0, list(range(5)))], 8)):
        with pytest.raises(UserError, match=r"big\.png cannot be read as an image \(50 x 30 pixels"):
            list(batches)


def test_a_file_that_is_larger_than_any_picture_is_not_read(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(noise(), "JPEG"))
    os.truncate(path, 8 * MAX_PIXELS + 2**26 + 1)  # of no blocks on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^149876\d* bytes are more than --max-pixels"):
        read_whole(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


# --- any damage ------------------------------------------------------------------------------------------------------

SOUND = [encoded(noise(24, 31), "JPEG", progressive=True, exif=b"Exif\0\0" + exif_block(turned(6)))]
SOUND += [encoded(noise(24, 31, 1), "JPEG")]
SOUND += [encoded(noise(24, 31), "JPEG", restart_marker_blocks=1), encoded(noise(1, 7000), "JPEG")]
SOUND += [encoded(Image.frombytes("CMYK", (24, 31), noise(24, 31, 4)), "JPEG"), encoded(noise(9, 9, 4), "PNG")]
SOUND += [encoded(Image.fromarray(noise(24, 31)).convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB")]
SOUND += [encoded(noise(24, 31, 1).astype(np.uint16) * 257, "PNG"), encoded(noise(7000, 1, 1), "PNG")]
SOUND += [encoded(noise(24, 31, n), "WEBP", exif=exif_block(turned(3))) for n in (3, 4)]
SEVERAL = {"save_all": True, "append_images": [Image.fromarray(noise(24, 31, seed=1))]}
SOUND += [encoded(noise(24, 31), kind, **SEVERAL) for kind in ("PNG", "WEBP", "MPO")]


def parts_of(content):
    """The chunks of PNG or WebP, or the segments of JPEG, with what is before."""
    at = 8 if content.startswith(b"\x89PNG") else 12 if content.startswith(b"RIFF") else 2
    parts = [content[:at]]
    while at < len(content):
        if at and parts[0][:1] == b"\x89":
            size = 12 + int.from_bytes(content[at : at + 4])
        elif parts[0][:1] == b"R":
            size = 8 + int.from_bytes(content[at + 4 : at + 8], "little")
            size += size % 2
        else:
            size = len(content) if content[at + 1] == 0xDA else 2 + int.from_bytes(content[at + 2 : at + 4])
        parts.append(content[at : at + size])
        at += size
    return parts


def damaged(content, draw):
    """One of the ways in which files are damaged."""
    content, place, way = bytearray(content), draw.randrange(len(content)), draw.randrange(8)
    if way == 0:
        content[place] ^= 1 << draw.randrange(8)
    elif way == 1:
        del content[place:]
    elif way == 2:
        del content[place : place + draw.choice([1, 7, 300])]
    elif way == 3:
        content[place:place] = draw.randbytes(draw.choice([1, 10, 500]))
    elif way == 4:
        content[place : place + 4] = draw.choice([bytes(4), b"\xff" * 4])
    elif way == 5:
        first, *rest = parts_of(bytes(content))
        content = first + b"".join(draw.sample(rest, len(rest)))
    elif way == 6:
        first, *rest = parts_of(bytes(content))
        content = first + b"".join(part * draw.choice([0, 1, 1, 1, 2]) for part in rest)
    else:  # the numbers of a header, and a right checksum
        content[min(len(content) - 1, 16 + place % 14)] = draw.randrange(256)
        if content.startswith(b"\x89PNG"):
            content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@settings(max_examples=12)  # of eighteen files each
@given(seeds)
def test_a_damaged_file_decodes_or_is_refused_in_one_line(tmp_path_factory, seed):
    """And the check agrees with decoding: what it lets through does not stop a run."""
    draw, path = random.Random(seed), tmp_path_factory.getbasetemp() / "damaged.jpg"
    for content in SOUND:
        path.write_bytes(damaged(content, draw))
        found = []
        for read in (
            read_whole,
            lambda path: decode_image(path, 8, draws=(None, *crop_draws([1]))),
        ):
            try:
                read(path)
                found.append("")
            except (OSError, SyntaxError, ValueError, EOFError) as error:
                found.append(reason_of(error))
                assert found[-1] and "\n" not in found[-1] and " at 0x" not in found[-1]
        assert bool(found[0]) == bool(found[1]), found


# --- the check of every file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_name_a_file_that_cannot_be_read(tmp_path, workers):
    write_folders(tmp_path, ending="jpg", size=(400, 300))
    bad = next((tmp_path / "train" / "bee").iterdir())
    data = load_data(str(tmp_path), workers=workers)
    for content in (bad.read_bytes()[:-200], b"not an image", b""):
        bad.write_bytes(content)  # after the check
        with pytest.raises(UserError, match=f"{re.escape(str(bad))} cannot be read as an image"):
            list(data.plain_batches(range(6), 8))


def test_folders_are_checked_once_and_name_every_bad_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_folders(tmp_path / "set", ending="jpg", size=(400, 300))
    first, second, third = sorted((root / "train" / "bee").iterdir())
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"not an image")
    with pytest.raises(UserError) as error:
        load_data(str(root))
    text = str(error.value)
    assert text.startswith(f"2 of 6 images cannot be read: {first} (")
    assert f"; {second} (" in text
    assert text.endswith("; mend or remove them, or add --skip-bad-images")
    assert "\n" not in text
    data = load_data(str(root), skip_bad_images=True)
    assert [Path(path) for path in data.paths[3:]] == [third]
    assert data.labels.tolist() == [0, 0, 0, 1]
    assert "note: 2 of 6 images are left out" in capsys.readouterr().out

    opened = []
    monkeypatch.setattr(
        plumbing.checking, "read_whole", lambda path, *rest: opened.append(path) or read_whole(path, *rest)
    )
    assert len(load_data(str(root), skip_bad_images=True)) == 4
    assert sorted(opened) == [str(first), str(second)]  # good ones are remembered, bad ones may have been mended
    for damage in ("[]", "{", '["x"]', "3"):
        for file in (tmp_path / "cache").rglob("*.json"):
            file.write_text(damage if damage != "[]" else "[0, 99]")
        assert len(load_data(str(root), skip_bad_images=True)) == (6 if damage == "[]" else 4)
    first.write_bytes(third.read_bytes())  # mended: looked at again
    assert len(load_data(str(root), skip_bad_images=True)) == 5
    for path in (first, third):
        path.write_bytes(b"")
    for path in (root / "train" / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"6 of 6 images cannot be read: .*; \.\.\.; mend or remove them$"):
        load_data(str(root), skip_bad_images=True)


def test_folders_name_a_link_that_leads_nowhere(tmp_path):
    root = write_folders(tmp_path / "set")
    (root / "train" / "ant" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"1 of 7 images cannot be read: .*lost\.png \(.*No such file"):
        load_data(str(root))
    assert len(load_data(str(root), skip_bad_images=True)) == 6


def test_folders_are_checked_without_a_cache_folder_too(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot hold files
    assert len(load_data(str(write_folders(tmp_path / "set")))) == 6
