"""cam.py: the maps against a loop and a gradient, the colours against OKLab, the pictures pixel by pixel."""

import os
import re
import shutil
import subprocess
import sys
import unicodedata
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, refused
from PIL import Image, ImageDraw
from torch import nn

import cam
import data
import models

CLASSES = list(data.CLASSES.values())
SIZE = 32  # px, at which the tiny networks look


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.double)


def untrained(arch, seed=0):
    """A network whose maps are not all zero, in evaluation mode and float64: tests then need no tolerance."""
    torch.manual_seed(seed)
    network = models.build(arch)
    nn.init.normal_(network.head.weight)
    nn.init.normal_(network.head.bias)
    return network.double().eval()


def checkpoint(path, seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    network = models.cnn(len(classes))
    nn.init.normal_(network.head.weight)
    models.save(path, network, arch="cnn", classes=classes, mean=data.MEAN, std=data.STD, size=SIZE,
                settings={"frozen": False}, epoch=1, accuracy=0.5)
    return path


def facts_of(**other):
    """What a checkpoint of today says of itself."""
    return dict(arch="cnn", classes=CLASSES, mean=data.MEAN, std=data.STD, looks=[SIZE], accuracies={str(SIZE): 0.5},
                accuracy_on="val", accuracy_n=40, how="trained from scratch", settings={}, epoch=1) | other


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("one") / "best.pt", seed=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("two") / "best.pt", seed=2)


@pytest.fixture
def seen(monkeypatch):
    """What `compose` was given, call by call."""
    given, compose = [], cam.compose
    monkeypatch.setattr(cam, "compose", lambda *arguments: given.append(arguments) or compose(*arguments))
    return given


@pytest.fixture
def blocks(monkeypatch):
    """The blocks that `draw_page` was given, call by call."""
    given, draw = [], cam.draw_page
    monkeypatch.setattr(cam, "draw_page", lambda *arguments: given.append(arguments[0]) or draw(*arguments))
    return given


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("figure", ...): the command in this process, in an empty folder, as if it had been run: starting Python
    and torch anew takes seconds. What should have been a sentence and is an exception fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cam.py"])

    def call(*arguments):
        capsys.readouterr()
        status = 0
        try:
            cam.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return call


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
    f, g, v, w = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1), randn(6, 5, seed=2), randn(6, 5, seed=3)
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


class MaxPooled(models.CAMNet):
    def forward(self, x):
        return self.head(self.features(x).amax((2, 3)))


class NormedHead(nn.Linear):
    def forward(self, x):
        return super().forward(F.layer_norm(x, x.shape[1:]))


class HiddenHead(nn.Linear):
    def forward(self, x):
        return super().forward((x - 0.1).relu())


def other_shapes(dtype):
    good = untrained("cnn").to(dtype)
    networks = {"max pooling": MaxPooled(good.features, good.head)}
    for name, kind in (("layer norm", NormedHead), ("hidden layer", HiddenHead)):
        head = kind(good.head.in_features, len(CLASSES), dtype=dtype)
        head.load_state_dict(good.head.state_dict())
        networks[name] = models.CAMNet(good.features, head)
    return networks


@pytest.mark.parametrize("what", ["max pooling", "layer norm", "hidden layer"])
def test_identity_refuses_logits_that_are_not_of_the_mean(what):
    network, images = other_shapes(torch.double)[what], randn(2, 3, 48, 64)
    maps, _ = cam.MapsAndLogits(network)(images)
    with pytest.raises(cam.CamError, match="miss the logits"):
        cam.check_identity(maps, network(images), network.head.bias)


@pytest.mark.parametrize("what", ["max pooling", "layer norm", "hidden layer"])
def test_prediction_refuses_networks_of_another_shape(what):
    photo = torch.randint(256, (40, 50, 3), generator=seeded(), dtype=torch.uint8)
    with pytest.raises(cam.CamError, match="miss the logits"):
        cam.predict_with_maps(other_shapes(torch.float)[what].eval(), {"size": SIZE}, [photo])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_identity_refuses_features_that_are_not_finite(bad):
    features, weight, bias = randn(2, 5, 3, 4), randn(6, 5, seed=1), randn(6, seed=2)
    features[1, 2, 0, 0] = bad
    maps = cam.class_activation_maps(features, weight)
    with pytest.raises(cam.CamError, match="not finite"):
        cam.check_identity(maps, features.mean((2, 3)) @ weight.T + bias, bias)


def test_export_gives_the_same_maps_and_logits(tmp_path):
    network, images = cam.MapsAndLogits(untrained("cnn")).eval(), randn(2, 3, 48, 64)
    torch.export.save(torch.export.export(network, (images,)), tmp_path / "cam.pt2")
    again = torch.export.load(tmp_path / "cam.pt2").module()
    with torch.no_grad():
        for here, there in zip(network(images), again(images), strict=True):
            assert torch.allclose(here, there, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- upsampling


def slow_bilinear(cells, size):
    """Each pixel's centre lies among four centres of cells; beyond the outermost centres the map goes on level."""
    (h, w), out = cells.shape, np.zeros(size)
    for y, x in np.ndindex(*size):
        at_y = min(max((y + 0.5) * h / size[0] - 0.5, 0), h - 1)
        at_x = min(max((x + 0.5) * w / size[1] - 0.5, 0), w - 1)
        for j, i in np.ndindex(h, w):
            out[y, x] += float(cells[j, i]) * max(0, 1 - abs(at_y - j)) * max(0, 1 - abs(at_x - i))
    return out


SHAPES = [((2, 3), (9, 20)), ((3, 2), (20, 9)), ((1, 1), (4, 7)), ((4, 4), (4, 4)), ((5, 3), (7, 50))]


@pytest.mark.parametrize(("cells", "size"), SHAPES)
def test_upsampling_equals_the_slow_one_and_pillow(cells, size):
    maps = randn(2, *cells)
    pixels = cam.upsample(maps, size)
    assert pixels.shape == (2, *size)
    for n in range(2):
        assert np.allclose(pixels[n], slow_bilinear(maps[n], size), atol=1e-12)
        pillow = Image.fromarray(maps[n].float().numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.allclose(pixels[n], np.array(pillow), atol=1e-5)


def test_upsampling_keeps_constants_corners_and_mirror_images():
    maps = randn(1, 3, 5)
    pixels = cam.upsample(maps, (31, 40))
    assert torch.allclose(cam.upsample(torch.full((1, 3, 5), 0.7), (31, 40)), torch.tensor(0.7))
    assert torch.allclose(pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]], maps[:, [0, 0, -1, -1], [0, -1, 0, -1]])
    assert torch.allclose(cam.upsample(maps.flip(2), (31, 40)), pixels.flip(2), atol=1e-12)
    assert torch.allclose(cam.upsample(maps.flip(1), (31, 40)), pixels.flip(1), atol=1e-12)


# ---------------------------------------------------------------- colour


def to_linear(rgb):
    """uint8 sRGB (..., 3) as linear light, 0..1."""
    rgb = torch.as_tensor(rgb).double() / 255
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab_of_linear(linear):
    """OKLab by Ottosson's own matrices, the way that cam.py does not go."""
    to_lms = torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                           [0.0883024619, 0.2817188376, 0.6299787005]], dtype=torch.double)
    to_lab = torch.tensor([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                           [0.0259040371, 0.7827717662, -0.8086757660]], dtype=torch.double)
    return (linear @ to_lms.T).clamp(min=0) ** (1 / 3) @ to_lab.T


def to_oklab(rgb):
    return oklab_of_linear(to_linear(rgb))


def chroma(rgb):
    return to_oklab(rgb)[..., 1:].norm(dim=-1)


def grey_photo(level, shape=(1, 1)):
    return torch.full((*shape, 3), level, dtype=torch.uint8)


KNOWN = [  # OKLab of sRGB colours, as CSS Color 4 lists them
    ((1, 0, 0), (255, 255, 255)), ((0, 0, 0), (0, 0, 0)), ((0.59987, 0, 0), (128, 128, 128)),
    ((0.62796, 0.22486, 0.12585), (255, 0, 0)), ((0.86644, -0.23389, 0.17950), (0, 255, 0)),
    ((0.45201, -0.03246, -0.31153), (0, 0, 255)),
]


@pytest.mark.parametrize(("lab", "rgb"), KNOWN)
def test_oklab_to_srgb_gives_published_colours(lab, rgb):
    assert (cam.oklab_to_srgb(torch.tensor(lab).float()) * 255 - torch.tensor(rgb)).abs().max() < 0.2
    assert torch.allclose(to_oklab(rgb), torch.tensor(lab).double(), atol=1e-4)  # the oracle of the tests below


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
    assert torch.allclose(cam.lightness(primaries), torch.tensor([[0.2126, 0.7152, 0.0722]]) ** (1 / 3), atol=1e-4)


def test_zero_map_is_the_photo_in_grey():
    photo = torch.randint(256, (20, 30, 3), generator=seeded(), dtype=torch.uint8)
    photo[:10, :, 1:] = photo[:10, :, :1]
    shown = cam.overlay(photo, torch.zeros(20, 30), 1.0)
    assert shown.shape == photo.shape and shown.dtype == torch.uint8
    assert (shown.max(2).values == shown.min(2).values).all()
    order = cam.lightness(photo).flatten().argsort()  # what is lighter stays lighter, and nothing is flattened
    levels = shown[..., 0].flatten()[order].int()
    assert (levels.diff() >= 0).all() and len(levels.unique()) > 100


def test_sign_decides_the_hue():
    adds, takes = (to_oklab(cam.overlay(grey_photo(128), torch.tensor([[v]]), 1.0))[0, 0] for v in (1.0, -1.0))
    turn = torch.rad2deg(torch.atan2(adds[2], adds[1]) - torch.atan2(takes[2], takes[1])).remainder(360)
    assert 120 < turn < 240
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
    measured = chroma(cam.overlay(grey_photo(level, (1, 21)), sign * torch.linspace(0, 1, 21)[None], 1.0))[0]
    assert (measured.diff() > 0).all()


def test_values_beyond_the_scale_are_clipped():
    photo = torch.randint(256, (5, 6, 3), generator=seeded(), dtype=torch.uint8)
    for end in (2.0, -2.0):
        at_end, beyond = (cam.overlay(photo, torch.full((5, 6), v), 2.0) for v in (end, 10 * end))
        assert torch.equal(at_end, beyond)


def test_overlay_leaves_photo_and_map_as_they_are():
    photo, pixels = torch.randint(256, (5, 6, 3), generator=seeded(), dtype=torch.uint8), randn(5, 6).float()
    before = photo.clone(), pixels.clone()
    cam.overlay(photo, pixels, 1.0)
    assert torch.equal(photo, before[0]) and torch.equal(pixels, before[1])


COLOUR_BLIND = {  # Machado et al. 2009, severity 1, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("eyes", COLOUR_BLIND)
def test_both_signs_and_zero_differ_to_colour_blind_eyes(eyes):
    photo = torch.arange(0, 256, 5, dtype=torch.uint8)[None, :, None].expand(1, -1, 3).contiguous()
    matrix = torch.tensor(COLOUR_BLIND[eyes], dtype=torch.double)
    adds, zero, takes = (
        oklab_of_linear((to_linear(cam.overlay(photo, torch.full(photo.shape[:2], v), 1.0)) @ matrix.T).clamp(0, 1))
        for v in (1.0, 0.0, -1.0)
    )
    assert (adds - takes).norm(dim=-1).min() > 0.15  # OKLab: 0.02 is a difference that is just seen
    assert (adds - zero)[..., 1:].norm(dim=-1).min() > 0.04
    assert (takes - zero)[..., 1:].norm(dim=-1).min() > 0.04


# ---------------------------------------------------------------- the figure, pixel by pixel

MAGENTA = (255, 0, 255)
DPI = 72  # a pixel is a point
PAGE = 16 / 2.54 * DPI  # px
RAGGED = [(40, 80), (90, 30), (50, 50)]  # height, width: wide, tall, square


def noise_photo(size, seed=0):
    return torch.randint(256, (*size, 3), generator=seeded(seed), dtype=torch.uint8)


def cam_row(maps, captions=None, right=None, label="network"):
    return cam.Row(label, maps, captions or ["caption"] * len(maps), right or [None] * len(maps))


def runs(hits):
    """The unbroken stretches of True in a line: [(first, how many), ...]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(hits, np.int8), [0]])))
    return [(int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]


def places(sizes, titles, rows, dpi=DPI):
    """Where `compose` puts things, found in the picture itself: for each column the photo's x, y, width, height, and
    of each row's map its y. Photos are magenta here and maps zero, so that both are easy to see."""
    photos = [torch.tensor(MAGENTA, dtype=torch.uint8).expand(*size, 3).contiguous() for size in sizes]
    plain = [row._replace(maps=torch.zeros_like(row.maps), right=[None] * len(sizes)) for row in rows]
    canvas = np.array(cam.compose(photos, titles, plain, dpi=dpi))
    grey = cam.overlay(photos[0][:1, :1], torch.zeros(1, 1), 1.0)[0, 0].numpy()
    magenta, found = (canvas == MAGENTA).all(2), []
    for x, width in runs(magenta.any(0)):
        ((y, height),) = runs(magenta[:, x : x + width].any(1))
        tops = [top for top, n in runs((canvas[:, x : x + width] == grey).all((1, 2))) if n == height]
        assert len(tops) == len(rows)
        found.append((x, y, width, height, tops))
    assert len(found) == len(sizes)
    return found


def test_figure_is_16_cm_wide_and_grows_by_rows_and_blocks():
    def size(photos, rows=1, dpi=DPI, **more):
        row = cam_row(randn(photos, 3, 3).float())
        return cam.compose([noise_photo((50, 50))] * photos, ["a"] * photos, [row] * rows, dpi=dpi, **more).size

    for photos in (4, 5, 10):
        assert 0.97 * PAGE <= size(photos)[0] <= PAGE + 1
    one, two, three = (size(10, rows)[1] for rows in (1, 2, 3))
    assert three - two == two - one > PAGE / 12
    assert np.allclose(size(10, 2, dpi=200), 2 * np.array(size(10, 2, dpi=100)), rtol=0.02)
    blocks = size(10, columns=5)
    assert blocks[0] == pytest.approx(size(5)[0], abs=2) and blocks[1] > 1.7 * size(5)[1]


def test_ragged_photos_have_one_height_and_fill_the_page():
    rows = [cam_row(randn(3, 3, 4).float())]
    found = places(RAGGED, ["wide", "tall", "square"], rows)
    assert len({h for _, _, _, h, _ in found}) == 1 and len({y for _, y, *_ in found}) == 1
    for (height, width), (_, _, w, h, _) in zip(RAGGED, found, strict=True):
        assert w / h == pytest.approx(width / height, rel=0.02)  # the aspect is kept
    assert found[0][0] == 0 and found[-1][0] + found[-1][2] > 0.95 * PAGE


def test_same_input_gives_the_same_bytes():
    def png():
        file, photos = BytesIO(), [noise_photo(size) for size in RAGGED]
        cam.compose(photos, ["a", "b", "c"], [cam_row(randn(3, 3, 4).float())], dpi=DPI).save(file, "PNG")
        return file.getvalue()

    assert png() == png()


def test_map_lies_over_the_photo_at_the_photo_s_size():
    photos = [noise_photo(size, seed) for seed, size in enumerate(RAGGED)]
    rows = [cam_row(-randn(3, 3, 4, seed=seed).abs().float()) for seed in (1, 2)]  # nowhere positive: no line
    canvas = np.array(cam.compose(photos, ["a", "b", "c"], rows, dpi=DPI))
    for i, (x, y, w, h, tops) in enumerate(places(RAGGED, ["a", "b", "c"], rows)):
        shown = canvas[y : y + h, x : x + w]
        for row, top in zip(rows, tops, strict=True):
            pixels = cam.upsample(row.maps[i : i + 1], (h, w))[0]
            over = cam.overlay(torch.from_numpy(shown), pixels, np.quantile(row.maps.abs(), 0.98))
            assert np.array_equal(canvas[top : top + h, x : x + w], over)


@pytest.mark.parametrize("size", [*RAGGED, (30, 300), (300, 30)])
@pytest.mark.parametrize(("y", "x"), [(1, 1), (3, 5), (2, 3)])
def test_hot_cell_is_coloured_where_it_is_in_the_photo(size, y, x):
    photo = grey_photo(0, size)
    photo[:, size[1] // 2 :] = 255  # black, then white
    hot = torch.zeros(1, 5, 7)
    hot[0, y, x] = -1  # takes away: no line in the way
    canvas = np.array(cam.compose([photo], ["a"], [cam_row(hot)], dpi=DPI)).astype(int)
    ((left, _, w, h, (top,)),) = places([size], ["a"], [cam_row(hot)])
    shown = canvas[top : top + h, left : left + w]
    colour = shown.max(2) - shown.min(2)
    weight = colour * (colour > 8)
    centre_y, centre_x = ((weight * at).sum() / weight.sum() for at in np.indices((h, w)) + 0.5)
    assert centre_y == pytest.approx((y + 0.5) / 5 * h, abs=0.02 * h + 0.5)
    assert centre_x == pytest.approx((x + 0.5) / 7 * w, abs=0.02 * w + 0.5)
    level = shown.mean(2)[0 if y > 1 else -1]  # a line without colour: the photo's edge is where it was
    assert level[: w // 2 - 3].max() < level[w // 2 + 3 :].min()


def test_a_row_has_one_scale():
    maps = -randn(1, 3, 4).float().abs().expand(3, 3, 4) * torch.tensor([1, 1, 0.5])[:, None, None]
    rows = [cam_row(maps), cam_row(10 * maps)]  # the second has its own
    titles = ["a", "b", "c"]
    canvas = np.array(cam.compose([noise_photo((40, 60))] * 3, titles, rows, dpi=DPI))
    tiles = [[canvas[top : top + h, x : x + w] for x, _, w, h, tops in places([(40, 60)] * 3, titles, rows)
              for top in tops[r : r + 1]] for r in (0, 1)]
    assert np.array_equal(tiles[0][0], tiles[0][1])
    assert chroma(tiles[0][2]).mean() == pytest.approx(0.5 * float(chroma(tiles[0][0]).mean()), rel=0.15)
    assert all(abs(a.astype(int) - b).max() <= 1 for a, b in zip(*tiles, strict=True))  # float32 rounds


def test_only_wrong_predictions_have_a_frame_in_the_colour_of_wrong():
    photos, maps = [noise_photo(size) for size in RAGGED], torch.ones(3, 2, 2)
    for wrong in range(3):
        right = [None if i == (wrong + 1) % 3 else i != wrong for i in range(3)]
        row = cam_row(maps, right=right)
        canvas = np.array(cam.compose(photos, ["a", "b", "c"], [row], dpi=DPI))
        for i, (x, _, w, h, (top,)) in enumerate(places(RAGGED, ["a", "b", "c"], [row])):
            around = (canvas[top - 1 : top + h + 1, max(0, x - 2) : x + w + 2] == cam.WRONG).all(2)
            if i == wrong:
                assert (around.sum(0) >= h).sum() >= 4 and (around.sum(1) >= w).sum() >= 4  # two thick lines each way
            else:
                assert not around.any()


@pytest.mark.parametrize("text", ["great crested grebe with a rather long name 100%", "IMG_20240101_123456789_HDR.jpg",
                                  "Donaudampfschifffahrtsgesellschaftskapitaen"])
def test_long_names_and_words_stay_inside_their_column(text):
    photos, maps = [noise_photo((50, 50))] * 10, -torch.ones(10, 2, 2)
    titles, row = ["", text, *[""] * 8], cam_row(maps, ["", text, *[""] * 8], label="")
    canvas = np.array(cam.compose(photos, titles, [row], dpi=DPI))
    _, (x, y, w, h, (top,)), (beside, *_), *_ = places([(50, 50)] * 10, titles, [row])
    foot = canvas.shape[0] - 4 * 10  # the legend
    for band in (canvas[:y], canvas[top + h + 2 : foot]):
        inked = np.flatnonzero((band < 250).any((0, 2)))
        assert len(inked) and inked.min() >= x - 2 and inked.max() < beside


def test_a_word_is_broken_only_where_no_size_and_no_column_would_do(monkeypatch):
    paper = Paper(monkeypatch)
    titles = ["parachute", "my_holiday_photos_of_2024", *["springer"] * 8]
    photos = [noise_photo((90, 50))] * 3 + [noise_photo((50, 80))] * 7
    cam.compose(photos, titles, [cam_row(torch.ones(10, 2, 2), titles)])
    assert {"parachute", "holiday", "springer"} <= set(" ".join(paper.texts).split())
    assert not any("_" in text for text in paper.texts)


def test_letters_that_the_font_lacks_are_replaced():
    assert cam.printable("Caf\u00e9_noir \u72ac") == "Cafe noir ?"


class Paper:
    """What was written on pictures: the text, its font and the pixels it covers."""

    def __init__(self, monkeypatch):
        self.texts, self.fonts, self.boxes, self.images, self.writing = [], [], [], [], False
        write = ImageDraw.ImageDraw.text

        def text(pen, xy, text, fill=None, font=None, anchor=None, *rest, **options):
            if str(text).strip() and not self.writing:  # older Pillows write a text of several lines line by line
                self.texts.append(str(text))
                self.fonts.append(font)
                self.boxes.append(pen.textbbox(xy, text, font, anchor))
                self.images.append(pen.im)
            before, self.writing = self.writing, True
            write(pen, xy, text, fill, font, anchor, *rest, **options)
            self.writing = before

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)


def overlapping(paper, slack=2):
    """Pairs of texts that lie on each other in one piece of a picture; the pieces are stacked, none on another."""
    found = list(zip(paper.boxes, paper.images, paper.texts, strict=True))
    return [(s, t) for i, (a, piece, s) in enumerate(found) for b, other, t in found[:i] if piece is other
            and min(a[2], b[2]) - max(a[0], b[0]) > slack and min(a[3], b[3]) - max(a[1], b[1]) > slack]


@pytest.mark.parametrize(("columns", "scale"), [(1, 9.96), (2, 9.96), (3, 9.96), (10, 0.04), (10, 43.0), (10, 1234.0)])
def test_no_text_lies_on_another_or_leaves_the_picture(monkeypatch, columns, scale):
    paper, label = Paper(monkeypatch), "mobilenet_v2, only its last layer trained, at 224, 320 px: 97.3% of val right"
    row = cam_row(torch.full((columns, 2, 2), scale), ["English springer 100%"] * columns, label=label)
    cam.compose([noise_photo((50, 50))] * columns, ["garbage truck"] * columns, [row] * 2, dpi=150)
    cam.confusion_picture(torch.full((columns, columns), 1234), ["garbage truck"] * columns, label, dpi=150)
    assert not overlapping(paper)
    for text, (x0, y0, x1, y1), piece in zip(paper.texts, paper.boxes, paper.images, strict=True):
        assert x0 >= -1 and y0 >= 0 and x1 <= piece.size[0] + 1 and y1 <= piece.size[1], text


@pytest.mark.parametrize("scale", [1e-3, 0.04, 0.7, 9.96, 43.0, 1234.0])
def test_colour_bar_says_its_ends_and_zero(monkeypatch, scale):
    paper = Paper(monkeypatch)
    cam.compose([noise_photo((50, 50))], ["a"], [cam_row(torch.full((1, 2, 2), scale), ["b"], label="c")], dpi=100)
    numbers = sorted(float(text.replace("\u2212", "-")) for text in paper.texts if re.search(r"\d", text))
    assert [numbers[0], numbers[-1]] == pytest.approx([-scale, scale], rel=0.05)
    assert 0 in numbers and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("columns", [1, 3, 10, 20])
@pytest.mark.parametrize("dpi", [72, 300])
def test_text_has_7_to_9_points_where_the_picture_is_printed(monkeypatch, columns, dpi):
    paper = Paper(monkeypatch)
    row = cam_row(torch.ones(columns, 2, 2), ["English springer 100%"] * columns)
    picture = cam.compose([noise_photo((50, 50))] * columns, ["church"] * columns, [row, row], columns, dpi=dpi)
    cam.confusion_picture(torch.ones(columns, columns), CLASSES[:1] * columns, "title", dpi)
    assert picture.info["dpi"] == (dpi, dpi) and picture.width / dpi * 2.54 <= 16.05
    assert all(7 <= face.size / dpi * 72 <= 9 for face in paper.fonts)


def test_scale_ends_at_a_quantile_and_arrowheads_say_where_cells_go_beyond():
    maps = torch.linspace(-1, 1, 200).reshape(2, 10, 10)
    assert cam.scale_of(maps) == pytest.approx(0.98, abs=0.01)
    maps[1, 9] = 50  # strong cells elsewhere do not make the others grey
    assert cam.scale_of(maps / 2) < 26 and cam.scale_of(torch.zeros(1, 2, 2)) > 0
    sparse = torch.zeros(1, 10, 10)
    sparse[0, 0, 0] = 3
    assert cam.scale_of(sparse) == 3
    paper = cam.Paper(144)
    unit = paper.length("logits")
    for low, high in ((0, 0), (0, 1), (1, 0), (1, 1)):
        bar = np.array(cam.draw_colour_bar(2.0, [torch.tensor([-2.0 - low]), torch.tensor([2.0 + high])], paper))
        side = bar.shape[0]
        before, after = bar[:, : side - 2], bar[:, 2 - side - unit : -unit]
        assert ((before < 250).any(), (after < 250).any()) == (low, high)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(60, 80), (7, 50)])
def test_line_runs_around_what_focus_measures(seed, size):
    cells = randn(5, 6, seed=seed).float()
    pixels = cam.upsample(cells[None], size)[0]
    inside = pixels > pixels.max() / 2  # as score.py's focus
    line = cam.outline(grey_photo(128, size), cells, 2.0, 4.0).float().mean(2)
    crossed = [inside.narrow(d, 0, size[d] - 1) != inside.narrow(d, 1, size[d] - 1) for d in (0, 1)]
    for d in (0, 1):  # dark wherever the region begins or ends ...
        darker = torch.minimum(line.narrow(d, 0, size[d] - 1), line.narrow(d, 1, size[d] - 1))
        assert crossed[d].any() and (darker[crossed[d]] < 90).all()
    near = [F.max_pool2d(part[None, None].float(), 9, 1, 4)[0, 0] for part in (inside, ~inside)]
    assert (line[(near[0] * near[1]) == 0] >= 128).all()  # ... and nowhere else


@pytest.mark.parametrize("cells", [-torch.ones(3, 3), torch.zeros(3, 3), -randn(3, 3).abs().float()])
def test_a_map_that_is_nowhere_positive_has_no_line(cells):
    photo = noise_photo((20, 30))
    assert torch.equal(cam.outline(photo, cells), photo)


def test_line_shows_on_black_and_on_white():
    cells = torch.zeros(5, 5)
    cells[2, 2] = 1
    for level in (0, 255):
        shown = cam.outline(grey_photo(level, (90, 90)), cells, 2.0, 6.0)
        assert (shown < 60).any() and (shown > 200).any()


def test_scale_of_each_photo_is_named(monkeypatch):
    paper = Paper(monkeypatch)
    maps = torch.ones(2, 3, 3) * torch.tensor([2.0, 40.0])[:, None, None]
    tiles, tile = [], cam.draw_tile
    monkeypatch.setattr(cam, "draw_tile", lambda *given: tiles.append(tile(*given)) or tiles[-1])
    cam.compose([grey_photo(128, (9, 9))] * 2, ["a", "b"], [cam_row(maps)], scale="photo", dpi=DPI)
    assert "own scale" in " ".join(paper.texts) and {"caption \u00b12.00", "caption \u00b140.0"} <= set(paper.texts)
    maps_alone = [tile.crop((0, 0, tile.width, cam.TALLEST)).tobytes() for tile in tiles[2:]]
    assert maps_alone[0] == maps_alone[1]


def test_confusion_picture_has_the_counts_and_says_what_it_leaves_out(monkeypatch):
    paper = Paper(monkeypatch)
    matrix = torch.tensor([[11, 2], [0, 31]])
    canvas = np.array(cam.confusion_picture(matrix, ["ants", "bees"], "cnn", dpi=DPI))
    assert {"cnn", "ants", "bees", "11", "2", "31"} <= set(paper.texts) and "0" not in paper.texts
    colours = cam.confusion_cells(matrix, matrix / matrix.sum(1, keepdim=True), 40, cam.Paper(DPI))
    right, wrong, never = (colours.getpixel(at) for at in ((5, 5), (45, 5), (5, 45)))
    assert len(set(right)) == 1 and wrong[0] > wrong[1] + 20 and min(never) > 230 and canvas.shape[1] <= PAGE + 1
    many = torch.eye(60, dtype=torch.long) * 9
    many[58, 59] = 7
    paper.texts.clear()
    cam.confusion_picture(many, [f"class {i}" for i in range(60)], "cnn", dpi=150)
    assert "class 58" in paper.texts and "class 55" not in paper.texts and "50 of 60" in " ".join(paper.texts)


def test_columns_of_the_confusion_picture_stand_above_their_cells():
    names = ["i", "W" * 8, *["i"] * 18]  # too long for its column, so upright; the second is much the darkest
    canvas = np.array(cam.confusion_picture(torch.eye(20), names, "", dpi=144)).astype(int)
    cell = np.array(cam.confusion_cells(torch.eye(2), torch.eye(2), 9, cam.Paper(72)))[5, 5]
    diagonal = np.argwhere((canvas == cell).all(2))
    left, top = diagonal[:, 1].min(), diagonal[:, 0].min()
    ink = (canvas[:top, left:] < 120).all(2).sum(0)
    side = (canvas.shape[1] - left) / 20
    assert ink[int(side) : int(2 * side)].sum() > 5 * ink[: int(side)].sum() > 0


# ---------------------------------------------------------------- commands


def test_every_character_printed_is_in_the_font(call, demo, one, two, monkeypatch):
    paper = Paper(monkeypatch)
    photo = next((demo / "val").glob("*/*.JPEG"))
    call("figure", "--models", one, two, "--data", demo, "--dpi", 40)
    call("explain", photo, "--model", one, "--contrast", CLASSES[0], CLASSES[1], "--dpi", 40)
    call("gallery", "--model", one, "--data", demo, "--dpi", 40)
    face = cam.Paper(200).font
    missing = bytes(face.getmask("\U0010ffff"))
    printed = set("".join(paper.texts) + "".join(CLASSES) + "+-.0123456789%") - set(" \n")
    assert len(printed) > 30
    assert [c for c in sorted(printed) if bytes(face.getmask(c)) == missing] == []


def test_default_photos_are_one_of_each_class_and_always_the_same(demo):
    val = data.load(demo, "val")
    photos, names = cam.one_of_each_class(demo, 0, CLASSES)
    assert names == CLASSES
    for photo, name in zip(photos, names, strict=True):
        assert any(val[i].equal(photo) for i in range(len(val)) if CLASSES[val.labels[i]] == name)
    again, other = (cam.one_of_each_class(demo, seed, CLASSES)[0] for seed in (0, 1))
    assert all(map(torch.equal, photos, again)) and not all(map(torch.equal, photos, other))
    turned, reversed_names = cam.one_of_each_class(demo, 0, CLASSES[::-1], ["church", "tench"])
    assert reversed_names == ["church", "tench"] and len(turned) == 2


def test_classes_to_show_are_chosen_and_refused_by_name(call, demo, one, seen):
    assert call("figure", "--models", one, "--data", demo, "--dpi", 40, "--classes", "church", "tench").returncode == 0
    assert seen[0][1] == ["church", "tench"]
    assert refused(call("figure", "--models", one, "--data", demo, "--classes", "unicorn"), "unicorn", "tench")


def test_figure_is_the_same_every_time_and_its_seed_changes_it(call, demo, one, two, tmp_path):
    for name, more in (("a", []), ("b", ["--seed", 0]), ("c", ["--seed", 1])):
        result = call("figure", "--models", one, two, "--data", demo, "--dpi", 40, "--out", f"new/{name}.png", *more)
        assert result.returncode == 0 and f"new/{name}.png" in result.stdout
    a, b, c = (tmp_path / "new" / f"{name}.png" for name in "abc")
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    assert sorted(p.name for p in a.parent.iterdir()) == ["a.png", "b.png", "c.png"]
    with Image.open(a) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert picture.width == pytest.approx(252, rel=0.06)  # 16 cm


def test_more_classes_than_ten_go_into_blocks_or_are_chosen_and_it_is_said(call, demo, one, blocks, monkeypatch):
    result = call("figure", "--models", one, "--data", demo, "--dpi", 40, "--columns", 4)
    assert "10 photos go into blocks of 4" in result.stderr
    assert [len(block[0].tiles) for block in blocks[0]] == [4, 4, 2]
    assert len({tile.scale for block in blocks[0] for tile in block[1].tiles}) == 1  # one scale across the blocks
    monkeypatch.setattr(cam, "MOST_CLASSES", 3)
    result = call("figure", "--models", one, "--data", demo, "--dpi", 40)
    assert "3 of 10 classes are shown" in result.stderr and len(blocks[1][0][0].tiles) == 3
    assert call("figure", "--models", one, "--data", demo, "--columns", 11).returncode == 2


def test_figure_of_photos_of_one_s_own(call, demo, one, tmp_path, seen):
    known = next((demo / "val" / "n03028079").glob("*"))
    shutil.copy(known, tmp_path / "mine.jpg")
    result = call("figure", "--models", one, "--images", known, "mine.jpg", "--out", "figure.png", "--dpi", 40)
    assert result.returncode == 0 and (tmp_path / "figure.png").exists()
    ((photos, titles, (row,), *_),) = seen
    assert torch.equal(photos[0], photos[1]) and titles == ["church", "mine"]
    assert row.right[0] in (True, False) and row.right[1] is None  # the truth is known of folders named like a class
    assert torch.equal(row.maps[0], row.maps[1]) and row.captions[0] == row.captions[1]


def test_titles_and_truth_of_photos_of_one_s_own(call, demo, one, tmp_path, seen):
    photo = next((demo / "val" / "n03028079").glob("*"))
    for name in ("b.jpg", "a.jpg", "._a.jpg"):
        shutil.copy(photo, tmp_path / name)
    (tmp_path / "album.jpg").mkdir()
    what = ["figure", "--models", one, "--dpi", 40, "--images"]
    assert call(*what, "*.jpg", "--titles", "one", "two", "--truth", "tench").returncode == 0
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0 ftypheic")
    result = call(*what, tmp_path, "--truth", "tench", "church")
    assert result.returncode == 0 and f"{tmp_path}: photos in .HEIC are left out" in result.stderr
    (_, titles, (row,), *_), (_, named, (other,), *_) = seen
    said = row.captions[0].rsplit(" ", 1)[0]
    assert titles == ["one", "two"] and row.right == [said == "tench"] * 2
    assert named == ["tench", "church"] and other.right == [said == "tench", said == "church"]
    assert refused(call(*what, "a.jpg", "--titles", "one", "two"), "--titles", "2", "1")
    assert refused(call(*what, "a.jpg", "--truth", "unicorn"), "unicorn")
    assert refused(call("figure", "--models", one, "--data", demo, "--truth", "tench"), "--images")
    (tmp_path / "empty").mkdir()
    assert refused(call(*what, "empty"), "empty holds no photo")
    assert refused(call(*what, ""), "name of a photo is empty")
    assert refused(call(*what, "*.gif"), "*.gif holds no photo")


def test_names_that_a_mac_writes_with_accents_apart_are_known(call, demo, tmp_path, seen):
    path, known = tmp_path / "best.pt", [unicodedata.normalize("NFC", "cafe\u0301"), "tea"]
    models.save(path, models.cnn(2, width=16), arch="cnn", classes=known, mean=data.MEAN, std=data.STD, looks=[32],
                settings={}, accuracies={}, accuracy_on="val", accuracy_n=20, epoch=1, how="")
    photo = tmp_path / "cafe\u0301" / "a.jpg"
    photo.parent.mkdir()
    shutil.copy(next((demo / "val" / "n03028079").glob("*")), photo)
    assert call("figure", "--models", path, "--images", photo, "--dpi", 40).returncode == 0
    ((_, titles, (row,), *_),) = seen
    assert titles == known[:1] and row.right[0] is not None
    result = call("explain", photo, "--model", path, "--contrast", "cafe\u0301", "tea", "--dpi", 40)
    assert result.returncode == 0, result.stderr


def test_a_confusion_picture_of_a_class_without_letters():
    assert cam.confusion_picture(torch.ones(2, 2), ["_", "cat"], "title", DPI).width > 0


def test_a_picture_too_high_for_a_pdf_is_refused(tmp_path):
    with pytest.raises(cam.CamError, match="more than a PDF takes.*--columns"):
        cam.save_picture(Image.new("L", (1, 65_501)), tmp_path / "tall.pdf")
    assert not any(tmp_path.iterdir())


def test_figure_shows_the_map_and_probability_of_the_prediction(call, demo, one, seen):
    call("figure", "--models", one, "--data", demo, "--dpi", 40)
    network, facts = models.load(one)
    ((_, titles, (row,), *_),) = seen
    for i, (photo, name) in enumerate(zip(*cam.one_of_each_class(demo, 0, CLASSES), strict=True)):
        with torch.no_grad():
            features = network.features(next(data.eval_batches(data.from_arrays([photo]), facts["size"], 1))[0])
            probability, best = network.head(features.mean((2, 3))).softmax(1).max(1)
        expected = (network.head.weight[best[0], :, None, None] * features[0]).sum(0)
        assert torch.allclose(row.maps[i], expected, atol=1e-5)
        assert row.captions[i] == f"{CLASSES[best]} {float(probability):.0%}" and titles[i] == name
        assert row.right[i] == (CLASSES[best] == name)


def picture_of(kind, path):
    """Write a photo of some kind to `path`, return its upright width and height."""
    rgb = Image.fromarray(noise_photo((40, 90)).numpy())
    turn = Image.Exif()
    turn[0x0112] = 6  # to be turned by a quarter
    deep = np.linspace(0, 65535, 40 * 90, dtype=np.uint16).reshape(40, 90)
    image, size, options = {
        "very wide.png": (rgb.resize((1000, 40)), (1000, 40), {}),
        "very tall.jpg": (rgb.resize((40, 1000)), (40, 1000), {}),
        "a line.png": (rgb.resize((300, 1)), (300, 1), {}),
        "tiny.png": (rgb.resize((5, 7)), (5, 7), {}),
        "turned.jpg": (rgb, (40, 90), {"exif": turn}),
        "cmyk.jpg": (rgb.convert("CMYK"), (90, 40), {}),
        "rgba.png": (rgb.convert("RGBA"), (90, 40), {}),
        "grey.png": (rgb.convert("L"), (90, 40), {}),
        "deep.png": (Image.fromarray(deep), (90, 40), {}),
    }[kind]
    image.save(path, **options)
    return size


KINDS = ["very wide.png", "very tall.jpg", "a line.png", "tiny.png", "turned.jpg", "cmyk.jpg", "rgba.png", "grey.png",
         "deep.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_explain_takes_every_photo_and_shows_it_upright(call, one, tmp_path, blocks, kind):
    width, height = picture_of(kind, tmp_path / kind)
    result = call("explain", kind, "--model", one, "--dpi", 72, "--out", "here")
    assert result.returncode == 0 and result.stderr == ""
    ((((tiles, *_),),),) = blocks
    assert {tuple(tile.photo.shape) for tile in tiles} == {(height, width, 3)}
    assert [tile.class_map is None for tile in tiles] == [True, False, False, False]  # the photo once, then its maps
    (picture,) = (tmp_path / "here").glob(f"{kind.split('.')[0]}-*.png")
    with Image.open(picture) as image:
        widths, tall = cam.lay_out([cam.Strip(tiles)], 4, cam.Paper(72))
        assert image.width <= PAGE + 1 and sum(widths) <= image.width
        assert image.height <= tall + 100  # as high as the photo and its texts: no empty band
        assert tall <= max(2, 1.05 * max(widths) * height / width) or width > 2 * max(widths)


def test_explain_shows_the_top_classes_in_order_and_the_contrast(call, demo, one, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    a, b = CLASSES[2], CLASSES[5]
    assert call("explain", photo, "--model", one, "--top", 4, "--contrast", a, b, "--dpi", 40).returncode == 0
    ((((tiles, *_),),),) = blocks
    network, facts = models.load(one)
    maps, logits, probabilities = cam.predict_with_maps(network, facts, [torch.from_numpy(data.decode(photo))])
    order = probabilities[0].argsort(descending=True)[:4].tolist()
    for k, tile in zip(order, tiles[1:5], strict=True):
        assert tile.text == f"{CLASSES[k]} {float(probabilities[0, k]):.1%}\nlogit {float(logits[0, k]):+.2f}"
        assert torch.equal(tile.class_map, maps[0, k])
    assert f"{a} minus {b}" in tiles[5].text and torch.equal(tiles[5].class_map, maps[0, 2] - maps[0, 5])


def test_explain_compares_networks_row_by_row_on_their_own_scales(call, demo, one, two, tmp_path, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert call("explain", photo, "--model", one, "--model", two, "--dpi", 40, "--out", "both.png").returncode == 0
    (((first, second),),) = blocks
    assert second.tiles[0] is None and len(first.tiles) == len(second.tiles) == 4
    shared, of_second = ({tile.scale for tile in strip.tiles[1:]} for strip in (first, second))
    assert shared == {cam.scale_of(torch.stack([tile.class_map for tile in first.tiles[1:]]))} != of_second
    assert os.listdir(tmp_path) == ["both.png"]


def test_explain_without_a_photo_says_so(call, one):
    assert refused(call("explain", "--model", one), "needs a photo")


def test_pictures_of_two_runs_of_one_architecture_have_two_names(call, demo, one, two, tmp_path):
    photo = next((demo / "val").glob("*/*.JPEG"))
    for model in (one, two):
        assert call("explain", photo, "--model", model, "--dpi", 40, "--out", "new").returncode == 0
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_looks_are_those_of_the_command(call, demo, one, seen):
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert call("figure", "--images", photo, "--models", one, "--looks", "48,32", "--dpi", 40).returncode == 0
    ((_, _, (row,), *_),) = seen
    network, facts = models.load(one, looks=[32, 48])
    maps, *_ = cam.predict_with_maps(network, facts, [torch.from_numpy(data.decode(photo))])
    assert (row.maps[0] == maps[0]).all((1, 2)).any() and "32, 48 px: accuracy not measured" in row.label
    for bad in ("a", "32,", "4", "32,32", "99999"):
        assert refused(call("figure", "--images", photo, "--models", one, "--looks", bad), "--looks", bad)
    assert refused(call("figure", "--images", photo, "--models", one, one, one, "--looks", "32", "48"), "--looks", "3")


def test_looks_that_a_network_cannot_take_are_refused(call, demo, tmp_path):
    network = models.build("densenet121")
    models.save(tmp_path / "dense.pt", network, **facts_of(arch="densenet121"))
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert refused(call("explain", photo, "--model", "dense.pt", "--looks", "16,64"), "dense.pt", "16 x 16", "--looks")


def test_caption_of_a_network_says_only_what_is_known():
    facts = facts_of(accuracy=0.8751, accuracy_n=3925)
    assert cam.describe(facts) == f"cnn, trained from scratch, at {SIZE} px: 87.5% of 3,925 val photos right"
    facts |= dict(accuracy_on="held-out train", looks=[64, 96])
    assert cam.describe(facts).endswith("at 64, 96 px: 87.5% of 3,925 held-out train photos right")
    assert cam.describe(facts | dict(accuracy_n=None)).endswith(": 87.5% of held-out train right")
    assert cam.describe(facts | dict(accuracy=None)).endswith(": accuracy not measured")


def test_explain_makes_a_folder_of_pictures_of_a_folder(call, demo, one, tmp_path):
    folder = demo / "val" / "n03028079"
    assert call("explain", folder, "--model", one, "--dpi", 40, "--out", "new").returncode == 0
    assert len(list((tmp_path / "new").glob("*.png"))) == len(list(folder.glob("*.JPEG"))) == 2


def test_a_folder_that_is_there_may_have_a_dot_in_its_name(call, demo, one, tmp_path):
    (tmp_path / "photos.2026").mkdir()
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert call("explain", photo, "--model", one, "--dpi", 40, "--out", "photos.2026").returncode == 0
    assert len(list((tmp_path / "photos.2026").glob("*.png"))) == 1


def test_explain_keeps_photos_of_the_same_name_apart(call, demo, one, tmp_path):
    for i, photo in enumerate(list((demo / "val").glob("*/*.JPEG"))[:3]):
        (tmp_path / str(i)).mkdir()
        shutil.copy(photo, tmp_path / str(i) / "photo.jpg")
    photos = [f"{i}/photo.jpg" for i in range(3)]
    assert call("explain", *photos, "--model", one, "--dpi", 40, "--out", "new").returncode == 0
    assert len(list((tmp_path / "new").rglob("*.png"))) == 3


def test_explain_names_the_scale_of_each_map_where_they_share_none(call, demo, one, monkeypatch):
    paper, photo = Paper(monkeypatch), next((demo / "val").glob("*/*.JPEG"))
    assert call("explain", photo, "--model", one, "--dpi", 40, "--scale", "photo").returncode == 0
    assert sum("\u00b1" in text for text in paper.texts if "own scale" not in text) == 3


def test_a_class_against_itself_is_refused(call, demo, one):
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert refused(call("explain", photo, "--model", one, "--contrast", "tench", "tench"), "two classes")


def test_a_class_without_a_val_photo_is_left_out_and_said(call, demo, one, tmp_path, seen):
    folder = tmp_path / "less"
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    shutil.rmtree(folder / "val" / "n01440764")
    result = call("figure", "--models", one, "--data", folder, "--dpi", 40)
    assert result.returncode == 0 and "tench" in result.stderr and len(seen[0][0]) == 9
    assert refused(call("figure", "--models", one, "--data", folder, "--classes", "tench"), "tench")


def test_gallery_shows_the_most_confident_mistakes_first(call, demo, one, seen):
    assert call("gallery", "--model", one, "--data", demo, "--count", 5, "--dpi", 40).returncode == 0
    ((photos, titles, (said, there), *_),) = seen
    (network, facts), val = models.load(one), data.load(demo, "val")
    with torch.no_grad():
        logits = torch.cat([network(images) for images, _ in data.eval_batches(val, facts["size"], 8)])
    confidence, guess = logits.softmax(1).max(1)
    wrong = [i for i in confidence.argsort(descending=True).tolist() if guess[i] != val.labels[i]][:5]
    assert len(photos) == 5 and all(torch.equal(photo, val[i]) for photo, i in zip(photos, wrong, strict=True))
    assert titles == [CLASSES[val.labels[i]] for i in wrong]
    assert said.captions == [f"{CLASSES[guess[i]]} {float(confidence[i]):.0%}" for i in wrong] and not any(said.right)
    assert all(c.startswith(title) for c, title in zip(there.captions, titles, strict=True)) and all(there.right)


# ---------------------------------------------------------------- bad input


def test_classes_are_compared_by_name(call, demo, one, tmp_path, seen):
    network, facts = models.load(one)
    network.head.weight.data, network.head.bias.data = network.head.weight.data.flip(0), network.head.bias.data.flip(0)
    models.save(tmp_path / "turned.pt", network, **facts_of(classes=CLASSES[::-1]))
    for model in (one, "turned.pt"):
        assert call("figure", "--models", model, "--data", demo, "--dpi", 40, "--classes", *CLASSES).returncode == 0
        assert call("gallery", "--model", model, "--data", demo, "--dpi", 40, "--count", 10).returncode == 0
    assert call("figure", "--models", one, "turned.pt", "--data", demo, "--dpi", 40).returncode == 0
    figures, galleries, ((*_, rows, _, _, _, _),) = seen[0:4:2], seen[1:4:2], seen[4:]
    assert figures[0][1] == figures[1][1] and sorted(galleries[0][1]) == sorted(galleries[1][1])
    for here, there in [(figures[0][2][0], figures[1][2][0]), rows]:
        assert here.captions == there.captions and here.right == there.right
        assert torch.equal(here.maps, there.maps)


def test_data_of_other_classes_is_refused(call, demo, tmp_path):
    pets = checkpoint(tmp_path / "pets.pt", classes=["cat", "dog"])
    assert refused(call("figure", "--models", pets, "--data", demo), "church", "cat")
    assert refused(call("gallery", "--model", pets, "--data", demo), "church", "cat")


@pytest.mark.parametrize("out", ["figure.jpg", "figure", "figure.svg", "folder.png"])
@pytest.mark.parametrize("command", ["figure", "explain", "gallery"])
def test_names_that_no_picture_can_have_are_refused_before_any_work(call, tmp_path, monkeypatch, command, out):
    (tmp_path / "folder.png").mkdir()
    if command == "explain" and out == "figure":
        return  # a folder of pictures
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("work was done"))
    what = {"figure": ["--images", "a.jpg"], "explain": ["a.jpg"], "gallery": []}[command]
    assert refused(call(command, *what, "--out", out), out) and os.listdir(tmp_path) == ["folder.png"]


def test_empty_names_are_not_the_working_folder(call, demo, one):
    photo = next((demo / "val").rglob("*.JPEG"))
    assert refused(call("explain", "", "--model", one), "name of a photo is empty")
    assert refused(call("explain", photo, "--model", one, "--out", ""), "--out is empty")
    assert refused(call("figure", "--models", one, "--data", demo, "--out", ""), "--out is empty")


def test_one_picture_for_two_photos_is_refused(call, demo, one):
    photos = list((demo / "val" / "n03028079").glob("*.JPEG"))
    assert refused(call("explain", *photos, "--model", one, "--out", "x.png"), "x.png", "2 photos")


def test_pictures_know_their_size_on_paper(call, demo, one, tmp_path):
    what = ["figure", "--models", one, "--data", demo, "--dpi", 100, "--out"]
    result = call(*what, "a_b/figure.png")
    line = r"\\includegraphics\[width=1[56]\..cm]{a_b/figure.png}"
    assert re.search(rf"^a_b/figure.png\n{line}\n\\caption{{", result.stdout)
    assert "50.0\\% of val right" in result.stdout
    with Image.open(tmp_path / "a_b/figure.png") as picture:
        assert picture.info["dpi"] == pytest.approx((100, 100), abs=0.1)
    assert call(*what, "figure.pdf").returncode == 0
    written = (tmp_path / "figure.pdf").read_bytes()
    box = [float(n) for n in re.search(rb"MediaBox \[ *([\d. ]+)\]", written)[1].split()]
    assert written.startswith(b"%PDF") and box[2] == pytest.approx(16 / 2.54 * 72, rel=0.03)


def test_seed_beyond_all_numbers_is_refused(call, demo, one):
    result = call("figure", "--models", one, "--data", demo, "--seed", "99999999999999999999")
    assert result.returncode == 2 and "--seed" in result.stderr and "Traceback" not in result.stderr


def test_interrupt_ends_in_a_sentence(call, demo, one, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cam, "predict_with_maps", interrupted)
    result = call("figure", "--models", one, "--data", demo)
    assert result.returncode == 130 and "interrupted" in result.stderr and result.stderr.count("cam.py: ") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory")])
@pytest.mark.parametrize("command", ["figure", "gallery"])
def test_too_little_memory_ends_in_a_sentence(call, demo, one, monkeypatch, command, error):
    def full(*_):
        raise error

    monkeypatch.setattr(data, "eval_batches", full)
    model = {"figure": "--models", "gallery": "--model"}[command]
    assert refused(call(command, model, one, "--data", demo), "memory", "--looks")


def test_names_that_the_terminal_cannot_show_are_written_in_other_letters(run, demo, tmp_path, one):
    shutil.copy(next((demo / "val").glob("*/*.JPEG")), tmp_path / "\U0001f41f.jpg")
    what = ["cam.py", "explain", "\U0001f41f.jpg", "--model", one, "--dpi", 40]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, str(REPO / what[0]), *map(str, what[1:])]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"") and b"\\U0001f41f" in result.stdout


def test_missing_checkpoint_is_refused_by_the_command(run):
    assert refused(run("cam.py", "explain", "photo.jpg", "--model", "nowhere/best.pt"), "nowhere/best.pt", "train")


@pytest.mark.parametrize("command", ["figure", "explain", "gallery"])
def test_garbage_checkpoints_are_refused(call, demo, tmp_path, command):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint" * 100)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "stranger.pt")
    photo = next((demo / "val").glob("*/*.JPEG"))
    for name in ("garbage.pt", "stranger.pt", "missing.pt"):
        arguments = {"figure": ["--data", demo, "--models"], "explain": [photo, "--model"], "gallery": ["--model"]}
        assert refused(call(command, *arguments[command], name), name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["garbage.pt", "stranger.pt"]


def test_missing_and_damaged_photos_are_refused_by_name(call, demo, one, tmp_path):
    whole = next((demo / "val").glob("*/*.JPEG")).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no photo")
    for name in ("missing.jpg", "half.jpg", "empty.jpg", "text.jpg"):
        assert refused(call("explain", name, "--model", one), name)
        assert refused(call("figure", "--images", name, "--models", one), name)
    assert not list(tmp_path.rglob("*.png"))


def test_networks_of_different_classes_are_refused(call, demo, one, tmp_path):
    pets = checkpoint(tmp_path / "pets.pt", classes=["cat", "dog"])
    result = call("figure", "--models", one, pets, "--data", demo)
    assert refused(result, "pets.pt", "other classes", "cat", "French horn")


def test_unknown_class_of_a_contrast_is_refused(call, demo, one):
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert refused(call("explain", photo, "--model", one, "--contrast", "tench", "unicorn"), "unicorn")


@pytest.mark.parametrize("command", ["figure", "explain"])
def test_output_below_a_file_is_refused(call, demo, one, tmp_path, command):
    (tmp_path / "file").write_text("here first")
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = ["figure", "--models", one, "--images", photo] if command == "figure" else ["explain", photo, "--model", one]
    assert refused(call(*what, "--dpi", 40, "--out", "file/new/out.png"), "file")
    assert (tmp_path / "file").read_text() == "here first" and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("options", [["--dpi", 0], ["--dpi", -5], ["--dpi", 10**9], ["--top", 0], ["--top", -1]])
def test_numbers_that_make_no_picture_are_refused(call, demo, one, options):
    photo = next((demo / "val").glob("*/*.JPEG"))
    result = call("explain", photo, "--model", one, *options)
    assert result.returncode == 2 and options[0] in result.stderr


def test_checkpoint_whose_numbers_are_not_finite_is_refused(call, demo, one, tmp_path):
    network, facts = models.load(one)
    nn.init.constant_(network.head.bias, float("nan"))
    models.save(tmp_path / "nan.pt", network, **{k: v for k, v in facts.items() if k != "format"})
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert refused(call("explain", photo, "--model", "nan.pt"), "not finite")


def test_full_disk_leaves_the_picture_of_before(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    cam.save_picture(Image.new("RGB", (8, 8)), path)
    before = path.read_bytes()

    def full(image, file, *rest, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device.*figure.png"):
        cam.save_picture(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("command", ["figure", "explain", "gallery"])
def test_help_shows_the_defaults(call, command):
    result = call(command, "--help")
    assert result.returncode == 0 and "default: " in result.stdout and "best.pt" in result.stdout


# ---------------------------------------------------------------- the file alone


ALONE = """
import os, sys, torch
state, before = torch.get_rng_state(), set(os.listdir())
import cam
assert torch.equal(state, torch.get_rng_state()) and set(os.listdir()) - before <= {"__pycache__"}
assert not {"data", "models", "train", "score"} & set(sys.modules)
assert cam.__file__ == os.path.abspath("cam.py")
network = torch.nn.Module()
network.features, network.head = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Linear(8, 10)
images = torch.randn(2, 3, 160, 160)
lines = [line.strip() for line in cam.__doc__.splitlines() if " = " in line and line.startswith("    ")]
assert len(lines) == 3, lines
exec("\\n".join(lines))
assert maps.shape == (2, 10, 10, 10) and pixels.shape == (2, 160, 160)
assert torch.allclose(maps.mean((2, 3)) + network.head.bias, network.head(features.mean((2, 3))), atol=1e-5)
photo = torch.randint(256, (160, 160, 3), dtype=torch.uint8)
row = cam.Row("mine", maps[:, 3].detach(), ["a", "b"], [True, False])
cam.save_picture(cam.compose([photo, photo], ["one", "two"], [row]), "figure.png")
"""


def test_file_works_alone_and_its_import_does_nothing(tmp_path):
    shutil.copy(REPO / "cam.py", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "figure.png").exists()


SNIPPET = """
import torch, torchvision, cam
from PIL import Image

weights = torchvision.models.ResNet18_Weights.DEFAULT
network, photo = torchvision.models.resnet18(weights=weights).eval(), Image.open("photo.jpg").convert("RGB")
image = weights.transforms(resize_size=224)(photo.resize((224, 224)))  # the whole photo, nothing cut off
features = torch.nn.Sequential(*list(network.children())[:-2])(image[None])         # all before pooling and fc
maps = cam.class_activation_maps(features, network.fc.weight)                       # (1, 1000, 7, 7), in logits
k = int(network(image[None]).argmax())
row = cam.Row("ResNet-18", maps[:, k], [weights.meta["categories"][k]])
cam.save_picture(cam.compose([photo], ["my photo"], [row]), "cam.png")              # or cam.pdf
"""


def test_snippet_for_a_network_of_torchvision_runs_with_this_file_alone(tmp_path):
    lines = [line for line in SNIPPET.splitlines() if line.strip()]
    assert len(lines) <= 12 and max(map(len, lines)) <= 120
    shutil.copy(REPO / "cam.py", tmp_path)
    Image.fromarray(noise_photo((90, 140)).numpy()).save(tmp_path / "photo.jpg")
    offline = "from torchvision import models\nbuild = models.resnet18\nmodels.resnet18 = lambda **_: build()\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", offline + SNIPPET], cwd=tmp_path,
                            env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.width > 600
    result = subprocess.run([sys.executable, "cam.py", "explain", "photo.jpg"], cwd=tmp_path, env=environment,
                            capture_output=True, text=True)
    assert refused(result, "data.py")


def test_functions_take_photos_of_every_kind_and_maps_with_gradients():
    photo = noise_photo((40, 60))
    maps = randn(1, 3, 4).requires_grad_()
    kinds = [photo, photo.numpy(), Image.fromarray(photo.numpy()), photo.permute(2, 0, 1), photo.float() / 255,
             photo.flip(2).numpy()[..., ::-1]]  # from BGR, as OpenCV reads it
    shown = [cam.overlay(kind, maps[0], 1.0) for kind in kinds]
    pictures = [cam.compose([kind], ["a"], [cam_row(maps * 1)], dpi=40).tobytes() for kind in kinds]
    assert all(torch.equal(shown[0], other) for other in shown) and len(set(pictures)) == 1
    assert torch.equal(cam.as_photo(photo[..., 0]), photo[..., :1].expand(-1, -1, 3))
    for bad in (torch.randn(40, 60, 3), torch.zeros(2, 3, 40, 60), torch.zeros(40, 60, 3, dtype=torch.int64)):
        with pytest.raises(cam.CamError, match="a photo is"):
            cam.as_photo(bad)


@pytest.mark.filterwarnings("error::UserWarning")
def test_arrays_may_be_read_only_or_turned_round():
    photo, cells = np.asarray(Image.fromarray(noise_photo((40, 60)).numpy())), randn(3, 4).numpy()
    expected = cam.overlay(photo.copy(), cells, 1.0)
    assert torch.equal(cam.overlay(photo, cells[::-1].copy()[::-1], 1.0), expected)


def test_constants_follow_the_device():
    lab = torch.zeros(2, 3, device="meta")  # a device other than the processor's, without hardware
    assert cam.oklab_to_srgb(lab).device == lab.device == cam.lightness(torch.zeros(2, 2, 3, device="meta")).device


def test_python_in_the_readme_runs(demo, one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, name in ((demo, "data/imagenette2-160"), (one, "runs/cnn/best.pt")):
        (tmp_path / name).parent.mkdir(parents=True)
        os.symlink(path, name)
    network, _ = models.load(one)
    here = {"torch": torch, "network": network, "images": torch.randn(2, 3, 48, 64, generator=seeded())}
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    blocks.remove(SNIPPET.lstrip())  # which the test above runs
    assert len([exec(block, here) for block in blocks]) >= 1
    with torch.no_grad():
        maps = cam.class_activation_maps(network.features(here["images"]), network.head.weight)
    assert torch.allclose(here["maps"], maps, atol=1e-5)
