"""page.py: figures, pixel by pixel; texts, colour bars, the confusion picture, files."""

import os
import re
import shutil
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import REPO, Written, grey_photo, noise_photo, randn
from PIL import Image
from test_cam import chroma

import cam
import page

MAGENTA = (255, 0, 255)
DPI = 72  # a pixel is a point
PAGE = 16 / 2.54 * DPI  # px
RAGGED = [(40, 80), (90, 30), (50, 50)]  # height, width: wide, tall, square


def overlapping(paper, slack=2):
    """Pairs of texts that lie on each other in one piece of a picture; the pieces are stacked."""
    def overlap(a, b, low, high):
        return min(a[high], b[high]) - max(a[low], b[low]) > slack

    found = list(zip(paper.boxes, paper.images, paper.texts, strict=True))
    return [(s, t) for i, (a, piece, s) in enumerate(found) for b, other, t in found[:i]
            if piece is other and overlap(a, b, 0, 2) and overlap(a, b, 1, 3)]


def cam_row(maps, captions=None, right=None, label="network"):
    return page.Row(label, maps, captions or ["caption"] * len(maps), right or [None] * len(maps))


def runs(hits):
    """The unbroken stretches of True in a line: [(first, how many), ...]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(hits, np.int8), [0]])))
    return [(int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]


def places(sizes, titles, rows, dpi=DPI):
    """Where `compose` puts things, found in the picture itself: for each column the photo's x, y,
    width, height, and of each row's map its y. Photos are magenta here, maps zero: easy to see."""
    colour = torch.tensor(MAGENTA, dtype=torch.uint8)
    photos = [colour.expand(*size, 3).contiguous() for size in sizes]
    plain = [row._replace(maps=torch.zeros_like(row.maps), right=[None] * len(sizes))
             for row in rows]
    canvas = np.array(page.compose(photos, titles, plain, dpi=dpi))
    grey = cam.overlay(photos[0][:1, :1], torch.zeros(1, 1), 1.0)[0, 0].numpy()
    magenta, found = (canvas == MAGENTA).all(2), []
    for x, width in runs(magenta.any(0)):
        ((y, height),) = runs(magenta[:, x : x + width].any(1))
        level = (canvas[:, x : x + width] == grey).all((1, 2))
        tops = [top for top, n in runs(level) if n == height]
        assert len(tops) == len(rows)
        found.append((x, y, width, height, tops))
    assert len(found) == len(sizes)
    return found


# ---------------------------------------------------------------- where things are


def test_figure_is_16_cm_wide_and_grows_by_rows_and_blocks():
    def size(photos, rows=1, dpi=DPI, **more):
        row = cam_row(randn(photos, 3, 3).float())
        return page.compose([noise_photo((50, 50))] * photos, ["a"] * photos, [row] * rows,
                            dpi=dpi, **more).size

    for photos in (4, 5, 10):
        assert 0.97 * PAGE <= size(photos)[0] <= PAGE + 1
    one, two, three = (size(10, rows)[1] for rows in (1, 2, 3))
    assert three - two == two - one > PAGE / 12
    assert np.allclose(size(10, 2, dpi=200), 2 * np.array(size(10, 2, dpi=100)), rtol=0.02)
    blocks = size(10, columns=5)
    assert blocks[0] == pytest.approx(size(5)[0], abs=2) and blocks[1] > 1.7 * size(5)[1]


def test_ragged_photos_have_one_height_and_fill_the_page():
    rows = [cam_row(randn(3, 3, 4).float())]
    found = places(RAGGED, ["wide", "tall", "square"], rows)
    assert len({h for _, _, _, h, _ in found}) == 1 and len({y for _, y, *_ in found}) == 1
    for (height, width), (_, _, w, h, _) in zip(RAGGED, found, strict=True):
        assert w / h == pytest.approx(width / height, rel=0.02)  # the aspect is kept
    assert found[0][0] == 0 and found[-1][0] + found[-1][2] > 0.95 * PAGE


def test_same_input_gives_the_same_bytes():
    def png():
        file, photos = BytesIO(), [noise_photo(size) for size in RAGGED]
        row = cam_row(randn(3, 3, 4).float())
        page.compose(photos, ["a", "b", "c"], [row], dpi=DPI).save(file, "PNG")
        return file.getvalue()

    assert png() == png()


def test_map_lies_over_the_photo_at_the_photo_s_size():
    photos = [noise_photo(size, seed) for seed, size in enumerate(RAGGED)]
    # nowhere positive: no line
    rows = [cam_row(-randn(3, 3, 4, seed=seed).abs().float()) for seed in (1, 2)]
    canvas = np.array(page.compose(photos, ["a", "b", "c"], rows, dpi=DPI))
    for i, (x, y, w, h, tops) in enumerate(places(RAGGED, ["a", "b", "c"], rows)):
        shown = canvas[y : y + h, x : x + w]
        for row, top in zip(rows, tops, strict=True):
            pixels = cam.upsample(row.maps[i : i + 1], (h, w))[0]
            over = cam.overlay(torch.from_numpy(shown), pixels, np.quantile(row.maps.abs(), 0.98))
            assert np.array_equal(canvas[top : top + h, x : x + w], over)


@pytest.mark.parametrize("size", [*RAGGED, (30, 300), (300, 30)])
@pytest.mark.parametrize(("y", "x"), [(1, 1), (3, 5), (2, 3)])
def test_hot_cell_is_coloured_where_it_is_in_the_photo(size, y, x):
    photo = grey_photo(0, size)
    photo[:, size[1] // 2 :] = 255  # black, then white
    hot = torch.zeros(1, 5, 7)
    hot[0, y, x] = -1  # takes away: no line in the way
    canvas = np.array(page.compose([photo], ["a"], [cam_row(hot)], dpi=DPI)).astype(int)
    ((left, _, w, h, (top,)),) = places([size], ["a"], [cam_row(hot)])
    shown = canvas[top : top + h, left : left + w]
    colour = shown.max(2) - shown.min(2)
    weight = colour * (colour > 8)
    centre_y, centre_x = ((weight * at).sum() / weight.sum() for at in np.indices((h, w)) + 0.5)
    assert centre_y == pytest.approx((y + 0.5) / 5 * h, abs=0.02 * h + 0.5)
    assert centre_x == pytest.approx((x + 0.5) / 7 * w, abs=0.02 * w + 0.5)
    level = shown.mean(2)[0 if y > 1 else -1]  # without colour: the photo's edge is where it was
    assert level[: w // 2 - 3].max() < level[w // 2 + 3 :].min()


def test_a_row_has_one_scale():
    maps = -randn(1, 3, 4).float().abs().expand(3, 3, 4) * torch.tensor([1, 1, 0.5])[:, None, None]
    rows = [cam_row(maps), cam_row(10 * maps)]  # the second has its own
    titles = ["a", "b", "c"]
    canvas = np.array(page.compose([noise_photo((40, 60))] * 3, titles, rows, dpi=DPI))
    found = places([(40, 60)] * 3, titles, rows)
    tiles = [[canvas[tops[r] : tops[r] + h, x : x + w] for x, _, w, h, tops in found]
             for r in (0, 1)]
    assert np.array_equal(tiles[0][0], tiles[0][1])
    full, half = (float(chroma(tiles[0][i]).mean()) for i in (0, 2))
    assert half == pytest.approx(0.5 * full, rel=0.15)
    for first, second in zip(*tiles, strict=True):
        assert abs(first.astype(int) - second).max() <= 1  # float32 rounds


def test_only_wrong_predictions_have_a_frame_in_the_colour_of_wrong():
    photos, maps = [noise_photo(size) for size in RAGGED], torch.ones(3, 2, 2)
    for wrong in range(3):
        right = [None if i == (wrong + 1) % 3 else i != wrong for i in range(3)]
        row = cam_row(maps, right=right)
        canvas = np.array(page.compose(photos, ["a", "b", "c"], [row], dpi=DPI))
        for i, (x, _, w, h, (top,)) in enumerate(places(RAGGED, ["a", "b", "c"], [row])):
            around = (canvas[top - 1 : top + h + 1, max(0, x - 2) : x + w + 2] == page.WRONG).all(2)
            if i == wrong:
                # two thick lines each way
                assert (around.sum(0) >= h).sum() >= 4 and (around.sum(1) >= w).sum() >= 4
            else:
                assert not around.any()


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("text", ["great crested grebe with a rather long name 100%",
                                  "IMG_20240101_123456789_HDR.jpg",
                                  "Donaudampfschifffahrtsgesellschaftskapitaen"])
def test_long_names_and_words_stay_inside_their_column(text):
    photos, maps = [noise_photo((50, 50))] * 10, -torch.ones(10, 2, 2)
    titles, row = ["", text, *[""] * 8], cam_row(maps, ["", text, *[""] * 8], label="")
    canvas = np.array(page.compose(photos, titles, [row], dpi=DPI))
    _, (x, y, w, h, (top,)), (beside, *_), *_ = places([(50, 50)] * 10, titles, [row])
    foot = canvas.shape[0] - 4 * 10  # the legend
    for band in (canvas[:y], canvas[top + h + 2 : foot]):
        inked = np.flatnonzero((band < 250).any((0, 2)))
        assert len(inked) and inked.min() >= x - 2 and inked.max() < beside


def test_a_word_is_broken_only_where_no_size_and_no_column_would_do(monkeypatch):
    paper = Written(monkeypatch)
    titles = ["parachute", "my_holiday_photos_of_2024", *["springer"] * 8]
    photos = [noise_photo((90, 50))] * 3 + [noise_photo((50, 80))] * 7
    page.compose(photos, titles, [cam_row(torch.ones(10, 2, 2), titles)])
    assert {"parachute", "holiday", "springer"} <= set(" ".join(paper.texts).split())
    assert not any("_" in text for text in paper.texts)


@pytest.mark.parametrize("width", [30, 42, 100, 300])
@pytest.mark.parametrize("dpi", [72, 300])
def test_lines_hold_all_words_in_order_and_are_filled(width, dpi):
    paper = page.Paper(dpi)
    width = round(width * dpi / 72)
    text = ("Orange adds to the logit, blue takes from it; half of a map's maximum.\n"
            "great black-backed gull, IMG_20240101_123456789_HDR.jpg, the Donaudampfschifffahrt")
    lines = page.wrap(text, width, paper)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(paper.length(line) <= width for line in lines)
    words = re.findall(r"[^\s-]+-?", text)
    for line, below in zip(lines, lines[1:], strict=False):
        first = re.match(r"[^\s-]+-?", below)[0]
        if first in words and "maximum" not in line:  # a whole word, which had no room above
            space = "" if line.endswith("-") else " "
            assert paper.length(f"{line}{space}{first}") > width
    for word in words:  # in one line if there is room for it in one
        assert paper.length(word) > width or any(word in line for line in lines)


def test_a_text_without_letters_has_no_lines():
    paper = page.Paper(72)
    assert page.wrap("", 50, paper) == page.wrap(" \n ", 50, paper) == []
    assert page.wrap("a", 1, paper) == ["a"]  # a letter is not broken


def test_letters_that_the_font_lacks_are_replaced():
    assert page.printable("Caf\u00e9_noir \u72ac") == "Cafe noir ?"


@pytest.mark.parametrize(("columns", "scale"), [(1, 9.96), (2, 9.96), (3, 9.96), (10, 0.04),
                                                (10, 43.0), (10, 1234.0)])
def test_no_text_lies_on_another_or_leaves_the_picture(monkeypatch, columns, scale):
    paper = Written(monkeypatch)
    label = "mobilenet_v2, only its last layer trained, at 224, 320 px: right on 97.3% of val"
    captions = ["English springer 100%"] * columns
    row = cam_row(torch.full((columns, 2, 2), scale), captions, label=label)
    titles = ["garbage truck"] * columns
    page.compose([noise_photo((50, 50))] * columns, titles, [row] * 2, dpi=150)
    page.confusion_picture(torch.full((columns, columns), 1234), titles, label, dpi=150)
    assert not overlapping(paper)
    for text, box, piece in zip(paper.texts, paper.boxes, paper.images, strict=True):
        assert box[0] >= -1 and box[1] >= 0, text
        assert box[2] <= piece.size[0] + 1 and box[3] <= piece.size[1], text


@pytest.mark.parametrize("scale", [1e-3, 0.04, 0.7, 9.96, 43.0, 1234.0])
def test_colour_bar_says_its_ends_and_zero(monkeypatch, scale):
    paper = Written(monkeypatch)
    row = cam_row(torch.full((1, 2, 2), scale), ["b"], label="c")
    page.compose([noise_photo((50, 50))], ["a"], [row], dpi=100)
    numbers = sorted(float(text) for text in paper.texts if re.search(r"\d", text))
    assert [numbers[0], numbers[-1]] == pytest.approx([-scale, scale], rel=0.05)
    assert 0 in numbers and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("columns", [1, 3, 10, 20])
@pytest.mark.parametrize("dpi", [72, 300])
def test_text_has_7_to_9_points_where_the_picture_is_printed(monkeypatch, columns, dpi):
    paper = Written(monkeypatch)
    row = cam_row(torch.ones(columns, 2, 2), ["English springer 100%"] * columns)
    picture = page.compose([noise_photo((50, 50))] * columns, ["church"] * columns, [row, row],
                           columns, dpi=dpi)
    page.confusion_picture(torch.ones(columns, columns), ["tench"] * columns, "title", dpi)
    assert picture.info["dpi"] == (dpi, dpi) and picture.width / dpi * 2.54 <= 16.05
    assert all(7 <= face.size / dpi * 72 <= 9 for face in paper.fonts)


def test_arrowheads_say_where_cells_go_beyond_the_scale():
    paper = page.Paper(144)
    unit = paper.length("logits")
    for low, high in ((0, 0), (0, 1), (1, 0), (1, 1)):
        maps = [torch.tensor([-2.0 - low]), torch.tensor([2.0 + high])]
        bar = np.array(page.draw_colour_bar(2.0, maps, paper))
        side = bar.shape[0]
        before, after = bar[:, : side - 2], bar[:, 2 - side - unit : -unit]
        assert ((before < 250).any(), (after < 250).any()) == (low, high)


def test_scale_of_each_photo_is_named(monkeypatch):
    paper = Written(monkeypatch)
    maps = torch.ones(2, 3, 3) * torch.tensor([2.0, 40.0])[:, None, None]
    tiles, tile = [], page.draw_tile
    monkeypatch.setattr(page, "draw_tile", lambda *given: tiles.append(tile(*given)) or tiles[-1])
    page.compose([grey_photo(128, (9, 9))] * 2, ["a", "b"], [cam_row(maps)], scale="photo", dpi=DPI)
    assert "own scale" in " ".join(paper.texts)
    assert {"caption \u00b12.00", "caption \u00b140.0"} <= set(paper.texts)
    maps_alone = [tile.crop((0, 0, tile.width, page.TALLEST)).tobytes() for tile in tiles[2:]]
    assert maps_alone[0] == maps_alone[1]


# ---------------------------------------------------------------- what is given


PHOTO, MAPS = noise_photo((9, 9)), torch.zeros(2, 3, 3)


@pytest.mark.parametrize(("photos", "titles", "rows", "words"), [
    ([PHOTO] * 3, ["a"] * 3, [cam_row(MAPS)], "3 photos need as many .* not 3, 2, 2"),
    ([PHOTO] * 2, ["a"], [cam_row(MAPS)], "2 photos need as many titles"),
    ([PHOTO] * 2, ["a"] * 2, [cam_row(MAPS, ["b"])], "2 photos need as many"),
    ([PHOTO] * 2, ["a"] * 2, [cam_row(MAPS, right=[True])], "2 photos need as many"),
    ([], [], [], "0 photos need"),
    ([PHOTO] * 2, ["a"] * 2, cam_row(MAPS), r"rows are a list: .*\[row\]"),
    (["a.jpg", "b.jpg"], ["a"] * 2, [cam_row(MAPS)], "a photo is .* not str"),
    ([PHOTO] * 2, ["a"] * 2, [cam_row(MAPS * torch.nan)], "one map .* of finite numbers"),
    ([PHOTO] * 2, ["a"] * 2, [cam_row(MAPS[:, None])], "one map .* of finite numbers"),
])
def test_what_makes_no_figure_is_refused(photos, titles, rows, words):
    with pytest.raises(ValueError, match=words):
        page.compose(photos, titles, rows, dpi=DPI)


def test_photos_of_every_kind_and_maps_with_a_gradient_make_one_picture():
    photo, maps = noise_photo((40, 60)), randn(1, 3, 4).float()
    pictures = {page.compose([kind], ["a"], [cam_row(given)], dpi=40).tobytes()
                for kind in (photo, photo.numpy(), Image.fromarray(photo.numpy()))
                for given in (maps, maps.numpy(), maps.double().requires_grad_() * 1)}
    assert len(pictures) == 1


def test_pages_need_cam_and_files_alone(tmp_path):
    for name in ("page.py", "cam.py", "files.py"):
        shutil.copy(REPO / name, tmp_path)
    code = """
import torch, page
photo = torch.zeros(9, 9, 3, dtype=torch.uint8)
row = page.Row("mine", torch.ones(2, 3, 3), ["a", "b"], [True, False])
page.save_picture(page.compose([photo] * 2, ["one", "two"], [row]), "new/figure.pdf")
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(tmp_path / "new") == ["figure.pdf"]


# ---------------------------------------------------------------- the confusion picture


def test_confusion_picture_has_the_counts_and_says_what_it_leaves_out(monkeypatch):
    paper = Written(monkeypatch)
    matrix = torch.tensor([[11, 2], [0, 31]])
    canvas = np.array(page.confusion_picture(matrix, ["ants", "bees"], "cnn", dpi=DPI))
    assert {"cnn", "ants", "bees", "11", "2", "31"} <= set(paper.texts) and "0" not in paper.texts
    shares = matrix / matrix.sum(1, keepdim=True)
    colours = page.confusion_cells(matrix, shares, 40, page.Paper(DPI))
    right, wrong, never = (colours.getpixel(at) for at in ((5, 5), (45, 5), (5, 45)))
    assert len(set(right)) == 1 and wrong[0] > wrong[1] + 20 and min(never) > 230
    assert canvas.shape[1] <= PAGE + 1
    many = torch.eye(60, dtype=torch.long) * 9
    many[58, 59] = 7
    paper.texts.clear()
    page.confusion_picture(many, [f"class {i}" for i in range(60)], "cnn", dpi=150)
    assert "class 58" in paper.texts and "class 55" not in paper.texts
    assert "50 of 60" in " ".join(paper.texts)


def test_columns_of_the_confusion_picture_stand_above_their_cells():
    names = ["i", "W" * 8, *["i"] * 18]  # upright; the second is much the darkest
    canvas = np.array(page.confusion_picture(torch.eye(20), names, "", dpi=144)).astype(int)
    cell = np.array(page.confusion_cells(torch.eye(2), torch.eye(2), 9, page.Paper(72)))[5, 5]
    diagonal = np.argwhere((canvas == cell).all(2))
    left, top = diagonal[:, 1].min(), diagonal[:, 0].min()
    ink = (canvas[:top, left:] < 120).all(2).sum(0)
    side = (canvas.shape[1] - left) / 20
    assert ink[int(side) : int(2 * side)].sum() > 5 * ink[: int(side)].sum() > 0


def test_a_confusion_picture_of_a_class_without_letters():
    assert page.confusion_picture(torch.ones(2, 2), ["_", "cat"], "title", DPI).width > 0


# ---------------------------------------------------------------- files


def test_a_picture_too_high_for_a_pdf_is_refused(tmp_path):
    with pytest.raises(ValueError, match="more than a PDF takes.*--columns"):
        page.save_picture(Image.new("L", (1, 65_501)), tmp_path / "tall.pdf")
    assert not any(tmp_path.iterdir())


def test_full_disk_leaves_the_picture_of_before(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    page.save_picture(Image.new("RGB", (8, 8)), path)
    before = path.read_bytes()

    def full(image, file, *rest, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device.*figure.png"):
        page.save_picture(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["figure.png"]


# ---------------------------------------------------------------- lines, and maps beside a photo


def lines(tile):
    """How many pixels of a map over a grey photo are as dark as a line."""
    drawn = page.draw_tile(tile, 360, 360, False, page.Paper(300))
    return int((np.array(drawn)[:360] < 60).all(2).sum())


def test_a_faint_map_has_no_line_and_the_page_says_so(monkeypatch):
    photo, spot = grey_photo(128, (90, 90)), torch.zeros(5, 5)
    spot[2, 2] = 1.0
    for scale, seen in ((1.0, True), (3.9, True), (4.1, False), (40.0, False)):
        assert (lines(page.Tile(photo, "", spot, scale)) > 50) == seen
    said = []
    for scale in (3.9, 4.1):
        paper = Written(monkeypatch)
        page.draw_page([[page.Strip([page.Tile(photo, "", spot, scale)])]], "", DPI)
        said.append("below 25% of its scale has no line" in " ".join(paper.texts))
        monkeypatch.undo()
    assert said == [False, True]


def test_a_difference_has_a_line_on_both_sides():
    photo, spots = grey_photo(128, (90, 90)), torch.zeros(9, 9)
    spots[2, 2], spots[6, 6] = 1.0, -1.0
    one, both, of_minus = (lines(page.Tile(photo, "", *more)) for more in (
        (spots, 1.0), (spots, 1.0, False, True), (-spots, 1.0)))
    assert both == one + of_minus > one > 50
    spots[6, 6] = -0.2  # faint on that side
    assert lines(page.Tile(photo, "", spots, 1.0, False, True)) == one


def place_of(canvas, colour):
    """(y, x, height, width) of what has a colour in a picture."""
    ys, xs = np.nonzero((np.array(canvas) == colour).all(2))
    return int(ys.min()), int(xs.min()), int(np.ptp(ys)) + 1, int(np.ptp(xs)) + 1


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (300, 20), (20, 300)])
@pytest.mark.parametrize("networks", [2, 3])
def test_of_one_photo_the_maps_of_several_networks_lie_beside_it(monkeypatch, size, networks):
    paper = Written(monkeypatch)
    photo = torch.tensor(MAGENTA, dtype=torch.uint8).expand(*size, 3).contiguous()
    label = "mobilenet_v2, only its last layer trained, at 224, 320 px: right on 97.3% of 3,925 val"
    rows = [cam_row(torch.full((1, 3, 3), -1.0 - i), [f"caption {i}"], label=label)
            for i in range(networks)]
    picture = page.compose([photo], ["title"], rows, dpi=DPI)
    y, x, height, width = place_of(picture, MAGENTA)
    assert abs(width / height - size[1] / size[0]) < 0.1 * size[1] / size[0] + 0.05
    deepest = [place_of(picture, tuple(cam.overlay(photo, row.maps[0], 1.0 + i)[0, 0].tolist()))
               for i, row in enumerate(rows)]
    assert all((top, high) == (y, height) for top, _, high, _ in deepest)  # one height
    assert x < deepest[0][1] and picture.width <= PAGE + 1
    assert picture.height < height + 130  # no tower
    assert {"title", "caption 0", "caption 1"} <= set(paper.texts) and not overlapping(paper)
    ends = [text for text in paper.texts if text in ("+1.00", "+2.00", "+3.00")]
    assert ends == ["+1.00", "+2.00", "+3.00"][:networks]  # a scale each, with its bar


def test_one_network_or_many_lie_below_a_photo():
    photo, row = noise_photo((50, 50)), cam_row(torch.ones(1, 2, 2))
    heights = [page.compose([photo], ["a"], [row] * n, dpi=DPI).height for n in (1, 2, 3, 4)]
    assert heights[0] > heights[1] and heights[3] > 2 * heights[2]
    below = page.compose([photo], ["a"], [row] * 2, columns=2, dpi=DPI)
    assert below.height > heights[0]
