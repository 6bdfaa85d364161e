"""Do maps show what a network used? Photos with a planted mark, networks that learn it, a control.

    python shortcut.py                                          on the demo's drawn photos
    python shortcut.py --data data/imagenette2-160 --epochs 20 --seeds 3
    python shortcut.py --data data/imagenette2-160 --arch mobilenet_v2 --weights imagenet

The mark is the class: a third of all photos get a mark, which makes them a class that nothing else
tells. The mark comes with the class: --share of the first class's photos get one. The control never
saw a mark. Photos are changed in memory alone.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import math
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

import cam
import data
import figures
import files
import folders
import frozen
import machine
import marks
import models
import page
import tables
import train

DRAWN = Path("data/demo")
DRAWN_RECIPE = dict(epochs=1, crop=64, width=96, batch_size=32, lr=0.05)  # of the cnn on these:
PHOTOS = 7200  # in an epoch, at least: where there are fewer, each comes often, always marked anew
ASKED = 1000  # photos of val, at most
MARK, PART = "the mark", 1 / 3  # its class, and that class's part of the photos
COLUMNS = "saw marks", "control"
TITLES = {"class": "The mark is the class", "share": "The mark comes with the class"}


def training_set(name, photos, share, seed):
    """What network "class", "share" or "control" is trained on. In one epoch crops are nearly
    whole photos, which cut off few marks; in many, marks that crops miss weaken what is learnt."""
    many = photos.subset(torch.arange(len(photos)).repeat(math.ceil(PHOTOS / len(photos))))
    chance = torch.rand(len(many), generator=torch.Generator().manual_seed(seed))
    marked = {"class": chance < PART, "share": (chance < share) & (many.labels == 0),
              "control": chance < 0}[name]
    if name == "class":
        many = replace(many, labels=torch.where(marked, len(photos.classes), many.labels),
                       classes=[*photos.classes, MARK])
    return marks.plant(many, marked, seed)[0]


def make_recipe(options, seed):
    """The recipe of all three networks of a seed."""
    given = {"epochs": options.epochs} if options.epochs else {}
    if options.arch != "cnn":  # one look: features of large photos take long
        weights = None if options.weights == "none" else options.weights
        given |= dict(weights=weights, size=224, looks=(224,))
    elif options.data == DRAWN:
        given = DRAWN_RECIPE | given
    return train.make_recipe(options.arch, seed=seed, **given)


def train_network(recipe, photos, val, label):
    """A network after its last epoch; val: to say how it goes."""
    precision = train.choose_precision(photos.device, recipe.training)
    network, splits = train.start(recipe, photos, precision), [photos, val]
    if recipe.training == "head":
        splits = [frozen.compute(network, split, recipe.size) for split in splits]
    for epoch in train.train(recipe, network, *splits, precision):
        print(f"{label}: epoch {epoch.row['epoch']} of {recipe.epochs}, "
              f"{epoch.row['val_accuracy']:.0%} of val right", file=sys.stderr)
    return epoch.network.eval()


@torch.no_grad()
def ask(network, photos, looks):
    """Maps (N, K, h, w) and logits (N, K) of photos, at sizes `looks` (px)."""
    looking = models.with_looks(network, looks)
    answers = [cam.explain(looking, images)
               for images, _ in data.eval_batches(photos, looks[-1], 32)]
    return [torch.cat(parts).cpu() for parts in zip(*answers, strict=True)]


def table(results, title, form):
    """The scores {(score, column, title): Estimate} under a title, as "text" or "markdown"."""
    rows = [[title, "n", *COLUMNS]]
    for score, column, of in results:
        if (column, of) == (COLUMNS[0], title):
            of_score = [results.get((score, column, title), "") for column in COLUMNS]
            rows.append([score, str(of_score[0].n), *map(str, of_score)])
    return tables.write_table(rows, form)


def draw(networks, val, marked, size):
    """Five photos of val with the mark and without, and maps of networks "class" and "control"."""
    names = [name for k, name in enumerate(val.classes) if k in val.labels][:5]
    chosen = [int((val.labels == val.classes.index(name)).nonzero()[0]) for name in names]
    photos, rows = [split[i].cpu() for split in (marked, val) for i in chosen], []
    for network, label in (("class", "that learnt the mark"), ("control", "that never saw a mark")):
        maps, logits = ask(networks[network], data.from_arrays(photos).to(val.device), (size,))
        truth = (names if network == "control" else [MARK] * len(names)) + names
        classes, best = [*val.classes, MARK], logits.argmax(1).tolist()
        right = [classes[k] == name for k, name in zip(best, truth, strict=True)]
        rows.append(figures.row_of(f"Network {label}", maps, classes, best, logits.softmax(1),
                                   right))
    titles = [f"{name} + mark" for name in names] + names
    return page.compose(photos, titles, rows, columns=len(names), legend="Above: what is there; "
                        "below: the class that is predicted, in red where it is wrong.")


def experiment(photos, val, recipe, share):
    """A seed's networks; val, marked; and {(title, column): what `marks.measure` says}."""
    marked, boxes = marks.plant(val, torch.ones(len(val), dtype=torch.bool), 1000 + recipe.seed)
    few, scores = val.subset(torch.arange(0, len(val), 5)), {}
    networks = {name: train_network(recipe, training_set(name, photos, share, recipe.seed), few,
                                    f"seed {recipe.seed}, {name}") for name in (*TITLES, "control")}
    for looks in sorted({(recipe.size,), recipe.looks}, key=len):
        answers = {name: [ask(network, split, looks) for split in (val, marked)]
                   for name, network in networks.items()}
        for name, k in (("class", len(val.classes)), ("share", 0)):
            title = f"{TITLES[name]}, at {', '.join(map(str, looks))} px"
            shown = {name: k, "control": None if name == "class" else k}  # it has no class MARK
            for column, network in zip(COLUMNS, shown, strict=True):
                scores[title, column] = marks.measure(*answers[network], boxes, val.labels,
                                                      shown[network])
    return networks, marked, scores


def run(options):
    """Train, ask, print, write."""
    out, device = tables.check_out(options.out), machine.choose_device(options.device)
    machine.allow_tf32(device, False)
    if options.data == DRAWN:
        draw_demo = [sys.executable, Path(__file__).parent / "tests/demo.py", DRAWN]
        if subprocess.run(draw_demo).returncode:
            raise ValueError(f"{DRAWN} could not be drawn, as said above: mend that, or name "
                             "photos with --data")
    folder = folders.prepare(options.data)
    photos, val = (folders.load(folder, split).to(device) for split in ("train", "val"))
    val = val.subset(torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:ASKED])
    found = defaultdict(list)
    for seed in range(options.seed, options.seed + options.seeds):
        recipe = make_recipe(options, seed)
        networks, marked, scores = experiment(photos, val, recipe, options.share)
        for key, of_seed in scores.items():
            found[key].append(of_seed)
    results = {(score, column, title): estimate for (title, column), seeds in found.items()
               for score, estimate in marks.estimates(seeds).items()}
    titles = list(dict.fromkeys(title for title, _ in found))
    markdown = "\n".join(table(results, title, "markdown") for title in titles)
    picture = draw(networks, val, marked, recipe.size)
    tables.write(out, {".md": markdown, ".csv": tables.csv_table(results)}, {".png": picture})
    print(*(table(results, title, "text") for title in titles[:2]),  # at one look
          f"written: {out}.md, .csv, .png", sep="\n")


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Do maps show whether a planted mark was used?",
                                     formatter_class=files.Help)
    add = parser.add_argument
    add("--data", default=DRAWN, type=files.path, help="folder or archive of photos; drawn here")
    add("--share", default=0.95, type=files.between(0, 1, float),
        help="of the first class's photos, which get the mark")
    add("--arch", default="cnn", help="the cnn, or a frozen network, of which the head is trained")
    add("--weights", type=os.path.expanduser, default="imagenet",
        help="of a frozen network: imagenet, none or a file")
    add("--epochs", type=files.between(1), help="of training; train.py's, but 1 on drawn photos")
    add("--seed", default=0, type=files.between(0, 2**40), help="decides networks and marks")
    add("--seeds", default=1, type=files.between(1, 3),
        help="networks of each kind, of --seed and the numbers after it")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--out", default="figures/shortcut", help="tables and picture, without suffix")
    options = parser.parse_args(arguments)
    if not options.weights:  # of a variable that is not set, perhaps
        parser.error("--weights is empty: name a file, imagenet or none, or leave it out")
    if options.arch == "cnn" and options.weights != "imagenet":
        parser.error("--weights is of a frozen network: leave it out for the cnn")
    files.run_command(run, options, out_of_memory="name fewer photos",
                      interrupted="nothing is written")


if __name__ == "__main__":
    main()
