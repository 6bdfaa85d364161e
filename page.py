"""Pages of photos, maps and texts, drawn with PIL. Copy cam.py and files.py with it.

    picture = page.compose([photo], ["my photo"], [page.Row("ResNet-18", maps[:, k], ["tench"])])
    page.save_picture(picture, "cam.pdf")                            # 16 cm wide

A page is made of blocks, a block of strips, a strip of tiles: photos and maps, with their texts.
font: a file of letters that Pillow's own font lacks, such as fonts.py finds.
"""

import math
import re
import unicodedata
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

import files
from cam import as_photo, oklab_to_srgb, outline, overlay, scale_of

TEXT_COLOUR, WRONG = (50, 50, 50), (196, 30, 30)

# Sizes on paper, in points (1/72 inch).
PAGE_WIDTH = 16 / 2.54 * 72  # of the text on an A4 page: a picture is as wide, or less
TEXT_SIZE = 7
GAP, TALLEST = 4, 200  # between photos; the tallest of them
BAR_WIDTH, BAR_HEIGHT = 84, 9  # of the colour bar
LINE, RIM, FRAME = 0.6, 1.4, 1.2  # around a region, with its light rim; around a mistake

FAINT = 1 / 4  # of the end of its scale: a map that stays below has no line
BESIDE = 3  # maps beside one photo; more are shown below it

PICTURES = (".png", ".pdf")  # the suffixes of what can be written
MOST_CLASSES = 50  # in a confusion picture
SPELT = str.maketrans({  # letters that have no accent to take away
    "ß": "ss", "ẞ": "SS", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae", "Æ": "AE", "œ": "oe",
    "Œ": "OE", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ħ": "h", "Ħ": "H",
    "ı": "i", "ŧ": "t", "Ŧ": "T", "ŋ": "n", "Ŋ": "N", "–": "-", "—": "-"})


class Paper:
    """A page of `dpi` pixels per inch: lengths on it in pixels, and the font of all its texts."""

    def __init__(self, dpi, font=None):
        self.point = dpi / 72
        self.width, self.gap = round(PAGE_WIDTH * self.point), round(GAP * self.point)
        size = TEXT_SIZE * self.point
        self.font = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
        self.line = round(1.25 * TEXT_SIZE * self.point)
        self.has = known_letters(self.font)

    def length(self, text):
        """The width of a text in one line, px."""
        return math.ceil(self.font.getlength(text)) + 1


def blank(width, height):
    """A white image, to be drawn on."""
    return Image.new("RGB", (width, height), "white")


def above_each_other(images, gap):
    """Images one below the other, `gap` px apart, from the left."""
    *tops, end = accumulate((image.height + gap for image in images), initial=0)
    page = blank(max(image.width for image in images), end - gap)
    for image, y in zip(images, tops, strict=True):
        page.paste(image, (0, y))
    return page


def side_by_side(images, gap, bottom=False):
    """Images beside each other, `gap` px apart, their tops or their bottoms at one height."""
    *lefts, end = accumulate((image.width + gap for image in images), initial=0)
    page = blank(end - gap, max(image.height for image in images))
    for image, x in zip(images, lefts, strict=True):
        page.paste(image, (x, page.height - image.height if bottom else 0))
    return page


def known_letters(font):
    """letter -> whether a font has it: else it draws what it draws for all that it lacks."""
    missing = bytes(font.getmask("\U0010ffff"))
    return lambda letter: letter.isspace() or bytes(font.getmask(letter)) != missing


def spelt(text, has=str.isascii):
    """`text` in letters that a font `has`, without accents if need be; others are "?"."""
    letters = []
    for letter in unicodedata.normalize("NFC", text):
        if has(letter):
            letters.append(letter)
            continue
        plain = unicodedata.normalize("NFKD", letter.translate(SPELT))
        letters += [c if has(c) else "?" for c in plain if not unicodedata.combining(c)]
    return "".join(letters)


def printable(text, has=str.isascii):
    """`spelt`, with spaces in place of "_", where a line may break."""
    return spelt(text.replace("_", " "), has)


def signed(value, scale):
    """`value` with its sign, with the decimals that show three digits of `scale`."""
    decimals = max(0, 2 - math.floor(math.log10(scale)))
    return f"{round(float(value), decimals) + 0.0:+.{decimals}f}"


def wrap(text, width, paper):
    """`text` in lines of at most `width` px. Only a word longer than a line is cut."""
    lines = []
    for paragraph in text.split("\n"):
        words = re.findall(r"\S+?(?:(?<=\w)-(?=\w)|\s+|$)", paragraph)  # "fine-", "tuned ", "head"
        lines.append("")
        for word in words:
            for part in [word] if paper.length(word.rstrip()) <= width else word:
                if lines[-1] and paper.length((lines[-1] + part).rstrip()) > width:
                    lines.append("")
                lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


def draw_text(text, width, paper, colour=TEXT_COLOUR, centred=False):
    """A text in lines of at most `width` px: an image of that width."""
    lines = wrap(text, width, paper)
    image = blank(width, len(lines) * paper.line)
    x, anchor = (width / 2, "ma") if centred else (0, "la")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((x, i * paper.line), line, colour, paper.font, anchor)
    return image


# ---------------------------------------------------------------- a page


class Tile(NamedTuple):
    """A photo, or a map over it, with a text above or below."""
    photo: torch.Tensor  # (H, W, 3) uint8
    text: str = ""
    class_map: torch.Tensor = None  # (h, w), in logits
    scale: float = None  # its end, in logits
    wrong: bool = False  # framed, in the colour of mistakes
    both: bool = False  # a line around what it takes, too


class Strip(NamedTuple):
    """Tiles side by side, below a heading with the colour bar of their maps."""
    tiles: list  # of Tile, or of None where a place stays empty
    heading: str = ""
    text_above: bool = False  # the tiles, not below them

    def spelt(self, has):
        """The strip with texts in letters that a font `has`."""
        tiles = [tile and tile._replace(text=printable(tile.text, has)) for tile in self.tiles]
        return self._replace(tiles=tiles, heading=spelt(self.heading, has))


def lay_out(block, columns, paper):
    """The widths of a block's columns and the height of its photos, px. columns: of full blocks."""
    part = (paper.width - paper.gap * (columns - 1)) // columns
    texts = [[tile.text if tile else "" for tile in strip.tiles] for strip in block]
    # A column is no narrower than its longest word, up to an equal part of the page.
    words = [min(max(map(paper.length, " ".join(column).split()), default=1), part)
             for column in zip(*texts, strict=True)]
    aspects = [tile.photo.shape[1] / tile.photo.shape[0] for tile in block[0].tiles]
    widest = min(2 * median(aspects), part)  # a panorama, shown lower, makes the others no smaller
    for height in range(round(TALLEST * paper.point), 0, -1):
        widths = [math.ceil(max(min(aspect, widest) * height, word))
                  for aspect, word in zip(aspects, words, strict=True)]
        if sum(widths) <= part * len(widths):
            break
    return widths, height


def faint(class_map, scale):
    """Whether all that a map adds is so little that a line around it would say too much."""
    return 0 < class_map.max() < FAINT * scale


def draw_tile(tile, width, height, text_above, paper):
    """A tile in a column of `width` px, its photo as large as `height` px allow, and its text."""
    if tile is None:
        return blank(width, 1)
    h, w = tile.photo.shape[:2]
    share = min(width / w, height / h)
    size = max(1, round(w * share)), max(1, round(h * share))
    image = Image.fromarray(tile.photo.numpy()).resize(size, Image.Resampling.LANCZOS)
    if tile.class_map is not None:
        pixels = overlay(image, tile.class_map, tile.scale)
        for side in [tile.class_map, -tile.class_map][: 1 + tile.both]:
            if not faint(side, tile.scale):
                pixels = outline(pixels, side, LINE * paper.point, RIM * paper.point)
        image = Image.fromarray(pixels.numpy())
    if tile.wrong:
        edges, frame = (0, 0, size[0] - 1, size[1] - 1), max(2, round(FRAME * paper.point))
        ImageDraw.Draw(image).rectangle(edges, outline=WRONG, width=frame)
    shown = blank(width, height)
    shown.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    text = draw_text(tile.text, width, paper, WRONG if tile.wrong else TEXT_COLOUR, centred=True)
    return above_each_other([text, shown] if text_above else [shown, text], paper.gap // 2)


def draw_colour_bar(end, maps, paper, room=math.inf):
    """The scale with -end, 0 and end written into it, arrowheads where maps go beyond, the unit.

    room: px, at most as wide as that."""
    height, unit = round(BAR_HEIGHT * paper.point), paper.length("logits")
    width = min(round(BAR_WIDTH * paper.point), room - 2 * height - unit)
    grey = torch.full((height, width, 3), 128, dtype=torch.uint8)
    bar = Image.fromarray(overlay(grey, torch.linspace(-1, 1, width)[None], 1).numpy())
    left, right, mid = height, height + width - 1, (height - 1) / 2  # room for the arrowheads
    image = blank(width + 2 * height, height)
    image.paste(bar, (left, 0))
    pen, tip, inset = ImageDraw.Draw(image), 2 / 3 * height, 0.2 * height
    if min(class_map.min() for class_map in maps) < -end:
        pen.polygon([(left, 0), (left, height), (left - tip, mid)], bar.getpixel((0, 0)))
    if max(class_map.max() for class_map in maps) > end:
        pen.polygon([(right, 0), (right, height), (right + tip, mid)], bar.getpixel((width - 1, 0)))
    pen.text((left + inset, mid), signed(-end, end), "black", paper.font, "lm")
    pen.text(((left + right) / 2, mid), "0", "black", paper.font, "mm")
    pen.text((right - inset, mid), signed(end, end), "black", paper.font, "rm")
    return side_by_side([image, draw_text("logits", unit, paper, "black")], 0)


def draw_strip(strip, widths, height, page_width, paper):
    """A strip: tiles in columns of `widths` px, above them its heading and its colour bar."""
    tiles = [draw_tile(tile, width, height, strip.text_above, paper)
             for tile, width in zip(strip.tiles, widths, strict=True)]
    row = side_by_side(tiles, paper.gap, bottom=strip.text_above)  # the photos at one height
    if not strip.heading:
        return row
    mapped = [tile for tile in strip.tiles if tile and tile.class_map is not None]
    if len({tile.scale for tile in mapped}) == 1:
        maps = [tile.class_map for tile in mapped]
        scale = draw_colour_bar(mapped[0].scale, maps, paper, page_width)
    else:
        own = "each map on its own scale (±), in logits"
        scale = draw_text(own, paper.length(own), paper, "black")
    room = page_width - scale.width - paper.gap
    if room < paper.width // 5:  # a strip that is one of several side by side
        heading = draw_text(strip.heading, page_width, paper, "black")
        return above_each_other([heading, scale, row], paper.gap // 2)
    heading = draw_text(strip.heading, room, paper, "black")
    return above_each_other([side_by_side([heading, scale], paper.gap), row], paper.gap // 2)


def draw_beside(strips, paper):
    """Strips of one tile each, side by side in equal columns, the photos at one height."""
    part = (paper.width - paper.gap * (len(strips) - 1)) // len(strips)
    joined = Strip([tile for strip in strips for tile in strip.tiles])
    _, height = lay_out([joined], len(strips), paper)
    drawn = [draw_strip(strip, [part], height, part, paper) for strip in strips]
    return side_by_side(drawn, paper.gap, bottom=True)


def draw_blocks(blocks, paper):
    """Blocks, lists of `Strip`: an image of each, all of one width."""
    layouts = [lay_out(block, len(blocks[0][0].tiles), paper) for block in blocks]
    width = max(sum(widths) + paper.gap * (len(widths) - 1) for widths, _ in layouts)
    width = max(width, paper.width // 2)  # of the headings
    return [above_each_other([draw_strip(strip, widths, height, width, paper) for strip in block],
                             2 * paper.gap)
            for block, (widths, height) in zip(blocks, layouts, strict=True)]


def draw_page(blocks, legend, dpi, font=None, beside=False):
    """Blocks, lists of `Strip`, above a legend: a picture, 16 cm wide or less, that has its dpi.

    beside: there is one block, of strips of one tile each, which are drawn side by side.
    """
    paper = Paper(dpi, font)
    blocks = [[strip.spelt(paper.has) for strip in block] for block in blocks]
    drawn = [draw_beside(blocks[0], paper)] if beside else draw_blocks(blocks, paper)
    mapped = [tile for block in blocks for strip in block for tile in strip.tiles
              if tile and tile.class_map is not None]
    colours = "Orange adds to the logit, blue takes from it; line: half of a map's maximum."
    if any(faint(tile.class_map, tile.scale) for tile in mapped):
        colours += f" A map whose maximum is below {FAINT:.0%} of its scale has no line."
    if any(tile.both for tile in mapped):
        colours += " A difference has a line at half of its minimum, too."
    width = max(image.width for image in drawn)
    drawn.append(draw_text(f"{colours} {printable(legend, paper.has)}", width, paper))
    picture = above_each_other(drawn, 3 * paper.gap)
    picture.info["dpi"] = (dpi, dpi)
    return picture


class Row(NamedTuple):
    """What one network says of N photos."""
    label: str
    maps: torch.Tensor  # (N, h, w), in logits, of the class that is named under each photo
    captions: list  # N of str
    right: list = None  # N of bool, or of None where the truth is unknown


def shared_end(row, scale):
    """The end, in logits, of the scale that a `Row`'s maps share; None where each has its own.
    scale: as of `compose`."""
    if scale == "photo":
        return None
    return scale_of(row.maps) if scale == "row" else scale


def map_tiles(photos, row, scale):
    """A `Row`'s maps over its photos. scale: as of `compose`."""
    shared, tiles = shared_end(row, scale), []
    rights = row.right or [None] * len(photos)
    for photo, class_map, text, right in zip(photos, row.maps, row.captions, rights, strict=True):
        end = shared or scale_of(class_map)
        own = "" if shared else f" ±{signed(end, end)[1:]}"
        tiles.append(Tile(photo, text + own, class_map, end, wrong=right is False))
    return tiles


def lie_beside(photos, rows, columns):
    """Whether `compose` lays maps beside a photo, not below it."""
    return len(photos) == 1 < len(rows) <= min(BESIDE, columns - 1)


def compose(photos, titles, rows, columns=10, scale="row", legend="", dpi=300, font=None):
    """The figure: N photos under N titles, then each `Row`'s maps over them; a PIL image.

    More than `columns` photos go on in further blocks; of one photo, the maps of two or three rows
    lie beside it. scale: "row", one for all maps of a row; its end, in logits, where all rows share
    it; or "photo", each its own, written into its caption.
    """
    if isinstance(rows, Row):
        raise ValueError("rows are a list: compose(photos, titles, [row])")
    counts = [len(titles), *(len(part) for row in rows for part in row[1:] if part is not None)]
    if not len(photos) or {*counts} != {len(photos)}:
        raise ValueError(f"{len(photos)} photos need as many titles, and in each row as many maps "
                         f"and captions, not {', '.join(map(str, counts))}")
    photos = [as_photo(photo) for photo in photos]
    beside = lie_beside(photos, rows, columns)
    titled = [Tile(photo, title) for photo, title in zip(photos, titles, strict=True)]
    strips = [Strip(titled, text_above=True)]
    strips += [Strip(map_tiles(photos, row, scale), row.label, beside) for row in rows]
    blocks = [[strip._replace(tiles=strip.tiles[first : first + columns]) for strip in strips]
              for first in range(0, len(photos), columns)]
    return draw_page(blocks, legend, dpi, font, beside)


# ---------------------------------------------------------------- the confusion picture


def confusion_cells(matrix, shares, side, paper):
    """The cells of a confusion picture, `side` px each, with their counts where there is room."""
    right = torch.eye(len(matrix), dtype=torch.bool)[..., None]  # grey; mistakes are red
    deepest = torch.where(right, torch.tensor([0.7, 0, 0]), torch.tensor([0.6, 0.17, 0.08]))
    lab = torch.lerp(torch.tensor([0.97, 0, 0]), deepest, shares.sqrt()[..., None])
    cells = (oklab_to_srgb(lab) * 255).round().to(torch.uint8)
    pixels = cells.repeat_interleave(side, 0).repeat_interleave(side, 1)
    for line in range(max(1, round(paper.point / 4))):  # a white grid
        pixels[line::side] = pixels[:, line::side] = 255
    image = Image.fromarray(pixels.numpy())
    if max(paper.line, paper.length(str(int(matrix.max())))) < side:
        for y, x in matrix.nonzero().tolist():
            middle = ((x + 0.5) * side, (y + 0.5) * side)
            ImageDraw.Draw(image).text(middle, str(int(matrix[y, x])), "black", paper.font, "mm")
    return image


def confusion_picture(matrix, classes, title, dpi=300, font=None):
    """Counts (K, K), rows what is there, columns what the network says, as a PIL image."""
    paper, matrix = Paper(dpi, font), torch.as_tensor(matrix).cpu()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    if len(classes) > MOST_CLASSES:  # those with the most mistakes are shown
        mistakes = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diag()
        kept = mistakes.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
        title += f" (the {MOST_CLASSES} of {len(classes)} classes with the most mistakes)"
        matrix, shares = matrix[kept][:, kept], shares[kept][:, kept]
        classes = [classes[i] for i in kept]
    first_lines = [(wrap(printable(name, paper.has), paper.width // 4, paper) or ["?"])[0]
                   for name in classes]
    margin = max(map(paper.length, first_lines)) + paper.gap
    side = min((paper.width - margin) // len(classes), round(48 * paper.point))
    rows, columns = (blank(margin, side * len(classes)) for _ in range(2))
    for i, name in enumerate(first_lines):
        for names, x, anchor in ((rows, margin - paper.gap, "rm"), (columns, paper.gap, "lm")):
            ImageDraw.Draw(names).text((x, (i + 0.5) * side), name, TEXT_COLOUR, paper.font, anchor)
    above = side_by_side([blank(margin, margin), columns.rotate(90, expand=True)], 0)
    below = side_by_side([rows, confusion_cells(matrix, shares, side, paper)], 0)
    width = max(margin + side * len(classes), paper.width // 2)
    heading = draw_text(spelt(title, paper.has), width, paper, "black")
    foot = draw_text("Rows: what is there; columns: what the network says; the deeper, the larger "
                     "the share of the row.", width, paper)
    picture = above_each_other([heading, above_each_other([above, below], 0), foot], paper.gap)
    picture.info["dpi"] = (dpi, dpi)
    return picture


def check_picture_name(path, kinds=PICTURES, option="--out"):
    """Raise ValueError, before any work, for a name under which no picture can be written.
    option: which names it."""
    path = Path(path)
    if path.suffix.lower() not in kinds:
        listed = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
        raise ValueError(f"{path} cannot be written: name a file that ends in {listed}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, {path / f'figure{kinds[0]}'}")
    files.check_place(path, option)


def save_picture(image, path):
    """Write a PIL image as .png or .pdf, whole or not at all, by its dpi, or 16 cm wide."""
    check_picture_name(path)
    path = Path(path)
    dpi = image.info.get("dpi", (image.width / PAGE_WIDTH * 72,))[0]
    if path.suffix.lower() == ".pdf" and image.height > 65_500:  # of the JPEG in it
        raise ValueError(f"{path} cannot be written, {image.height:,} px are more than a PDF "
                         "takes: use a smaller --dpi, more --columns, or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path) as file:  # quality: of the JPEG
        image.save(file, path.suffix[1:].upper(), dpi=(dpi, dpi), quality=95, subsampling=0)
