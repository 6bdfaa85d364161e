"""What the tests share: a small demo data set, drawn once, small trainings, and ways to run the
commands as a user would."""

import contextlib
import csv
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import demo as drawing
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import launch
import models
import runs

REPO = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # small tensors gain nothing from more, and threads that wait lose a lot


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder in ImageNette's layout: 6 photos of each class to train on, 2 to validate. Do not
    change it."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    drawing.draw(folder, train=6, val=2)
    return folder


@pytest.fixture
def run(tmp_path):
    """run("train.py", "cnn", ...) in an empty folder: a CompletedProcess with text output."""

    def call(script, *arguments, cwd=tmp_path, **options):
        command = [sys.executable, str(REPO / script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True,
                              timeout=300, **options)

    return call


def refused(result, *words):
    """Whether a command ended as bad input should: status 2, one sentence on stderr that has
    `words`, no traceback."""
    lines = [line for line in result.stderr.splitlines() if ".py: " in line]
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]
    return True


@contextlib.contextmanager
def serving(server):
    """`server` of the standard library, answering from a thread of its own while the block runs."""
    with server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def import_alone(module):
    """Code that imports `module` from the working directory and fails where that asks the network,
    sets a seed or starts a device; `project` then holds the names of the project's other modules
    that came along."""
    others = {path.stem for path in REPO.glob("*.py")} | {"demo", "conftest"}
    return f"""
import json, os, socket, sys, torch
def refuse(*_, **__):
    raise AssertionError("network at import")
socket.socket.connect, state, sys.path[:0] = refuse, torch.get_rng_state(), [os.getcwd()]
import {module}
assert torch.equal(torch.get_rng_state(), state), "a seed at import"
assert not torch.cuda.is_initialized(), "a device at import"
project = {others - {module}} & set(sys.modules)
"""


class FakeDevice(TorchDispatchMode):
    """Tensors on "cuda" are fake: they have a shape and no numbers. What asks one for a number
    raises, as it would wait for the device; so does a copy that waits, in either direction. All
    else happens as always."""

    copies = 0  # to the device
    watches = True  # a network may be made on the device while it looks away

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if func is torch.ops.aten._to_copy.default and target is not None and self.watches:
            if target.type == "cuda" and not fake:
                assert kwargs.get("non_blocking"), "a copy to the device that waits for it"
                self.copies += 1
            assert not (fake and target.type == "cpu"), "a copy from the device"
        real = not fake and (target is None or target.type != "cuda")
        with unset_fake_temporarily() if real else contextlib.nullcontext():
            return func(*args, **kwargs)


@pytest.fixture
def fake_device(monkeypatch):
    # Where there is a GPU, torch.tensor(0, device="cuda") would be real, and mixed with fake ones.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which asks a driver
    with FakeTensorMode(allow_non_fake_inputs=True), FakeDevice() as device:
        yield device


def on_fake_cuda(photos, moved=True):
    """Photos that fit on the fake device, or, moved=False, do not."""
    pixels = torch.empty_like(photos.pixels, device="cuda") if moved else photos.pixels
    return replace(photos, pixels=pixels, device=torch.device("cuda"))


# ---------------------------------------------------------------- photos and folders of them


def noise(height, width, seed=0):
    """A photo without two equal pixels to speak of: what is shifted, mirrored or mixed up shows."""
    rng = np.random.default_rng([seed, height, width])
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, kind, **options):
    """An open file of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def draw_classes(folder, **counts):
    """A folder per class, with so many photos, each another: their names are those of a camera."""
    for k, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(6, 7 + k, i)).save(folder / label / f"DSC{i:05}.png")
    return folder


@pytest.fixture
def pets(tmp_path):
    """Class folders directly: 40 cats, 3 dogs, 2 fish."""
    return draw_classes(tmp_path / "pets", cat=40, dog=3, fish=2)


@pytest.fixture
def small(tmp_path):
    """An ImageNette folder for every test: two photos of 14 x 10 pixels and more in each class."""
    folder = tmp_path / "photos" / "small"
    for split in ("train", "val"):
        for i, wnid in enumerate(data.CLASSES):
            (folder / split / wnid).mkdir(parents=True)
            for j in range(2):
                Image.fromarray(noise(10 + i, 14 + j, i)).save(folder / split / wnid / f"{j}.png")
    return folder


@pytest.fixture
def no_decoding(monkeypatch):
    """Call it, and from then on nothing may be decoded."""

    def refuse(file, name=None, side=None):
        raise AssertionError(f"{name} was decoded again")

    return lambda: monkeypatch.setattr(data, "decode", refuse)


def change(photo):
    """Save another photo under the same name."""
    Image.fromarray(noise(30, 30)).save(photo)
    os.utime(photo, (1, 1))


def made_in(folder):
    """The names of what was made in a folder of photos or of archives, locks aside."""
    names = {p.name for p in Path(folder).iterdir()} if Path(folder).exists() else set()
    return {name for name in names - {"train", "val"} if not name.endswith(".lock")}


def contents(folder):
    """{name: bytes} of the files below a folder, without what was made there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")
            if p.is_file() and not p.name.startswith(".")
            and p.suffix not in (".pixels", ".lock")}


def command(monkeypatch, capsys, *arguments):
    """`python data.py ...` without the seconds of a new Python: (exit status, lines on stderr)."""
    import folders

    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    status = 0
    try:
        folders.main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err.splitlines()


# ---------------------------------------------------------------- tensors, photos and networks


CLASSES = list(data.CLASSES.values())
SIZE = 32  # px, at which the tiny networks look


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.double)


def noise_photo(size, seed=0):
    return torch.randint(256, (*size, 3), generator=seeded(seed), dtype=torch.uint8)


def grey_photo(level, shape=(1, 1)):
    return torch.full((*shape, 3), level, dtype=torch.uint8)


def untrained(arch, seed=0):
    """A network whose maps are not all zero, evaluating, in float64: tests need no tolerance."""
    torch.manual_seed(seed)
    network = models.build(arch)
    torch.nn.init.normal_(network.head.weight)
    torch.nn.init.normal_(network.head.bias)
    return network.double().eval()


class MaxPooled(models.CAMNet):
    def forward(self, x):
        return self.head(self.features(x).amax((2, 3)))


class NormedHead(torch.nn.Linear):
    def forward(self, x):
        return super().forward(torch.nn.functional.layer_norm(x, x.shape[1:]))


class HiddenHead(torch.nn.Linear):
    def forward(self, x):
        return super().forward((x - 0.1).relu())


OTHER_SHAPES = ["max pooling", "layer norm", "hidden layer"]


def other_shape(name, dtype):
    """A network with the modules of a CAMNet whose maps do not explain its logits."""
    good = untrained("cnn").to(dtype)
    if name == "max pooling":
        return MaxPooled(good.features, good.head)
    kind = NormedHead if name == "layer norm" else HiddenHead
    head = kind(good.head.in_features, len(CLASSES), dtype=dtype)
    head.load_state_dict(good.head.state_dict())
    return models.CAMNet(good.features, head).eval()


def facts_of(**other):
    """What a checkpoint says of itself."""
    return dict(arch="cnn", classes=CLASSES, mean=data.MEAN, std=data.STD, looks=[SIZE],
                accuracies={str(SIZE): 0.5}, accuracy_on="val", accuracy_n=40,
                how="trained from scratch", settings={}, epoch=1) | other


def checkpoint(path, seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    network = models.cnn(len(classes))
    torch.nn.init.normal_(network.head.weight)
    models.save(path, network, **facts_of(classes=classes))
    return path


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("one") / "best.pt", seed=1)


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("two") / "best.pt", seed=2)


class Written:
    """What was written on pictures: the text, its font and the pixels it covers."""

    def __init__(self, monkeypatch):
        self.texts, self.fonts, self.boxes, self.images, self.writing = [], [], [], [], False
        write = ImageDraw.ImageDraw.text

        def text(pen, xy, text, fill=None, font=None, anchor=None, *rest, **options):
            if str(text).strip() and not self.writing:  # older Pillows write it line by line
                self.texts.append(str(text))
                self.fonts.append(font)
                self.boxes.append(pen.textbbox(xy, text, font, anchor))
                self.images.append(pen.im)
            before, self.writing = self.writing, True
            write(pen, xy, text, fill, font, anchor, *rest, **options)
            self.writing = before

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)


# ---------------------------------------------------------------- trainings

EPOCHS = 6  # of a run that is interrupted
SMALL = "mnasnet0_5"  # has a tenth of resnet18's parameters
PHOTOS_ALONE = shutil.ignore_patterns("*.pixels", "*.features", "*.lock")  # of a folder's copy
TIMES = {"seconds", "images_per_second"}  # what may differ between two runs of the same seed


def arguments(photos, runs, *more, arch="cnn", epochs=EPOCHS):
    """The options of a small training: 60 photos of 16 x 16 px, 2 steps an epoch."""
    crop = ["--crop", 16] if arch == "cnn" or "--unfreeze" in more else []
    width = ["--width", 16] if arch == "cnn" else []
    return [str(word) for word in (
        arch, "--data", photos, "--runs", runs, "--device", "cpu", "--epochs", epochs, "--size", 16,
        "--looks", 16, *crop, *width, "--batch-size", 32, *more)]


def training(*these, **options):
    """A training in this process, up to its end or to whatever stops it."""
    launch.train_run(*launch.parse_arguments(arguments(*these, **options)))


def training_stopped_after(done, *these, **options):
    """The same, with Ctrl-C right after so many epochs have been saved."""
    save = runs.Run.save

    def save_and_stop(run, epoch):
        save(run, epoch)
        if len(run.rows) == done:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save", save_and_stop)
        training(*these, **options)


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """The folder of a run of EPOCHS epochs that nothing disturbed. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    training(demo, folder)
    return folder / "cnn"


def log(folder):
    """The rows of log.csv, but for what the clock says."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def run_files(folder):
    """{name: bytes} of what lies in a run's folder, but for the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.lock"}


def parts(folder):
    """What was left half written below a folder."""
    return [str(p) for p in folder.rglob("*.part*")]


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit, times aside."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Whether two run folders hold the same training: last.pt and best.pt, and the log."""
    return log(a) == log(b) and all(same(models.read(a / name), models.read(b / name))
                                    for name in ("last.pt", "best.pt"))


# ---------------------------------------------------------------- commands, processes, disks


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("train.py", "cnn", ...): as `run`, in this process: starting torch anew takes seconds.
    What should have been a sentence and is an exception fails the test."""
    monkeypatch.chdir(tmp_path)
    handlers = {end: signal.getsignal(end) for end in (signal.SIGINT, signal.SIGTERM)}

    def call(script, *given):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, given)])
        status = 0
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        return subprocess.CompletedProcess(given, status, *capsys.readouterr())

    yield call
    for end, handler in handlers.items():
        signal.signal(end, handler)


@pytest.fixture
def start(tmp_path):
    """start(REPO / "train.py", ...): Python as a process of its own, in an empty folder; none
    outlives the test."""
    started = []

    def call(*command, **options):
        paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
                       **options.pop("env", {})}
        started.append(subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun takes its processes along
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
        process.kill()
        process.communicate()


def end(process, limit=300):
    """Wait for a process: what it wrote and its status, as `subprocess.run` returns it."""
    output, error = process.communicate(timeout=limit)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def fill_disk(size):
    """From now on files of more bytes fail as on a full disk: in the middle of writing (Python
    ignores the signal)."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def full_disk(size):
    """A disk that is full for as long as the block lasts."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        fill_disk(size)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---------------------------------------------------------------- features


def frozen_resnet():
    """A ResNet-18 of random weights, always the same."""
    torch.manual_seed(0)
    return models.build("resnet18").eval()


@torch.no_grad()
def features_one_by_one(network, photos, size):
    """Each photo's features, by the network as it is: (N, C)."""
    single = [photos.subset(torch.tensor([i])) for i in range(len(photos))]
    images = [x for photo in single for x, _ in data.eval_batches(photo, size, 1)]
    return torch.cat([network.features(x).mean((2, 3)) for x in images])
