"""Sheets of pictures: every pixel in its place, captions over their columns, one PNG."""

import sys

import numpy as np
import pytest
import torch
from make import rand
from PIL import Image

from plumbing.errors import UserError
from plumbing.pictures import GAP, check_drawing, save_pictures


def sheet_of(path):
    with Image.open(path, formats=["PNG"]) as file:
        assert file.format == "PNG"
        return np.array(file.convert("RGB"))


def place(row, column, side, head=0):
    """Where a picture of `side` pixels stands in a sheet, below `head` pixels."""
    top, left = (GAP + i * (side + GAP) for i in (row, column))
    return slice(head + top, head + top + side), slice(left, left + side)


def dark_columns(part):
    """The first and the last column that is not white."""
    columns = np.flatnonzero((part < 128).any(axis=(0, 2)))
    return columns.min(), columns.max()


def test_save_pictures_writes_rows_of_tiles(tmp_path):
    rows = torch.zeros(2, 3, 3, 8, 8)
    rows[1, 2, 0] = 1.0
    save_pictures(rows, tmp_path / "p.png", side=16)
    picture = sheet_of(tmp_path / "p.png")
    assert picture.shape == (2 * (16 + GAP) + GAP, 3 * (16 + GAP) + GAP, 3)
    assert (picture[place(1, 2, 16)] == (255, 0, 0)).all()
    assert (picture[place(0, 0, 16)] == 0).all()
    assert picture[0, 0].tolist() == [255, 255, 255]
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize("side", [1, 16, 30])
@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 1, 3), (2, 3, 8), (3, 1, 20), (1, 2, 16)])
def test_every_pixel_is_in_its_place_and_all_else_is_white(rows, columns, size, side, tmp_path):
    """Small pictures are enlarged in whole steps; those that are large enough stay as they are."""
    values = (256 * rand(rows, columns, 3, size, size)).floor().clamp(0, 254)  # never white
    save_pictures(values / 255, tmp_path / "p.png", side=side)
    picture, zoom = sheet_of(tmp_path / "p.png"), max(1, side // size)
    assert picture.shape == (rows * (zoom * size + GAP) + GAP, columns * (zoom * size + GAP) + GAP, 3)
    for i in range(rows):
        for k in range(columns):
            large = values[i, k].permute(1, 2, 0).byte().numpy().repeat(zoom, axis=0).repeat(zoom, axis=1)
            assert (picture[place(i, k, zoom * size)] == large).all()
            picture[place(i, k, zoom * size)] = 255
    assert (picture == 255).all()


def test_values_out_of_range_are_cut_off(tmp_path):
    rows = torch.tensor([-1.0, 0.5, 2.0, float("inf")])[None, :, None, None, None].expand(1, 4, 3, 2, 2)
    save_pictures(rows, tmp_path / "p.png", side=2)
    picture = sheet_of(tmp_path / "p.png")
    assert [int(picture[place(0, k, 2)].mean()) for k in range(4)] == [0, 128, 255, 255]


def test_a_caption_stands_over_the_middle_of_its_column(tmp_path):
    white = torch.ones(1, 3, 3, 64, 64)
    save_pictures(white, tmp_path / "p.png", ("image", "", "restored", "one too many"), side=64)
    picture = sheet_of(tmp_path / "p.png")
    head = picture.shape[0] - (64 + 2 * GAP)
    assert head > 0 and (picture[head:] == 255).all()  # no caption reaches into the pictures
    for k, caption in enumerate(("image", "", "restored")):
        top, columns = picture[:head], place(0, k, 64)[1]
        if not caption:
            assert (top[:, columns] == 255).all()
            continue
        first, last = dark_columns(top[:, columns])
        assert abs((first + last) / 2 - 32) <= 2
    assert (picture[:, place(0, 2, 64)[1].stop :] == 255).all()


def test_captions_and_a_title_take_their_room_above_the_pictures(tmp_path):
    rows = torch.zeros(2, 2, 3, 32, 32)
    heads = {}
    for captions, title in (((), ""), (("a", "b"), ""), ((), "title"), (("a", "b"), "title"), (("", ""), "")):
        save_pictures(rows, tmp_path / "p.png", captions, title, side=32)
        picture = sheet_of(tmp_path / "p.png")
        heads[captions, title] = head = picture.shape[0] - (2 * (32 + GAP) + GAP)
        for i in range(2):
            for k in range(2):
                assert (picture[place(i, k, 32, head)] == 0).all()
    assert heads[(), ""] == heads[("", ""), ""] == 0
    assert heads[("a", "b"), "title"] == heads[("a", "b"), ""] + heads[(), "title"]


def test_a_long_title_is_seen_to_its_end(tmp_path):
    save_pictures(torch.ones(1, 1, 3, 64, 64), tmp_path / "p.png", title="M" * 30, side=64)
    picture = sheet_of(tmp_path / "p.png")
    first, last = dark_columns(picture[: picture.shape[0] - 64])
    assert first <= GAP + 2 and last < picture.shape[1] - 1


def test_another_sheet_replaces_the_one_that_is_there(tmp_path):
    save_pictures(torch.zeros(1, 1, 3, 8, 8), tmp_path / "p.png", side=8)
    save_pictures(torch.ones(1, 2, 3, 8, 8), str(tmp_path / "p.png"), side=8)
    assert sheet_of(tmp_path / "p.png").shape == (8 + 2 * GAP, 2 * (8 + GAP) + GAP, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_a_users_own_style_changes_no_sheet(tmp_path):
    import matplotlib

    rows = rand(2, 3, 3, 8, 8)
    save_pictures(rows, tmp_path / "plain.png", ("a", "b", "c"), "title")
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 300, "text.usetex": True}):
        save_pictures(rows, tmp_path / "styled.png", ("a", "b", "c"), "title")
        assert matplotlib.rcParams["savefig.dpi"] == 300
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_missing_matplotlib_is_one_clear_line(monkeypatch):
    check_drawing()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pictures need matplotlib.*--probe-every 0"):
        check_drawing()
