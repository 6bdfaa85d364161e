"""data.py against Pillow, against torchvision's ImageFolder, and against all that can be wrong with its input."""

import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPO, import_alone, on_fake_cuda, refused, serving
from PIL import Image, ImageFile

import data

TENCH, LAST = "n01440764", "n03888257"
ROUNDING = 1.05  # grey levels: Pillow rounds to uint8 twice, after the columns and after the rows
MEAN, STD = (255 * torch.tensor(v) for v in (data.MEAN, data.STD))


def noise(height, width, seed=0):
    """A photo without two equal pixels to speak of: whatever is shifted, mirrored or mixed up shows."""
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), np.uint8)


def ragged():
    """Photos of four sizes, none square but one."""
    sizes = [(37, 61), (80, 50), (64, 64), (21, 28)]
    return data.from_arrays([noise(*size) for size in sizes], range(len(sizes)))


def plain_colours(count):
    """Photos of one colour each, which tells them apart however they are cropped: photo i is grey level i."""
    return data.from_arrays([torch.full((9 + i % 3, 12, 3), i, dtype=torch.uint8) for i in range(count)], range(count))


def grey_levels(images):
    """A batch (B, 3, h, w) as it was before normalisation: (B, h, w, 3), 0 to 255."""
    return images.permute(0, 2, 3, 1) * STD + MEAN


def batch_of(photos, size=24, seed=0, **options):
    """All photos as one training batch."""
    [batch] = data.train_batches(photos, size, len(photos), torch.Generator().manual_seed(seed), **options)
    return batch


@pytest.fixture
def small(tmp_path):
    """An ImageNette folder of its own for every test: two photos of 14 x 10 pixels and more in each class."""
    folder = tmp_path / "photos" / "small"
    for split in data.COUNTS:
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


def made_in(folder):
    """The names of what data.py left in a folder of photos or of archives, locks aside."""
    names = {p.name for p in Path(folder).iterdir()} if Path(folder).exists() else set()
    return {name for name in names - {"train", "val"} if not name.endswith(".lock")}


def command(monkeypatch, capsys, *arguments):
    """`python data.py ...` without the seconds a new Python takes: (exit status, lines on stderr)."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    status = 0
    try:
        data.main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err.splitlines()


# ---------------------------------------------------------------- photos


@pytest.mark.parametrize("split", ["train", "val"])
def test_loads_what_imagefolder_loads(demo, split):
    photos, reference = data.load(demo, split), torchvision.datasets.ImageFolder(demo / split)
    assert list(data.CLASSES) == reference.classes
    assert [str(demo / split / name) for name in photos.names] == [path for path, _ in reference.samples]
    assert photos.labels.tolist() == reference.targets
    for i, (image, _) in enumerate(reference):
        assert np.array_equal(photos[i], image)


def test_demo_photos_keep_their_aspect(demo):
    photos = data.load(demo, "val")
    assert (photos.height != photos.width).any()
    assert photos.pixels.shape == (int((photos.height * photos.width).sum()), 3) and photos.pixels.dtype == torch.uint8


def test_photos_in_memory_come_as_arrays_of_any_layout():
    photo = noise(6, 4)
    kinds = [photo, torch.from_numpy(photo), Image.fromarray(photo), photo[..., ::-1].copy()[..., ::-1]]
    assert all(np.array_equal(image, photo) for image in data.from_arrays(kinds))


@pytest.mark.parametrize("other", [noise(6, 4)[..., 0], np.zeros((6, 4, 4), np.uint8), noise(6, 4) / 255,
                                   noise(6, 4).transpose(2, 0, 1)])
def test_photos_in_memory_of_another_shape_or_type_are_refused(other):
    with pytest.raises(data.DataError, match="photo 1 is .*uint8 in RGB"):
        data.from_arrays([noise(6, 4), other])


def test_subset_shares_the_pixels():
    photos = ragged()
    some = photos.subset(torch.tensor([2, 0]))
    assert len(some) == 2 and some.names == ["2", "0"] and some.labels.tolist() == [2, 0]
    assert torch.equal(some[1], photos[0]) and some.pixels.data_ptr() == photos.pixels.data_ptr()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def palette():
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
MODES = {  # name: (image, format, options, the RGB values of its first row)
    "grey": (Image.new("L", (2, 1), 77), "PNG", {}, [(77, 77, 77)] * 2),
    "grey JPEG": (Image.new("L", (8, 8), 77), "JPEG", {}, [(77, 77, 77)] * 8),
    "black and white": (Image.new("1", (1, 1), 1), "PNG", {}, [WHITE]),
    "CMYK JPEG": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {"quality": 100}, [RED] * 8),
    "CMYK TIFF": (Image.new("CMYK", (1, 1), (255, 0, 255, 0)), "TIFF", {}, [GREEN]),
    "palette": (palette(), "PNG", {}, [RED, GREEN, BLUE]),
    "palette, one colour transparent": (palette(), "PNG", {"transparency": 1}, [RED, WHITE, BLUE]),
    "palette, half transparent": (palette(), "PNG", {"transparency": b"\xff\x00\x80"}, [RED, WHITE, (127, 127, 255)]),
    "GIF": (palette(), "GIF", {}, [RED, GREEN, BLUE]),
    "GIF, transparent": (palette(), "GIF", {"transparency": 1}, [RED, WHITE, BLUE]),
    "RGBA": (Image.fromarray(np.array([[(9, 8, 7, 255), (9, 8, 7, 0)]], np.uint8)), "PNG", {}, [(9, 8, 7), WHITE]),
    "RGB, one colour transparent": (Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", {"transparency": (9, 8, 7)}, [WHITE]),
    "LA": (Image.fromarray(np.array([[(100, 255), (100, 0)]], np.uint8)), "PNG", {}, [(100,) * 3, WHITE]),
    "16 bits": (Image.fromarray(np.array([[257 * 100, 65535]], np.uint16)), "PNG", {}, [(100,) * 3, WHITE]),
    "32 bits, of 8": (Image.fromarray(np.array([[7, 200]], np.int32)), "TIFF", {}, [(7,) * 3, (200,) * 3]),
    "16 bits TIFF": (Image.fromarray(np.array([[257 * 7]], np.uint16)), "TIFF", {}, [(7,) * 3]),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, kind, options, expected = MODES[mode]
    array = data.decode(encoded(image, kind, **options))
    assert array.shape == (image.height, image.width, 3) and array.dtype == np.uint8
    assert np.abs(array[0].astype(int) - expected).max() <= (3 if kind == "JPEG" else 0)


# How a camera stores an upright photo (EXIF tag 274): what was turned one way is to be shown turned the other.
STORED = {1: lambda u: u, 2: np.fliplr, 3: lambda u: np.rot90(u, 2), 4: np.flipud,
          5: lambda u: u.swapaxes(0, 1), 6: lambda u: np.rot90(u, 1),
          7: lambda u: np.rot90(u, 2).swapaxes(0, 1), 8: lambda u: np.rot90(u, -1)}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation):
    upright = np.kron(noise(2, 3), np.ones((16, 16, 1), np.uint8))  # flat blocks survive a JPEG
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    array = data.decode(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0))
    assert array.shape == upright.shape and np.abs(array.astype(int) - upright).max() <= 4


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 100)
    with pytest.raises(data.DataError, match="photo.png .*11 x 10 pixels"):
        data.decode(encoded(Image.new("RGB", (11, 10)), "PNG"), "photo.png")


# ---------------------------------------------------------------- crops and batches


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [9, 32, 160])  # far down, about even, far up
@pytest.mark.parametrize("share", [(0, 0, 1, 1), (0.13, 0.2, 0.5, 0.71), (0.4, 0, 0.6, 0.3)])
def test_resample_is_pillows_resize(size, share, flip):
    photos, index = ragged(), torch.tensor([3, 1, 0, 2, 1])
    frame = torch.stack([photos.height, photos.width] * 2, 1)[index]
    boxes = torch.tensor(share) * frame
    images = grey_levels(data.resample(photos, index, boxes, size, torch.full((5,), flip)))
    for i, (image, box) in enumerate(zip(images, boxes.double().tolist(), strict=True)):
        y, x, h, w = box
        pillow = Image.fromarray(photos[index[i]].numpy()).resize((size, size), Image.BILINEAR, (x, y, x + w, y + h))
        pillow = np.asarray(pillow, float)[:, ::-1] if flip else np.asarray(pillow, float)
        assert np.abs(image.numpy() - pillow).max() <= ROUNDING


def test_a_batch_is_its_photos_one_by_one():
    photos, flip = ragged(), torch.tensor([True, False, True, False])
    boxes = data.random_boxes(photos, torch.arange(4), torch.Generator().manual_seed(0))
    together = data.resample(photos, torch.arange(4), boxes, 24, flip)
    for i in range(4):
        alone = data.resample(photos, torch.tensor([i]), boxes[i : i + 1], 24, flip[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize("size", [9, 32, 160])
def test_in_bfloat16_a_batch_is_off_by_a_fraction_of_a_grey_level(size):
    photos = data.from_arrays([noise(160, 160, seed) for seed in range(4)])
    boxes = data.random_boxes(photos, torch.arange(4), torch.Generator().manual_seed(0))
    exact = data.resample(photos, torch.arange(4), boxes, size)
    coarse = data.resample(photos, torch.arange(4), boxes, size, dtype=torch.bfloat16)
    assert coarse.dtype == torch.bfloat16 and coarse.is_contiguous(memory_format=torch.channels_last)
    error = grey_levels(coarse.float()) - grey_levels(exact)
    assert error.abs().mean() < 0.35 and error.mean().abs() < 0.1 and error.abs().max() < 4


def test_mirroring_mirrors():
    photos = ragged()
    index, zero = torch.arange(len(photos)), torch.zeros(len(photos))
    boxes = torch.stack([zero, zero, photos.height, photos.width], 1)
    images, mirrored = (data.resample(photos, index, boxes, 24, torch.full_like(index, f).bool()) for f in (0, 1))
    assert torch.allclose(images.flip(3), mirrored, atol=1e-5) and not torch.allclose(images, mirrored, atol=0.1)


def test_random_boxes_are_what_they_say():
    photos, index = data.from_arrays([noise(60, 80), noise(80, 60), noise(64, 64)]), torch.arange(3).repeat(2000)
    y, x, h, w = data.random_boxes(photos, index, torch.Generator().manual_seed(0), 0.25).T
    height, width = photos.height[index], photos.width[index]
    assert min(y.min(), x.min()) >= 0 and (y + h - height).max() < 1e-3 and (x + w - width).max() < 1e-3
    share, aspect = h * w / (height * width), w / h
    assert share.min() >= 0.2499 and share.max() <= 1.0001 and 0.7499 <= aspect.min() and aspect.max() <= 1.3334
    assert share.min() < 0.26 and share.max() > 0.95 and aspect.min() < 0.76 and aspect.max() > 1.32  # all of the range
    assert (y / height).max() > 0.4 and (x / width).max() > 0.4  # anywhere in the photo


def test_random_boxes_stay_inside_a_panorama():
    photos, index = data.from_arrays([noise(20, 100), noise(100, 20)]), torch.arange(2).repeat(500)
    y, x, h, w = data.random_boxes(photos, index, torch.Generator().manual_seed(0)).T
    assert min(y.min(), x.min()) >= 0 and min(h.min(), w.min()) > 1
    assert (y + h - photos.height[index]).max() < 1e-3 and (x + w - photos.width[index]).max() < 1e-3


def test_plain_boxes_are_slices():
    photos, index = ragged().subset(torch.arange(3)), torch.arange(3).repeat(100)
    boxes = data.plain_boxes(photos, index, 32, torch.Generator().manual_seed(0))
    images = grey_levels(data.resample(photos, index, boxes, 32))
    assert torch.equal(boxes, boxes.round())
    for i, image, (y, x, h, w) in zip(index, images, boxes.int().tolist(), strict=True):
        assert (h, w) == (32, 32) and min(y, x) >= 0
        assert torch.allclose(image, photos[i][y : y + 32, x : x + 32].float(), atol=1e-3)
    assert set(boxes[index == 0, 0].tolist()) == set(range(37 - 32 + 1))  # every place, both edges included


def test_plain_boxes_refuse_a_photo_smaller_than_the_crop():
    with pytest.raises(data.DataError, match="3 has 28 x 21 pixels, fewer than the 24 x 24 crop"):
        batch_of(ragged(), 24, plain=True)


@pytest.mark.parametrize("plain", [False, True])
def test_an_epoch_shows_every_photo_once_with_its_label(plain, monkeypatch):
    monkeypatch.setattr(data, "COLOURS", 0.0)
    photos, seen = plain_colours(23), []
    for images, labels in data.train_batches(photos, 8, 5, torch.Generator().manual_seed(0), plain=plain):
        assert torch.allclose(grey_levels(images), labels[:, None, None, None].float(), atol=1e-2)
        seen += labels.tolist()
    assert sorted(seen) == list(range(23)) and seen != sorted(seen)


def test_recolouring_changes_saturation_contrast_and_brightness_of_each_image():
    images = torch.rand(5, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    colours = torch.tensor([[0, 0, 0], [-1, 0, 0], [0.5, 0, 0], [0, -0.25, 0], [0, 0, 0.3]])
    same, grey, vivid, pale, lighter = data.recolour(images, colours)
    assert torch.allclose(same, images[0])
    assert torch.allclose(grey, images[1].mean(0).expand(3, 6, 7), atol=1e-6)
    assert torch.allclose(vivid - vivid.mean(0), 1.5 * (images[2] - images[2].mean(0)), atol=1e-6)
    assert torch.allclose(vivid.mean(0), images[2].mean(0), atol=1e-6)  # as light as it was
    assert torch.allclose(pale, 0.75 * images[3]) and torch.allclose(lighter, images[4] + 0.3)
    assert data.recolour(images, colours).is_contiguous(memory_format=torch.channels_last)
    drawn = data.random_colours(2000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 3) and (drawn.abs().amax(0) <= data.COLOURS).all()
    assert (drawn.amin(0) < -0.95 * data.COLOURS).all() and (drawn.amax(0) > 0.95 * data.COLOURS).all()


def test_crops_change_their_colours_and_plain_pieces_do_not():
    grey = data.from_arrays([torch.full((20, 20, 3), 128, dtype=torch.uint8)] * 50)
    values = [grey_levels(batch_of(grey, 8, plain=plain)[0])[:, 0, 0, 0] for plain in (False, True)]
    assert values[0].std() > 5 and torch.allclose(values[1], torch.tensor(128.0), atol=1e-2)


def test_a_small_last_batch_joins_the_one_before():
    sizes = [len(labels) for _, labels in data.train_batches(plain_colours(22), 8, 5, torch.Generator())]
    assert sizes == [5, 5, 5, 7]
    assert [len(labels) for _, labels in data.train_batches(plain_colours(2), 8, 1, torch.Generator())] == [1, 1]


def test_the_generator_decides_everything():
    photos, state = ragged(), torch.get_rng_state()
    (a, a_labels), (b, b_labels), (c, _) = batch_of(photos, seed=1), batch_of(photos, seed=1), batch_of(photos, seed=2)
    assert torch.equal(a, b) and torch.equal(a_labels, b_labels) and not torch.equal(a, c)
    orders = {tuple(batch_of(photos, seed=seed)[1].tolist()) for seed in range(10)}
    assert len(orders) > 1 and torch.equal(torch.get_rng_state(), state)


def test_about_half_is_mirrored():
    ramp = torch.arange(40, dtype=torch.uint8).view(1, 40, 1).expand(40, 40, 3) * 6  # brighter to the right
    images, _ = batch_of(data.from_arrays([ramp] * 400), size=8)
    mirrored = (images[..., 0] > images[..., -1]).all(2).all(1).float().mean()
    assert 0.4 < mirrored < 0.6


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_evaluation_is_in_order_whole_and_always_the_same(batch_size):
    photos = ragged()
    first, again = (list(data.eval_batches(photos, 24, batch_size)) for _ in range(2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert torch.cat([labels for _, labels in first]).tolist() == photos.labels.tolist()
    for i, image in enumerate(grey_levels(torch.cat([images for images, _ in first]))):
        pillow = Image.fromarray(photos[i].numpy()).resize((24, 24), Image.BILINEAR)  # the frame, nothing cut off
        assert np.abs(image.numpy() - np.asarray(pillow, float)).max() <= ROUNDING


@pytest.mark.parametrize("batches", [lambda p: data.train_batches(p, 24, 4, torch.Generator()),
                                     lambda p: data.eval_batches(p, 24, 4)], ids=["train", "eval"])
def test_batches_are_float32_and_channels_last(batches):
    for images, labels in batches(ragged()):
        assert images.shape == (4, 3, 24, 24) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_large_batch_is_resampled_in_pieces(monkeypatch):
    photos, flip = ragged(), torch.tensor([True, False, True, False])
    boxes = data.random_boxes(photos, torch.arange(4), torch.Generator().manual_seed(0))
    whole = data.resample(photos, torch.arange(4), boxes, 24, flip)
    padded, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: padded.append(shape) or zeros(*shape, **options))
    monkeypatch.setattr(data, "MAX_BATCH", 2 * 80 * 64)
    pieces = data.resample(photos, torch.arange(4), boxes, 24, flip)
    assert torch.allclose(pieces, whole, atol=1e-5) and pieces.is_contiguous(memory_format=torch.channels_last)
    assert len(padded) > 1 and all(b == 1 or b * h * w <= data.MAX_BATCH for b, h, w, _ in padded)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_one_large_photo_among_small_ones_does_not_fill_the_memory():
    """Padded to the largest, this batch has 0.8 billion pixels: 9 GB in float32."""
    code = """if True:
        import resource, torch, data
        photos = data.from_arrays([torch.zeros(9, 9, 3, dtype=torch.uint8)] * 63
                                  + [torch.zeros(3000, 4000, 3, dtype=torch.uint8)])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for batch in data.eval_batches(photos, 32, 64):
            pass
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1  # GiB


# ---------------------------------------------------------------- devices, of which none is here


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("batches", [lambda p: data.train_batches(p, 16, 4, torch.Generator()),
                                     lambda p: data.train_batches(p, 16, 4, torch.Generator(), plain=True,
                                                                  dtype=torch.bfloat16),
                                     lambda p: data.eval_batches(p, 16, 4)], ids=["train", "plain", "eval"])
def test_making_a_batch_asks_the_device_for_nothing(fake_device, batches, moved):
    photos = on_fake_cuda(ragged(), moved).subset(torch.arange(4))
    for images, labels in batches(photos):
        assert images.device.type == labels.device.type == "cuda" and images.shape == (4, 3, 16, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert fake_device.copies >= 2  # it was watched: labels, and crops or their boxes
    for sizes in (photos.start, photos.height, photos.width, photos.labels):
        assert sizes.device.type == "cpu"


def test_the_fake_device_notices_what_asks_it(fake_device):
    there = torch.empty(3, device="cuda")
    for ask in (int, lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: t.cpu(), lambda t: t.max().item()):
        with pytest.raises(Exception):  # noqa: B017
            ask(there[0] if ask is int else there)
    with pytest.raises(AssertionError, match="waits"):
        torch.zeros(3).to("cuda")


@pytest.mark.parametrize(("device", "free", "fits"), [("cuda", 1000, True), ("cuda", 899, False), ("mps", None, True),
                                                      ("mps", "huge", False), ("cpu", 0, True)])
def test_pixels_move_to_a_device_if_they_fit(monkeypatch, device, free, fits):
    photos, moved = data.from_arrays([noise(10, 15)]), []  # 450 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(device) or tensor)
    if free == "huge":
        photos = replace(photos, pixels=torch.empty(1, 1, dtype=torch.uint8).expand(2**31, 2))
    there = photos.to(device)
    assert there.device == torch.device(device) and moved == [torch.device(device)] * fits
    assert there.height is photos.height


# ---------------------------------------------------------------- decoding once


def test_the_second_load_decodes_nothing(small, no_decoding, monkeypatch):
    first = data.load(small, "train")
    no_decoding()
    monkeypatch.chdir(small)
    for again in (small, f"{small}/", "."):
        second = data.load(again, "train")
        assert torch.equal(first.pixels, second.pixels) and first.names == second.names
    assert made_in(small) == {"train.pixels"}


def change(photo):
    Image.fromarray(noise(30, 30)).save(photo)
    os.utime(photo, (1, 1))


CHANGES = {
    "changed": change,
    "touched": lambda photo: os.utime(photo, (1, 1)),
    "added": lambda photo: shutil.copy(photo, photo.with_name("a.png")),
    "removed": lambda photo: photo.unlink(),
    "renamed": lambda photo: photo.rename(photo.with_name("z.png")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_folder_that_changed_is_decoded_anew(small, what, monkeypatch):
    data.load(small, "train")
    CHANGES[what](small / "train" / TENCH / "0.png")
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *given: decoded.append(given) or decode(*given))
    photos, reference = data.load(small, "train"), torchvision.datasets.ImageFolder(small / "train")
    assert len(decoded) == len(photos) == len(reference)
    assert all(np.array_equal(photos[i], image) for i, (image, _) in enumerate(reference))


TORN = {
    "empty": lambda raw: b"",
    "short": lambda raw: raw[:5],
    "cut": lambda raw: raw[: len(raw) // 2],
    "without its first pixel": lambda raw: raw[3:],
    "zeros": lambda raw: bytes(len(raw)),
    "ones": lambda raw: b"\xff" * len(raw),
    "noise": lambda raw: random.Random(0).randbytes(len(raw)),
    "another index": lambda raw: raw + b"[]" + (2).to_bytes(8, "little"),
    "an index of nothing": lambda raw: b'{"pixels": 0}' + (13).to_bytes(8, "little"),
}


@pytest.mark.parametrize("how", TORN)
def test_a_torn_pixels_file_is_made_anew(small, how):
    packed, pixels = small / "train.pixels", data.load(small, "train").pixels.clone()
    packed.write_bytes(TORN[how](packed.read_bytes()))
    assert torch.equal(data.load(small, "train").pixels, pixels)


def test_an_interrupted_decoding_leaves_nothing(small, monkeypatch):
    decode = data.decode

    def interrupt(file, name, side):
        if LAST in name:
            raise KeyboardInterrupt
        return decode(file, name, side)

    monkeypatch.setattr(data, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load(small, "train")
    assert made_in(small) == set()


def test_the_pixels_are_mapped_and_never_written_back(small):
    photos, before = data.load(small, "train"), (small / "train.pixels").read_bytes()
    if Path("/proc/self/maps").exists():
        assert str(small / "train.pixels") in Path("/proc/self/maps").read_text()
    photos.pixels.fill_(0)
    assert (small / "train.pixels").read_bytes() == before


def test_a_read_only_folder_is_packed_elsewhere(small, tmp_path, monkeypatch, capsys, no_decoding):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, whatever the folder says
    first = data.load(small, "val")
    assert made_in(small) == set() and len(list(Path("data").glob("small-*-val.pixels"))) == 1
    no_decoding()
    assert torch.equal(data.load(small, "val").pixels, first.pixels)


def test_the_command_says_where_the_pixels_of_a_read_only_folder_are(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(sys, "argv", ["data.py", str(small)])
    data.main()
    said = [Path(line.split(": ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 2 and all(path.exists() for path in said)


def test_what_is_no_photo_is_skipped_and_counted(small, capsys):
    tench = small / "train" / TENCH
    for name in (".hidden.JPEG", "._0.jpg", ".DS_Store", "notes.txt", "Thumbs.db"):
        (tench / name).write_text("no photo")
    (tench / "album.jpg").mkdir()
    for name in (".ipynb_checkpoints", "__MACOSX"):  # of Jupyter; of a zip made on a Mac, unpacked by hand
        (small / "train" / name).mkdir()
    data.prepare(small)
    assert "6 entries that are no photos skipped\n" in capsys.readouterr().err
    assert len(data.load(small, "train")) == 20


def test_photos_in_a_format_that_is_not_read_are_counted_by_name(small, capsys):
    for name in ("a.heic", "b.HEIC", "c.avif", "d.txt"):
        (small / "val" / TENCH / name).write_bytes(b"....ftypheic")
    data.prepare(small)
    said = "4 entries that are no photos skipped (3 of them .avif, .heic: convert them to JPEG)"
    assert said in capsys.readouterr().err
    for j in range(2):
        (small / "train" / TENCH / f"{j}.png").rename(small / "train" / TENCH / f"{j}.heic")
    with pytest.raises(data.DataError, match=f"{TENCH} holds no photo that can be read here .*convert them to JPEG"):
        data.prepare(small)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])  # phones send them under any name
def test_a_format_that_is_not_read_is_not_called_damage(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(4) + b"ftypheic" + bytes(100))
    with pytest.raises(data.DataError, match=f"{name} .*convert it to JPEG"):
        data.decode(tmp_path / name)


def test_symlinked_class_folders_are_class_folders(small, tmp_path, capsys):
    (small / "train").rename(tmp_path / "elsewhere")
    (small / "train").mkdir()
    for folder in (tmp_path / "elsewhere").iterdir():
        (small / "train" / folder.name).symlink_to(folder)
    (small / "train" / TENCH / "notes.txt").write_text("no photo")
    data.prepare(small)
    assert len(data.load(small, "train")) == 20
    error = capsys.readouterr().err
    assert "1 entries that are no photos skipped" in error and "-" not in error.split("skipped")[0].split("photos")[-1]


DAMAGE = {
    "zero bytes": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "header alone": lambda raw: raw[:20],
    "text": lambda raw: b"<html>404 Not Found</html>",
}


def damage(folder, how, name="n02979186/0.JPEG"):
    """One photo of the train split, a damaged JPEG now."""
    photo = folder / "train" / name
    photo.with_suffix(".png").unlink()
    photo.write_bytes(DAMAGE[how](encoded(Image.fromarray(noise(40, 40)), "JPEG").getvalue()))
    return photo


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_photo_is_named(small, how):
    photo = damage(small, how)
    with pytest.raises(data.DataError, match="--skip-bad") as error:
        data.load(small, "train")
    assert str(photo) in str(error.value) and "\n" not in str(error.value)
    assert made_in(small) == set()


def test_skip_bad_leaves_damaged_photos_out_and_counts_them(small, capsys, no_decoding):
    bad = [damage(small, "truncated"), damage(small, "text", "n03425413/1.JPEG")]
    photos = data.load(small, "train", skip_bad=True)
    assert "2 damaged photos left out" in capsys.readouterr().err
    assert len(photos) == 18 and not {f"{p.parent.name}/{p.name}" for p in bad} & set(photos.names)
    assert photos.labels.tolist() == [list(data.CLASSES).index(name.split("/")[0]) for name in photos.names]
    assert np.array_equal(photos[17], Image.open(small / "train" / photos.names[17]))
    no_decoding()
    assert len(data.load(small, "train")) == 18  # it is remembered
    assert "2 damaged photos left out" in capsys.readouterr().err


def test_skip_bad_is_remembered_when_photos_change(small, monkeypatch):
    damage(small, "truncated")
    data.load(small, "train", skip_bad=True)
    damage(small, "text", "n03425413/1.JPEG")
    change(small / "train" / TENCH / "0.png")
    assert len(data.load(small, "train")) == 18
    damage(small, "truncated", f"../val/{TENCH}/0.JPEG")
    assert len(data.load(small, "val")) == 19  # of these data, not of this split alone


def test_skip_bad_is_remembered_where_nothing_was_damaged(small):
    data.load(small, "train")
    data.load(small, "train", skip_bad=True)
    damage(small, "truncated")
    assert len(data.load(small, "train")) == 19


def test_splits_of_different_sizes_are_refused(small):
    data.load(small, "train", side=8)
    data.load(small, "val", side=9)
    with pytest.raises(data.DataError, match="different sizes.*--side 9"):
        data.load(small, "train")
    data.load(small, "train", side=9)
    assert len(data.load(small, "train")) == 20


def test_two_folders_called_train_are_refused(small):
    if (small / "Train").exists():
        pytest.skip("names in this file system know no capitals")
    (small / "Train").mkdir()
    with pytest.raises(data.DataError, match="two folders called train"):
        data.check(small)


def test_a_split_that_lost_its_pixels_is_stored_as_the_other_is(small):
    for split in data.COUNTS:
        data.load(small, split, side=8)
    os.truncate(small / "train.pixels", 5)
    photos = data.load(small, "train")
    assert torch.minimum(photos.height, photos.width).max() == 8


def test_a_photo_that_cannot_be_read_is_like_a_damaged_one(small, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path.name == "0.png" and TENCH in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(data.DataError, match=f"Permission denied.*{TENCH}/0.png.*--skip-bad"):
        data.load(small, "train")
    assert len(data.load(small, "train", skip_bad=True)) == 19


def test_skip_bad_needs_one_photo_of_every_class(small):
    for j in range(2):
        damage(small, "zero bytes", f"{TENCH}/{j}.JPEG")
    with pytest.raises(data.DataError, match="without a single readable photo"):
        data.load(small, "train", skip_bad=True)
    assert made_in(small) == set()


def test_two_processes_at_once_make_one_file(small, tmp_path):
    start = [sys.executable, str(REPO / "data.py"), str(small)]
    both = [subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert made_in(small) == {"train.pixels", "val.pixels"}
    if data.fcntl:
        assert "".join(errors).count("decoding") == 2  # each split once, not twice
    assert len(data.load(small, "train")) == 20


def test_where_the_file_system_has_no_locks_nobody_waits(small, monkeypatch):
    left = Path(f"{small}/train.pixels.{os.getpid()}1.part")  # perhaps of a process that is writing it
    left.write_bytes(b"half of it")

    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(data, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    assert len(data.load(small, "train")) == 20 and left.exists()


@pytest.fixture
def busy(monkeypatch):
    """Another process holds every lock, and Ctrl-C is pressed while this one waits."""

    def flock(file, how):
        raise BlockingIOError if how & 4 else KeyboardInterrupt

    monkeypatch.setattr(data, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))


def test_ctrl_c_while_waiting_for_another_process(small, busy, monkeypatch, capsys):
    status, lines = command(monkeypatch, capsys, small)
    assert status == 130 and lines[-1].startswith("data.py: interrupted") and "waiting" in lines[-2]


def test_who_does_not_wait_for_a_lock_is_told(tmp_path, busy):
    with pytest.raises(data.DataError, match="run is in use by another process"):
        with data.lock(tmp_path / "run", wait=False):
            pass


@pytest.mark.parametrize("other", ["made it", "made another"])
def test_a_file_of_pixels_that_cannot_be_replaced(small, tmp_path, monkeypatch, other):
    """Windows replaces no file that another process has mapped: what that one made is used if it is the same."""
    data.load(small, "train")
    change(small / "train" / TENCH / "0.png")
    replace = os.replace

    def refuse(source, target):
        if other == "made it":
            replace(source, target)
        raise PermissionError(13, "Access is denied", source, 5, target)

    monkeypatch.setattr(os, "replace", refuse)
    if other == "made it":
        assert data.load(small, "train")[0].shape == (30, 30, 3)
    else:
        with pytest.raises(data.DataError, match="train.pixels cannot be replaced .*end what uses it"):
            data.load(small, "train")
    assert not list(small.glob("*.part"))


def test_a_name_that_the_terminal_has_no_letters_for(small, monkeypatch):
    folder = small.rename(small.with_name("photos \N{CAMERA}"))
    Image.fromarray(noise(9, 9)).save(folder / "train" / TENCH / "\N{FISH}.png")
    written = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), written, strict=True):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["data.py", str(folder)])
    data.main()
    assert all(b"photos \\U0001f4f7" in (stream.flush() or stream.buffer.getvalue()) for stream in written)


def test_the_demo_is_decoded_to_the_same_bytes_as_ever(demo):
    """Sorted by class and name, whatever else changes: pixels and labels are those of the first version."""
    found = {split: hashlib.sha256(data.load(demo, split).pixels.numpy()).hexdigest()[:16] for split in data.COUNTS}
    assert found == {"train": "29ed9825413a7435", "val": "419ec0dfaddb7c4f"}
    for split, count in (("train", 6), ("val", 2)):
        assert data.load(demo, split).labels.tolist() == [k for k in range(10) for _ in range(count)]


# ---------------------------------------------------------------- folders


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def one_photo(folder):
    shutil.rmtree(folder / "val")
    (folder / "train" / LAST / "1.png").unlink()


def one_class(folder):
    for wnid in list(data.CLASSES)[1:]:
        shutil.rmtree(folder / "train" / wnid)


WRONG_FOLDERS = {  # what is done to it, what the sentence says
    "missing": (shutil.rmtree, ["small does not exist", "DATA="]),
    "empty": (empty, ["small holds 0 class folders", "two or more", "python data.py"]),
    "without train": (lambda f: shutil.rmtree(f / "train"), ["train is missing", "val/"]),
    "train empty": (lambda f: empty(f / "train"), ["train holds 0 class folders"]),
    "one class": (one_class, ["train holds 1 class folders", "two or more"]),
    "unknown class": (lambda f: shutil.copytree(f / "val" / TENCH, f / "val" / "pike"),
                      ["val/pike is a class that", "train lacks"]),
    "class missing": (lambda f: shutil.rmtree(f / "train" / TENCH), [f"val/{TENCH} is a class that", "train lacks"]),
    "class empty": (lambda f: empty(f / "train" / LAST), [f"train/{LAST} holds no photo"]),
    "a class of one photo": (one_photo, [f"train/{LAST} holds one photo", "a class needs two"]),
}


@pytest.mark.parametrize("what", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused(small, what, monkeypatch, capsys):
    spoil, words = WRONG_FOLDERS[what]
    spoil(small)
    with pytest.raises(data.DataError) as error:
        data.prepare(small)
    assert all(word in str(error.value) for word in words), error.value
    status, lines = command(monkeypatch, capsys, small)
    assert status == 2 and lines == [f"data.py: {error.value}"]


def test_a_folder_is_used_where_it_is(small, tmp_path, capsys):
    assert data.prepare(small, tmp_path / "root") == small
    assert not (tmp_path / "root").exists() and made_in(small) == set()
    counts, usual = capsys.readouterr().err.splitlines()
    assert counts.endswith("20 train and 20 val photos of 10 classes")
    assert usual.endswith("the public ImageNette has 9,469 and 3,925")


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(draw_classes(tmp_path / "here", cat=3, dog=3))
    for names in (("",), (None, "")):
        with pytest.raises(data.DataError, match="is empty.*--data"):
            data.prepare(*names)


def test_usual_counts_are_not_remarked_on(small, capsys, monkeypatch):
    monkeypatch.setattr(data, "COUNTS", {"train": 20, "val": 20})
    data.prepare(small)
    assert capsys.readouterr().err.endswith("20 train and 20 val photos of 10 classes\n")


# ---------------------------------------------------------------- anybody's folders


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


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_folder_to_validate_on_has_several_names(pets, tmp_path, capsys, name):
    draw_classes(tmp_path / "both" / name, dog=4, cat=1)
    pets.rename(tmp_path / "both" / "train")
    folder = data.prepare(tmp_path / "both")
    error = capsys.readouterr().err
    assert "45 train and 5 val photos of 3 classes" in error and "no val photos of 1 classes (fish)" in error
    assert (f"{name}/ is used to validate on" in error) == (name != "val")
    train, val = (data.load(folder, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog", "fish"]
    assert val.names[0] == "cat/DSC00000.png" and val.labels.tolist() == [0, 1, 1, 1, 1]
    assert train.labels.tolist() == [0] * 40 + [1] * 3 + [2] * 2


def test_of_several_folders_to_validate_on_the_first_is_taken(pets, tmp_path, capsys):
    for name, dogs in (("test", 1), ("valid", 2), ("validation", 3)):
        draw_classes(tmp_path / "all" / name, dog=dogs)
    pets.rename(tmp_path / "all" / "train")
    assert len(data.load(data.prepare(tmp_path / "all"), "val")) == 2
    assert "valid/ is used to validate on" in capsys.readouterr().err


def is_val(label, name):
    digest = hashlib.blake2b(f"{label}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < 0.15 * 2**64


@pytest.mark.parametrize("layout", ["train alone", "class folders", "a test folder without classes"])
def test_without_a_folder_to_validate_on_a_share_is_set_aside(pets, tmp_path, capsys, layout):
    folder = pets
    if layout != "class folders":
        folder = tmp_path / "folder"
        folder.mkdir()
        pets.rename(folder / "train")
    if layout == "a test folder without classes":  # as Kaggle has it
        (folder / "test").mkdir()
        Image.fromarray(noise(6, 6)).save(folder / "test" / "1.png")
    assert data.prepare(folder) == folder
    val = data.load(folder, "val")
    names = data.load(folder, "train").names + val.names
    assert sorted(names) == sorted(p.relative_to(p.parent.parent).as_posix() for p in folder.rglob("*/DSC*.png"))
    assert f"{len(val)} photos, about 15% of each class, one at least, set aside" in capsys.readouterr().err
    expected = [name for name in names if name.startswith("cat") and is_val(*name.split("/"))]
    assert [name for name in val.names if name.startswith("cat")] == sorted(expected) and 2 <= len(expected) <= 12
    assert {name.split("/")[0] for name in val.names} == {"cat", "dog", "fish"}


def test_photos_that_are_added_move_no_other_across(tmp_path):
    before = draw_classes(tmp_path / "before", cat=30, dog=40)
    after = draw_classes(tmp_path / "after", cat=60, dog=40, eel=9)
    old, new = ({split: set(data.load(f, split).names) for split in ("train", "val")} for f in (before, after))
    assert all(old[split] < new[split] for split in old)


def test_a_class_whose_photos_all_fall_to_one_side_is_still_shared_out(tmp_path):
    low = [f"{i}.png" for i in range(60) if is_val("a", f"{i}.png")][:2]
    high = [f"{i}.png" for i in range(60) if not is_val("b", f"{i}.png")][:2]
    for label, names in (("a", low), ("b", high)):
        (tmp_path / "ab" / label).mkdir(parents=True)
        for name in names:
            Image.fromarray(noise(6, 6)).save(tmp_path / "ab" / label / name)
    photos = [data.load(tmp_path / "ab", split) for split in ("train", "val")]
    assert [p.labels.tolist() for p in photos] == [[0, 1], [0, 1]]


def test_wordnet_ids_are_shown_as_words_and_all_others_by_their_folder(tmp_path, small):
    assert data.load(small, "val").classes == list(data.CLASSES.values())
    dogs = draw_classes(tmp_path / "dogs", n02115641=2, n99999999=2, Zebra=2, apple=2)
    assert data.load(dogs, "train").classes == ["Zebra", "apple", "dingo", "n99999999"]
    twice = draw_classes(tmp_path / "twice", n02115641=2, dingo=2)
    assert data.load(twice, "train").classes == ["dingo", "n02115641"]  # no two of one name


def test_photos_take_the_labels_of_a_network(pets):
    photos = data.load(pets, "train")
    other = photos.relabelled(["fish", "cat", "dog"])
    assert other.classes == ["fish", "cat", "dog"] and photos.classes == ["cat", "dog", "fish"]
    assert all(other.classes[o] == photos.classes[p] for o, p in zip(other.labels, photos.labels, strict=True))
    with pytest.raises(data.DataError, match="fish.*eel, emu"):
        photos.relabelled(["cat", "dog", "emu", "eel"])


def test_every_photo_has_the_hash_of_its_file(pets):
    photos = data.load(pets, "train")
    files = [(pets / name).read_bytes() for name in photos.names]
    assert photos.digests == [hashlib.blake2b(file, digest_size=8).hexdigest() for file in files]
    some = photos.subset(torch.tensor([3, 1]))
    assert some.digests == [photos.digests[3], photos.digests[1]] and some.classes == photos.classes


def test_the_fingerprint_is_that_of_names_files_and_stored_sizes(tmp_path):
    photos = data.load(draw_classes(tmp_path / "a", cat=5, dog=5), "train")
    again = data.load(draw_classes(tmp_path / "b", cat=5, dog=5), "train")
    assert photos.fingerprint == again.fingerprint
    os.utime(tmp_path / "b" / photos.names[0], (1, 1))
    assert data.load(tmp_path / "b", "train").fingerprint == photos.fingerprint
    others = [data.load(tmp_path / "b", "train", side=4), data.load(tmp_path / "b", "val")]
    Image.fromarray(noise(6, 7, 99)).save(tmp_path / "b" / photos.names[0])  # another photo of the same name and size
    others.append(data.load(tmp_path / "b", "train", side=6))
    (tmp_path / "a" / photos.names[0]).rename(tmp_path / "a" / "cat" / "new.png")
    others.append(data.load(tmp_path / "a", "train"))
    assert len({photos.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_photos_in_both_splits_are_counted_and_said(small, monkeypatch, capsys):
    shutil.copy(small / "train" / TENCH / "0.png", small / "val" / LAST / "copy.png")
    photos = {split: data.load(small, split) for split in data.COUNTS}
    same = sum(p.read_bytes() in {q.read_bytes() for q in (small / "train").rglob("*.png")}
               for p in (small / "val").rglob("*.png"))
    assert data.shared(**photos) == same == 21  # the fixture draws the same photos for both
    status, lines = command(monkeypatch, capsys, small)
    assert status == 0 and lines[-1] == f"{small}: 21 val photos are in train too, byte for byte"
    assert data.shared(photos["train"], data.from_arrays([noise(3, 3)])) == 0


# ---------------------------------------------------------------- large photos


def test_a_large_photo_is_reduced_and_a_small_one_stays(tmp_path):
    folder = draw_classes(tmp_path / "ab", a=2, b=2)
    gradient = np.linspace(0, 255, 400 * 900 * 3).astype(np.uint8).reshape(900, 400, 3)
    for name in ("large.png", "large.jpg"):
        Image.fromarray(gradient).save(folder / "a" / name)
    photos = {name: p[i] for p in (data.load(folder, s, side=100) for s in ("train", "val"))
              for i, name in enumerate(p.names)}
    for name, photo in photos.items():
        image = Image.open(folder / name)
        if "large" in name:
            assert photo.shape == (225, 100, 3)
            error = photo.numpy().astype(int) - np.asarray(image.resize((100, 225), Image.BOX), int)
            assert np.abs(error).max() <= (8 if name.endswith("jpg") else 2)
        else:
            assert np.array_equal(photo, image)


@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_photo_is_reduced_like_an_upright_one(orientation):
    upright = np.kron(noise(2, 3), np.ones((64, 64, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    stored = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), "JPEG", exif=exif, quality=95)
    array = data.decode(stored, side=32)
    assert array.shape == (32, 48, 3)
    assert np.abs(array[8::16, 8::16].astype(int) - upright[32::64, 32::64]).max() <= 6  # the middles of its blocks


def test_a_jpeg_is_reduced_by_its_decoder_first(monkeypatch):
    file, sizes, load = encoded(Image.new("RGB", (1600, 1200)), "JPEG"), [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: sizes.append(image.size) or load(image))
    assert data.decode(file, side=150).shape == (150, 200, 3)
    assert max(sizes) == (200, 150)


def test_the_side_is_stored_and_remembered(small, monkeypatch, capsys, no_decoding):
    photos = data.load(small, "train")
    assert torch.minimum(photos.height, photos.width).max() == 15
    assert command(monkeypatch, capsys, small, "--side", 8)[0] == 0
    change(small / "val" / TENCH / "0.png")
    for split in data.COUNTS:
        photos = data.load(small, split)  # decoded anew
        assert torch.minimum(photos.height, photos.width).unique().tolist() == [8]
    no_decoding()
    data.load(small, "val", side=8)
    with pytest.raises(AssertionError, match="decoded again"):
        data.load(small, "val", side=9)


def test_a_side_of_nothing_is_refused(small, monkeypatch, capsys):
    status, lines = command(monkeypatch, capsys, small, "--side", 0)
    assert status == 2 and "--side 0" in lines[-1]


def test_few_decoded_photos_wait_in_memory(tmp_path, monkeypatch):
    folder, decode, begun = draw_classes(tmp_path / "ab", a=200, b=2), data.decode, []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(data, "decode", lambda *given: begun.append(1) or decode(*given))
    for done, _ in enumerate(data.decode_all([p for p in folder.rglob("*.png")], 256)):
        assert len(begun) <= done + 12
    assert done == 201


# ---------------------------------------------------------------- archives


def pack(path, folder, *members, top="imagenette2-160/"):
    """A .tgz, .tar or .zip of a folder, made like the public one, and then of `members` (of a tar)."""
    entries = [(entry, top + entry.relative_to(folder).as_posix()) for entry in sorted(folder.rglob("*"))
               if entry.suffix not in (".pixels", ".lock")]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for entry, name in entries:
                file.write(entry, name)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for entry, name in entries:
            tar.add(entry, name, recursive=False)
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(name, kind=tarfile.REGTYPE, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")
            if p.is_file() and not p.name.startswith(".") and p.suffix not in (".pixels", ".lock")}


@pytest.mark.parametrize("top", ["imagenette2-160/", ""])
@pytest.mark.parametrize("suffix", [".tgz", ".tar", ".zip"])
def test_an_archive_is_unpacked_once(demo, tmp_path, monkeypatch, capsys, suffix, top):
    archive, root = pack(tmp_path / f"photos{suffix}", demo, top=top), tmp_path / "root"
    folder = data.prepare(archive, root)
    assert folder == root / "photos" and made_in(root) == {"photos"}
    assert contents(folder) == contents(demo)
    error = capsys.readouterr().err
    assert "60 train and 20 val photos of 10 classes\n" in error and "public ImageNette has 9,469 and 3,925\n" in error
    monkeypatch.setattr(data, "extract", lambda *_: pytest.fail("unpacked again"))
    assert data.prepare(archive, root) == folder


def test_an_archive_of_class_folders_from_a_mac(pets, tmp_path):
    archive = pack(tmp_path / "photos.zip", pets, top="pets/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/pets/cat/._DSC00000.png", b"no photo")
        file.writestr("pets/cat/.DS_Store", b"no photo")
    assert contents(data.prepare(archive, tmp_path / "root")) == contents(pets)


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_a_tar_is_unpacked_however_it_is_compressed(pets, tmp_path, packing):
    with tarfile.open(tmp_path / f"Photos.TAR.{packing}", f"w:{packing}") as tar:
        tar.add(pets, "pets")
    assert contents(data.prepare(tmp_path / f"Photos.TAR.{packing}", tmp_path / "root")) == contents(pets)
    assert (tmp_path / "root" / "Photos").is_dir()


@pytest.mark.parametrize("name", ["photos.ZIP", "photos"])
def test_an_archive_may_lie_where_it_is_unpacked(pets, tmp_path, name):
    archive = pack(tmp_path / "photos.zip", pets, top="pets/")
    (tmp_path / "root").mkdir()
    archive = archive.rename(tmp_path / "root" / name)
    assert contents(data.prepare(archive, tmp_path / "root")) == contents(pets)


def test_a_zip_of_windows_with_a_letter_beside_the_folder(pets, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("README.txt", "photos of pets")
        for path in pets.rglob("*.*"):
            info = zipfile.ZipInfo("x")
            info.filename = "download\\pets\\" + str(path.relative_to(pets)).replace("/", "\\")
            file.writestr(info, path.read_bytes())
    assert contents(data.prepare(tmp_path / "photos.zip", tmp_path / "root")) == contents(pets)


def test_names_of_a_zip_are_utf_8_even_where_it_does_not_say_so(tmp_path):
    """As zip on Linux and Macs writes them: without the bit for UTF-8, which Python would write, in both headers."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for name in ("Tür", "猫"):
            for i in range(2):
                photo = io.BytesIO()
                Image.new("RGB", (8, 8), (len(name), i, 0)).save(photo, "PNG")
                file.writestr(f"{name}/{i}.png", photo.getvalue())
    raw = (tmp_path / "photos.zip").read_bytes()
    assert raw.count(b"\x00\x08\x00\x00") >= 4  # flags, then "stored", of every entry
    for header in (b"PK\x03\x04\x14\x00", b"PK\x01\x02\x14\x03\x14\x00"):
        assert raw.count(header + b"\x00\x08") == 4
        raw = raw.replace(header + b"\x00\x08", header + b"\x00\x00")
    (tmp_path / "photos.zip").write_bytes(raw)
    assert not {"Tür/0.png", "猫/0.png"} & set(zipfile.ZipFile(tmp_path / "photos.zip").namelist())
    assert data.check(data.prepare(tmp_path / "photos.zip", tmp_path / "root"))[1] == ["Tür", "猫"]


def test_images_for_mps_are_contiguous(monkeypatch):
    """There, channels-last gave wrong gradients (pytorch#175189)."""
    photos = data.from_arrays([torch.zeros(9, 12, 3, dtype=torch.uint8)] * 4)
    assert not next(data.eval_batches(photos, 8, 4))[0].is_contiguous()
    monkeypatch.setattr(data, "send", lambda tensor, device: tensor)
    images, _ = next(data.eval_batches(replace(photos, device=torch.device("mps")), 8, 4))
    assert images.is_contiguous()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused_by_name(pets, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", method) as file:
        for path in pets.rglob("*.*"):
            file.write(path, path.relative_to(pets))
    raw = bytearray((tmp_path / "photos.zip").read_bytes())
    raw[60:160] = bytes(100)
    (tmp_path / "photos.zip").write_bytes(raw)
    with pytest.raises(data.DataError, match="photos.zip"):
        data.prepare(tmp_path / "photos.zip", tmp_path / "root")
    assert not (tmp_path / "root" / "photos").exists()


def test_folders_are_found_however_they_are_written(pets, tmp_path):
    pets.rename(tmp_path / "Train")
    draw_classes(tmp_path / "Test", cat=2, dog=2, fish=2)
    assert len(data.load(data.prepare(tmp_path), "val")) == 6


def test_a_link_that_loops_is_no_photo(pets):
    (pets / "cat" / "loop.png").symlink_to(pets / "cat" / "loop.png")
    (pets / "loop").symlink_to(pets / "loop")
    assert len(data.load(data.prepare(pets), "train").classes) == 3


def test_shown_names_have_their_accents_composed(tmp_path):
    draw_classes(tmp_path, **{"Ga\u0308nse": 4, "Enten": 4})
    assert data.load(tmp_path, "train").classes == ["Enten", "G\u00e4nse"]


@pytest.mark.parametrize("most", [1, 255])
def test_a_photo_of_floats_is_no_black_photo(tmp_path, most):
    levels = np.linspace(0, most, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "floats.tif")
    assert np.abs(data.decode(tmp_path / "floats.tif")[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1


def test_a_tar_is_unpacked_by_a_python_without_filters(small, tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2): `TarFile.extract` takes no filter."""
    extract = tarfile.TarFile.extract

    def old(self, member, path="", set_attrs=True, *, numeric_owner=False):
        return extract(self, member, path, set_attrs, numeric_owner=numeric_owner)

    monkeypatch.setattr(tarfile.TarFile, "extract", old)
    for name in ("data_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name, raising=False)
    assert contents(data.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")) == contents(small)


def test_an_archive_that_changed_is_unpacked_anew(small, tmp_path):
    folder = data.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    (small / "train" / TENCH / "0.png").rename(small / "train" / TENCH / "new.png")
    (folder / "notes.txt").write_text("of the user")
    assert data.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root") == folder
    assert contents(folder) == contents(small)
    assert (tmp_path / "root" / "photos.before" / "notes.txt").read_text() == "of the user"


def test_a_damaged_archive_leaves_the_folder_of_its_forerunner(small, tmp_path):
    archive, root = pack(tmp_path / "photos.tgz", small), tmp_path / "root"
    folder = data.prepare(archive, root)
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(data.DataError, match="cut short"):
        data.prepare(archive, root)
    assert made_in(root) == {"photos"} and contents(folder) == contents(small)


def test_a_folder_of_the_users_own_is_not_overwritten(small, tmp_path):
    own = tmp_path / "root" / "photos"
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("years of work")
    with pytest.raises(data.DataError, match="did not come from"):
        data.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    assert (own / "thesis.txt").read_text() == "years of work"


def flip_byte(raw, at):
    raw = bytearray(raw)
    raw[at] ^= 255
    return bytes(raw)


WRONG_ARCHIVES = {  # from the bytes of a good one
    "empty": lambda raw: b"",
    "text": lambda raw: b"<html>404 Not Found</html>",
    "noise": lambda raw: random.Random(0).randbytes(5000),
    "compressed noise": lambda raw: gzip.compress(random.Random(0).randbytes(5000)),
    "cut in the middle": lambda raw: raw[: len(raw) // 2],
    "cut by its last byte": lambda raw: raw[:-1],
    "cut before its checksum": lambda raw: raw[:-8],
    "wrong checksum": lambda raw: flip_byte(raw, -8),
    "wrong length": lambda raw: flip_byte(raw, -1),
    "a byte changed": lambda raw: flip_byte(raw, len(raw) // 2),
    "compressed and cut": lambda raw: gzip.compress(gzip.decompress(raw)[:5000]),
}


@pytest.mark.parametrize("how", WRONG_ARCHIVES)
def test_a_damaged_archive_is_refused(small, tmp_path, how, monkeypatch, capsys):
    archive, root = pack(tmp_path / "photos.tgz", small), tmp_path / "root"
    archive.write_bytes(WRONG_ARCHIVES[how](archive.read_bytes()))
    status, lines = command(monkeypatch, capsys, archive, "--root", root)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"data.py: {archive}")
    assert "damaged" in lines[0] and made_in(root) == set()


def header_of_a_member(raw):
    return raw.index(f"imagenette2-160/val/{TENCH}/1.png".encode())


WRONG_OTHERS = {  # a .tar has no checksum but of its headers
    "tar cut in a photo": (".tar", lambda raw: raw[: header_of_a_member(raw) + 600]),
    "tar cut between two photos": (".tar", lambda raw: raw[: header_of_a_member(raw)]),
    "tar with a damaged header": (".tar", lambda raw: flip_byte(raw, header_of_a_member(raw))),
    "zip cut": (".zip", lambda raw: raw[: len(raw) // 2]),
    "zip without its last byte": (".zip", lambda raw: raw[:-1]),
    "zip with a byte changed": (".zip", lambda raw: flip_byte(raw, raw.index(b"PK", 4000) - 50)),
    "encrypted zip": (".zip", lambda raw: raw.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")),
}


@pytest.mark.parametrize("how", WRONG_OTHERS)
def test_a_damaged_tar_or_zip_is_refused(small, tmp_path, how):
    suffix, spoil = WRONG_OTHERS[how]
    archive, root = pack(tmp_path / f"photos{suffix}", small), tmp_path / "root"
    good = archive.read_bytes()
    archive.write_bytes(spoil(good))
    assert archive.read_bytes() != good
    with pytest.raises(data.DataError, match="cut short, damaged"):
        data.prepare(archive, root)
    assert made_in(root) == set()


LINK = "imagenette2-160/link"
EVIL = {  # members that would be written or point outside, or are no plain files; `out` is a folder outside
    "parent": lambda out: [member("imagenette2-160/../../../outside", size=3)],
    "parent alone": lambda out: [member("../outside", size=3)],
    "absolute": lambda out: [member(f"{out}/outside", size=3)],
    "symlink out": lambda out: [member(LINK, tarfile.SYMTYPE, "../../../outside")],
    "absolute symlink": lambda out: [member(LINK, tarfile.SYMTYPE, f"{out}/outside")],
    "through a symlink": lambda out: [member(LINK, tarfile.SYMTYPE, "../.."), member(f"{LINK}/outside", size=3)],
    "hard link out": lambda out: [member(LINK, tarfile.LNKTYPE, "../../secret.txt")],
    "absolute hard link": lambda out: [member(LINK, tarfile.LNKTYPE, f"{out}/secret.txt")],
    "hard link to nothing": lambda out: [member(LINK, tarfile.LNKTYPE, "imagenette2-160/none")],
    "fifo": lambda out: [member("imagenette2-160/pipe", tarfile.FIFOTYPE)],
    "device": lambda out: [member("imagenette2-160/device", tarfile.CHRTYPE)],
    "file in a file": lambda out: [member("imagenette2-160/a", size=3), member("imagenette2-160/a/b", size=3)],
    "file that is a folder": lambda out: [member("imagenette2-160/train", size=3)],
}


@pytest.mark.parametrize("what", EVIL)
def test_an_evil_archive_is_refused(small, tmp_path, what):
    out, root = tmp_path / "out", tmp_path / "out" / "root"
    out.mkdir()
    (out / "secret.txt").write_text("secret")
    with pytest.raises(data.DataError, match="photos.tgz"):
        data.prepare(pack(tmp_path / "photos.tgz", small, *EVIL[what](out)), root)
    assert made_in(root) == set() and {p.name for p in out.iterdir()} == {"secret.txt", "root"}
    assert (out / "secret.txt").stat().st_nlink == 1 and not (tmp_path / "outside").exists()


EVIL_ZIP = {  # name, UNIX mode
    "parent": ("a/../../outside", 0o100644),
    "absolute": ("/outside", 0o100644),
    "backslashes": ("a\\..\\..\\outside", 0o100644),
    "drive": ("C:outside", 0o100644),
    "symlink": ("a/link", 0o120777),
    "device": ("a/device", 0o020644),
}


@pytest.mark.parametrize("what", EVIL_ZIP)
def test_an_evil_zip_is_refused(small, tmp_path, what):
    out, root, (name, mode) = tmp_path / "out", tmp_path / "out" / "root", EVIL_ZIP[what]
    out.mkdir()
    archive = pack(tmp_path / "photos.zip", small)
    with zipfile.ZipFile(archive, "a") as file:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        file.writestr(info, b"../../outside")
    with pytest.raises(data.DataError, match="photos.zip (would write outside|holds a link or a device)"):
        data.prepare(archive, root)
    assert made_in(root) == set() and {p.name for p in out.iterdir()} == {"root"}


@pytest.mark.parametrize("suffix", [".tgz", ".tar", ".zip"])
@pytest.mark.parametrize("limit", ["files", "bytes"])
def test_an_archive_beyond_all_measure_is_refused(small, tmp_path, monkeypatch, limit, suffix):
    usage = shutil.disk_usage(tmp_path)
    if limit == "files":
        monkeypatch.setattr(data, "MAX_FILES", 30)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=data.SPARE_BYTES + 5000))
    with pytest.raises(data.DataError, match="holds more than fits here"):
        data.prepare(pack(tmp_path / f"photos{suffix}", small), tmp_path / "root")
    assert made_in(tmp_path / "root") == set()


def test_an_archive_of_something_else_is_refused(small, tmp_path):
    shutil.rmtree(small / "train" / TENCH)
    with pytest.raises(data.DataError, match=f"photos.tgz cannot be used: .*val/{TENCH} is a class that"):
        data.prepare(pack(tmp_path / "photos.tgz", small), tmp_path / "root")
    assert made_in(tmp_path / "root") == set()


# ---------------------------------------------------------------- the download


PAYLOAD = random.Random(0).randbytes(600_000)
MD5 = hashlib.md5(PAYLOAD).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `payload` on 127.0.0.1. replies: how to answer each request in turn, the last one again and again;
    requests: the Range of each request that came, None without."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.payload, self.replies, self.requests = PAYLOAD, ["ranges"], []
        self.url = f"http://127.0.0.1:{self.server_port}/photos.tgz"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        how = server.replies[min(len(server.requests), len(server.replies) - 1)]
        server.requests.append(wanted)
        if isinstance(how, int):
            return self.send_error(how)
        start = int(wanted[len("bytes=") : -1]) if wanted and how != "no ranges" else 0
        body = server.payload[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if how == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(Server()) as server:
        yield server


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between the tries, in seconds, written down instead of slept."""
    pauses = []
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def fetch(server, tmp_path, pauses):
    """Download the payload; `kept` bytes of it have come in an earlier try."""

    def call(kept=None, md5=MD5, url=None):
        target = tmp_path / "photos.tgz"
        if kept is not None:
            (tmp_path / "photos.tgz.part").write_bytes(kept)
        data.download(url or server.url, target, len(PAYLOAD), md5, timeout=10)
        return target.read_bytes()

    return call


def test_download(fetch, server, tmp_path):
    assert fetch() == PAYLOAD
    assert server.requests == [None] and os.listdir(tmp_path) == ["photos.tgz"]


def test_download_goes_on_where_it_stopped(fetch, server, tmp_path):
    assert fetch(kept=PAYLOAD[:1000]) == PAYLOAD
    assert server.requests == ["bytes=1000-"] and os.listdir(tmp_path) == ["photos.tgz"]


def test_a_complete_part_needs_no_request(fetch, server):
    assert fetch(kept=PAYLOAD) == PAYLOAD and server.requests == []


def test_download_from_a_server_without_ranges(fetch, server):
    server.replies = ["no ranges"]
    assert fetch(kept=PAYLOAD[:1000]) == PAYLOAD and server.requests == ["bytes=1000-"]


def test_a_missing_file_is_not_asked_for_twice(fetch, server, pauses, tmp_path):
    server.replies = [404]
    with pytest.raises(data.DataError, match="answers 404 .*DATA="):
        fetch()
    assert server.requests == [None] and pauses == [] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(fetch, server, pauses, status):
    server.replies = [status, status, "ranges"]
    assert fetch() == PAYLOAD
    assert len(server.requests) == 3 and len(pauses) == 2 and 0 < pauses[0] < pauses[1]


def test_a_server_that_stays_down_is_given_up(fetch, server):
    server.replies = [503]
    with pytest.raises(data.DataError, match="cannot download .*DATA="):
        fetch()
    assert 1 < len(server.requests) < 20


def test_a_cut_connection_is_taken_up_again(fetch, server):
    server.replies = ["cut", "cut", "ranges"]
    assert fetch() == PAYLOAD
    assert server.requests == [None, "bytes=300000-", "bytes=450000-"]


def test_what_came_before_giving_up_is_kept(fetch, server, tmp_path):
    server.replies = ["cut", 500]
    with pytest.raises(data.DataError, match="300,000 of 600,000 bytes are kept"):
        fetch()
    assert os.listdir(tmp_path) == ["photos.tgz.part"]
    server.replies = ["ranges"]
    assert fetch() == PAYLOAD and server.requests[-1] == "bytes=300000-"


@pytest.mark.parametrize("kept", [None, b"of another file", PAYLOAD + b"and more"])
def test_a_wrong_checksum_is_removed(fetch, tmp_path, kept):
    md5 = "0" * 32 if kept is None else MD5
    with pytest.raises(data.DataError, match="md5 .*try again"):
        fetch(kept, md5)
    assert os.listdir(tmp_path) == []


def test_a_file_that_does_not_end_is_not_fetched_to_its_end(fetch, server, tmp_path):
    server.payload = PAYLOAD * 20
    with pytest.raises(data.DataError, match="try again"):
        fetch()
    assert os.listdir(tmp_path) == []


def test_no_network(fetch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/photos.tgz"
    with pytest.raises(data.DataError, match="cannot download .*1,000 of 600,000 bytes are kept.*DATA=") as error:
        fetch(kept=PAYLOAD[:1000], url=url)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["photos.tgz.part"]


def test_without_a_source_the_public_archive_is_fetched_once(small, server, tmp_path, monkeypatch):
    archive = pack(tmp_path / "public.tgz", small).read_bytes()
    server.payload, server.url = archive, server.url.replace("photos", "imagenette2-160")
    digest = hashlib.md5(archive).hexdigest()
    for name, value in (("URL", server.url), ("ARCHIVE_BYTES", len(archive)), ("ARCHIVE_MD5", digest)):
        monkeypatch.setattr(data, name, value)
    folder = data.prepare(root=tmp_path / "root")
    assert folder == tmp_path / "root" / "imagenette2-160" and contents(folder) == contents(small)
    assert data.prepare(root=tmp_path / "root") == folder and len(server.requests) == 1


# ---------------------------------------------------------------- the command, the disk, the file alone


def test_the_command_gets_everything_ready(small, monkeypatch, capsys, no_decoding):
    assert command(monkeypatch, capsys, small)[0] == 0
    assert made_in(small) == {"train.pixels", "val.pixels"}
    no_decoding()
    assert command(monkeypatch, capsys, small)[0] == 0


def test_the_command_refuses_a_damaged_photo(small, run, monkeypatch, capsys):
    photo = damage(small, "truncated")
    assert refused(run("data.py", small), photo, "--skip-bad")
    status, lines = command(monkeypatch, capsys, small, "--skip-bad")
    assert status == 0 and any("1 damaged photos left out" in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk_keeps_the_older_pixels(small, run):
    """A limit on the size of a file fails as a full disk does: in the middle of writing."""
    import resource

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    data.load(small, "train")
    before = (small / "train.pixels").read_bytes()
    assert len(before) > 4096
    change(small / "train" / TENCH / "0.png")
    assert refused(run("data.py", small, preexec_fn=full), "train.pixels")
    assert made_in(small) == {"train.pixels"} and (small / "train.pixels").read_bytes() == before


def test_a_full_disk_leaves_nothing_half_unpacked(small, tmp_path, monkeypatch, capsys):
    archive = pack(tmp_path / "photos.tgz", small)
    real, written = shutil.copyfileobj, Counter()

    def full(*arguments, **options):
        written["files"] += 1
        if written["files"] == 7:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    status, lines = command(monkeypatch, capsys, archive, "--root", tmp_path / "root")
    assert status == 2 and len(lines) == 1 and "No space left on device" in lines[0]
    assert made_in(tmp_path / "root") == set()


def test_atomic_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with data.atomic(path) as file:
        file.write(b"old")
        assert not path.exists()  # not before it is complete
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(failure)) as error:
            with data.atomic(path) as file:
                file.write(b"new")
                raise failure
        assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"
        assert not isinstance(failure, OSError) or error.value.filename == str(path)  # which file, the disk never says


ALONE = import_alone("data") + """
[(images, labels)] = data.eval_batches(data.from_arrays([torch.zeros(4, 6, 3, dtype=torch.uint8)]), 8, 1)
print(json.dumps([data.__file__, sorted(project), os.listdir(), list(images.shape)]))
"""


def test_the_file_works_alone(tmp_path):
    shutil.copy(REPO / "data.py", tmp_path)
    alone = subprocess.run([sys.executable, "-I", "-B", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout) == [str(tmp_path / "data.py"), [], ["data.py"], [1, 3, 8, 8]]
