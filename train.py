"""Train the two networks: one loop, by hand.

    python train.py cnn                        the CNN from scratch: 64 x 64 crops, 100 epochs, best weights kept
    python train.py resnet18                   ImageNet weights, all frozen but a new last layer, 5 epochs
    python train.py resnet18 --unfreeze        the same, every layer trained
    python train.py mobilenet_v2 --weights mobilenet_v2-imagenet-features.pth

Everything lands in runs/<name>/: log.csv (a row per epoch), curves.png, best.pt (highest validation accuracy),
last.pt (all that is needed to go on), config.json and, at the end, result.json. The same command after an
interruption goes on from the last epoch; after the last epoch it does nothing.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import models

PASSED = 0.72  # the accuracy of the course report that this project grew from: in which epoch is it passed?
PLAIN_LR = 5.0  # the learning rate of what Muon does not orthogonalise, in units of that of what it does


@dataclass(frozen=True)
class Recipe:
    """All that decides what a training gives. A run goes on only under the recipe and with the photos of its start."""

    arch: str
    weights: str | None  # where it starts: None (random), "imagenet" or a file
    training: str  # a key of DEFAULTS
    epochs: int
    crop: int  # px, side of a training crop
    size: int  # px, side of the photos in evaluation; where a head is trained, `looks` alone counts
    looks: tuple  # px, sides of the photos when maps are made, and for stored features
    batch_size: int
    lr: float  # at its peak, of filters; PLAIN_LR times it of all else, a last layer too
    weight_decay: float
    smoothing: float  # of labels
    width: int = 0  # of the cnn: channels at 1/8 of the photo's side
    plain_crop: bool = False
    holdout: float = 0.0
    seed: int = 0
    version: int = 5  # counts the changes to what the fields do not say: optimiser, schedule, crops


# What is trained decides the rest: everything from random weights, every layer of a pretrained network, or its head.
DEFAULTS = {
    "scratch": dict(epochs=100, crop=64, batch_size=64, lr=0.03, weight_decay=0.05, smoothing=0.1, width=192),
    "head": dict(epochs=5, crop=0, size=224, batch_size=64, lr=0.003, weight_decay=0.0, smoothing=0.0),
    "all": dict(epochs=5, crop=160, size=160, batch_size=64, lr=0.002, weight_decay=5e-4, smoothing=0.1),
}


def default_looks(arch, size):
    """The sizes (px) at which photos are looked at when maps are made, by a network that is evaluated at `size`.

    The CNN's maps gain by smaller and larger photos, those of a pretrained network by larger ones. Multiples of the
    width of a map's cell (8 or 32 px) leave no cell half empty.
    """
    factors, cell = ((2 / 3, 4 / 3), 8) if arch == "cnn" else ((10 / 7,), 32)
    return tuple(sorted({size, *(max(cell, round(factor * size / cell) * cell) for factor in factors)}))


class TrainError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


# ---------------------------------------------------------------- several processes (torchrun)

WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun sets both
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0


def sum_over_processes(tensor):
    """The sum of `tensor` over all processes, on each of them; just `tensor` where there is one."""
    if WORLD > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------- device and precision


class Precision(NamedTuple):
    """How a device computes: autocast's type (None: float32), a GradScaler or not, the layout of images."""

    dtype: torch.dtype | None
    scale: bool
    memory_format: torch.memory_format

    @property
    def name(self):
        return str(self.dtype or torch.float32).removeprefix("torch.")

    @property
    def products(self):
        """The type of matrix products outside the network; float16 would lose small numbers."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32


def choose_device(name):
    """The torch.device called `name`; "auto" takes the best there is. Raises TrainError."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and WORLD == 1  # there, processes cannot add up their gradients
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if WORLD > 1 and name.startswith("cuda:"):
        raise TrainError(f"--device {name} would put all {WORLD} processes on one GPU: use --device cuda")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} is no device to train on")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainError(f"there is no device {name!r} here: use --device cpu, cuda, mps or auto "
                         f"({str(error).splitlines()[0][:80]})") from error
    return device


def choose_precision(device):
    """Mixed precision where the hardware computes it natively, float32 elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # below, bfloat16 is emulated
        return Precision(torch.bfloat16 if native else torch.float16, not native, torch.channels_last)
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return Precision(torch.bfloat16 if native else None, False, torch.channels_last)
    return Precision(None, False, torch.contiguous_format)  # MPS: channels-last gave wrong gradients, pytorch#175189


# ---------------------------------------------------------------- the mathematics of training


def one_cycle(step, steps, warmup=0.05):
    """The learning rate at `step` of `steps` as a share of its peak: linearly up, then linearly down to zero."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def sides(recipe, epoch):
    """The sides (px) of an epoch's training crops, and of the photos that validate it.

    Crops grow from about 3/4 of `recipe.crop` to all of it by the time that 3/4 of the training is over, in steps of 8
    px: small ones are faster, and harder to learn by heart (progressive resizing: Howard 2018; Tan & Le 2021). Photos
    in validation grow with them, so that early accuracies are those of smaller photos. Pieces at the photo's own scale,
    and whole photos, stay as they are.
    """
    if recipe.plain_crop or recipe.training == "head":
        return recipe.crop, recipe.size
    grown = 3 / 4 + (epoch + 1) / recipe.epochs / 3  # 1 when 3/4 of the epochs are over
    crop = min(recipe.crop, max(8, 8 * round(grown * recipe.crop / 8)))
    return crop, round(crop * recipe.size / recipe.crop)


def least_area(epochs):
    """The share of a photo that a crop shows at least: the longer a training, the smaller. 45 % in 5 epochs, which see
    too little to learn photos by heart; 10 % in 100, which see enough."""
    return epochs**-0.5


def matching_size(crop, epochs):
    """The side (px) of whole photos in which objects are as large as in crops of `crop` px, on average: 96 for 64 px
    and 100 epochs. A crop that shows a share s of a photo enlarges it by s^(-1/2), whose mean over s from a to 1 is
    2 / (1 + sqrt(a)); trained on enlarged objects, a network is best at them (Touvron et al. 2019)."""
    return max(8, 8 * round(crop / 8 * 2 / (1 + least_area(epochs) ** 0.5)))


def batch_lengths(recipe, count):
    """How many photos the batches of an epoch have, of `count` in all."""
    return [len(index) for index in data.shuffled(count, recipe.batch_size, None)]


def epoch_seed(recipe, epoch):
    """The number from which all chance in an epoch follows, also after a kill."""
    return 1_000_003 * recipe.seed + epoch


def orthogonalise(matrices, dtype=torch.float32):
    """Roughly the orthogonal matrix nearest to each of `matrices` (..., m, n): its singular vectors, large singular
    values near 1.

    Newton-Schulz steps x <- (3.4445 - 4.775 xx' + 2.0315 (xx')^2) x (Jordan et al. 2024) bring singular values to
    0.7..1.2 in three steps, but those that are below a fiftieth of the Frobenius norm, which are only raised.
    Polynomials of xx' commute, so their product is found among small (m, m) matrices first, and the large x is
    multiplied but twice; the norm, whose square is the trace of xx', divides the small ones.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)  # (..., m, n), m <= n
    gram = x @ x.mT  # (..., m, m)
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-14  # of the Frobenius norm
    gram = gram / square
    product = torch.eye(gram.shape[-1], dtype=dtype, device=x.device) / square.sqrt()
    for _ in range(3):
        polynomial = -4.7750 * gram + 2.0315 * (gram @ gram)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial  # that of the next x
    x = product @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum that orthogonalises the step of every filter bank (Jordan et al. 2024).

    A gradient is dominated by few directions; orthogonalised, a step moves all of them alike. What is no bank of
    filters over many channels (vectors, linear layers, filters of the photo or of one channel) takes the step as it
    is, at `PLAIN_LR` times the learning rate. Weight decay is for the banks alone: normalisation follows them, so that
    their size does not change what they compute, only how far a step turns them: decay keeps it from growing. Banks of
    one shape are a group, and one stack of matrices.
    """

    def __init__(self, network, lr, weight_decay, momentum=0.9, dtype=torch.float32):
        self.dtype = dtype  # what the orthogonalisation computes in
        banks, plain = defaultdict(list), []
        for p in network.parameters():
            if p.requires_grad:
                alike = banks[p.shape] if p.ndim == 4 and p.shape[1] > 3 else plain
                alike.append(p)
        groups = [dict(params=bank, orthogonal=True, scale=1.0, weight_decay=weight_decay) for bank in banks.values()]
        groups.append(dict(params=plain, orthogonal=False, scale=PLAIN_LR, weight_decay=0.0))
        super().__init__(groups, dict(lr=lr, momentum=momentum))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["velocity"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        """One step of every parameter along its gradient. A `_foreach` function takes a list of tensors at once."""
        for group in self.param_groups:
            parameters, rate, momentum = group["params"], group["lr"] * group["scale"], group["momentum"]
            gradients = [p.grad for p in parameters]
            velocities = [self.state[p]["velocity"] for p in parameters]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, gradients)
            updates = torch._foreach_add(gradients, velocities, alpha=momentum)
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            if group["orthogonal"]:
                filters, channels, height, width = parameters[0].shape
                # (banks, filters, weights), in the order of channels-last memory, which needs no reordering
                matrices = torch.stack([update.permute(0, 2, 3, 1).flatten(1) for update in updates])
                matrices = orthogonalise(matrices, self.dtype).unflatten(2, (height, width, channels))
                updates = matrices.permute(0, 1, 4, 2, 3).unbind()
                rate *= max(1, filters / (channels * height * width)) ** 0.5  # rows of norm 1, of tall matrices too
            torch._foreach_add_(parameters, updates, alpha=-rate)


class Average:
    """A copy of a module that holds a mean of its weights, and of its batch normalisation's statistics, over the steps.

    Step t counts by t^15 (a power function: Karras et al. 2024): mostly the latest tenth of all steps so far, whenever
    that is, so that nothing is to be tuned to the length of a training. While the rate is high, it is better than the
    weights themselves.
    """

    def __init__(self, module, steps=0):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.steps = steps  # taken so far

    def update(self, module):
        """Take in the weights of `module` after another step."""
        self.steps += 1
        share = 1 - (1 - 1 / self.steps) ** 16  # of the latest, for the sum of all t^15 grows as t^16
        mean, new = ([t.detach() for t in (*of.parameters(), *of.buffers()) if t.is_floating_point()]
                     for of in (self.module, module))
        torch._foreach_lerp_(mean, new, share)


def train_epoch(network, batches, plan, optimizer, scaler, precision, smoothing=0.0, average=None):
    """Train `network` on one epoch of (x, labels), x images or features.

    plan: for each step, its learning rate and how many of its photos each process has on average. Where there are
    several, their gradients are averaged: a process with fewer photos weighs less, so that each photo weighs the same.
    average: an `Average` to be kept up. Returns the losses (steps,), on the device, and how many photos were right, of
    how many.
    """
    network.train()
    losses, correct, seen = [], 0, 0
    for (x, labels), (rate, usual) in zip(batches, plan, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(x.device.type, precision.dtype, enabled=precision.dtype is not None):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing) * (len(labels) / usual)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average:
            average.update(network)
        losses.append(loss.detach())  # numbers stay on the device: asking for them would wait for it
        correct = correct + (logits.argmax(1) == labels).sum()
        seen += len(labels)
    return torch.stack(losses), correct, seen


@torch.no_grad()
def evaluate(network, batches, precision, classes):
    """Sums over the photos of each of `classes` classes: cross-entropy, right answers, photos. (3, classes)."""
    network.eval()
    totals = torch.zeros(3, classes, device=next(network.parameters()).device)
    for x, labels in batches:
        with torch.autocast(x.device.type, precision.dtype, enabled=precision.dtype is not None):
            logits = network(x).float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        each = torch.stack([loss, (logits.argmax(1) == labels).float(), torch.ones_like(loss)])  # (3, B)
        totals.index_add_(1, labels, each)
    return totals


# ---------------------------------------------------------------- frozen: photos become their features


@torch.no_grad()
def stored_features(network, photos, size, mirrored):
    """What the frozen part of `network` says of every photo at `size` px and, if `mirrored`, of its mirror image:
    (1 or 2, N, C) float32, averaged over the map, and labels (N,), both on the photos' device."""
    frozen, stored, done, started = models.fold_norms(network).features, [], 0, time.time()
    batch_size = 16 if photos.device.type == "cpu" else 256  # photos at once
    for x, _ in data.eval_batches(photos, size, batch_size):
        views = [x, x.flip(3)] if mirrored else [x]
        stored.append(torch.stack([frozen(view).mean((2, 3)) for view in views]))
        done += len(x)
        data.progress("features:", done, len(photos), started, "photos")
    return torch.cat(stored, 1), photos.labels.to(photos.device)


# ---------------------------------------------------------------- a run: its files, its place in time


def draw_curves(rows, path):
    """Loss and accuracy of every epoch as two small diagrams, with PIL."""
    image = Image.new("RGB", (900, 380), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    colours = {"train": (0, 114, 178), "val": (213, 94, 0)}  # blue and vermilion: distinct to colour-blind eyes
    top, bottom = 50, 330
    highest_loss = max(max(row["train_loss"], row["val_loss"]) for row in rows)
    panels = [("loss", 60, 430, highest_loss, "{:.2f}"), ("accuracy", 510, 880, 1.0, "{:.0%}")]
    for quantity, left, right, highest, style in panels:
        pen.text((left, 16), quantity, "black", font)
        for tick in range(5):
            y = bottom - (bottom - top) * tick / 4
            pen.line((left, y, right, y), (225, 225, 225))
            pen.text((left - 8, y), style.format(highest * tick / 4), "black", font, anchor="rm")
        for place, (split, colour) in enumerate(colours.items()):
            line = [(left + (right - left) * row["epoch"] / len(rows),
                     bottom - (bottom - top) * row[f"{split}_{quantity}"] / highest) for row in rows]
            pen.line(line, colour, 2, joint="curve")
            x, y = line[-1]
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            pen.text((right - 110 + 60 * place, 16), split, colour, font)
        pen.text((right, bottom + 8), f"epoch {rows[-1]['epoch']}", "black", font, anchor="ra")
        pen.text((left, bottom + 8), "0", "black", font)
    png = io.BytesIO()
    image.save(png, "PNG")
    write(path, png.getvalue())


def write(path, contents):
    """Write bytes so that they appear whole or not at all; a file that holds them already is left alone."""
    if not (path.exists() and path.read_bytes() == contents):
        with models.atomic(path) as file:
            file.write(contents)


def write_log(folder, rows):
    """Write the log, a row per epoch, and its curves."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write(folder / "log.csv", text.getvalue().encode())
    draw_curves(rows, folder / "curves.png")


def resume(folder, settings, classes):
    """The state in last.pt of `folder`, or None where a run begins. Raises TrainError where it is another run's, or
    where half of what a run leaves is missing: best weights are never overwritten by a run that does not know them."""
    last, best = folder / "last.pt", folder / "best.pt"
    try:
        state, kept = (models.read(path) if path.exists() else None for path in (last, best))
    except models.ModelError as error:
        raise TrainError(f"{error}; a copy may be put in its place, or remove {folder} to train again") from error
    for path, found, known in ((last, state, {"settings", "rows", "network", "average", "optimizer", "scaler"}),
                               (best, kept, {"settings", "epoch", "classes"})):
        if path.exists() and not (isinstance(found, dict) and found.keys() >= known):
            raise TrainError(f"{path} is no {path.name} that train.py wrote: remove it, or give this run a --name of "
                             "its own")
    if state is None and (kept is None or (kept["settings"], kept["epoch"]) == (settings, 1)):
        return None  # a new run, or one that was killed between its first best.pt and its first last.pt
    if state is None or kept is None:
        gone, there = (last, best) if state is None else (best, last)
        raise TrainError(f"{gone} is gone, and {there} is there: put it back, give this run a --name of its own, "
                         f"or remove {folder} to train again")
    epochs = best_row(state["rows"])["epoch"], len(state["rows"]) + 1  # the latter: killed before its last.pt
    if kept["settings"] != state["settings"] or kept["epoch"] not in epochs:
        raise TrainError(f"{best} is of another training than {last}: put back the one that belongs there, or remove "
                         f"{folder} to train again")
    old, lost, new = state["settings"], set(kept["classes"]) - set(classes), set(classes) - set(kept["classes"])
    differ = [f"{key} {old.get(key)} there, {value} here"
              for key, value in settings.items() if old.get(key) != value and key != "data"]
    if lost or new:
        differ.append(f"classes {data.first_names(lost)} there alone, {data.first_names(new)} here alone")
    elif old.get("data") != settings["data"]:
        differ.append("data: the photos are others, or have changed")
    if differ:
        raise TrainError(f"{folder} holds a run of other settings ({'; '.join(differ)}): repeat them to go on "
                         "with it, give this one a --name of its own (make: RUNS=), or remove the folder")
    return state


def in_range(kind, low, high=math.inf):
    """An argparse type: a `kind` (int or float) from `low` to `high`."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is less than {low:g}, more than {high:g} or no number")
        return kind(text)

    parse.__name__ = kind.__name__  # what argparse calls it where it is none
    return parse


def sizes(text):
    """An argparse type: sizes in px, "224,320", as an ascending tuple."""
    return tuple(sorted({in_range(int, 1, 4096)(size) for size in text.split(",")}))


def check_options(parser, options, training):
    """End with a sentence of `parser` where an option would do nothing for this `training`, or names nothing."""
    if training == "head" and ("crop" in options or options.plain_crop):
        parser.error("--crop and --plain-crop do nothing while all but the last layer is frozen, as each photo is seen "
                     "whole: leave them out, or add --unfreeze")
    for name in ("weights", "runs", "name"):  # of a variable that is not set, perhaps
        if getattr(options, name, "given") == "":
            parser.error(f"--{name} is empty: name one, or leave it out")
    name = getattr(options, "name", "")
    if Path(name).name != name or name == "..":
        parser.error(f"--name {name} is not the name of a folder in --runs: use one without slashes")
    if name.endswith("-dry-run"):
        parser.error(f"--name {name} is what --dry-run calls its run: use another")
    if training == "scratch" and options.plain_crop and "size" not in options:
        parser.error("--plain-crop wants --size, the side of whole photos at their own scale (ImageNette: 160)")
    if training != "scratch" and "width" in options:
        parser.error(f"--width is the cnn's: leave it out for {options.arch}")
    if training == "scratch" and options.unfreeze:
        parser.error("--unfreeze does nothing for the cnn, of which every layer is trained: leave it out")


def make_parser():
    """The options of the command. One that is left out (SUPPRESS) gets a default that depends on what is trained."""
    parser = argparse.ArgumentParser(description="Train the CNN from scratch, or fine-tune an ImageNet network.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument

    def add_recipe(name, kind, what):  # an option whose default depends on what is trained
        names = {"scratch": "for the cnn", "head": "with all frozen but the last layer", "all": "with --unfreeze"}
        key = name.replace("-", "_")
        defaults = ", ".join(f"{values[key]} {names[of]}" for of, values in DEFAULTS.items() if values.get(key))
        add(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: {defaults})")

    add("arch", help="cnn, resnet18, or another torchvision network that CAM is exact for")
    add("--data", default="data/imagenette2-160", help="folder or archive of class folders")
    add("--weights", default=argparse.SUPPRESS, help="'imagenet' (download; the default of every network but the cnn), "
                                                     "'none' (random), or a file in torchvision's format")
    add("--unfreeze", action="store_true", help="train every layer, not the last one alone")
    add_recipe("epochs", in_range(int, 1, 2**31), "passes over the photos")
    add_recipe("crop", in_range(int, 1, 4096), "side of a training crop, px")
    add("--plain-crop", action="store_true", help="crops at the photo's own scale, instead of random resized ones; "
                                              "give --size that scale too (ImageNette: 160)")
    add_recipe("size", in_range(int, 1, 4096), "side of the photos in evaluation, px; of the cnn so that objects are "
                                              "as large as in crops: 96 for 64 px and 100 epochs")
    add("--looks", type=sizes, default=argparse.SUPPRESS, metavar="PX,PX,...",
        help="sides of the photos when maps are made, and for the features under a head; their feature maps are "
             "averaged (default: 2/3, 1 and 4/3 of --size for the cnn, with --plain-crop that alone, 1 and 10/7 of it "
             "for other networks)")
    add_recipe("batch-size", in_range(int, 1, 2**31), "photos in a step")
    add_recipe("lr", in_range(float, 0, 1e37), f"peak learning rate of filters; {PLAIN_LR:g} times it for all else")
    add_recipe("width", in_range(int, 8, 4096), "channels of the cnn at 1/8 of the photo's side")
    add("--holdout", type=in_range(float, 0, 1), default=0.0, help="share of train to validate on, in place of val")
    add("--seed", type=in_range(int, 0, 2**40), default=0, help="decides initial weights, order and crops")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--runs", default="runs", help="where results go")
    add("--name", default=argparse.SUPPRESS, help="folder in --runs; the network's name unless given")
    add("--skip-bad", action="store_true", help="leave damaged photos out, now and whenever these data are used")
    add("--dry-run", action="store_true", help="one epoch of two batches, everything written, as <name>-dry-run")
    return parser


def parse_arguments(arguments=None):
    """The command line as (recipe, options): what decides the result, and where things are and run."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    training = "scratch" if options.arch == "cnn" else "all" if options.unfreeze else "head"
    check_options(parser, options, training)
    weights = getattr(options, "weights", None if training == "scratch" else "imagenet")
    given = {field.name: getattr(options, field.name) for field in fields(Recipe) if field.name in options}
    values = DEFAULTS[training] | given | dict(training=training, weights=None if weights == "none" else weights)
    values.setdefault("size", matching_size(values["crop"], values["epochs"]))  # the cnn's, which DEFAULTS leaves open
    one = (values["size"],)  # what learned objects of one scale alone loses by other sizes: plain crops 13 points
    values.setdefault("looks", one if options.plain_crop else default_looks(options.arch, values["size"]))
    options.name = getattr(options, "name", options.arch)
    if options.dry_run:
        values["epochs"] = 1
        options.name += "-dry-run"
    return Recipe(**values), options


# ---------------------------------------------------------------- a run: its parts


def prepare_photos(recipe, source, skip_bad, few, device):
    """The photos to train on and those to validate on, on `device`; few: no more of each, drawn at random."""
    folder = data.prepare(source)
    photos = data.load(folder, "train", skip_bad).to(device)
    if recipe.holdout:
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))  # the same for every --seed
        cut = max(1, round(recipe.holdout * len(photos)))
        if len(photos) - cut < 2:
            raise TrainError(f"--holdout {recipe.holdout} leaves {len(photos) - cut} of {len(photos):,} photos to "
                             "train on: use a smaller share")
        photos, val = photos.subset(order[cut:]), photos.subset(order[:cut])
        if unseen := len(photos.classes) - len(photos.labels.unique()):
            raise TrainError(f"--holdout {recipe.holdout} leaves no photo of {unseen} classes to train on: use a "
                             "smaller share")
    else:
        val = data.load(folder, "val", skip_bad).to(device)
        if RANK == 0 and (count := data.shared(photos, val)):
            print(f"{folder}: {count:,} of {len(val):,} val photos are in train too, byte for byte: their accuracy "
                  "is that of photos learnt by heart", file=sys.stderr)
    if recipe.plain_crop:  # photos that are too small are refused now, not in the middle of an epoch
        data.plain_boxes(photos, torch.arange(len(photos)), recipe.crop, torch.Generator())
    if few:
        seeded = torch.Generator().manual_seed(0)
        photos, val = (split.subset(torch.randperm(len(split), generator=seeded)[:few]) for split in (photos, val))
    return photos, val


def prepare_network(recipe, photos):
    """A new network to be trained on `photos`, what is frozen frozen. Raises TrainError, ModelError."""
    torch.manual_seed(recipe.seed)
    network = models.build(recipe.arch, len(photos.classes), recipe.weights, recipe.width)
    check_sizes(network, recipe, len(photos))
    if recipe.training == "head":
        network = models.with_looks(network, recipe.looks)
        network.features.requires_grad_(False)
    elif recipe.training == "scratch":
        seeded = torch.Generator().manual_seed(recipe.seed)
        count = max(1, min(256, 2**22 // recipe.crop**2))  # no more pixels for larger crops
        crops, _ = next(data.train_batches(photos, recipe.crop, count, seeded, plain=recipe.plain_crop))
        models.whiten(network, crops)
    return network


@torch.no_grad()
def check_sizes(network, recipe, count):
    """Raise TrainError where `network` cannot take images of the recipe's sizes, or the smallest batch of `count`
    photos. Only small images can be too small: of 96 px at most are tried."""
    network = copy.deepcopy(network)  # a pass in training mode changes the statistics of batch normalisation
    smallest = min(2, min(batch_lengths(recipe, count)) // WORLD)
    crop, size = sides(recipe, 0)
    passes = [("--crop", crop, smallest, True)] if recipe.training != "head" else []
    passes += [("--size or --looks", side, 1, False) for side in {size, *recipe.looks}]
    for option, side, photos, training in passes:
        try:
            network.train(training)(torch.zeros(photos, 3, min(side, 96), min(side, 96)))
        except (RuntimeError, ValueError) as error:
            raise TrainError(f"{recipe.arch} cannot take {photos} x 3 x {side} x {side} px "
                             f"({str(error).splitlines()[0][:80]}): use a larger {option}, or --batch-size") from error


def make_batches(recipe, network, photos, val, precision):
    """What to train, and where an epoch of batches for it comes from: (module, train_batches, val_batches).

    train_batches(epoch) and val_batches(epoch) yield (x, labels) for `module`. Where all but the last layer is frozen,
    the module is the last layer and x are stored features; else it is the network and x are images.
    """
    val = val.subset(torch.arange(RANK, len(val), WORLD))
    if recipe.training != "head":
        def train_batches(epoch):
            generator = torch.Generator().manual_seed(epoch_seed(recipe, epoch))
            return data.train_batches(photos, sides(recipe, epoch)[0], recipe.batch_size, generator,
                                      least_area(recipe.epochs), recipe.plain_crop, (RANK, WORLD), precision.products)

        return network, train_batches, lambda epoch: data.eval_batches(val, sides(recipe, epoch)[1], 128)

    features, labels = stored_features(network, photos, recipe.looks[-1], mirrored=True)  # (2, N, C), (N,)
    val_features, val_labels = stored_features(network, val, recipe.looks[-1], mirrored=False)

    def feature_batches(epoch):  # each photo once, as it is or mirrored
        generator = torch.Generator().manual_seed(epoch_seed(recipe, epoch))
        for index in data.shuffled(len(photos), recipe.batch_size, generator):
            side = torch.randint(2, (len(index),), generator=generator)
            index, side = (t[RANK::WORLD].to(features.device) for t in (index, side))
            yield features[side, index], labels[index]

    return network.head, feature_batches, lambda epoch: [(val_features[0], val_labels)]


def run_epochs(folder, recipe, network, batches, count, facts, state, precision):
    """Train from where `state` (of last.pt, or None) stands to the last epoch, `count` photos each; returns the rows of
    the log. What is validated and kept is the average of the weights. batches: of `make_batches`."""
    module, train_batches, val_batches = batches
    device = next(module.parameters()).device
    lengths = batch_lengths(recipe, count)
    steps = len(lengths)
    rows = state["rows"] if state else []
    optimizer = Muon(module, recipe.lr, recipe.weight_decay, dtype=precision.products)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)
    average = Average(module, len(rows) * steps)
    averaged = average.module if module is network else models.CAMNet(network.features, average.module)
    if state:
        averaged.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run began on a device that needs none
            scaler.load_state_dict(state["scaler"])
    parallel = torch.nn.parallel.DistributedDataParallel(module) if WORLD > 1 else module
    for epoch in range(len(rows), recipe.epochs):
        started = time.perf_counter()  # on Windows, time.time() ticks 64 times a second: an epoch of a head takes less
        torch.manual_seed(epoch_seed(recipe, epoch))  # of dropout, where a network has some
        plan = [(recipe.lr * one_cycle(epoch * steps + i, recipe.epochs * steps), length / WORLD)
                for i, length in enumerate(lengths)]
        losses, correct, seen = train_epoch(parallel, train_batches(epoch), plan, optimizer, scaler, precision,
                                            recipe.smoothing, average)
        losses = sum_over_processes(losses) / WORLD
        correct, seen = sum_over_processes(torch.stack([correct, torch.tensor(seen, device=device)])).tolist()
        speed = seen / (time.perf_counter() - started)
        if WORLD > 1:  # each has statistics of its own; rank 0's are those that are saved
            for buffer in (*module.buffers(), *average.module.buffers()):
                torch.distributed.broadcast(buffer, 0)
        totals = evaluate(average.module, val_batches(epoch), precision, len(facts["classes"]))
        scores = val_scores(sum_over_processes(totals))
        check_finite([*losses.tolist(), scores["val_loss"]], folder, epoch)
        looks = recipe.looks if recipe.training == "head" else [sides(recipe, epoch)[1]]
        rows.append(dict(epoch=epoch + 1, size=models.looks_key(looks), train_loss=round(float(losses.mean()), 4),
                         train_accuracy=round(correct / seen, 5), **scores, lr=round(plan[0][0], 6),
                         images_per_second=round(speed), seconds=round(time.perf_counter() - started, 2)))
        if RANK == 0:
            save_epoch(folder, rows, averaged, facts, dict(
                network=network.state_dict(), average=averaged.state_dict(), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict()))
    return rows


def check_finite(losses, folder, epoch):
    """Raise TrainError where one of an epoch's losses, of each step and then of validation, is no finite number."""
    if bad := [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]:
        where = f"step {bad[0]}" if bad[0] < len(losses) else "validation"
        raise TrainError(f"the loss is not finite in epoch {epoch + 1}, {where}: use a smaller --lr; what is in "
                         f"{folder} is still of epoch {epoch}")


def save_epoch(folder, rows, averaged, facts, state):
    """Write what an epoch leaves behind, each file whole or not at all, and say so: best.pt, where it is the best so
    far, of the network `averaged` and `facts`; last.pt, of `state`, all that is needed to go on; the log."""
    row = rows[-1]
    best = row is best_row(rows)
    if best:
        models.save(folder / "best.pt", averaged, **facts, epoch=len(rows),
                    accuracies={row["size"]: row["val_accuracy"]})
    models.write(folder / "last.pt", dict(state, settings=facts["settings"], rows=rows))
    write_log(folder, rows)
    epochs = facts["settings"]["epochs"]
    left = (epochs - len(rows)) * row["seconds"]
    classes = "" if row["val_accuracy"] == row["val_class_accuracy"] else f" (classes {row['val_class_accuracy']:.2%})"
    print(f"epoch {len(rows):3d}/{epochs}  loss {row['train_loss']:.3f}  train {row['train_accuracy']:6.2%}  "
          f"val {row['val_accuracy']:6.2%}{classes}{' *' if best else '  '}  {row['images_per_second']:6,} images/s  "
          f"{left // 60:.0f}:{left % 60:02.0f} left", flush=True)


def best_row(rows):
    """The first row of the log with the highest accuracy: that of best.pt."""
    return max(rows, key=lambda row: row["val_accuracy"])


def val_scores(totals):
    """The columns of the log that follow from the sums (3, K) of `evaluate`. The accuracy of the classes is the mean of
    each class's own, which classes of few photos count in as much as those of many."""
    loss, right, photos = totals.cpu().double()  # MPS knows no float64
    there = photos > 0
    return dict(val_loss=round(float(loss.sum() / photos.sum()), 4),
                val_accuracy=round(float(right.sum() / photos.sum()), 5),
                val_class_accuracy=round(float((right[there] / photos[there]).mean()), 5))


def finish(folder, rows, val, precision):
    """Write result.json, the last file of a run; best.pt gets the accuracy of all its looks, if val was seen at one."""
    contents = models.read(folder / "best.pt")
    key = models.looks_key(contents["looks"])
    if key not in contents["accuracies"]:
        network, facts = models.load(folder / "best.pt", val.device)
        totals = evaluate(network, data.eval_batches(val, facts["size"], 64), precision, len(facts["classes"]))
        contents["accuracies"][key] = val_scores(totals)["val_accuracy"]
        models.write(folder / "best.pt", contents)
    write_log(folder, rows)  # a run may have been killed right after its last last.pt
    best, last = best_row(rows), rows[-1]
    passed = next((row["epoch"] for row in rows if row["val_accuracy"] >= PASSED), None)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"{folder / 'config.json'} is gone or damaged: put it back, or remove {folder} to train "
                         "again") from error
    write(folder / "result.json", json.dumps(dict(
        best_accuracy=best["val_accuracy"], best_epoch=best["epoch"], last_accuracy=last["val_accuracy"],
        accuracies=contents["accuracies"], accuracy_on=contents["accuracy_on"], accuracy_n=contents["accuracy_n"],
        epochs_to_72=passed, seconds_to_72=passed and round(sum(row["seconds"] for row in rows[:passed]), 1),
        seconds=round(sum(row["seconds"] for row in rows), 1), **config), indent=1).encode())
    print(f"{folder}: best {best['val_accuracy']:.2%} (epoch {best['epoch']}), last {last['val_accuracy']:.2%}")


def train(recipe, options):
    """The whole of a run, or what is left of it."""
    models.keep_memory()
    device = choose_device(options.device)
    precision = choose_precision(device)
    if recipe.training == "head":  # one pass, in the precision of maps: bfloat16 moves a photo's features by a seventh
        precision = precision._replace(dtype=None, scale=False)
    if device.type == "cuda" and recipe.training == "head":
        torch.backends.cudnn.allow_tf32 = False  # nor TF32
    elif device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    if WORLD > 1:
        nccl = device.type == "cuda" and torch.distributed.is_nccl_available()  # not on Windows
        try:
            torch.distributed.init_process_group("nccl" if nccl else "gloo")
        except ValueError as error:
            raise TrainError(f"WORLD_SIZE is {WORLD}, but torchrun did not start this: unset it, or use torchrun "
                             f"({error})") from error
    few = 2 * recipe.batch_size if options.dry_run else None
    photos, val = prepare_photos(recipe, options.data, options.skip_bad, few, device)
    if min(len(val), *batch_lengths(recipe, len(photos))) < WORLD:
        raise TrainError(f"{WORLD} processes are more than a batch or val has photos: use a larger --batch-size than "
                         f"{recipe.batch_size}, or fewer processes")
    folder = Path(os.path.expanduser(options.runs)) / options.name
    goes_on = (folder / "last.pt").exists() and not options.dry_run  # all weights are in there
    network = prepare_network(replace(recipe, weights=None) if goes_on else recipe, photos)
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if RANK else data.lock(folder / "run", wait=False):
        run(folder, recipe, network, photos, val, precision, options.dry_run)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def run(folder, recipe, network, photos, val, precision, dry_run):
    """Train the run of `folder` to its end."""
    settings = dict(asdict(recipe), looks=list(recipe.looks), photos=[len(photos), len(val)],
                    data=[photos.fingerprint, val.fingerprint])
    state = None if dry_run else resume(folder, settings, photos.classes)
    rows = state["rows"] if state else []
    device = photos.device.type
    network = network.to(photos.device, memory_format=precision.memory_format)
    if state:
        network.load_state_dict(state["network"])
    parameters = sum(p.numel() for p in network.parameters())
    if RANK == 0:
        print(f"{folder}: {recipe.arch}, {parameters / 1e6:.1f} million parameters, {device}, {precision.name}, "
              f"{len(photos):,} photos to train on, {len(val):,} to validate on"
              + (f"; {len(rows)} of {recipe.epochs} epochs are done" if rows else ""), flush=True)
    if len(rows) < recipe.epochs:
        if RANK == 0:
            for part in folder.glob("*.part"):  # of a run that was killed, for this one holds the lock
                part.unlink(missing_ok=True)
            write(folder / "config.json", json.dumps(dict(
                command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), recipe=settings,
                parameters=parameters, device=device, precision=precision.name, threads=torch.get_num_threads(),
                processes=WORLD, machine=models.machine()), indent=1).encode())
            (folder / "result.json").unlink(missing_ok=True)  # it says that a run has ended
        how = ("only its last layer trained" if recipe.training == "head" else
               "every layer fine-tuned" if recipe.weights else "trained from scratch")
        facts = dict(arch=recipe.arch, classes=photos.classes, mean=data.MEAN, std=data.STD, looks=list(recipe.looks),
                     how=how, accuracy_on="held-out train" if recipe.holdout else "val", accuracy_n=len(val),
                     settings=settings)
        batches = make_batches(recipe, network, photos, val, precision)
        rows = run_epochs(folder, recipe, network, batches, len(photos), facts, state, precision)
    if RANK == 0:
        finish(folder, rows, val, precision)


def main():
    """The command line: a run, and a sentence for what a user can mend."""
    recipe, options = parse_arguments()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a name that this terminal has no letters for
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        train(recipe, options)
    except KeyboardInterrupt:
        print("train.py: stopped; the finished epochs are saved, and the same command goes on from there",
              file=sys.stderr)
        sys.exit(130)
    except (TrainError, data.DataError, models.ModelError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not models.out_of_memory(error):
            raise
        smaller = ("smaller --looks" if recipe.training == "head" else
                   f"a smaller --batch-size than {recipe.batch_size}, or a smaller --crop or --size")
        print(f"train.py: not enough memory ({error!r:.100}): use {smaller}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
