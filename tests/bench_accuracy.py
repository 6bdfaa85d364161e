"""How long until 85 % of val, against the usual ways of training: `make bench-accuracy`, or

    python tests/bench_accuracy.py --data data/imagenette2-160 --run runs/cnn-64-20-0

This project's time is that of a run's log.csv, or, without --run, of a new training; the usual ways
are trained here from scratch, torchvision's ResNet-18 and this project's CNN, until they are there,
with nothing beside them. All train on 64 px crops of photos that are on disk, and are validated
after every epoch on whole photos of the size that suits their crops, 96 px the usual way (a crop
shows 8 % of a photo or more), less in this project; time is that of all epochs up to the first that
gets there, validation included, the start of the program and decoding photos ahead of time not.
Prints what was reached and writes it as JSON (--out).
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import files
import folders
import machine
import models
import score
import train
from runs import type_name

HERE = Path(__file__).resolve().parent.parent
RECIPE = train.make_recipe("cnn")
CROP, SIZE, SMOOTHING = RECIPE.crop, 96, RECIPE.smoothing
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.05, 0.9, 5e-4  # of the usual ways


def first_pass(rows, accuracy):
    """Seconds and epochs until `accuracy`, both None where it is not reached, and the best accuracy
    and the seconds of all of it. rows: (val accuracy, seconds) of each epoch."""
    passed = next((epoch for epoch, (reached, _) in enumerate(rows, 1) if reached >= accuracy),
                  None)
    return dict(seconds=passed and round(sum(seconds for _, seconds in rows[:passed]), 1),
                epochs=passed, best=round(max(reached for reached, _ in rows), 5),
                all_seconds=round(sum(seconds for _, seconds in rows), 1))


# ---------------------------------------------------------------- this project


def read_run(run):
    """The (val accuracy, seconds) of all epochs of a finished training in the folder `run`, and its
    result.json."""
    try:
        result = json.loads((run / "result.json").read_text())
        with open(run / "log.csv", newline="") as file:
            rows = [(float(row["val_accuracy"]), float(row["seconds"]))
                    for row in csv.DictReader(file)]
        here, there = machine.facts()["processor"], result["machine"]["processor"]
        if not rows:
            raise ValueError("its log is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} holds no finished training of train.py ({error}): name another "
                         "with --run, or leave it out for a new training") from error
    if here != there:
        raise ValueError(f"{run} was trained on another machine, {there}, not on {here}: leave "
                         "--run out")
    if result["accuracy_on"] != "val":
        raise ValueError(f"{run} was validated on {result['accuracy_on']}, not on val: name "
                         "another with --run")
    if result["recipe"]["crop"] != CROP or result["recipe"].get("plain_crop"):
        raise ValueError(f"{run} has no random resized {CROP} px crops: name another with --run")
    return rows, result


def this_project(run, folder, device, accuracy, epochs):
    """The row of this project. run: folder of a training that is there, or None: a new one of
    `epochs` epochs."""
    with tempfile.TemporaryDirectory() as runs:
        if run is None:
            run = Path(runs) / "cnn"
            command = [sys.executable, HERE / "train.py", "cnn", "--epochs", str(epochs), "--data",
                       folder, "--runs", runs, "--device", device.type]
            try:
                subprocess.run(command, check=True, stdout=sys.stderr)
            except subprocess.CalledProcessError as error:
                raise ValueError(str(error)) from error
        rows, result = read_run(run)
    recipe = result["recipe"]
    words = map(score.relative, shlex.split(result["command"]))  # no folders of this machine
    settings = (f"`{shlex.join(words)}`, commit {result['machine']['commit']}: {recipe['crop']} px "
                f"crops, evaluated at {recipe['size']} px, batches of {recipe['batch_size']}, "
                f"{result['precision']}, {result['device']}, {result['processes']} process, "
                f"{result['threads']} threads, photos decoded ahead of time")
    return dict(way="this project", of_epochs=recipe["epochs"], settings=settings,
                **first_pass(rows, accuracy))


# ---------------------------------------------------------------- the usual ways


def loaders(folder, device):
    """The usual DataLoaders of train and val: decoded anew in every epoch, by a worker for each
    core."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    crop = transforms.Compose([transforms.RandomResizedCrop(CROP),
                               transforms.RandomHorizontalFlip(), *to_tensor])
    whole = transforms.Compose([transforms.Resize((SIZE, SIZE)), *to_tensor])
    common = dict(num_workers=os.cpu_count(), persistent_workers=True,
                  pin_memory=device.type == "cuda")
    photos, val = (torchvision.datasets.ImageFolder(Path(folder) / split, transform)
                   for split, transform in (("train", crop), ("val", whole)))
    return (torch.utils.data.DataLoader(photos, BATCH, shuffle=True, drop_last=True, **common),
            torch.utils.data.DataLoader(val, 2 * BATCH, **common))


def train_usual(network, batches, optimizer, schedule, device):
    """One epoch of the loop as everybody writes it."""
    network.train()
    for images, labels in batches:
        logits = network(images.to(device))
        loss = F.cross_entropy(logits, labels.to(device), label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def validate(network, batches, device):
    """The share of photos that `network` gets right."""
    network.eval()
    right = photos = 0
    for images, labels in batches:
        right += int((network(images.to(device)).argmax(1) == labels.to(device)).sum())
        photos += len(labels)
    return right / photos


def usual_way(way, network, folder, device, accuracy, epochs):
    """The row of `network`, called `way`, trained until it has `accuracy`, for `epochs` epochs at
    most, over which its learning rate makes one cycle."""
    network = network.to(device)
    train_batches, val_batches = loaders(folder, device)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=MOMENTUM, nesterov=True,
                                weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=epochs * len(train_batches) + 1)
    rows = []
    while len(rows) < epochs and (not rows or rows[-1][0] < accuracy):
        started = time.time()
        train_usual(network, train_batches, optimizer, schedule, device)
        reached = validate(network, val_batches, device)
        seconds = time.time() - started
        rows.append((reached, seconds))
        print(f"{way}: epoch {len(rows)}/{epochs}, val {reached:.2%}, {seconds:.0f} s",
              file=sys.stderr, flush=True)
    settings = (f"ImageFolder, DataLoader with {os.cpu_count()} workers, RandomResizedCrop({CROP}),"
                f" mirror, evaluated at {SIZE} px; SGD, Nesterov momentum {MOMENTUM}, weight decay "
                f"{WEIGHT_DECAY}, batches of {BATCH}, one cycle up to {LR} in {epochs} epochs; "
                f"label smoothing {SMOOTHING}; float32, {device.type}, "
                f"{torch.get_num_threads()} threads")
    return dict(way=way, of_epochs=epochs, settings=settings, **first_pass(rows, accuracy))


# ---------------------------------------------------------------- the command line


def parse_arguments(arguments):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Time until an accuracy on val, against the usual ways.",
        formatter_class=files.Help)
    add = parser.add_argument
    add("--data", type=files.path, default=folders.IMAGENETTE, help="ImageNette folder or .tgz")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--accuracy", type=files.between(0, 1, float), default=0.85, help="share of val to get "
        "right")
    add("--run", type=files.path, help="folder of a finished training of train.py, in place of a "
        "new one")
    add("--epochs", type=files.between(1), default=10, help="of this project's new training")
    add("--usual-epochs", type=files.between(1), default=20, help="of the usual ways, at most")
    add("--out", type=files.path, default="figures/bench-accuracy.json",
        help="where the measurements go")
    options = parser.parse_args(arguments)
    if options.out.is_dir():  # said before the work, not after it
        parser.error(f"--out {options.out} is not the name of a file")
    return options


def bench(options, command):
    """Measure and write a row for this project and each usual way. command: what was typed."""
    device = machine.choose_device(options.device)
    folder = str(folders.prepare(options.data))
    photos, val = (folders.load(folder, split) for split in folders.COUNTS)  # in nobody's time
    classes = {len(photos.classes), len(val.labels.unique())}
    if classes != {10} or not Path(folder, "val").is_dir():
        raise ValueError(f"{folder} has not ImageNette's 10 classes in train/ and val/: name other "
                         "--data")
    facts = dict(command=command, machine=machine.facts(), device=device.type,
                 precision=type_name(train.choose_precision(device)), accuracy=options.accuracy,
                 rows=[])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    usual = folder, device, options.accuracy, options.usual_epochs
    resnet, cnn = torchvision.models.resnet18(num_classes=10), models.cnn()
    for measure in (
            lambda: this_project(options.run, folder, device, options.accuracy, options.epochs),
            lambda: usual_way("torchvision's ResNet-18, the usual way", resnet, *usual),
            lambda: usual_way("this project's CNN, the usual way", cnn, *usual)):
        facts["rows"].append(measure())
        files.write(options.out, json.dumps(facts, indent=1).encode())  # hours are not lost
    for row in facts["rows"]:
        print(f"{row['way']}: {options.accuracy:.0%} of val after "
              + (f"{row['seconds']:.0f} s, {row['epochs']} epochs" if row["seconds"] else
                 f"more than {row['of_epochs']} epochs: {row['best']:.2%} after "
                 f"{row['all_seconds']:.0f} s"))
    print(f"written: {options.out}; `make results` takes it into RESULTS.md")


def main(arguments=None):
    """The command line: an error is one sentence."""
    options = parse_arguments(arguments)
    command = shlex.join(["python", "tests/bench_accuracy.py", *(arguments or sys.argv[1:])])
    files.run_command(bench, options, command, interrupted="ways that came to an end are saved")


if __name__ == "__main__":
    main()
