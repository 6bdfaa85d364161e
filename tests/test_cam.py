"""cam.py: the maps against a loop and a gradient, the colours against OKLab."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    OTHER_SHAPES,
    REPO,
    grey_photo,
    noise_photo,
    other_shape,
    randn,
    refused,
    seeded,
    untrained,
)
from PIL import Image, ImageDraw
from torch import nn

import cam
import models

# ---------------------------------------------------------------- maps


def test_map_equals_a_naive_loop():
    features, weight = randn(2, 5, 3, 4), randn(6, 5, seed=1)
    maps = cam.class_activation_maps(features, weight)
    assert maps.shape == (2, 6, 3, 4)
    for n, k, y, x in np.ndindex(*maps.shape):
        cell = sum(float(weight[k, c]) * float(features[n, c, y, x]) for c in range(5))
        assert float(maps[n, k, y, x]) == pytest.approx(cell, abs=1e-12)


def test_map_equals_features_times_the_gradient_of_the_logit():
    network = untrained("cnn")
    features = network.features(randn(2, 3, 48, 64)).detach().requires_grad_()
    maps = cam.class_activation_maps(features, network.head.weight)
    logits = network.head(features.mean((2, 3)))
    h, w = features.shape[2:]
    for k in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), features, retain_graph=True)
        assert torch.allclose(maps[:, k], (features * gradient).sum(1) * h * w, atol=1e-12)


def test_map_is_linear_in_features_and_in_weight():
    f, g = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    v, w = randn(6, 5, seed=2), randn(6, 5, seed=3)
    maps = cam.class_activation_maps
    assert torch.allclose(maps(2 * f - 3 * g, w), 2 * maps(f, w) - 3 * maps(g, w), atol=1e-12)
    assert torch.allclose(maps(f, 2 * v - 3 * w), 2 * maps(f, v) - 3 * maps(f, w), atol=1e-12)


@pytest.mark.parametrize("arch", ["cnn", "resnet18"])
def test_mean_of_the_map_plus_bias_is_the_logit(arch):
    network, images = untrained(arch), randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, logits = cam.MapsAndLogits(network)(images)
        assert torch.allclose(logits, network(images), rtol=0, atol=1e-10)
        assert torch.allclose(maps.mean((2, 3)) + network.head.bias, logits, rtol=0, atol=1e-10)
        cam.check_identity(maps, logits, network.head.bias)
    assert maps.std() > 0 and maps.dtype == torch.double


def test_contrast_is_antisymmetric_and_explains_the_difference_of_logits():
    network = untrained("cnn")
    with torch.no_grad():
        maps, logits = cam.MapsAndLogits(network)(randn(2, 3, 48, 64))
    bias, contrast = network.head.bias, cam.contrast_map(maps, 3, 7)
    assert torch.equal(contrast, -cam.contrast_map(maps, 7, 3))
    difference = logits[:, 3] - logits[:, 7] - (bias[3] - bias[7])
    assert torch.allclose(contrast.mean((1, 2)), difference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("what", OTHER_SHAPES)
def test_identity_refuses_logits_that_are_not_of_the_mean(what):
    network, images = other_shape(what, torch.double), randn(2, 3, 48, 64)
    maps, _ = cam.MapsAndLogits(network)(images)
    with pytest.raises(ValueError, match="miss the logits"):
        cam.check_identity(maps, network(images), network.head.bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_identity_refuses_features_that_are_not_finite(bad):
    features, weight, bias = randn(2, 5, 3, 4), randn(6, 5, seed=1), randn(6, seed=2)
    features[1, 2, 0, 0] = bad
    maps = cam.class_activation_maps(features, weight)
    with pytest.raises(ValueError, match="not finite"):
        cam.check_identity(maps, features.mean((2, 3)) @ weight.T + bias, bias)


@pytest.mark.parametrize("arch", ["cnn", "resnet18"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_identity_allows_for_the_rounding_of_its_type_and_no_more(arch, dtype):
    network, images = untrained(arch).to(dtype), randn(2, 3, 64, 96).to(dtype)
    with torch.no_grad():
        maps, logits = cam.MapsAndLogits(network)(images)
        cam.check_identity(maps, logits, network.head.bias)
        with pytest.raises(ValueError, match="miss the logits"):
            cam.check_identity(maps, logits + 0.1 * logits.abs().max(), network.head.bias)


def test_identity_holds_under_autocast():
    network, images = untrained("cnn").float(), randn(2, 3, 64, 96).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps, logits = cam.MapsAndLogits(network)(images)
    assert maps.dtype == torch.bfloat16
    cam.check_identity(maps, logits, network.head.bias)


def test_identity_of_a_head_without_bias():
    features, weight = randn(2, 5, 3, 4), randn(6, 5, seed=1)
    maps = cam.class_activation_maps(features, weight)
    cam.check_identity(maps, features.mean((2, 3)) @ weight.T, None)
    cam.check_identity(maps, features.mean((2, 3)) @ weight.T)


@pytest.mark.parametrize("features, weight", [
    ((2, 5), (6, 5)), ((5, 3, 4), (6, 5)), ((2, 5, 3, 4), (6, 4)), ((2, 5, 3, 4), (6, 5, 1, 1))])
def test_pooled_features_and_heads_of_another_kind_are_refused(features, weight):
    with pytest.raises(ValueError, match="linear head .* not"):
        cam.class_activation_maps(torch.zeros(features), torch.zeros(weight))


def test_export_gives_the_same_maps_and_logits(tmp_path):
    network, images = cam.MapsAndLogits(untrained("cnn")).eval(), randn(2, 3, 48, 64)
    torch.export.save(torch.export.export(network, (images,)), tmp_path / "cam.pt2")
    again = torch.export.load(tmp_path / "cam.pt2").module()
    with torch.no_grad():
        for here, there in zip(network(images), again(images), strict=True):
            assert torch.allclose(here, there, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- upsampling


def slow_bilinear(cells, size):
    """Each pixel's centre lies among four centres of cells; beyond the outermost it is level."""
    (h, w), out = cells.shape, np.zeros(size)
    for y, x in np.ndindex(*size):
        at_y = min(max((y + 0.5) * h / size[0] - 0.5, 0), h - 1)
        at_x = min(max((x + 0.5) * w / size[1] - 0.5, 0), w - 1)
        for j, i in np.ndindex(h, w):
            out[y, x] += float(cells[j, i]) * max(0, 1 - abs(at_y - j)) * max(0, 1 - abs(at_x - i))
    return out


SHAPES = [((2, 3), (9, 20)), ((3, 2), (20, 9)), ((1, 1), (4, 7)), ((4, 4), (4, 4)),
          ((5, 3), (7, 50))]


@pytest.mark.parametrize(("cells", "size"), SHAPES)
def test_upsampling_equals_the_slow_one_and_pillow(cells, size):
    maps = randn(2, *cells)
    pixels = cam.upsample(maps, size)
    assert pixels.shape == (2, *size)
    for n in range(2):
        assert np.allclose(pixels[n], slow_bilinear(maps[n], size), atol=1e-12)
        pillow = Image.fromarray(maps[n].float().numpy())
        pillow = pillow.resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.allclose(pixels[n], np.array(pillow), atol=1e-5)


def test_upsampling_keeps_constants_corners_and_mirror_images():
    maps = randn(1, 3, 5)
    pixels = cam.upsample(maps, (31, 40))
    assert torch.allclose(cam.upsample(torch.full((1, 3, 5), 0.7), (31, 40)), torch.tensor(0.7))
    corners = (..., [0, 0, -1, -1], [0, -1, 0, -1])
    assert torch.allclose(pixels[corners], maps[corners])
    assert torch.allclose(cam.upsample(maps.flip(2), (31, 40)), pixels.flip(2), atol=1e-12)
    assert torch.allclose(cam.upsample(maps.flip(1), (31, 40)), pixels.flip(1), atol=1e-12)


# ---------------------------------------------------------------- colour


def to_linear(rgb):
    """uint8 sRGB (..., 3) as linear light, 0..1."""
    rgb = torch.as_tensor(rgb).double() / 255
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab_of_linear(linear):
    """OKLab by Ottosson's own matrices, the way that cam.py does not go."""
    to_lms = torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929],
                           [0.2119034982, 0.6806995451, 0.1073969566],
                           [0.0883024619, 0.2817188376, 0.6299787005]], dtype=torch.double)
    to_lab = torch.tensor([[0.2104542553, 0.7936177850, -0.0040720468],
                           [1.9779984951, -2.4285922050, 0.4505937099],
                           [0.0259040371, 0.7827717662, -0.8086757660]], dtype=torch.double)
    return (linear @ to_lms.T).clamp(min=0) ** (1 / 3) @ to_lab.T


def to_oklab(rgb):
    return oklab_of_linear(to_linear(rgb))


def chroma(rgb):
    return to_oklab(rgb)[..., 1:].norm(dim=-1)


KNOWN = [  # OKLab of sRGB colours, as CSS Color 4 lists them
    ((1, 0, 0), (255, 255, 255)), ((0, 0, 0), (0, 0, 0)), ((0.59987, 0, 0), (128, 128, 128)),
    ((0.62796, 0.22486, 0.12585), (255, 0, 0)), ((0.86644, -0.23389, 0.17950), (0, 255, 0)),
    ((0.45201, -0.03246, -0.31153), (0, 0, 255)),
]


@pytest.mark.parametrize(("lab", "rgb"), KNOWN)
def test_oklab_to_srgb_gives_published_colours(lab, rgb):
    shown = cam.oklab_to_srgb(torch.tensor(lab).float()) * 255
    assert (shown - torch.tensor(rgb)).abs().max() < 0.2
    # the oracle of the tests below:
    assert torch.allclose(to_oklab(rgb), torch.tensor(lab).double(), atol=1e-4)


def test_oklab_to_srgb_clips_what_no_screen_shows():
    rgb = cam.oklab_to_srgb(torch.tensor([[0.7, 0.4, 0.4], [1.3, 0, 0], [0.5, -0.4, 0]]))
    assert rgb.min() >= 0 and rgb.max() <= 1


def test_lightness_is_the_inverse_for_greys():
    greys = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 3)
    light = cam.lightness(greys)
    lab = torch.stack([light, torch.zeros_like(light), torch.zeros_like(light)], -1)
    assert torch.equal((cam.oklab_to_srgb(lab) * 255).round().to(torch.uint8), greys)
    assert torch.allclose(light.double(), to_oklab(greys)[..., 0], atol=1e-4)


def test_lightness_of_colours_is_that_of_their_luminance():
    primaries = torch.tensor([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=torch.uint8)
    luminance = torch.tensor([[0.2126, 0.7152, 0.0722]])
    assert torch.allclose(cam.lightness(primaries), luminance ** (1 / 3), atol=1e-4)


def test_zero_map_is_the_photo_in_grey():
    photo = noise_photo((20, 30))
    photo[:10, :, 1:] = photo[:10, :, :1]
    shown = cam.overlay(photo, torch.zeros(20, 30), 1.0)
    assert shown.shape == photo.shape and shown.dtype == torch.uint8
    assert (shown.max(2).values == shown.min(2).values).all()
    order = cam.lightness(photo).flatten().argsort()  # what is lighter stays lighter
    levels = shown[..., 0].flatten()[order].int()
    assert (levels.diff() >= 0).all() and len(levels.unique()) > 100


def test_sign_decides_the_hue():
    adds, takes = (to_oklab(cam.overlay(grey_photo(128), torch.tensor([[value]]), 1.0))[0, 0]
                   for value in (1.0, -1.0))
    turn = torch.rad2deg(torch.atan2(adds[2], adds[1]) - torch.atan2(takes[2], takes[1]))
    assert 120 < turn.remainder(360) < 240
    assert adds[1] > 0 and adds[2] > 0  # orange: towards red and yellow
    assert takes[2] < 0  # blue


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [64, 96, 128])  # where a screen can show all colours of the scale
def test_colourfulness_is_proportional_to_the_map(sign, level):
    steps = torch.linspace(0, 1, 21)
    measured = chroma(cam.overlay(grey_photo(level, (1, 21)), sign * 3 * steps[None], 3.0))[0]
    assert torch.allclose(measured, cam.CHROMA * steps.double(), atol=0.03 * cam.CHROMA)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0, 30, 220, 255])
def test_colourfulness_grows_even_on_black_and_white(sign, level):
    steps = sign * torch.linspace(0, 1, 21)[None]
    measured = chroma(cam.overlay(grey_photo(level, (1, 21)), steps, 1.0))[0]
    assert (measured.diff() > 0).all()


def test_values_beyond_the_scale_are_clipped():
    photo = noise_photo((5, 6))
    for end in (2.0, -2.0):
        at_end, beyond = (cam.overlay(photo, torch.full((5, 6), v), 2.0) for v in (end, 10 * end))
        assert torch.equal(at_end, beyond)


def test_overlay_leaves_photo_and_map_as_they_are():
    photo, pixels = noise_photo((5, 6)), randn(5, 6).float()
    before = photo.clone(), pixels.clone()
    cam.overlay(photo, pixels, 1.0)
    assert torch.equal(photo, before[0]) and torch.equal(pixels, before[1])


COLOUR_BLIND = {  # Machado et al. 2009, severity 1, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868],
                   [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968],
                     [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("eyes", COLOUR_BLIND)
def test_both_signs_and_zero_differ_to_colour_blind_eyes(eyes):
    photo = torch.arange(0, 256, 5, dtype=torch.uint8)[None, :, None].expand(1, -1, 3).contiguous()
    matrix = torch.tensor(COLOUR_BLIND[eyes], dtype=torch.double)
    pictures = (cam.overlay(photo, torch.full(photo.shape[:2], value), 1.0)
                for value in (1.0, 0.0, -1.0))
    adds, zero, takes = (oklab_of_linear((to_linear(picture) @ matrix.T).clamp(0, 1))
                         for picture in pictures)
    assert (adds - takes).norm(dim=-1).min() > 0.15  # OKLab: 0.02 is a difference that is just seen
    assert (adds - zero)[..., 1:].norm(dim=-1).min() > 0.04
    assert (takes - zero)[..., 1:].norm(dim=-1).min() > 0.04


def test_scale_ends_at_a_quantile():
    maps = torch.linspace(-1, 1, 200).reshape(2, 10, 10)
    assert cam.scale_of(maps) == pytest.approx(0.98, abs=0.01)
    maps[1, 9] = 50  # strong cells elsewhere do not make the others grey
    assert cam.scale_of(maps / 2) < 26 and cam.scale_of(torch.zeros(1, 2, 2)) > 0
    sparse = torch.zeros(1, 10, 10)
    sparse[0, 0, 0] = 3
    assert cam.scale_of(sparse) == 3


# ---------------------------------------------------------------- the line


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(60, 80), (70, 50)])
def test_line_runs_around_what_focus_measures(seed, size):
    cells = randn(5, 6, seed=seed).float()
    pixels = cam.upsample(cells[None], size)[0]
    inside = pixels > pixels.max() / 2  # as score.py's focus
    fits = [-F.max_pool2d(-part[None].float(), 5, 1, 2)[0] for part in (inside, ~inside)]
    wide = [F.max_pool2d(part[None], 25, 1, 12)[0] > 0 for part in fits]  # 12 px or less from that
    parts = cam.connected(fits[0] > 0, inside) | cam.connected(fits[1] > 0, ~inside)
    line = cam.outline(grey_photo(128, size), cells, 2.0, 4.0).float().mean(2)
    crossed = [inside.narrow(d, 0, size[d] - 1) != inside.narrow(d, 1, size[d] - 1) for d in (0, 1)]
    for d in (0, 1):  # dark wherever the region begins or ends ...
        darker = torch.minimum(line.narrow(d, 0, size[d] - 1), line.narrow(d, 1, size[d] - 1))
        both = (wide[0] & wide[1] & parts).narrow(d, 0, size[d] - 1) & crossed[d]
        both &= parts.narrow(d, 1, size[d] - 1)
        assert both.sum() > 0.4 * crossed[d].sum() > 0 and (darker[both] < 90).all()
    near = [F.max_pool2d(part[None, None].float(), 9, 1, 4)[0, 0] for part in (inside, ~inside)]
    assert (line[(near[0] * near[1]) == 0] >= 128).all()  # ... and nowhere else


def test_what_is_narrower_than_the_line_has_none():
    cells = torch.zeros(60, 60)
    cells[5:25, 5:25] = 1
    cells[14:16, 14:16] = 0  # a hole
    cells[38:40, 10:50] = 1  # a sliver
    cells[44:46, 10:30] = 1  # another, near what is wide
    cells[50:56, 10:50] = 1
    changed = (cam.outline(grey_photo(128, (60, 60)), cells, 1.0, 2.4) != 128).any(2)
    edges = torch.zeros(60, 60, dtype=torch.bool)
    for top, bottom, left, right in ((5, 25, 5, 25), (50, 56, 10, 50)):
        for row in (top - 1, top, bottom - 1, bottom):
            edges[row, left:right] = True
        for column in (left - 1, left, right - 1, right):
            edges[top:bottom, column] = True
    around = F.max_pool2d(edges[None].float(), 5, 1, 2)[0] > 0
    assert changed[edges].all() and not changed[~around].any()


@pytest.mark.parametrize("seed", range(3))
def test_connected_parts_are_those_of_a_flood(seed):
    region = randn(40, 50, seed=seed) > -0.2  # a maze of rows and columns
    start = torch.zeros_like(region)
    start[tuple(region.nonzero()[len(region.nonzero()) // 2])] = True
    image = Image.fromarray((region.numpy() * 255).astype(np.uint8)).copy()
    y, x = start.nonzero()[0].tolist()
    ImageDraw.floodfill(image, (x, y), 100)
    flooded = torch.from_numpy(np.array(image) == 100)
    assert torch.equal(cam.connected(start, region), flooded) and flooded.sum() > 1


@pytest.mark.parametrize("cells", [-torch.ones(3, 3), torch.zeros(3, 3), -randn(3, 3).abs()])
def test_a_map_that_is_nowhere_positive_has_no_line(cells):
    photo = noise_photo((20, 30))
    assert torch.equal(cam.outline(photo, cells), photo)


def test_line_shows_on_black_and_on_white():
    cells = torch.zeros(5, 5)
    cells[2, 2] = 1
    for level in (0, 255):
        shown = cam.outline(grey_photo(level, (90, 90)), cells, 2.0, 6.0)
        assert (shown < 60).any() and (shown > 200).any()


# ---------------------------------------------------------------- photos and maps of every kind


def test_photos_are_tensors_arrays_or_pil_images():
    photo, cells = noise_photo((40, 60)), randn(3, 4)
    kinds = [photo, photo.numpy(), Image.fromarray(photo.numpy()),
             photo.flip(2).numpy()[..., ::-1]]  # from BGR, as OpenCV reads it
    shown = [cam.overlay(kind, cells, 1.0) for kind in kinds]
    assert all(torch.equal(shown[0], other) for other in shown)
    lined = [cam.outline(kind, cells) for kind in kinds]
    assert all(torch.equal(lined[0], other) for other in lined)


BAD_PHOTOS = [torch.zeros(40, 60, 3), torch.zeros(2, 3, 40, 60), torch.zeros(40, 60), "photo.jpg",
              torch.zeros(40, 60, 3, dtype=torch.int64), Image.new("RGBA", (60, 40)), None]


@pytest.mark.parametrize("bad", BAD_PHOTOS, ids=range(len(BAD_PHOTOS)))
def test_what_is_no_photo_is_refused(bad):
    for draw in (cam.as_photo, lambda photo: cam.overlay(photo, randn(3, 4), 1.0)):
        with pytest.raises(ValueError, match="a photo is .*, not "):
            draw(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_maps_are_of_every_float_type_with_or_without_a_gradient(dtype):
    photo, cells = noise_photo((40, 60)), randn(3, 4).to(dtype)
    expected = cells.float()
    scale = cam.scale_of(expected)
    for given in (cells, cells.clone().requires_grad_() * 1):
        assert cam.scale_of(given) == scale
        for draw in (lambda m: cam.overlay(photo, m, scale), lambda m: cam.outline(photo, m)):
            assert torch.equal(draw(given), draw(expected)) and not draw(given).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_maps_on_a_gpu_give_the_same_pictures():
    photo, cells = noise_photo((40, 60)), randn(3, 4).float()
    assert cam.scale_of(cells.cuda()) == cam.scale_of(cells)
    for given in (photo, photo.cuda()):
        assert torch.equal(cam.overlay(given, cells.cuda(), 1.0), cam.overlay(photo, cells, 1.0))
        assert torch.equal(cam.outline(given, cells.cuda()), cam.outline(photo, cells))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4), torch.zeros(4), torch.tensor([[torch.nan]]),
                                 torch.tensor([[1.0, torch.inf]])])
def test_a_batch_and_numbers_that_are_not_finite_are_no_map(bad):
    for draw in (lambda m: cam.overlay(grey_photo(128, (9, 9)), m, 1.0),
                 lambda m: cam.outline(grey_photo(128, (9, 9)), m)):
        with pytest.raises(ValueError, match="one map .* of finite numbers"):
            draw(bad)


@pytest.mark.filterwarnings("error::UserWarning")
def test_photos_may_be_read_only_or_turned_round():
    photo, cells = np.asarray(Image.fromarray(noise_photo((40, 60)).numpy())), randn(3, 4)
    expected = cam.overlay(photo.copy(), cells, 1.0)
    for given in (photo, photo[::-1].copy()[::-1]):
        assert torch.equal(cam.overlay(given, cells.numpy(), 1.0), expected)


def test_constants_follow_the_device():
    lab = torch.zeros(2, 3, device="meta")  # a device other than the processor's, without hardware
    assert cam.oklab_to_srgb(lab).device == lab.device
    assert cam.lightness(torch.zeros(2, 2, 3, device="meta")).device == lab.device


# ---------------------------------------------------------------- the file alone


ALONE = """
import os, sys, torch
state, before = torch.get_rng_state(), set(os.listdir())
import cam
assert torch.equal(state, torch.get_rng_state()) and set(os.listdir()) - before <= {"__pycache__"}
project = {name[:-3] for name in os.listdir(REPO) if name.endswith(".py")} - {"cam"}
assert "page" in project and not project & set(sys.modules)
assert cam.__file__ == os.path.abspath("cam.py")
network = torch.nn.Module()
network.features, network.head = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Linear(8, 10)
images, photo = torch.randn(2, 3, 160, 160), torch.zeros(120, 90, 3, dtype=torch.uint8)
lines = [line.strip() for line in cam.__doc__.splitlines() if " = " in line and line[:4] == "    "]
assert len(lines) == 3, lines
exec("\\n".join(lines))
assert maps.shape == (2, 10, 10, 10) and pixels.shape == photo.shape
cam.check_identity(maps, network.head(features.mean((2, 3))), network.head.bias)
"""


SNIPPET = """
import torchvision, cam
from PIL import Image, ImageOps

weights = torchvision.models.ResNet18_Weights.DEFAULT
network = torchvision.models.resnet18(weights=weights)

photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
image = weights.transforms(resize_size=224)(photo.resize((224, 224)))  # the whole photo
maps, logits = cam.explain(network, image[None])  # (1, 1000, 7, 7), in logits; (1, 1000)
best = maps[0, logits[0].argmax()]
Image.fromarray(cam.overlay(photo, best, cam.scale_of(best)).numpy()).save("cam.png")
"""


def test_file_works_alone_and_its_import_does_nothing(tmp_path):
    """The docstring's lines, and the README's for a network of torchvision."""
    assert len(SNIPPET.strip().split("\n\n")[-1].splitlines()) == 5  # from photo to picture
    shutil.copy(REPO / "cam.py", tmp_path)
    Image.fromarray(noise_photo((90, 140)).numpy()).save(tmp_path / "photo.jpg")
    offline = ("from torchvision import models\nbuild = models.resnet18\n"
               "models.resnet18 = lambda **_: build()\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    code = f"REPO = {str(REPO)!r}{ALONE}{offline}{SNIPPET}"
    for command in (["-W", "error::UserWarning", "-c", code], ["cam.py", "explain", "photo.jpg"]):
        result = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                                capture_output=True, text=True)
        if command[0] == "cam.py":
            assert refused(result, "No module named 'figures'")
        else:
            assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.size == (140, 90)


def test_python_in_the_readme_runs(demo, one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, name in ((demo, "data/imagenette2-160"), (one, "runs/cnn/best.pt")):
        (tmp_path / name).parent.mkdir(parents=True)
        os.symlink(path, name)
    network, _ = models.load(one)
    images = torch.randn(2, 3, 48, 64, generator=seeded())
    names = {"torch": torch, "network": network, "images": images}
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    blocks.remove(SNIPPET.lstrip())  # which the test above runs
    assert len([exec(block, names) for block in blocks]) >= 1
    with torch.no_grad():
        maps = cam.class_activation_maps(network.features(names["images"]), network.head.weight)
    assert torch.allclose(names["maps"], maps, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_maps_of_one_cell_are_explained(arch):
    """At 32 px the features are one cell, and so are those of layers before them."""
    network, images = untrained(arch), torch.rand(2, 3, 32, 32, dtype=torch.double)
    maps, logits = cam.explain(network, images)
    assert maps.shape[2:] == (1, 1)
    assert torch.allclose(logits, network(images))
    original = models.torchvision_models.get_model(arch, weights=None).double()
    assert cam.explain(original, images)[0].shape == (2, 1000, 1, 1)


# ---------------------------------------------------------------- explain


def own_network(pool="mean", seed=0):
    """A network as a student writes one."""
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU())
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5))

        def forward(self, x):
            features = self.body(x)
            pooled = {"mean": lambda: features.mean((2, 3)), "pool": lambda: self.pool(features),
                      "max": lambda: features.amax((2, 3))}[pool]()
            return self.classifier(pooled.flatten(1))

    torch.manual_seed(seed)
    return Network()


def hooks_of(network):
    return sum(len(module._forward_hooks) for module in network.modules())


@pytest.mark.parametrize("pool", ["mean", "pool"])
def test_explain_finds_the_features_of_a_network_and_leaves_it_as_it_was(pool):
    network, images = own_network(pool), torch.randn(2, 3, 48, 64, generator=seeded())
    network.body[1].eval()  # a frozen layer in a network that is training
    before = ([module.training for module in network.modules()],
              {name: values.clone() for name, values in network.state_dict().items()})
    maps, logits = cam.explain(network, images)
    assert [module.training for module in network.modules()] == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in network.state_dict().items())
    assert not hooks_of(network) and not maps.requires_grad
    network.eval()
    head = network.classifier[1]
    assert torch.equal(logits, network(images))
    assert torch.equal(maps, cam.class_activation_maps(network.body(images), head.weight))
    assert maps.shape == (2, 5, 6, 8)
    assert torch.allclose(maps.mean((2, 3)) + head.bias, logits, atol=1e-5)


def test_a_map_of_one_cell_is_explained_too():
    maps, logits = cam.explain(own_network("pool"), torch.randn(2, 3, 8, 8, generator=seeded()))
    assert maps.shape == (2, 5, 1, 1)


class Functional(nn.Module):
    """A network of functions where a module could stand, and a second head that is not asked."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.auxiliary = nn.Linear(8, 5), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.last(torch.relu(self.first(x)))).mean((2, 3)))


def test_explain_sees_what_is_no_module():
    torch.manual_seed(0)
    network, images = Functional(), torch.randn(2, 3, 32, 48, generator=seeded())
    maps, logits = cam.explain(network, images)
    assert maps.shape == (2, 5, 8, 12) and torch.equal(logits, network(images))
    assert torch.allclose(maps.mean((2, 3)) + network.head.bias, logits, atol=1e-5)


def test_maps_of_other_classes_than_the_logits_are_refused():
    with pytest.raises(ValueError, match=r"maps \(2, 5, 3, 3\) are not of logits \(2, 4\)"):
        cam.check_identity(torch.zeros(2, 5, 3, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "mobilenet_v2", "googlenet"])
def test_explain_takes_torchvisions_networks(arch):
    torch.manual_seed(0)
    more = {"init_weights": True} if arch == "googlenet" else {}  # it has branches, `build` none
    network = torchvision.models.get_model(arch, num_classes=7, **more)
    images = torch.randn(1, 3, 96, 128, generator=seeded())
    maps, logits = cam.explain(network, images)
    with torch.no_grad():
        assert torch.equal(logits, network.eval()(images))
    assert maps.shape == (1, 7, 3, 4)
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.allclose(maps.mean((2, 3)) + head.bias, logits, atol=1e-3)


def test_explain_takes_a_camnet_and_its_looks():
    network = untrained("cnn").float()
    images = torch.randn(1, 3, 64, 64, generator=seeded())
    for seen in (network, models.with_looks(network, [32, 64]), torch.compile(network)):
        maps, _ = cam.explain(seen, images)
        plain = getattr(seen, "_orig_mod", seen)
        expected = cam.class_activation_maps(plain.features(images), network.head.weight)
        assert torch.allclose(maps, expected, atol=1e-5)


def test_explain_sees_what_lies_between_features_and_head():
    class Network(models.CAMNet):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 5))
            self.neck = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.head(self.neck(self.features(x)).mean((2, 3)))

    swin = torchvision.models.swin_t(num_classes=5)  # its features are (N, h, w, C)
    for network in (Network(), swin):
        maps, logits = cam.explain(network, torch.randn(2, 3, 64, 96, generator=seeded()))
        assert torch.allclose(maps.mean((2, 3)) + network.head.bias, logits, atol=1e-4)


class Pooled(nn.Module):
    """Pooling stands in `features`, and another linear layer is asked after the head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class Projected(Pooled):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 2)

    def forward(self, x):
        logits = super().forward(x)
        self.projected = self.project(self.features(x).flatten(1))
        return logits


@pytest.mark.parametrize("kind", [Pooled, Projected])
def test_explain_sees_what_is_pooled_in_features_and_which_layer_says_the_logits(kind):
    torch.manual_seed(0)
    network, images = kind(), torch.randn(2, 3, 48, 64, generator=seeded())
    maps, logits = cam.explain(network, images)
    assert maps.shape == (2, 5, 6, 8) and torch.equal(logits, network(images))
    expected = cam.class_activation_maps(network.features[:2](images), network.head.weight)
    assert torch.allclose(maps, expected, atol=1e-6)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: own_network("max"), "miss the logits"),
    (lambda: nn.Conv2d(3, 8, 3), "a Conv2d has no maps"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 64, 5)), "a Sequential has no maps"),
    (lambda: torchvision.models.squeezenet1_1(), "a SqueezeNet has no maps"),
])
def test_explain_refuses_other_networks_and_leaves_them_as_they_were(make, words):
    network = make()
    with pytest.raises(ValueError, match=words):
        cam.explain(network, torch.randn(2, 3, 48, 64, generator=seeded()))
    assert all(module.training for module in network.modules()) and not hooks_of(network)


def test_explain_refuses_a_head_called_by_keyword_and_no_images():
    class ByKeyword(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](x).mean((2, 3)))

    network = ByKeyword(nn.Conv2d(3, 8, 3), nn.Linear(8, 5))
    with pytest.raises(ValueError, match="a ByKeyword has no maps"):
        cam.explain(network, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no image"):
        cam.explain(own_network(), torch.zeros(0, 3, 48, 64))


def test_explain_leaves_no_hook_where_a_network_fails():
    network = own_network().train()
    with pytest.raises(RuntimeError):
        cam.explain(network, torch.zeros(1, 4, 48, 64))
    assert not hooks_of(network) and all(module.training for module in network.modules())
