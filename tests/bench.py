"""How fast, against the usual way of doing the same: `make bench`, or

    python tests/bench.py --data data/imagenette2-160 --peers .peers

Every number comes from a process of its own, so that no job profits from another's warm memory. This project and the
usual way take turns, REPEATS times, and a ratio is given with its smallest and largest value; matrix products, memory
and epochs of part of the photos are measured once. Prints Markdown, and writes all measurements as JSON (--out).
--peers names a folder with torchcam and grad-cam, which the benchmark alone uses (`make bench` fills it).
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

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import cam  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

REPEATS = 3
SCRATCH = train.DEFAULTS["scratch"]
CROP, BATCH, SIZE = SCRATCH["crop"], SCRATCH["batch_size"], train.DEFAULTS["head"]["size"]
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
    return network, train.Muon(network, SCRATCH["lr"], SCRATCH["weight_decay"], dtype=precision.products)


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


# ---------------------------------------------------------------- the jobs: each prints one dict of numbers


def epoch(folder, device, precision, crop=CROP, share=1.0, batch_size=BATCH, plain=False):
    """An epoch of the CNN as train.py does it, on a `share` of the photos, after 10 steps that do not count; then 50
    steps in which the device is waited for, to tell what share of them goes into making batches, the optimiser and the
    averaged weights. plain: float32, not channels-last."""
    if plain:
        precision = train.Precision(None, False, torch.contiguous_format)
    models.keep_memory()
    photos = data.load(folder, "train")
    photos = photos.subset(torch.randperm(len(photos))[: round(share * len(photos))]).to(device)
    network, optimizer = our_network(device, precision)
    average = train.Average(network)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)

    def run(part, timings=None):
        """Train on the Photos `part`; timings: {part of a step: list for its seconds}. Returns the seconds of all."""
        started = time.time()
        batches = data.train_batches(part, crop, batch_size, torch.Generator().manual_seed(0), dtype=precision.products)
        if timings:
            take = timed(next, device, timings["batch"])
            batches = iter(functools.partial(take, batches, None), None)  # until take(batches, None) gives None
            optimizer.step = timed(optimizer.step, device, timings["optimiser"])
            average.update = timed(average.update, device, timings["average"])
        plan = [(0.002, len(index)) for index in data.shuffled(len(part), batch_size, None)]
        train.train_epoch(network, batches, plan, optimizer, scaler, precision, SCRATCH["smoothing"], average)
        wait(device)
        return time.time() - started

    first = [photos.subset(torch.arange(min(steps * batch_size, len(photos)))) for steps in (10, 50)]
    run(first[0])
    seconds, timings = run(photos), {"batch": [], "optimiser": [], "average": []}
    timed_seconds = run(first[1], timings)
    return dict(images_per_second=len(photos) / seconds, seconds=seconds,
                shares={part: sum(parts) / timed_seconds for part, parts in timings.items()})


def epoch_usual(folder, device, precision, steps=100):
    """The same network on ImageFolder, RandomResizedCrop, flip, a DataLoader with a worker per core; float32, SGD.
    Up to `steps` steps, after 5 that do not count, in which the workers start."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])
    photos = datasets.ImageFolder(Path(folder) / "train", transform)
    loader = torch.utils.data.DataLoader(photos, BATCH, shuffle=True, num_workers=os.cpu_count(), drop_last=True,
                                         pin_memory=device.type == "cuda")
    network = models.cnn().to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = min(steps, len(loader) - 5)
    batches = iter(loader)
    for step in range(5 + steps):
        if step == 5:
            wait(device)
            started = time.time()
        images, labels = next(batches)
        loss = F.cross_entropy(network(images.to(device)), labels.to(device), label_smoothing=SCRATCH["smoothing"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wait(device)
    return dict(images_per_second=steps * BATCH / (time.time() - started))


def head(folder, device, precision):
    """`train.py resnet18 --weights none --looks 224`, the whole process: 5 epochs, validation included, on photos
    that were decoded earlier."""
    with tempfile.TemporaryDirectory() as runs:
        started = time.time()
        subprocess.run([sys.executable, HERE / "train.py", "resnet18", "--weights", "none", "--data", folder, "--runs",
                        runs, "--looks", str(SIZE), "--device", device.type], check=True, stdout=subprocess.DEVNULL)
        return dict(seconds=time.time() - started)


def head_usual(folder, device, precision, every=10):
    """The straightforward loop: every photo decoded by torchvision in a worker per core, through the frozen network in
    float32, the last layer trained on it: every tenth photo, the time, of the loop alone, times 50 for five epochs."""
    import torchvision
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.Resize((SIZE, SIZE), antialias=True), transforms.ConvertImageDtype(
        torch.float32), transforms.Normalize(data.MEAN, data.STD)])
    network = torchvision.models.resnet18(num_classes=10).requires_grad_(False).eval().to(device)
    network.fc.requires_grad_(True)
    optimizer = torch.optim.SGD(network.fc.parameters(), 0.01, momentum=0.9)
    started = time.time()
    for split, training in (("train", True), ("val", False)):
        photos = datasets.ImageFolder(Path(folder) / split, transform, loader=lambda path: torchvision.io.read_image(
            path, torchvision.io.ImageReadMode.RGB))
        photos = torch.utils.data.Subset(photos, range(0, len(photos), every))
        loader = torch.utils.data.DataLoader(photos, train.DEFAULTS["head"]["batch_size"], shuffle=training,
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


def maps(folder, device, precision, way="float32"):
    """Maps of one class for all photos of val, ResNet-18, forward pass included, reading photos not: every fourth
    photo, times 4. way: "torchcam", "gradcam", or this project's, its features in the type that `way` names; this
    project's norms are folded, its memory is kept (`keep_memory`), and its maps are upsampled, as gradcam's are."""
    photos = data.load(folder, "val")
    photos = photos.subset(torch.arange(0, len(photos), 4)).to(device)
    torch.manual_seed(0)
    network = models.build("resnet18").to(device).eval()
    nn.init.normal_(network.head.weight, std=0.01)
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
        models.keep_memory()
        folded = models.fold_norms(network).to(memory_format=precision.memory_format)
        dtype = getattr(torch, way)

        @torch.no_grad()
        def maps_of(images):
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                features = folded.features(images)
            every_class = cam.class_activation_maps(features.float(), network.head.weight)
            return cam.upsample(every_class[:, CLASS], (SIZE, SIZE))

    seconds, batch_size = 0.0, 16 if device.type == "cpu" else 256
    maps_of(next(data.eval_batches(photos, SIZE, batch_size))[0])
    for images, _ in data.eval_batches(photos, SIZE, batch_size):
        wait(device)
        started = time.time()
        maps_of(images)
        wait(device)
        seconds += time.time() - started
    return dict(seconds=4 * seconds, images_per_second=len(photos) / seconds)


def first_batch(folder, device, precision, source):
    """From `source`, an archive, or a folder, that was unpacked and decoded earlier to a batch of crops: a fresh Python
    that imports data.py alone."""
    code = ("import data, sys, torch; photos = data.load(data.prepare(sys.argv[1]), 'train'); "
            f"next(data.train_batches(photos, {CROP}, {BATCH}, torch.Generator().manual_seed(0)))")
    started = time.time()
    subprocess.run([sys.executable, "-c", code, source], check=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    return dict(seconds=time.time() - started)


def peak(folder, device, precision, dtype="float32", side=4096):
    """TFLOP/s of a large matrix product in the type that `dtype` names, the best of ten."""
    a = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    best = 0.0
    for _ in range(10):
        wait(device)
        started = time.time()
        a @ a
        wait(device)
        best = max(best, 2 * side**3 / (time.time() - started) / 1e12)
    return dict(peak=best)


JOBS = {f.__name__: f for f in (epoch, epoch_usual, head, head_usual, maps, first_batch, peak)}


# ---------------------------------------------------------------- running them


def operations(network, side, backward=False):
    """TFLOP that `network` takes for one image of side x side px, forward, or forward and backward. Muon's, the
    average's and the crops' are not among them (about a tenth on top)."""
    with FlopCounterMode(display=False) as counter:
        logits = network(torch.zeros(2, 3, side, side))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / 2 / 1e12


def anonymous(pid):
    """Bytes of resident memory of a process that are no mapped file; 0 where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def run(*command):
    """The output of a command, and the most resident memory, mapped files aside, that it was seen with (50 times a
    second), in GiB."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
        raise data.DataError(f"{' '.join(map(str, command))} failed: {err.strip()}")
    return out, most[0] / 2**30


def job(command, name, **arguments):
    """Run one of JOBS in a process of its own, `command` with --job: its dict, with the memory it took, GiB."""
    out, memory = run(*command, "--job", json.dumps([name, arguments]))
    return json.loads(out.splitlines()[-1]) | dict(memory=memory)


def in_turns(command, *jobs):
    """Each of `jobs`, (name, arguments), REPEATS times, in turns: a list of dicts for each."""
    turns = [[job(command, name, **arguments) for name, arguments in jobs] for _ in range(REPEATS)]
    return zip(*turns, strict=True)


# ---------------------------------------------------------------- the table

HEADER = ("job", "here", "the usual way", "ratio (spread)")
FORMS = {"s": "{:,.1f} s", "images/s": "{:,.0f} images/s", "%": "{:.1%}", "TFLOP/s": "{:.3g} TFLOP/s",
         "GiB": "{:.2f} GiB"}  # how a number of each unit is shown


def cells(job, unit, here, usual):
    """The cells under HEADER of a row. here, usual: measurements in `unit`, a key of FORMS, in turns; "%" are shares.
    Where there is no usual way, the last cell is the spread of the measurements themselves."""
    def mean(values):
        return FORMS[unit].format(sum(values) / len(values))

    if not usual:
        spread = [FORMS[unit].format(value) for value in (min(here), max(here))]
        return job, mean(here), "", " to ".join(spread) if len(here) > 1 else ""
    if unit not in ("s", "images/s"):
        return job, mean(here), mean(usual), ""
    times = [b / a if unit == "s" else a / b for a, b in zip(here, usual, strict=True)]
    ratio = sum(usual) / sum(here) if unit == "s" else sum(here) / sum(usual)
    return job, mean(here), mean(usual), f"{ratio:.1f} x ({min(times):.1f} to {max(times):.1f})"


def add(rows, job, unit, here, usual=()):
    """Append a row to `rows`, as plain data, and print it. here, usual: of `cells`."""
    rows.append(dict(job=job, unit=unit, here=list(here), usual=list(usual)))
    print("| " + " | ".join(cells(**rows[-1])) + " |", flush=True)


def values(results, key):
    """What each of `results`, dicts of a job, has under `key`."""
    return [result[key] for result in results]


def training(rows, command, precision):
    """Rows on training, with what share of a matrix product's speed it reaches. Returns what the job "epoch_usual"
    gave, a list of dicts."""
    ours, usual = in_turns(command, ("epoch", {}), ("epoch_usual", {}))
    add(rows, f"an epoch of the CNN, {CROP} px", "images/s", *(values(r, "images_per_second") for r in (ours, usual)))
    for part, what in (("batch", "making its batch"), ("optimiser", "optimiser"), ("average", "averaged weights")):
        add(rows, f"share of a step: {what}", "%", values(values(ours, "shares"), part))
    if precision.dtype:
        mixed, plain = in_turns(command, ("epoch", dict(share=0.25)), ("epoch", dict(share=0.25, plain=True)))
        add(rows, f"{precision.name}, channels-last; or neither", "s", *(values(r, "seconds") for r in (mixed, plain)))
    network, _ = our_network(torch.device("cpu"), precision)
    reached = [speed * operations(network, CROP, backward=True) for speed in values(ours, "images_per_second")]
    peak = job(command, "peak", dtype=precision.name)["peak"]
    add(rows, "arithmetic of training", "TFLOP/s", reached)
    add(rows, f"a large matrix product, {precision.name}", "TFLOP/s", [peak])
    add(rows, f"share of that, {precision.name}: training", "%", [speed / peak for speed in reached])
    return usual


def explaining(rows, command, precision, peers):
    """Rows on maps, with what share of a matrix product's speed they reach. peers: whether torchcam and grad-cam are
    there."""
    types = list(dict.fromkeys([precision.name, "float32"]))
    packages = ["torchcam", "gradcam"] if peers else []
    turns = in_turns(command, *(("maps", dict(way=way)) for way in types + packages))
    found = dict(zip(types + packages, turns, strict=True))
    for ours in types:
        for theirs in packages:
            add(rows, f"maps of val, {ours}; or {theirs}", "s", *(values(found[w], "seconds") for w in (ours, theirs)))
    forward = operations(models.build("resnet18").eval(), SIZE)
    for dtype in types:
        peak = job(command, "peak", dtype=dtype)["peak"]
        add(rows, f"share of a large matrix product, {dtype}: maps", "%",
            [speed * forward / peak for speed in values(found[dtype], "images_per_second")])


def memory(rows, command, folder, device, usual):
    """Rows on resident memory, mapped files (photos, libraries) and loader workers aside, where it can be read.
    usual: dicts of the job "epoch_usual"."""
    if not anonymous(os.getpid()):
        return
    with tempfile.TemporaryDirectory() as runs:
        _, ours = run(sys.executable, HERE / "train.py", "cnn", "--epochs", 1, "--data", folder, "--runs", runs,
                      "--device", device)
        add(rows, "memory of training the CNN", "GiB", [ours], values(usual, "memory"))
        for arch in ("cnn", "resnet18"):
            models.save(f"{runs}/{arch}.pt", models.build(arch), arch=arch, classes=list(data.CLASSES.values()),
                        mean=data.MEAN, std=data.STD, looks=[SIZE], accuracies={}, accuracy_on="val", accuracy_n=0,
                        how="not trained", settings={}, epoch=0)
        _, figure = run(sys.executable, HERE / "cam.py", "figure", "--data", folder, "--models", f"{runs}/resnet18.pt",
                        f"{runs}/cnn.pt", "--out", f"{runs}/figure.png")
    add(rows, "memory of the figure", "GiB", [figure])


def growth(rows, command):
    """Rows on how an epoch grows with the pixels of a crop and with the photos."""
    for crop in (CROP, round(2**0.5 * CROP), 2 * CROP):
        result = job(command, "epoch", crop=crop, share=0.25)
        add(rows, f"a quarter of the photos, {crop} px", "s", [result["seconds"]])
    for share, what in ((0.5, "half of"), (1.0, "all")):
        add(rows, f"{what} the photos, {CROP} px", "s", [job(command, "epoch", share=share)["seconds"]])


def measure(rows, source, folder, device, precision, peers, quick):
    """Append all rows of the table to `rows`, in parts, what takes longest last; each is printed at once, and a `yield`
    after each part lets it be saved. source: what the user named as data; folder: where they are; quick: without maps
    and the last layer."""
    command = [sys.executable, __file__, "--data", folder, "--device", device, *(["--peers", peers] if peers else [])]
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
        heads = in_turns(command, ("head", {}), ("head_usual", {}))
        add(rows, "last layer of ResNet-18, 5 epochs", "s", *(values(r, "seconds") for r in heads))
        yield


def main():
    """The command line: the table, or, with --job, one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--peers", help="folder with torchcam and grad-cam; without it, they are left out")
    parser.add_argument("--out", default="figures/bench.json", help="where the measurements go")
    parser.add_argument("--quick", action="store_true", help="without the last layer's training and maps, which take "
                                                             "an hour where there is no bfloat16")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)  # last: its numpy and pillow, if any, do not replace ours
    try:
        device = train.choose_device(options.device)
        precision = train.choose_precision(device)
        if options.job:
            name, arguments = json.loads(options.job)
            print(json.dumps(JOBS[name](options.data, device, precision, **arguments)))
            return
        if options.peers and not all(map(importlib.util.find_spec, ("torchcam", "pytorch_grad_cam"))):
            raise data.DataError(f"--peers {options.peers} holds no torchcam and grad-cam: `make bench` fills .peers")
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        folder = str(data.prepare(options.data))
        for split in data.COUNTS:
            data.load(folder, split)
        facts = dict(command=shlex.join(["python", "tests/bench.py", *sys.argv[1:]]), machine=models.machine(),
                     device=device.type, precision=precision.name, repeats=REPEATS, rows=[])
        for _ in measure(facts["rows"], options.data, folder, device.type, precision, options.peers, options.quick):
            with models.atomic(options.out) as file:  # each time, so that an hour of measuring is not lost
                file.write(json.dumps(facts, indent=1).encode())
        print(f"\nwritten: {options.out}; `make results` takes it into RESULTS.md")
    except (train.TrainError, data.DataError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
