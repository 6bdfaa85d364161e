"""Nothing is lost: kills, full disks, strangers' files, broken downloads, processes side by side,
long runs."""

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    EPOCHS,
    PHOTOS_ALONE,
    REPO,
    end,
    fill_disk,
    full_disk,
    log,
    noise,
    parts,
    refused,
    same_run,
    serving,
)
from conftest import arguments as smallest
from PIL import EpsImagePlugin, Image
from torch import nn

import archives
import data
import folders
import launch
import models
import runs
import train
from optim import Average

resource = pytest.importorskip("resource")  # POSIX: signals that kill, limits on files, locks
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
long = pytest.mark.long

KILLS = 3, 12  # how often a training is killed: always, and in the long tests
MUTATED = 5_000, 50_000  # damaged photos that are read
CUTS = 400, 4_041  # places at which a download is cut off; in the long tests after every byte
LIMIT = 300  # s, for any process
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def arguments(photos, runs, *more, epochs=EPOCHS):
    """A training whose crops grow, of 4 steps an epoch, whose network looks three times."""
    return smallest(photos, runs, "--crop", 32, "--size", 32, "--looks", "24,32,40",
                    "--batch-size", 16, *more, epochs=epochs)


def training(*these, **options):
    """Such a training in this process, up to its end."""
    launch.train_run(*launch.parse_arguments(arguments(*these, **options)))


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """A folder with `cnn`, a run that nothing disturbed, and `halfway`, the same after 2 epochs. Do
    not change it."""
    folder, save = tmp_path_factory.mktemp("whole"), runs.Run.save

    def save_and_copy(run, epoch):
        save(run, epoch)
        if len(run.rows) == 2:
            shutil.copytree(folder / "cnn", folder / "halfway")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save", save_and_copy)
        training(demo, folder)
    return folder


@pytest.fixture
def fresh(demo, tmp_path):
    """A copy of the demo photos that nobody has decoded yet."""
    return Path(shutil.copytree(demo, tmp_path / "fresh", ignore=PHOTOS_ALONE))


# ---------------------------------------------------------------- killed, and gone on with


@pytest.mark.parametrize("kills", [KILLS[0], pytest.param(KILLS[1], marks=long)])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(start, whole, demo, tmp_path,
                                                                 kills):
    rng, survived = random.Random(kills), 0
    epoch = max(row["seconds"] for row in models.read(whole / "cnn" / "last.pt")["rows"])
    while survived < kills:
        process = start(REPO / "train.py", *arguments(demo, tmp_path))
        for _ in range(rng.randint(0, 2)):  # lines; after none it is still importing
            process.stdout.readline()
        time.sleep(rng.uniform(0, 1.5 * epoch))
        process.kill()
        status = end(process).returncode
        survived += status == -signal.SIGKILL
        if status == 0:  # too late: once more from the beginning
            assert same_run(tmp_path / "cnn", whole / "cnn")
            shutil.rmtree(tmp_path / "cnn")
    result = end(start(REPO / "train.py", *arguments(demo, tmp_path)))
    assert result.returncode == 0, result.stderr
    assert same_run(tmp_path / "cnn", whole / "cnn")


# train.py that kills itself as it writes the file `name` for the `turn`-th time.
DYING = """
import os, signal, sys
import launch
name, turn, moment, *sys.argv[1:] = sys.argv[1:]
left, replace = int(turn), os.replace

def dying_replace(source, target):
    global left
    left -= os.path.basename(target) == name
    if left == 0:
        if moment == "half written":
            os.truncate(source, os.path.getsize(source) // 2)
        if moment == "after the rename":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = dying_replace
launch.main()
"""


@pytest.mark.parametrize(("name", "turn", "moment", "kept"), [
    ("last.pt", 3, "half written", 2), ("last.pt", 3, "before the rename", 2),
    ("best.pt", 1, "before the rename", 1), ("log.csv", 2, "after the rename", 2),
    ("last.pt", EPOCHS + 1, "after the rename", EPOCHS),  # the accuracy of all looks was measured
    ("result.json", 1, "before the rename", EPOCHS),
])
def test_killed_in_writing_it_keeps_the_epoch_before(start, whole, demo, tmp_path, name, turn,
                                                     moment, kept):
    result = end(start("-c", DYING, name, turn, moment, *arguments(demo, tmp_path)))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(models.read(tmp_path / "cnn" / "last.pt")["rows"]) == kept
    assert len(parts(tmp_path)) == (moment != "after the rename")  # it died where it was meant to
    training(demo, tmp_path)
    assert same_run(tmp_path / "cnn", whole / "cnn")
    assert (tmp_path / "cnn" / "result.json").exists() and parts(tmp_path) == []


def test_what_a_killed_process_left_half_written_is_cleared_away(whole, fresh, tmp_path):
    """Else every kill while decoding costs as much disk as the photos, for good."""
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    assert dead.wait(LIMIT) == 0
    shutil.copytree(whole / "halfway", tmp_path / "cnn")
    archive = Path(shutil.make_archive(tmp_path / "photos", "gztar", fresh))
    for path in ("cnn/last.pt", "cnn/log.csv", "fresh/train.pixels", "root/photos"):
        left = tmp_path / f"{path}.{dead.pid}.part"
        left.parent.mkdir(exist_ok=True)
        left.mkdir() if path == "root/photos" else left.write_bytes(b"half of it")
        os.utime(left, (1, 1))
    folders.load(folders.prepare(archive, tmp_path / "root"), "val")
    training(fresh, tmp_path)
    assert parts(tmp_path) == []


# ---------------------------------------------------------------- full disks


def test_a_disk_full_of_weights_keeps_the_last_ones(run, whole, demo, tmp_path):
    shutil.copytree(whole / "halfway", tmp_path / "cnn")
    before = (tmp_path / "cnn" / "last.pt").read_bytes()
    result = run("train.py", *arguments(demo, tmp_path),
                 preexec_fn=lambda: fill_disk(len(before) - 1))  # best.pt fits
    assert refused(result, "too large", "last.pt")
    assert (tmp_path / "cnn" / "last.pt").read_bytes() == before and parts(tmp_path) == []
    training(demo, tmp_path)  # there is room again
    assert same_run(tmp_path / "cnn", whole / "cnn")


def test_a_disk_full_of_photos_keeps_the_folder_before(call, fresh, tmp_path):
    archive = Path(shutil.make_archive(tmp_path / "photos", "gztar", fresh))
    folder = folders.prepare(archive, tmp_path / "root")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (fresh / "notes.txt").write_text("more")
    shutil.make_archive(tmp_path / "photos", "gztar", fresh)  # another one, to be unpacked anew
    with full_disk(2000):
        result = call("data.py", archive, "--root", "root")
    assert refused(result, "too large") and parts(tmp_path) == []
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_disk_full_of_pictures_keeps_the_figure_before(call, whole, demo, tmp_path):
    (tmp_path / "figure.png").write_bytes(b"the figure before")
    command = ["figure", "--models", whole / "cnn" / "best.pt", "--data", demo, "--out",
               "figure.png", "--dpi", 72]
    with full_disk(5000):
        result = call("cam.py", *command)
    assert refused(result, "too large", "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == b"the figure before"
    assert os.listdir(tmp_path) == ["figure.png"]


# ---------------------------------------------------------------- strangers' files


class Trap:
    """Unpickled by the unwary, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


STRANGE_COMMANDS = {
    "train.py --weights": lambda demo: ["resnet18", "--data", demo, "--weights", "trap.pt"],
    "train.py": lambda demo: arguments(demo, "runs"),  # a stranger's last.pt
    "cam.py explain": lambda demo: ["explain", "photo.png", "--model", "trap.pt"],
    "cam.py figure": lambda demo: ["figure", "--data", demo, "--models", "trap.pt"],
}


@pytest.mark.parametrize("command", STRANGE_COMMANDS)
def test_a_file_of_weights_runs_no_code(call, demo, tmp_path, command):
    trap = tmp_path / ("runs/cnn/last.pt" if command == "train.py" else "trap.pt")
    trap.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": "camnet-1", "state": Trap()}, trap)
    Image.fromarray(noise(8, 8)).save(tmp_path / "photo.png")
    result = call(command.split()[0], *STRANGE_COMMANDS[command](demo))
    assert refused(result, trap.name) and not (tmp_path / "sprung").exists()
    torch.load(trap, weights_only=False)
    assert (tmp_path / "sprung").exists()  # it was a trap


@pytest.mark.parametrize("fact", ["arch", "classes", "state", "looks", "how"])
def test_a_checkpoint_without_a_fact_is_refused(call, whole, tmp_path, fact):
    contents = models.read(whole / "cnn" / "best.pt")
    del contents[fact]
    torch.save(contents, tmp_path / "other.pt")
    Image.fromarray(noise(8, 8)).save(tmp_path / "photo.png")
    assert refused(call("cam.py", "explain", "photo.png", "--model", "other.pt"), "other.pt")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PNG = b"\x89PNG\r\n\x1a\n"


def test_a_decompression_bomb_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(20_000 * 2501), 1)
    (tmp_path / "bomb.png").write_bytes(
        PNG + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert (tmp_path / "bomb.png").stat().st_size < 1e6
    started = time.perf_counter()
    with pytest.raises(ValueError, match="bomb.png cannot be read as a photo .*pixels"):
        data.decode(tmp_path / "bomb.png")
    assert time.perf_counter() - started < 5


def test_a_photo_starts_no_program(tmp_path, monkeypatch):
    """Pillow gives PostScript, whatever the file's name, to Ghostscript, which runs it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    (tmp_path / "photo.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="photo.jpg"):
        data.decode(tmp_path / "photo.jpg")
    assert not (tmp_path / "started").exists()


def encoded(kind, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(noise(30, 40)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def mutations(count, seed):
    """Damaged JPEGs and PNGs. Half of the PNGs have their checksums mended, so that more is read of
    them."""
    rng, exif = random.Random(seed), Image.Exif()
    exif[274] = 6  # turned
    originals = [
        encoded("JPEG", exif=exif), encoded("JPEG", progressive=True), encoded("JPEG", "CMYK"),
        encoded("PNG"), encoded("PNG", "P", transparency=3), encoded("PNG", "LA"),
        encoded("PNG", "1")]
    for number in range(count):
        raw = bytearray(originals[number % len(originals)])
        for _ in range(rng.randint(1, 4)):
            stop = rng.choice([min(200, len(raw)), len(raw)])  # headers matter most
            at = rng.randrange(1, max(2, stop))
            size = rng.randint(1, 40)
            stop, new = rng.choice([
                (at + 1, rng.randbytes(1)), (len(raw), b""), (at, rng.randbytes(size)),
                (at + size, b""), (at + size, bytes(size)), (at + size, b"\xff" * size),
                (at + size, raw[at : at + size] * 2),
            ])  # a byte changed, the rest cut off, inserted, deleted, filled, repeated
            raw[at:stop] = new
        if raw.startswith(PNG) and rng.random() < 0.5:
            at = len(PNG)
            while at + 12 <= len(raw):
                stop = at + 8 + int.from_bytes(raw[at : at + 4])
                raw[stop : stop + 4] = struct.pack(">I", zlib.crc32(raw[at + 4 : stop]))
                at = stop + 4
        yield bytes(raw)


@pytest.mark.parametrize("count", [MUTATED[0], pytest.param(MUTATED[1], marks=long)])
def test_a_damaged_photo_is_a_picture_or_a_sentence(count):
    read = 0
    for number, raw in enumerate(mutations(count, seed=count)):
        started = time.perf_counter()
        try:
            with warnings.catch_warnings(action="ignore"):
                image = data.decode(io.BytesIO(raw), f"photo {number}")
            assert image.ndim == 3 and image.shape[2] == 3
            assert image.size and image.dtype == np.uint8
            read += 1
        except ValueError as error:
            assert f"photo {number} " in str(error) and "\n" not in str(error)
        assert time.perf_counter() - started < 5
    assert 0.1 < read / count < 0.9  # both happen


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_photo_is_explained_or_refused(call, whole, tmp_path):
    statuses = []
    for number, raw in enumerate(mutations(20, seed=1)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(raw)
        model = whole / "cnn" / "best.pt"
        result = call("cam.py", "explain", path, "--model", model, "--dpi", 72)
        assert result.returncode == 0 or refused(result, path)
        pictures = list((tmp_path / "figures").glob(f"{number}-cnn*.png"))
        assert bool(pictures) == (result.returncode == 0)
        statuses.append(result.returncode)
    assert set(statuses) == {0, 2} and parts(tmp_path) == []


# ---------------------------------------------------------------- broken downloads

PAYLOAD = random.Random(0).randbytes(600_000)  # more than is read at once
HEADER = len(b"HTTP/1.0 200 OK\r\nContent-Length: 4000\r\n\r\n")


class Server(socketserver.ThreadingTCPServer):
    """A web server of `payload` on 127.0.0.1. answers: for each request, what is sent of the whole
    reply, in pieces; later ones are sent all of it. requests: (path, first byte that was
    asked for) of each."""

    daemon_threads, handle_error = True, lambda *_: None  # a client may hang up

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Reply)
        self.payload, self.answers, self.requests = PAYLOAD, [], []
        self.asked, self.released = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/photos.tgz"


class Reply(socketserver.StreamRequestHandler):
    def handle(self):
        server, head = self.server, b""
        while (line := self.rfile.readline()).strip():
            head += line
        wanted = re.search(rb"(?i)^range: bytes=(\d+)-", head, re.M)
        first = int(wanted[1]) if wanted else 0
        server.requests.append((head.split()[1].decode(), first))
        server.asked.set()
        body = server.payload[first:]
        status = ("200 OK" if not first else "206 Partial Content" if body else
                  "416 Range Not Satisfiable")
        reply = f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        for piece in server.answers.pop(0)(reply) if server.answers else [reply]:
            self.wfile.write(piece)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(Server()) as server:
        yield server
        server.released.set()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    """Download the payload, without the pauses between the tries: what was left behind, and what
    was asked for."""
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)

    def call(size=None, content=None):
        content = content or server.payload
        server.requests.clear()
        target = tmp_path / "photos.tgz"
        target.unlink(missing_ok=True)
        try:
            md5 = hashlib.md5(content).hexdigest()
            archives.download(server.url, target, size or len(content), md5, timeout=1)
        finally:  # always either the verified file or a .part
            left = {p.name for p in tmp_path.iterdir()}
            assert left in ({"photos.tgz"}, {"photos.tgz.part"}, set())
            assert "photos.tgz" not in left or target.read_bytes() == content
        return target.exists(), [first for _, first in server.requests]

    return call


@pytest.mark.parametrize("count", [CUTS[0], pytest.param(CUTS[1], marks=long)])
def test_a_download_cut_after_any_byte_goes_on_from_there(fetch, server, count):
    server.payload = PAYLOAD[:4000]
    for i in range(count):
        cut = i * (HEADER + len(server.payload)) // count
        server.answers = [lambda reply, cut=cut: [reply[:cut]]]
        assert fetch() == (True, [0, max(0, cut - HEADER)])


def test_a_download_that_stalls_goes_on(fetch, server):
    def stall(reply):
        yield reply[:300_000]
        server.released.wait(30)

    server.answers, started = [stall], time.perf_counter()
    done, asked = fetch()
    assert done and len(asked) == 2 and asked[1] > 200_000
    assert 0.9 < time.perf_counter() - started < 30  # s; it waits for 1


def test_a_redirect_is_followed_to_the_byte(fetch, server):
    redirect = b"HTTP/1.0 302 Found\r\nLocation: /there\r\n\r\n"
    server.answers = [lambda reply: [reply[:1000]], lambda reply: [redirect]]
    kept = 1000 - len(b"HTTP/1.0 200 OK\r\nContent-Length: 600000\r\n\r\n")
    assert fetch() == (True, [0, kept, kept])
    assert server.requests[-1][0] == "/there"


@pytest.mark.parametrize("length", ["1000", "900000"])
def test_a_header_that_lies_about_the_length_does_no_harm(fetch, server, length):
    server.answers = [lambda reply: [reply.replace(b"600000", length.encode(), 1)]]
    assert fetch() == (True, [0, 1000] if length == "1000" else [0])


@pytest.mark.parametrize("size", [1000, 599_999, 600_001, 10**6])
def test_a_file_of_another_length_is_refused(fetch, server, size):
    with pytest.raises(ValueError, match="photos.tgz"):
        fetch(size)


def test_a_disk_full_of_a_download_keeps_what_fits(fetch, server, tmp_path):
    with full_disk(400_000), pytest.raises(OSError, match="too large"):
        fetch()
    done, asked = fetch()
    assert done and asked[0] > 200_000


# ---------------------------------------------------------------- two processes side by side

PREPARE = """import sys, folders
folders.URL, folders.ARCHIVE_BYTES, folders.ARCHIVE_MD5 = sys.argv[1], int(sys.argv[2]), sys.argv[3]
folders.prepare()"""


def test_of_two_processes_one_downloads_and_the_other_waits(start, server, fresh, tmp_path):
    archive = Path(shutil.make_archive(tmp_path / "imagenette2-160", "gztar", fresh))
    server.payload = archive.read_bytes()

    def half(reply):
        yield reply[:5000]
        server.released.wait(LIMIT)
        yield reply[5000:]

    server.answers, url = [half], server.url.replace("photos", "imagenette2-160")
    command = "-c", PREPARE, url, len(server.payload), hashlib.md5(server.payload).hexdigest()
    first = start(*command)
    assert server.asked.wait(LIMIT)
    second = start(*command)
    assert "waiting for another process" in second.stderr.readline()
    server.released.set()
    results = [end(first), end(second)]
    assert [r.returncode for r in results] == [0, 0], results
    assert [first for _, first in server.requests] == [0]
    assert len(folders.load(tmp_path / "data" / "imagenette2-160", "train")) == 60
    assert parts(tmp_path) == []


def test_two_trainings_at_once_share_one_cache(start, demo, fresh, tmp_path):
    names = "ab"
    both = [start(REPO / "train.py", *arguments(fresh, "runs", "--name", name, epochs=1))
            for name in names]
    results = [end(process) for process in both]
    assert [r.returncode for r in results] == [0, 0], results
    assert "".join(r.stderr for r in results).count("decoding") == 2  # each split once
    assert parts(tmp_path) == []
    for split in folders.COUNTS:
        pixels = [folders.load(folder, split).pixels for folder in (fresh, demo)]
        assert torch.equal(*pixels)
    assert same_run(*(tmp_path / "runs" / n for n in names))


def test_two_trainings_of_one_name_tear_no_file(start, whole, demo, tmp_path):
    both = [start(REPO / "train.py", *arguments(demo, tmp_path)) for _ in range(2)]
    for result in [end(process) for process in both]:
        assert result.returncode == 0 or refused(result)
    training(demo, tmp_path)  # what may be left of it
    assert same_run(tmp_path / "cnn", whole / "cnn") and parts(tmp_path) == []


# ---------------------------------------------------------------- one training in several processes


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_the_parts_of_all_processes_are_the_batches_of_one(processes, plain):
    sizes = [(40, 60), (64, 32), (33, 33), (50, 41), (32, 90)] * 5
    photos = data.from_arrays([noise(*size) for size in sizes], range(len(sizes)))

    def batches(part):
        generator = torch.Generator().manual_seed(0)
        return list(data.train_batches(photos, 32, 7, generator, plain=plain, part=part))

    split = [batches((i, processes)) for i in range(processes)]
    for (images, labels), *pieces in zip(batches((0, 1)), *split, strict=True):
        assert len({len(piece) for _, piece in pieces}) > 1 or len(labels) % processes == 0
        for i, (part, part_labels) in enumerate(pieces):
            assert torch.equal(part_labels, labels[i::processes])
            assert torch.allclose(part, images[i::processes], atol=1e-5)
    found = torch.cat([labels for pieces in split for _, labels in pieces])
    assert sorted(found.tolist()) == list(range(25))


def shard(out):
    """An epoch of uneven batches on a network without batch normalisation, as one of the processes
    that RANK and WORLD_SIZE say: its gradients at every step, and the sums over all processes, are
    written to `out`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    photos = data.from_arrays([noise(20 + i, 30) for i in range(23)], torch.arange(23) % 10)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
    network, gradients = models.CAMNet(layers, nn.Linear(8, 10)), []

    class Recorder(torch.optim.SGD):
        def step(self):
            gradients.append([p.grad.clone() for p in network.parameters()])
            super().step()

    launch.join_processes(torch.device("cpu"))
    rank, world = part = train.processes()
    generator = torch.Generator().manual_seed(0)
    batches = data.train_batches(photos, 16, 7, generator, part=part)
    precision = train.Precision(None, False, torch.contiguous_format)
    average = Average(network)
    step = train.make_step(network, Recorder(network.parameters()),
                           torch.amp.GradScaler("cpu", enabled=False), average, precision, 0.0)
    losses, right, counts = train.train_epoch(step, batches, [0.1] * 3, average)
    val = photos.subset(torch.arange(rank, 23, world))
    measured = train.evaluate(network, data.eval_batches(val, 16, 4), precision, 10)
    losses, right, counts, measured = map(train.add_up, (losses * counts, right, counts, measured))
    torch.save([gradients, [losses / counts, right, counts, measured]], out)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=long)])
def shards(request, tmp_path_factory):
    """What `shard` writes, of one process and of each of several."""
    folder = tmp_path_factory.mktemp("shards")
    shard(folder / "alone.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(request.param),
             "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")])}
    script = "import sys, test_survival; test_survival.shard(sys.argv[1])"
    ranks = [subprocess.Popen([sys.executable, "-c", script, f"{rank}.pt"], cwd=folder, text=True,
                              env=os.environ | group | {"RANK": str(rank)}, stderr=subprocess.PIPE)
             for rank in range(request.param)]
    for rank in ranks:
        _, error = rank.communicate(timeout=LIMIT)
        assert rank.returncode == 0, error
    return [torch.load(folder / f"{name}.pt") for name in ("alone", *range(request.param))]


def test_gradients_and_sums_of_several_processes_are_those_of_one(shards):
    (gradients, (_, right, counts, sums)), *ranks = shards
    assert counts.sum() == 23 and len(gradients) == 3
    for theirs, (_, their_right, their_counts, their_sums) in ranks:
        for step, their_step in zip(gradients, theirs, strict=True):
            for own, other in zip(step, their_step, strict=True):
                assert torch.allclose(own, other, atol=1e-5, rtol=0)
        assert torch.equal(counts, their_counts) and torch.equal(right, their_right)
        assert torch.equal(sums[1:], their_sums[1:])
        assert torch.allclose(sums, their_sums, atol=1e-4)


def test_losses_of_several_processes_are_those_of_one(shards):
    (_, (losses, *_)), *ranks = shards
    for _, (their_losses, *_) in ranks:
        assert torch.allclose(losses, their_losses, atol=1e-5)


def rank_of(process):
    """RANK in the environment of a process, None where it has none."""
    with contextlib.suppress(OSError):
        found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{process}/environ").read_bytes())
        return int(found[1]) if found else None


@linux
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=long)])
def test_a_dead_process_ends_the_others_and_the_same_command_goes_on(start, fresh, tmp_path, kills):
    for split in folders.COUNTS:  # 59 and 19 photos: no half is as large as the other
        next((fresh / split / "n01440764").glob("*.*")).unlink()
    command = [*TORCHRUN, REPO / "train.py", *arguments(fresh, "runs")]
    folder, output = tmp_path / "runs" / "cnn", ""
    for _ in range(kills):
        process = start(*command)
        for line in process.stdout:
            output += line
            if line.startswith("epoch"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (victim,) = [int(child) for child in children if rank_of(child) == 1]
        os.kill(victim, signal.SIGKILL)
        killed, result = time.time(), end(process)
        assert result.returncode != 0 and time.time() - killed < 60
        output += result.stdout
        done = len(models.read(folder / "last.pt")["rows"])
        assert 1 <= done < EPOCHS
    result = end(start(*command))
    assert result.returncode == 0, result.stderr
    printed = [int(n) for n in re.findall(r"^epoch +(\d+)/", output + result.stdout, re.M)]
    assert printed == [*range(1, EPOCHS + 1)]  # by one process, once
    assert printed == [int(row["epoch"]) for row in log(folder)] and parts(tmp_path) == []
    assert result.stdout.count("59 photos to train on, 19 to validate on") == 1

    last = models.read(folder / "last.pt")
    for row in last["rows"]:
        for right in (59 * row["train_accuracy"], 19 * row["val_accuracy"]):
            assert abs(right - round(right)) < 1e-3
    network, precision = models.cnn(width=16), train.choose_precision(torch.device("cpu"))
    network.load_state_dict(last["state"]["average"])
    batches = data.eval_batches(folders.load(fresh, "val"), 32, 128)
    loss, right, _ = train.evaluate(network, batches, precision, 10).sum(1).tolist()
    assert abs(right / 19 - row["val_accuracy"]) < 1e-4  # what is saved is what was measured
    assert abs(loss / 19 - row["val_loss"]) < 1e-3 * loss / 19
    if kills > 1:
        assert end(start(*command, "--name", "whole")).returncode == 0
        assert same_run(folder, folder.parent / "whole")


# ---------------------------------------------------------------- long runs


@linux
@long
def test_neither_memory_nor_open_files_grow(demo, tmp_path, monkeypatch):
    memory, files, sizes, save = [], [], [], runs.Run.save

    def save_and_measure(run, epoch):
        save(run, epoch)
        sizes.append(run.rows[-1]["size"])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * resource.getpagesize() / 2**20)
        files.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(runs.Run, "save", save_and_measure)
    training(demo, tmp_path, epochs=60)
    assert len(files) == 60 and len(set(files[10:])) == 1
    assert sizes[22] == sizes[-1] != sizes[0]  # before that crops grow
    assert max(memory[-10:]) - max(memory[22:32]) < 16  # MiB


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of Unix")
@pytest.mark.parametrize("command", [
    "data.py nowhere", "train.py cnn --data nowhere", "cam.py explain nowhere.jpg",
    "score.py nowhere.pt"])
def test_a_closed_output_is_no_traceback(tmp_path, command):
    script = f'"{sys.executable}" "{REPO}/"{command} >&-'  # as daemons leave it
    result = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert refused(result, command.split(".")[0])
