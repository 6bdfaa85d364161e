"""How fast, against the usual way of doing the same: `make bench`, or

    python tests/bench.py --data data/imagenette2-160 --peers .peers

Every number comes from a process of its own, so that no job profits from another's warm memory. In the first table this
project and the alternative take turns, REPEATS times, and a ratio is given with its smallest and largest value; peak,
memory and the second table are measured once. Prints Markdown.
--peers names a folder with torchcam and grad-cam, which the benchmark alone uses (`make bench` fills it).
"""

import argparse
import importlib.util
import json
import os
import platform
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


def timed(batches, device, waited):
    """`batches`, the seconds that each was waited for put into the list `waited`."""
    while True:
        wait(device)
        started = time.time()
        batch = next(batches, None)
        wait(device)
        waited.append(time.time() - started)
        if batch is None:
            return
        yield batch


# ---------------------------------------------------------------- the jobs: each prints one dict of numbers


def epoch(folder, device, precision, crop=CROP, share=1.0, batch_size=BATCH, plain=False):
    """An epoch of the CNN as train.py does it, after 10 steps that do not count; then 50 more steps, in which the
    device is waited for, to tell what share of a step goes into making the batch. plain: float32, not channels-last."""
    if plain:
        precision = train.Precision(None, False, torch.contiguous_format)
    models.keep_memory()
    photos = data.load(folder, "train")
    photos = photos.subset(torch.randperm(len(photos))[: round(share * len(photos))]).to(device)
    network, optimizer = our_network(device, precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)

    def run(part, waited=None):
        started = time.time()
        batches = data.train_batches(part, crop, batch_size, torch.Generator().manual_seed(0),
                                     dtype=precision.products)  # fmt: skip
        batches = batches if waited is None else timed(batches, device, waited)
        plan = [(0.002, len(index)) for index in data.shuffled(len(part), batch_size, None)]
        train.train_epoch(network, batches, plan, optimizer, scaler, precision, SCRATCH["smoothing"])
        wait(device)
        return time.time() - started

    first = [photos.subset(torch.arange(min(steps * batch_size, len(photos)))) for steps in (10, 50)]
    run(first[0])
    seconds, waited = run(photos), []
    share = run(first[1], waited)  # fills `waited`
    return dict(images_per_second=len(photos) / seconds, seconds=seconds, waited=sum(waited) / share)


def epoch_usual(folder, device, precision, steps=100):
    """The same network on ImageFolder, RandomResizedCrop, flip, a DataLoader with a worker per core; float32, SGD.
    Up to `steps` steps, after 5 that do not count, in which the workers start."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])  # fmt: skip
    photos = datasets.ImageFolder(Path(folder) / "train", transform)
    loader = torch.utils.data.DataLoader(photos, BATCH, shuffle=True, num_workers=os.cpu_count(), drop_last=True,
                                         pin_memory=device.type == "cuda")  # fmt: skip
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
        torch.float32), transforms.Normalize(data.MEAN, data.STD)])  # fmt: skip
    network = torchvision.models.resnet18(num_classes=10).requires_grad_(False).eval().to(device)
    network.fc.requires_grad_(True)
    optimizer = torch.optim.SGD(network.fc.parameters(), 0.01, momentum=0.9)
    started = time.time()
    for split, training in (("train", True), ("val", False)):
        photos = datasets.ImageFolder(Path(folder) / split, transform, loader=lambda path: torchvision.io.read_image(
            path, torchvision.io.ImageReadMode.RGB))  # fmt: skip
        photos = torch.utils.data.Subset(photos, range(0, len(photos), every))
        loader = torch.utils.data.DataLoader(photos, train.DEFAULTS["head"]["batch_size"], shuffle=training,
                                             num_workers=os.cpu_count())  # fmt: skip
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
    return dict(seconds=4 * seconds)


def first_batch(folder, device, precision, source):
    """From `source`, an archive, or a folder, that was unpacked and decoded earlier to a batch of crops: a fresh Python
    that imports data.py alone."""
    code = ("import data, sys, torch; photos = data.load(data.prepare(sys.argv[1]), 'train'); "
            f"next(data.train_batches(photos, {CROP}, {BATCH}, torch.Generator().manual_seed(0)))")  # fmt: skip
    started = time.time()
    subprocess.run([sys.executable, "-c", code, source], check=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    return dict(seconds=time.time() - started)


def peak(folder, device, precision, side=4096):
    """TFLOP/s of a large matrix product, and TFLOP of training on one photo, in the same precision. Counted are the
    network's own operations, forward and backward; Muon's and the crops' come on top (about a tenth)."""
    a = torch.randn(side, side, device=device, dtype=precision.dtype or torch.float32)
    best = 0.0
    for _ in range(10):
        wait(device)
        started = time.time()
        a @ a
        wait(device)
        best = max(best, 2 * side**3 / (time.time() - started) / 1e12)
    network, _ = our_network(torch.device("cpu"), precision)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(torch.randn(1, 3, CROP, CROP).expand(2, -1, -1, -1)), torch.zeros(2).long()).backward()
    return dict(peak=best, per_image=counter.get_total_flops() / 2 / 1e12)


JOBS = {f.__name__: f for f in (epoch, epoch_usual, head, head_usual, maps, first_batch, peak)}


# ---------------------------------------------------------------- running them


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


def job(options, name, **arguments):
    """Run one job in a process of its own: its dict, with the memory it took."""
    peers = ["--peers", options.peers] if options.peers else []
    out, memory = run(sys.executable, __file__, "--data", options.data, "--device", options.device, *peers,
                      "--job", json.dumps([name, arguments]))  # fmt: skip
    return json.loads(out.splitlines()[-1]) | dict(memory=memory)


def against(ours, theirs):
    """Two lists of seconds, measured in turns, as three cells: ours, theirs, and their ratio with its spread."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    a, b = (sum(x) / len(x) for x in (ours, theirs))
    return f"{a:,.1f} s", f"{b:,.1f} s", f"{b / a:.1f} x ({ratios[0]:.1f} to {ratios[-1]:.1f})"


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def in_turns(options, *jobs):
    """Each of `jobs`, (name, arguments), REPEATS times, in turns: a list of dicts for each."""
    return zip(*([job(options, name, **arguments) for name, arguments in jobs] for _ in range(REPEATS)), strict=True)


def speed(options, source, precision):
    """The table of jobs here and the usual way."""
    row("job", "here", "the usual way", "ratio (spread)")
    row("---", "---", "---", "---")
    ours, usual = in_turns(options, ("epoch", {}), ("epoch_usual", {}))
    speeds = [[result["images_per_second"] for result in results] for results in (ours, usual)]
    mean = [sum(s) / len(s) for s in speeds]
    ratio = against([1 / s for s in speeds[0]], [1 / s for s in speeds[1]])[2]
    row(f"an epoch of the CNN, {CROP} px", *(f"{m:,.0f} images/s" for m in mean), ratio)
    waited = sorted(result["waited"] for result in ours)
    row("share of a step for making its batch", f"{sum(waited) / len(waited):.1%}", "",
        f"{waited[0]:.1%} to {waited[-1]:.1%}")  # fmt: skip
    if precision.dtype:
        ours, plain = in_turns(options, ("epoch", dict(share=0.25)), ("epoch", dict(share=0.25, plain=True)))
        row(f"a quarter of that epoch: {precision.name} and channels-last here, neither there",
            *against([r["seconds"] for r in ours], [r["seconds"] for r in plain]))  # fmt: skip
    ours, theirs = ([r["seconds"] for r in results] for results in in_turns(options, ("head", {}), ("head_usual", {})))
    row(f"last layer of ResNet-18, {SIZE} px, 5 epochs, start to finish", *against(ours, theirs))
    if options.peers:
        types, peers = list(dict.fromkeys([precision.name, "float32"])), ["torchcam", "gradcam"]
        seconds = dict(zip(types + peers, in_turns(options, *(("maps", dict(way=way)) for way in types + peers)),
                           strict=True))  # fmt: skip
        seconds = {way: [result["seconds"] for result in results] for way, results in seconds.items()}
        for ours in types:
            for theirs in peers:
                row(f"maps of a class for all of val, ResNet-18, {SIZE} px, {ours}, against {theirs}",
                    *against(seconds[ours], seconds[theirs]))  # fmt: skip
    seconds = sorted(job(options, "first_batch", source=source)["seconds"] for _ in range(REPEATS))
    row(f"{Path(source).name} to first batch, second start", f"{sum(seconds) / len(seconds):.1f} s", "",
        f"{seconds[0]:.1f} to {seconds[-1]:.1f} s")  # fmt: skip
    limit = job(options, "peak")
    reached = mean[0] * limit["per_image"]
    row("arithmetic of training", f"{reached:.2f} TFLOP/s", f"{limit['peak']:.2f} in a large matrix product",
        f"{reached / limit['peak']:.0%}")  # fmt: skip
    memory(options, usual)


def memory(options, usual):
    """Rows of resident memory, mapped files (photos, libraries) aside."""
    if not anonymous(os.getpid()):
        return
    with tempfile.TemporaryDirectory() as folder:
        _, training = run(sys.executable, HERE / "train.py", "cnn", "--epochs", 1, "--data", options.data, "--runs",
                          folder, "--device", options.device)  # fmt: skip
        row("memory of training the CNN", f"{training:.2f} GiB",
            f"{max(r['memory'] for r in usual):.2f} GiB, workers aside", "")  # fmt: skip
        for arch in ("cnn", "resnet18"):
            torch.manual_seed(0)
            models.save(f"{folder}/{arch}.pt", models.build(arch), arch=arch, classes=list(data.CLASSES.values()),
                        mean=data.MEAN, std=data.STD, size=SIZE, settings={}, epoch=0, accuracy=0.0)  # fmt: skip
        _, figure = run(sys.executable, HERE / "cam.py", "figure", "--data", options.data, "--models",
                        f"{folder}/resnet18.pt", f"{folder}/cnn.pt", "--out", f"{folder}/figure.png")  # fmt: skip
    row("memory of the figure", f"{figure:.2f} GiB", "", "")


def growth(options):
    """The table of how an epoch grows."""
    print("\nSeconds of an epoch of the CNN:\n")
    row("", "1 x", "2 x", "4 x")
    row("---", "---", "---", "---")
    by_pixels = [job(options, "epoch", crop=crop, share=0.25)["seconds"] for crop in (64, 90, 128)]
    row("pixels: crops of 64, 90, 128 px, a quarter of the photos", *(f"{s:.1f} s" for s in by_pixels))
    by_photos = [job(options, "epoch", share=share)["seconds"] for share in (0.25, 0.5, 1.0)]
    row("photos: a quarter, half, all, 64 px", *(f"{s:.1f} s" for s in by_photos))


def main():
    """The command line: both tables, or, with --job, one job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--peers", help="folder with torchcam and grad-cam; without it, they are left out")
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
        source, options.data = options.data, str(data.prepare(options.data))
        for split in data.COUNTS:
            data.load(options.data, split)
        where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        print(f"{device.type} ({where}), {os.cpu_count()} cores, {precision.name}, torch {torch.__version__}, "
              f"{REPEATS} repeats\n")  # fmt: skip
        speed(options, source, precision)
        growth(options)
    except (train.TrainError, data.DataError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
