"""Pictures of where networks looked: the commands of `python cam.py`.

    python cam.py figure --models runs/resnet18/best.pt runs/cnn/best.pt     a photo of each class
    python cam.py explain photo.jpg --model runs/cnn/best.pt                 the top classes
    python cam.py gallery --model runs/cnn/best.pt                           confident mistakes
"""

import argparse
import glob
import os
import re
import sys
import unicodedata
from pathlib import Path

import torch

import data
import files
import folders
import networks
import page
from cam import contrast_map

CHECKPOINTS = ["runs/resnet18/best.pt", "runs/cnn/best.pt"]  # compared by default
MOST_PHOTOS, MOST_CLASSES = 100, 50  # in a figure: of one's own; of val, unless chosen


# ---------------------------------------------------------------- photos and classes


def check_classes(names, classes):
    """`names` with accents as `classes` write them. Raises ValueError: one is no class."""
    names = [unicodedata.normalize("NFC", name) for name in names]
    for name in names:
        if name not in classes:
            listed = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise ValueError(f"there is no class {name!r}: the networks know {listed}")
    return names


def one_of_each_class(folder, seed, classes, wanted=None):
    """A val photo of each of `classes`, or of those `wanted`: photos, titles, their classes."""
    val = folders.load(folders.prepare(folder), "val").relabelled(classes)
    generator = torch.Generator().manual_seed(seed)
    names = check_classes(wanted, classes) if wanted else classes[:MOST_CLASSES]
    if len(names) < len(classes) and not wanted:
        print(f"the first {len(names)} of {len(classes)} classes are shown: --classes chooses "
              "others", file=sys.stderr)
    photos, titles = [], []
    for name in names:
        (of_class,) = torch.where(val.labels == classes.index(name))
        if len(of_class):
            chosen = torch.randint(len(of_class), (), generator=generator)
            photos.append(val[int(of_class[chosen])])
            titles.append(name)
        elif wanted:
            raise ValueError(f"{folder} has no val photo of {name}: choose others with --classes")
        else:
            print(f"{name} is not shown, for there is no val photo of it", file=sys.stderr)
    return photos, titles, titles


def photo_files(names):
    """The paths of photos that `names`, of files, folders and patterns, stand for."""
    paths = []
    for name in map(str, names):
        if os.path.isfile(name) or not (os.path.isdir(name) or glob.has_magic(name)):
            paths.append(Path(name))  # a missing one is refused when it is decoded
            continue
        inside = Path(name).iterdir() if os.path.isdir(name) else map(Path, glob.glob(name))
        inside = [path for path in inside if path.is_file() and path.name[0] != "."]
        if unread := {path.suffix for path in inside if path.suffix.lower() in data.UNREAD}:
            print(f"{name}: photos in {data.first_names(unread)} are left out: convert them to "
                  "JPEG", file=sys.stderr)
        found = sorted(path for path in inside if path.suffix.lower() in data.SUFFIXES)
        if not found:
            raise ValueError(f"{name} holds no photo: name a photo, or a folder that has some")
        paths += found
    return paths


def folder_of(path):
    """The name of the folder that a file lies in; of a link, not where it points."""
    return Path(os.path.abspath(path)).parent.name


def own_photos(names, titles, truth, classes):
    """Photos of one's own, titles, classes: of `truth`, else their folders' names, else None."""
    paths = photo_files(names)
    if len(paths) > MOST_PHOTOS:
        raise ValueError(f"--images names {len(paths)} photos, too many for one picture: name at "
                         f"most {MOST_PHOTOS}")
    if truth and len(truth) == 1:
        truth = truth * len(paths)
    for option, given in (("--titles", titles), ("--truth", truth)):
        if given and len(given) != len(paths):
            raise ValueError(f"{option} has {len(given)} names for {len(paths)} photos: give "
                             "one for each")
    if truth:
        labels = check_classes(truth, classes)
    else:
        parents = map(folder_of, paths)
        words = [unicodedata.normalize("NFC", data.WORDS.get(name, name)) for name in parents]
        labels = [name if name in classes else None for name in words]
    titles = titles or [name or path.stem for path, name in zip(paths, labels, strict=True)]
    return [torch.from_numpy(data.decode(path)) for path in paths], titles, labels


# ---------------------------------------------------------------- maps


def row_of(label, maps, classes, shown, probabilities, truth):
    """A `Row` of the maps (N, K, h, w) of the classes `shown` (N,); truth: N names, or None."""
    names = [classes[k] for k in shown]
    index = range(len(names))
    captions = [f"{names[i]} {probabilities[i, shown[i]]:.0%}" for i in index]
    right = [None if truth[i] is None else names[i] == truth[i] for i in index]
    return page.Row(label, maps[index, shown], captions, right)


def predicted_row(network, facts, photos, truth):
    """A `Row` of the maps of the classes that a network predicts."""
    maps, _, probabilities = networks.predict_with_maps(network, facts, photos)
    predictions = probabilities.argmax(1)
    return row_of(networks.describe(facts), maps, facts["classes"], predictions, probabilities,
                  truth)


def top_classes(network, facts, photo, top, contrast):
    """A `Row` of one photo: maps of its `top` classes, then of the two in `contrast`, or None."""
    classes = list(facts["classes"])
    predicted = networks.predict_with_maps(network, facts, [photo])
    maps, logits, probabilities = (values[0] for values in predicted)
    best = probabilities.topk(min(top, len(classes))).indices.tolist()
    shown = maps[best]
    captions = [f"{classes[k]} {probabilities[k]:.1%}\nlogit {page.signed(logits[k], 1)}"
                for k in best]
    if contrast:
        a, b = (classes.index(name) for name in contrast)
        shown = torch.cat([shown, contrast_map(maps[None], a, b)])
        difference = page.signed(logits[a] - logits[b], 1)
        captions.append(f"{classes[a]} minus {classes[b]}\nlogits {difference}")
    return page.Row(networks.describe(facts), shown, captions)


# ---------------------------------------------------------------- pictures


def finish(picture, path, what, loaded):
    """Save a picture, and print how LaTeX includes it. what: it shows, of the networks `loaded`."""
    page.save_picture(picture, path)
    caption = f"{what}: {'; '.join(networks.describe(facts) for _, facts in loaded)}."
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    caption = caption.translate(str.maketrans(special | {c: f"\\{c}" for c in "&%$#_{}"}))
    width = picture.width / picture.info["dpi"][0] * 2.54
    print(f"{path}\n\\includegraphics[width={width:.1f}cm]{{{path.as_posix()}}}\n"
          f"\\caption{{{caption}}}")


def explanation_names(photos, models, contrast, out):
    """Where the picture of each of `photos` goes: `out`, or in the folder `out`, named after it."""
    suffix = out.suffix.lower()
    if suffix in page.PICTURES or suffix and not out.is_dir():  # a folder may be photos.2026
        if len(photos) > 1:
            raise ValueError(f"{out} is one picture for {len(photos)} photos: name a folder with "
                             "--out")
        names = [out]
    else:
        words = [re.sub(r"\W+", "-", name) for name in contrast or ()]
        shown = "-".join([*map(folder_of, models), *words])
        stems = [f"{os.fsencode(photo.stem)[:100].decode(errors='ignore')}-{shown}"
                 for photo in photos]
        numbers = [stems[:i].count(stem) + 1 for i, stem in enumerate(stems)]  # of equal names
        names = [out / (f"{stem}-{number}.png" if number > 1 else f"{stem}.png")
                 for stem, number in zip(stems, numbers, strict=True)]
    for name in names:
        page.check_picture_name(name)
    return names


# ---------------------------------------------------------------- commands


def figure(options):
    """Photos in the first row, and under them a row of maps for each network's predictions."""
    page.check_picture_name(options.out)
    if options.images and options.classes:
        raise ValueError("--classes chooses among the photos of val, and --images names your own: "
                         "leave one out")
    if not options.images and (options.titles or options.truth):
        raise ValueError("--titles and --truth are for photos of your own: name them with --images")
    loaded = networks.load_networks(options.models, options.looks)
    classes = list(loaded[0][1]["classes"])
    if options.images:
        chosen = own_photos(options.images, options.titles, options.truth, classes)
    else:
        chosen = one_of_each_class(options.data, options.seed, classes, options.classes)
    photos, titles, truth = chosen
    rows = [predicted_row(network, facts, photos, truth) for network, facts in loaded]
    if len(photos) > options.columns:
        print(f"{len(photos)} photos go into blocks of {options.columns}", file=sys.stderr)
    legend = f"Above: {'what is there' if titles == truth else 'the photo'}; below: the prediction"
    legend += ", in red where it is wrong." if any(False in row.right for row in rows) else "."
    picture = page.compose(photos, titles, rows, options.columns, options.scale, legend,
                           options.dpi)
    finish(picture, options.out, "Class activation maps, in logits, of the class that each network "
           "predicts", loaded)


def explain(options):
    """For each photo a picture, a row for each network: the photo, beside it maps of classes."""
    if not options.photos:
        raise ValueError("explain needs a photo: python cam.py explain photo.jpg")
    paths, models = photo_files(options.photos), options.models or CHECKPOINTS[-1:]
    names = explanation_names(paths, models, options.contrast, options.out)
    loaded = networks.load_networks(models, options.looks)
    contrast = options.contrast and check_classes(options.contrast, loaded[0][1]["classes"])
    if contrast and contrast[0] == contrast[1]:
        raise ValueError(f"--contrast {contrast[0]} with itself shows nothing: name two classes")
    for path, name in zip(paths, names, strict=True):
        photo, block = torch.from_numpy(data.decode(path)), []
        for network, facts in loaded:
            row = top_classes(network, facts, photo, options.top, contrast)
            original = None if block else page.Tile(photo, page.printable(path.stem))
            tiles = page.map_tiles([photo] * len(row.captions), row, options.scale)
            block.append(page.Strip([original, *tiles], row.label, text_above=True))
        legend = ""
        if contrast:
            legend = f"Last map: orange speaks for {contrast[0]}, blue for {contrast[1]}."
        picture = page.draw_page([block], page.printable(legend), options.dpi)
        finish(picture, name, f"Class activation maps, in logits, of {path.name}", loaded)


@torch.no_grad()
def gallery(options):
    """The most confident mistakes on val, with the maps of what is predicted and what is there."""
    page.check_picture_name(options.out)
    ((network, facts),) = loaded = networks.load_networks([options.model], options.looks)
    val = folders.load(folders.prepare(options.data), "val").relabelled(facts["classes"])
    batches = data.eval_batches(val, facts["size"], 32)
    probabilities = torch.cat([network(images).softmax(1) for images, _ in batches])
    confidence, predictions = probabilities.max(1)
    (mistakes,) = torch.where(predictions != val.labels)
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)][: options.count]
    if not len(mistakes):
        return print(f"{options.model} makes no mistake on val: there is nothing to show")
    photos, labels = [val[i] for i in mistakes], val.labels[mistakes]
    titles, probabilities = [val.classes[k] for k in labels], probabilities[mistakes]
    maps, *_ = networks.predict_with_maps(network, facts, photos)
    rows = [row_of(label, maps, val.classes, shown, probabilities, titles) for label, shown in (
        (f"{networks.describe(facts)}; the map of what it says", predictions[mistakes]),
        ("the map of what is there", labels))]
    legend = "Above: what is there; below: the class of the map, with its probability."
    picture = page.compose(photos, titles, rows, options.columns, options.scale, legend,
                           options.dpi)
    finish(picture, options.out, "The most confident mistakes on val, and class activation maps, "
           "in logits", loaded)


def add_command(commands, command, about, out):
    """Add a command with the options that all have; return what adds those of its own."""
    parser = commands.add_parser(command.__name__, help=about,
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(command=command)
    add = parser.add_argument
    add("--out", type=files.path, default=out,
        help="the picture, .png or .pdf; for explain a folder too")
    add("--dpi", type=files.between(30, 1200), default=300,
        help="pixels of an inch; a picture is 16 cm wide")
    add("--scale", choices=("row", "photo"), default="row", help="of a row's maps, or of each map")
    networks.add_looks_option(parser)
    if command is not explain:
        add("--data", metavar="FOLDER", type=files.path, default="data/imagenette2-160",
            help="folder or archive of photos in class folders")
        add("--columns", type=files.between(1, 10), default=10,
            help="photos side by side; more go on below")
    return add


def parse_command_line(arguments):
    """The options, and as `options.command` the function that they are for."""
    parser = argparse.ArgumentParser(description="Where did the network look? Maps and pictures.")
    commands = parser.add_subparsers(required=True)
    add = add_command(commands, figure, "photos, and under them the maps of each network",
                      "figures/figure.png")
    add("--models", nargs="+", type=files.path, default=CHECKPOINTS,
        help="checkpoints, a row of maps for each")
    add("--classes", nargs="+", help="which classes to show of val, in this order")
    add("--images", nargs="+", type=files.path,
        help="photos of your own, folders or quoted patterns, instead of those of val")
    add("--titles", nargs="+", help="a title for each of --images")
    add("--truth", nargs="+", help="what is there: a class for each of --images, or one for all")
    add("--seed", type=files.between(0, 2**63 - 1), default=0, help="chooses the photos out of val")
    add = add_command(commands, explain, "the top classes of any photo, or of a folder of them",
                      "figures")
    add("photos", nargs="*", type=files.path, help="photos, folders or quoted patterns")
    add("--model", dest="models", action="append", type=files.path,
        help=f"checkpoint ({CHECKPOINTS[-1]}); repeat it to compare")
    add("--top", type=files.between(1, 10), default=3, help="classes to show")
    add("--contrast", nargs=2, metavar=("A", "B"),
        help="two classes: also show what speaks for A and against B")
    add = add_command(commands, gallery, "the most confident mistakes on val",
                      "figures/gallery.png")
    add("--model", type=files.path, default=CHECKPOINTS[-1], help="checkpoint")
    add("--count", type=files.between(1, MOST_PHOTOS), default=10, help="mistakes to show")
    return parser.parse_args(arguments)


def main(arguments=None):
    """The command line."""
    def command():
        options = parse_command_line(arguments)
        options.command(options)

    files.run_command(command, out_of_memory="use smaller --looks or --dpi, or more --columns",
                      interrupted="nothing is left half-written")
