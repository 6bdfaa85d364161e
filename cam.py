"""Where did the network look? Class activation maps (Zhou et al. 2016), exact and in logits, and their pictures.

    python cam.py figure --models runs/resnet18/best.pt runs/cnn/best.pt      a photo of each class, two networks
    python cam.py explain photo.jpg --model runs/cnn/best.pt                  the top classes of any photo
    python cam.py gallery --model runs/cnn/best.pt                            the most confident mistakes

In code, for a network that is features -> global average pooling -> one linear layer:

    features = network.features(images)                             # (N, C, h, w)
    maps = cam.class_activation_maps(features, network.head.weight) # (N, K, h, w), in logits
    pixels = cam.upsample(maps[:, 3], (160, 160))                   # (N, 160, 160)

The mean of a class's map plus its bias *is* its logit, so a cell of the map, divided by the number of cells, is what
that place adds to the class's score (orange in the pictures) or takes from it (blue). Copy this file alone and its
functions work, on maps of any device, with or without gradients; the commands want data.py and models.py beside it.
"""

import argparse
import glob
import math
import os
import re
import sys
import textwrap
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
SCALE_QUANTILE = 0.98  # of the |values| of a row's cells: the end of its scale, which the strongest exceed
TEXT_COLOUR, WRONG = (50, 50, 50), (196, 30, 30)

# Sizes on paper, in points (1/72 inch).
PAGE_WIDTH = 16 / 2.54 * 72  # of the text on an A4 page: a picture is as wide, or less
TEXT_SIZE = 7
GAP = 4  # between photos
BAR_WIDTH, BAR_HEIGHT = 84, 9  # of the colour bar
LINE, RIM, FRAME = 0.6, 1.4, 1.2  # the line around a region, with its light rim; the frame of a mistake
TALLEST = 200  # a photo is no higher

PICTURES = (".png", ".pdf")  # the suffixes of what can be written
MOST_PHOTOS, MOST_CLASSES = 100, 50  # in a figure, in a confusion picture
LIMITS = {"dpi": (30, 1200), "columns": (1, 10), "top": (1, 10), "count": (1, MOST_PHOTOS), "seed": (0, 2**63 - 1)}


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
        maps = class_activation_maps(features, self.network.head.weight)
        return maps, self.network.head(features.mean((2, 3)))


def check_identity(maps, logits, bias):
    """Raise CamError unless logits = mean of the map + bias: only then do the maps explain the logits."""
    error = (maps.mean((2, 3)) + bias - logits).detach().abs().max()  # NaN is refused too
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


def as_tensor(values):
    """A tensor or array as a tensor on the CPU, without its gradient. An array is copied, for torch takes none that is
    read-only, or turned round like OpenCV's photos in RGB, photo[..., ::-1]."""
    values = values.copy() if isinstance(values, np.ndarray) else values
    return torch.as_tensor(values).detach().cpu()


def as_photo(photo):
    """A PIL image, or an array or tensor (H, W), (H, W, 3) or (3, H, W) of uint8 or of floats in 0..1, as a tensor
    (H, W, 3) uint8 on the CPU. Raises CamError."""
    if isinstance(photo, Image.Image):
        photo = np.array(photo.convert("RGB"))
    photo = as_tensor(photo)
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


def as_map(class_map):
    """A map as float32 on the CPU, without its gradient: all that a picture needs of it."""
    return as_tensor(class_map).float()


def overlay(photo, class_map, scale):
    """A map (h, w), in logits, over a photo (see `as_photo`): (H, W, 3) uint8 of the photo's size.

    The photo, in grey, gives the lightness; the map gives hue (its sign) and colourfulness, which grows in
    proportion to it: none at 0, full at `scale`. So zero is grey, and equal steps in logits look equal.
    """
    photo = as_photo(photo)
    value = (upsample(as_map(class_map)[None], photo.shape[:2])[0] / float(scale)).clamp(-1, 1)
    strength = value.abs()
    hue = torch.deg2rad(torch.where(value > 0, HUES["adds"], HUES["takes"]))
    light = 0.38 + 0.52 * lightness(photo)
    light = torch.lerp(light, torch.full_like(light, 0.68), 0.55 * strength)  # colours need a middle lightness
    lab = torch.stack([light, CHROMA * strength * hue.cos(), CHROMA * strength * hue.sin()], -1)
    return (oklab_to_srgb(lab) * 255).round().to(torch.uint8)


def outline(picture, class_map, width=1.0, rim=2.4):
    """A line around the region above half of the map's maximum ("focus" in score.py), on a picture (H, W, 3) uint8.

    Dark, `width` px, in a light rim, `rim` px, to show on everything. Returns a new picture, or, for a map that is
    nowhere positive and so has no such region, the same.
    """
    pixels = upsample(as_map(class_map)[None], picture.shape[:2])[0]  # (H, W)
    if pixels.max() <= 0:
        return picture
    height = pixels - pixels.max() / 2  # above the region's edge
    # To first order the edge is |height| / slope pixels away; the slope is the larger of those to both sides.
    dy, dx = F.pad(height.diff(dim=0).abs(), (0, 0, 1, 1)), F.pad(height.diff(dim=1).abs(), (1, 1))
    slope = torch.hypot(torch.maximum(dy[1:], dy[:-1]), torch.maximum(dx[:, 1:], dx[:, :-1]))
    distance = height.abs() / slope.clamp(min=1e-12)
    # Only pixels that have some of both sides around them: a flat place at half of the maximum is no edge.
    reach = math.ceil((rim + 1) / 2)
    inside, outside = (F.max_pool2d(side[None].float(), 2 * reach + 1, 1, reach)[0] > 0
                       for side in (height > 0, height <= 0))
    distance[~(inside & outside)] = torch.inf
    shown = picture.float()
    for grey, thickness in ((255, rim), (20, width)):
        cover = ((thickness + 1) / 2 - distance).clamp(0, 1)[..., None]  # the share of a pixel under the line
        shown = torch.lerp(shown, torch.full_like(shown, grey), cover)
    return shown.round().to(torch.uint8)


def scale_of(maps):
    """The end, in logits, of the scale that maps of any shape share: a high quantile of their |values|, for one strong
    cell would make all others grey."""
    values = as_map(maps).abs()
    return float(np.quantile(values.numpy(), SCALE_QUANTILE)) or float(values.max()) or 1e-6


# ---------------------------------------------------------------- the page


class Paper:
    """A page of `dpi` pixels per inch: lengths on it in pixels, and the font of all its texts."""

    def __init__(self, dpi):
        self.point = dpi / 72
        self.width, self.gap = round(PAGE_WIDTH * self.point), round(GAP * self.point)
        self.font, self.line = ImageFont.load_default(TEXT_SIZE * self.point), round(1.25 * TEXT_SIZE * self.point)

    def length(self, text):
        """The width of a text in one line, px."""
        return math.ceil(self.font.getlength(text)) + 1


def blank(width, height):
    """A white image, to be drawn on."""
    return Image.new("RGB", (width, height), "white")


def above_each_other(images, gap):
    """Images one below the other, `gap` px apart, beginning at the left."""
    page, y = blank(max(image.width for image in images), sum(image.height + gap for image in images) - gap), 0
    for image in images:
        page.paste(image, (0, y))
        y += image.height + gap
    return page


def side_by_side(images, gap, bottom=False):
    """Images beside each other, `gap` px apart, beginning at one height, or with their bottoms at one height."""
    page, x = blank(sum(image.width + gap for image in images) - gap, max(image.height for image in images)), 0
    for image in images:
        page.paste(image, (x, page.height - image.height if bottom else 0))
        x += image.width + gap
    return page


def printable(text):
    """`text` in characters that Pillow's own font has: without accents, other alphabets as question marks;
    underscores count as spaces."""
    plain = (c for c in unicodedata.normalize("NFKD", text.replace("_", " ")) if not unicodedata.combining(c))
    return "".join(c if c.isascii() else "?" for c in plain)


def signed(value, scale):
    """`value` with its sign, with the decimals that show three digits of `scale`."""
    decimals = max(0, 2 - math.floor(math.log10(scale)))
    return f"{round(float(value), decimals) + 0.0:+.{decimals}f}"


def wrap(text, width, paper):
    """`text` in lines of at most `width` px. A word is broken only where one is longer than a line."""
    for break_words in (False, True):
        for letters in range(len(text), 0, -1):
            lines = [line for paragraph in text.split("\n")
                     for line in textwrap.wrap(paragraph, letters, break_long_words=break_words)]
            if all(paper.length(line) <= width for line in lines):
                return lines
    return []


def draw_text(text, width, paper, colour=TEXT_COLOUR, centred=False):
    """A text in lines of at most `width` px: a PIL image of that width."""
    lines = wrap(text, width, paper)
    image = blank(width, len(lines) * paper.line)
    x, anchor = (width / 2, "ma") if centred else (0, "la")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((x, i * paper.line), line, colour, paper.font, anchor)
    return image


class Tile(NamedTuple):
    """A photo, or a map over it, with a text above or below."""

    photo: torch.Tensor  # (H, W, 3) uint8
    text: str = ""
    class_map: torch.Tensor = None  # (h, w), in logits
    scale: float = None  # its end, in logits
    wrong: bool = False  # framed, in the colour of mistakes


class Strip(NamedTuple):
    """Tiles side by side, below a heading with the colour bar of the scale that their maps share.

    A page is made of blocks, one below the other, and a block of strips, whose tiles stand in the same columns.
    """

    tiles: list  # of Tile, or of None where a place stays empty
    heading: str = ""
    text_above: bool = False  # the tiles, not below them


def lay_out(block, columns, paper):
    """The widths of a block's columns and the one height of its photos, px, as large as the page has room for.

    columns: of a full block; a block with fewer takes its share of the page. A column is no narrower than its longest
    word, as long as that takes no more than an equal part of the page.
    """
    photos = [tile.photo for tile in block[0].tiles]
    aspects = [photo.shape[1] / photo.shape[0] for photo in photos]
    part = (paper.width - paper.gap * (columns - 1)) // columns
    widest = min(2 * median(aspects), part)  # a panorama is shown lower, so that it makes the others no smaller
    texts = zip(*([tile.text if tile else "" for tile in strip.tiles] for strip in block), strict=True)
    words = [min(max(map(paper.length, " ".join(column).split()), default=1), part) for column in texts]

    def widths(height):
        return [math.ceil(max(min(aspect, widest) * height, word)) for aspect, word in zip(aspects, words, strict=True)]

    heights = range(1, round(TALLEST * paper.point) + 1)
    height = max((height for height in heights if sum(widths(height)) <= part * len(photos)), default=1)
    return widths(height), height


def draw_tile(tile, width, height, text_above, paper):
    """A tile in a column of `width` px: the photo, or the map over it with the line around what lies above half of its
    maximum, as large as `height` px allow, and its text."""
    if tile is None:
        return blank(width, 1)
    h, w = tile.photo.shape[:2]
    share = min(width / w, height / h)
    size = max(1, round(w * share)), max(1, round(h * share))
    image = Image.fromarray(tile.photo.numpy()).resize(size, Image.Resampling.LANCZOS)
    if tile.class_map is not None:
        pixels = overlay(image, tile.class_map, tile.scale)
        image = Image.fromarray(outline(pixels, tile.class_map, LINE * paper.point, RIM * paper.point).numpy())
    if tile.wrong:
        edges, frame = (0, 0, image.width - 1, image.height - 1), max(2, round(FRAME * paper.point))
        ImageDraw.Draw(image).rectangle(edges, outline=WRONG, width=frame)
    shown = blank(width, height)
    shown.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    text = draw_text(tile.text, width, paper, WRONG if tile.wrong else TEXT_COLOUR, centred=True)
    return above_each_other([text, shown] if text_above else [shown, text], paper.gap // 2)


def draw_colour_bar(end, maps, paper):
    """The scale from -end to end: both and zero written into it, an arrowhead where maps go beyond, and the unit."""
    width, height = round(BAR_WIDTH * paper.point), round(BAR_HEIGHT * paper.point)
    grey = torch.full((height, width, 3), 128, dtype=torch.uint8)
    bar = Image.fromarray(overlay(grey, torch.linspace(-1, 1, width)[None], 1).numpy())
    left, right, middle = height, height + width - 1, (height - 1) / 2  # room for an arrowhead at each end
    image = blank(width + 2 * height, height)
    image.paste(bar, (left, 0))
    pen, tip, inset = ImageDraw.Draw(image), 2 / 3 * height, 0.2 * height
    if min(class_map.min() for class_map in maps) < -end:
        pen.polygon([(left, 0), (left, height), (left - tip, middle)], bar.getpixel((0, 0)))
    if max(class_map.max() for class_map in maps) > end:
        pen.polygon([(right, 0), (right, height), (right + tip, middle)], bar.getpixel((width - 1, 0)))
    pen.text((left + inset, middle), signed(-end, end), "black", paper.font, "lm")
    pen.text(((left + right) / 2, middle), "0", "black", paper.font, "mm")
    pen.text((right - inset, middle), signed(end, end), "black", paper.font, "rm")
    return side_by_side([image, draw_text("logits", paper.length("logits"), paper, "black")], 0)


def draw_strip(strip, widths, height, page_width, paper):
    """A strip: its tiles in columns of `widths` px, below its heading with the colour bar at the right end."""
    tiles = [draw_tile(tile, width, height, strip.text_above, paper)
             for tile, width in zip(strip.tiles, widths, strict=True)]
    tiles = side_by_side(tiles, paper.gap, bottom=strip.text_above)  # the photos at one height
    if not strip.heading:
        return tiles
    mapped = [tile for tile in strip.tiles if tile and tile.class_map is not None]
    if len({tile.scale for tile in mapped}) == 1:
        scale = draw_colour_bar(mapped[0].scale, [tile.class_map for tile in mapped], paper)
    else:
        own = "each map on its own scale (±), in logits"
        scale = draw_text(own, paper.length(own), paper, "black")
    heading = draw_text(strip.heading, page_width - scale.width - paper.gap, paper, "black")
    return above_each_other([side_by_side([heading, scale], paper.gap), tiles], paper.gap // 2)


def draw_page(blocks, legend, dpi):
    """A picture, at most 16 cm wide, of blocks (see `Strip`) above a legend; a PIL image that knows its dpi."""
    paper = Paper(dpi)
    layouts = [lay_out(block, len(blocks[0][0].tiles), paper) for block in blocks]
    width = max(sum(widths) + paper.gap * (len(widths) - 1) for widths, _ in layouts)
    width = max(width, paper.width // 2)  # of the headings and the legend
    drawn = []
    for block, (widths, height) in zip(blocks, layouts, strict=True):
        strips = [draw_strip(strip, widths, height, width, paper) for strip in block]
        drawn.append(above_each_other(strips, 2 * paper.gap))
    legend = f"Orange adds to the logit, blue takes from it; line: half of a map's maximum. {legend}"
    picture = above_each_other([*drawn, draw_text(legend, width, paper)], 3 * paper.gap)
    picture.info["dpi"] = (dpi, dpi)
    return picture


class Row(NamedTuple):
    """What one network says of N photos."""

    label: str
    maps: torch.Tensor  # (N, h, w), in logits, of the class that is named under each photo
    captions: list  # N of str
    right: list = None  # N of bool, or of None where the truth is unknown


def map_tiles(photos, row, scale):
    """The maps of a `Row` over its photos. scale: "row", the same for all, or "photo", each its own, written below."""
    shared, tiles = scale_of(row.maps), []
    right = row.right or [None] * len(photos)
    for photo, class_map, caption, is_right in zip(photos, row.maps, row.captions, right, strict=True):
        end, text = shared, printable(caption)
        if scale == "photo":
            end = scale_of(class_map)
            text += f" ±{signed(end, end)[1:]}"
        tiles.append(Tile(photo, text, class_map, end, wrong=is_right is False))
    return tiles


def compose(photos, titles, rows, columns=10, scale="row", legend="", dpi=300):
    """The figure: photos under their titles, then each `Row`'s maps over them, captioned; a PIL image.

    photos, titles: N each (see `as_photo`). More than `columns` photos go on in further blocks. The maps of a row
    share one scale, in logits, across all blocks; with scale="photo" each has its own, written into its caption.
    """
    photos = [as_photo(photo) for photo in photos]
    titled = [Tile(photo, printable(title)) for photo, title in zip(photos, titles, strict=True)]
    strips = [Strip(titled, text_above=True)]
    strips += [Strip(map_tiles(photos, row, scale), row.label) for row in rows]
    blocks = [[strip._replace(tiles=strip.tiles[first : first + columns]) for strip in strips]
              for first in range(0, len(photos), columns)]
    return draw_page(blocks, legend, dpi)


# ---------------------------------------------------------------- the confusion picture


def confusion_cells(matrix, shares, side, paper):
    """The cells of a confusion picture, `side` px each: right answers grey, mistakes red, as deep as the square root of
    their share of the row, so that rare ones are seen too, with their counts where there is room."""
    right = torch.eye(len(matrix), dtype=torch.bool)[..., None]
    deepest = torch.where(right, torch.tensor([0.7, 0, 0]), torch.tensor([0.6, 0.17, 0.08]))  # OKLab
    colours = oklab_to_srgb(torch.lerp(torch.tensor([0.97, 0, 0]), deepest, shares.sqrt()[..., None]))
    pixels = (colours * 255).round().to(torch.uint8).repeat_interleave(side, 0).repeat_interleave(side, 1)
    for line in range(max(1, round(paper.point / 4))):  # a white grid
        pixels[line::side] = pixels[:, line::side] = 255
    image = Image.fromarray(pixels.numpy())
    if max(paper.line, paper.length(str(int(matrix.max())))) < side:
        for y, x in matrix.nonzero().tolist():
            middle = ((x + 0.5) * side, (y + 0.5) * side)
            ImageDraw.Draw(image).text(middle, str(int(matrix[y, x])), "black", paper.font, "mm")
    return image


def confusion_picture(matrix, classes, title, dpi=300):
    """How often the network says what: a picture of counts (K, K), rows what is there, columns what it says.

    Of more than 50 classes those 50 with the most mistakes are shown, and the picture says so. Returns a PIL image.
    """
    paper, matrix = Paper(dpi), torch.as_tensor(matrix).cpu()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    if len(classes) > MOST_CLASSES:
        mistakes = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diag()
        kept = mistakes.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
        title += f" (the {MOST_CLASSES} of {len(classes)} classes with the most mistakes)"
        matrix, shares, classes = matrix[kept][:, kept], shares[kept][:, kept], [classes[i] for i in kept]
    names = [(wrap(printable(name), paper.width // 4, paper) or ["?"])[0] for name in classes]  # the first line
    margin = max(map(paper.length, names)) + paper.gap
    side = min((paper.width - margin) // len(names), round(48 * paper.point))
    rows, columns = blank(margin, side * len(names)), blank(margin, side * len(names))
    for i, name in enumerate(names):
        y = (i + 0.5) * side
        ImageDraw.Draw(rows).text((margin - paper.gap, y), name, TEXT_COLOUR, paper.font, "rm")
        ImageDraw.Draw(columns).text((paper.gap, y), name, TEXT_COLOUR, paper.font, "lm")  # to be turned upright
    table = above_each_other([side_by_side([blank(margin, margin), columns.rotate(90, expand=True)], 0),
                              side_by_side([rows, confusion_cells(matrix, shares, side, paper)], 0)], 0)
    width = max(table.width, paper.width // 2)
    notes = "Rows: what is there; columns: what the network says; the deeper, the larger the share of the row."
    title, notes = draw_text(title, width, paper, "black"), draw_text(notes, width, paper)
    picture = above_each_other([title, table, notes], paper.gap)
    picture.info["dpi"] = (dpi, dpi)
    return picture


# ---------------------------------------------------------------- files


def check_picture_name(path):
    """Raise CamError, before any work, for a name under which no picture can be written."""
    path = Path(path)
    if path.suffix.lower() not in PICTURES:
        raise CamError(f"{path} cannot be written: name a picture that ends in .png or .pdf")
    if path.is_dir():
        raise CamError(f"{path} is a folder: name a picture in it, {path / 'figure.png'}")
    if above := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise CamError(f"{path} cannot be written, for {above} is no folder: name another place")


def save_picture(image, path):
    """Write a PIL image as .png or .pdf, whole or not at all, in its size on paper: by its dpi, or 16 cm wide."""
    check_picture_name(path)
    path = Path(path)
    dpi = image.info.get("dpi", (image.width / PAGE_WIDTH * 72,))[0]
    if path.suffix.lower() == ".pdf" and image.height > 65_500:  # of the JPEG in it
        raise CamError(f"{path} cannot be written, {image.height:,} px are more than a PDF takes: use a smaller --dpi, "
                       "more --columns, or .png")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:  # a PDF holds a JPEG, hence the quality
            image.save(file, path.suffix[1:].upper(), dpi=(dpi, dpi), quality=95, subsampling=0)
        os.replace(part, path)
    except OSError as error:  # a full disk names no file of its own accord
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- networks and photos


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

    looks = looks or [None]
    if len(looks) not in (1, len(paths)):
        raise CamError(f"--looks has {len(looks)} lists for {len(paths)} checkpoints: give one, or one for each")
    looks = looks * len(paths) if len(looks) == 1 else looks
    loaded = [models.load(path, looks=sizes) for path, sizes in zip(paths, looks, strict=True)]
    first = set(loaded[0][1]["classes"])
    for path, (network, facts) in zip(paths, loaded, strict=True):
        if missing := {"size", "settings", "accuracy", "how"} - facts.keys():
            raise CamError(f"{path} does not say its {min(missing)}: use a checkpoint of train.py (runs/*/best.pt)")
        own = set(facts["classes"])
        if own != first:
            lacks, has = (", ".join(sorted(names)[:3]) or "none" for names in (first - own, own - first))
            raise CamError(f"{path} knows other classes than {paths[0]} (without {lacks}, ..., but with {has}, ...): "
                           "compare networks of the same classes")
        smallest = min(facts["looks"])
        try:
            with torch.no_grad():
                models.with_looks(network, [smallest])(torch.zeros(1, 3, smallest, smallest))
        except RuntimeError as error:  # it halves photos so often that nothing is left
            raise CamError(f"{path} cannot look at {smallest} x {smallest} px: name larger --looks") from error
    return loaded


def describe(facts):
    """A checkpoint in a line: what it is, how it was trained, at which sizes it looks, how often it is right then."""
    name = f"{facts['arch']}, {facts['how']}, at {', '.join(map(str, facts['looks']))} px"
    if facts["accuracy"] is None:
        return f"{name}: accuracy not measured"
    split = facts.get("accuracy_on") or "val"
    measured = f"{facts['accuracy_n']:,} {split} photos" if facts.get("accuracy_n") else split
    return f"{name}: {facts['accuracy']:.1%} of {measured} right"


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


def check_classes(names, known):
    """`names`, with accents as the classes `known` write them; CamError where one is none of these."""
    names = [unicodedata.normalize("NFC", name) for name in names]
    for name in names:
        if name not in known:
            listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
            raise CamError(f"there is no class {name!r}: the networks know {listed}")
    return names


def one_of_each_class(folder, seed, known, wanted=None):
    """A validation photo of every class, or of the `wanted` ones, the same for the same seed: photos, names.

    known: the classes of the networks, which the data must have; of too many classes the first are shown.
    """
    import data

    val = data.load(data.prepare(folder), "val").relabelled(known)
    generator = torch.Generator().manual_seed(seed)
    names = check_classes(wanted, known) if wanted else known[:MOST_CLASSES]
    if len(names) < len(known) and not wanted:
        print(f"the first {len(names)} of {len(known)} classes are shown: --classes chooses others", file=sys.stderr)
    photos, shown = [], []
    for name in names:
        of_class = (val.labels == known.index(name)).nonzero()[:, 0]
        if len(of_class):
            photos.append(val[int(of_class[torch.randint(len(of_class), (), generator=generator)])])
            shown.append(name)
        elif wanted:
            raise CamError(f"{folder} has no val photo of {name}: choose others with --classes")
        else:
            print(f"{name} is not shown, for there is no val photo of it", file=sys.stderr)
    return photos, shown


def photo_files(names):
    """The photos that `names` stand for, files, folders and patterns, as paths; CamError where there are none."""
    import data

    found = []
    for name in map(str, names):
        if not name:  # again the working folder
            raise CamError("the name of a photo is empty: name a photo, or a folder that has some in it")
        path = Path(name)
        if path.is_file() or not (path.is_dir() or glob.has_magic(name)):
            found.append(path)  # a missing one is refused by name when it is decoded
            continue
        files = [p for p in (path.iterdir() if path.is_dir() else map(Path, glob.glob(name)))
                 if p.is_file() and p.name[0] != "."]
        if unread := {p.suffix for p in files if p.suffix.lower() in data.UNREAD}:
            print(f"{name}: photos in {data.first_names(unread)} are left out: convert them to JPEG", file=sys.stderr)
        inside = sorted(p for p in files if p.suffix.lower() in data.SUFFIXES)
        if not inside:
            raise CamError(f"{name} holds no photo: name a photo, or a folder that has some in it")
        found += inside
    return found


def own_photos(images, titles, truth, known):
    """Photos of one's own, their titles, and what is there where that is known: by `truth`, a class for each photo or
    one for all, or by the name of the folder that a photo lies in."""
    import data

    paths = photo_files(images)
    if len(paths) > MOST_PHOTOS:
        raise CamError(f"--images names {len(paths)} photos, too many for one picture: name at most {MOST_PHOTOS}")
    if truth and len(truth) == 1:
        truth = truth * len(paths)
    for option, given in (("--titles", titles), ("--truth", truth)):
        if given and len(given) != len(paths):
            raise CamError(f"{option} has {len(given)} names for {len(paths)} photos: give one for each")
    if truth:
        truth = check_classes(truth, known)
    else:
        folders = [path.resolve().parent.name for path in paths]
        folders = [unicodedata.normalize("NFC", data.WORDS.get(name, name)) for name in folders]
        truth = [name if name in known else None for name in folders]
    titles = titles or [name or path.stem for path, name in zip(paths, truth, strict=True)]
    return [torch.from_numpy(data.decode(path)) for path in paths], titles, truth


# ---------------------------------------------------------------- commands


def finish(picture, path, what, loaded):
    """Write a picture, and print how LaTeX includes it under a caption that says `what` it shows, of which networks."""
    save_picture(picture, path)
    caption = f"{what}: {'; '.join(describe(facts) for _, facts in loaded)}."
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    caption = caption.translate(str.maketrans(special | {c: f"\\{c}" for c in "&%$#_{}"}))
    width = picture.width / picture.info["dpi"][0] * 2.54
    print(f"{path}\n\\includegraphics[width={width:.1f}cm]{{{Path(path).as_posix()}}}\n\\caption{{{caption}}}")


def row_of(label, maps, facts, labels, probabilities, truth):
    """A `Row` of the maps of the classes `labels` (N,): maps (N, K, h, w), probabilities (N, K), names of the truth."""
    names = [facts["classes"][k] for k in labels]
    photos = range(len(names))
    captions = [f"{names[i]} {probabilities[i, labels[i]]:.0%}" for i in photos]
    right = [None if truth[i] is None else names[i] == truth[i] for i in photos]
    return Row(label, maps[photos, labels], captions, right)


def figure(models, looks, folder, classes, images, titles, truth, seed, columns, scale, dpi, out):
    """Photos in the first row, and under them a row of maps for each network, of the class it predicts."""
    check_picture_name(out)
    if images and classes:
        raise CamError("--classes chooses among the photos of val, and --images names your own: leave one out")
    if not images and (titles or truth):
        raise CamError("--titles and --truth are for photos of your own: name them with --images")
    loaded = load_models(models, parse_looks(looks))
    known = list(loaded[0][1]["classes"])
    if images:
        photos, titles, truth = own_photos(images, titles, truth, known)
    else:
        photos, titles = one_of_each_class(folder, seed, known, classes)
        truth = titles
    rows = []
    for network, facts in loaded:
        maps, _, probabilities = predict_with_maps(network, facts, photos)
        rows.append(row_of(describe(facts), maps, facts, probabilities.argmax(1), probabilities, truth))
    if len(photos) > columns:
        print(f"{len(photos)} photos go into blocks of {columns}", file=sys.stderr)
    legend = f"Above: {'what is there' if titles == truth else 'the photo'}; below: the prediction"
    legend += ", in red where it is wrong." if any(False in row.right for row in rows) else "."
    picture = compose(photos, titles, rows, columns, scale, legend, dpi)
    finish(picture, out, "Class activation maps, in logits, of the class that each network predicts", loaded)


def top_classes(network, facts, photo, top, contrast):
    """A `Row` of one photo: the maps of the `top` most probable classes, then that of `contrast`, two names or None."""
    classes = list(facts["classes"])
    maps, logits, probabilities = (values[0] for values in predict_with_maps(network, facts, [photo]))
    best = probabilities.topk(min(top, len(classes))).indices.tolist()
    shown = maps[best]
    captions = [f"{classes[k]} {probabilities[k]:.1%}\nlogit {signed(logits[k], 1)}" for k in best]
    if contrast:
        a, b = (classes.index(name) for name in contrast)
        shown = torch.cat([shown, contrast_map(maps[None], a, b)])
        captions.append(f"{classes[a]} minus {classes[b]}\nlogits {signed(logits[a] - logits[b], 1)}")
    return Row(describe(facts), shown, captions)


def explanation_names(photos, models, more, out):
    """Where the picture of each of `photos`, paths, goes: `out` itself, or, where it is a folder's name, in there,
    named after the photo, the runs of `models` and the words `more`."""
    suffix = Path(out).suffix.lower()
    if suffix in PICTURES or suffix and not Path(out).is_dir():  # a folder that is there may be called photos.2026
        if len(photos) > 1:
            raise CamError(f"{out} is one picture for {len(photos)} photos: name a folder with --out")
        names = [Path(out)]
    else:
        shown = "-".join([*(Path(model).resolve().parent.name for model in models), *more])
        stems = [f"{os.fsencode(photo.stem)[:100].decode(errors='ignore')}-{shown}" for photo in photos]
        numbers = [stems[:i].count(stem) + 1 for i, stem in enumerate(stems)]  # of the same name in several folders
        names = [Path(out, f"{stem}-{number}.png" if number > 1 else f"{stem}.png")
                 for stem, number in zip(stems, numbers, strict=True)]
    for name in names:
        check_picture_name(name)
    return names


def explain(photos, models, looks, top, contrast, scale, dpi, out):
    """For each photo one picture, with a row for each network: the photo, beside it the maps of the top classes."""
    import data

    if not photos:
        raise CamError("explain needs a photo: python cam.py explain photo.jpg")
    paths, models = photo_files(photos), models or ["runs/cnn/best.pt"]
    names = explanation_names(paths, models, [re.sub(r"\W+", "-", name) for name in contrast or ()], out)
    loaded = load_models(models, parse_looks(looks))
    contrast = contrast and check_classes(contrast, loaded[0][1]["classes"])
    if contrast and contrast[0] == contrast[1]:
        raise CamError(f"--contrast {contrast[0]} with itself shows nothing: name two classes")
    for path, name in zip(paths, names, strict=True):
        photo, block = torch.from_numpy(data.decode(path)), []
        for network, facts in loaded:
            row = top_classes(network, facts, photo, top, contrast)
            original = None if block else Tile(photo, printable(path.stem))
            tiles = map_tiles([photo] * len(row.captions), row, scale)
            block.append(Strip([original, *tiles], row.label, text_above=True))
        legend = f"Last map: orange speaks for {contrast[0]}, blue for {contrast[1]}." if contrast else ""
        page = draw_page([block], printable(legend), dpi)
        finish(page, name, f"Class activation maps, in logits, of {path.name}", loaded)


@torch.no_grad()
def gallery(model, looks, folder, count, columns, scale, dpi, out):
    """The most confident mistakes on val: where did the network look for what it said, and for what was there?"""
    import data

    check_picture_name(out)
    ((network, facts),) = loaded = load_models([model], parse_looks(looks))
    val = data.load(data.prepare(folder), "val").relabelled(facts["classes"])
    probabilities = torch.cat([network(x).softmax(1) for x, _ in data.eval_batches(val, facts["size"], 32)])
    confidence, predicted = probabilities.max(1)
    mistakes = (predicted != val.labels).nonzero()[:, 0]
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)][:count]
    if not len(mistakes):
        return print(f"{model} makes no mistake on val: there is nothing to show")
    photos, labels = [val[i] for i in mistakes], val.labels[mistakes]
    titles, probabilities = [val.classes[k] for k in labels], probabilities[mistakes]
    maps, *_ = predict_with_maps(network, facts, photos)
    said = f"{describe(facts)}; the map of what it says"
    rows = [row_of(said, maps, facts, predicted[mistakes], probabilities, titles),
            row_of("the map of what is there", maps, facts, labels, probabilities, titles)]
    legend = "Above: what is there; below: the class of the map, with its probability."
    picture = compose(photos, titles, rows, columns, scale, legend, dpi)
    finish(picture, out, "The most confident mistakes on val, and class activation maps, in logits", loaded)


def parse_command_line(arguments):
    """The function of the command, figure, explain or gallery, and its arguments by name."""
    parser = argparse.ArgumentParser(description="Where did the network look? Maps and pictures.")
    commands = parser.add_subparsers(required=True)

    def add_command(run, about, out):
        """Add a command that calls `run`, with the options that all have; returns what adds those of its own."""
        command = commands.add_parser(run.__name__, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        command.add_argument("--out", default=out, help="the picture, .png or .pdf; for explain a folder too")
        command.add_argument("--dpi", type=int, default=300, help="pixels of an inch; a picture is 16 cm wide")
        command.add_argument("--scale", choices=("row", "photo"), default="row", help="of a row's maps, or of each map")
        add_looks_option(command)
        if run is not explain:
            command.add_argument("--data", dest="folder", default="data/imagenette2-160",
                                 help="folder or archive of photos in class folders")
            command.add_argument("--columns", type=int, default=10, help="photos side by side; more go on below")
        return command.add_argument

    add = add_command(figure, "photos, and under them the maps of each network", "figures/figure.png")
    add("--models", nargs="+", default=["runs/resnet18/best.pt", "runs/cnn/best.pt"],
        help="checkpoints, a row of maps for each")
    add("--classes", nargs="+", help="which classes to show of val, in this order")
    add("--images", nargs="+", help="photos of your own, folders or quoted patterns, instead of those of val")
    add("--titles", nargs="+", help="a title for each of --images")
    add("--truth", nargs="+", help="what is there: a class for each of --images, or one for all")
    add("--seed", type=int, default=0, help="chooses the photos out of val")
    add = add_command(explain, "the top classes of any photo, or of a folder of them", "figures")
    add("photos", nargs="*", help="photos, folders or quoted patterns")
    add("--model", dest="models", action="append", help="checkpoint (runs/cnn/best.pt); repeat it to compare")
    add("--top", type=int, default=3, help="classes to show")
    add("--contrast", nargs=2, metavar=("A", "B"), help="two classes: also show what speaks for A and against B")
    add = add_command(gallery, "the most confident mistakes on val", "figures/gallery.png")
    add("--model", default="runs/cnn/best.pt", help="checkpoint")
    add("--count", type=int, default=10, help="mistakes to show")
    named = vars(parser.parse_args(arguments))
    if not named["out"]:  # of a variable that is not set, perhaps; as a path it would be the working folder
        parser.error("--out is empty: name a picture, or leave it out")
    for option, (least, most) in LIMITS.items():
        if not least <= named.get(option, least) <= most:
            parser.error(f"--{option} {named[option]} is not between {least} and {most}")
    return named.pop("run"), named


def main(arguments=None):
    """The command line."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a file's name may hold what a terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    run, named = parse_command_line(arguments)
    try:
        import data
        import models

        run(**named)
    except KeyboardInterrupt:
        print("cam.py: interrupted, nothing is left half-written", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        print(f"cam.py: {error.name}.py is missing: the commands need data.py and models.py beside cam.py, whose "
              "functions alone work without", file=sys.stderr)
        sys.exit(2)
    except (CamError, data.DataError, models.ModelError, OSError) as error:
        print(f"cam.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not models.out_of_memory(error):
            raise
        print(f"cam.py: not enough memory ({error!r:.100}): use smaller --looks or --dpi, or more --columns",
              file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
