"""How fast, against the usual way of doing the same: `make bench`, or

    python tests/bench.py --data data/imagenette2-160 --peers .peers

Every number comes from a process of its own, so that no job profits from another's warm memory; this project and the
alternative take turns, REPEATS times, and a ratio is given with its smallest and largest value. Prints Markdown.
--peers names a folder with torchcam and grad-cam, which the benchmark alone uses (`make bench` fills it).
"""

import argparse
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
CROP, BATCH = train.RECIPES["scratch"]["crop"], train.RECIPES["scratch"]["batch_size"]
SIZE = train.RECIPES["head"]["size"]
CLASS = 8  # golf ball


def wait(device):
    """Until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_network(device, precision):
    """A new CNN, its first layer frozen, as train.py's is, and its optimiser."""
    torch.manual_seed(0)
    network = models.cnn().to(device, memory_format=precision.memory_format)
    network.features[0][0].weight.requires_grad_(False)
    return network, train.Muon(network, 0.02, 5e-4, dtype=precision.products)


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


def epoch(folder, device, precision, crop=CROP, share=1.0, batch_size=BATCH):
    """An epoch of the CNN as train.py does it, after 10 steps that do not count."""
    train.keep_memory()
    photos = data.load(folder, "train")
    photos = photos.subset(torch.randperm(len(photos))[: round(share * len(photos))]).to(device)
    network, optimizer = our_network(device, precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.scale)

    def run(part, waited):
        batches = data.train_batches(part, crop, batch_size, torch.Generator().manual_seed(0),
                                     dtype=precision.products)  # fmt: skip
        plan = [(0.002, len(index)) for index in data.shuffled(len(part), batch_size, None)]
        train.train_epoch(network, timed(batches, device, waited), plan, optimizer, scaler, precision, 0.1)
        wait(device)

    run(photos.subset(torch.arange(min(10 * batch_size, len(photos)), device=device)), [])
    waited, started = [], time.time()
    run(photos, waited)
    seconds = time.time() - started
    return dict(images_per_second=len(photos) / seconds, waited=sum(waited) / seconds, seconds=seconds)


def epoch_usual(folder, device, precision, steps=100):
    """The same network on ImageFolder, RandomResizedCrop, flip, a DataLoader with a worker per core; float32, SGD.
    `steps` steps, after 5 that do not count, in which the workers start."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(),
                                    transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])  # fmt: skip
    photos = datasets.ImageFolder(Path(folder) / "train", transform)
    loader = torch.utils.data.DataLoader(photos, BATCH, shuffle=True, num_workers=os.cpu_count(), drop_last=True,
                                         pin_memory=device.type == "cuda")  # fmt: skip
    network = models.cnn().to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step, (images, labels) in enumerate(loader):
        if step == 5:
            wait(device)
            started = time.time()
        if step == 5 + steps:
            break
        loss = F.cross_entropy(network(images.to(device)), labels.to(device), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wait(device)
    return dict(images_per_second=steps * BATCH / (time.time() - started))


def head(folder, device, precision):
    """`train.py resnet18 --weights none`, the process from start to finish: 5 epochs, validation included."""
    with tempfile.TemporaryDirectory() as runs:
        started = time.time()
        subprocess.run([sys.executable, HERE / "train.py", "resnet18", "--weights", "none", "--data", folder, "--runs",
                        runs, "--device", device.type], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip
        return dict(seconds=time.time() - started)


def head_usual(folder, device, precision, share=0.1):
    """The straightforward loop: every photo decoded by torchvision, through the frozen network in float32, the last
    layer trained on it; a tenth of an epoch's photos, times 50 for five epochs."""
    import torchvision
    from torchvision import transforms

    resize = transforms.Compose([transforms.Resize((SIZE, SIZE), antialias=True), transforms.ConvertImageDtype(
        torch.float32), transforms.Normalize(data.MEAN, data.STD)])  # fmt: skip
    network = torchvision.models.resnet18(num_classes=10).requires_grad_(False).eval().to(device)
    network.fc.requires_grad_(True)
    optimizer = torch.optim.SGD(network.fc.parameters(), 0.01, momentum=0.9)
    paths = {split: paths[:: round(1 / share)] for split, paths in data.check(folder).items()}
    started = time.time()
    for split, training in (("train", True), ("val", False)):
        for chunk in range(0, len(paths[split]), BATCH):
            read = [torchvision.io.read_image(p, torchvision.io.ImageReadMode.RGB)
                    for p in paths[split][chunk : chunk + BATCH]]  # fmt: skip
            images = torch.stack([resize(image) for image in read]).to(device)
            with torch.set_grad_enabled(training):
                logits = network(images.flip(3) if training and torch.rand(()) < 0.5 else images)
            if training:
                F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long, device=device)).backward()
                optimizer.step()
                optimizer.zero_grad()
    wait(device)
    return dict(seconds=(time.time() - started) / share * 5)


def maps(folder, device, precision, way="ours"):
    """Maps of one class for all photos of val, ResNet-18, forward pass included, reading photos not: every fourth
    photo, times 4."""
    if way.startswith("ours"):
        train.keep_memory()
    photos = data.load(folder, "val")
    photos = photos.subset(torch.arange(0, len(photos), 4)).to(device)
    torch.manual_seed(0)
    network = models.build("resnet18").to(device).eval()
    nn.init.normal_(network.head.weight, std=0.01)
    if way.startswith("ours"):
        folded = models.fold_norms(network).to(memory_format=precision.memory_format)
        dtype = precision.dtype if way == "ours" else None

        @torch.no_grad()
        def maps_of(images):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                features = folded.features(images)
            return cam.class_activation_maps(features.float(), network.head.weight)[:, CLASS]
    elif way == "torchcam":
        from torchcam.methods import CAM

        extract = CAM(network, "features", "head")

        @torch.no_grad()
        def maps_of(images):
            network(images)
            return extract(CLASS)[0]
    else:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        extract = GradCAM(network, [network.features])

        def maps_of(images):
            return extract(images, [ClassifierOutputTarget(CLASS)] * len(images))

    maps_of(next(data.eval_batches(photos, SIZE, 16))[0])
    seconds = 0.0
    for images, _ in data.eval_batches(photos, SIZE, 16 if device.type == "cpu" else 256):
        wait(device)
        started = time.time()
        maps_of(images)
        wait(device)
        seconds += time.time() - started
    return dict(seconds=4 * seconds)


def first_batch(archive, device, precision):
    """From the archive, unpacked and decoded earlier, to a batch of crops: a fresh Python, importing data.py alone."""
    code = ("import data, sys, torch; photos = data.load(data.prepare(sys.argv[1]), 'train'); "
            "next(data.train_batches(photos, 64, 64, torch.Generator().manual_seed(0)))")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    started = time.time()
    subprocess.run([sys.executable, "-c", code, Path(archive).resolve()], check=True, env=environment,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    return dict(seconds=time.time() - started)


def peak(folder, device, precision):
    """TFLOP/s of a large matrix product, of the CNN's training by its number of operations, in the same precision."""
    dtype = precision.dtype or torch.float32
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        wait(device)
        started = time.time()
        a @ a
        wait(device)
        best = max(best, 2 * 4096**3 / (time.time() - started) / 1e12)
    network, _ = our_network(torch.device("cpu"), precision)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(network(torch.randn(1, 3, CROP, CROP).expand(2, -1, -1, -1)), torch.zeros(2).long()).backward()
    return dict(peak=best, per_image=counter.get_total_flops() / 2 / 1e12)


JOBS = {f.__name__: f for f in (epoch, epoch_usual, head, head_usual, maps, first_batch, peak)}


# ---------------------------------------------------------------- running them


def anonymous(pid):
    """Bytes of resident memory of a process that are no mapped file (Linux; 0 elsewhere)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def run(command):
    """The output of a command, and the largest resident memory it had, in bytes."""
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
        sys.exit(f"bench.py: {' '.join(map(str, command))} failed:\n{err}")
    return out, most[0]


def job(options, name, **arguments):
    """Run one job in a process of its own: its dict."""
    out, memory = run([sys.executable, __file__, "--data", options.data, "--device", options.device,
                       *(["--peers", options.peers] if options.peers else []),
                       "--job", json.dumps([name, arguments])])  # fmt: skip
    return json.loads(out.splitlines()[-1]) | dict(memory=memory)


def against(ours, theirs):
    """Two lists of seconds, measured in turns, as three cells: ours, theirs, and their ratio with its spread."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    a, b = (sum(x) / len(x) for x in (ours, theirs))
    return f"{a:,.1f} s", f"{b:,.1f} s", f"{b / a:.1f} x ({ratios[0]:.1f} to {ratios[-1]:.1f})"


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/imagenette2-160", help="ImageNette folder or .tgz")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--peers", help="folder with torchcam and grad-cam; without it, they are left out")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)  # last: its numpy and pillow, if any, do not replace ours
    device = train.choose_device(options.device)
    precision = train.choose_precision(device)
    if options.job:
        name, arguments = json.loads(options.job)
        if name == "epoch" and arguments.pop("plain", False):
            precision = train.Precision(None, False, torch.contiguous_format)
        print(json.dumps(JOBS[name](options.data, device, precision, **arguments)))
        return

    source, options.data = options.data, str(data.prepare(options.data))
    for split in data.COUNTS:
        data.load(options.data, split)
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{device.type} ({where}), {os.cpu_count()} cores, {precision.name}, torch {torch.__version__}, "
          f"{REPEATS} repeats\n")
    row("job", "here", "the usual way", "ratio (spread)")
    row("---", "---", "---", "---")
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours.append(job(options, "epoch"))
        theirs.append(job(options, "epoch_usual"))
    speeds = [[r["images_per_second"] for r in results] for results in (ours, theirs)]
    ratio = against([1 / s for s in speeds[0]], [1 / s for s in speeds[1]])[2]
    row("an epoch of the CNN, 64 px", *(f"{sum(s) / len(s):,.0f} images/s" for s in speeds), ratio)
    waited = [r["waited"] for r in ours]
    row("share of it spent on making batches", f"{sum(waited) / len(waited):.1%}", "",
        f"{min(waited):.1%} to {max(waited):.1%}")
    if device.type == "cuda":
        plain = [job(options, "epoch", plain=True) for _ in range(REPEATS)]
        row("the same, AMP and channels-last against neither", *against([r["seconds"] for r in ours],
                                                                         [r["seconds"] for r in plain]))  # fmt: skip
    both = [(job(options, "head")["seconds"], job(options, "head_usual")["seconds"]) for _ in range(REPEATS)]
    row("last layer of ResNet-18, 5 epochs, start to finish", *against(*zip(*both, strict=True)))
    ways = ["ours", "ours float32"] + ["torchcam", "gradcam"] * bool(options.peers)
    times = [{way: job(options, "maps", way=way)["seconds"] for way in ways} for _ in range(REPEATS)]
    for here in ways[:2]:
        for way in ways[2:]:
            row(f"maps of a class, ResNet-18, all of val, {here.removeprefix('ours').strip() or precision.name}; "
                f"against {way}", *against([t[here] for t in times], [t[way] for t in times]))  # fmt: skip
    seconds = [job(argparse.Namespace(**vars(options) | dict(data=source)), "first_batch")["seconds"]
               for _ in range(REPEATS)]
    row("archive to first batch, second start", f"{sum(seconds) / len(seconds):.1f} s", "",
        f"{min(seconds):.1f} to {max(seconds):.1f} s")
    limit = job(options, "peak")
    reached = sum(speeds[0]) / len(speeds[0]) * limit["per_image"]
    row("arithmetic of training", f"{reached:.2f} TFLOP/s", f"{limit['peak']:.2f} in a 4096 x 4096 product",
        f"{reached / limit['peak']:.0%}")
    gib = 2**30
    row("memory of training, mapped pixels aside", f"{max(r['memory'] for r in ours) / gib:.2f} GiB", "", "")
    row("memory of the usual training, its workers aside", "", f"{max(r['memory'] for r in theirs) / gib:.2f} GiB", "")
    with tempfile.TemporaryDirectory() as folder:
        for arch in ("cnn", "resnet18"):
            torch.manual_seed(0)
            models.save(f"{folder}/{arch}.pt", models.build(arch), arch=arch, classes=list(data.CLASSES.values()),
                        mean=data.MEAN, std=data.STD, size=SIZE, settings={}, epoch=0, accuracy=0.0)  # fmt: skip
        _, memory = run([sys.executable, HERE / "cam.py", "figure", "--data", options.data, "--models",
                         f"{folder}/resnet18.pt", f"{folder}/cnn.pt", "--out", f"{folder}/figure.png"])  # fmt: skip
    row("memory of the figure", f"{memory / gib:.2f} GiB", "", "")

    print("\nHow an epoch of the CNN grows:\n")
    row("", "1 x", "2 x", "4 x")
    row("---", "---", "---", "---")
    by_pixels = [job(options, "epoch", crop=crop, share=0.25)["seconds"] for crop in (64, 90, 128)]
    row("pixels: crops of 64, 90, 128 px, a quarter of the photos", *(f"{s:.1f} s" for s in by_pixels))
    by_photos = [job(options, "epoch", share=share)["seconds"] for share in (0.25, 0.5, 1.0)]
    row("photos: a quarter, half, all, 64 px", *(f"{s:.1f} s" for s in by_photos))


if __name__ == "__main__":
    main()
