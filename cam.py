"""Where did the network look? Class activation maps (Zhou et al. 2016), exact and in logits, and their pictures.

    python cam.py figure --models runs/resnet18/best.pt runs/cnn/best.pt      a photo of each class, two networks
    python cam.py explain photo.jpg --model runs/cnn/best.pt                  the top classes of any photo
    python cam.py gallery --model runs/cnn/best.pt                            the most confident mistakes

In code, for a network that is features -> global average pooling -> one linear layer:

    features = network.features(images)                             # (N, C, h, w)
    maps = cam.class_activation_maps(features, network.head.weight) # (N, K, h, w), in logits
    pixels = cam.upsample(maps[:, 3], (160, 160))                   # (N, 160, 160)

The mean of a class's map plus its bias *is* its logit, so a cell of the map says how much that place added to
the class's score (orange in the pictures) or took from it (blue). Copy this file alone and its functions work, on
maps of any device, with or without gradients; the commands want data.py and models.py beside it.
"""

import argparse
import glob
import math
import os
import sys
import unicodedata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

# The two directions of the colour map, as OKLab hues in degrees: orange adds, blue takes away. They differ along
# the blue-yellow axis, which nearly all colour-blind readers see.
HUES = {"adds": 50.0, "takes": 255.0}
CHROMA = 0.17  # at the end of the scale
SCALE_QUANTILE = 0.98  # of the cells' |values| in a row: the end of its scale, which a few strong cells exceed
TEXT, WRONG = (50, 50, 50), (196, 30, 30)

# Sizes on paper, in points (1/72 inch): a picture is at most as wide as the text of an A4 page.
PAGE = 16 / 2.54 * 72
TEXT_SIZES = (8, 7.5, 7)  # the largest that no word is too long for
GAP, BAR, LINE, RIM, FRAME = 4, (84, 9), 0.6, 1.4, 1.2  # between photos; the colour bar; the line and its rim
TALLEST, LEAST = 200, 28  # the height of a photo, the width of a column
MOST_PHOTOS, MOST_CLASSES = 100, 50  # in a figure; in a confusion picture


class CamError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


# ---------------------------------------------------------------- maps


def class_activation_maps(features, head_weight):
    """Every class's map for every image. features (N, C, h, w), head_weight (K, C) -> (N, K, h, w), in logits."""
    return torch.einsum("kc,nchw->nkhw", head_weight, features)


def upsample(maps, size):
    """Maps (N, h, w) on the pixels of the image, `size` = (H, W), bilinearly: (N, H, W)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def contrast_map(maps, a, b):
    """Why class a and not b? maps (N, K, h, w) -> (N, h, w), in logits; its mean is the difference of the two logits
    minus that of their biases."""
    return maps[:, a] - maps[:, b]


class MapsAndLogits(nn.Module):
    """A network that returns (maps (N, K, h, w), logits (N, K)) from one forward pass; torch.export takes it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        features = self.network.features(images)
        return (class_activation_maps(features, self.network.head.weight), self.network.head(features.mean((2, 3))))


def check_identity(maps, logits, bias):
    """Raise CamError unless logits = mean of the map + bias: only then do the maps explain the logits."""
    error = (maps.mean((2, 3)) + bias - logits).detach().abs().max()
    if not error <= 1e-3 * (1 + logits.abs().max()):
        raise CamError(f"the maps miss the logits by {float(error):.2g}: this network's score is not the mean of a "
                       "map plus a bias, or it holds numbers that are not finite")


# ---------------------------------------------------------------- colour


def oklab_to_srgb(lab):
    """OKLab (..., 3) (Ottosson 2020), in which equal distances look equal, to sRGB in 0..1, clipped."""
    to_lms = lab.new_tensor([
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ])
    to_rgb = lab.new_tensor([
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])
    linear = ((lab @ to_lms.T) ** 3 @ to_rgb.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lightness(photo):
    """OKLab's lightness, 0..1, of a photo (H, W, 3) uint8 seen in grey."""
    rgb = photo.float() / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return (linear @ linear.new_tensor([0.2126, 0.7152, 0.0722])) ** (1 / 3)


def overlay(photo, cells, scale):
    """A map `cells` (h, w), in logits, over a photo (see `as_photo`): (H, W, 3) uint8 of the photo's size.

    The photo, in grey, gives the lightness; the map gives hue (its sign) and colourfulness, which grows in
    proportion to it: none at 0, full at `scale`. So zero is grey, and equal steps in logits look equal.
    """
    photo = as_photo(photo)
    value = (upsample(as_map(cells)[None], photo.shape[:2])[0] / float(scale)).clamp(-1, 1)
    strength = value.abs()
    hue = torch.deg2rad(torch.where(value > 0, HUES["adds"], HUES["takes"]))
    light = 0.38 + 0.52 * lightness(photo)
    light = torch.lerp(light, torch.full_like(light, 0.68), 0.55 * strength)  # colours need a middle lightness
    lab = torch.stack([light, CHROMA * strength * hue.cos(), CHROMA * strength * hue.sin()], -1)
    return (oklab_to_srgb(lab) * 255).round().to(torch.uint8)


def outline(picture, cells, width=1.0, rim=2.4):
    """A line around the region above half of the map's maximum ("focus" in score.py), on a picture (H, W, 3) uint8.

    Dark, `width` px, in a light rim, `rim` px, to show on everything. With f = map - maximum / 2 the region ends where
    f = 0, and a pixel lies |f| / |gradient of f| from there, to first order. A map that is nowhere positive has no such
    region. Returns a new picture.
    """
    f = upsample(as_map(cells)[None], picture.shape[:2])[0]  # (H, W)
    if f.max() <= 0:
        return picture
    inside, reach = f > f.max() / 2, math.ceil((rim + 1) / 2)
    near = [F.max_pool2d(side[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0 for side in (inside, ~inside)]
    f = f - f.max() / 2
    steps = [f.diff(dim=d, prepend=f.narrow(d, 0, 1), append=f.narrow(d, -1, 1)).abs() for d in (0, 1)]
    slope = torch.hypot(steps[0][1:].maximum(steps[0][:-1]), steps[1][:, 1:].maximum(steps[1][:, :-1]))
    distance = torch.where(near[0] & near[1], f.abs() / slope.clamp(min=1e-12), torch.inf)
    shown = picture.float()
    for ink, across in ((255.0, rim), (20.0, width)):
        cover = ((across + 1) / 2 - distance).clamp(0, 1)[..., None]  # of the pixel by the line
        shown = shown + cover * (ink - shown)
    return shown.round().to(torch.uint8)


class Scale(NamedTuple):
    """The signed scale of one or more maps, -end to end in logits, and whether cells lie beyond either end."""

    end: float
    beyond_low: bool
    beyond_high: bool


def scale_of(maps):
    """The `Scale` of maps of any shape: its end is a high quantile, so that one strong cell hides no other."""
    maps = as_map(maps)
    end = float(np.quantile(maps.abs().numpy(), SCALE_QUANTILE)) or float(maps.abs().max()) or 1e-6
    return Scale(end, bool(maps.min() < -end), bool(maps.max() > end))


def own_scale(cells):
    """The scale of a map that shares it with no other, for its caption."""
    end = scale_of(cells).end
    return f" ±{signed(end, end)[1:]}"


# ---------------------------------------------------------------- pictures


class Row(NamedTuple):
    """What one network says of N photos."""

    label: str
    maps: torch.Tensor  # (N, h, w), in logits, of the class that is named under each photo
    captions: list  # N of str
    right: list = None  # N of bool, or of None where the truth is unknown


class Tile(NamedTuple):
    """A photo, or a map over it, with the texts above and below it."""

    photo: torch.Tensor  # (H, W, 3) uint8
    cells: torch.Tensor = None  # (h, w), in logits
    above: str = ""
    below: str = ""
    wrong: bool = False  # framed, in the colour of mistakes


class Strip(NamedTuple):
    """Tiles side by side, under a line that names the network and shows the scale of the maps."""

    tiles: list  # of Tile, or of None where a place stays blank
    label: str = ""
    scale: Scale = None  # None: every map has its own


class Pen(NamedTuple):
    """Sizes in a picture: pixels of a point, and the font."""

    px: float
    face: ImageFont.FreeTypeFont

    @property
    def gap(self):
        return round(GAP * self.px)

    @property
    def line(self):
        return round(1.25 * self.face.size)

    def fits(self, text, width):
        """Whether no word of `text` is longer than `width` px."""
        return all(self.face.getlength(word) <= width for word in text.split())


def as_photo(photo):
    """A PIL image, or an array or tensor (H, W), (H, W, 3) or (3, H, W) of uint8 or of floats in 0..1, as a tensor
    (H, W, 3) uint8 on the CPU. Raises CamError."""
    if isinstance(photo, Image.Image):
        photo = np.array(photo.convert("RGB"))
    photo = torch.as_tensor(photo).detach().cpu()
    if photo.dim() == 2:
        photo = photo[..., None].expand(-1, -1, 3)
    elif photo.dim() == 3 and photo.shape[0] == 3 != photo.shape[2]:
        photo = photo.permute(1, 2, 0)
    if photo.is_floating_point() and 0 <= photo.min() and photo.max() <= 1:
        photo = (photo * 255).round().to(torch.uint8)
    if photo.dim() != 3 or photo.shape[2] != 3 or photo.dtype != torch.uint8:
        raise CamError("a photo is a PIL image, or (H, W, 3) of uint8 or of floats in 0..1, not normalised, not "
                       f"{tuple(photo.shape)} of {photo.dtype}")
    return photo


def as_map(cells):
    """A map as float32 on the CPU, without its gradient: all that a picture needs of it."""
    return torch.as_tensor(cells).detach().float().cpu()


def font(size):
    return ImageFont.load_default(size)


def pens(dpi):
    """A pen for each size of text, the largest first."""
    return [Pen(dpi / 72, font(points * dpi / 72)) for points in TEXT_SIZES]


def printable(text):
    """`text` in characters that Pillow's own font has: without accents, other alphabets as question marks;
    underscores count as spaces."""
    plain = (c for c in unicodedata.normalize("NFKD", text.replace("_", " ")) if not unicodedata.combining(c))
    return "".join(c if c.isascii() else "?" for c in plain)


def wrap(text, width, face):
    """`text` in lines of at most `width` px, broken at spaces, or in a word that alone is too long."""
    if "\n" in text:
        return [line for part in text.split("\n") for line in wrap(part, width, face)]
    lines = [""]
    for word in text.split():
        if face.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if face.getlength(lines[-1] + letter) > width else []
            lines[-1] += letter
    return lines


def signed(value, scale):
    """`value` with its sign, with the decimals that show three digits of `scale`."""
    decimals = max(0, 2 - math.floor(math.log10(scale)))
    return f"{round(float(value), decimals) + 0.0:+.{decimals}f}"


def resize(photo, width, height):
    """photo (H, W, 3) uint8 at the largest size of its aspect in a box of `width` x `height` px, antialiased."""
    h, w = photo.shape[:2]
    share = min(width / w, height / h)
    size = max(1, round(w * share)), max(1, round(h * share))
    image = Image.fromarray(photo.contiguous().numpy()).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))


def blank(width, height):
    return Image.new("RGB", (width, height), "white")


def draw_texts(texts, widths, pen, colours=None, above=False):
    """Texts in the middles of columns, hanging from one line, or (above) standing on one; a single text begins at the
    left. Returns an image."""
    wrapped = [wrap(text, width, pen.face) for text, width in zip(texts, widths, strict=True)]
    most, x = max(map(len, wrapped)), 0
    canvas = blank(sum(widths) + pen.gap * (len(widths) - 1), most * pen.line)
    for lines, width, colour in zip(wrapped, widths, colours or [TEXT] * len(texts), strict=True):
        at, anchor = (x, "la") if len(texts) == 1 else (x + width / 2, "ma")
        for i, line in enumerate(lines, most - len(lines) if above else 0):
            ImageDraw.Draw(canvas).text((at, i * pen.line), line, colour, pen.face, anchor)
        x += width + pen.gap
    return canvas


def draw_tile(tile, width, height, scale, pen):
    """A photo, or the map over it with the line around what lies above half of its maximum, as large as fits."""
    shown = resize(tile.photo, width, height)
    if tile.cells is not None:
        shown = overlay(shown, tile.cells, (scale or scale_of(tile.cells)).end)
        shown = outline(shown, tile.cells, LINE * pen.px, RIM * pen.px)
    image = Image.fromarray(shown.numpy())
    if tile.wrong:
        frame = (0, 0, image.width - 1, image.height - 1)
        ImageDraw.Draw(image).rectangle(frame, outline=WRONG, width=max(2, round(FRAME * pen.px)))
    return image


def draw_tiles(strip, widths, height, pen):
    """The tiles of a strip, each in the middle of its column."""
    canvas, x = blank(sum(widths) + pen.gap * (len(widths) - 1), height), 0
    for tile, width in zip(strip.tiles, widths, strict=True):
        if tile:
            image = draw_tile(tile, width, height, strip.scale, pen)
            canvas.paste(image, (x + (width - image.width) // 2, (height - image.height) // 2))
        x += width + pen.gap
    return canvas


def draw_colour_bar(scale, px):
    """The signed scale: its ends and zero written into it, and an arrowhead where cells lie beyond an end."""
    width, height = (round(points * px) for points in BAR)
    ramp, grey = torch.linspace(-1, 1, width).expand(height, width), torch.full((height, width, 3), 128)
    bar, mid = overlay(grey.to(torch.uint8), ramp, 1), (height - 1) / 2
    canvas, small = blank(width + 2 * height, height), font(TEXT_SIZES[-1] * px)
    canvas.paste(Image.fromarray(bar.numpy()), (height, 0))
    pen, right = ImageDraw.Draw(canvas), canvas.width - 1 - height
    for tip, base, pixel, beyond in ((height // 3, height, 0, scale.beyond_low),
                                     (right + height - height // 3, right, -1, scale.beyond_high)):
        if beyond:
            pen.polygon([(tip, mid), (base, 0), (base, height - 1)], tuple(bar[0, pixel].tolist()))
    pen.text((1.2 * height, mid), signed(-scale.end, scale.end), "black", small, "lm")
    pen.text((canvas.width / 2, mid), "0", "black", small, "mm")
    pen.text((canvas.width - 1.2 * height, mid), signed(scale.end, scale.end), "black", small, "rm")
    return canvas


def draw_heading(label, scale, width, pen):
    """The line above a row of maps: whose they are, and at its right end their scale in logits."""
    unit = "logits" if scale else "each map on its own scale (±), in logits"
    unit = draw_texts([unit], [math.ceil(pen.face.getlength(unit)) + 1], pen)
    bar = draw_colour_bar(scale, pen.px) if scale else blank(1, 1)
    text = draw_texts([label], [width - unit.width - bar.width - pen.gap], pen, ["black"])
    canvas = blank(width, max(text.height, bar.height))
    canvas.paste(text, (0, 0))
    canvas.paste(bar, (width - unit.width - bar.width, round(0.08 * pen.line)))
    canvas.paste(unit, (width - unit.width, 0))
    return canvas


def draw_strip(strip, widths, height, page, pen):
    """A strip from top to bottom: heading, texts, tiles, texts; [(image, space above it in px), ...]."""
    colours = [WRONG if tile and tile.wrong else TEXT for tile in strip.tiles]
    above, below = ([getattr(tile, side) if tile else "" for tile in strip.tiles] for side in ("above", "below"))
    pieces = [draw_heading(strip.label, strip.scale, page, pen)] if strip.label else []
    pieces += [draw_texts(above, widths, pen, colours, above=True)] if any(above) else []
    pieces += [draw_tiles(strip, widths, height, pen)]
    pieces += [draw_texts(below, widths, pen, colours)] if any(below) else []
    return [(piece, pen.gap // 2 if i else 2 * pen.gap) for i, piece in enumerate(pieces)]


def side_by_side(photos, words, room, tallest):
    """The widths of the columns and the one height (px) of photos that stand on a line of `room` px: the largest at
    which they fit. words: px that the columns need for their longest words; none gets more than its part."""
    aspects = [photo.shape[1] / photo.shape[0] for photo in photos]
    part = room // len(photos)
    widest, words = min(2 * median(aspects), part), [min(word, part) for word in words]

    def widths(height):
        return [math.ceil(max(min(aspect, widest) * height, word)) for aspect, word in zip(aspects, words, strict=True)]

    height = max((h for h in range(1, tallest + 1) if sum(widths(h)) <= room), default=1)
    return widths(height), height


def lay_out(block, dpi, tallest):
    """The widths of a block's columns and the height of its photos, px."""
    pen, least = pens(dpi)[-1], round(LEAST * dpi / 72)
    columns = list(zip(*(strip.tiles for strip in block), strict=True))
    words = [max([least, *(math.ceil(pen.face.getlength(word)) for tile in column if tile
                           for word in f"{tile.above} {tile.below}".split())]) for column in columns]
    room = round(PAGE * dpi / 72) - pen.gap * (len(columns) - 1)
    return side_by_side([tile.photo for tile in block[0].tiles], words, room, tallest)


def draw(blocks, legend="", dpi=300):
    """A picture, 16 cm wide or less, of blocks (lists of `Strip` with their tiles in the same columns) above a legend.
    Text has 8 points, or 7 where a word would not fit. Returns a PIL image."""
    shapes, tallest = [], round(TALLEST * dpi / 72)
    for block in blocks:
        shapes.append(lay_out(block, dpi, tallest))
        tallest = shapes[0][1]  # a last block of few photos does not grow
    texts = [(f"{tile.above} {tile.below}", width) for block, (widths, _) in zip(blocks, shapes, strict=True)
             for strip in block for tile, width in zip(strip.tiles, widths, strict=True) if tile]
    pen = next((pen for pen in pens(dpi) if all(pen.fits(*text) for text in texts)), pens(dpi)[-1])
    page = max(sum(widths) + pen.gap * (len(widths) - 1) for widths, _ in shapes)
    page, pieces = max(page, round(PAGE / 2 * dpi / 72)), []
    for block, (widths, height) in zip(blocks, shapes, strict=True):
        pieces += [(blank(1, 1), 2 * pen.gap)] if pieces else []
        for strip in block:
            pieces += draw_strip(strip, widths, height, page, pen)
    legend = f"Orange adds to the logit, blue takes from it; line: half of a map's maximum. {legend}"
    return stack([*pieces, (draw_texts([legend], [page], pen), 3 * pen.gap)], page, dpi)


def stack(pieces, width, dpi):
    """Images one below the other, (image, space above it in px) each: a PIL image that knows its dpi."""
    pieces = [(pieces[0][0], 0), *pieces[1:]]
    canvas, y = blank(width, sum(image.height + space for image, space in pieces)), 0
    for image, space in pieces:
        canvas.paste(image, (0, y + space))
        y += space + image.height
    canvas.info["dpi"] = (dpi, dpi)
    return canvas


def compose(photos, titles, rows, columns=10, scale="row", legend="", dpi=300):
    """The figure: photos under their titles, then each `Row`'s maps over them, captioned; a PIL image.

    photos, titles: N each (see `as_photo`). More than `columns` photos go on in further blocks. The maps of a row
    share one scale, in logits, across all blocks; with scale="photo" each has its own, written into its caption.
    """
    photos, blocks = [as_photo(photo) for photo in photos], []
    for first in range(0, len(photos), columns):
        part = range(first, min(first + columns, len(photos)))
        blocks.append([Strip([Tile(photos[i], above=printable(titles[i])) for i in part])])
        for row in rows:
            tiles = []
            for i in part:
                own = own_scale(row.maps[i]) if scale == "photo" else ""
                wrong = row.right is not None and row.right[i] is False
                tiles.append(Tile(photos[i], row.maps[i], "", printable(row.captions[i]) + own, wrong))
            blocks[-1].append(Strip(tiles, row.label, scale_of(row.maps) if scale == "row" else None))
    return draw(blocks, legend, dpi)


# ---------------------------------------------------------------- the confusion picture


def confusion_cells(matrix, shares, side, pen):
    """The cells of a confusion picture, `side` px each: right answers grey, mistakes red, as deep as the square root of
    their share of the row, so that rare ones are seen too, with their counts where there is room."""
    right, strength = torch.eye(len(matrix), dtype=torch.bool)[..., None], shares.sqrt()[..., None]
    ends = torch.where(right, torch.tensor([0.7, 0, 0]), torch.tensor([0.6, 0.17, 0.08]))  # OKLab
    colours = (oklab_to_srgb(torch.lerp(torch.tensor([0.97, 0, 0]), ends, strength)) * 255).round().to(torch.uint8)
    cells = colours.repeat_interleave(side, 0).repeat_interleave(side, 1)
    for line in range(max(1, round(pen.px / 4))):  # a white grid
        cells[line::side] = cells[:, line::side] = 255
    image = Image.fromarray(cells.numpy())
    if pen.line <= side and pen.face.getlength(str(int(matrix.max()))) < 0.9 * side:
        for y, x in matrix.nonzero().tolist():
            place = ((x + 0.5) * side, (y + 0.5) * side)
            ImageDraw.Draw(image).text(place, str(int(matrix[y, x])), "black", pen.face, "mm")
    return image


def confusion_picture(matrix, classes, title, dpi=300):
    """How often the network says what: a picture of counts (K, K), rows what is there, columns what it says.

    Of more than 50 classes those 50 with the most mistakes are shown, and the picture says so. Returns a PIL image.
    """
    matrix = torch.as_tensor(matrix).cpu()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    if len(classes) > MOST_CLASSES:
        mistakes = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diag()
        kept = mistakes.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
        title += f" (the {MOST_CLASSES} of {len(classes)} classes with the most mistakes)"
        matrix, shares, classes = matrix[kept][:, kept], shares[kept][:, kept], [classes[i] for i in kept]
    pen, names = pens(dpi)[0], [printable(name) for name in classes]
    page = round(PAGE * pen.px)
    margin = math.ceil(min(page / 4, max(pen.face.getlength(name) for name in names))) + pen.gap
    side = min((page - margin) // len(names), round(48 * pen.px))
    pen = next((pen for pen in pens(dpi) if all(pen.fits(name, side - pen.gap) for name in names)), pen)
    pen = pen if pen.line <= side else pens(dpi)[-1]
    lines = [wrap(name, margin - pen.gap, pen.face) for name in names]  # of a long name the first line
    names = [first + "..." * bool(more) for first, *more in lines]
    if all(pen.fits(name, side - pen.gap) for name in names):
        header = draw_texts(names, [side - pen.gap] * len(names), pen, above=True)
    else:
        lying = blank(margin - pen.gap, len(names) * side)
        for i, name in enumerate(names):
            ImageDraw.Draw(lying).text((pen.gap // 2, (i + 0.5) * side), name, TEXT, pen.face, "lm")
        header = lying.rotate(90, expand=True)
    table = blank(max(margin + len(names) * side, page // 2), header.height + len(names) * side)
    table.paste(header, (margin, 0))
    table.paste(confusion_cells(matrix, shares, side, pen), (margin, header.height))
    for i, name in enumerate(names):
        middle = header.height + (i + 0.5) * side
        ImageDraw.Draw(table).text((margin - pen.gap, middle), name, TEXT, pen.face, "rm")
    notes = "Rows: what is there; columns: what the network says; the deeper, the larger the share of the row."
    return stack([(draw_texts([title], [table.width], pen, ["black"]), 0), (table, pen.gap),
                  (draw_texts([notes], [table.width], pen), pen.gap)], table.width, dpi)


# ---------------------------------------------------------------- files


def check_picture_name(path):
    """Raise CamError, before any work, for a name under which no picture can be written."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf"):
        raise CamError(f"{path} cannot be written: name a picture that ends in .png or .pdf")
    if path.is_dir():
        raise CamError(f"{path} is a folder: name a picture in it, {path / 'figure.png'}")
    if above := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise CamError(f"{path} cannot be written, for {above} is no folder: name another place")


def save_picture(image, path):
    """Write a PIL image as .png or .pdf, whole or not at all, in its size on paper: by its dpi, or 16 cm wide."""
    check_picture_name(path)
    path = Path(path)
    dpi = image.info.get("dpi", (image.width / PAGE * 72,))[0]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            if path.suffix.lower() == ".pdf":
                image.save(file, "PDF", resolution=dpi, quality=95, subsampling=0)
            else:
                image.save(file, "PNG", dpi=(dpi, dpi), optimize=True)
        os.replace(part, path)
    except OSError as error:  # a full disk names no file of its own accord
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def finish(picture, path, what, loaded):
    """Write a picture, and print how LaTeX includes it under a caption that says `what` it shows, of which networks."""
    save_picture(picture, path)
    caption = f"{what}: {'; '.join(describe(facts) for _, facts in loaded)}."
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    caption = "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in caption)
    width = picture.width / picture.info["dpi"][0] * 2.54
    print(f"{path}\n\\includegraphics[width={width:.1f}cm]{{{Path(path).as_posix()}}}\n\\caption{{{caption}}}")


# ---------------------------------------------------------------- checkpoints


def add_looks_option(parser):
    """Add --looks, for `parse_looks`."""
    parser.add_argument("--looks", nargs="+", metavar="SIZES", help="sizes in px at which networks look at a photo, "
                        "averaged: 224,320, one list for all or one per checkpoint; without it, their own")


def parse_looks(texts):
    """["224,320", "64,96,128"] as [[224, 320], [64, 96, 128]]; None for None. Raises CamError."""
    if texts is None:
        return None
    parsed = [[int(size) if size.strip().isdecimal() else 0 for size in text.split(",")] for text in texts]
    for text, sizes in zip(texts, parsed, strict=True):
        if not all(16 <= size <= 2048 for size in sizes) or len(set(sizes)) < len(sizes):
            raise CamError(f"--looks {text}: name different sizes from 16 to 2048 px, with commas between: 224,320")
    return parsed


def load_models(paths, looks=None):
    """The checkpoints of `paths`, which know the same classes, in any order: [(network, facts), ...].

    looks: None, or what `parse_looks` gives. Raises CamError, or models.ModelError.
    """
    import models

    looks = list(looks or [None])
    if len(looks) not in (1, len(paths)):
        raise CamError(f"--looks has {len(looks)} lists for {len(paths)} checkpoints: give one, or one for each")
    looks *= len(paths) // len(looks)
    loaded = [models.load(path, looks=sizes) for path, sizes in zip(paths, looks, strict=True)]
    for path, (_, facts) in zip(paths, loaded, strict=True):
        if missing := {"size", "settings", "accuracy", "how"} - facts.keys():
            raise CamError(f"{path} does not say its {min(missing)}: use a checkpoint of train.py (runs/*/best.pt)")
        own, first = set(facts["classes"]), set(loaded[0][1]["classes"])
        if own != first:
            lacks, has = (", ".join(sorted(names)[:3]) or "none" for names in (first - own, own - first))
            raise CamError(f"{path} knows other classes than {paths[0]} (without {lacks}, ..., but with {has}, ...): "
                           "compare networks of the same classes")
    return loaded


def load_once(paths, looks):
    """`load_models` of what `--looks` says, without what is named twice; a sentence says so. Also the runs' names."""
    found = {}
    for path, (network, facts) in zip(paths, load_models(paths, parse_looks(looks)), strict=True):
        key = Path(path).resolve(), tuple(facts["looks"])
        if key in found:
            print(f"{path} is named twice and shown once", file=sys.stderr)
        found.setdefault(key, (network, facts))
    return list(found.values()), "-".join(path.parent.name for path, _ in found)


def describe(facts):
    """A checkpoint in a line: what it is, how it was trained, at which sizes it looks, how often it is right then."""
    name = f"{facts['arch']}, {facts['how']}, at {', '.join(map(str, facts['looks']))} px"
    if facts["accuracy"] is None:
        return f"{name}: accuracy not measured"
    split = facts.get("accuracy_on") or "val"
    of = f"{facts['accuracy_n']:,} {split} photos" if facts.get("accuracy_n") else split
    return f"{name}: {facts['accuracy']:.1%} of {of} right"


@torch.no_grad()
def predict_with_maps(network, facts, photos):
    """What the network says of `photos`, a list of (H, W, 3) uint8, each seen whole, resized to facts["size"]:
    maps (N, K, h, w), logits (N, K), probabilities (N, K)."""
    import data

    maps, logits = [], []
    for photo in photos:  # one by one: sizes differ, and a photo can be large
        ((images, _),) = data.eval_batches(data.from_arrays([photo]), facts["size"], 1)
        maps.append(MapsAndLogits(network)(images)[0])
        logits.append(network(images))  # by its own forward, which the identity then checks
    maps, logits = torch.cat(maps), torch.cat(logits)
    check_identity(maps, logits, network.head.bias)
    return maps, logits, logits.softmax(1)


# ---------------------------------------------------------------- commands


def one_of_each_class(folder, seed, known, wanted=None):
    """A validation photo of every class, or of the `wanted` ones, the same for the same seed: photos, names.

    known: the classes of the networks, which the data must have. Of too many classes some are chosen by the seed.
    """
    import data

    val = data.load(data.prepare(folder), "val").relabelled(known)
    generator = torch.Generator().manual_seed(seed)
    names = check_classes(wanted, known) if wanted else list(known)
    if not wanted and len(names) > MOST_CLASSES:
        names = [known[k] for k in torch.randperm(len(known), generator=generator)[:MOST_CLASSES].sort().values]
        print(f"{len(names)} of {len(known)} classes are shown: --classes or --seed chooses others", file=sys.stderr)
    photos = []
    there = [name for name in names if (val.labels == known.index(name)).any()]
    if lacking := [name for name in names if name not in there]:
        if wanted:
            raise CamError(f"{folder} has no val photo of {lacking[0]}: choose others with --classes")
        print(f"not shown, for there is no val photo: {', '.join(lacking)}", file=sys.stderr)
    for name in there:
        of_class = (val.labels == known.index(name)).nonzero()[:, 0]
        photos.append(val[int(of_class[torch.randint(len(of_class), (), generator=generator)])])
    return photos, there


def check_classes(names, known):
    """`names`, all of which are among the classes `known`, or a CamError. However a keyboard writes accents."""
    names = [unicodedata.normalize("NFC", name) for name in names]
    for name in names:
        if name not in known:
            some = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise CamError(f"there is no class {name!r}: the networks know {some}")
    return list(names)


def photo_files(names):
    """The photos that `names` stand for, files, folders and patterns, as paths; CamError where there are none."""
    import data

    found = []
    for name in map(str, names):
        path = Path(name)
        inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(name))
        if path.is_file() or not (path.is_dir() or glob.has_magic(name)):
            found.append(path)  # a missing one is refused by name when it is decoded
            continue
        inside = sorted(p for p in inside if p.suffix.lower() in data.SUFFIXES and p.is_file() and p.name[0] != ".")
        if not inside:
            raise CamError(f"{name} holds no photo: name a photo, or a folder that has some in it")
        found += inside
    return found


def given_photos(images, titles, truth, known):
    """Photos of one's own, their titles, and what is there where that is known: by `truth`, a class for each photo or
    one for all, or by the name of the folder that a photo lies in."""
    import data

    paths = photo_files(images)
    if len(paths) > MOST_PHOTOS:
        raise CamError(f"--images names {len(paths)} photos, too many for one picture: name at most {MOST_PHOTOS}")
    for option, given, lengths in (("--titles", titles, {len(paths)}), ("--truth", truth, {1, len(paths)})):
        if given and len(given) not in lengths:
            raise CamError(f"{option} has {len(given)} names for {len(paths)} photos: give one for each")
    if truth:
        truth = check_classes(truth, known) * (len(paths) if len(truth) == 1 else 1)
    else:
        folders = [data.WORDS.get(path.parent.name, path.parent.name) for path in map(Path.resolve, paths)]
        truth = [name if name in known else None for name in folders]
    titles = titles or [name or path.stem for path, name in zip(paths, truth, strict=True)]
    return [torch.from_numpy(data.decode(path)) for path in paths], titles, truth


def row_of(label, maps, facts, labels, probabilities, truth):
    """A `Row` of the maps of the classes `labels` (N,): maps (N, K, h, w), probabilities (N, K), names of the truth."""
    names = [facts["classes"][k] for k in labels]
    places = range(len(names))
    captions = [f"{name} {probabilities[i, k]:.0%}" for i, name, k in zip(places, names, labels, strict=True)]
    right = [None if real is None else name == real for name, real in zip(names, truth, strict=True)]
    return Row(label, maps[places, labels], captions, right)


def figure(models, looks, folder, classes, images, titles, truth, seed, columns, scale, dpi, out):
    """Photos in the first row, and under them a row of maps for each network, of the class it predicts."""
    check_picture_name(out)
    if images and classes:
        raise CamError("--classes chooses among the photos of val, and --images names your own: leave one out")
    if not images and (titles or truth):
        raise CamError("--titles and --truth are for photos of your own: name them with --images")
    loaded, _ = load_once(models, looks)
    known = list(loaded[0][1]["classes"])
    if images:
        photos, titles, truth = given_photos(images, titles, truth, known)
    else:
        photos, titles = one_of_each_class(folder, seed, known, classes)
        truth = titles
    rows = []
    for network, facts in loaded:
        maps, _, probabilities = predict_with_maps(network, facts, photos)
        rows.append(row_of(describe(facts), maps, facts, probabilities.argmax(1), probabilities, truth))
    legend = f"Above: {'what is there' if titles == truth else 'the photo'}; below: the prediction."
    if len(photos) > columns:
        print(f"{len(photos)} photos go into blocks of {columns}", file=sys.stderr)
    picture = compose(photos, titles, rows, columns, scale, legend, dpi)
    finish(picture, out, "Class activation maps, in logits, of the class that each network predicts", loaded)


def top_tiles(network, facts, photo, top, contrast):
    """Tiles of one photo: the maps of the `top` most probable classes, then that of `contrast`, two names or None."""
    classes = list(facts["classes"])
    maps, logits, probabilities = (values[0] for values in predict_with_maps(network, facts, [photo]))
    tiles = []
    for k in probabilities.topk(min(top, len(classes))).indices.tolist():
        text = f"{printable(classes[k])} {probabilities[k]:.1%}\nlogit {signed(logits[k], 1)}"
        tiles.append(Tile(photo, maps[k], text))
    if contrast:
        a, b = (classes.index(name) for name in contrast)
        text = printable(f"{classes[a]} minus {classes[b]}\nlogits {signed(logits[a] - logits[b], 1)}")
        tiles.append(Tile(photo, contrast_map(maps[None], a, b)[0], text))
    return tiles


def explain(photos, models, looks, top, contrast, scale, dpi, out):
    """For each photo one picture, with a row for each network: the photo, beside it the maps of the top classes."""
    import data

    if not photos:
        raise CamError("explain needs a photo: python cam.py explain photo.jpg")
    paths, named = photo_files(photos), Path(out).suffix.lower() in {".pdf", *Image.registered_extensions()}
    if named and len(paths) > 1:
        raise CamError(f"{out} is one picture for {len(paths)} photos: name a folder with --out")
    if named:
        check_picture_name(out)
    loaded, runs = load_once(models or ["runs/cnn/best.pt"], looks)
    if len(set(check_classes(contrast or (), loaded[0][1]["classes"]))) == 1:
        raise CamError(f"--contrast {contrast[0]} with itself shows nothing: name two classes")
    outs = [Path(out) if named else Path(out) / f"{path.stem[:100]}-{runs}.png" for path in paths]
    for i, target in enumerate(outs):  # photos of the same name from several folders
        number = 1
        while outs[i] in outs[:i]:
            number += 1
            outs[i] = target.with_stem(f"{target.stem}-{number}")
        check_picture_name(outs[i])
    for path, target in zip(paths, outs, strict=True):
        photo, block = torch.from_numpy(data.decode(path)), []
        for network, facts in loaded:
            tiles = top_tiles(network, facts, photo, top, contrast)
            first = None if block else Tile(photo, above=printable(path.stem))
            shared = scale_of(torch.stack([tile.cells for tile in tiles])) if scale == "row" else None
            tiles = tiles if shared else [tile._replace(above=tile.above + own_scale(tile.cells)) for tile in tiles]
            block.append(Strip([first, *tiles], describe(facts), shared))
        finish(draw([block], "", dpi), target, f"Class activation maps, in logits, of {path.name}", loaded)


@torch.no_grad()
def gallery(model, looks, folder, count, per_class, columns, scale, dpi, out):
    """The most confident mistakes on val: where did the network look for what it said, and for what was there?"""
    import data

    check_picture_name(out)
    ((network, facts),) = loaded = load_models([model], parse_looks(looks))
    val = data.load(data.prepare(folder), "val").relabelled(facts["classes"])
    probabilities = torch.cat([network(x).softmax(1) for x, _ in data.eval_batches(val, facts["size"], 32)])
    confidence, predicted = probabilities.max(1)
    mistakes = (predicted != val.labels).nonzero()[:, 0]
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)]
    if per_class:  # of each true class the worst
        mistakes = torch.cat([mistakes[val.labels[mistakes] == k][:1] for k in range(len(val.classes))])
    mistakes = mistakes[:count]
    if not len(mistakes):
        return print(f"{model} makes no mistake on val: there is nothing to show")
    photos, labels = [val[i] for i in mistakes], val.labels[mistakes]
    titles, (maps, *_) = [val.classes[k] for k in labels], predict_with_maps(network, facts, photos)
    shown = probabilities[mistakes]
    rows = [row_of(f"{describe(facts)}; the map of what it says", maps, facts, predicted[mistakes], shown, titles),
            row_of("the map of what is there", maps, facts, labels, shown, titles)]
    legend = "Above: what is there; below: the class that is mapped, and how probable the network finds it."
    picture = compose(photos, titles, rows, columns, scale, legend, dpi)
    finish(picture, out, "The most confident mistakes on val, and class activation maps, in logits", loaded)


def whole_number(least, most=2**31):
    """An argparse type: a whole number from `least` to `most`."""
    def parse(text):
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return int(text)

    parse.__name__ = "int"  # what argparse calls it where it is none
    return parse


def parse_command_line(arguments):
    """The function of the command, figure, explain or gallery, and its arguments by name."""
    parser = argparse.ArgumentParser(description="Where did the network look? Maps and pictures.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, about, out):
        it = commands.add_parser(run.__name__, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        it.add_argument("--out", default=out, help="the picture, .png or .pdf")
        it.add_argument("--dpi", type=whole_number(30, 1200), default=300, help="pixels of an inch, 16 cm wide")
        it.add_argument("--scale", choices=("row", "photo"), default="row", help="maps share a scale by row, or do not")
        add_looks_option(it)
        it.set_defaults(run=run)
        return it.add_argument

    add = command(figure, "photos, and under them the maps of each network", "figures/figure.png")
    both = ["runs/resnet18/best.pt", "runs/cnn/best.pt"]
    add("--models", nargs="+", default=both, help="checkpoints, a row of maps for each")
    add("--data", dest="folder", default="data/imagenette2-160", help="folder or archive of photos in class folders")
    add("--classes", nargs="+", help="which classes to show of val, in this order")
    add("--images", nargs="+", help="photos of your own, folders or quoted patterns, instead of val")
    add("--titles", nargs="+", help="a title for each of --images")
    add("--truth", nargs="+", help="what is there: a class for each of --images, or one for all")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="chooses the photos out of val")
    add("--columns", type=whole_number(1, 10), default=10, help="photos side by side; more go on below")
    add = command(explain, "the top classes of any photo, or of a folder of them", "figures")
    add("photos", nargs="*", help="photos, folders or quoted patterns")
    add("--model", dest="models", action="append", help="checkpoint (runs/cnn/best.pt); repeat it to compare")
    add("--top", type=whole_number(1, 10), default=3, help="classes to show")
    add("--contrast", nargs=2, metavar=("A", "B"), help="two classes: also show what speaks for A and against B")
    add = command(gallery, "the most confident mistakes on val", "figures/gallery.png")
    add("--model", default="runs/cnn/best.pt", help="checkpoint")
    add("--data", dest="folder", default="data/imagenette2-160", help="folder or archive of photos in class folders")
    add("--count", type=whole_number(1, MOST_PHOTOS), default=10, help="mistakes to show")
    add("--per-class", action="store_true", help="the worst of each class, instead of the worst of all")
    add("--columns", type=whole_number(1, 10), default=10, help="photos side by side; more go on below")
    named = vars(parser.parse_args(arguments))
    del named["command"]
    return named.pop("run"), named


def main(arguments=None):
    """The command line."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what a terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    run, named = parse_command_line(arguments)
    try:
        import data
        import models
    except ModuleNotFoundError as error:
        print(f"cam.py: {error.name}.py is missing: the commands need data.py and models.py beside cam.py, whose "
              "functions alone work without", file=sys.stderr)
        sys.exit(2)
    try:
        run(**named)
    except (CamError, data.DataError, models.ModelError, OSError) as error:
        print(f"cam.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("cam.py: interrupted, nothing is left half-written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
