"""Photos in class folders: get them, check them, decode them once, hand out batches.

    python data.py                              ImageNette-160: download (99 MB), unpack, decode
    python data.py path/to/folder               a folder of class folders, see `check`
    python data.py path/to/archive              the same as a .tgz, .tar or .zip
    python data.py path/to/folder --side 320    stored with a shortest side of 320 px at most, not 256

In code:

    photos = data.load(data.prepare("data/imagenette2-160"), "train")
    for images, labels in data.train_batches(photos, size=64, batch_size=128, generator=generator):
        ...                                     # (B, 3, 64, 64) float32, normalised; (B,) int64

Photos are decoded a single time into one file of uint8 pixels, which is memory-mapped from then on.
A crop is a box in pixels, and cropping, resizing and mirroring a whole batch is two matrix products
(see `resample`). This file imports nothing of the project: copy it alone and it works.
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
ARCHIVE_BYTES, ARCHIVE_MD5 = 99_003_388, "e793b78cc4c9e9a4ccc0c1155377a412"
COUNTS = {"train": 9_469, "val": 3_925}  # of the public ImageNette
CLASSES = {  # ImageNette's class folders (WordNet ids) -> shown names
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}
WORDS = CLASSES | {  # and Imagewoof's; all others are shown by their folder's name
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle", "n02089973": "English foxhound",
    "n02093754": "Border terrier", "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1
CROP_AREA = 0.25  # the least share of a photo in a random resized crop, where a caller names no other, as train.py does
CROP_RATIO = 4 / 3  # its longest shape
COLOURS = 0.3  # how far `random_colours` goes
MAX_BATCH = 2**25  # pixels that are resampled at a time, padding included: 0.4 GB in float32
SUFFIXES = {".jpeg", ".jpg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # Pillow gives PostScript to Ghostscript, to be run
UNREAD = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw"}  # photos, but not for us
SHORT_SIDE = 256  # px, the shortest side that larger photos are reduced to
MAX_PIXELS = 100_000_000  # of one photo
VAL_NAMES = ("val", "valid", "validation", "test")  # of the folder to validate on, the first that is there
VAL_SHARE = 0.15  # of each class, set aside to validate on where there is no such folder
MAX_FILES, SPARE_BYTES = 2_000_000, 2**30  # of an archive; what unpacking leaves free on the disk
STAMP = ".archive.json"  # in an unpacked folder: which archive it came from


class DataError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


# ---------------------------------------------------------------- photos


@dataclass
class Photos:
    """The photos of one split, decoded: plain tensors, one entry of each per photo."""

    pixels: torch.Tensor  # (all pixels, 3) uint8, photo after photo, row after row; memory-mapped, or on `device`
    start: torch.Tensor  # (N,) int64, where in `pixels` a photo begins; on the CPU, like all that follow
    height: torch.Tensor  # (N,) int64
    width: torch.Tensor  # (N,) int64
    labels: torch.Tensor  # (N,) int64
    names: list  # N paths relative to the split's folder: "n01440764/ILSVRC2012_val_00009111.JPEG"
    classes: list = ()  # K shown names, in the order of the labels
    digests: list = ()  # N hashes of the files' bytes
    device: torch.device = torch.device("cpu")  # where batches arrive

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Photo i, (H, W, 3) uint8."""
        h, w, start = int(self.height[i]), int(self.width[i]), int(self.start[i])
        return self.pixels[start : start + h * w].view(h, w, 3)

    @property
    def fingerprint(self):
        """A short string that another name, file or stored size of any photo changes."""
        facts = [self.names, list(self.digests), self.height.tolist(), self.width.tolist()]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def subset(self, index):
        """The photos of `index` (N',) int64; the pixels are shared."""
        chosen = index.tolist()
        return replace(self, start=self.start[index], height=self.height[index], width=self.width[index],
                       labels=self.labels[index], names=[self.names[i] for i in chosen],
                       digests=[self.digests[i] for i in chosen] if self.digests else ())

    def relabelled(self, classes):
        """The photos with labels in the order of `classes`, a list of shown names; DataError names what differs."""
        ours, theirs = set(self.classes) - set(classes), set(classes) - set(self.classes)
        if ours or theirs:
            raise DataError("the photos are of other classes than the network's (the photos' alone: "
                            f"{first_names(ours)}; the network's alone: {first_names(theirs)}): name the data that it "
                            "was trained on")
        order = torch.tensor([list(classes).index(name) for name in self.classes])
        return replace(self, labels=order[self.labels], classes=list(classes))

    def to(self, device):
        """The photos with batches on `device`. The pixels move there if they fit: on CUDA into half of the memory that
        is free, on MPS into the 4 GiB of one tensor. Else they stay: crops are made on the CPU and moved (`send`)."""
        device, room = torch.device(device), float("inf")
        if device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[0] / 2
        elif device.type == "mps":
            room = 2**32
        pixels = self.pixels.to(device) if self.pixels.numel() < room else self.pixels
        return replace(self, pixels=pixels, device=device)


def first_pixels(height, width):
    """Where each photo begins in the pixels of all: (N,) int64."""
    return torch.cumsum(height * width, 0) - height * width


def from_arrays(images, labels=None):
    """Photos of uint8 tensors, arrays or PIL images (H, W, 3), of any sizes, kept in memory; label 0 unless given.
    Raises DataError: another shape or type would be read as other pixels."""
    images = [image if torch.is_tensor(image) else torch.as_tensor(np.array(image)) for image in images]
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
            raise DataError(f"photo {i} is {tuple(image.shape)} of {image.dtype}: give (H, W, 3) of uint8 in RGB")
    height, width = (torch.tensor([image.shape[d] for image in images]) for d in (0, 1))
    labels = torch.zeros_like(height) if labels is None else torch.as_tensor(labels)
    return Photos(torch.cat([image.reshape(-1, 3) for image in images]), first_pixels(height, width), height, width,
                  labels, [str(i) for i in range(len(images))])


def shared(train, val):
    """How many photos of `val` are, byte for byte, in `train` too."""
    known = set(train.digests)
    return sum(digest in known for digest in val.digests)


def first_names(names, count=5):
    """The first few of many names, for a sentence."""
    return ", ".join(sorted(names)[:count]) + ", ..." * (len(names) > count) or "none"


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


def span(start, length, size, limit):
    """First pixel and number of pixels of a line that `filter_weights` weighs: (B,) int64 each."""
    reach = (length / size).clamp(min=1)
    first = (start - reach).floor().clamp(min=0)
    return first.long(), ((start + length + reach).ceil().minimum(limit) - first).long()


def send(tensor, device):
    """A tensor of the CPU on `device`. On CUDA the copy is pinned and nothing waits for it, so that a batch is made
    and moved while the device still computes the one before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def resample(photos, index, boxes, size, flip=None, dtype=torch.float32):
    """Cut `boxes` out of the photos `index`, resize them to size x size and normalise: (B, 3, size, size) `dtype`.

    boxes: (B, 4) float, y, x, height, width in pixels; flip: (B,) bool, mirror or not; all on the CPU, so that nothing
    waits for a device. Resizing is linear along each axis, so a whole batch is two matrix products: rows, then columns.
    In bfloat16, which holds every grey level exactly, they are faster, and the pixels that come out are off by a
    quarter of a grey level on average.
    """
    flip = torch.zeros(len(index), dtype=torch.bool) if flip is None else flip
    y, x, box_height, box_width = boxes.T
    top, rows = span(y, box_height, size, photos.height[index])
    left, cols = span(x, box_width, size, photos.width[index])
    h, w = (32 * math.ceil(int(n.max()) / 32) for n in (rows, cols))  # few shapes: for each, kernels are made and kept
    if len(index) > 1 and len(index) * h * w > MAX_BATCH:
        halves = zip(index.chunk(2), boxes.chunk(2), flip.chunk(2), strict=True)
        return torch.cat([resample(photos, i, box, size, mirror, dtype) for i, box, mirror in halves])
    device = photos.pixels.device
    images = torch.zeros(len(index), h, w, 3, dtype=dtype, device=device)  # what is needed of each, padded with zeros
    for n, (i, t, r, s, c) in enumerate(torch.stack([index, top, rows, left, cols], 1).tolist()):
        images[n, :r, :c] = photos[i][t : t + r, s : s + c]
    geometry = torch.stack([y - top, box_height, rows, x - left, box_width, cols, flip])
    y, box_height, rows, x, box_width, cols, flip = send(geometry, device)  # (B,) float32 each
    along_y = filter_weights(y, box_height, size, h, rows).to(dtype)  # (B, size, h)
    along_x = filter_weights(x, box_width, size, w, cols).to(dtype)  # (B, size, w)
    along_x = torch.where(flip[:, None, None] > 0, along_x.flip(1), along_x)
    images = torch.bmm(along_y, images.view(len(index), h, 3 * w)).view(-1, size, w, 3)
    images = torch.einsum("nyxc,nzx->nyzc", images, along_x).contiguous()
    mean, std = send(255 * torch.tensor([MEAN, STD]), device)
    images = send(((images - mean) / std).to(dtype), photos.device).permute(0, 3, 1, 2)  # channels-last in memory
    return images.contiguous() if photos.device.type == "mps" else images  # wrong gradients: pytorch#175189


def random_boxes(photos, index, generator, area=CROP_AREA):
    """Random resized crops (Szegedy et al. 2015): boxes (B, 4) of a share `area` to 1 of each photo, width : height
    between 1/CROP_RATIO and CROP_RATIO, anywhere in it; a box that would be wider or higher than it is cut to fit."""
    height, width = photos.height[index].float(), photos.width[index].float()
    u, v, y, x = torch.rand(4, len(index), generator=generator)
    pixels = (area + (1 - area) * u) * height * width
    aspect = CROP_RATIO ** (2 * v - 1)
    h, w = torch.minimum((pixels / aspect).sqrt(), height), torch.minimum((pixels * aspect).sqrt(), width)
    return torch.stack([y * (height - h), x * (width - w), h, w], 1)


def random_colours(count, generator):
    """For `recolour`, (count, 3) float32: how much more saturation, contrast and brightness, each up to COLOURS."""
    return COLOURS * (2 * torch.rand(count, 3, generator=generator) - 1)


def recolour(images, colours):
    """Normalised images (B, 3, H, W) as in another light: colours (B, 3) says how much more saturation and contrast
    each has, as shares of its own, and how much more brightness, in standard deviations of the data."""
    saturation, contrast, brightness = send(colours.to(images.dtype), images.device).T[:, :, None, None, None]
    grey = images.mean(1, keepdim=True)
    return (images + saturation * (images - grey)) * (1 + contrast) + brightness


def plain_boxes(photos, index, size, generator):
    """Random crops at the photo's own scale: boxes (B, 4) of size x size whole pixels."""
    small = (torch.minimum(photos.height, photos.width) < size).nonzero()
    if len(small):
        i = int(small[0])
        raise DataError(f"{photos.names[i]} has {int(photos.width[i])} x {int(photos.height[i])} pixels, fewer than "
                        f"the {size} x {size} crop: use a smaller --crop, or leave --plain-crop out")
    y, x = torch.rand(2, len(index), generator=generator)
    room_y, room_x = photos.height[index] - size, photos.width[index] - size
    top, left = (y * (room_y + 1)).floor().minimum(room_y), (x * (room_x + 1)).floor().minimum(room_x)
    side = torch.full_like(y, size)
    return torch.stack([top, left, side, side], 1)


def shuffled(count, batch_size, generator):
    """The numbers 0 to count - 1 in random order, as batches; a last one of less than half the size joins the one
    before it, as batch normalisation cannot tell the variance of a handful."""
    batches = list(torch.randperm(count, generator=generator).split(batch_size))
    if len(batches) > 1 and 2 * len(batches[-1]) < batch_size:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def train_batches(photos, size, batch_size, generator, area=CROP_AREA, plain=False, part=(0, 1),
                  dtype=torch.float32):
    """One epoch: every photo once, shuffled, randomly cropped, mirrored and coloured; yields (images, labels).

    images: (B, 3, size, size) `dtype`, normalised; labels: (B,) int64, both on `photos.device`. area: the least share
    of a photo in a crop. plain: a size x size piece of the photo as it is, mirrored or not, instead of a random resized
    crop in random colours. The generator (on the CPU) decides everything. part (i, n): only the i-th of n parts of
    every batch, for n processes side by side.
    """
    for index in shuffled(len(photos), batch_size, generator):
        boxes = plain_boxes(photos, index, size, generator) if plain else random_boxes(photos, index, generator, area)
        flip = torch.rand(len(index), generator=generator) < 0.5
        colours = random_colours(len(index), generator)
        index, boxes, flip, colours = (t[part[0] :: part[1]] for t in (index, boxes, flip, colours))
        images = resample(photos, index, boxes, size, flip, dtype)
        yield images if plain else recolour(images, colours), send(photos.labels[index], photos.device)


def eval_batches(photos, size, batch_size):
    """All photos in order, each whole frame resized to size x size (its aspect squashed, nothing cut off, so that
    every pixel of a photo lies under its map). Yields (images, labels) like `train_batches`."""
    for index in torch.arange(len(photos)).split(batch_size):
        zero = torch.zeros(len(index))
        boxes = torch.stack([zero, zero, photos.height[index], photos.width[index]], 1)
        yield resample(photos, index, boxes, size), send(photos.labels[index], photos.device)


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
    """Hold `path`.lock, so that of several processes one works and the others wait for its result.

    wait=False: DataError where another process holds it. Without locks (Windows, some network drives) nobody waits.
    """
    with open(f"{path}.lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for part in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.[0-9]*.part"):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()  # left by a process that was killed
        except BlockingIOError:
            if not wait:
                raise DataError(f"{path} is in use by another process: wait until it ends") from None
            print(f"waiting for another process that is making {path}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # this file system has no locks
            pass
        yield


def progress(label, done, total, started, unit):
    """One line that rewrites itself on a terminal, and that is written once, at the end, in a log."""
    last, terminal = done >= total, sys.stderr.isatty()
    if last or terminal:
        rate = done / max(time.time() - started, 1e-6)
        left = "" if last else f", {(total - done) / max(rate, 1e-6):.0f} s left"
        text = f"{label} {done:,.0f} of {total:,.0f} {unit} ({done / max(total, 1):.0%}), {rate:,.0f} {unit}/s{left}"
        print(f"\r{text:<90}" if terminal else text, end="\n" if last else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- decoding, once


def decode(file, name=None, side=None):
    """A photo (path or open file) as upright RGB, (H, W, 3) uint8, whatever its mode; DataError names it.

    side: px; a photo whose shortest side is larger is reduced to that.
    """
    raw, name = b"", name or file
    try:
        raw = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            if side and min(image.size) > side:  # a JPEG decodes to 1/2, 1/4 or 1/8 at once, no smaller than this
                image.draft(None, reduced(image.size, side))
            image.load()
            image = to_rgb(ImageOps.exif_transpose(image))
            if side and min(image.size) > side:
                image = image.resize(reduced(image.size, side), Image.BICUBIC)
            return np.array(image)
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist: name a photo that is there") from error
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a damaged file
        if raw[4:8] == b"ftyp" or Path(str(name)).suffix.lower() in UNREAD:  # whatever a phone calls it
            raise DataError(f"{name} is in a format that is not read here (HEIC, AVIF): convert it to JPEG") from error
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it holds no picture" if raw else "it is empty"
        raise DataError(f"{name} cannot be read as a photo ({reason}): replace or remove it") from error


def reduced(size, side):
    """A (width, height) of the same aspect whose shortest side is `side`."""
    return tuple(round(length * side / min(size)) for length in size)


def to_rgb(image):
    """An image of any mode in RGB, 8 bits a channel, white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.nan_to_num(np.asarray(image, np.float64))
        if image.mode == "F":
            white = 255 if levels.max() > 1 else 1
        else:  # of 32 bits, 8 or 16 are used
            white = 255 if image.mode == "I" and levels.max() <= 255 else 65535
        image = Image.fromarray((levels * 255 / white).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_all(paths, side):
    """Yields of each photo, in order, the future of (pixels, digest), whose result() may raise DataError or OSError.
    A thread per core decodes, as Pillow lets go of the interpreter; no more than a few photos wait in memory."""

    def read(path):
        raw = Path(path).read_bytes()
        return decode(io.BytesIO(raw), path, side), hashlib.blake2b(raw, digest_size=8).hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting = deque()
        for path in paths:
            waiting.append(threads.submit(read, path))
            if len(waiting) > 4 * os.cpu_count():
                yield waiting.popleft()
        yield from waiting


def pixels_path(folder, split):
    """The file of a split's pixels: in the folder of the photos, or in ./data where that one is read-only."""
    folder = Path(folder)
    if os.access(folder, os.W_OK):
        return folder / f"{split}.pixels"
    folder, cache = folder.resolve(), Path("data")
    cache.mkdir(exist_ok=True)
    return cache / f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}-{split}.pixels"


def pack(folder, split, paths, classes, settings):
    """Decode the photos `paths` into one file: all pixels, an index in JSON, the length of the index in 8 bytes.
    settings: the key, side and skip_bad that the index keeps. Returns the index."""
    index = {**settings, "pixels": 0, "sizes": [], "labels": [], "names": [], "digests": [], "bad": []}
    label_of, started = {name: label for label, name in enumerate(classes)}, time.time()
    decoded = zip(paths, decode_all(paths, settings["side"]), strict=True)
    with atomic(pixels_path(folder, split)) as file:
        for done, (path, future) in enumerate(decoded, 1):
            try:
                image, digest = future.result()
            except (DataError, OSError) as error:
                if not settings["skip_bad"]:
                    raise DataError(f"{error}, or leave such files out: python data.py {folder} --skip-bad") from error
                index["bad"].append(path)
                continue
            finally:
                progress(f"decoding {folder}, {split}:", done, len(paths), started, "photos")
            file.write(image.data)
            *_, name, photo = Path(path).parts
            index["pixels"] += image.shape[0] * image.shape[1]
            index["sizes"].append(image.shape[:2])
            index["labels"].append(label_of[name])
            index["names"].append(f"{name}/{photo}")
            index["digests"].append(digest)
        lost = {Path(path).parent.name for path in index["bad"]} - {classes[label] for label in index["labels"]}
        if lost:
            raise DataError(f"{folder}, {split}: {first_names(lost)} without a single readable photo: replace some")
        text = json.dumps(index).encode()
        file.write(text + len(text).to_bytes(8, "little"))
    return index


def read_index(folder, split):
    """The index at the end of a split's file of pixels; {} where there is none that fits."""
    try:
        with open(pixels_path(folder, split), "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(end - length)
            index = json.loads(file.read(length))
        complete = index.keys() >= {"key", "side", "sizes", "labels", "names", "digests", "bad"}
        return index if complete and index["pixels"] * 3 + length == end else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def load(folder, split, skip_bad=False, side=None):
    """The `split` ("train" or "val") of a folder that `prepare` returned, as `Photos`, decoding it if nobody has yet.

    The pixels lie in one file (see `pixels_path`), made anew when a photo has been added, removed or changed.
    skip_bad: a damaged photo is left out and counted, else it raises DataError. side: px, the shortest side that
    larger photos are reduced to. Both are stored with the pixels; without them, what is stored holds.
    """
    folder, packed = Path(folder), pixels_path(folder, split)
    photos, classes, _ = check(folder)
    statuses = [os.stat(path) for path in photos[split]]
    files = [(f"{os.sep}{Path(path).relative_to(folder)}", status.st_size, status.st_mtime_ns)
             for path, status in zip(photos[split], statuses, strict=True)]
    key = hashlib.sha256(repr([classes, files]).encode()).hexdigest()
    with lock(packed):
        index, other = read_index(folder, split), read_index(folder, "val" if split == "train" else "train")
        if not side and index and other and index["side"] != other["side"]:
            raise DataError(f"{folder}: the photos of train and val are stored at different sizes: "
                            f"python data.py {folder} --side {max(index['side'], other['side'])}")
        stored = index or other  # one of them may be lost
        wanted = {"key": key, "side": side or stored.get("side", SHORT_SIDE)} | ({"skip_bad": True} if skip_bad else {})
        skip_bad = skip_bad or stored.get("skip_bad", False)
        if not wanted.items() <= index.items():
            try:
                index = pack(folder, split, photos[split], classes, {**wanted, "skip_bad": skip_bad})
            except PermissionError as error:  # Windows replaces no file that is mapped, by another process perhaps
                index = read_index(folder, split)
                if not wanted.items() <= index.items():
                    raise DataError(f"{packed} cannot be replaced ({error.strerror}): end what uses it") from error
    if index["bad"]:
        print(f"{folder}, {split}: {len(index['bad'])} damaged photos left out, {index['bad'][0]}...", file=sys.stderr)
    pixels = torch.from_numpy(np.memmap(packed, np.uint8, "c", shape=(index["pixels"], 3)))  # "c": never written back
    height, width = torch.tensor(index["sizes"]).T.contiguous()
    shown = [unicodedata.normalize("NFC", WORDS.get(name, name)) for name in classes]  # Macs write accents apart
    return Photos(pixels, first_pixels(height, width), height, width, torch.tensor(index["labels"]), index["names"],
                  shown if len(set(shown)) == len(shown) else classes, index["digests"])


# ---------------------------------------------------------------- what a folder holds


def scan(folder):
    """{class folder: [path of a photo, ...]}, both sorted, and the suffixes of what lies there and is no photo."""
    classes, skipped = {}, []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith((".", "__MACOSX")) or not os.path.isdir(entry.path):  # which a link that loops is not
            continue
        photos = classes[entry.name] = []
        for file in os.scandir(entry.path):
            suffix = os.path.splitext(file.name)[1].lower()
            is_photo = suffix in SUFFIXES and not file.name.startswith(".") and os.path.isfile(file.path)
            photos.append(file.path) if is_photo else skipped.append(suffix)
        photos.sort()
    return classes, skipped


def set_aside(paths):
    """The photos of a class: those to train on, those to validate on. A hash of "class/name" decides, so that photos
    that are added move no other across, but where a class is so small that its one val photo had to be chosen."""

    def share(path):
        name = "/".join(Path(path).parts[-2:])
        return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") / 2**64

    if len(paths) < 2:
        raise DataError(f"{Path(paths[0]).parent} holds one photo: a class needs two where there is no val/")
    ranked = sorted(paths, key=share)
    count = min(max(1, sum(share(path) < VAL_SHARE for path in paths)), len(paths) - 1)
    return sorted(ranked[count:]), sorted(ranked[:count])


def check(folder):
    """What a folder of photos holds: ({split: [path, ...]}, [class folder, ...], [remark, ...]), in sorted order.

    train/<class>/ beside val/<class>/ (or valid/, validation/, test/); or train/<class>/ or <class>/ alone, of
    which a share is set aside for "val". Raises DataError where that is not so.
    """
    folder, remarks = Path(folder), []
    folders = [p for p in folder.iterdir() if os.path.isdir(p)] if folder.is_dir() else []
    inside = {p.name.lower(): p for p in folders}
    if twice := [name for name in ("train", *VAL_NAMES) if sum(p.name.lower() == name for p in folders) > 1]:
        raise DataError(f"{folder} holds two folders called {twice[0]}, in capitals or not: rename or join them")
    train_folder = inside.get("train", folder)
    val_folder = next((inside[name] for name in VAL_NAMES if name in inside), None)
    if val_folder and train_folder == folder:
        raise DataError(f"{folder / 'train'} is missing, beside {val_folder.name}/: it holds a folder for each class")
    train, skipped = scan(train_folder) if inside else ({}, [])
    val, skipped_in_val = scan(val_folder) if val_folder else ({}, [])
    skipped += skipped_in_val
    unread = [suffix for suffix in skipped if suffix in UNREAD]
    hint = f" ({len(unread)} of them {first_names(set(unread))}: convert them to JPEG)" if unread else ""

    if len(train) < 2:
        raise DataError(f"{train_folder} holds {len(train)} class folders: two or more are needed, each with the "
                        "photos of a class; `python data.py` downloads ImageNette")
    if empty := [name for name in train if not train[name]]:
        raise DataError(f"{train_folder / empty[0]} holds no photo that can be read here{hint}: every class needs one")
    if unknown := [name for name in val if name not in train]:
        raise DataError(f"{val_folder / unknown[0]} is a class that {train_folder} lacks: add its photos there, or "
                        "remove it")
    if any(val.values()):
        if val_folder.name != "val":
            remarks.append(f"{val_folder.name}/ is used to validate on")
        if lacking := [name for name in train if not val.get(name)]:
            remarks.append(f"no val photos of {len(lacking)} classes ({first_names(lacking)})")
    else:
        for name, paths in train.items():
            train[name], val[name] = set_aside(paths)
        remarks.append(f"{sum(map(len, val.values())):,} photos, about {VAL_SHARE:.0%} of each class, one at least, "
                       "set aside to validate on, as there is no val/ with photos")
    if skipped:
        remarks.append(f"{len(skipped):,} entries that are no photos skipped{hint}")
    splits = {"train": [path for name in train for path in train[name]],
              "val": [path for name in train for path in val.get(name, ())]}
    return splits, list(train), remarks


def prepare(source=None, root="data"):
    """The checked folder of photos that `source` stands for; does nothing, fast, when it is there already.

    source: a folder; an archive, unpacked under `root`; or None, the public ImageNette, downloaded there.
    Raises DataError with a sentence for the user.
    """
    if "" in (source, root):  # of a variable that is not set, perhaps; as a path it would be the working folder
        raise DataError("the name of the data, or of the folder to unpack them in, is empty: name one, or leave it out "
                        "(DATA=, --data, --root)")
    root = Path(os.path.expanduser(root))  # which leaves ~name as it is where nobody is called so
    folder = root / "imagenette2-160" if source is None else Path(os.path.expanduser(source))
    if source is None and not folder.exists():
        folder = root / Path(URL).name
        root.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            if not folder.exists():
                download(URL, folder, ARCHIVE_BYTES, ARCHIVE_MD5)
    if folder.is_file():
        folder = unpacked(folder, root)
    if not folder.exists():
        raise DataError(f"{folder} does not exist: `python data.py` downloads ImageNette, or name a folder or an "
                        "archive that is there (DATA= for make, --data for the scripts)")
    photos, classes, remarks = check(folder)
    counts = {split: len(paths) for split, paths in photos.items()}
    if classes == list(CLASSES) and counts != COUNTS:
        remarks.insert(0, f"the public ImageNette has {COUNTS['train']:,} and {COUNTS['val']:,}")
    counted = f"{counts['train']:,} train and {counts['val']:,} val photos of {len(classes):,} classes"
    for line in (counted, *remarks):
        print(f"{folder}: {line}", file=sys.stderr)
    return folder


# ---------------------------------------------------------------- archives


def download(url, target, size, md5, tries=6, timeout=30):
    """Fetch `url` into `target`, going on from `target`.part where an earlier try stopped.

    Server errors, stalls (`timeout` seconds without a byte) and broken connections are tried again, each
    time after a longer wait. `target` appears whole and verified, or not at all.
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
                    while have <= size and (chunk := reply.read1(1 << 18)):
                        file.write(chunk)
                        have += len(chunk)
                        progress(f"{target.name}:", (have - before) / 1e6, (size - before) / 1e6, started, "MB")
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as failure:
            error, status = failure, getattr(failure, "code", 500)
            if status < 500 and status != 429:
                raise DataError(f"{url} answers {status} ({failure.reason}): get the archive elsewhere and name it "
                                "with DATA=path/to/imagenette2-160.tgz") from failure
    if have < size:
        reason = getattr(error, "reason", error) or "it ends early"
        raise DataError(f"cannot download {url} ({reason}; {have:,} of {size:,} bytes are kept for the next try): "
                        "check the network, or name an archive or a folder that is there already with DATA=")
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if have != size or digest != md5:
        part.unlink()
        raise DataError(f"{url} gave {have:,} bytes with md5 {digest}, not {size:,} with {md5}: removed, try again")
    os.replace(part, target)


def members(archive):
    """All that a .zip or a .tar, compressed or not, holds: (name, bytes, whether it is a file or folder and no link or
    device, open file)."""
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for info in tar:
                plain = info.isfile() or info.isdir()
                yield info.name, info.size, plain, tar.extractfile(info) if info.isfile() else None
            # To tarfile, damage looks like the end. Zeros must follow, and behind them lies the checksum of a .tgz.
            padding = [block.strip(b"\0") for block in iter(lambda: tar.fileobj.read(1 << 16), b"")]
            if not padding or any(padding):
                raise EOFError("its last part is missing")
    else:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                name = info.filename
                if not info.flag_bits & 0x800:  # said to be of DOS; zip on Linux and Macs writes UTF-8 all the same
                    with contextlib.suppress(UnicodeError):
                        name = name.encode("cp437").decode()
                yield name, info.file_size, plain, None if info.is_dir() else file.open(info)


def unpack(archive, folder):
    """Write all files of an archive below `folder`; returns how many. What could do harm raises DataError."""
    count, size, room = 0, 0, shutil.disk_usage(folder).free - SPARE_BYTES
    for name, length, plain, file in members(archive):
        path = PureWindowsPath(name)  # knows both slashes, and drives
        count, size = count + 1, size + length
        if count > MAX_FILES or size > room:
            raise DataError(f"{archive} holds more than fits here ({MAX_FILES:,} files, {max(room, 0):,} bytes): "
                            "not unpacked; make room on the disk")
        if not plain:
            raise DataError(f"{archive} holds a link or a device ({name}): not unpacked")
        if path.anchor or ".." in path.parts:
            raise DataError(f"{archive} would write outside its folder ({name}): not unpacked")
        if "__MACOSX" in path.parts:  # a Mac's notes on each file
            continue
        target = folder.joinpath(*path.parts)
        (target.parent if file else target).mkdir(parents=True, exist_ok=True)
        if file:
            with file, open(target, "wb") as copy:
                shutil.copyfileobj(file, copy)
                if copy.tell() != length:
                    raise EOFError(f"{name} ends early")
    return count


def unpacked(archive, root):
    """The folder under `root` with the photos of `archive`, unpacked if nobody has yet."""
    name = re.sub(r"\.(tgz|tar|zip|tar\.\w+)$", "", archive.name, flags=re.IGNORECASE)
    folder = root / (name if name != archive.name else f"{name}-unpacked")
    stamp, status = folder / STAMP, archive.stat()
    identity = json.dumps({"name": archive.name, "bytes": status.st_size, "mtime": status.st_mtime_ns})
    root.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        if folder.exists() and not stamp.exists():
            raise DataError(f"{folder} exists and did not come from {archive}: use it (DATA={folder}), or move it away")
        if not folder.exists() or stamp.read_text() != identity:
            extract(archive, folder, identity)
    return folder


def extract(archive, folder, stamp):
    """Unpack an archive, its top folder becoming `folder`, with the text `stamp` in it; all of it or nothing."""
    temporary, started = Path(f"{folder}.{os.getpid()}.part"), time.time()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        files = unpack(archive, temporary)
        inside = [temporary]
        while len(inside) == 1 and inside[0].name.lower() != "train":  # a folder around all the others
            top = inside[0]
            inside = [p for p in top.iterdir() if p.is_dir() and not p.name.startswith(".")]
        try:
            check(top)
        except DataError as error:
            raise DataError(f"{archive} cannot be used: {str(error).replace(str(top), folder.name)}") from error
        (top / STAMP).write_text(stamp)
        if folder.exists():  # of an earlier archive; perhaps somebody has put something into it
            before = Path(f"{folder}.before")
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
            print(f"{folder} came from another {archive.name}: it is kept as {before}", file=sys.stderr)
        os.replace(top, folder)
    except DataError:
        raise
    except Exception as error:  # zipfile, tarfile and what they read with raise nearly every type on a damaged file
        damage = (IsADirectoryError, NotADirectoryError, FileExistsError)  # a file in a file
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL) and not isinstance(error, damage):
            raise  # of the disk, not of the archive
        raise DataError(f"{archive} is cut short, damaged or no .tgz, .tar or .zip ({error}): get it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{folder}: {files:,} entries unpacked in {time.time() - started:.1f} s", file=sys.stderr)


def main():
    """The command line: prepare the photos and decode them."""
    parser = argparse.ArgumentParser(description="Photos in class folders: get them, check them, decode them once.")
    add = parser.add_argument
    add("source", nargs="?", help="a folder, or a .tgz, .tar or .zip; without it, ImageNette is downloaded")
    add("--root", default="data", help="where archives are unpacked (default: data)")
    add("--skip-bad", action="store_true", help="leave damaged photos out, count them, and remember it")
    add("--side", type=int, help="shortest side, in pixels, that larger photos are reduced to (default: what is "
                                 f"stored, or {SHORT_SIDE})")
    options = parser.parse_args()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a name that this terminal has no letters for
    if options.side is not None and options.side < 1:
        parser.error(f"--side {options.side}: a photo has one pixel at least")
    try:
        folder, photos = prepare(options.source, options.root), {}
        for split in COUNTS:
            photos[split] = load(folder, split, options.skip_bad, options.side)
            size = photos[split].pixels.numel() / 1e6
            print(f"{pixels_path(folder, split)}: {len(photos[split]):,} photos, {size:,.0f} MB")
        if count := shared(**photos):
            print(f"{folder}: {count:,} val photos are in train too, byte for byte", file=sys.stderr)
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
