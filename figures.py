"""Pictures of where networks looked: the commands of `python cam.py`.

    python cam.py figure --models runs/resnet18/best.pt runs/cnn/best.pt     a photo of each class
    python cam.py explain photo.jpg --model runs/cnn/best.pt                 the top classes
    python cam.py explain photo.jpg --model resnet18 --out photo.html        to look into, by mouse
    python cam.py gallery --model runs/cnn/best.pt                           confident mistakes
    python cam.py predict photos --model resnet18                            a table: predict.py
"""

import argparse
import os
import sys
from typing import NamedTuple

import torch

import asked
import data
import explore
import files
import folders
import fonts
import networks
import page
from asked import CHECKPOINTS, MOST_PHOTOS
from cam import contrast_map, scale_of
from predict import predict
from tables import escape_latex

MOST_CLASSES = 50  # of val in a figure, unless they are chosen


# ---------------------------------------------------------------- networks and photos


class Prediction(NamedTuple):
    """What a network says of N photos, of K classes in the order of the first network's."""
    facts: dict
    maps: torch.Tensor  # (N, K, h, w), in logits
    logits: torch.Tensor  # (N, K)
    probabilities: torch.Tensor  # (N, K)
    bias: torch.Tensor  # (K,)


def ask_networks(loaded, photos):
    """A `Prediction` of each network."""
    classes, found = list(loaded[0][1]["classes"]), []
    for network, facts in loaded:
        own, bias = list(facts["classes"]), network.head.bias
        order = slice(None) if own == classes else [own.index(name) for name in classes]
        maps, logits, probabilities = networks.predict_with_maps(network, facts, photos)
        bias = logits.new_zeros(len(own)) if bias is None else bias.detach().cpu()
        found.append(Prediction(facts, maps[:, order], logits[:, order], probabilities[:, order],
                                bias[order]))
    return found


def load_val(folder, facts):
    """The val photos of `folder`, None: of the data a network was trained on, if they are there;
    labels in the order of its classes. Says where they are not those that its accuracy is of."""
    if not folder:
        own = facts.get("data") or folders.IMAGENETTE
        folder = own if os.path.exists(own) else folders.IMAGENETTE
        if own != folders.IMAGENETTE and not os.path.exists(folder):
            raise ValueError(f"{own}, on which {facts['arch']} was trained, is not here: name the "
                             "photos with --data")
    val = folders.load(folders.prepare(folder), "val").relabelled(facts["classes"])
    own = networks.val_fingerprint(facts)
    if own and facts.get("accuracy_on") == "val" and own != val.fingerprint:
        print(f"{folder}: these are not the val photos of the training of {facts['arch']}: its "
              "accuracy is of others", file=sys.stderr)
    return val


def say_trained_on(photos, loaded):
    """Say how many of val's `photos` networks were trained on, byte for byte."""
    for _, facts in loaded:
        if count := networks.seen_in_training(facts, photos):
            print(f"{facts['arch']} was trained on {count:,} of these {len(photos):,} val photos: "
                  "what it says of them it may know by heart", file=sys.stderr)


def one_of_each_class(folder, seed, loaded, wanted=None):
    """A val photo of each class that the networks `loaded` know, or of those `wanted`: photos, and
    the names of their classes."""
    facts = loaded[0][1]
    val, classes = load_val(folder, facts), list(facts["classes"])
    generator = torch.Generator().manual_seed(seed)
    there = [classes[k] for k in val.labels.unique()]
    names = asked.known_classes(wanted, classes) if wanted else there[:MOST_CLASSES]
    if absent := set(names if wanted else classes).difference(there):
        say = f"there is no val photo of {data.first_names(absent)}"
        if wanted:
            raise ValueError(f"{say}: choose others with --classes")
        print(say, file=sys.stderr)
    if len(names) < len(there) and not wanted:
        print(f"the first {len(names)} of {len(there)} classes are shown: --classes chooses "
              "others", file=sys.stderr)
    of_class = [torch.where(val.labels == classes.index(name))[0] for name in names]
    shown = [int(index[torch.randint(len(index), (), generator=generator)]) for index in of_class]
    say_trained_on(val.subset(torch.tensor(shown)), loaded)
    return [val[i] for i in shown], names


# ---------------------------------------------------------------- maps


def row_of(label, maps, names, shown, probabilities, right):
    """A `Row` of the maps (N, K, h, w) of the classes `shown` (N,). names: of the K classes."""
    index = range(len(shown))
    captions = [f"{names[shown[i]]} {probabilities[i, shown[i]]:.0%}" for i in index]
    return page.Row(label, maps[index, shown], captions, right)


def predicted_row(prediction, classes, names, truth):
    """A `Row` of the maps of the classes that a network predicts. truth: N classes, or None."""
    best = prediction.probabilities.argmax(1)
    right = [None if label is None else classes[k] == label
             for k, label in zip(best, truth, strict=True)]
    return row_of(networks.describe(prediction.facts), prediction.maps, names, best,
                  prediction.probabilities, right)


def say_grey(rows, scale):
    """Say in which rows most maps are grey beside a strong one. scale: as of `page.compose`."""
    for row in rows:
        weakest = page.FAINT * (page.shared_end(row, scale) or 0)
        grey = sum(bool(class_map.abs().max() < weakest) for class_map in row.maps)
        if 2 * grey > len(row.maps):
            print(f"{row.label.split(',')[0]}: {grey} of {len(row.maps)} maps stay below "
                  f"{page.FAINT:.0%} of their scale, and are grey: --scale photo gives each its "
                  "own", file=sys.stderr)


def explained_row(prediction, names, shown, contrast):
    """A `Row` of one photo: the maps of the classes `shown`, then of the two in `contrast`."""
    maps, logits, probabilities = (values[0] for values in prediction[1:4])
    captions = [f"{names[k]} {probabilities[k]:.1%}\nlogit {page.signed(logits[k], 1)}"
                for k in shown]
    chosen = maps[shown]
    if contrast:
        a, b = contrast
        chosen = torch.cat([chosen, contrast_map(maps[None], a, b)])
        difference = page.signed(logits[a] - logits[b], 1)
        captions.append(f"{names[a]} minus {names[b]}\nlogits {difference}")
    return page.Row(networks.describe(prediction.facts), chosen, captions)


# ---------------------------------------------------------------- pictures and pages


def finish(picture, path, what, loaded):
    """Save a picture, and print how LaTeX includes it. what: it shows, of the networks `loaded`."""
    page.save_picture(picture, path)
    caption = f"{what}: {'; '.join(networks.describe(facts) for _, facts in loaded)}."
    width = picture.width / picture.info["dpi"][0] * 2.54
    print(f"{path}\n\\includegraphics[width={width:.1f}cm]{{{path.as_posix()}}}\n"
          f"\\caption{{{escape_latex(caption)}}}")


def draw_explanation(photo, title, found, names, wanted, options):
    """The picture of one photo. found: a `Prediction` of each network; wanted: classes asked for,
    by their numbers, and the two of the contrast, or None."""
    block, (classes, contrast) = [], wanted
    for prediction in found:
        best = prediction.logits[0].topk(min(options.top, len(names))).indices.tolist()
        shown = list(dict.fromkeys([*best, *classes]))
        row = explained_row(prediction, names, shown, contrast)
        tiles = page.map_tiles([photo] * len(row.captions), row, options.scale)
        tiles[-1] = tiles[-1]._replace(both=bool(contrast))
        original = None if block else page.Tile(photo, title)
        block.append(page.Strip([original, *tiles], row.label, text_above=True))
    most = max(len(strip.tiles) for strip in block)  # a class asked for may be at the top anyway
    for strip in block:
        strip.tiles.extend([None] * (most - len(strip.tiles)))
    legend = ""
    if contrast:
        legend = f"Last map: orange speaks for {names[contrast[0]]}, blue for {names[contrast[1]]}."
    return page.draw_page([block], legend, options.dpi, options.font)


def write_explanation(path, photo, title, found, wanted):
    """Write the page to look into one photo; arguments as of `draw_explanation`."""
    classes, shown = list(found[0].facts["classes"]), []
    for facts, maps, logits, _, bias in found:
        same = sum(facts["arch"] == other.facts["arch"] for other in found[: len(shown)])
        label = facts["arch"] + f" ({same + 1})" * (same > 0)
        about = networks.describe(facts).removeprefix(f"{facts['arch']}, ")
        shown.append(explore.Network(label, classes, maps[0], logits[0], bias, about))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path) as file:
        explore.write_page(file, photo, title, shown, [*wanted[0], *(wanted[1] or ())])
    print(path)


def letters(font, classes, texts=()):
    """A font that has all letters, or None for Pillow's, and the names of classes as it shows them.
    font: a file that was asked for, or None."""
    font = fonts.choose([*classes, *texts], font)
    return font, fonts.legible(classes, font)


# ---------------------------------------------------------------- commands


def figure(options):
    """Photos in the first row, and under them a row of maps for each network's predictions."""
    page.check_picture_name(options.out)
    if options.images and options.classes:
        raise ValueError("--classes chooses among the photos of val, and --images names your own: "
                         "leave one out")
    if not options.images and (options.titles or options.truth):
        raise ValueError("--titles and --truth are for photos of your own: name them with --images")
    loaded = asked.load_networks(options, options.models or asked.default_checkpoints(CHECKPOINTS))
    classes = list(loaded[0][1]["classes"])
    if options.images:
        paths = asked.photo_files(options.images)
        asked.refuse_overwriting([options.out], paths)
        photos, titles, truth = asked.own_photos(paths, options.titles, options.truth, classes)
    else:
        photos, truth = one_of_each_class(options.data, options.seed, loaded, options.classes)
        titles = truth
    options.font, names = letters(options.font, classes, titles)
    rows = [predicted_row(prediction, classes, names, truth)
            for prediction in ask_networks(loaded, photos)]
    say_grey(rows, options.scale)
    if len(photos) > options.columns:
        print(f"{len(photos)} photos go into blocks of {options.columns}", file=sys.stderr)
    legend = f"Above: {'what is there' if titles == truth else 'the photo'}; below: the prediction"
    if page.lie_beside(photos, rows, options.columns):
        legend = "Beside the photo: the map of each network's prediction"
    legend += ", in red where it is wrong." if any(False in row.right for row in rows) else "."
    titles = [names[classes.index(title)] if title in classes else title for title in titles]
    picture = page.compose(photos, titles, rows, options.columns, options.scale, legend,
                           options.dpi, options.font)
    finish(picture, options.out, "Class activation maps, in logits, of the class that each network "
           "predicts", loaded)


def explain(options):
    """For each photo a picture, a row for each network: the photo, beside it maps of classes; or a
    page to look into."""
    if not options.photos:
        raise ValueError("explain needs a photo: python cam.py explain photo.jpg")
    paths = asked.photo_files(options.photos)
    models = options.models or asked.default_checkpoints(CHECKPOINTS[-1:])
    words = [*options.classes, *([" minus ".join(options.contrast)] if options.contrast else [])]
    outs = asked.explanation_names(paths, [*models, *(options.weights or ())], words, options.out)
    asked.refuse_overwriting(outs, paths)
    loaded = asked.load_networks(options, models)
    classes = list(loaded[0][1]["classes"])
    wanted = [networks.class_index(name, classes) for name in options.classes]
    contrast = options.contrast and [networks.class_index(name, classes)
                                     for name in options.contrast]
    if contrast and contrast[0] == contrast[1]:
        raise ValueError(f"--contrast {options.contrast[0]} with itself shows nothing: name two "
                         "classes")
    options.font, names = letters(options.font, classes, [path.stem for path in paths])
    for path, out in zip(paths, outs, strict=True):
        photo = torch.from_numpy(data.decode(path))
        found = ask_networks(loaded, [photo])
        if out.suffix.lower() == ".html":
            write_explanation(out, photo, path.name, found, (wanted, contrast))
        else:
            picture = draw_explanation(photo, path.stem, found, names, (wanted, contrast), options)
            finish(picture, out, f"Class activation maps, in logits, of {path.name}", loaded)


@torch.no_grad()
def gallery(options):
    """The most confident mistakes on val, with the maps of what is predicted and what is there."""
    page.check_picture_name(options.out)
    models = [options.model] if options.model else asked.default_checkpoints(CHECKPOINTS[-1:])
    ((network, facts),) = loaded = asked.load_networks(options, models)
    val, weight = load_val(options.data, facts), network.head.weight
    say_trained_on(val, loaded)
    batches = data.eval_batches(val.to(weight.device), facts["size"], 32)
    probabilities = torch.cat([
        network(networks.normalised(images, facts).to(weight.dtype)).softmax(1).cpu()
        for images, _ in batches])
    confidence, predicted = probabilities.max(1)
    (mistakes,) = torch.where(predicted != val.labels)
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)][: options.count]
    if not len(mistakes):
        return print(f"{models[0]} makes no mistake on val: there is nothing to show")
    photos = [val[i] for i in mistakes]
    options.font, names = letters(options.font, val.classes)
    labels, predicted, probabilities = (
        values[mistakes] for values in (val.labels, predicted, probabilities))
    maps, *_ = networks.predict_with_maps(network, facts, photos)
    rows = [row_of(label, maps, names, shown, probabilities, (shown == labels).tolist())
            for label, shown in (
                (f"{networks.describe(facts)}; the map of what it says", predicted),
                ("the map of what is there", labels))]
    scale = options.scale
    if scale == "row":  # one for both: which of the two classes was stronger, and where?
        scale = scale_of(torch.cat([row.maps for row in rows]))
    say_grey(rows, scale)
    legend = "Above: what is there; below: the class of the map, with its probability."
    if page.lie_beside(photos, rows, options.columns):
        legend = "Above each map: its class, with its probability."
    picture = page.compose(photos, [names[k] for k in labels], rows, options.columns, scale, legend,
                           options.dpi, options.font)
    finish(picture, options.out, "The most confident mistakes on val, and class activation maps, "
           "in logits", loaded)


# ---------------------------------------------------------------- the command line


def add_command(commands, command, about, out):
    """Add a command with the options that all have; return what adds those of its own."""
    parser = commands.add_parser(command.__name__, help=about,
                                 formatter_class=files.Help)
    parser.set_defaults(command=command)
    add, what = parser.add_argument, {explain: ", or .html; or a folder"}
    kinds = ".csv" if command is predict else ".png or .pdf"
    add("--out", type=files.path, default=out, help=f"{kinds}{what.get(command, '')}")
    networks.add_options(parser)
    if command is not predict:
        add("--dpi", type=files.between(30, 1200), default=300,
            help="pixels of an inch; a picture is 16 cm wide")
        add("--scale", choices=("row", "photo"), default="row",
            help="one colour scale for all maps of a row, or one for each photo's map")
        add("--font", metavar="FILE", type=files.path,
            help="a font file for letters that Pillow's own font lacks; without it, one of this "
            "system's")
    if command in (figure, gallery):
        add("--data", metavar="FOLDER", type=files.path,
            help="folder or archive of photos in class folders; without it, those of the training, "
            f"or {folders.IMAGENETTE}")
        add("--columns", type=files.between(1, 10), default=10,
            help="photos side by side; more go on below")
    return add


def parse_command_line(arguments):
    """The options, and as `options.command` the function that they are for."""
    parser = argparse.ArgumentParser(description="Where did the network look? Maps and pictures.")
    commands = parser.add_subparsers(required=True)
    first = f"checkpoint, or a network of torchvision's, resnet18; without it, {CHECKPOINTS[-1]}"
    add = add_command(commands, figure, "photos, and under them the maps of each network",
                      "figures/figure.png")
    add("--models", nargs="+", action="extend", type=files.path,
        help=f"checkpoints, a row of maps for each; without it, {' '.join(CHECKPOINTS)}")
    add("--classes", nargs="+", action="extend", help="which classes to show of val, in this order")
    add("--images", nargs="+", action="extend", type=files.path,
        help="photos of your own, folders or quoted patterns, instead of those of val")
    add("--titles", nargs="+", action="extend", help="a title for each of --images")
    add("--truth", nargs="+", action="extend",
        help="what is there: a class for each of --images, or one for all")
    add("--seed", type=files.between(0, 2**63 - 1), default=0, help="chooses the photos out of val")
    add = add_command(commands, explain, "the top classes of any photo, or of a folder of them",
                      "figures")
    add("photos", nargs="*", type=files.path, help="photos, folders or quoted patterns")
    add("--model", dest="models", action="append", type=files.path,
        help=f"{first}; repeat it to compare")
    add("--top", type=files.between(1, 10), default=3, help="classes to show")
    add("--class", dest="classes", action="append", default=[], metavar="NAME",
        help="show this class as well, by its name or number; repeat it for several")
    add("--contrast", nargs=2, action=files.Once, metavar=("A", "B"),
        help="two classes: also show what speaks for A and against B")
    add = add_command(commands, gallery, "the most confident mistakes on val",
                      "figures/gallery.png")
    add("--model", action=files.Once, type=files.path, help=first)
    add("--count", type=files.between(1, MOST_PHOTOS), default=10, help="mistakes to show")
    add = add_command(commands, predict, "a table of the top classes of photos, their maps as "
                      "numbers", "figures/predictions.csv")
    add("photos", nargs="+", type=files.path, help="photos, folders or quoted patterns")
    add("--model", action=files.Once, type=files.path, help=first)
    add("--top", type=files.between(1), default=3, help="classes of a photo")
    add("--maps", metavar="FILE", type=files.path, help="the maps of all classes, .npz")
    return parser.parse_args(arguments)


def main(arguments=None):
    """The command line."""
    def command():
        options = parse_command_line(arguments)
        options.command(options)

    files.run_command(command, out_of_memory="use smaller --looks or --dpi, or more --columns",
                      interrupted="nothing is left half-written")
