"""ImageNette-160: get it, check it, decode it once, hand out batches.

    python data.py                              download the public archive (99 MB), unpack, decode
    python data.py path/to/imagenette2-160.tgz  the same from an archive that is there already
    python data.py path/to/folder               use a folder: {train,val}/{n01440764,...}/*.JPEG

In code:

    photos = data.load(data.prepare("data/imagenette2-160"), "train")
    for images, labels in data.train_batches(photos, size=64, batch_size=128, generator=generator):
        ...                                     # (B, 3, 64, 64) float32, normalised; (B,) int64

JPEGs are decoded a single time into one file of uint8 pixels, which is memory-mapped from then on.
A crop is a box in pixels, and cropping, resizing and mirroring a whole batch is two matrix products
(see `resample`). This file imports nothing of the project: copy it alone and it works.
"""

import argparse
import contextlib
import glob
import gzip
import hashlib
import http.client
import json
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

try:
    import fcntl
except ImportError:  # Windows: no lock, so two processes may do the same work twice; files stay whole
    fcntl = None

URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
ARCHIVE_BYTES, ARCHIVE_MD5 = 99_003_388, "e793b78cc4c9e9a4ccc0c1155377a412"
COUNTS = {"train": 9_469, "val": 3_925}
CLASSES = {  # folder (WordNet id) -> name; the order is the label
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
}  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1
SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # Pillow gives PostScript to Ghostscript, to be run
CROP_AREA = (0.35, 1.0)  # least and largest share of a photo that a random resized crop shows
MAX_FILES, MAX_BYTES = 20_000, 3 * 2**30  # no ImageNette archive, full size included, holds more
MAX_PIXELS = 100_000_000  # of one photo
STAMP = ".archive.json"  # in an unpacked folder: which archive it came from


class DataError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


# ---------------------------------------------------------------- files: whole or not at all


@contextlib.contextmanager
def atomic(path):
    """Open `path` for binary writing so that it appears whole or not at all: temporary name, flush, rename."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk names no file of its own accord
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(part).unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path, wait=True):
    """Hold `path`.lock, so that of several processes one works and the others wait for its result."""
    with open(f"{path}.lock", "w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise DataError(f"{path} is in use by another process: wait until it ends") from None
                print(f"waiting for another process that is making {path}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            for left in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.[0-9]*.part"):  # by one that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def progress(label, done, total, started, unit, every=0.2, state={"shown": 0.0}):  # noqa: B006
    """One line that rewrites itself on a terminal, and that is written once, at the end, in a log."""
    now = time.time()
    last = done >= total
    if not last and (now - state["shown"] < every or not sys.stderr.isatty()):
        return
    state["shown"] = now
    rate = done / max(now - started, 1e-6)
    left = "" if last else f", {(total - done) / max(rate, 1e-6):.0f} s left"
    text = f"{label} {done:,.0f} of {total:,.0f} {unit} ({done / max(total, 1):.0%}), {rate:,.0f} {unit}/s{left}"
    print(f"\r{text:<90}" if sys.stderr.isatty() else text, end="\n" if last else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- getting it


def download(url, target, size, md5, tries=6, timeout=30):
    """Fetch `url` into `target`, going on from `target`.part where an earlier try stopped.

    Server errors, stalls (`timeout` seconds without a byte) and broken connections are tried again, each
    time after a longer wait. What is left behind is `target`, whole and verified, or a .part.
    """
    part, error = Path(f"{target}.part"), None
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        if have >= size:
            break
        if attempt:
            time.sleep(min(2**attempt, 30) / 2)
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                have = have if reply.status == 206 else 0  # 200: this server has no Range, start again
                started, before = time.time(), have
                with open(part, "ab" if have else "wb") as file:
                    while chunk := reply.read1(1 << 18):
                        file.write(chunk)
                        have += len(chunk)
                        progress(f"{target.name}:", (have - before) / 1e6, (size - before) / 1e6, started, "MB")
                        if have > size:
                            break
        except urllib.error.HTTPError as failure:
            if failure.code < 500 and failure.code != 429:
                raise DataError(f"{url} answers {failure.code} ({failure.reason}): get the archive elsewhere "
                                "and name it with DATA=path/to/imagenette2-160.tgz") from failure
            error = failure
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as failure:
            error = failure
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        raise DataError(f"cannot download {url} ({getattr(error, 'reason', error) or 'it ends early'}; {have:,} of "
                        f"{size:,} bytes are kept and the next try goes on from there): check the network, or name "
                        "an archive or a folder that is there already with DATA=")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if have != size or digest != md5:
        part.unlink()
        raise DataError(f"{url} gave {have:,} bytes with md5 {digest}, not the {size:,} with {md5} it should be: "
                        "removed, try again")
    os.replace(part, target)


def extract(archive, folder, stamp):
    """Unpack a .tgz safely, its top folder becoming `folder`, with the text `stamp` in it; all of it or nothing."""
    temporary = Path(f"{folder}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    started, files, size = time.time(), 0, 0
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    files, size = files + 1, size + member.size
                    if files > MAX_FILES or size > MAX_BYTES:
                        raise DataError(f"{archive} holds more than an ImageNette can "
                                        f"({MAX_FILES:,} files, {MAX_BYTES:,} bytes): not unpacked")
                    if member.name.startswith(("/", "\\")) or ".." in Path(member.name).parts:
                        raise DataError(f"{archive} would write outside its folder ({member.name}): not unpacked")
                    if not (member.isfile() or member.isdir()):
                        raise DataError(f"{archive} holds a link or a device ({member.name}): not unpacked")
                    tar.extract(member, temporary, filter="data", set_attrs=not member.isdir())
            while stream.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
        inside = [p for p in temporary.glob("*") if not p.name.startswith(".")]
        top = inside[0] if len(inside) == 1 and inside[0].is_dir() else temporary
        try:
            check(top)
        except DataError as error:
            raise DataError(f"{archive} holds no ImageNette: {str(error).replace(str(top), folder.name)}") from error
        (top / STAMP).write_text(stamp)
        if os.path.lexists(folder):
            shutil.rmtree(folder)
        os.replace(top, folder)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, OverflowError,
            IsADirectoryError, NotADirectoryError) as error:
        what = "would write outside its folder or is no plain file" if isinstance(error, tarfile.FilterError) else (
            "is cut short, damaged or no .tgz")
        raise DataError(f"{archive} {what} ({error}): nothing was unpacked; get it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{folder}: {files:,} entries unpacked in {time.time() - started:.1f} s", file=sys.stderr)


def check(folder):
    """The photos of an ImageNette folder, {split: [path, ...]} in `ImageFolder`'s order, or a DataError."""
    folder, photos = Path(folder), {}
    for split in COUNTS:
        if not (folder / split).is_dir():
            raise DataError(f"{folder / split} is missing: an ImageNette folder has train/ and val/, "
                            "each with ten class folders; `python data.py` downloads one")
        found = {p.name for p in (folder / split).iterdir() if p.is_dir() and not p.name.startswith(".")}
        for wrong, word in ((CLASSES.keys() - found, "missing"), (found - CLASSES.keys(), "not an ImageNette class")):
            if wrong:
                raise DataError(f"{folder / split / min(wrong)} is {word}: {split}/ holds the ten folders "
                                f"{', '.join(CLASSES)}")
        photos[split] = []
        for wnid in CLASSES:
            paths = sorted(e.path for e in os.scandir(folder / split / wnid) if e.is_file()
                           and not e.name.startswith(".") and Path(e.name).suffix.lower() in SUFFIXES)
            if not paths:
                raise DataError(f"{folder / split / wnid} holds no photo: every class needs at least one")
            photos[split] += paths
    return photos


def prepare(source=None, root="data"):
    """The checked ImageNette folder that `source` stands for; does nothing, fast, when it is there already.

    source: a folder; an archive (.tgz), unpacked under `root`; or None, the public archive, downloaded there.
    Raises DataError with a sentence for the user.
    """
    root = Path(root)
    folder = root / "imagenette2-160"
    if source is None and not folder.exists():
        source = root / Path(URL).name
        root.mkdir(parents=True, exist_ok=True)
        with lock(source):
            if not source.exists():
                download(URL, source, ARCHIVE_BYTES, ARCHIVE_MD5)
    source = folder if source is None else Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist: `python data.py` downloads ImageNette, or name a folder or an "
                        "archive that is there (DATA= for make, --data for the scripts)")
    if source.is_file():
        folder = root / source.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        stamp, status = folder / STAMP, source.stat()
        identity = json.dumps({"name": source.name, "bytes": status.st_size, "mtime": status.st_mtime_ns})
        root.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            if not (stamp.exists() and stamp.read_text() == identity):
                if folder.exists() and not stamp.exists():
                    raise DataError(f"{folder} exists and did not come from {source}: use it (DATA={folder}), "
                                    "or move it away")
                extract(source, folder, identity)
        source = folder
    counts = {split: len(paths) for split, paths in check(source).items()}
    usual = "" if counts == COUNTS else f" (the public ImageNette has {COUNTS['train']:,} and {COUNTS['val']:,})"
    print(f"{source}: {counts['train']:,} train and {counts['val']:,} val photos{usual}", file=sys.stderr)
    return source


# ---------------------------------------------------------------- decoding, once


def decode(file, name=None):
    """A photo (path or open file) as upright RGB, (H, W, 3) uint8, whatever its mode; DataError names it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a channel
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")  # transparent means white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a damaged file
        text = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{name or file} does not exist: name a photo that is there") from error
        raise DataError(f"{name or file} cannot be read as a photo ({text}): replace or remove it") from error


@dataclass
class Photos:
    """The photos of one split, decoded: plain tensors, one entry of each per photo."""

    pixels: torch.Tensor  # (all pixels, 3) uint8, photo after photo, row after row; memory-mapped
    start: torch.Tensor  # (N,) int64, where in `pixels` a photo begins
    height: torch.Tensor  # (N,) int64
    width: torch.Tensor  # (N,) int64
    labels: torch.Tensor  # (N,) int64
    names: list  # N paths relative to the split's folder: "n01440764/ILSVRC2012_val_00009111.JPEG"
    classes: list = ()  # K shown names, in the order of the labels
    digests: list = ()  # N hashes of the files' bytes
    fingerprint: str = ""  # of names and digests

    @property
    def device(self):
        """Where batches arrive."""
        return self.pixels.device

    def relabelled(self, classes):
        """The photos with labels in the order of `classes`; DataError where these are other classes."""
        if set(classes) != set(self.classes):
            raise DataError(f"the photos are of {', '.join(self.classes)}; the network knows {', '.join(classes)}")
        order = torch.tensor([list(classes).index(name) for name in self.classes])
        return replace(self, labels=order[self.labels], classes=list(classes))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Photo i, (H, W, 3) uint8."""
        h, w, start = int(self.height[i]), int(self.width[i]), int(self.start[i])
        return self.pixels[start : start + h * w].view(h, w, 3)

    def subset(self, index):
        """The photos of `index` (N',) int64; the pixels are shared."""
        chosen = index.tolist()
        return replace(self, start=self.start[index], height=self.height[index], width=self.width[index],
                       labels=self.labels[index], names=[self.names[i] for i in chosen],
                       digests=[self.digests[i] for i in chosen] if self.digests else ())

    def to(self, device):
        """With all tensors on `device`: batches are then cut there, and nothing crosses over in an epoch."""
        tensors = (self.pixels, self.start, self.height, self.width, self.labels)
        pixels, start, height, width, labels = (t.to(device) for t in tensors)
        return replace(self, pixels=pixels, start=start, height=height, width=width, labels=labels)


def from_arrays(images, labels=None):
    """Photos of uint8 tensors or arrays (H, W, 3), of any sizes, kept in memory; label 0 unless given."""
    images = [torch.as_tensor(image) for image in images]
    height, width = (torch.tensor([image.shape[d] for image in images]) for d in (0, 1))
    start = torch.cumsum(height * width, 0) - height * width
    labels = torch.zeros_like(start) if labels is None else torch.as_tensor(labels)
    return Photos(torch.cat([image.reshape(-1, 3) for image in images]), start, height, width, labels,
                  [str(i) for i in range(len(images))])


def load(folder, split, skip_bad=False):
    """The `split` ("train" or "val") of an ImageNette folder as `Photos`, decoding it if nobody has yet.

    The pixels lie in one file in the folder (in ./data where it is read-only), made anew when a photo has
    been added, removed or changed. A damaged photo raises DataError, or is left out and counted (skip_bad).
    """
    folder = Path(folder)
    paths = check(folder)[split]
    status = [os.stat(p) for p in paths]
    key = hashlib.sha256(repr([(p[len(str(folder)) :], s.st_size, s.st_mtime_ns)
                               for p, s in zip(paths, status, strict=True)]).encode()).hexdigest()
    cache = folder if os.access(folder, os.W_OK) else Path("data")
    cache.mkdir(exist_ok=True)
    packed = cache / (f"{split}.pixels" if cache == folder else f"{folder.name}-{key[:12]}-{split}.pixels")
    with lock(packed):
        index = read_index(packed)
        if not index or index["key"] != key:
            pack(folder / split, paths, packed, key, skip_bad)
            index = read_index(packed)
    if index["bad"]:
        print(f"{folder / split}: {len(index['bad'])} damaged photos left out, {index['bad'][0]}...", file=sys.stderr)
    pixels = torch.from_numpy(np.memmap(packed, np.uint8, "c", shape=(index["pixels"], 3)))  # "c": never written back
    height, width = torch.tensor(index["sizes"]).T.contiguous()
    start = torch.cumsum(height * width, 0) - height * width
    return Photos(pixels, start, height, width, torch.tensor(index["labels"]), index["names"],
                  list(CLASSES.values()), [], key)


def pack(folder, paths, packed, key, skip_bad):
    """Decode `paths` with one thread per core (Pillow lets go of the interpreter) into the file `packed`:
    all pixels, then an index in JSON, then the index's length in 8 bytes."""
    sizes, labels, names, bad, started = [], [], [], [], time.time()
    wnids = list(CLASSES)

    def try_decode(path):
        try:
            return decode(path)
        except DataError as error:
            return error

    others = sum(1 for _, _, files in os.walk(folder) for f in files) - len(paths)
    with atomic(packed) as file, ThreadPoolExecutor(os.cpu_count()) as threads:
        for chunk in range(0, len(paths), 512):  # bounds the memory that waits to be written
            chunk_paths = paths[chunk : chunk + 512]
            for path, image in zip(chunk_paths, threads.map(try_decode, chunk_paths), strict=True):
                if isinstance(image, DataError):
                    if not skip_bad:
                        raise DataError(f"{image}, or go on without such files: `python data.py {folder.parent} "
                                        "--skip-bad`, and --skip-bad for train.py")
                    bad.append(path)
                    continue
                file.write(image.data)
                sizes.append(image.shape[:2])
                names.append(Path(path).relative_to(folder).as_posix())
                labels.append(wnids.index(Path(path).parent.name))
            progress(f"decoding {folder}:", chunk + len(chunk_paths), len(paths), started, "photos")
        if len(set(labels)) < len(CLASSES):
            raise DataError(f"{folder} has a class without a single readable photo: replace the damaged files")
        pixels = sum(h * w for h, w in sizes)
        index = json.dumps(dict(key=key, pixels=pixels, sizes=sizes, labels=labels, names=names, bad=bad)).encode()
        file.write(index + len(index).to_bytes(8, "little"))
    if others:
        print(f"{folder}: {others} files that are no photos skipped", file=sys.stderr)


def read_index(packed):
    """The index at the end of a file of pixels, or None where there is none that fits."""
    try:
        with open(packed, "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(end - length)
            index = json.loads(file.read(length))
        whole = index.keys() >= {"key", "sizes", "labels", "names", "bad"} and index["pixels"] * 3 + length == end
        return index if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ---------------------------------------------------------------- batches


def filter_weights(start, length, size, n, limit):
    """How much each of n pixels of a line adds to each of `size` output pixels: (B, size, n), rows sum to 1.

    start, length: (B,) the piece of the line that is resampled, in pixels; limit: (B,) where the photo ends.
    The triangle filter of Pillow's BILINEAR, widened when shrinking so that no pixel is skipped.
    """
    scale = (length / size)[:, None]
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale  # (B, size)
    x = torch.arange(n, device=start.device) + 0.5
    distance = (x - centre[:, :, None]).div_(scale.clamp(min=1)[:, :, None]).abs_()  # (B, size, n)
    weights = (1 - distance).clamp_(min=0).mul_(x < limit[:, None, None])
    return weights.div_(weights.sum(2, keepdim=True))


def resample(photos, index, boxes, size, flip=None, dtype=torch.float32):
    """Cut `boxes` out of the photos `index`, resize them to size x size and normalise: (B, 3, size, size) `dtype`.

    boxes: (B, 4) float, y, x, height, width in pixels; flip: (B,) bool, mirror or not. Resizing is linear
    along each axis, so a whole batch is two matrix products: rows, then columns. In bfloat16, which holds every grey
    level exactly, they are faster, and the pixels that come out are off by a quarter of a grey level on average.
    """
    start, height, width = photos.start[index], photos.height[index], photos.width[index]
    h, w = int(height.max()), int(width.max())
    # Photos smaller than the batch's largest are padded by whatever follows in memory: its weight is zero.
    rows = torch.arange(h, device=start.device)[:, None] * width[:, None, None]
    cols = torch.arange(w, device=start.device)
    flat = (start[:, None, None] + rows + cols).clamp_(max=len(photos.pixels) - 1)
    images = photos.pixels.index_select(0, flat.flatten()).view(len(index), h, 3 * w).to(dtype)
    y, x, box_height, box_width = boxes.T
    along_y = filter_weights(y, box_height, size, h, height).to(dtype)  # (B, size, h)
    along_x = filter_weights(x, box_width, size, w, width).to(dtype)  # (B, size, w)
    if flip is not None:
        along_x = torch.where(flip[:, None, None], along_x.flip(1), along_x)
    images = torch.bmm(along_y, images).view(-1, size, w, 3)
    images = torch.einsum("nyxc,nzx->nyzc", images, along_x).contiguous()
    mean, std = (torch.tensor(v, device=start.device) * 255 for v in (MEAN, STD))
    return ((images - mean) / std).to(dtype).permute(0, 3, 1, 2)  # channels-last in memory


def random_boxes(photos, index, generator, area=CROP_AREA, ratio=4 / 3):
    """Random resized crops (Szegedy et al. 2015): boxes (B, 4) of a share `area` of each photo, width : height
    between 1/ratio and ratio, anywhere in it; a box that would be wider or higher than the photo is cut to fit."""
    index = index.to(photos.height.device)
    height, width = photos.height[index].float(), photos.width[index].float()
    u, v, y, x = torch.rand(4, len(index), generator=generator).to(height.device)
    pixels = (area[0] + (area[1] - area[0]) * u) * height * width
    aspect = ratio ** (2 * v - 1)
    h, w = torch.minimum((pixels / aspect).sqrt(), height), torch.minimum((pixels * aspect).sqrt(), width)
    return torch.stack([y * (height - h), x * (width - w), h, w], 1)


def plain_boxes(photos, index, size, generator):
    """Random crops at the photo's own scale: boxes (B, 4) of size x size whole pixels."""
    small = (torch.minimum(photos.height, photos.width) < size).nonzero()
    if len(small):
        i = int(small[0])
        raise DataError(f"{photos.names[i]} has {int(photos.width[i])} x {int(photos.height[i])} pixels, fewer than "
                        f"the {size} x {size} crop: use a smaller --crop, or leave --plain-crop out")
    index = index.to(photos.height.device)
    y, x = torch.rand(2, len(index), generator=generator).to(photos.height.device)
    room_y, room_x = photos.height[index] - size, photos.width[index] - size
    side = torch.full_like(y, size)
    return torch.stack([(y * (room_y + 1)).floor().minimum(room_y), (x * (room_x + 1)).floor().minimum(room_x),
                        side, side], 1)


def shuffled(count, batch_size, generator):
    """The numbers 0 to count - 1 in random order, as batches; a last one of less than half the size joins the one
    before it, as batch normalisation cannot tell the variance of a handful."""
    batches = list(torch.randperm(count, generator=generator).split(batch_size))
    if len(batches) > 1 and 2 * len(batches[-1]) < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def train_batches(photos, size, batch_size, generator, area=CROP_AREA, plain=False, part=(0, 1),
                  dtype=torch.float32):  # fmt: skip
    """One epoch: every photo once, shuffled, randomly cropped and mirrored; yields (images, labels).

    images: (B, 3, size, size) `dtype`, normalised; labels: (B,) int64, both where `photos` is. plain: a
    size x size piece of the photo as it is, instead of a random resized crop. The generator (on the CPU)
    decides everything. part (i, n): only the i-th of n parts of every batch, for n processes side by side.
    """
    for index in shuffled(len(photos), batch_size, generator):
        if plain:
            boxes = plain_boxes(photos, index, size, generator)
        else:
            boxes = random_boxes(photos, index, generator, area)
        flip = torch.rand(len(index), generator=generator) < 0.5
        index, boxes, flip = (t[part[0] :: part[1]].to(photos.labels.device) for t in (index, boxes, flip))
        yield resample(photos, index, boxes, size, flip, dtype), photos.labels[index]


def eval_batches(photos, size, batch_size):
    """All photos in order, each whole frame resized to size x size (its aspect squashed, nothing cut off, so that
    every pixel of a photo lies under its map). Yields (images, labels) like `train_batches`."""
    for index in torch.arange(len(photos), device=photos.labels.device).split(batch_size):
        zero = torch.zeros(len(index), device=index.device)
        boxes = torch.stack([zero, zero, photos.height[index], photos.width[index]], 1)
        yield resample(photos, index, boxes, size), photos.labels[index]


def main():
    """The command line: prepare ImageNette and decode it."""
    parser = argparse.ArgumentParser(description="ImageNette-160: get it, check it, decode it once.")
    parser.add_argument("source", nargs="?", help="a .tgz or a folder; without it, the public archive is downloaded")
    parser.add_argument("--root", default="data", help="where archives are unpacked (default: data)")
    parser.add_argument("--skip-bad", action="store_true", help="leave damaged photos out, and count them")
    options = parser.parse_args()
    try:
        folder = prepare(options.source, options.root)
        for split in COUNTS:
            photos = load(folder, split, options.skip_bad)
            print(f"{folder}/{split}.pixels: {len(photos):,} photos, {photos.pixels.numel() / 1e6:,.0f} MB")
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
