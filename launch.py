"""The command `python train.py`: its options, photos and processes. What it writes: runs.py."""

import argparse
import contextlib
import copy
import math
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

import data
import files
import folders
import frozen
import machine
import models
import train
from runs import Run, count_parameters, type_name

# ---------------------------------------------------------------- options


def defaults_of(field):
    """The defaults of a field of the recipe, in words, for each kind of training that has one."""
    of = {"scratch": "for the cnn", "head": "with all frozen but the last layer",
          "all": "with --unfreeze"}
    values = {kind: defaults.get(field) for kind, defaults in train.DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return str(values["scratch"])
    return ", ".join(f"{value} {of[kind]}" for kind, value in values.items() if value)


def make_parser():
    """The options of the command. One left out (SUPPRESS) gets a default of what is trained."""
    parser = argparse.ArgumentParser(
        description="Train the CNN from scratch, or fine-tune an ImageNet network.",
        formatter_class=files.Help)
    add, number, px = parser.add_argument, files.between, files.between(1, 4096)

    def add_recipe(name, kind, what):
        """An option for a field of the recipe, whose default depends on what is trained."""
        add(f"--{name}", type=kind, default=argparse.SUPPRESS,
            help=f"{what} (default: {defaults_of(name.replace('-', '_'))})")

    add("arch", help="cnn, resnet18, or another torchvision network that CAM is exact for")
    add("--data", type=files.path, default=folders.IMAGENETTE,
        help="folder or archive of class folders")
    add("--weights", type=os.path.expanduser, default=argparse.SUPPRESS,
        help="'imagenet' (download; the default of every network but the cnn), 'none' (random), or "
        "a file in torchvision's format")
    add("--unfreeze", action="store_true", help="train every layer, not the last one alone")
    add_recipe("epochs", number(1, 2**31), "passes over the photos")
    add_recipe("crop", px, "side of a training crop, px; the last tenth of the epochs has crops of "
               "--size")
    add("--plain-crop", action="store_true", help="crops are cut out of the photo as it is, "
        "not resized; photos in evaluation then want their own size as --size (ImageNette: 160)")
    add_recipe("size", px, "side of the photos in evaluation, px; of the cnn so that objects are "
               "as large as in crops: 96 for 64 px and 100 epochs")
    add("--looks", type=files.sizes, default=argparse.SUPPRESS, metavar="PX,PX,...",
        help="sides of the photos when maps are made; their feature maps are averaged (default: "
        "2/3, 1 and 4/3 of --size for the cnn, with --plain-crop that alone, 10/7 of it for a last "
        "layer, 1 and 10/7 with --unfreeze)")
    add_recipe("batch-size", number(1, 2**31), "photos in a step")
    add_recipe("lr", number(0, 1e37, float), "peak learning rate of the convolutions; all other "
               "weights get 5 times as much")
    add_recipe("weight-decay", number(0, 1e3, float), "of filters (a last layer has "
               "none), in units of the learning rate")
    add_recipe("width", number(8, 4096), "channels of the cnn at 1/8 of the photo's side")
    add("--holdout", type=number(0, 1, float), default=0.0,
        help="share of train to validate on, in place of val")
    add("--seed", type=number(0, 2**40), default=0, help="decides initial weights, order and crops")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--runs", type=files.path, default="runs", help="where results go")
    add("--name", default=argparse.SUPPRESS,
        help="folder in --runs; the network's name unless given")
    add("--skip-bad", action="store_true",
        help="leave damaged photos out, now and whenever these data are used")
    add("--dry-run", action="store_true",
        help="one epoch of two batches, everything written, as <name>-dry-run")
    return parser


def check_options(parser, options):
    """End with a sentence of `parser` where an option would do nothing, or names nothing."""
    cnn, head = options.arch == "cnn", options.arch != "cnn" and not options.unfreeze
    name = getattr(options, "name", "")  # unless given, it is the network's
    if head and ("crop" in options or options.plain_crop):
        parser.error("--crop and --plain-crop do nothing while all but the last layer is frozen, "
                     "as each photo is seen whole: leave them out, or add --unfreeze")
    for option in ("weights", "name"):  # of a variable that is not set, perhaps
        if option in options and not getattr(options, option):
            parser.error(f"--{option} is empty: name one, or leave it out")
    if Path(name).name != name or name == "..":
        parser.error(f"--name {name} is not the name of a folder in --runs: use one without "
                     "slashes")
    if len(os.fsencode(name)) > 200:
        parser.error(f"--name {name[:20]}... is too long for a folder: use a shorter one")
    if name.endswith("-dry-run"):
        parser.error(f"--name {name} is what --dry-run calls its run: use another")
    if cnn and options.plain_crop and "size" not in options:
        parser.error("--plain-crop wants --size, the side of whole photos at their own scale "
                     "(ImageNette: 160)")
    if not cnn and "width" in options:
        parser.error(f"--width is the cnn's: leave it out for {options.arch}")
    if cnn and options.unfreeze:
        parser.error("--unfreeze does nothing for the cnn, of which every layer is trained: "
                     "leave it out")


def parse_arguments(arguments=None):
    """The command line as (recipe, options): what decides the result, and where things are."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_options(parser, options)
    given = {field.name: getattr(options, field.name) for field in fields(train.Recipe)
             if field.name in options and field.name != "arch"}
    if given.get("weights") == "none":
        given["weights"] = None
    options.name = getattr(options, "name", options.arch)
    recipe = train.make_recipe(options.arch, options.unfreeze, **given)
    if options.dry_run:  # of the crops of the last epoch
        recipe = replace(recipe, epochs=1, crop=train.sides(recipe, recipe.epochs - 1)[0])
        options.name += "-dry-run"
    return recipe, options


# ---------------------------------------------------------------- before the first step


def prepare_photos(recipe, folder, skip_bad, device):
    """The photos to train on and those to validate on, on `device`."""
    photos = folders.load(folder, "train", skip_bad).to(device)
    if recipe.holdout:
        seeded = torch.Generator().manual_seed(0)  # the same photos for every --seed
        order = torch.randperm(len(photos), generator=seeded)
        cut = max(1, round(recipe.holdout * len(photos)))
        if len(photos) - cut < 2:
            raise ValueError(f"--holdout {recipe.holdout} leaves {len(photos) - cut} of "
                             f"{len(photos):,} photos to train on: use a smaller share")
        photos, val = photos.subset(order[cut:]), photos.subset(order[:cut])
        if unseen := len(photos.classes) - len(photos.labels.unique()):
            raise ValueError(f"--holdout {recipe.holdout} leaves no photo of {unseen} classes to "
                             "train on: use a smaller share")
    else:
        val = folders.load(folder, "val", skip_bad).to(device)
    count = folders.shared(photos, val)
    if count and train.processes()[0] == 0:
        which = "held-out" if recipe.holdout else "val"
        print(f"{folder}: {count:,} of {len(val):,} {which} photos are in train too, byte for "
              "byte: their accuracy is that of photos learnt by heart", file=sys.stderr)
    if recipe.plain_crop:  # photos that are too small are refused now, not in an epoch's middle
        data.plain_boxes(photos, torch.arange(len(photos)), recipe.crop, torch.Generator())
    return photos, val


def remarks_on(recipe, photos, val):
    """Sentences where a training, or the accuracy of so few photos, means little."""
    steps, found = data.batch_count(photos, recipe.batch_size), []
    if recipe.training == "head" and recipe.weights is None:
        found.append(f"{recipe.arch} from random weights, its last layer alone trained, has learnt "
                     "nothing to tell photos by: add --unfreeze")
    if recipe.training == "scratch" and steps * recipe.epochs < 1000 and recipe.epochs > 20:
        found.append(f"{photos:,} photos make {steps * recipe.epochs:,} steps in {recipe.epochs} "
                     f"epochs, and a network from scratch wants thousands: use --epochs "
                     f"{math.ceil(5000 / steps):,} (make: EPOCHS=), or a pretrained network")
    if val < 100:  # half of the 95 % interval of an accuracy of 50 %
        found.append(f"{val} photo{'s' * (val > 1)} to validate on: an accuracy is known to within "
                     f"{98 / val**0.5:.0f} points: add photos")
    return found


@torch.no_grad()
def check_sizes(network, recipe, smallest):
    """Raise ValueError where `network` cannot take images of the recipe's sizes, or a batch of
    `smallest` photos. Only small images can be too small: of 96 px at most are tried."""
    plain = copy.deepcopy(models.with_looks(network, ()))  # a pass changes batch normalisation
    device = next(plain.parameters()).device
    (crop, size), (last, _) = (train.sides(recipe, epoch) for epoch in (0, recipe.epochs - 1))
    passes = [("--crop or --size", side, min(2, smallest), True)
              for side in {crop, last} if recipe.training != "head"]
    passes += [("--size or --looks", side, 1, False) for side in {size, *recipe.looks}]
    for option, side, photos, training in passes:
        try:
            images = torch.zeros(photos, 3, min(side, 96), min(side, 96), device=device)
            plain.train(training)(images)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{recipe.arch} cannot take {photos} x 3 x {side} x {side} px "
                             f"({str(error).splitlines()[0]:.80}): use a larger {option}, or "
                             "--batch-size") from error


def join_processes(device):
    """Join the processes of torchrun, where it has started this one."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        nccl = device.type == "cuda" and torch.distributed.is_nccl_available()  # not on Windows
        try:
            torch.distributed.init_process_group("nccl" if nccl else "gloo")
        except ValueError as error:
            raise ValueError(f"WORLD_SIZE is {world}, but torchrun did not start this: unset it, "
                             f"or use torchrun ({error})") from error


# ---------------------------------------------------------------- the run


def train_run(recipe, options):
    """The whole of a run, or what is left of it."""
    machine.keep_memory()
    device = machine.choose_device(options.device)
    precision = train.choose_precision(device, recipe.training)
    machine.allow_tf32(device, recipe.training != "head")  # which learns from the features of maps
    # Refused before photos are fetched: a network that is unknown, or not of the CAM shape.
    models.build(recipe.arch, 2, recipe.weights if recipe.arch == "cnn" else None,
                 recipe.width or 8)
    join_processes(device)
    rank, world = train.processes()
    folder = folders.prepare(options.data)
    photos, val = prepare_photos(recipe, folder, options.skip_bad, device)
    if options.dry_run:
        seeded = torch.Generator().manual_seed(0)
        photos, val = (split.subset(torch.randperm(len(split), generator=seeded)
                                    [:2 * recipe.batch_size]) for split in (photos, val))
    smallest = min(map(len, data.shuffled(len(photos), recipe.batch_size)))
    if min(len(val), smallest) < world:
        raise ValueError(f"{world} processes are more than a batch or val has photos: use a larger "
                         f"--batch-size than {recipe.batch_size}, or fewer processes")
    if rank == 0 and not options.dry_run:
        for remark in remarks_on(recipe, len(photos), len(val)):
            print(f"{folder}: {remark}", file=sys.stderr)
    run = Run(options.runs / options.name, recipe, photos, val, folder)
    goes_on = (run.folder / "last.pt").exists() and not options.dry_run  # all weights are in there
    network = train.start(recipe, photos, precision, goes_on)
    check_sizes(network, recipe, smallest // world)
    if rank == 0:
        files.make_writable(run.folder, "name another folder with --runs and --name")
    with contextlib.nullcontext() if rank else files.lock(run.folder / "run", wait=False):
        state = None if options.dry_run else run.resume()
        train_epochs(run, network, folder, photos, val, precision, state)
    if world > 1:
        torch.distributed.destroy_process_group()


def load_weights(state, network, recipe, last):
    """Load the weights of `state`, of the file `last`, into `network`. Raises ValueError where it
    does not fit the network or the optimiser of today's code."""

    def names(optimizer):
        return {key for part in (*optimizer.param_groups, *optimizer.state.values())
                for key in part}

    try:
        network.load_state_dict(state["network"])
        optimizer = train.make_optimizer(recipe, network.head if recipe.training == "head" else
                                         network)
        own = names(optimizer)
        optimizer.load_state_dict(state["optimizer"])
        if missing := own - names(optimizer):
            raise ValueError(f"it has no {min(missing)}")
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{last} is of another network or optimiser than this code's ("
                         f"{' '.join(str(error).split()):.80}): go on with the code that began it, "
                         "or give this run a --name of its own") from error


def head_inputs(network, recipe, folder, photos, val):
    """The features of photos and val under a frozen network, beside their pixels."""
    found = []
    for split, own in (("train", photos), ("val", val)):
        pixels = folders.pixels_path(folder, split)
        path = frozen.features_path(pixels, network, own, recipe.size)
        found.append(frozen.store(network, own, recipe.size, path, f"features of {split}:"))
    return found


def train_epochs(run, network, folder, photos, val, precision, state):
    """Train a run from `state`, of its last.pt or None, to its end."""
    recipe, alone = run.recipe, train.processes()[0] == 0  # this process writes
    done = len(run.rows)
    if alone:
        run.clear()
        print(f"{run.folder}: {recipe.arch}, {count_parameters(network):,} parameters, "
              f"{photos.device.type}, {type_name(precision)}, {len(photos):,} photos "
              f"to train on, {len(val):,} to validate on"
              + (f"; {done} of {recipe.epochs} epochs are done" if done else ""), flush=True)
    if done < recipe.epochs:
        if state:
            load_weights(state, network, recipe, run.folder / "last.pt")  # a head's features ask it
        if alone:
            run.begin(network, precision)
        inputs = photos, val
        if recipe.training == "head":
            inputs = head_inputs(network, recipe, folder, photos, val)
        for epoch in train.train(recipe, network, *inputs, precision, state):
            if alone:
                run.save(epoch)
            state = epoch.state
    if alone:
        machine.allow_tf32(val.device, False)
        run.finish(state, val, precision)


def main(arguments=None):
    """The command line: a run, and a sentence for what a user can mend."""
    recipe, options = parse_arguments(arguments)
    smaller = ("a smaller --size" if recipe.training == "head" else f"a smaller --batch-size than "
               f"{recipe.batch_size}, or a smaller --crop or --size")
    files.run_command(train_run, recipe, options, out_of_memory=f"use {smaller}",
                      interrupted="the finished epochs are saved, and the same command goes on")
