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
import csv
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import models

PLAIN_LR = 5.0  # the learning rate of what Muon leaves to SGD, in units of Muon's own
# What is trained decides the recipe. crop: px, of the random crops; size: px, of evaluation and of stored features.
RECIPES = {
    "scratch": dict(epochs=100, crop=64, size=96, batch_size=32, lr=0.02, weight_decay=0.05, smoothing=0.1),
    "head": dict(epochs=5, crop=0, size=224, batch_size=64, lr=0.003, weight_decay=0.0, smoothing=0.0),
    "unfreeze": dict(epochs=5, crop=160, size=160, batch_size=64, lr=0.002, weight_decay=5e-4, smoothing=0.1),
}
SETTINGS = {"arch", "weights", "epochs", "crop", "plain_crop", "size", "batch_size", "lr", "weight_decay", "smoothing",
            "holdout", "seed"}  # a run may be continued only by one in which all of these are the same


RECIPE_VERSION = 2  # counts the changes to what the settings do not say: optimiser, schedule, crops


class TrainError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


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
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


# ---------------------------------------------------------------- several processes (torchrun)

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def sum_over_processes(tensor):
    """The sum of `tensor` over all processes, on each of them; just `tensor` where there is one."""
    if WORLD > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------- the mathematics of training


def one_cycle(step, steps, warmup=0.05):
    """The learning rate at `step` of `steps` as a share of its peak: linearly up, then linearly down to zero."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def orthogonalise(matrix, dtype=torch.float32):
    """Roughly the orthogonal matrix nearest to `matrix` (m, n): its singular vectors, large singular values near 1.

    Three Newton-Schulz steps of a quintic that drives singular values in 0..1 towards 1; those below a fiftieth of the
    norm are only raised, which trains as well. Matrix products alone, which bfloat16 is exact enough for.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(3):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
        x = torch.addmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum that orthogonalises the step of every filter bank (Jordan et al. 2024).

    A gradient is dominated by few directions; orthogonalised, a step moves all of them alike. What is no bank of
    filters over many channels (vectors, linear layers, filters of the photo or of one channel) takes plain SGD steps,
    at `PLAIN_LR` times the learning rate. Weight decay is for the banks alone: where normalisation follows, their
    norm does not matter, but sets how far a step turns them.
    """

    def __init__(self, network, lr, weight_decay, momentum=0.9, dtype=torch.float32):
        self.dtype = dtype  # what the orthogonalisation computes in
        banks, plain = [], []
        for p in network.parameters():
            if p.requires_grad:
                (banks if p.ndim == 4 and p.shape[1] > 3 else plain).append(p)
        groups = [dict(params=banks, orthogonal=True, scale=1.0, weight_decay=weight_decay),
                  dict(params=plain, orthogonal=False, scale=PLAIN_LR, weight_decay=0.0)]  # fmt: skip
        super().__init__([group for group in groups if group["params"]], dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One step of every parameter along its gradient."""
        for group in self.param_groups:
            rate = group["lr"] * group["scale"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
                velocity = self.state[p]["velocity"]
                velocity.mul_(group["momentum"]).add_(p.grad)
                update = p.grad + group["momentum"] * velocity
                if group["orthogonal"]:
                    rows, columns = len(p), p[0].numel()
                    update = orthogonalise(update.reshape(rows, columns), self.dtype).reshape(p.shape)
                    update *= max(1, rows / columns) ** 0.5
                p.mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=rate)


def train_epoch(network, batches, plan, optimizer, scaler, precision, smoothing=0.0):
    """Train `network` on one epoch of (x, labels), x images or features.

    plan: for each step, its learning rate and how many photos a process has in it on average; one process has them
    all, and where there are several, a smaller part weighs less, so that their mean gradient is that of the batch.
    Returns the losses (steps,), on the device, and how many photos were right, of how many.
    """
    network.train()
    losses, correct, seen = [], 0, 0
    for (x, labels), (rate, share) in zip(batches, plan, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(x.device.type, precision.dtype, enabled=precision.dtype is not None):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing) * (len(labels) / share)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())  # numbers stay on the device: asking for them would wait for it
        correct = correct + (logits.argmax(1) == labels).sum()
        seen += len(labels)
    return torch.stack(losses), correct, seen


@torch.no_grad()
def evaluate(network, batches, precision):
    """Sums over all photos, of the cross-entropy and of the right answers, and the number of photos: (3,)."""
    network.eval()
    totals = 0
    for x, labels in batches:
        with torch.autocast(x.device.type, precision.dtype, enabled=precision.dtype is not None):
            logits = network(x).float()
        right = (logits.argmax(1) == labels).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals = totals + torch.stack([loss, right, torch.tensor(len(labels), device=loss.device)])
    return totals


# ---------------------------------------------------------------- frozen: photos become their features


@torch.no_grad()
def stored_features(network, photos, size, precision, mirrored):
    """What the frozen part of `network` says of every photo and, if `mirrored`, of its mirror image: (1 or 2, N, C)
    float32, averaged over the map. With all but the last layer frozen, training asks no more of a photo, in any epoch.
    """
    frozen, stored, done, started = models.fold_norms(network).features, [], 0, time.time()
    device = photos.labels.device
    batch_size = 16 if device.type == "cpu" else 256  # small enough for a processor's cache
    for x, _ in data.eval_batches(photos, size, batch_size):
        with torch.autocast(device.type, precision.dtype, enabled=precision.dtype is not None):
            sides = [x, x.flip(3)] if mirrored else [x]
            stored.append(torch.stack([frozen(side).float().mean((2, 3)) for side in sides]))
        done += len(x)
        data.progress("features:", done, len(photos), started, "photos")
    return torch.cat(stored, 1)


# ---------------------------------------------------------------- a run: its files, its place in time


def draw_curves(rows, path, width=900, height=380):
    """Loss and accuracy of every epoch as two small diagrams, with PIL."""
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    colours = {"train": (0, 114, 178), "val": (213, 94, 0)}  # blue and vermilion: distinct to colour-blind eyes
    for panel, quantity in enumerate(("loss", "accuracy")):
        left, top, right, bottom = panel * width // 2 + 60, 50, (panel + 1) * width // 2 - 20, height - 50
        top_value = 1.0 if quantity == "accuracy" else max(max(r["train_loss"], r["val_loss"]) for r in rows)
        pen.text((left, 16), quantity, "black", font)
        for tick in range(5):
            y = bottom - (bottom - top) * tick / 4
            pen.line((left, y, right, y), (225, 225, 225))
            label = f"{tick / 4:.0%}" if quantity == "accuracy" else f"{top_value * tick / 4:.2f}"
            pen.text((left - 8, y), label, "black", font, anchor="rm")
        for place, (split, colour) in enumerate(colours.items()):
            values = [float(r[f"{split}_{quantity}"]) for r in rows]
            xs = [left + (right - left) * (i + 1) / len(values) for i in range(len(values))]
            line = [(x, bottom - (bottom - top) * min(v / top_value, 1)) for x, v in zip(xs, values, strict=True)]
            pen.line(line, colour, 2, joint="curve")
            pen.ellipse((line[-1][0] - 3, line[-1][1] - 3, line[-1][0] + 3, line[-1][1] + 3), colour)
            pen.text((right - 110 + 60 * place, 16), split, colour, font)
        pen.text((right, bottom + 8), f"epoch {rows[-1]['epoch']}", "black", font, anchor="ra")
        pen.text((left, bottom + 8), "0", "black", font)
    with models.atomic(path) as file:
        image.save(file, "PNG")


def write_text(path, text):
    """Write `text` so that it appears whole or not at all."""
    with models.atomic(path) as file:
        file.write(text.encode())


def as_csv(rows):
    """A list of dicts of the same keys as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def resume(path, settings):
    """The state in `path` (last.pt), or None where a run begins. Raises TrainError where it is another run's."""
    if not path.exists():
        return None
    state = models.read(path)
    if not isinstance(state, dict) or not state.keys() >= {"settings", "rows", "network", "optimizer", "scaler"}:
        raise TrainError(f"{path} is no last.pt that train.py wrote: remove it, or give this run a --name of its own")
    old = state["settings"]
    differ = [f"{k} {old.get(k)} there, {new} here" for k, new in settings.items() if old.get(k) != new]
    if differ:
        raise TrainError(f"{path.parent} holds a run of other settings ({'; '.join(differ)}): repeat them to go on "
                         "with it, give this one a --name of its own, or remove the folder")
    return state


def number(kind, low, high=math.inf):
    """An argparse type: a `kind` (int or float) from `low` to `high`."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is less than {low:g}, more than {high:g} or no number")
        return kind(text)

    parse.__name__ = kind.__name__  # what argparse calls it where it is none
    return parse


def parse_arguments(arguments=None):
    """The options of a run, those that were not given filled in from its recipe."""
    parser = argparse.ArgumentParser(description="Train the CNN from scratch, or fine-tune an ImageNet network.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip

    def recipe(key, kind, what=""):  # an option whose default depends on what is trained
        names = {"scratch": "for the cnn", "head": "with all frozen but the last layer", "unfreeze": "with --unfreeze"}
        defaults = ", ".join(f"{values[key]} {names[of]}" for of, values in RECIPES.items() if values[key])
        add(f"--{key.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=f"{what} (default: {defaults})")

    add = parser.add_argument
    add("arch", help="cnn, resnet18, or another torchvision network that CAM is exact for")
    add("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    add("--weights", default=argparse.SUPPRESS, help="'imagenet' (download; the default of every network but the cnn), "
        "'none' (random), or a file in torchvision's format")  # fmt: skip
    add("--unfreeze", action="store_true", help="train every layer, not the last one alone")
    recipe("epochs", number(int, 1), "passes over the photos")
    recipe("crop", number(int, 1), "side of a training crop, px")
    add("--plain-crop", action="store_true", help="crops at the photo's own scale, instead of random resized ones")
    recipe("size", number(int, 1), "side of the photos in evaluation, px")
    recipe("batch_size", number(int, 1), "photos in a step")
    recipe("lr", number(float, 0, 1e38), "peak learning rate")
    add("--holdout", type=number(float, 0, 1), default=0.0, help="share of train to validate on, in place of val")
    add("--seed", type=number(int, 0, 2**40), default=0, help="decides initial weights, order and crops")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--runs", default="runs", help="where results go")
    add("--name", default=argparse.SUPPRESS, help="folder in --runs; the network's name unless given")
    add("--skip-bad", action="store_true", help="leave damaged photos out")
    add("--dry-run", action="store_true", help="one epoch of two batches, everything written, as <name>-dry-run")
    options = parser.parse_args(arguments)
    options.kind = "scratch" if options.arch == "cnn" else "unfreeze" if options.unfreeze else "head"
    weights = getattr(options, "weights", None if options.arch == "cnn" else "imagenet")
    options.weights = None if weights == "none" else weights
    options.name = getattr(options, "name", options.arch) + "-dry-run" * options.dry_run
    options = argparse.Namespace(**{**RECIPES[options.kind], **vars(options)})
    options.epochs = 1 if options.dry_run else options.epochs
    return options


def prepare_photos(options, device):
    """The photos to train on and those to validate on, in the memory of `device`."""
    folder = data.prepare(options.data)
    photos = data.load(folder, "train", options.skip_bad)
    if options.holdout:
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))  # the same for every --seed
        cut = max(1, round(options.holdout * len(photos)))
        if len(photos) - cut < 2:
            raise TrainError(f"--holdout {options.holdout} leaves {len(photos) - cut} of {len(photos):,} photos to "
                             "train on: use a smaller share")
        photos, val = photos.subset(order[cut:]), photos.subset(order[:cut])
    else:
        val = data.load(folder, "val", options.skip_bad)
    if options.dry_run:
        few, seeded = 2 * options.batch_size, torch.Generator().manual_seed(0)
        photos, val = (p.subset(torch.randperm(len(p), generator=seeded)[:few]) for p in (photos, val))
    return photos.to(device), val.to(device)


def prepare_network(options, photos, finished):
    """A new network; unless the run is finished, the first layer of the CNN is computed from `photos` and frozen."""
    torch.manual_seed(options.seed)
    network = models.build(options.arch, len(data.CLASSES), options.weights)
    if options.kind == "scratch" and not finished:
        seeded = torch.Generator().manual_seed(options.seed)
        crops, _ = next(data.train_batches(photos, options.crop, 256, seeded, plain=options.plain_crop))
        models.whiten(network, crops)
    return network


def make_batches(options, network, photos, val, precision):
    """What to train, and where an epoch of batches for it comes from: (module, train_batches, val_batches).

    train_batches(generator) and val_batches() each yield (x, labels) for `module`. Where all but the last layer is
    frozen, the module is the last layer and x are stored features; else it is the network and x are images.
    """
    part, val = (RANK, WORLD), val.subset(torch.arange(RANK, len(val), WORLD, device=val.labels.device))
    if options.kind != "head":
        def train_batches(generator):
            return data.train_batches(photos, options.crop, options.batch_size, generator, plain=options.plain_crop,
                                      part=part, dtype=precision.products)  # fmt: skip

        return network, train_batches, lambda: data.eval_batches(val, options.size, 128)

    network.features.requires_grad_(False)
    features = stored_features(network, photos, options.size, precision, mirrored=True)  # (2, N, C)
    val_features = stored_features(network, val, options.size, precision, mirrored=False)[0]  # (N, C)

    def feature_batches(generator):  # each photo once, as it is or mirrored
        for index in data.shuffled(len(photos), options.batch_size, generator):
            side = torch.randint(2, (len(index),), generator=generator)
            index, side = (t[RANK::WORLD].to(features.device) for t in (index, side))
            yield features[side, index], photos.labels[index]

    return network.head, feature_batches, lambda: [(val_features, val.labels)]


def report(folder, rows):
    """Write the log, a row per epoch, and its curves."""
    write_text(folder / "log.csv", as_csv(rows))
    draw_curves(rows, folder / "curves.png")


def save_epoch(folder, options, settings, network, optimizer, scaler, rows):
    """Write what an epoch leaves behind, each file whole or not at all; best.pt only where this one is the best."""
    accuracy = [row["val_accuracy"] for row in rows]
    is_best = accuracy[-1] > max(accuracy[:-1], default=-1)
    if is_best:
        models.save(folder / "best.pt", network, arch=options.arch, classes=list(data.CLASSES.values()),
                    mean=data.MEAN, std=data.STD, looks=[options.size], settings=settings, epoch=len(rows),
                    accuracies={models.looks_key([options.size]): accuracy[-1]}, accuracy_n=settings["photos"][1],
                    accuracy_on="held-out train" if options.holdout else "val",
                    how="only its last layer trained" if options.kind == "head" else "trained from scratch"
                        if not options.weights else "every layer fine-tuned")
    models.write(folder / "last.pt", dict(settings=settings, rows=rows, network=network.state_dict(),
                                          optimizer=optimizer.state_dict(), scaler=scaler.state_dict()))
    report(folder, rows)
    row, left = rows[-1], (options.epochs - len(rows)) * rows[-1]["seconds"]
    print(f"epoch {len(rows):3d}/{options.epochs}  loss {row['train_loss']:.3f}  train {row['train_accuracy']:6.2%}  "
          f"val {accuracy[-1]:6.2%}{' *' if is_best else '  '}  {row['images_per_second']:6,} images/s  "
          f"{left // 60:.0f}:{left % 60:02.0f} left", flush=True)


def run_epochs(folder, options, settings, network, batches, state, precision):
    """Train from where `state` (of last.pt, or None) stands to the last epoch. Returns the rows of the log."""
    module, train_batches, val_batches = batches
    device = next(module.parameters()).device
    optimizer = Muon(module, options.lr, options.weight_decay, dtype=precision.products)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)
    rows = []
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        rows = state["rows"]
    parallel = torch.nn.parallel.DistributedDataParallel(module) if WORLD > 1 else module
    sizes = [len(index) for index in data.shuffled(settings["photos"][0], options.batch_size, None)]
    steps = len(sizes)
    for epoch in range(len(rows), options.epochs):
        started = time.time()
        torch.manual_seed(1_000_003 * options.seed + epoch)  # all chance in an epoch follows from its number
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + epoch)
        plan = [(options.lr * one_cycle(epoch * steps + i, options.epochs * steps), size / WORLD)
                for i, size in enumerate(sizes)]  # fmt: skip
        losses, correct, seen = train_epoch(parallel, train_batches(generator), plan, optimizer, scaler, precision,
                                            options.smoothing)
        losses = sum_over_processes(losses) / WORLD
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).nonzero()[0]) + 1
            raise TrainError(f"the loss is not finite in epoch {epoch + 1}, step {step}: use a smaller --lr; "
                             f"what is in {folder} is still of epoch {epoch}")
        correct, seen = sum_over_processes(torch.stack([correct, torch.tensor(seen, device=device)])).tolist()
        speed = seen / (time.time() - started)
        for buffer in module.buffers() if WORLD > 1 else ():
            torch.distributed.broadcast(buffer, 0)  # each has statistics of its own; rank 0's are those that are saved
        val_loss, right, count = sum_over_processes(evaluate(module, val_batches(), precision)).tolist()
        if not math.isfinite(val_loss):
            raise TrainError(f"the validation loss is not finite after epoch {epoch + 1}: use a smaller --lr; "
                             f"what is in {folder} is still of epoch {epoch}")
        rows.append(dict(epoch=epoch + 1, train_loss=round(float(losses.mean()), 4),
                         train_accuracy=round(correct / seen, 5), val_loss=round(val_loss / count, 4),
                         val_accuracy=round(right / count, 5), lr=round(plan[0][0], 6),
                         images_per_second=round(speed), seconds=round(time.time() - started, 1)))  # fmt: skip
        if RANK == 0:
            save_epoch(folder, options, settings, network, optimizer, scaler, rows)
    return rows


def train(options):
    """The whole of a run, or what is left of it."""
    models.keep_memory()
    device = choose_device(options.device)
    precision = choose_precision(device)
    if WORLD > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder = Path(options.runs) / options.name
    photos, val = prepare_photos(options, device)
    if min(len(val), *map(len, data.shuffled(len(photos), options.batch_size, None))) < WORLD:
        raise TrainError(f"{WORLD} processes are more than a batch or val has photos: use a larger --batch-size than "
                         f"{options.batch_size}, or fewer processes")
    settings = {k: v for k, v in vars(options).items() if k in SETTINGS} | {
        "frozen": options.kind == "head", "photos": [len(photos), len(val)], "recipe": RECIPE_VERSION}  # fmt: skip
    state = None if options.dry_run else resume(folder / "last.pt", settings)
    rows = state["rows"] if state else []

    finished = len(rows) == options.epochs
    network = prepare_network(options, photos, finished).to(device, memory_format=precision.memory_format)
    if state:
        network.load_state_dict(state["network"])
    if RANK == 0:
        print(f"{folder}: {options.arch}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters, "
              f"{device.type}, {precision.name}, {len(photos):,} photos to train on, {len(val):,} to validate on"
              + (f"; {len(rows)} of {options.epochs} epochs are done" if rows else ""), flush=True)
    if not finished:
        if RANK == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for part in folder.glob("*.part"):
                if time.time() - part.stat().st_mtime > 60:  # a killed run's; a younger one may be another run's
                    part.unlink(missing_ok=True)
            here = dict(device=device.type, precision=precision.name, torch=torch.__version__,
                        threads=torch.get_num_threads(), processes=WORLD)  # fmt: skip
            write_text(folder / "config.json", json.dumps(settings | here, indent=1))
        batches = make_batches(options, network, photos, val, precision)
        rows = run_epochs(folder, options, settings, network, batches, state, precision)
    if RANK == 0:
        best = max(rows, key=lambda row: row["val_accuracy"])
        ends = [folder / name for name in ("log.csv", "curves.png", "result.json")]  # in the order of writing
        if not finished or not all(path.exists() for path in ends):  # a run may be killed after its last last.pt
            report(folder, rows)
            write_text(ends[-1], json.dumps(dict(
                best_accuracy=best["val_accuracy"], best_epoch=best["epoch"], last_accuracy=rows[-1]["val_accuracy"],
                seconds=round(sum(row["seconds"] for row in rows), 1)), indent=1))  # fmt: skip
        print(f"{folder}: best {best['val_accuracy']:.2%} (epoch {best['epoch']}), last {rows[-1]['val_accuracy']:.2%}"
              + ("; all epochs are done, nothing to do" if finished else ""))
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def main():
    """The command line: a run, and a sentence for what a user can mend."""
    options = parse_arguments()

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        train(options)
    except KeyboardInterrupt:
        print("train.py: stopped; the finished epochs are saved, and the same command goes on from there",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)
    except (TrainError, data.DataError, models.ModelError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # torch has a type of its own for running out of memory on CUDA alone
        if not any(text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")):
            raise
        print(f"train.py: not enough memory ({str(error).splitlines()[0][:100]}): use a smaller --batch-size than "
              f"{options.batch_size}, or a smaller --crop or --size", file=sys.stderr)  # fmt: skip
        sys.exit(2)


if __name__ == "__main__":
    main()
