"""All scores of trained networks, side by side: accuracy, faithfulness and localisation.

    python score.py runs/resnet18/best.pt runs/cnn/best.pt --boxes FOLDER

metrics.py defines the scores and their intervals, boxes.py reads FOLDER, tables.py shows results.
Beside a network's own maps stand two controls: maps of the same network with random weights, and
one centred square for all photos.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import shlex
import time
from dataclasses import replace
from pathlib import Path

import torch

try:
    import cam
    import data
    import files
    import folders
    import fonts
    import machine
    import metrics
    import models
    import networks
    import page
    import tables
    from boxes import load_boxes
    from metrics import Estimate, mean_interval
    from tables import OWN, RANDOM, SQUARE
except ModuleNotFoundError as error:
    print(f"score.py: {error}: the command needs the packages of requirements.txt, and "
          "the project's files beside it; metrics.py alone has the scores", file=sys.stderr)
    sys.exit(2)

BATCH = 20  # photos at once: small enough for a processor's cache
DROP_PHOTOS = 1000  # for average drop and increase in confidence, another pass for each map
RANDOM_SEEDS = 5  # networks with random weights
RANDOM_PHOTOS = 50  # for random weights, which differ more between seeds than between photos


# ---------------------------------------------------------------- maps of a network and of controls


@torch.no_grad()
def logits_and_maps(network, batches, likeliest=False):
    """The logits (N, K) of photos, and the maps (N, h, w) of their labels or likeliest classes.

    batches: of images (B, 3, H, W) and labels (B,).
    """
    all_logits, chosen_maps = [], []
    for images, labels in batches:
        maps, logits = cam.explain(network, images)  # (B, K, h, w), (B, K)
        all_logits.append(logits)
        chosen_maps.append(maps[range(len(images)), logits.argmax(1) if likeliest else labels])
    return torch.cat(all_logits), torch.cat(chosen_maps)


def batches_of(photos, facts):
    """Batches (images, labels) of whole photos, as the network of `facts` sees them."""
    for images, labels in data.eval_batches(photos, facts["size"], BATCH):
        yield networks.normalised(images, facts), labels


def maps_of_labels(network, photos, facts):
    """The maps (N, h, w) of the photos' labels."""
    return logits_and_maps(network, batches_of(photos, facts))[1]


def random_network(facts, seed):
    """The network of `facts` with random weights, head included: what the architecture does."""
    torch.manual_seed(seed)  # on the CPU: the same weights on every device
    network = models.build(facts["arch"], len(facts["classes"]), width=facts["width"]).eval()
    torch.nn.init.normal_(network.head.weight, std=0.01)
    return models.with_looks(models.fold_norms(network), facts["looks"])


def with_controls(maps, facts, photos):
    """A network's own maps (N, h, w) and those of controls: {map: (S, N, h, w)}, S seeds.

    photos: N or fewer; random weights look at the first RANDOM_PHOTOS of them.
    """
    few = photos.subset(torch.arange(len(photos))[:RANDOM_PHOTOS])
    random = [maps_of_labels(random_network(facts, seed).to(maps.device), few, facts)
              for seed in range(RANDOM_SEEDS)]
    square = metrics.centred_square(len(maps), 64).to(maps.device)
    return {OWN: maps[None], RANDOM: torch.stack(random), SQUARE: square[None]}


# ---------------------------------------------------------------- the scores of a network


def accuracies(correct, labels, names):
    """{score: Estimate} of correct (N,), 1 or 0.

    Of ImageNette, only photos of ImageNet's own val are new to a network pretrained on ImageNet.
    """
    scores = {"accuracy": mean_interval(correct)}
    if len(labels.bincount().unique()) > 1:
        scores["accuracy, mean of the classes"] = metrics.class_mean_interval(correct, labels)
    unseen = torch.tensor(["ILSVRC2012_val" in name for name in names])
    if unseen.any():
        scores["accuracy, photos not in ImageNet's training"] = mean_interval(correct[unseen])
    return scores


def confusion_matrix(labels, predicted, classes):
    """Counts (K, K) of labels (N,), rows, and of what is predicted (N,), columns; K `classes`."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def drop_and_increase(network, photos, confidence, maps, facts):
    """{score: Estimate} of maps (S, N, h, w), S seeds, of the labels of N photos.

    confidence: the probabilities (N,) of these labels.
    """
    found = []
    for of_seed in maps:
        batches = batches_of(photos, facts)
        parts = zip(batches, of_seed.split(BATCH), confidence.split(BATCH), strict=True)
        for (images, labels), of_batch, before in parts:
            probabilities = network(metrics.masked(images, of_batch)).softmax(1)
            after = probabilities.gather(1, labels[:, None])[:, 0]
            found.append(torch.stack(metrics.average_drop_and_increase(before, after)))  # (2, B)
    drop, increase = torch.cat(found, 1).view(2, *maps.shape[:2])
    return {"average drop": mean_interval(drop),
            "increase in confidence": mean_interval(increase)}


def deletion_and_insertion(network, photos, maps, facts):
    """{score: Estimate} of maps (S, N, h, w), S seeds, of the labels of N photos; 42 passes."""
    def probabilities(images):
        return network(images).softmax(1)

    found = []
    for of_seed in maps:
        batches = batches_of(photos, facts)
        for (images, labels), of_batch in zip(batches, of_seed.split(BATCH), strict=True):
            areas = metrics.deletion_and_insertion(probabilities, images, of_batch, labels)
            found.append(torch.stack(areas))  # (2, B)
    deletion, insertion = torch.cat(found, 1).view(2, *maps.shape[:2])
    return {"deletion": mean_interval(deletion), "insertion": mean_interval(insertion)}


def localisation(maps, boxes, n, same=False):
    """{score: Estimate} of maps (S, N, h, w) of true classes, S seeds; boxes: a list of N.

    The scores are of the first n photos; the others help with thresholds, and with the scores of
    "all". same: a seed's maps are one, a control. Best thresholds are the literature's, there to be
    compared; no interval of theirs holds.
    """
    maps = maps.cpu()  # photo after photo is slow on a device, and MPS has no minimum of integers
    per_seed = [(metrics.best_iou_per_threshold(of_seed[:1] if same else of_seed, boxes),
                 metrics.pointing_game(of_seed, boxes), *metrics.area_and_share(of_seed, boxes))
                for of_seed in maps]
    ious, pointing, area, share = map(torch.stack, zip(*per_seed, strict=True))  # (S, N, ...)
    best = float(metrics.max_box_acc_v2(ious[:, :n]).mean())
    scores = {"pointing game": mean_interval(pointing[:, :n]),
              "MaxBoxAccV2, cross-fitted": metrics.cross_fitted_interval(ious, n),
              "MaxBoxAccV2, best thresholds": Estimate(best, None, None, min(n, len(boxes))),
              "share in the box": mean_interval(share[:, :n]),
              "area above half": mean_interval(area[:, :n])}
    if n < len(boxes):
        scores["pointing game, all"] = mean_interval(pointing)
        scores["MaxBoxAccV2, cross-fitted, all"] = metrics.cross_fitted_interval(ious)
    return scores


def score_network(name, network, facts, val, boxed, deleted):
    """All scores of a network, {map: {score: Estimate}}, and its confusion matrix.

    boxed: of `load_boxes`; deleted: how many photos serve for deletion and insertion.
    """
    network = models.fold_norms(network).to(val.device)
    classes = facts["classes"]
    val = val.relabelled(classes)
    batches = files.progress(batches_of(val, facts), f"{name}:", len(val),
                             size=lambda batch: len(batch[1]))
    logits, maps = logits_and_maps(network, batches, likeliest=True)
    confidence, likeliest = logits.softmax(1).max(1)
    predicted = likeliest.cpu()  # as labels are
    correct = (predicted == val.labels).float()
    scores = {OWN: accuracies(correct, val.labels, val.names), RANDOM: {}, SQUARE: {}}
    drawn = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:DROP_PHOTOS]
    photos = replace(val, labels=predicted).subset(drawn)
    for kind, seeds in with_controls(maps[drawn], facts, photos).items():
        some = torch.arange(seeds.shape[1])
        scores[kind] |= drop_and_increase(network, photos.subset(some), confidence[drawn][some],
                                          seeds, facts)
        few = some[: deleted // len(seeds)]
        if len(few):
            scores[kind] |= deletion_and_insertion(network, photos.subset(few), seeds[:, few],
                                                   facts)
    if boxed:
        splits = [photos.relabelled(classes) for photos, _ in boxed]
        maps = torch.cat([maps_of_labels(network, split, facts) for split in splits])
        boxes = [of_photo for _, of_split in boxed for of_photo in of_split]
        for kind, seeds in with_controls(maps, facts, splits[0]).items():
            scores[kind] |= localisation(seeds, boxes[: seeds.shape[1]], len(splits[0]),
                                         same=kind == SQUARE)
    return scores, confusion_matrix(val.labels, predicted, len(classes))


# ---------------------------------------------------------------- the command


def name_networks(paths, loaded):
    """{name: (path, network, facts)}, named after the architecture, numbered from the second on."""
    named = {}
    for path, (network, facts) in zip(paths, loaded, strict=True):
        others = sum(of_other["arch"] == facts["arch"] for *_, of_other in named.values())
        named[facts["arch"] + (f"-{others + 1}" if others else "")] = path, network, facts
    return named


def relative(argument):
    """An absolute path as seen from the working folder or, elsewhere, its name; all else as it is.

    So what is written down speaks of no machine's folders.
    """
    path = Path(argument)
    if not path.is_absolute():
        return str(argument)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def facts_of(path, facts):
    """What is written down of a network, beside its scores."""
    settings = facts.get("settings", {})
    return dict(path=relative(path), description=networks.describe(facts), looks=facts["looks"],
                accuracy_n=facts["accuracy_n"], epochs=settings.get("epochs"),
                best_epoch=facts.get("epoch"), seed=settings.get("seed"))


def score_all(arguments):
    """Score what the command line names, write and print the tables."""
    options = parse_arguments(arguments)
    machine.keep_memory()
    device = machine.choose_device(options.device)
    machine.allow_tf32(device, False)
    out = tables.check_out(options.out)
    if by_name := [path for path in options.models if networks.is_name(path)]:
        raise ValueError(f"{by_name[0]} is a network of torchvision's: score.py takes checkpoints "
                         "of train.py (runs/*/best.pt)")
    loaded = networks.load_networks(options.models, options.looks)
    named = name_networks(options.models, loaded)
    folder = folders.prepare(options.data)
    val = folders.load(folder, "val").to(device)
    boxed, missing = load_boxes(folder, options.boxes, val)
    notes = [missing] if missing else []
    if boxed:
        notes.append("cross-fitted: box thresholds of each half of the photos are the best of the "
                     "other half" + ("; all: with photos of train" if len(boxed) > 1 else ""))
    run = dict(command=shlex.join(["python", "score.py", *map(relative, arguments)]), networks={},
               seconds={}, machine=machine.facts(), precision="float32", device=str(device))
    scores, pictures = {}, {}
    for name, (path, network, facts) in named.items():
        if seen := networks.seen_in_training(facts, val):
            own = networks.val_fingerprint(facts) == val.fingerprint
            notes.append(f"{name}: {seen:,} of {len(val):,} val photos were trained on" + (
                ", being in train too, byte for byte: remove them from one" if own else
                ": its scores are no test, name the data as they were in training (--data)"))
            print(notes[-1], file=sys.stderr)
        started = time.time()
        scores[name], matrix = score_network(name, network, facts, val, boxed, options.deletion)
        run["seconds"][name] = round(time.time() - started, 1)
        accuracy = scores[name][OWN]["accuracy"].value
        facts |= dict(accuracy=accuracy, accuracy_on="val", accuracy_n=len(val))
        run["networks"][name] = facts_of(path, facts)
        description = run["networks"][name]["description"]
        font = fonts.choose(facts["classes"])
        classes = fonts.legible(facts["classes"], font)
        pictures[f"-confusion-{name}.png"] = page.confusion_picture(matrix, classes, description,
                                                                    font=font)
        notes.append(f"{name}: {relative(path)}, {description}")
    results = tables.compare(scores)
    tables.write(out, tables.texts(results, notes, run), pictures)
    print(tables.summary(results, list(named)), *notes,
          f"written: {out}.md, .csv, .tex, .json, -confusion-*.png; in LaTeX "
          f"\\usepackage{{booktabs}} and \\input{{{Path(out).as_posix()}.tex}}", sep="\n")


def parse_arguments(arguments):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy, faithfulness and localisation of trained networks.",
        formatter_class=files.Help)
    add = parser.add_argument
    add("models", nargs="+", type=files.path,
        help="checkpoints, runs/cnn/best.pt; differences are to the first")
    add("--data", default=folders.IMAGENETTE, type=files.path,
        help="folder or archive of photos in class folders")
    add("--boxes", type=files.path,
        help="folder of localization.txt and image_sizes.txt; by default the data's own")
    add("--deletion", type=files.between(0), default=0,
        help="photos for deletion and insertion, which are slow: 42 passes a map")
    add("--out", default="figures/scores", help="where tables and pictures go, without suffix")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    networks.add_looks_option(parser)
    return parser.parse_args(arguments)


def main(arguments=None):
    """The command line: the scores of trained networks, as tables."""
    files.run_command(score_all, sys.argv[1:] if arguments is None else arguments,
                      out_of_memory="use smaller --looks",
                      interrupted="no file is half-written, and the same command starts anew")


if __name__ == "__main__":
    main()
