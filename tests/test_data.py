"""data.py against Pillow, and alone: batches, decoding, the packed file."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    change,
    draw_classes,
    encoded,
    import_alone,
    made_in,
    noise,
    on_fake_cuda,
    refused,
)
from PIL import ExifTags, Image, ImageFile

import data
import folders

ROUNDING = 1.05  # grey levels: Pillow rounds to uint8 twice, after the columns and after the rows


MEAN, STD = (255 * torch.tensor(v) for v in (data.MEAN, data.STD))


def ragged():
    """Photos of four sizes, none square but one."""
    sizes = [(37, 61), (80, 50), (64, 64), (21, 28)]
    return data.from_arrays([noise(*size) for size in sizes], range(len(sizes)))


def plain_colours(count):
    """Photos of one colour each, which tells them apart however they are cropped: photo i is
    grey level i."""
    images = [torch.full((9 + i % 3, 12, 3), i, dtype=torch.uint8) for i in range(count)]
    return data.from_arrays(images, range(count))


def grey_levels(images):
    """A batch (B, 3, h, w) as it was before normalisation: (B, h, w, 3), 0 to 255."""
    return images.permute(0, 2, 3, 1) * STD + MEAN


def batch_of(photos, size=24, seed=0, **options):
    """All photos as one training batch."""
    generator = torch.Generator().manual_seed(seed)
    [batch] = data.train_batches(photos, size, len(photos), generator, **options)
    return batch


# ---------------------------------------------------------------- photos


def test_photos_in_memory_come_as_arrays_of_any_layout():
    photo = noise(6, 4)
    turned = photo[..., ::-1].copy()[..., ::-1]
    kinds = [photo, torch.from_numpy(photo), Image.fromarray(photo), turned]
    assert all(np.array_equal(image, photo) for image in data.from_arrays(kinds))


@pytest.mark.parametrize("other", [noise(6, 4)[..., 0], np.zeros((6, 4, 4), np.uint8),
                                   noise(6, 4) / 255, noise(6, 4).transpose(2, 0, 1)])
def test_photos_in_memory_of_another_shape_or_type_are_refused(other):
    with pytest.raises(ValueError, match="photo 1 is .*uint8 in RGB"):
        data.from_arrays([noise(6, 4), other])


@pytest.mark.parametrize("labels", [[1], [-1, 0], [0.0, 1.0], [[0], [1]]])
def test_labels_that_are_not_of_these_photos_are_refused(labels):
    with pytest.raises(ValueError, match="2 photos need as many labels"):
        data.from_arrays([noise(6, 4)] * 2, labels)
    with pytest.raises(ValueError, match="no photo"):
        data.from_arrays([])
    assert data.from_arrays([noise(6, 4)], torch.tensor([1], dtype=torch.int32)).labels.dtype == (
        torch.int64)


def test_a_picture_in_memory_is_turned_as_its_file_says(tmp_path):
    image = Image.fromarray(noise(6, 4))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        (photo,) = data.from_arrays([stored])
    assert np.array_equal(photo, data.decode(tmp_path / "a.png")) and photo.shape == (4, 6, 3)


def test_a_subset_by_a_mask():
    photos = data.from_arrays([noise(6, 4)] * 4, [0, 2, 1, 2])
    chosen = photos.subset(photos.labels == 2)
    assert chosen.names == ["1", "3"] and chosen.labels.tolist() == [2, 2]


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "train" / "cat").mkdir(parents=True)

    def closed(folder, onerror):
        return onerror(PermissionError(13, "Permission denied", str(folder)))

    monkeypatch.setattr(os, "walk", closed)
    with pytest.raises(PermissionError, match="cat"):
        data.class_folders(tmp_path / "train")


def test_subset_shares_the_pixels():
    photos = ragged()
    some = photos.subset(torch.tensor([2, 0]))
    assert len(some) == 2 and some.names == ["2", "0"] and some.labels.tolist() == [2, 0]
    assert torch.equal(some[1], photos[0]) and some.pixels.data_ptr() == photos.pixels.data_ptr()


def test_photos_take_the_labels_of_a_network():
    photos = data.from_arrays([noise(6, 4)] * 4, [0, 2, 1, 1])
    photos = replace(photos, classes=["cat", "dog", "fish"])
    other = photos.relabelled(["fish", "cat", "dog"])
    assert other.classes == ["fish", "cat", "dog"] and photos.classes == ["cat", "dog", "fish"]
    assert [other.classes[k] for k in other.labels] == [photos.classes[k] for k in photos.labels]
    with pytest.raises(ValueError, match="fish.*eel, emu"):
        photos.relabelled(["cat", "dog", "emu", "eel"])


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
        pillow = Image.fromarray(photos[index[i]].numpy())
        pillow = pillow.resize((size, size), Image.BILINEAR, (x, y, x + w, y + h))
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
    assert coarse.dtype == torch.bfloat16
    assert coarse.is_contiguous(memory_format=torch.channels_last)
    error = grey_levels(coarse.float()) - grey_levels(exact)
    assert error.abs().mean() < 0.35 and error.mean().abs() < 0.1 and error.abs().max() < 4


def test_mirroring_mirrors():
    photos = ragged()
    index, zero = torch.arange(len(photos)), torch.zeros(len(photos))
    boxes = torch.stack([zero, zero, photos.height, photos.width], 1)
    images, mirrored = (data.resample(photos, index, boxes, 24, torch.full_like(index, f).bool())
                        for f in (0, 1))
    assert torch.allclose(images.flip(3), mirrored, atol=1e-5)
    assert not torch.allclose(images, mirrored, atol=0.1)


def test_random_boxes_are_what_they_say():
    photos = data.from_arrays([noise(60, 80), noise(80, 60), noise(64, 64)])
    index = torch.arange(3).repeat(2000)
    y, x, h, w = data.random_boxes(photos, index, torch.Generator().manual_seed(0), 0.25).T
    height, width = photos.height[index], photos.width[index]
    assert min(y.min(), x.min()) >= 0
    assert (y + h - height).max() < 1e-3 and (x + w - width).max() < 1e-3
    share, aspect = h * w / (height * width), w / h
    assert 0.2499 <= share.min() < 0.26 and 0.95 < share.max() <= 1.0001  # all of the range
    assert 0.7499 <= aspect.min() < 0.76 and 1.32 < aspect.max() <= 1.3334
    assert (y / height).max() > 0.4 and (x / width).max() > 0.4  # anywhere in the photo


def test_random_boxes_stay_inside_a_panorama():
    photos, index = data.from_arrays([noise(20, 100), noise(100, 20)]), torch.arange(2).repeat(500)
    y, x, h, w = data.random_boxes(photos, index, torch.Generator().manual_seed(0)).T
    assert min(y.min(), x.min()) >= 0 and min(h.min(), w.min()) > 1
    assert (y + h - photos.height[index]).max() < 1e-3
    assert (x + w - photos.width[index]).max() < 1e-3


def test_plain_boxes_are_slices():
    photos, index = ragged().subset(torch.arange(3)), torch.arange(3).repeat(100)
    boxes = data.plain_boxes(photos, index, 32, torch.Generator().manual_seed(0))
    images = grey_levels(data.resample(photos, index, boxes, 32))
    assert torch.equal(boxes, boxes.round())
    for i, image, (y, x, h, w) in zip(index, images, boxes.int().tolist(), strict=True):
        assert (h, w) == (32, 32) and min(y, x) >= 0
        assert torch.allclose(image, photos[i][y : y + 32, x : x + 32].float(), atol=1e-3)
    assert set(boxes[index == 0, 0].tolist()) == set(range(37 - 32 + 1))  # every place, edges too


def test_plain_boxes_refuse_a_photo_smaller_than_the_crop():
    with pytest.raises(ValueError, match="3 has 28 x 21 pixels, fewer than the 24 x 24 crop"):
        batch_of(ragged(), 24, plain=True)


@pytest.mark.parametrize("plain", [False, True])
def test_an_epoch_shows_every_photo_once_with_its_label(plain, monkeypatch):
    monkeypatch.setattr(data, "COLOURS", 0.0)
    photos, seen, generator = plain_colours(23), [], torch.Generator().manual_seed(0)
    for images, labels in data.train_batches(photos, 8, 5, generator, plain=plain):
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
    assert (drawn.amin(0) < -0.95 * data.COLOURS).all()
    assert (drawn.amax(0) > 0.95 * data.COLOURS).all()


def test_crops_change_their_colours_and_plain_pieces_do_not():
    grey = data.from_arrays([torch.full((20, 20, 3), 128, dtype=torch.uint8)] * 50)
    values = [grey_levels(batch_of(grey, 8, plain=plain)[0])[:, 0, 0, 0] for plain in (False, True)]
    assert values[0].std() > 5 and torch.allclose(values[1], torch.tensor(128.0), atol=1e-2)


def test_a_small_last_batch_joins_the_one_before():
    for count, batch_size, lengths in ((22, 5, [5, 5, 5, 7]), (2, 1, [1, 1])):
        batches = data.train_batches(plain_colours(count), 8, batch_size, torch.Generator())
        assert [len(labels) for _, labels in batches] == lengths


def test_batches_have_a_length_and_begin_anew_in_each_pass():
    photos = plain_colours(23)
    for batch_size in range(1, 25):
        train, val = (make(photos, 8, batch_size) for make in (data.train_batches,
                                                               data.eval_batches))
        orders = [[int(label) for _, labels in train for label in labels] for _ in range(2)]
        assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(23))
        assert len(list(train)) == len(train) and len(list(val)) == len(val)


def test_without_a_generator_torchs_global_one_decides():
    photos, orders = plain_colours(23), []
    for _ in range(2):
        torch.manual_seed(3)
        orders.append([labels.tolist() for _, labels in data.train_batches(photos, 8, 5)])
    generator = torch.Generator().manual_seed(3)
    given = [labels.tolist() for _, labels in data.train_batches(photos, 8, 5, generator)]
    assert orders[0] == orders[1] == given


def test_the_generator_decides_everything():
    photos, state = ragged(), torch.get_rng_state()
    (a, a_labels), (b, b_labels), (c, _) = (batch_of(photos, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and torch.equal(a_labels, b_labels) and not torch.equal(a, c)
    orders = {tuple(batch_of(photos, seed=seed)[1].tolist()) for seed in range(10)}
    assert len(orders) > 1 and torch.equal(torch.get_rng_state(), state)


def test_about_half_is_mirrored():
    ramp = torch.arange(0, 240, 6, dtype=torch.uint8)  # brighter to the right
    ramp = ramp.view(1, 40, 1).expand(40, 40, 3)
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
        pillow = Image.fromarray(photos[i].numpy()).resize((24, 24), Image.BILINEAR)  # all of it
        assert np.abs(image.numpy() - np.asarray(pillow, float)).max() <= ROUNDING


@pytest.mark.parametrize("batches", [lambda p: data.train_batches(p, 24, 4, torch.Generator()),
                                     lambda p: data.eval_batches(p, 24, 4)], ids=["train", "eval"])
def test_batches_are_float32_and_channels_last(batches):
    for images, labels in batches(ragged()):
        assert images.shape == (4, 3, 24, 24)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_large_batch_is_resampled_in_pieces(monkeypatch):
    photos, flip = ragged(), torch.tensor([True, False, True, False])
    boxes = data.random_boxes(photos, torch.arange(4), torch.Generator().manual_seed(0))
    whole = data.resample(photos, torch.arange(4), boxes, 24, flip)
    padded, zeros = [], torch.zeros

    def watched(*shape, **options):
        padded.append(shape)
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", watched)
    monkeypatch.setattr(data, "MAX_BATCH", 2 * 80 * 64)
    pieces = data.resample(photos, torch.arange(4), boxes, 24, flip)
    assert torch.allclose(pieces, whole, atol=1e-5)
    assert pieces.is_contiguous(memory_format=torch.channels_last)
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
@pytest.mark.parametrize(
    "batches", [lambda p: data.train_batches(p, 16, 4, torch.Generator()),
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


def test_photos_that_do_not_fit_are_cut_in_float32_on_the_cpu(monkeypatch):
    photos, seen, bmm = ragged().subset(torch.arange(4)), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: seen.append(a.dtype) or bmm(a, b))
    for device, products in (("meta", torch.float32), ("cpu", torch.bfloat16)):
        there = replace(photos, device=torch.device(device))
        ((images, _),) = data.train_batches(there, 16, 4, torch.Generator(), dtype=torch.bfloat16)
        assert images.dtype == torch.bfloat16 and images.device.type == device
        assert seen.pop() == products


def test_the_fake_device_notices_what_asks_it(fake_device):
    there = torch.empty(3, device="cuda")
    for ask in (int, lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: t.cpu(),
                lambda t: t.max().item()):
        with pytest.raises(Exception):  # noqa: B017
            ask(there[0] if ask is int else there)
    with pytest.raises(AssertionError, match="waits"):
        torch.zeros(3).to("cuda")


@pytest.mark.parametrize(("device", "free", "fits"), [
    ("cuda", 1000, True), ("cuda", 899, False), ("mps", None, True), ("mps", "huge", False),
    ("cpu", 0, True)])
def test_pixels_move_to_a_device_if_they_fit(monkeypatch, device, free, fits):
    photos, moved = data.from_arrays([noise(10, 15)]), []  # 450 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(device) or tensor)
    if free == "huge":
        photos = replace(photos, pixels=torch.empty(1, 1, dtype=torch.uint8).expand(2**31, 2))
    there = photos.to(device)
    assert there.device == torch.device(device) and moved == [torch.device(device)] * fits
    assert there.height is photos.height


def test_images_for_mps_are_contiguous(monkeypatch):
    """There, channels-last gave wrong gradients (pytorch#175189)."""
    photos = data.from_arrays([torch.zeros(9, 12, 3, dtype=torch.uint8)] * 4)
    assert not next(iter(data.eval_batches(photos, 8, 4)))[0].is_contiguous()
    monkeypatch.setattr(data, "send", lambda tensor, device: tensor)
    ((images, _),) = data.eval_batches(replace(photos, device=torch.device("mps")), 8, 4)
    assert images.is_contiguous()


# ---------------------------------------------------------------- decoding


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
    "palette, half transparent": (palette(), "PNG", {"transparency": b"\xff\x00\x80"},
                                  [RED, WHITE, (127, 127, 255)]),
    "GIF": (palette(), "GIF", {}, [RED, GREEN, BLUE]),
    "GIF, transparent": (palette(), "GIF", {"transparency": 1}, [RED, WHITE, BLUE]),
    "RGBA": (Image.fromarray(np.array([[(9, 8, 7, 255), (9, 8, 7, 0)]], np.uint8)), "PNG", {},
             [(9, 8, 7), WHITE]),
    "RGB, one colour transparent": (Image.new("RGB", (1, 1), (9, 8, 7)), "PNG",
                                    {"transparency": (9, 8, 7)}, [WHITE]),
    "LA": (Image.fromarray(np.array([[(100, 255), (100, 0)]], np.uint8)), "PNG", {},
           [(100,) * 3, WHITE]),
    "16 bits": (Image.fromarray(np.array([[257 * 100, 65535]], np.uint16)), "PNG", {},
                [(100,) * 3, WHITE]),
    "32 bits, of 8": (Image.fromarray(np.array([[7, 200]], np.int32)), "TIFF", {},
                      [(7,) * 3, (200,) * 3]),
    "16 bits, of 8": (Image.fromarray(np.array([[20, 239]], np.uint16)), "PNG", {},
                      [(20,) * 3, (239,) * 3]),
    "16 bits TIFF": (Image.fromarray(np.array([[257 * 7]], np.uint16)), "TIFF", {}, [(7,) * 3]),
}


@pytest.mark.parametrize("mode", MODES)
def test_photos_in_memory_are_those_in_files(mode):
    image, kind, options, _ = MODES[mode]
    with Image.open(encoded(image, kind, **options)) as opened:
        opened.load()
        photos = data.from_arrays([opened])
    assert np.array_equal(photos[0], data.decode(encoded(image, kind, **options)))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, kind, options, expected = MODES[mode]
    array = data.decode(encoded(image, kind, **options))
    assert array.shape == (image.height, image.width, 3) and array.dtype == np.uint8
    assert np.abs(array[0].astype(int) - expected).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("most", [1, 255])
def test_a_photo_of_floats_is_no_black_photo(tmp_path, most):
    levels = np.linspace(0, most, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "floats.tif")
    decoded = data.decode(tmp_path / "floats.tif")[..., 0].ravel().astype(int)
    assert np.abs(decoded - np.arange(256)).max() <= 1


# How a camera stores an upright photo (EXIF tag 274): turned one way, to be shown turned back.
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


def exif_block(tag, kind, orientation=6):
    """An EXIF block with an orientation, and a tag of one value of any of TIFF's 13 types."""
    entries = [(274, 3, 1, orientation), (tag, kind, 1, 50 if kind in (5, 10, 11, 12, 13) else 1)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return (head + table + bytes(4)).ljust(56, b"\0") + struct.pack("<II", 72, 1) + bytes(32)


@pytest.mark.parametrize("tag", [282, 283, 306, 700, 34665])
@pytest.mark.parametrize("kind", range(1, 14))
@pytest.mark.filterwarnings("ignore")
def test_exif_tags_of_unusual_types_refuse_no_photo(tag, kind):
    for orientation, shape in ((6, (20, 12, 3)), (1, (12, 20, 3))):
        block = exif_block(tag, kind, orientation)
        file = encoded(Image.fromarray(noise(12, 20)), "JPEG", exif=block)
        assert data.decode(file).shape == shape


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_refuses_no_photo():
    for kind in ("JPEG", "PNG", "WEBP"):
        for block in (b"XX*\0", b"II*\0\x08\0\0\0\xff"):
            file = encoded(Image.fromarray(noise(12, 20)), kind, exif=b"Exif\0\0" + block)
            assert data.decode(file).shape == (12, 20, 3)


@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_photo_is_reduced_like_an_upright_one(orientation):
    upright = np.kron(noise(2, 3), np.ones((64, 64, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    array = data.decode(encoded(stored, "JPEG", exif=exif, quality=95), side=32)
    assert array.shape == (32, 48, 3)
    middles = array[8::16, 8::16].astype(int)  # of its blocks
    assert np.abs(middles - upright[32::64, 32::64]).max() <= 6


def test_a_jpeg_is_reduced_by_its_decoder_first(monkeypatch):
    file, sizes = encoded(Image.new("RGB", (1600, 1200)), "JPEG"), []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda image: sizes.append(image.size) or load(image))
    assert data.decode(file, side=150).shape == (150, 200, 3)
    assert max(sizes) == (200, 150)


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="photo.png .*11 x 10 pixels"):
        data.decode(encoded(Image.new("RGB", (11, 10)), "PNG"), "photo.png")


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])  # phones send them under any name
def test_a_format_that_is_not_read_is_not_called_damage(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(4) + b"ftypheic" + bytes(100))
    with pytest.raises(ValueError, match=f"{name} .*convert it to JPEG"):
        data.decode(tmp_path / name)


def test_few_decoded_photos_wait_in_memory(tmp_path, monkeypatch):
    folder, decode, begun = draw_classes(tmp_path / "ab", a=200, b=2), data.decode, []
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(data, "decode", lambda *given: begun.append(1) or decode(*given))
    for done, _ in enumerate(data.decode_all([p for p in folder.rglob("*.png")], 256)):
        assert len(begun) <= done + 12
    assert done == 201


@pytest.mark.parametrize("error", [MemoryError("no"), OSError(24, "Too many open files")])
def test_what_a_machine_lacks_is_no_damage_of_a_photo(tmp_path, monkeypatch, error):
    def decode(*given):
        raise error

    paths = sorted(draw_classes(tmp_path / "ab", a=2, b=2).rglob("*.png"))
    monkeypatch.setattr(data, "decode", decode)
    with pytest.raises(type(error)):
        data.pack(io.BytesIO(), paths, map(str, paths), [0] * len(paths), skip_bad=True)


# ---------------------------------------------------------------- simple folders


def test_a_simple_folder_is_read_as_by_the_guarded_loader(demo, no_decoding):
    """Both read and write the same file of pixels."""
    for split in ("train", "val"):
        photos, simple = folders.load(demo, split), data.load(demo, split)
        assert simple.fingerprint == photos.fingerprint and simple.classes == photos.classes
        assert torch.equal(simple.pixels, photos.pixels)
        assert torch.equal(simple.labels, photos.labels)


def test_a_simple_folder_is_decoded_once_and_anew_where_it_changed(small, monkeypatch):
    first, decoded, decode = data.load(small), [], data.decode
    monkeypatch.setattr(data, "decode", lambda *given: decoded.append(given) or decode(*given))
    assert torch.equal(data.load(small).pixels, first.pixels) and not decoded
    changed = small / "train" / next(iter(data.CLASSES)) / "0.png"
    change(changed)
    assert np.array_equal(data.load(small)[0], Image.open(changed)) and len(decoded) == 20
    changed.rename(changed.with_name("z.png"))
    assert data.load(small).names[1].endswith("z.png")
    changed.with_name("z.png").unlink()
    assert len(data.load(small)) == 19
    assert min(data.load(small, "val", side=8)[0].shape[:2]) == 8
    assert made_in(small) == {"train.pixels", "val.pixels"}


def test_a_home_is_found(small, monkeypatch):
    monkeypatch.setenv("HOME", str(small.parent))
    monkeypatch.setenv("USERPROFILE", str(small.parent))
    assert len(data.load("~/small")) == 20


def test_a_photo_that_may_not_be_read_is_named(monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match=r"a.png cannot be read \(Permission denied\): make it"):
        data.decode("a.png")


def test_a_simple_folder_that_is_wrong_is_refused(small):
    (small / "train" / next(iter(data.CLASSES)) / "0.png").write_bytes(b"no photo")
    with pytest.raises(ValueError, match="0.png cannot be read"):
        data.load(small)
    assert made_in(small) == set()
    (small / "train" / next(iter(data.CLASSES))).rename(small / "train" / "other")
    with pytest.raises(ValueError, match="val has classes that train/ lacks: n01440764"):
        data.load(small, "val")
    with pytest.raises(OSError, match="test"):
        data.load(small, "test")


# ---------------------------------------------------------------- the file alone


ALONE = import_alone("data") + """
photos = data.load(".")
images, labels = next(iter(data.train_batches(photos, 8, 20)))
others = sorted(project | {"archives", "files", "folders"} & set(sys.modules))
print(json.dumps([data.__file__, others, sorted(os.listdir()), list(images.shape)]))
"""


def test_the_file_works_alone(small, tmp_path):
    shutil.copy(REPO / "data.py", small)
    command = [sys.executable, "-I", "-B", "-c", ALONE]
    alone = subprocess.run(command, cwd=small, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    inside = ["data.py", "train", "train.pixels", "val"]
    assert json.loads(alone.stdout) == [str(small / "data.py"), [], inside, [20, 3, 8, 8]]


def test_the_command_says_what_the_file_lacks(tmp_path):
    shutil.copy(REPO / "data.py", tmp_path)
    alone = subprocess.run([sys.executable, "-B", "data.py"], cwd=tmp_path, capture_output=True,
                           text=True)
    assert refused(alone, "No module named 'folders'")


def test_pieces_cut_in_one_gather_are_those_cut_one_by_one():
    sides = [(40, 30), (33, 64), (17, 90)]
    photos = data.from_arrays([torch.randint(256, (*side, 3), dtype=torch.uint8) for side in sides])
    index = torch.tensor([2, 0, 1, 0])
    top, rows = torch.tensor([3, 0, 10, 39]), torch.tensor([14, 40, 5, 1])
    left, columns = torch.tensor([0, 29, 60, 4]), torch.tensor([90, 1, 4, 20])
    one_by_one, at_once = (cut(photos, index, (top, rows), (left, columns), (64, 96))
                           for cut in (data.sliced, data.gathered))
    for a, b, r, c in zip(one_by_one, at_once, rows, columns, strict=True):
        assert torch.equal(a[:r, :c], b[:r, :c])
        assert not a[r:].any() and not a[:, c:].any()


def test_batches_gathered_are_batches_sliced(monkeypatch):
    photos = data.from_arrays([torch.randint(256, (48, w, 3), dtype=torch.uint8)
                               for w in (30, 64, 90)])
    batches = [next(iter(data.train_batches(photos, 24, 3, torch.Generator().manual_seed(1))))[0]]
    monkeypatch.setattr(data, "sliced", data.gathered)
    batches += [next(iter(data.train_batches(photos, 24, 3, torch.Generator().manual_seed(1))))[0]]
    assert torch.equal(*batches)


def test_linked_folders_inside_a_class_are_counted_as_left_out(tmp_path):
    """They may loop, so they are not followed; but it is said."""
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "a" / "more")
    classes, others = data.class_folders(tmp_path)
    assert not classes["a"] and [os.path.basename(path) for path in others] == ["more"]
