"""How fast, against the usual way of doing the same: `make bench`, or

    python tests/bench.py --data data/imagenette2-160 --peers .peers

Every number comes from a process of its own, so that no job profits from another's warm memory.
This project and the usual way take turns, REPEATS times, and a ratio is given with its smallest and
largest value; matrix products, memory and epochs of part of the photos are measured once. Prints
Markdown, and writes all measurements as JSON (--out). --peers names a folder with torchcam and
grad-cam, which the benchmark alone uses (`make bench` fills it).
"""

import argparse
import functools
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cam
import data
import files
import folders
import machine
import models
import recorded
import train
from runs import type_name

HERE = Path(__file__).resolve().parent.parent
REPEATS = 3
RECIPE = train.make_recipe("cnn")
CROP, BATCH, SIZE = RECIPE.crop, RECIPE.batch_size, train.DEFAULTS["head"]["size"]
CLASS = 8  # golf ball


def wait(device):
    """Until the device has done all it was asked for."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def our_network(device, precision):
    """A new CNN, its first layer frozen, as train.py's is, and its optimiser."""
    torch.manual_seed(0)
    network = models.cnn().to(device, memory_format=precision.memory_format)
    network.features[0][0].weight.requires_grad_(False)
    return network, train.make_optimizer(RECIPE, network, precision.products)


def timed(function, device, seconds):
    """`function`, with the seconds that each call takes appended to the list `seconds`."""

    def call(*arguments):
        wait(device)
        started = time.time()
        result = function(*arguments)
        wait(device)
        seconds.append(time.time() - started)
        return result

    return call


def timed_batches(batches, device, seconds):
    """`batches`, with the seconds that making each takes appended to the list `seconds`."""
    take = timed(next, device, seconds)
    return iter(functools.partial(take, iter(batches), None), None)  # until there is no more


# ---------------------------------------------------------------- jobs: each returns its numbers


def epoch(folder, device, precision, crop=CROP, share=1.0, batch_size=BATCH, plain=False):
    """An epoch of the CNN as train.py does it, on a `share` of the photos, after 10 steps that do
    not count; then 50 steps that wait for the device, to tell what share of them goes into making
    batches, the optimiser and the averaged weights. plain: float32, not channels-last. On CUDA a
    step is one launch, of which no part can be timed: making batches is.
    """
    if plain:
        precision = train.Precision(None, False, torch.contiguous_format)
    machine.keep_memory()
    photos = folders.load(folder, "train")
    chosen = torch.randperm(len(photos))[: round(share * len(photos))]
    photos = photos.subset(chosen).to(device)
    network, optimizer = our_network(device, precision)
    average = train.Average(network)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)
    step = train.make_step(network, optimizer, scaler, average, precision, RECIPE.smoothing)
    one_launch = device.type == "cuda"
    if one_launch:
        step = recorded.Recorded(step, device)

    def seconds_of(count, making=None):
        """How long it takes to train on `count` photos; making: gets the seconds of each batch."""
        part = photos.subset(torch.arange(min(count, len(photos))))
        started = time.time()
        seeded = torch.Generator().manual_seed(0)
        batches = data.train_batches(part, crop, batch_size, seeded, dtype=precision.products)
        timed_or_not = batches if making is None else timed_batches(batches, device, making)
        train.train_epoch(step, timed_or_not, len(batches) * [0.002], average)
        wait(device)
        return time.time() - started

    seconds_of(10 * batch_size)
    seconds, timings = seconds_of(len(photos)), {"batch": []}
    if not one_launch:
        timings |= {"optimiser": [], "average": []}
        optimizer.step = timed(optimizer.step, device, timings["optimiser"])
        average.update = timed(average.update, device, timings["average"])
    of_all = seconds_of(50 * batch_size, timings["batch"])
    return dict(images_per_second=len(photos) / seconds, seconds=seconds,
                shares={part: sum(parts) / of_all for part, parts in timings.items()})


def epoch_usual(folder, device, precision, steps=100, tuned=False):
    """The same network on ImageFolder, RandomResizedCrop, flip, a DataLoader with a worker per
    core; float32, SGD. Up to `steps` steps, after 5 that do not count, in which workers start.
    tuned: with all that PyTorch's tuning guide turns on: mixed precision where the device computes
    it natively, channels-last, cuDNN's search, workers that fetch four batches ahead, copies that
    do not wait."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([
        transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])
    photos = datasets.ImageFolder(Path(folder) / "train", transform)
    loader = torch.utils.data.DataLoader(
        photos, BATCH, shuffle=True, num_workers=os.cpu_count(), drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=tuned,
        prefetch_factor=4 if tuned else None)
    precision = precision if tuned else train.Precision(None, False, torch.contiguous_format)
    torch.backends.cudnn.benchmark = tuned
    network = models.cnn().to(device, memory_format=precision.memory_format)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    steps = min(steps, len(loader) - 5)
    batches = iter(loader)
    for step in range(5 + steps):
        if step == 5:
            wait(device)
            started = time.time()
        images, labels = (tensor.to(device, non_blocking=tuned) for tensor in next(batches))
        images = images.contiguous(memory_format=precision.memory_format)
        with torch.autocast(device.type, precision.dtype, enabled=precision.dtype is not None):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=RECIPE.smoothing)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    wait(device)
    return dict(images_per_second=steps * BATCH / (time.time() - started))


def link_photos(folder, links):
    """Make `links`, an empty folder, one of links to decoded photos: what a command stores beside
    them, such as features, is not there yet, and goes when `links` goes."""
    for entry in Path(folder).resolve().iterdir():
        if entry.is_dir():
            (Path(links) / entry.name).symlink_to(entry)
    for split in folders.COUNTS:
        stored = folders.pixels_path(folder, split).resolve()
        folders.pixels_path(links, split).symlink_to(stored)


def head(folder, device, precision):
    """`train.py resnet18 --weights none`, the whole process: 5 epochs, validation included, on
    photos that were decoded earlier, and whose features nobody has stored."""
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryDirectory() as links:
        link_photos(folder, links)
        started = time.time()
        subprocess.run([sys.executable, HERE / "train.py", "resnet18", "--weights", "none",
                        "--data", links, "--runs", runs, "--device", device.type],
                       check=True, stdout=subprocess.DEVNULL)
        return dict(seconds=time.time() - started)


def head_usual(folder, device, precision, every=10):
    """The straightforward loop: every photo decoded by torchvision in a worker per core, through
    the frozen network in float32, the last layer trained on it: every tenth photo, the time, of the
    loop alone, times 50 for five epochs."""
    import torchvision
    from torchvision import datasets, transforms

    def read(path):
        return torchvision.io.read_image(path, torchvision.io.ImageReadMode.RGB)

    transform = transforms.Compose([
        transforms.Resize((SIZE, SIZE), antialias=True),
        transforms.ConvertImageDtype(torch.float32), transforms.Normalize(data.MEAN, data.STD)])
    network = torchvision.models.resnet18(num_classes=10).requires_grad_(False).eval().to(device)
    network.fc.requires_grad_(True)
    optimizer = torch.optim.SGD(network.fc.parameters(), 0.01, momentum=0.9)
    started = time.time()
    for split, training in (("train", True), ("val", False)):
        photos = datasets.ImageFolder(Path(folder) / split, transform, loader=read)
        photos = torch.utils.data.Subset(photos, range(0, len(photos), every))
        loader = torch.utils.data.DataLoader(
            photos, train.DEFAULTS["head"]["batch_size"], shuffle=training,
            num_workers=os.cpu_count())
        for images, labels in loader:
            with torch.set_grad_enabled(training):
                logits = network(images.to(device))
            if training:
                F.cross_entropy(logits, labels.to(device)).backward()
                optimizer.step()
                optimizer.zero_grad()
    wait(device)
    return dict(seconds=(time.time() - started) * every * 5)


def mapper(way, network, device, precision):
    """A function from images to the maps of CLASS. way: of `maps`."""
    if way == "torchcam":
        from torchcam.methods import CAM

        extract = CAM(network, "features", "head")

        @torch.no_grad()
        def maps_of(images):
            network(images)
            return extract(CLASS)[0]
    elif way == "gradcam":
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        extract = GradCAM(network, [network.features])

        def maps_of(images):
            return extract(images, [ClassifierOutputTarget(CLASS)] * len(images))
    else:
        machine.keep_memory()
        folded = models.fold_norms(network).to(memory_format=precision.memory_format)
        dtype = getattr(torch, way)

        @torch.no_grad()
        def maps_of(images):
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                features = folded.features(images)
            every_class = cam.class_activation_maps(features.float(), network.head.weight)
            return cam.upsample(every_class[:, CLASS], (SIZE, SIZE))

    return maps_of


def maps(folder, device, precision, way="float32"):
    """Maps of one class for all photos of val, ResNet-18, forward pass included, reading photos
    not: every fourth photo, times 4. way: "torchcam", "gradcam", or this project's, its features in
    the type that `way` names; this project's norms are folded, its memory is kept (`keep_memory`),
    and its maps are upsampled, as gradcam's are."""
    photos = folders.load(folder, "val")
    photos = photos.subset(torch.arange(0, len(photos), 4)).to(device)
    torch.manual_seed(0)
    network = models.build("resnet18").to(device).eval()
    nn.init.normal_(network.head.weight, std=0.01)
    maps_of = mapper(way, network, device, precision)
    batches = data.eval_batches(photos, SIZE, 16 if device.type == "cpu" else 256)
    maps_of(next(iter(batches))[0])
    seconds = []
    for images, _ in batches:
        timed(maps_of, device, seconds)(images)
    return dict(seconds=4 * sum(seconds), images_per_second=len(photos) / sum(seconds))


def first_batch(folder, device, precision, source):
    """From `source`, an archive, or a folder, that was unpacked and decoded earlier to a batch of
    crops: a fresh Python that imports folders.py and data.py alone."""
    code = ("import data, folders, sys, torch\n"
            "photos = folders.load(folders.prepare(sys.argv[1]), 'train')\n"
            f"batches = data.train_batches(photos, {CROP}, {BATCH},"
            " torch.Generator().manual_seed(0))\n"
            "next(iter(batches))")
    started = time.time()
    subprocess.run([sys.executable, "-c", code, source], check=True,
                   env=os.environ | {"PYTHONPATH": str(HERE)})
    return dict(seconds=time.time() - started)


def peak(folder, device, precision, dtype="float32", side=4096):
    """TFLOP/s of a large matrix product in the type that `dtype` names, the best of ten."""
    a = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(10):
        timed(torch.matmul, device, seconds)(a, a)
    return dict(peak=2 * side**3 / min(seconds) / 1e12)


JOBS = {f.__name__: f for f in (epoch, epoch_usual, head, head_usual, maps, first_batch, peak)}


# ---------------------------------------------------------------- running them


def operations(network, side, backward=False):
    """TFLOP that `network` takes for one image of side x side px, forward, or forward and backward.
    Muon's, the average's and the crops' are not among them (about a tenth on top)."""
    with FlopCounterMode(display=False) as counter:
        logits = network(torch.zeros(2, 3, side, side))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / 2 / 1e12


def anonymous(pid):
    """Bytes of resident memory of a process that are no mapped file; 0 where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")),
                    0)
    except OSError:
        return 0


def run(*command):
    """The output of a command, and the most resident memory, mapped files aside, that it was seen
    with (50 times a second), in GiB."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    most = [0]

    def watch():
        while process.poll() is None:
            most[0] = max(most[0], anonymous(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, command))} failed: {err.strip()}")
    return out, most[0] / 2**30


def job(command, name, **arguments):
    """Run one of JOBS in a process of its own, `command` with --job: its dict, with the memory it
    took, GiB."""
    out, memory = run(*command, "--job", json.dumps([name, arguments]))
    return json.loads(out.splitlines()[-1]) | dict(memory=memory)


def in_turns(command, *jobs):
    """Each of `jobs`, (name, arguments), REPEATS times, in turns: a list of dicts for each."""
    turns = [[job(command, name, **arguments) for name, arguments in jobs] for _ in range(REPEATS)]
    return zip(*turns, strict=True)


# ---------------------------------------------------------------- the table

HEADER = ("job", "here", "the usual way", "ratio (spread)")
FORMS = {"s": "{:,.1f} s", "images/s": "{:,.0f} images/s", "%": "{:.1%}",
         "TFLOP/s": "{:.3g} TFLOP/s", "GiB": "{:.2f} GiB"}  # how a number of each unit is shown


def cells(job, unit, here, usual):
    """The cells under HEADER of a row. here, usual: measurements in `unit`, a key of FORMS, in
    turns; "%" are shares. Where there is no usual way, the last cell is the spread of the
    measurements themselves."""
    def shown(value):
        return FORMS[unit].format(value)

    mean = shown(sum(here) / len(here))
    if not usual:
        spread = f"{shown(min(here))} to {shown(max(here))}" if len(here) > 1 else ""
        return job, mean, "", spread
    mean_usual = shown(sum(usual) / len(usual))
    if unit not in ("s", "images/s"):
        return job, mean, mean_usual, ""
    above, below = (usual, here) if unit == "s" else (here, usual)
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    ratio = sum(above) / sum(below)
    return job, mean, mean_usual, f"{ratio:.1f} x ({min(ratios):.1f} to {max(ratios):.1f})"


def add(rows, job, unit, here, usual=()):
    """Append a row to `rows`, as plain data, and print it. here, usual: of `cells`."""
    rows.append(dict(job=job, unit=unit, here=list(here), usual=list(usual)))
    print("| " + " | ".join(cells(**rows[-1])) + " |", flush=True)


def values(results, key):
    """What each of `results`, dicts of a job, has under `key`."""
    return [result[key] for result in results]


def training(rows, command, precision):
    """Rows on training, with what share of a matrix product's speed it reaches. Returns what the
    job "epoch_usual" gave, a list of dicts."""
    ours, usual, tuned = in_turns(command, ("epoch", {}), ("epoch_usual", {}),
                                  ("epoch_usual", dict(tuned=True)))
    speeds, dtype = values(ours, "images_per_second"), type_name(precision)
    for way, theirs in (("plain", usual), ("tuned", tuned)):
        add(rows, f"an epoch of the CNN, {CROP} px; that way {way}", "images/s", speeds,
            values(theirs, "images_per_second"))
    names = dict(batch="making its batch", optimiser="optimiser", average="averaged weights")
    for part in ours[0]["shares"]:
        shares = [result["shares"][part] for result in ours]
        add(rows, f"share of a step: {names[part]}", "%", shares)
    if precision.dtype:
        mixed, plain = in_turns(command, ("epoch", dict(share=0.25)),
                                ("epoch", dict(share=0.25, plain=True)))
        add(rows, f"{dtype}, channels-last; or neither", "s", values(mixed, "seconds"),
            values(plain, "seconds"))
    network, _ = our_network(torch.device("cpu"), precision)
    needed = operations(network, CROP, backward=True)
    reached = [speed * needed for speed in speeds]
    most = job(command, "peak", dtype=dtype)["peak"]
    add(rows, "arithmetic of training", "TFLOP/s", reached)
    add(rows, f"a large matrix product, {dtype}", "TFLOP/s", [most])
    add(rows, f"share of that, {dtype}: training", "%", [speed / most for speed in reached])
    return usual


def explaining(rows, command, precision, peers):
    """Rows on maps, with what share of a matrix product's speed they reach. peers: whether torchcam
    and grad-cam are there."""
    types = list(dict.fromkeys([type_name(precision), "float32"]))
    packages = ["torchcam", "gradcam"] if peers else []
    turns = in_turns(command, *(("maps", dict(way=way)) for way in types + packages))
    found = dict(zip(types + packages, turns, strict=True))
    for ours in types:
        for theirs in packages:
            add(rows, f"maps of val, {ours}; or {theirs}", "s", values(found[ours], "seconds"),
                values(found[theirs], "seconds"))
    forward = operations(models.build("resnet18").eval(), SIZE)
    for dtype in types:
        most = job(command, "peak", dtype=dtype)["peak"]
        add(rows, f"share of a large matrix product, {dtype}: maps", "%",
            [speed * forward / most for speed in values(found[dtype], "images_per_second")])


def memory(rows, command, folder, device, usual):
    """Rows on resident memory, mapped files (photos, libraries) and loader workers aside, where it
    can be read. usual: dicts of the job "epoch_usual"."""
    if not anonymous(os.getpid()):
        return
    with tempfile.TemporaryDirectory() as runs:
        _, ours = run(sys.executable, HERE / "train.py", "cnn", "--epochs", 1, "--data", folder,
                      "--runs", runs, "--device", device)
        add(rows, "memory of training the CNN", "GiB", [ours], values(usual, "memory"))
        for arch in ("cnn", "resnet18"):
            models.save(f"{runs}/{arch}.pt", models.build(arch), arch=arch,
                        classes=list(data.CLASSES.values()), mean=data.MEAN, std=data.STD,
                        looks=[SIZE], accuracies={}, accuracy_on="val", accuracy_n=0,
                        how="not trained", settings={}, epoch=0)
        _, figure = run(sys.executable, HERE / "cam.py", "figure", "--data", folder, "--models",
                        f"{runs}/resnet18.pt", f"{runs}/cnn.pt", "--out", f"{runs}/figure.png")
    add(rows, "memory of the figure", "GiB", [figure])


def growth(rows, command):
    """Rows on how an epoch grows with the pixels of a crop and with the photos."""
    for crop in (CROP, round(2**0.5 * CROP), 2 * CROP):
        result = job(command, "epoch", crop=crop, share=0.25)
        add(rows, f"a quarter of the photos, {crop} px", "s", [result["seconds"]])
    for share, what in ((0.5, "half of"), (1.0, "all")):
        result = job(command, "epoch", share=share)
        add(rows, f"{what} the photos, {CROP} px", "s", [result["seconds"]])


def last_layer(rows, command):
    """A row on fine-tuning, as `make finetune` does it."""
    heads = in_turns(command, ("head", {}), ("head_usual", {}))
    add(rows, "last layer of ResNet-18, 5 epochs", "s",
        *(values(results, "seconds") for results in heads))


def measure(rows, source, folder, device, precision, peers, quick):
    """Append all rows of the table to `rows`, in parts, what takes longest last; each is printed at
    once, and a `yield` after each part lets it be saved. source: what the user named as data;
    folder: where they are; quick: without maps and the last layer."""
    command = [sys.executable, __file__, "--data", folder, "--device", device,
               *(["--peers", peers] if peers else [])]
    print("| " + " | ".join(HEADER) + " |\n" + "| --- " * len(HEADER) + "|")
    usual = training(rows, command, precision)
    yield
    first = [job(command, "first_batch", source=source) for _ in range(REPEATS)]
    add(rows, "archive to first batch, second start", "s", values(first, "seconds"))
    memory(rows, command, folder, device, usual)
    growth(rows, command)
    yield
    if not quick:
        explaining(rows, command, precision, peers)
        yield
        last_layer(rows, command)
        yield


# ---------------------------------------------------------------- the command line


def parse_arguments():
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=files.path, default=folders.IMAGENETTE, help="ImageNette folder or .tgz")
    add("--device", default="auto", help="cpu, cuda, mps or auto")
    add("--peers", help="folder with torchcam and grad-cam; without it, they are left out")
    add("--out", type=files.path, default="figures/bench.json", help="where the measurements go")
    add("--quick", action="store_true", help="without the last layer's training and maps, which "
        "take an hour or more where there is no bfloat16")
    add("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def bench(options):
    """Print and write the table, or, with --job, do one job and print its numbers."""
    device = machine.choose_device(options.device)
    precision = train.choose_precision(device)
    if options.peers:
        sys.path.append(options.peers)  # last: its numpy and pillow, if any, do not replace ours
    if options.job:
        name, arguments = json.loads(options.job)
        print(json.dumps(JOBS[name](options.data, device, precision, **arguments)))
        return
    packages = ("torchcam", "pytorch_grad_cam")
    if options.peers and not all(map(importlib.util.find_spec, packages)):
        raise ValueError(f"--peers {options.peers} holds no torchcam and grad-cam: `make bench` "
                         "fills .peers")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder = str(folders.prepare(options.data))
    for split in folders.COUNTS:
        folders.load(folder, split)
    facts = dict(command=shlex.join(["python", "tests/bench.py", *sys.argv[1:]]),
                 machine=machine.facts(), device=device.type, precision=type_name(precision),
                 repeats=REPEATS, rows=[])
    for _ in measure(facts["rows"], str(options.data), folder, device.type, precision,
                     options.peers, options.quick):
        files.write(options.out, json.dumps(facts, indent=1).encode())  # an hour is not lost
    print(f"\nwritten: {options.out}; `make results` takes it into RESULTS.md")


def main():
    """The command line: an error is one sentence."""
    files.run_command(bench, parse_arguments(), interrupted="what was measured is saved")


if __name__ == "__main__":
    main()
