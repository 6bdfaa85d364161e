"""Draw the demo data set: ten ImageNette classes as small stylised photos, to try all offline.

    python tests/demo.py FOLDER                         60 photos per class to train, 20 to val
    python tests/demo.py FOLDER --train 6 --val 2       a handful

FOLDER then looks like ImageNette-160 (train/<wnid>/*.JPEG, val/<wnid>/*.JPEG), with the true box of
every object in localization.txt and the size of every photo in image_sizes.txt. A photo's random
numbers come from (seed, split, class, index): same seed, same bytes, however many photos. 800 take
10 seconds on one CPU core.
"""

import argparse
import colorsys
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import files

SHORT = (128, 176)      # shortest side of a photo, pixels
OBJECT = (0.42, 0.73)   # longest side of the object's box, in shortest sides of the photo
TILT = 15               # an object is turned by up to this many degrees, either way
CANVAS = 480            # an object is painted on a canvas this wide, pixels, then made smaller
UNIT = CANVAS / 130     # pixels; an object is 100 units wide, and tilted, its corners need room
GRAIN = 4               # standard deviation of the noise over the whole photo, grey levels of 255
DARK, WHITE = (42, 42, 47), (248, 248, 244)


def near(rng, hue, saturation, value):
    """A colour (red, green, blue), 0 to 255, close to this one: for what has a natural colour."""
    h = (hue + rng.normal(0, 0.02)) % 1
    s = min(saturation * rng.uniform(0.75, 1.2), 1)
    v = min(value * rng.uniform(0.8, 1.15), 1)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h, s, v))


def paint(rng):
    """Any strong colour: for what people paint."""
    return near(rng, rng.random(), 0.7, 0.75)


def shade(colour, k):
    """Darker (k down to -1, black) or lighter (k up to 1, white)."""
    return tuple(round(c + abs(k) * ((255 if k > 0 else 0) - c)) for c in colour)


def arc(x, y, rx, ry=None, start=0, stop=360):
    """33 points (x, y) on an ellipse, from `start` to `stop` degrees, clockwise from the right."""
    t = np.radians(np.linspace(start, stop, 33))
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


class Canvas:
    """100 x 100 units on a transparent image, x right, y down, tilted, and mirrored half of the
    time.

    Each method paints any number of shapes in one colour; a shape is a row of numbers, x, y, x, y,
    ...
    """

    def __init__(self, rng):
        self.image = Image.new("RGBA", (CANVAS, CANVAS))
        self.pen = ImageDraw.Draw(self.image)
        a, mirror = np.radians(rng.uniform(-TILT, TILT)), rng.choice([-1, 1])
        self.turn = UNIT * np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * (mirror, 1)

    def pixels(self, shape):
        return ((np.reshape(shape, (-1, 2)) - 50) @ self.turn + CANVAS / 2).ravel().tolist()

    def poly(self, colour, *shapes):
        for shape in shapes:
            self.pen.polygon(self.pixels(shape), fill=colour)

    def blob(self, colour, *shapes):
        """Polygons with their corners cut, three times over: smooth curves (Chaikin)."""
        for shape in shapes:
            for _ in range(3):
                p = np.reshape(shape, (-1, 2))
                q = np.roll(p, -1, 0)
                shape = np.stack([0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q], 1)
            self.poly(colour, shape)

    def oval(self, colour, *shapes):
        """Each x, y, radius; or x, y and two radii."""
        self.poly(colour, *(arc(*shape) for shape in shapes))

    def box(self, colour, radius, *shapes):
        """Rectangles x0, y0, x1, y1 with rounded corners."""
        for x0, y0, x1, y1 in np.add(shapes, (radius, radius, -radius, -radius)):
            corners = [(x1, y1, 0), (x0, y1, 90), (x0, y0, 180), (x1, y0, 270)]
            rounded = [arc(x, y, radius, radius, a, a + 90) for x, y, a in corners]
            self.poly(colour, np.concatenate(rounded))

    def line(self, colour, width, *shapes):
        """Lines with round ends and joints."""
        r = width * UNIT / 2
        for xy in map(self.pixels, shapes):
            self.pen.line(xy, fill=colour, width=round(2 * r), joint="curve")
            for x, y in (xy[:2], xy[-2:]):
                self.pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


# ---------------------------------------------------------------- the objects
# Each is painted from back to front on a Canvas c.


def tench(c, rng):
    skin = near(rng, 0.14, 0.6, 0.55)
    fin = shade(skin, -0.35)
    c.blob(fin, (20, 52, 0, 20, 9, 50, 0, 82), (38, 40, 47, 13, 66, 20, 72, 40),
           (28, 60, 27, 84, 42, 66, 52, 68, 50, 92, 66, 70))
    c.blob(skin, (10, 44, 34, 34, 55, 20, 85, 28, 104, 53, 82, 74, 50, 80, 30, 66, 10, 57))
    c.blob(shade(skin, 0.4), (20, 57, 45, 62, 70, 62, 95, 58, 80, 72, 50, 78, 30, 65))
    scales = [(28 + 8 * x + 4 * (y % 2), 40 + 7 * y) for x in range(5) for y in range(3)]
    c.line(fin, 1, *(arc(x, y, 3, 3.5, -70, 70) for x, y in scales))
    c.line(fin, 1.8, arc(68, 50, 7, 17, -65, 65), (98, 56, 91, 58))
    c.blob(fin, (70, 56, 52, 56, 50, 68, 62, 68))
    c.oval(WHITE, (85, 43, 4.5))
    c.oval(DARK, (86, 43, 2.5))


def english_springer(c, rng):
    white, brown = near(rng, 0.1, 0.06, 0.97), near(rng, 0.05, 0.65, rng.uniform(0.3, 0.5))
    c.blob(brown, (70, 90, 96, 86, 98, 66, 88, 74, 70, 78))
    c.blob(white, (36, 40, 64, 40, 82, 70, 84, 100, 16, 100, 18, 70))
    c.oval(brown, (20, 84, 11, 15), (80, 84, 11, 15))
    c.oval(shade(white, -0.18), (20, 95.5, 12, 4.5), (80, 95.5, 12, 4.5))
    c.line(shade(white, -0.18), 1.3, (41, 92, 41, 97), (50, 74, 50, 97), (59, 92, 59, 97))
    c.blob(shade(white, 0.5), (36, 45, 64, 45, 70, 66, 50, 78, 30, 66))
    c.blob(brown, (30, 2, 70, 2, 78, 30, 62, 54, 38, 54, 22, 30))
    c.blob(white, (46, 0, 54, 0, 56, 26, 70, 40, 60, 56, 40, 56, 30, 40, 44, 26))
    c.blob(shade(brown, -0.3), (66, 6, 80, 4, 92, 30, 90, 56, 76, 56, 72, 30),
           (34, 6, 20, 4, 8, 30, 10, 56, 24, 56, 28, 30))
    c.oval(DARK, (38, 24, 4), (62, 24, 4))
    c.oval(WHITE, (39, 22.8, 1.2), (63, 22.8, 1.2))
    c.blob(DARK, (41, 36, 59, 36, 50, 47))
    c.line(DARK, 1.4, arc(50, 44, 7, 5, 20, 160))


def cassette_player(c, rng):
    body = paint(rng)
    c.line(DARK, 5, (12, 30, 12, 12, 88, 12, 88, 30))
    c.box(shade(body, -0.35), 6, (0, 20, 100, 86))
    c.box(body, 5, (1.5, 21.5, 98.5, 83))
    c.box(DARK, 1.5, *((x, 25, x + 13, 33) for x in range(6, 90, 15)))
    c.box(WHITE, 1.5, *((x, 25, x + 13, 31) for x in range(21, 90, 15)))
    c.box((200, 50, 45), 1.5, (6, 25, 19, 31))
    c.box(DARK, 3, (6, 37, 94, 79))
    c.box(near(rng, 0.12, 0.2, 0.92), 3, (12, 41, 88, 75))
    c.box(paint(rng), 0, (12, 45, 88, 49))
    c.box((70, 62, 60), 9, (20, 52, 80, 71))
    c.oval(WHITE, (31, 61.5, 8.5), (69, 61.5, 8.5))
    c.oval(DARK, (31, 61.5, 5), (69, 61.5, 5))
    c.oval(WHITE, *((*xy, 1) for x in (31, 69) for xy in arc(x, 61.5, 4.2)[::5]))


def chain_saw(c, rng):
    body, steel = paint(rng), near(rng, 0.6, 0.06, 0.82)
    c.box(DARK, 0, *((x, 46.5, x + 2.5, 67.5) for x in range(46, 97, 5)))
    c.box(DARK, 8, (36, 49, 100, 65))
    c.box(steel, 5.5, (36, 51.5, 97.5, 62.5))
    c.line(shade(steel, -0.3), 2.5, (56, 57, 86, 57))
    c.line(DARK, 5, (10, 46, 3, 52, 3, 70, 14, 74), (22, 46, 24, 26, 42, 24, 46, 50),
           (50, 27, 53, 46))
    c.blob(body, (6, 40, 30, 34, 50, 42, 54, 56, 50, 76, 8, 78))
    c.blob(shade(body, -0.45), (8, 70, 52, 68, 50, 77, 8, 79))
    c.oval(shade(body, -0.5), (28, 57, 11))
    c.line(shade(body, 0.3), 1.4, *((x, 50, x, 64) for x in (21, 24.5, 28, 31.5, 35)))


def church(c, rng):
    wall, roof = near(rng, 0.1, 0.2, 0.9), near(rng, rng.choice([0.02, 0.6]), 0.5, 0.5)
    glass = near(rng, 0.58, 0.55, 0.4)
    c.box(shade(wall, -0.15), 0, (30, 62, 98, 100))
    c.box(glass, 4, (52, 72, 60, 92), (68, 72, 76, 92), (84, 72, 92, 92))
    c.poly(roof, (30, 42, 86, 42, 100, 66, 30, 66))
    c.box(wall, 0, (8, 42, 42, 100))
    c.poly(roof, (4, 44, 25, 44, 25, 10))
    c.poly(shade(roof, -0.25), (46, 44, 25, 44, 25, 10))
    c.line(DARK, 2.4, (25, 10, 25, 1), (20.5, 4, 29.5, 4))
    c.oval(glass, (25, 56, 6.5))
    c.line(WHITE, 1.4, (25, 52, 25, 56, 28, 58))
    c.poly(near(rng, 0.06, 0.6, 0.35), (*arc(25, 81, 7, 7, 180, 360), (32, 98), (18, 98)))
    c.box(shade(wall, -0.4), 0, (0, 97, 100, 102))


def french_horn(c, rng):
    brass = near(rng, 0.12, 0.65, 0.85)
    valves = [(6.5, (x, 36, x, 54)) for x in (30, 40, 50)]
    for width, tube in [(5, (20, 20, 2, 8)), (7, arc(40, 44, 32)), (6, arc(40, 44, 20)), *valves]:
        for part, k in ((1, -0.45), (0.7, 0), (0.2, 0.6)):              # dark edges, brass, a light
            c.line(shade(brass, k), part * width, tube)
    c.poly(shade(brass, -0.45),
           (36, 72.5, 56, 71.5, 72, 65, 86, 50, 86, 102, 72, 87, 56, 80.5, 36, 79.5))
    c.poly(brass, (36, 74.5, 56, 73.5, 72, 67, 86, 52, 86, 100, 72, 85, 56, 78.5, 36, 77.5))
    c.poly(shade(brass, 0.5), (36, 75, 58, 74.2, 74, 69, 83, 61, 74, 72, 58, 76))
    for x, rx, ry, k in ((87, 11, 28, -0.5), (87, 9.5, 26, 0.3), (86, 6.5, 21, -0.3),
                         (84.5, 3, 11, -0.75)):
        c.oval(shade(brass, k), (x, 76, rx, ry))


def garbage_truck(c, rng):
    body, cab = paint(rng), paint(rng)
    c.box(DARK, 2, (6, 66, 98, 76))
    c.poly(shade(body, -0.35), (16, 16, 0, 40, 2, 62, 12, 74, 18, 74))
    c.poly(DARK, (9, 32, 1, 42, 3, 60, 11, 60))
    c.oval((84, 86, 94), (7, 54, 6, 7))
    c.box(body, 5, (12, 16, 67, 70))
    c.box(shade(body, -0.3), 0, (12, 62, 67, 70))
    for a in (0, 120, 240):                                             # recycling arrows
        c.line(WHITE, 4.5, arc(39.5, 39, 13, 13, a, a + 65))
        c.poly(WHITE, [arc(39.5, 39, r, r, a + b)[0] for r, b in ((13, 105), (19, 62), (7, 62))])
    c.poly(cab, (69, 28, 88, 28, 97, 50, 100, 54, 100, 72, 69, 72))
    c.poly(near(rng, 0.56, 0.3, 0.9), (74, 33, 86, 33, 93, 50, 74, 50))
    c.oval((255, 240, 170), (96.5, 62, 2.5, 3.5))
    for r, colour in ((10.5, DARK), (5.5, (190, 190, 195)), (2, DARK)):
        c.oval(colour, (24, 76, r), (46, 76, r), (83, 76, r))


def gas_pump(c, rng):
    body = paint(rng)
    c.line(DARK, 4.5, np.concatenate(
        [[(68, 62), (77, 64)], arc(84, 82, 7, 9, 180, 0), [(91, 50), (88, 30)]]))
    c.blob(DARK, (70, 14, 82, 14, 95, 28, 95, 44, 83, 44, 82, 28))
    c.box(shade(body, -0.4), 2, (66, 13, 76, 24))
    c.box(shade(body, -0.2), 6, (16, 0, 70, 97))
    c.box(body, 6, (16, 0, 65, 97))
    c.box(WHITE, 3, (21, 8, 60, 40))
    c.box(DARK, 1, (24.5, 13, 56.5, 23), (24.5, 26, 56.5, 36))
    c.box((120, 240, 150), 0, *((x, y, x + 3, y + 5)
                                for x in (28, 35.5, 43, 50.5) for y in (15.5, 28.5)))
    c.oval(WHITE, (40.5, 70, 13))
    c.poly(WHITE, (40.5, 48, 51.5, 64, 29.5, 64))
    c.box(DARK, 2, (10, 94, 76, 100))


def golf_ball(c, rng):
    white, start = near(rng, rng.random(), 0.04, 0.98), rng.uniform(0, 2 * np.pi)
    if rng.random() < 0.5:                                              # a tee
        c.poly(paint(rng), (34, 84, 66, 84, 55, 92, 50, 110, 45, 92))
    for k in range(12):
        c.oval(shade(white, 0.024 * k - 0.28), (50 - 0.6 * k, 45 - 0.8 * k, 45 - 2.5 * k))
    for k in range(64):                                                 # dimples on a spiral
        z, a = 1 - (k + 0.5) / 70, start + 2.39996 * k
        out = np.array([np.cos(a), np.sin(a)])
        dimple = arc(0, 0, 4 * z, 4) @ [out, (-out[1], out[0])]
        centre = 45 * np.sqrt(1 - z * z) * out
        c.poly(shade(white, -0.36), dimple + centre + (50, 45))
        c.poly(shade(white, -0.14), 0.85 * dimple + centre + (50.7, 45.7))


def parachute(c, rng):
    colours, suit = (paint(rng), near(rng, 0.1, 0.06, 0.96)), paint(rng)
    seams = np.sin(np.radians(np.linspace(-90, 90, 8)))
    c.line(WHITE, 0.9, *((50 + 48 * u, 44, 50 + 3 * u, 84) for u in seams))
    for k in range(7):
        u, v = seams[k:k + 2]
        left, right = arc(50, 45, 48 * u, 42, 0, -90), arc(50, 45, 48 * v, 42, -90, 0)
        hem = arc(50 + 24 * (u + v), 45, 24 * (v - u), 5, 360, 180)
        c.poly(shade(colours[k % 2], -0.06 * k), np.concatenate([right, hem, left]))
    c.line(suit, 2.8, (50, 87, 55, 82, 53, 76), (50, 87, 45, 82, 47, 76))
    c.line(shade(suit, -0.4), 3.4, (50, 92, 53, 102), (50, 92, 47, 102))
    c.line(suit, 6.5, (50, 87, 50, 93))
    c.oval((232, 190, 150), (50, 81, 3.4, 3.8))


OBJECTS = {"n01440764": tench, "n02102040": english_springer, "n02979186": cassette_player,
           "n03000684": chain_saw, "n03028079": church, "n03394916": french_horn,
           "n03417042": garbage_truck, "n03425413": gas_pump, "n03445777": golf_ball,
           "n03888257": parachute}


# ---------------------------------------------------------------- photos of them


def background(width, height, rng):
    """Sky and ground, blurred clutter in related colours, a few sharp plain shapes of no class."""
    hue = rng.random() + rng.normal(0, 0.12, 6)
    colours = [near(rng, h, rng.uniform(0.08, 0.42), rng.uniform(0.4, 0.95)) for h in hue]
    ramp = np.linspace(colours[0], colours[1], 32)                      # top to bottom, (32, 3)
    if rng.random() < 0.6:
        ramp[rng.integers(10, 24):] = colours[2]                        # below the horizon
    image = Image.fromarray(ramp.astype(np.uint8)[:, None]).resize((width // 2, height // 2))
    disc, triangle = np.arange(0, 360, 10), (0, 120, 240)
    square, bar = (0, 90, 180, 270), (0, 12, 180, 192)
    for count, largest, strength in ((rng.integers(12, 22), 0.2, 0.6),
                                     (rng.integers(2, 6), 0.07, 0.85)):
        empty, pen = image.copy(), ImageDraw.Draw(image)
        for kind, colour in rng.integers((4, 6), size=(count, 2)):
            t = np.radians(np.add((disc, triangle, square, bar)[kind], rng.uniform(0, 360)))
            radius = image.width * rng.uniform(0.02, largest)
            corners = radius * np.stack([np.cos(t), np.sin(t)], 1) + rng.uniform(0, image.size)
            pen.polygon(corners.ravel().tolist(), fill=colours[colour])
        image = Image.blend(empty, image, strength)
        if image.width < width:                                         # blur, go on at 4 x
            image = image.filter(ImageFilter.BoxBlur(2)).resize((2 * width, 2 * height),
                                                                Image.BICUBIC)
    return image.reduce(2)


def draw_photo(wnid, rng):
    """One photo of class `wnid`, an RGB image, and the box (x0, y0, x1, y1) around its object,
    pixels.

    As in ImageNet's own lists, (x0, y0) is the first pixel of the object and (x1, y1) the last:
    x1 < width.
    """
    short = int(rng.integers(SHORT[0], SHORT[1] + 1))
    width, height = rng.permutation([short, int(short * rng.uniform(1, 4 / 3))]).tolist()
    photo, canvas = background(width, height, rng), Canvas(rng)
    OBJECTS[wnid](canvas, rng)
    x0, y0, x1, y1 = canvas.image.getbbox()
    side = round(CANVAS * rng.uniform(*OBJECT) * short / max(x1 - x0, y1 - y0))
    sprite = canvas.image.resize((side, side), Image.LANCZOS)
    mask = sprite.getchannel("A").point(lambda a: a if a > 31 else 0)   # without LANCZOS's halo
    sprite, mask = sprite.crop(mask.getbbox()), mask.crop(mask.getbbox())
    w, h = mask.size
    room = (width - w, height - h)
    x, y = np.rint(rng.beta(0.5, 0.5, 2) * room).astype(int).tolist()   # edges more often
    photo.paste(sprite, (x, y), mask)
    grain = GRAIN * rng.standard_normal((height, width, 1), np.float32)
    photo = Image.fromarray((np.asarray(photo) + grain).clip(0, 255).astype(np.uint8))
    return photo, (x, y, x + w - 1, y + h - 1)


# ---------------------------------------------------------------- the folder


def draw(folder, train=60, val=20, seed=0):
    """Draw `train` and `val` photos per class into a new `folder`, all of it or nothing; `seed` is
    0 or more.

    A folder that holds exactly these photos is left as it is; any other that exists is a
    FileExistsError.
    """
    folder, recipe = Path(folder), json.dumps({"train": train, "val": val, "seed": seed})
    if min(train, val, seed) < 0:
        raise ValueError(f"the numbers of photos and the seed must be 0 or more, not {recipe}")
    if folder.exists():
        record = folder / "demo.json"
        if not record.is_file() or record.read_text() != recipe:
            raise FileExistsError(f"{folder} exists and holds something else: delete it or name "
                                  "another")
        print(f"{folder} holds these photos already")
        return
    files.make_writable(folder.parent, "name a folder elsewhere")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, boxes, sizes = Path(scratch, "demo"), [], []
        for s, (split, count) in enumerate([("train", train), ("val", val)]):
            for c, wnid in enumerate(OBJECTS):
                (new / split / wnid).mkdir(parents=True)
                for i in range(count):
                    photo, box = draw_photo(wnid, np.random.default_rng([seed, s, c, i]))
                    name = f"{wnid}_{split[0]}{i:04d}.JPEG"
                    photo.save(new / split / wnid / name, quality=88)
                    boxes.append(f"val/{name},{','.join(map(str, box))}\n")  # "val/" for both
                    sizes.append(f"val/{name},{photo.width},{photo.height}\n")
        (new / "localization.txt").write_text("".join(boxes), newline="\n")
        (new / "image_sizes.txt").write_text("".join(sizes), newline="\n")
        (new / "demo.json").write_text(recipe)
        files.replace(new, folder)
    print(f"{folder}: {len(boxes)} photos of {len(OBJECTS)} classes")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Draw the demo data set: small stylised photos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("folder", type=files.path, help="where to write it: a folder that is not there yet")
    add("--train", type=int, default=60, help="training photos per class")
    add("--val", type=int, default=20, help="validation photos per class")
    add("--seed", type=int, default=0, help="of all random numbers")
    options = parser.parse_args()
    files.run_command(draw, options.folder, options.train, options.val, options.seed)


if __name__ == "__main__":
    main()
