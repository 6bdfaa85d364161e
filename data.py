"""Photos decoded once, and batches made from them.

    photos = data.load("data/imagenette2-160", "train")          # of train/<class>/*.JPEG
    for images, labels in data.train_batches(photos, 64, 128):   # crops of 64 px, 128 at a time
        ...                                     # (B, 3, 64, 64) float32, normalised; (B,) int64

All photos lie in one file of uint8 pixels, which is memory-mapped; cropping, resizing and
mirroring a whole batch is two matrix products (`resample`). This file works alone; beside
folders.py it is a command, too:

    python data.py                      ImageNette-160: download (99 MB), unpack, decode
    python data.py path [--side 320]    a folder, .tgz, .tar or .zip; stored at 320 px, not 256
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import copy
import hashlib
import io
import json
import math
import unicodedata
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

CLASSES = {  # ImageNette's class folders (WordNet ids) -> shown names
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
}
WORDS = CLASSES | {  # and Imagewoof's; all others are shown by their folder's name
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
    "n02089973": "English foxhound", "n02093754": "Border terrier",
    "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in 0..1
CROP_AREA = 0.25  # the least share of a photo in a crop, where none is given (train.py gives one)
CROP_RATIO = 4 / 3  # of a crop's sides, at most
COLOURS = 0.3  # how far `random_colours` goes
MAX_BATCH = 2**25  # pixels that are resampled at a time, padding included: 0.4 GB in float32
SHORT_SIDE = 256  # px, the shortest side that larger photos are reduced to
MAX_PIXELS = 100_000_000  # of one photo
SUFFIXES = {f".{kind}" for kind in "jpeg jpg jfif png bmp gif tif tiff webp ppm pgm".split()}
UNREAD = {f".{kind}" for kind in "heic heif avif jxl jp2 dng cr2 cr3 nef arw".split()}  # photos too
HIDDEN = (".", "__MACOSX")  # what such names begin with
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # not EPS: Pillow would run it


# ---------------------------------------------------------------- photos


@dataclass
class Photos:
    """The photos of one split, decoded: plain tensors, one entry of each per photo."""

    pixels: torch.Tensor  # (all pixels, 3) uint8, photo after photo, row after row
    start: torch.Tensor  # (N,) int64, where in `pixels` a photo begins; on the CPU, as all below
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
        """The photos of `index`, (N',) int64, or (N,) bool; the pixels are shared."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        chosen = index.tolist()
        return replace(self, start=self.start[index], height=self.height[index],
                       width=self.width[index], labels=self.labels[index],
                       names=[self.names[i] for i in chosen],
                       digests=[self.digests[i] for i in chosen] if self.digests else ())

    def relabelled(self, classes):
        """The photos with labels in the order of `classes`, a list of shown names.
        Raises ValueError where these are not the photos' own."""
        ours, theirs = set(self.classes) - set(classes), set(classes) - set(self.classes)
        if ours or theirs:
            raise ValueError("the photos are of other classes than the network's (the photos' "
                             f"alone: {first_names(ours)}; the network's alone: "
                             f"{first_names(theirs)}): name the data that it was trained on")
        order = torch.tensor([list(classes).index(name) for name in self.classes])
        return replace(self, labels=order[self.labels], classes=list(classes))

    def to(self, device):
        """The photos with batches on `device`. The pixels move there if they fit: into half of
        CUDA's free memory, or the 4 GiB of one tensor on MPS; else crops are made on the CPU."""
        device = torch.device(device)
        room = (torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda"
                else 2**32 if device.type == "mps" else math.inf)
        pixels = self.pixels.to(device) if self.pixels.numel() < room else self.pixels
        return replace(self, pixels=pixels, device=device)


def first_pixels(height, width):
    """Where each photo begins in the pixels of all: (N,) int64."""
    return torch.cumsum(height * width, 0) - height * width


def from_arrays(images, labels=None):
    """Photos of uint8 tensors or arrays (H, W, 3), or of PIL images, of any sizes; label 0 unless
    given, classes called by their numbers. Raises ValueError: other shapes, types, or labels."""
    images = [to_rgb(upright(image)) if isinstance(image, Image.Image) else image
              for image in images]
    images = [torch.as_tensor(image if torch.is_tensor(image) else np.array(image))
              for image in images]
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
            raise ValueError(f"photo {i} is {tuple(image.shape)} of {image.dtype}: give (H, W, 3) "
                             "of uint8 in RGB")
    if not images:
        raise ValueError("there is no photo among the images: give at least one")
    height, width = (torch.tensor([image.shape[d] for image in images]) for d in (0, 1))
    labels = torch.zeros_like(height) if labels is None else torch.as_tensor(labels).cpu()
    if labels.shape != height.shape or labels.is_floating_point() or labels.min() < 0:
        raise ValueError(f"{len(images)} photos need as many labels, whole numbers from 0 on")
    pixels = torch.cat([image.reshape(-1, 3) for image in images])
    return Photos(pixels, first_pixels(height, width), height, width, labels.long(),
                  [str(i) for i in range(len(images))],
                  [str(i) for i in range(int(labels.max()) + 1)])


def first_names(names, count=5):
    """The first few of many names, for a sentence."""
    return ", ".join(sorted(names)[:count]) + ", ..." * (len(names) > count) or "none"


# ---------------------------------------------------------------- batches
# Resizing is linear along each axis: a product of matrices for the rows, one for the columns.


def filter_weights(start, length, size, n, limit):
    """How much each of n pixels of a line adds to each of `size` output pixels: (B, size, n).

    start, length: (B,) the piece that is resampled, in pixels; limit: (B,) where the photo ends.
    The triangle filter of Pillow's BILINEAR, widened when shrinking so that no pixel is skipped."""
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
    """A tensor of the CPU on `device`. On CUDA nothing waits for the copy: a batch is made while
    the device still computes the one before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def sliced(photos, index, vertical, horizontal, size):
    """A piece of each photo, padded with zeros: (B, h, w, 3) uint8, `size` = (h, w).

    vertical, horizontal: first pixel and number of pixels, (B,) each. One photo after another:
    on a CPU that is fastest.
    """
    pieces = torch.zeros(len(index), *size, 3, dtype=torch.uint8, device=photos.pixels.device)
    places = torch.stack([index, *vertical, *horizontal], 1).tolist()
    for piece, (photo, top, rows, left, columns) in zip(pieces, places, strict=True):
        piece[:rows, :columns] = photos[photo][top : top + rows, left : left + columns]
    return pieces


def gathered(photos, index, vertical, horizontal, size):
    """As `sliced`, for all photos at once, which on a GPU is fastest; padded with the last pixels,
    which `filter_weights` do not count."""
    device = photos.pixels.device
    places = torch.stack([photos.start[index], photos.width[index], *vertical, *horizontal])
    start, width, top, rows, left, columns = send(places, device)[..., None, None]  # (B, 1, 1)
    y = top + torch.arange(size[0], device=device)[:, None].minimum(rows - 1)  # (B, h, 1)
    x = left + torch.arange(size[1], device=device).minimum(columns - 1)  # (B, 1, w)
    return photos.pixels[start + y * width + x]


def resample(photos, index, boxes, size, flip=None, dtype=torch.float32):
    """Cut boxes out of photos, resize and normalise them: (B, 3, size, size) `dtype`.

    index: (B,) which photos; boxes: (B, 4) float, y, x, height, width in pixels; flip: (B,) bool,
    mirror or not; these three on the CPU. In bfloat16 pixels are off by a quarter of a grey level
    on average."""
    flip = torch.zeros(len(index), dtype=torch.bool) if flip is None else flip
    y, x, height, width = boxes.T
    top, rows = span(y, height, size, photos.height[index])
    left, columns = span(x, width, size, photos.width[index])
    h, w = (32 * math.ceil(int(n.max()) / 32) for n in (rows, columns))  # few different shapes
    if len(index) > 1 and len(index) * h * w > MAX_BATCH:
        halves = zip(index.chunk(2), boxes.chunk(2), flip.chunk(2), strict=True)
        return torch.cat([resample(photos, i, b, size, f, dtype) for i, b, f in halves])
    cut = gathered if photos.pixels.device.type == "cuda" else sliced
    # Photos that do not fit a GPU are cut on the CPU, where half precision may be slow.
    products = dtype if photos.pixels.device.type == photos.device.type else torch.float32
    pieces = cut(photos, index, (top, rows), (left, columns), (h, w)).to(products)
    geometry = torch.stack([y - top, height, rows, x - left, width, columns, flip])  # (7, B)
    along_y, along_x, mirror = send(geometry, pieces.device).split([3, 3, 1])
    weights_y = filter_weights(*along_y[:2], size, h, along_y[2]).to(products)  # (B, size, h)
    weights_x = filter_weights(*along_x[:2], size, w, along_x[2]).to(products)  # (B, size, w)
    weights_x = torch.where(mirror[0, :, None, None] > 0, weights_x.flip(1), weights_x)
    lines = torch.bmm(weights_y, pieces.view(len(index), h, 3 * w)).view(-1, size, w, 3)
    images = torch.einsum("nyxc,nzx->nyzc", lines, weights_x).contiguous()  # (B, size, size, 3)
    mean, std = send(255 * torch.tensor([MEAN, STD]), pieces.device)
    images = send(((images - mean) / std).to(dtype), photos.device).permute(0, 3, 1, 2)
    # Channels-last in memory, except on MPS, where gradients are wrong then: pytorch#175189.
    return images.contiguous() if photos.device.type == "mps" else images


def random_boxes(photos, index, generator=None, area=CROP_AREA):
    """Boxes (B, 4) of random resized crops (Szegedy et al. 2015): a share `area` to 1 of each
    photo, anywhere in it, width : height between 1/CROP_RATIO and CROP_RATIO; sides longer than the
    photo are cut to it."""
    height, width = photos.height[index].float(), photos.width[index].float()
    u, v, y, x = torch.rand(4, len(index), generator=generator)
    pixels = (area + (1 - area) * u) * height * width
    aspect = CROP_RATIO ** (2 * v - 1)
    h = torch.minimum((pixels / aspect).sqrt(), height)
    w = torch.minimum((pixels * aspect).sqrt(), width)
    return torch.stack([y * (height - h), x * (width - w), h, w], 1)


def plain_boxes(photos, index, size, generator=None):
    """Boxes (B, 4) of random crops at the photo's own scale: size x size whole pixels."""
    small = (torch.minimum(photos.height, photos.width) < size).nonzero()
    if len(small):
        i = int(small[0])
        raise ValueError(f"{photos.names[i]} has {int(photos.width[i])} x {int(photos.height[i])} "
                         f"pixels, fewer than the {size} x {size} crop: use a smaller --crop, or "
                         "leave --plain-crop out")
    y, x = torch.rand(2, len(index), generator=generator)
    room_y, room_x = photos.height[index] - size, photos.width[index] - size
    top = (y * (room_y + 1)).floor().minimum(room_y)
    left = (x * (room_x + 1)).floor().minimum(room_x)
    side = torch.full_like(y, size)
    return torch.stack([top, left, side, side], 1)


def random_colours(count, generator=None):
    """(count, 3) for `recolour`: saturation, contrast, brightness, up to COLOURS more or less."""
    return COLOURS * (2 * torch.rand(count, 3, generator=generator) - 1)


def recolour(images, colours):
    """Normalised images (B, 3, H, W) in another light. colours (B, 3): how much more saturation
    and contrast, as shares, and brightness, in standard deviations of the data."""
    colours = send(colours.to(images.dtype), images.device)
    saturation, contrast, brightness = colours.T[:, :, None, None, None]
    grey = images.mean(1, keepdim=True)
    return (images + saturation * (images - grey)) * (1 + contrast) + brightness


@dataclass
class Batches:
    """`count` batches that `one_pass()` makes, anew in each pass over them."""

    one_pass: Callable
    count: int

    def __iter__(self):
        return self.one_pass()

    def __len__(self):
        return self.count


def batch_count(count, batch_size):
    """How many batches `count` photos make. A last one of less than half the size joins the one
    before: a handful is too few for batch normalisation."""
    return max(1, (count + batch_size // 2) // batch_size)


def shuffled(count, batch_size, generator=None):
    """The numbers 0 to count - 1 in random order, as `batch_count` batches."""
    cuts = range(batch_size, batch_size * batch_count(count, batch_size), batch_size)
    return torch.randperm(count, generator=generator).tensor_split(list(cuts))


def train_batches(photos, size, batch_size, generator=None, area=CROP_AREA, plain=False,
                  part=(0, 1), dtype=torch.float32):
    """An epoch: every photo once, shuffled, randomly cropped, mirrored and coloured.

    Each batch is images (B, 3, size, size) `dtype`, normalised, and labels (B,) int64, both on
    `photos.device`. generator: of the CPU; torch's global one if None. area: the least share of a
    photo in a crop. plain: a size x size piece of the photo as it is, mirrored or not.
    part (i, n): the i-th of n parts of every batch, for n processes side by side."""

    def one_pass():
        """Every photo once, in a new order."""
        own = slice(part[0], None, part[1])
        for index in shuffled(len(photos), batch_size, generator):
            # Numbers are drawn for the whole batch, as several processes must draw alike.
            boxes = (plain_boxes(photos, index, size, generator) if plain
                     else random_boxes(photos, index, generator, area))
            flip = torch.rand(len(index), generator=generator) < 0.5
            colours = random_colours(len(index), generator)
            images = resample(photos, index[own], boxes[own], size, flip[own], dtype)
            images = images if plain else recolour(images, colours[own])
            yield images, send(photos.labels[index[own]], photos.device)

    return Batches(one_pass, batch_count(len(photos), batch_size))


def eval_batches(photos, size, batch_size):
    """All photos in order, as batches like those of `train_batches`. Each whole frame is resized to
    size x size, and nothing is cut off."""

    def one_pass():
        """Every photo once, in order."""
        for index in torch.arange(len(photos)).split(batch_size):
            zero = torch.zeros(len(index))
            boxes = torch.stack([zero, zero, photos.height[index], photos.width[index]], 1)
            images = resample(photos, index, boxes, size)
            yield images, send(photos.labels[index], photos.device)

    return Batches(one_pass, math.ceil(len(photos) / batch_size))


# ---------------------------------------------------------------- decoding, once


def decode(file, name=None, side=None):
    """A photo (path or open file) as upright RGB, (H, W, 3) uint8, whatever its mode.
    side: px; a larger shortest side is reduced to that. Raises ValueError that names the photo."""
    raw, name = b"", name or file
    Image.MAX_IMAGE_PIXELS = None  # Pillow warns at 89 million; MAX_PIXELS is an error
    try:
        raw = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise ValueError(f"{w} x {h} pixels are more than {MAX_PIXELS:,}")
            if side and min(image.size) > side:
                image.draft(None, reduced(image.size, side))  # JPEG: to 1/2, 1/4 or 1/8 at once
            image.load()
            image = to_rgb(upright(image))
            if side and min(image.size) > side:
                image = image.resize(reduced(image.size, side), Image.BICUBIC)
            return np.array(image)
    except MemoryError:  # says nothing of the photo
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist: name a photo that is there") from error
    except PermissionError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}): make it readable") from error
    except Exception as error:  # Pillow raises nearly every type there is on a damaged file
        if raw[4:8] == b"ftyp" or Path(str(name)).suffix.lower() in UNREAD:  # under any suffix
            raise ValueError(f"{name} is in a format that is not read here: convert it to "
                             "JPEG") from error
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it holds no picture" if raw else "it is empty"
        raise ValueError(f"{name} cannot be read as a photo ({reason}): replace or remove "
                         "it") from error


def reduced(size, side):
    """A (width, height) of the same aspect whose shortest side is `side`."""
    return tuple(round(length * side / min(size)) for length in size)


def upright(image):
    """A PIL image turned as its EXIF block says, of which nothing else is read."""
    Turn = Image.Transpose
    turns = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM,
             5: Turn.TRANSPOSE, 6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # a damaged block raises nearly every type there is, and says nothing
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """A PIL image of any mode in RGB, 8 bits a channel, white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.nan_to_num(np.asarray(image, np.float64))
        low, high = (1, 255) if image.mode == "F" else (255, 65535)  # I: values of 8 or 16 bits
        white = low if levels.max() <= low else high
        image = Image.fromarray((levels * 255 / white).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_photo(path, side):
    """The pixels of a photo (H, W, 3), and a digest of its file; or (the error, "")."""
    try:
        raw = Path(path).read_bytes()
        return (decode(io.BytesIO(raw), path, side),
                hashlib.blake2b(raw, digest_size=8).hexdigest())
    except (FileNotFoundError, PermissionError) as error:
        return ValueError(f"{path} cannot be read ({error.strerror}): replace or remove it"), ""
    except (ValueError, OSError, MemoryError) as error:
        return error, ""


def decode_all(paths, side):
    """Yields, in order, `read_photo` of each path, computed on all cores; few wait in memory."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting = deque()
        for path in paths:
            waiting.append(threads.submit(read_photo, path, side))
            if len(waiting) > 4 * os.cpu_count():
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


EMPTY_INDEX = {"key": "", "side": SHORT_SIDE, "skip_bad": False, "pixels": 0, "sizes": [],
               "labels": [], "names": [], "digests": [], "bad": []}


def pack(file, paths, names, labels, side=SHORT_SIDE, skip_bad=False, key="", watch=iter,
         decode_all=decode_all):
    """Decode photos into an open binary file: all pixels, an index in JSON, its length in 8 bytes.
    Returns the index. watch: wraps the loop, to show how far it is. Raises ValueError at a photo
    that cannot be decoded; skip_bad: it is left out, and its path goes to index["bad"].
    decode_all: what decodes them, by threads unless another is given."""
    index = copy.deepcopy(EMPTY_INDEX) | {"key": key, "side": side, "skip_bad": skip_bad}
    with closing(decode_all(paths, side)) as decoded:
        photos = zip(paths, names, labels, decoded, strict=True)
        for path, name, label, (image, digest) in watch(photos):
            if isinstance(image, ValueError):
                if not skip_bad:
                    raise image
                index["bad"].append(str(path))
                continue
            if isinstance(image, Exception):  # what the machine lacks is no damage of the photo
                raise image
            file.write(image.data)
            index["pixels"] += image.shape[0] * image.shape[1]
            index["sizes"].append(image.shape[:2])
            index["labels"].append(label)
            index["names"].append(name)
            index["digests"].append(digest)
    text = json.dumps(index).encode()
    file.write(text + len(text).to_bytes(8, "little"))
    return index


def read_index(path):
    """The index at the end of a packed file; {} where there is none that fits."""
    try:
        with open(path, "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(end - length)
            index = json.loads(file.read(length))
        complete = index.keys() == EMPTY_INDEX.keys() and index["pixels"] * 3 + length == end
        return index if complete else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def map_photos(path, index, classes):
    """The photos of a packed file, memory-mapped. classes: their folders, in the labels' order."""
    shape = index["pixels"], 3
    pixels = torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))  # never written back
    height, width = torch.tensor(index["sizes"]).T.contiguous()
    shown = [unicodedata.normalize("NFC", WORDS.get(name, name)) for name in classes]
    if len(set(shown)) < len(shown):  # a folder is called as another is shown
        shown = list(classes)
    return Photos(pixels, first_pixels(height, width), height, width,
                  torch.tensor(index["labels"]), index["names"], shown, index["digests"])


# ---------------------------------------------------------------- folders of classes


def class_folders(folder):
    """{class: {name: path}} of the photos anywhere below folder/<class>/, in torchvision's order,
    and a list of what is no photo. Names are relative to `folder`: "n01440764/a.JPEG"."""
    classes, others, start = {}, [], len(os.path.join(folder, ""))
    for label in sorted(subfolders(folder)):
        classes[label] = {}
        for place, inside, files in sorted(os.walk(os.path.join(folder, label), onerror=fail)):
            linked = (os.path.join(place, name) for name in inside)  # not followed: they may loop
            others += [path for path in linked if os.path.islink(path)]
            for path in (os.path.join(place, file) for file in sorted(files)):
                name = path[start:].replace(os.sep, "/")
                hidden = any(part.startswith(HIDDEN) for part in name.split("/"))
                if is_photo(path) and not hidden and os.path.isfile(path):
                    classes[label][name] = path
                else:
                    others.append(path)
    return classes, others


def fail(error):
    """Raise the OSError that os.walk would pass over."""
    raise error


def subfolders(folder):
    """The names of the visible folders in a folder."""
    return [entry.name for entry in os.scandir(folder) if not entry.name.startswith(HIDDEN)
            and (entry.is_dir(follow_symlinks=False) or os.path.isdir(entry.path))]


def is_photo(path):
    return os.path.splitext(path)[1].lower() in SUFFIXES


def key_of(folder, paths, classes):
    """A hash that changes when a photo of the folder is added, removed or changed."""
    files = [(f"{os.sep}{Path(path).relative_to(folder)}", status.st_size, status.st_mtime_ns)
             for path, status in ((path, os.stat(path)) for path in paths)]
    return hashlib.sha256(repr([list(classes), files]).encode()).hexdigest()


def load(folder, split="train", side=None):
    """The photos of folder/split/<class>/*, decoded once into folder/split.pixels, and anew when
    one was added, removed or changed. side: px, to which a larger shortest side is reduced; None:
    what they are stored with, or SHORT_SIDE. Labels are the class's place among the folders of
    train/, in sorted order."""
    folder = Path(os.path.expanduser(folder))
    packed = folder / f"{split}.pixels"
    classes = list(class_folders(folder / "train")[0])
    photos = {name: path for found in class_folders(folder / split)[0].values()
              for name, path in found.items()}
    if not photos:
        raise ValueError(f"{folder / split} holds no photos in class folders")
    if unknown := {name.split("/")[0] for name in photos} - set(classes):
        raise ValueError(f"{folder / split} has classes that train/ lacks: {first_names(unknown)}")
    labels = [classes.index(name.split("/")[0]) for name in photos]
    key, index = key_of(folder, photos.values(), classes), read_index(packed)
    side = side or index.get("side", SHORT_SIDE)
    if (index.get("key"), index.get("side")) != (key, side):
        part = Path(f"{packed}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                index = pack(file, photos.values(), photos, labels, side, key=key)
            os.replace(part, packed)
        finally:
            part.unlink(missing_ok=True)
    return map_photos(packed, index, classes)


if __name__ == "__main__":
    try:
        import folders
    except ModuleNotFoundError as error:
        print(f"data.py: {error}: the command needs the packages of requirements.txt, and the "
              "project's files beside it; data.load(folder) works alone", file=sys.stderr)
        sys.exit(2)
    folders.main()
