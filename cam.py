"""Where did the network look? Class activation maps (Zhou et al. 2016), exact and in logits, and their pictures.

    python cam.py figure --models runs/resnet18/best.pt runs/cnn/best.pt      ten photos, two networks, one picture
    python cam.py explain photo.jpg --model runs/cnn/best.pt                  the top classes of any photo

In code, for a network that is features -> global average pooling -> one linear layer:

    features = network.features(images)                             # (N, C, h, w)
    maps = cam.class_activation_maps(features, network.head.weight) # (N, K, h, w), in logits
    pixels = cam.upsample(maps[:, 3], (160, 160))                   # (N, 160, 160)

The mean of a class's map plus its bias *is* its logit, so a cell of the map says how much that place added to
the class's score (orange in the pictures) or took from it (blue). Copy this file alone and its functions work; the
commands want data.py and models.py beside it.
"""

import argparse
import math
import sys
from pathlib import Path
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
RIGHT, WRONG = (60, 60, 60), (196, 30, 30)


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
    """Why class a and not b? maps (N, K, h, w) -> (N, h, w), in logits: the mean is the two logits' difference, less
    that of their biases."""
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
    to_lms = torch.tensor([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
                           [1, -0.0894841775, -1.2914855480]])  # fmt: skip
    to_rgb = torch.tensor([[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
                           [-0.0041960863, -0.7034186147, 1.7076147010]])  # fmt: skip
    linear = ((lab @ to_lms.T) ** 3 @ to_rgb.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lightness(photo):
    """OKLab's lightness, 0..1, of a photo (H, W, 3) uint8 seen in grey."""
    rgb = photo.float() / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return (linear @ torch.tensor([0.2126, 0.7152, 0.0722])) ** (1 / 3)


def overlay(photo, pixels, scale):
    """The map `pixels` (H, W), in logits, over `photo` (H, W, 3) uint8: an image of the same size and type.

    The photo, in grey, gives the lightness; the map gives hue (its sign) and colourfulness, which grows in
    proportion to it: none at 0, full at `scale`. So zero is grey, and equal steps in logits look equal.
    """
    value = (pixels / scale).clamp(-1, 1)
    strength = value.abs()
    hue = torch.deg2rad(torch.where(value > 0, HUES["adds"], HUES["takes"]))
    light = 0.38 + 0.52 * lightness(photo)
    light = torch.lerp(light, torch.full_like(light, 0.68), 0.55 * strength)  # colours need a middle lightness
    lab = torch.stack([light, CHROMA * strength * hue.cos(), CHROMA * strength * hue.sin()], -1)
    return (oklab_to_srgb(lab) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------- pictures


class Row(NamedTuple):
    """What one network says of the photos."""

    label: str  # one line
    maps: torch.Tensor  # (N, h, w), in logits, of the class that is named under each photo
    captions: list  # N of str
    right: list  # N of bool, or of None where the truth is unknown


def font(size):
    return ImageFont.load_default(size)


def wrap(text, width, face):
    """`text` in lines of at most `width` px, broken at spaces, or within a word that alone is too long."""
    lines = [""]
    for word in text.split():
        if face.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if face.getlength(lines[-1] + letter) > width else []
            lines[-1] += letter
    return "\n".join(lines)


def fit(photo, tile):
    """The largest size (height, width) of `photo`'s aspect in a square of `tile` px."""
    h, w = photo.shape[:2]
    return max(1, round(h * tile / max(h, w))), max(1, round(w * tile / max(h, w)))


def resize(photo, size):
    """photo (H, W, 3) uint8 at `size` (height, width), antialiased."""
    image = Image.fromarray(photo.cpu().numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))


def number(value, scale):
    """`value` signed, with the decimals that show three digits of `scale`."""
    return f"{value:+.{max(0, 2 - math.floor(math.log10(scale)))}f}" if value else "0"


def colour_bar(canvas, left, top, width, height, scale, face):
    """The signed scale of a row: grey is nothing, orange adds to the score, blue takes from it."""
    ramp = torch.linspace(1, -1, height)[:, None].expand(height, width) * scale
    bar = overlay(torch.full((height, width, 3), 128, dtype=torch.uint8), ramp, scale)
    canvas.paste(Image.fromarray(bar.numpy()), (left, top))
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((left, top, left + width - 1, top + height - 1), outline="black")
    for share, anchor in ((1, "la"), (0, "lm"), (-1, "ld")):  # the ends stay inside
        y = top + (height - 1) * (1 - share) / 2
        pen.line((left + width, y, left + width + 6, y), "black", 2)
        pen.text((left + width + 10, y), number(share * scale, scale), "black", face, anchor=anchor)


def compose(photos, titles, rows, tile=224):
    """The figure: photos (each (H, W, 3) uint8) under their titles, then each `Row`'s maps over them, captioned.

    The maps of a row share one signed scale, in logits, shown by its colour bar. Text is 0.15 tiles high: with ten
    photos, over 6 points where the figure is printed across an A4 page. Returns a PIL image.
    """
    gap, face = tile // 20, font(round(tile * 0.15))
    line, bar = round(face.size * 1.25), tile // 10
    titles = [wrap(title, tile, face) for title in titles]
    captions = [[wrap(caption, tile, face) for caption in row.captions] for row in rows]
    scales = [max(float(row.maps.abs().max()), 1e-6) for row in rows]

    def lines(texts):
        return max(text.count("\n") + 1 for text in texts)

    beside = bar + 10 + math.ceil(max(face.getlength(number(end, abs(end))) for s in scales for end in (s, -s)))
    width = gap + len(photos) * (tile + gap) + max(beside, math.ceil(face.getlength("logits"))) + gap
    width = max(width, math.ceil(max(face.getlength(row.label) for row in rows)) + 2 * gap)
    heights = [gap + line + tile + gap + line * lines(texts) + gap for texts in captions]
    canvas = Image.new("RGB", (width, gap + line * lines(titles) + tile + gap + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    sizes = [fit(photo, tile) for photo in photos]
    shown = [resize(photo, size) for photo, size in zip(photos, sizes, strict=True)]
    columns = [gap + i * (tile + gap) for i in range(len(photos))]

    def paste(pixels, i, y):
        h, w = pixels.shape[:2]
        x, y = columns[i] + (tile - w) // 2, y + (tile - h) // 2
        canvas.paste(Image.fromarray(pixels.numpy()), (x, y))
        return x, y, x + w - 1, y + h - 1

    y = gap + line * lines(titles)
    for i, (title, photo) in enumerate(zip(titles, shown, strict=True)):
        pen.text((columns[i] + tile / 2, y - gap / 2), title, "black", face, anchor="md", align="center")
        paste(photo, i, y)
    y += tile + gap
    for row, texts, height, scale in zip(rows, captions, heights, scales, strict=True):
        pen.text((gap, y + gap), row.label, "black", face)
        top = y + gap + line
        for i, text in enumerate(texts):
            frame = paste(overlay(shown[i], upsample(row.maps[i : i + 1], sizes[i])[0], scale), i, top)
            if row.right[i] is False:
                pen.rectangle(frame, outline=WRONG, width=max(2, tile // 40))
            colour = WRONG if row.right[i] is False else RIGHT
            pen.text((columns[i] + tile / 2, top + tile + gap / 2), text, colour, face, anchor="ma", align="center")
        colour_bar(canvas, columns[-1] + tile + gap, top, bar, tile, scale, face)
        pen.text((columns[-1] + tile + gap, top + tile + gap / 2), "logits", "black", face)
        y += height
    return canvas


# ---------------------------------------------------------------- commands


def save_png(image, path):
    """Write a PIL image so that it appears whole or not at all."""
    import data

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with data.atomic(path) as file:
        image.save(file, "PNG", optimize=True)


@torch.no_grad()
def look(network, facts, photos):
    """What the network says of `photos`, a list of (H, W, 3) uint8, each seen whole, resized to facts["size"]:
    maps (N, K, h, w), logits (N, K), probabilities (N, K)."""
    import data

    seen, explained = [], MapsAndLogits(network)
    for photo in photos:  # one by one: sizes differ, and a photo can be large
        ((images, _),) = data.eval_batches(data.from_arrays([photo]), facts["size"], 1)
        seen.append((explained(images)[0], network(images)))
    maps, logits = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
    check_identity(maps, logits, network.head.bias)
    return maps, logits, logits.softmax(1)


def load_models(paths):
    """The checkpoints of `paths`, all of the same classes: [(network, facts), ...]."""
    import models

    loaded = [models.load(path) for path in paths]
    for path, (_, facts) in zip(paths, loaded, strict=True):
        if missing := {"size", "settings", "accuracy"} - facts.keys():
            raise CamError(f"{path} does not say its {min(missing)}: use a checkpoint of train.py (runs/*/best.pt)")
        if list(facts["classes"]) != list(loaded[0][1]["classes"]):
            raise CamError(f"{path} knows other classes than {paths[0]}: compare networks of the same classes")
    return loaded


def describe(facts):
    """A checkpoint in a line: what it is, how it was trained, how often it is right."""
    how = "only its last layer trained" if facts["settings"].get("frozen") else "every layer trained"
    return f"{facts['arch']}, {how}: {facts['accuracy']:.1%} of val right"


def one_of_each_class(folder, seed):
    """A validation photo of every class, the same for the same seed: [(path, class name), ...]."""
    import data

    paths = data.check(data.prepare(folder))["val"]
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for wnid, name in data.CLASSES.items():
        of_class = [p for p in paths if Path(p).parent.name == wnid]
        chosen.append((of_class[torch.randint(len(of_class), (), generator=generator)], name))
    return chosen


def figure(options):
    """Photos in the first row, and under them a row of maps for each network, of the class it predicts."""
    import data

    loaded = load_models(options.models)
    classes = loaded[0][1]["classes"]
    if options.images:
        chosen = [(path, data.CLASSES.get(Path(path).parent.name)) for path in options.images]
    else:
        chosen = one_of_each_class(options.data, options.seed)
    photos = [torch.from_numpy(data.decode(path)) for path, _ in chosen]
    rows = []
    for network, facts in loaded:
        maps, _, probabilities = look(network, facts, photos)
        best = probabilities.argmax(1)
        captions = [f"{classes[k]} {p:.0%}" for k, p in zip(best, probabilities.amax(1), strict=True)]
        right = [None if truth is None else classes[k] == truth for k, (_, truth) in zip(best, chosen, strict=True)]
        rows.append(Row(describe(facts), maps[range(len(photos)), best], captions, right))
    titles = [truth or Path(path).name for path, truth in chosen]
    save_png(compose(photos, titles, rows, options.tile), options.out)
    print(options.out)


def explain(options):
    """For each photo one picture: the maps of the network's top classes under it, on one scale."""
    import data

    ((network, facts),) = load_models([options.model])
    classes, bias = facts["classes"], network.head.bias.detach()
    for name in options.contrast or ():
        if name not in classes:
            raise CamError(f"there is no class {name!r}: {options.model} knows {', '.join(classes)}")
    paths = [Path(p) for p in options.photos]
    paths = [p for path in paths for p in (sorted(q for q in path.iterdir() if q.suffix.lower() in data.SUFFIXES)
                                           if path.is_dir() else [path])]  # fmt: skip
    if not paths:
        raise CamError(f"{', '.join(options.photos)} holds no photo: name a photo, or a folder that has some")
    written = set()
    for path in paths:
        photo = torch.from_numpy(data.decode(path))
        maps, logits, probabilities = look(network, facts, [photo])
        top = probabilities[0].topk(min(options.top, len(classes))).indices.tolist()
        titles, shown = [classes[k] for k in top], [maps[0, k] for k in top]
        captions = [f"{probabilities[0, k]:.1%}, logit {logits[0, k]:+.2f} of which bias {bias[k]:+.2f}" for k in top]
        if options.contrast:
            a, b = (classes.index(name) for name in options.contrast)
            titles.append(f"{classes[a]}, not {classes[b]}")
            shown.append(contrast_map(maps, a, b)[0])
            difference = logits[0, a] - logits[0, b]
            captions.append(f"logits differ by {difference:+.2f} of which bias {bias[a] - bias[b]:+.2f}")
        row = Row(describe(facts), torch.stack(shown), captions, [None] * len(shown))
        out, count = Path(options.out) / f"{path.stem}-{facts['arch']}.png", 2
        while out in written:  # photos of the same name from several folders
            out, count = out.with_name(f"{path.stem}-{facts['arch']}-{count}.png"), count + 1
        written.add(out)
        save_png(compose([photo] * len(shown), titles, [row], options.tile), out)
        print(f"{out}: " + ", ".join(f"{classes[k]} {probabilities[0, k]:.1%}" for k in top))


@torch.no_grad()
def gallery(options):
    """The most confident mistakes on val: where did the network look for what it said, and for what was there?"""
    import data

    ((network, facts),) = load_models([options.model])
    classes = facts["classes"]
    val = data.load(data.prepare(options.data), "val")
    probabilities = torch.cat([network(x).softmax(1) for x, _ in data.eval_batches(val, facts["size"], 64)])
    confidence, predicted = probabilities.max(1)
    mistakes = (predicted != val.labels).nonzero()[:, 0]
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)].tolist()
    if options.per_class:  # of each true class the worst
        mistakes = [next((i for i in mistakes if val.labels[i] == k), None) for k in range(len(classes))]
    mistakes = [i for i in mistakes if i is not None][: options.count]
    if not mistakes:
        return print(f"{options.model} makes no mistake on val: there is nothing to show")
    photos = [val[i] for i in mistakes]
    maps, *_ = look(network, facts, photos)
    rows = []
    for what, labels in (("for what it said", predicted[mistakes]), ("for what is there", val.labels[mistakes])):
        captions = [f"{classes[k]} {probabilities[i, k]:.0%}" for i, k in zip(mistakes, labels, strict=True)]
        right = [bool(k == val.labels[i]) for i, k in zip(mistakes, labels, strict=True)]
        rows.append(Row(f"where {facts['arch']} looked {what}", maps[range(len(photos)), labels], captions, right))
    save_png(compose(photos, [classes[val.labels[i]] for i in mistakes], rows, options.tile), options.out)
    print(options.out)


def at_least(least):
    """An argparse type: a whole number, `least` or more."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    whole_number.__name__ = "int"  # what argparse calls it where it is none
    return whole_number


def main(arguments=None):
    """The command line: figure, explain, gallery."""
    parser = argparse.ArgumentParser(description="Where did the network look? Maps and pictures.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, about, out, tile):
        it = commands.add_parser(run.__name__, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        it.add_argument("--out", default=out, help="where the picture goes")
        it.add_argument("--tile", type=at_least(16), default=tile, help="longest side of a photo in the picture, px")
        it.set_defaults(run=run)
        return it.add_argument

    add = command(figure, "photos, and under them the maps of each network", "figures/figure.png", 224)
    both = ["runs/resnet18/best.pt", "runs/cnn/best.pt"]
    add("--models", nargs="+", default=both, help="checkpoints, a row of maps for each")
    add("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    add("--images", nargs="+", help="photos, instead of one of each class out of val")
    add("--seed", type=int, default=0, help="chooses the photos out of val")
    add = command(explain, "the top classes of any photo, or of a folder of them", "figures", 480)
    add("photos", nargs="+")
    add("--model", default="runs/cnn/best.pt", help="checkpoint")
    add("--top", type=at_least(1), default=3, help="classes to show")
    add("--contrast", nargs=2, metavar=("A", "B"), help="two classes: also show what speaks for A and against B")
    add = command(gallery, "the most confident mistakes on val", "figures/gallery.png", 224)
    add("--model", default="runs/cnn/best.pt", help="checkpoint")
    add("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    add("--count", type=at_least(1), default=10, help="mistakes to show")
    add("--per-class", action="store_true", help="the worst of each class, instead of the worst of all")
    options = parser.parse_args(arguments)
    import data
    import models

    try:
        options.run(options)
    except (CamError, data.DataError, models.ModelError, OSError) as error:
        print(f"cam.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
