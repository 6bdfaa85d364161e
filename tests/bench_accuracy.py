"""How long until 85 % of val, against the usual ways of training from scratch: `make bench-accuracy`, or

    python tests/bench_accuracy.py --data data/imagenette2-160 --run runs/cnn-64-20-0

This project's time is that of a run's log.csv, or, without --run, of a new training; the usual ways are trained here,
torchvision's ResNet-18 and this project's CNN, until they are there, with nothing beside them. All train on 64 px crops
of photos that are on disk, and are validated after every epoch on whole photos of the size that suits their crops,
96 px the usual way (a crop shows 8 % of a photo or more), less in this project; time is that of all epochs up
to the first that gets there, validation included, the start of the program and decoding photos ahead of time not.
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

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import models  # noqa: E402
import score  # noqa: E402
import train  # noqa: E402

SCRATCH = train.DEFAULTS["scratch"]
CROP, SIZE, SMOOTHING = SCRATCH["crop"], 96, SCRATCH["smoothing"]
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 64, 0.05, 0.9, 5e-4  # of the usual ways


def first_pass(rows, accuracy):
    """Seconds and epochs until `accuracy`, both None where it is not reached, and the best accuracy and the seconds of
    all of it. rows: (val accuracy, seconds) of each epoch."""
    passed = next((epoch for epoch, (reached, _) in enumerate(rows, 1) if reached >= accuracy), None)
    return dict(seconds=passed and round(sum(seconds for _, seconds in rows[:passed]), 1), epochs=passed,
                best=round(max(reached for reached, _ in rows), 5), all_seconds=round(sum(s for _, s in rows), 1))


# ---------------------------------------------------------------- this project


def read_run(run):
    """The (val accuracy, seconds) of all epochs of a finished training in the folder `run`, and its result.json."""
    try:
        result = json.loads((run / "result.json").read_text())
        with open(run / "log.csv", newline="") as file:
            rows = [(float(row["val_accuracy"]), float(row["seconds"])) for row in csv.DictReader(file)]
        here, there = models.machine()["processor"], result["machine"]["processor"]
        if not rows:
            raise ValueError("its log is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise data.DataError(f"{run} holds no finished training of train.py ({error}): name another with --run, or "
                             "leave it out for a new training") from error
    if here != there:
        raise data.DataError(f"{run} was trained on another machine, {there}, not on {here}: leave --run out")
    if result["accuracy_on"] != "val":
        raise data.DataError(f"{run} was validated on {result['accuracy_on']}, not on val: name another with --run")
    if result["recipe"]["crop"] != CROP or result["recipe"].get("plain_crop"):
        raise data.DataError(f"{run} has no random resized {CROP} px crops: name another with --run")
    return rows, result


def this_project(run, folder, device, accuracy, epochs):
    """The row of this project. run: folder of a training that is there, or None: a new one of `epochs` epochs."""
    with tempfile.TemporaryDirectory() as runs:
        if run is None:
            run = Path(runs) / "cnn"
            subprocess.run([sys.executable, HERE / "train.py", "cnn", "--epochs", str(epochs), "--data", folder,
                            "--runs", runs, "--device", device.type], check=True, stdout=sys.stderr)
        rows, result = read_run(run)
    recipe = result["recipe"]
    command = shlex.join(map(score.relative, shlex.split(result["command"])))  # without folders of this machine
    settings = (f"`{command}`, commit {result['machine']['commit']}: {recipe['crop']} px crops, evaluated at "
                f"{recipe['size']} px, batches of {recipe['batch_size']}, {result['precision']}, {result['device']}, "
                f"{result['processes']} process, {result['threads']} threads, photos decoded ahead of time")
    return dict(way="this project", of_epochs=recipe["epochs"], settings=settings) | first_pass(rows, accuracy)


# ---------------------------------------------------------------- the usual ways


def loaders(folder, device):
    """The usual DataLoaders of train and val: decoded anew in every epoch, by a worker for each core."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    training = transforms.Compose([transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), *to_tensor])
    whole = transforms.Compose([transforms.Resize((SIZE, SIZE)), *to_tensor])
    common = dict(num_workers=os.cpu_count(), persistent_workers=True, pin_memory=device.type == "cuda")
    photos = [torchvision.datasets.ImageFolder(Path(folder) / split, transform)
              for split, transform in (("train", training), ("val", whole))]
    return (torch.utils.data.DataLoader(photos[0], BATCH, shuffle=True, drop_last=True, **common),
            torch.utils.data.DataLoader(photos[1], 2 * BATCH, **common))


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
    """The row of `network`, called `way`, trained until it has `accuracy`, for `epochs` epochs at most, over which its
    learning rate makes one cycle."""
    network = network.to(device)
    train_batches, val_batches = loaders(folder, device)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * len(train_batches) + 1)
    rows = []
    while len(rows) < epochs and (not rows or rows[-1][0] < accuracy):
        started = time.time()
        train_usual(network, train_batches, optimizer, schedule, device)
        reached = validate(network, val_batches, device)
        rows.append((reached, time.time() - started))
        print(f"{way}: epoch {len(rows)}/{epochs}, val {reached:.2%}, {rows[-1][1]:.0f} s", file=sys.stderr, flush=True)
    settings = (f"ImageFolder, DataLoader with {os.cpu_count()} workers, RandomResizedCrop({CROP}), mirror, evaluated "
                f"at {SIZE} px; SGD, Nesterov momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, batches of {BATCH}, "
                f"one cycle up to {LR} in {epochs} epochs; label smoothing {SMOOTHING}; float32, {device.type}, "
                f"{torch.get_num_threads()} threads")
    return dict(way=way, of_epochs=epochs, settings=settings) | first_pass(rows, accuracy)


def main(arguments=None):
    """The command line: a row for this project and each usual way."""
    parser = argparse.ArgumentParser(description="Time until an accuracy on val, against the usual ways.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--accuracy", type=train.in_range(float, 0, 1), default=0.85, help="share of val to get right")
    parser.add_argument("--run", type=Path, help="folder of a finished training of train.py, in place of a new one")
    parser.add_argument("--epochs", type=train.in_range(int, 1), default=10, help="of this project's new training")
    parser.add_argument("--usual-epochs", type=train.in_range(int, 1), default=20, help="of the usual ways, at most")
    parser.add_argument("--out", default="figures/bench-accuracy.json", help="where the measurements go")
    options = parser.parse_args(arguments)
    if not options.out or Path(options.out).is_dir():  # said before the work, not after it
        parser.error(f"--out {options.out!r} is not the name of a file")
    try:
        device = train.choose_device(options.device)
        folder = str(data.prepare(options.data))
        photos = [data.load(folder, split) for split in data.COUNTS]  # decoded now, in nobody's time
        if len(photos[0].classes) != 10 or len(photos[1].labels.unique()) != 10 or not Path(folder, "val").is_dir():
            raise data.DataError(f"{folder} has not ImageNette's 10 classes in train/ and val/: name other --data")
        facts = dict(command=shlex.join(["python", "tests/bench_accuracy.py", *(arguments or sys.argv[1:])]),
                     machine=models.machine(), device=device.type, precision=train.choose_precision(device).name,
                     accuracy=options.accuracy, rows=[])
        torch.manual_seed(0)
        usual = folder, device, options.accuracy, options.usual_epochs
        resnet, cnn = torchvision.models.resnet18(num_classes=10), models.cnn()
        for measure in (lambda: this_project(options.run, folder, device, options.accuracy, options.epochs),
                        lambda: usual_way("torchvision's ResNet-18, the usual way", resnet, *usual),
                        lambda: usual_way("this project's CNN, the usual way", cnn, *usual)):
            facts["rows"].append(measure())
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            with models.atomic(options.out) as file:  # each time, so that hours of measuring are not lost
                file.write(json.dumps(facts, indent=1).encode())
    except (train.TrainError, data.DataError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench_accuracy.py: {error}", file=sys.stderr)
        sys.exit(2)
    for row in facts["rows"]:
        print(f"{row['way']}: {options.accuracy:.0%} of val after "
              + (f"{row['seconds']:.0f} s, {row['epochs']} epochs" if row["seconds"] else
                 f"more than {row['of_epochs']} epochs: {row['best']:.2%} after {row['all_seconds']:.0f} s"))
    print(f"written: {options.out}; `make results` takes it into RESULTS.md")


if __name__ == "__main__":
    main()
