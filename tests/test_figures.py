"""figures.py: the commands figure, explain and gallery, as people type them."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    CLASSES,
    REPO,
    SIZE,
    Written,
    checkpoint,
    facts_of,
    noise_photo,
    refused,
)
from PIL import Image
from torch import nn

import asked
import cam
import data
import figures
import folders
import fonts
import machine
import models
import networks
import page

PAGE = 16 / 2.54 * 72  # px at 72 dpi


@pytest.fixture
def seen(monkeypatch):
    """What `compose` was given, call by call."""
    calls, compose = [], page.compose
    monkeypatch.setattr(page, "compose", lambda *given: calls.append(given) or compose(*given))
    return calls


@pytest.fixture
def blocks(monkeypatch):
    """The blocks that `draw_page` was given, call by call."""
    calls, draw = [], page.draw_page
    monkeypatch.setattr(page, "draw_page", lambda *given: calls.append(given[0]) or draw(*given))
    return calls


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("figure", ...): the command in this process, in an empty folder, as if it had been run:
    starting Python and torch anew takes seconds. An exception that leaves it fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cam.py"])

    def call(*arguments):
        capsys.readouterr()
        status = 0
        try:
            figures.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield call
    for number, handler in handlers:
        signal.signal(number, handler)


def misused(result, *words):
    """Whether argparse refused an option: status 2, `words` in its sentence, no traceback."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    sentence = " ".join(result.stderr.split("error: ")[1].split())
    return all(word in sentence for word in words)


# ---------------------------------------------------------------- figure


def test_every_character_printed_is_in_the_font(call, demo, one, two, monkeypatch):
    paper = Written(monkeypatch)
    photo = next((demo / "val").glob("*/*.JPEG"))
    call("figure", "--models", one, two, "--data", demo, "--dpi", 40)
    call("explain", photo, "--model", one, "--contrast", CLASSES[0], CLASSES[1], "--dpi", 40)
    call("gallery", "--model", one, "--data", demo, "--dpi", 40)
    face = page.Paper(200).font
    missing = bytes(face.getmask("\U0010ffff"))
    printed = set("".join(paper.texts) + "".join(CLASSES) + "+-.0123456789%") - set(" \n")
    assert len(printed) > 30
    assert [c for c in sorted(printed) if bytes(face.getmask(c)) == missing] == []


def test_default_photos_are_one_of_each_class_and_always_the_same(demo):
    val = folders.load(demo, "val")
    loaded, reversed_ = ([(None, dict(classes=order))] for order in (CLASSES, CLASSES[::-1]))
    photos, names = figures.one_of_each_class(demo, 0, loaded)
    assert names == CLASSES
    for photo, name in zip(photos, names, strict=True):
        assert any(val[i].equal(photo) for i in range(len(val)) if CLASSES[val.labels[i]] == name)
    again, other = (figures.one_of_each_class(demo, seed, loaded)[0] for seed in (0, 1))
    assert all(map(torch.equal, photos, again)) and not all(map(torch.equal, photos, other))
    chosen, names = figures.one_of_each_class(demo, 0, reversed_, ["church", "tench"])
    assert names == ["church", "tench"] and len(chosen) == 2


def test_photos_are_of_the_first_classes_that_val_has(demo, monkeypatch, capsys):
    val = folders.load(demo, "val")
    monkeypatch.setattr(figures, "MOST_CLASSES", 1)
    monkeypatch.setattr(figures, "load_val", lambda *_: val.subset(val.labels >= 8))
    photos, names = figures.one_of_each_class(demo, 0, [(None, dict(classes=CLASSES))])
    assert len(photos) == 1 and names == CLASSES[8:9]
    said = capsys.readouterr().err
    assert "the first 1 of 2 classes are shown" in said
    assert f"there is no val photo of {', '.join(sorted(CLASSES[:8])[:5])}, ..." in said


def test_classes_to_show_are_chosen_and_refused_by_name(call, demo, one, seen):
    what = ["figure", "--models", one, "--data", demo, "--dpi", 40, "--classes"]
    assert call(*what, "church", "tench").returncode == 0
    assert seen[0][1] == ["church", "tench"]
    assert refused(call(*what, "unicorn"), "unicorn", "tench")


def test_figure_is_the_same_every_time_and_its_seed_changes_it(call, demo, one, two, tmp_path):
    for name, more in (("a", []), ("b", ["--seed", 0]), ("c", ["--seed", 1])):
        result = call("figure", "--models", one, two, "--data", demo, "--dpi", 40,
                      "--out", f"new/{name}.png", *more)
        assert result.returncode == 0 and f"new/{name}.png" in result.stdout
    a, b, c = (tmp_path / "new" / f"{name}.png" for name in "abc")
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    assert sorted(p.name for p in a.parent.iterdir()) == ["a.png", "b.png", "c.png"]
    with Image.open(a) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert picture.width == pytest.approx(252, rel=0.06)  # 16 cm


def test_more_classes_than_ten_go_into_blocks_or_are_chosen_and_it_is_said(
        call, demo, one, blocks, monkeypatch):
    what = ["figure", "--models", one, "--data", demo, "--dpi", 40]
    result = call(*what, "--columns", 4)
    assert "10 photos go into blocks of 4" in result.stderr
    assert [len(block[0].tiles) for block in blocks[0]] == [4, 4, 2]
    scales = {tile.scale for block in blocks[0] for tile in block[1].tiles}
    assert len(scales) == 1  # across the blocks
    monkeypatch.setattr(figures, "MOST_CLASSES", 3)
    result = call(*what)
    assert "3 of 10 classes are shown" in result.stderr and len(blocks[1][0][0].tiles) == 3
    assert misused(call(*what, "--columns", 11), "--columns", "11")


def test_figure_of_photos_of_one_s_own(call, demo, one, tmp_path, seen):
    known = next((demo / "val" / "n03028079").glob("*"))
    shutil.copy(known, tmp_path / "mine.jpg")
    result = call("figure", "--models", one, "--images", known, "mine.jpg", "--out", "figure.png",
                  "--dpi", 40)
    assert result.returncode == 0 and (tmp_path / "figure.png").exists()
    ((photos, titles, (row,), *_),) = seen
    assert torch.equal(photos[0], photos[1]) and titles == ["church", "mine"]
    # the truth is known of folders named like a class
    assert row.right[0] in (True, False) and row.right[1] is None
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
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}: photos in .HEIC are left out" in result.stderr
    (_, titles, (row,), *_), (_, named, (other,), *_) = seen
    said = row.captions[0].rsplit(" ", 1)[0]
    assert titles == ["one", "two"] and row.right == [said == "tench"] * 2
    assert named == ["tench", "church"] and other.right == [said == "tench", said == "church"]
    assert refused(call(*what, "a.jpg", "--titles", "one", "two"), "--titles", "2", "1")
    assert refused(call(*what, "a.jpg", "--truth", "unicorn"), "unicorn")
    assert refused(call("figure", "--models", one, "--data", demo, "--truth", "tench"), "--images")
    (tmp_path / "empty").mkdir()
    assert refused(call(*what, "empty"), "empty holds no photo")
    assert misused(call(*what, ""), "--images", "empty")
    assert refused(call(*what, "*.gif"), "*.gif holds no photo")


WAYS = ["{tmp_path}/church/a.jpg", "church/a.jpg", "church/../church/a.jpg"]


@pytest.mark.parametrize("way", WAYS)
def test_the_class_of_a_linked_photo_is_the_folder_that_it_lies_in(
        call, demo, one, tmp_path, seen, way):
    photo = next((demo / "val" / "n01440764").glob("*"))  # tench
    (tmp_path / "church").mkdir()
    os.symlink(photo, tmp_path / "church" / "a.jpg")
    (tmp_path / "linked").mkdir()
    os.symlink(one, tmp_path / "linked" / "best.pt")
    images = way.format(tmp_path=tmp_path)
    what = ["figure", "--models", "linked/best.pt", "--images", images, "--dpi", 40]
    assert call(*what).returncode == 0
    ((_, titles, (row,), *_),) = seen
    assert titles == ["church"] and row.right == [row.captions[0].startswith("church")]
    assert call("explain", images, "--model", "linked/best.pt", "--dpi", 40).returncode == 0
    assert sorted(os.listdir(tmp_path / "figures")) == ["a-linked.png", "figure.png"]


def test_a_photo_in_the_working_folder_is_of_the_class_that_this_is_called(
        call, demo, one, tmp_path, seen, monkeypatch):
    (tmp_path / "church").mkdir()
    monkeypatch.chdir(tmp_path / "church")
    shutil.copy(next((demo / "val" / "n01440764").glob("*")), "a.jpg")
    assert call("figure", "--models", one, "--images", "a.jpg", "--dpi", 40).returncode == 0
    assert seen[0][1] == ["church"]


def test_a_tilde_is_the_home_folder_in_every_path(call, demo, one, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(one, tmp_path / "home" / "best.pt")
    shutil.copy(next((demo / "val" / "n01440764").glob("*")), tmp_path / "home" / "a.jpg")
    os.symlink(demo, tmp_path / "home" / "demo")
    for what in (["figure", "--models", "~/best.pt", "--data", "~/demo", "--out", "~/a.png"],
                 ["figure", "--models", "~/best.pt", "--images", "~/*.jpg", "--out", "~/b.png"],
                 ["explain", "~/a.jpg", "--model", "~/best.pt", "--out", "~/c.png"],
                 ["gallery", "--model", "~/best.pt", "--data", "~/demo", "--out", "~/d.png"]):
        result = call(*what, "--dpi", 40)
        assert result.returncode == 0, result.stderr
        assert os.path.exists(os.path.expanduser(what[-1])) and not os.path.exists("~")


def test_names_that_a_mac_writes_with_accents_apart_are_known(call, demo, tmp_path, seen):
    path, known = tmp_path / "best.pt", [unicodedata.normalize("NFC", "cafe\u0301"), "tea"]
    models.save(path, models.cnn(2, width=16), **facts_of(classes=known))
    photo = tmp_path / "cafe\u0301" / "a.jpg"
    photo.parent.mkdir()
    shutil.copy(next((demo / "val" / "n03028079").glob("*")), photo)
    assert call("figure", "--models", path, "--images", photo, "--dpi", 40).returncode == 0
    ((_, titles, (row,), *_),) = seen
    assert titles == known[:1] and row.right[0] is not None
    result = call("explain", photo, "--model", path, "--contrast", "cafe\u0301", "tea", "--dpi", 40)
    assert result.returncode == 0, result.stderr


def test_figure_shows_the_map_and_probability_of_the_prediction(call, demo, one, seen):
    call("figure", "--models", one, "--data", demo, "--dpi", 40)
    network, facts = models.load(one)
    ((_, titles, (row,), *_),) = seen
    photos, names = figures.one_of_each_class(demo, 0, [(network, facts)])
    for i, (photo, name) in enumerate(zip(photos, names, strict=True)):
        ((images, _),) = data.eval_batches(data.from_arrays([photo]), facts["size"], 1)
        with torch.no_grad():
            features = network.features(images)
            probability, best = network.head(features.mean((2, 3))).softmax(1).max(1)
        expected = (network.head.weight[best[0], :, None, None] * features[0]).sum(0)
        assert torch.allclose(row.maps[i], expected, atol=1e-5)
        assert row.captions[i] == f"{CLASSES[best]} {float(probability):.0%}" and titles[i] == name
        assert row.right[i] == (CLASSES[best] == name)


# ---------------------------------------------------------------- explain


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


KINDS = ["very wide.png", "very tall.jpg", "a line.png", "tiny.png", "turned.jpg", "cmyk.jpg",
         "rgba.png", "grey.png", "deep.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_explain_takes_every_photo_and_shows_it_upright(call, one, tmp_path, blocks, kind):
    width, height = picture_of(kind, tmp_path / kind)
    result = call("explain", kind, "--model", one, "--dpi", 72, "--out", "here")
    assert result.returncode == 0 and result.stderr == ""
    ((((tiles, *_),),),) = blocks
    assert {tuple(tile.photo.shape) for tile in tiles} == {(height, width, 3)}
    # the photo once, then its maps
    assert [tile.class_map is None for tile in tiles] == [True, False, False, False]
    (picture,) = (tmp_path / "here").glob(f"{kind.split('.')[0]}-*.png")
    with Image.open(picture) as image:
        widths, tall = page.lay_out([page.Strip(tiles)], 4, page.Paper(72))
        assert image.width <= PAGE + 1 and sum(widths) <= image.width
        assert image.height <= tall + 100  # as high as the photo and its texts: no empty band
        highest = max(2, 1.05 * max(widths) * height / width)
        assert tall <= highest or width > 2 * max(widths)


def test_explain_shows_the_top_classes_in_order_and_the_contrast(call, demo, one, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    a, b = CLASSES[2], CLASSES[5]
    what = ["explain", photo, "--model", one, "--dpi", 40]
    assert call(*what, "--top", 4, "--contrast", a, b).returncode == 0
    ((((tiles, *_),),),) = blocks
    network, facts = models.load(one)
    photos = [torch.from_numpy(data.decode(photo))]
    maps, logits, probabilities = networks.predict_with_maps(network, facts, photos)
    order = probabilities[0].argsort(descending=True)[:4].tolist()
    for k, tile in zip(order, tiles[1:5], strict=True):
        probability, logit = float(probabilities[0, k]), float(logits[0, k])
        assert tile.text == f"{CLASSES[k]} {probability:.1%}\nlogit {logit:+.2f}"
        assert torch.equal(tile.class_map, maps[0, k])
    assert f"{a} minus {b}" in tiles[5].text
    assert torch.equal(tiles[5].class_map, maps[0, 2] - maps[0, 5])


def test_explain_compares_networks_row_by_row_on_their_own_scales(
        call, demo, one, two, tmp_path, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = ["explain", photo, "--model", one, "--model", two, "--dpi", 40]
    assert call(*what, "--out", "both.png").returncode == 0
    (((first, second),),) = blocks
    assert second.tiles[0] is None and len(first.tiles) == len(second.tiles) == 4
    of_first, of_second = ({tile.scale for tile in strip.tiles[1:]} for strip in (first, second))
    maps = torch.stack([tile.class_map for tile in first.tiles[1:]])
    assert of_first == {cam.scale_of(maps)} != of_second
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
    what = ["figure", "--images", photo, "--dpi", 40, "--models", one]
    assert call(*what, "--looks", "48,32").returncode == 0
    ((_, _, (row,), *_),) = seen
    network, facts = models.load(one, looks=[32, 48])
    maps, *_ = networks.predict_with_maps(network, facts, [torch.from_numpy(data.decode(photo))])
    assert (row.maps[0] == maps[0]).all((1, 2)).any()
    assert "32, 48 px: right on 50.0% of 40 val photos at 32 px" in row.label
    for bad in ("a", "32,", "32,32", "99999"):
        assert misused(call(*what, "--looks", bad), "--looks")
    assert refused(call(*what, "--looks", "4"), "--looks", "4 x 4")
    assert refused(call(*what, one, one, "--looks", "32", "48"), "--looks", "3")


def test_explain_makes_a_folder_of_pictures_of_a_folder(call, demo, one, tmp_path):
    folder = demo / "val" / "n03028079"
    assert call("explain", folder, "--model", one, "--dpi", 40, "--out", "new").returncode == 0
    assert len(list((tmp_path / "new").glob("*.png"))) == len(list(folder.glob("*.JPEG"))) == 2


def test_a_folder_that_is_there_may_have_a_dot_in_its_name(call, demo, one, tmp_path):
    (tmp_path / "photos.2026").mkdir()
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = ["explain", photo, "--model", one, "--dpi", 40, "--out", "photos.2026"]
    assert call(*what).returncode == 0
    assert len(list((tmp_path / "photos.2026").glob("*.png"))) == 1


@pytest.mark.parametrize("command", ["explain", "figure"])
def test_no_picture_is_written_over_a_photo_that_it_shows(call, demo, one, tmp_path, command):
    photo = tmp_path / "own.png"
    Image.open(next((demo / "val").glob("*/*.JPEG"))).save(photo)
    before = photo.read_bytes()
    what = {"explain": ["explain", photo, "--model", one],
            "figure": ["figure", "--images", photo, "--models", one]}[command]
    assert refused(call(*what, "--out", "own.png"), "--out own.png is a photo that is shown")
    assert photo.read_bytes() == before


@pytest.mark.parametrize("command", ["explain", "figure", "gallery", "predict"])
def test_a_place_that_is_read_only_is_said_before_any_work(call, demo, one, monkeypatch, command):
    photo, access = next((demo / "val").glob("*/*.JPEG")), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(networks, "load_networks", None)  # is not called
    these = [photo] if command in ("explain", "predict") else ["--data", demo]
    out = "new/out.csv" if command == "predict" else "new/out.png"
    assert refused(call(command, *these, "--out", out), out, "read-only", "--out")


def test_explain_keeps_photos_of_the_same_name_apart(call, demo, one, tmp_path):
    for i, photo in enumerate(list((demo / "val").glob("*/*.JPEG"))[:3]):
        (tmp_path / str(i)).mkdir()
        shutil.copy(photo, tmp_path / str(i) / "photo.jpg")
    photos = [f"{i}/photo.jpg" for i in range(3)]
    assert call("explain", *photos, "--model", one, "--dpi", 40, "--out", "new").returncode == 0
    assert len(list((tmp_path / "new").rglob("*.png"))) == 3


def test_explain_names_the_scale_of_each_map_where_they_share_none(call, demo, one, monkeypatch):
    paper, photo = Written(monkeypatch), next((demo / "val").glob("*/*.JPEG"))
    assert call("explain", photo, "--model", one, "--dpi", 40, "--scale", "photo").returncode == 0
    assert sum("\u00b1" in text for text in paper.texts if "own scale" not in text) == 3


def test_a_class_against_itself_is_refused(call, demo, one):
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = ["explain", photo, "--model", one, "--contrast"]
    assert refused(call(*what, "tench", "tench"), "two classes")
    assert refused(call(*what, "tench", "unicorn"), "unicorn")


def test_a_class_without_a_val_photo_is_left_out_and_said(call, demo, one, tmp_path, seen):
    folder = tmp_path / "less"
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    shutil.rmtree(folder / "val" / "n01440764")
    result = call("figure", "--models", one, "--data", folder, "--dpi", 40)
    assert result.returncode == 0 and "tench" in result.stderr and len(seen[0][0]) == 9
    assert refused(call("figure", "--models", one, "--data", folder, "--classes", "tench"), "tench")


# ---------------------------------------------------------------- gallery


def test_gallery_shows_the_most_confident_mistakes_first(call, demo, one, seen):
    what = ["gallery", "--model", one, "--data", demo, "--count", 5, "--dpi", 40]
    assert call(*what).returncode == 0
    ((photos, titles, (said, there), _, scale, *_),) = seen
    assert scale == cam.scale_of(torch.cat([said.maps, there.maps]))  # strong and weak are seen
    (network, facts), val = models.load(one), folders.load(demo, "val")
    with torch.no_grad():
        batches = data.eval_batches(val, facts["size"], 8)
        logits = torch.cat([network(images) for images, _ in batches])
    confidence, guess = logits.softmax(1).max(1)
    order = confidence.argsort(descending=True).tolist()
    wrong = [i for i in order if guess[i] != val.labels[i]][:5]
    assert len(photos) == 5
    assert all(torch.equal(photo, val[i]) for photo, i in zip(photos, wrong, strict=True))
    assert titles == [CLASSES[val.labels[i]] for i in wrong]
    captions = [f"{CLASSES[guess[i]]} {float(confidence[i]):.0%}" for i in wrong]
    assert said.captions == captions and not any(said.right) and all(there.right)
    assert all(c.startswith(title) for c, title in zip(there.captions, titles, strict=True))


def test_the_legend_of_one_mistake_says_where_its_words_are(call, demo, one, seen):
    for count, words in ((1, "Above each map: its class"), (2, "below: the class of the map")):
        assert call("gallery", "--model", one, "--data", demo, "--count", count,
                    "--dpi", 40).returncode == 0
        assert words in seen[-1][5]


def test_classes_are_compared_by_name(call, demo, one, tmp_path, seen):
    network, facts = models.load(one)
    for parameter in network.head.parameters():
        parameter.data = parameter.data.flip(0)
    models.save(tmp_path / "turned.pt", network, **facts_of(classes=CLASSES[::-1]))
    for model in (one, "turned.pt"):
        what = ["--data", demo, "--dpi", 40]
        assert call("figure", *what, "--models", model, "--classes", *CLASSES).returncode == 0
        assert call("gallery", *what, "--model", model, "--count", 10).returncode == 0
    assert call("figure", *what, "--models", one, "turned.pt").returncode == 0
    figures, galleries, ((_, _, rows, *_),) = seen[0:4:2], seen[1:4:2], seen[4:]
    assert figures[0][1] == figures[1][1] and sorted(galleries[0][1]) == sorted(galleries[1][1])
    for here, there in [(figures[0][2][0], figures[1][2][0]), rows]:
        assert here.captions == there.captions and here.right == there.right
        assert torch.equal(here.maps, there.maps)


# ---------------------------------------------------------------- bad input


def test_data_of_other_classes_is_refused(call, demo, tmp_path):
    pets = checkpoint(tmp_path / "pets.pt", classes=["cat", "dog"])
    assert refused(call("figure", "--models", pets, "--data", demo), "church", "cat")
    assert refused(call("gallery", "--model", pets, "--data", demo), "church", "cat")


@pytest.mark.parametrize("out", ["figure.jpg", "figure", "figure.svg", "folder.png"])
@pytest.mark.parametrize("command", ["figure", "explain", "gallery"])
def test_names_that_no_picture_can_have_are_refused_before_any_work(
        call, tmp_path, monkeypatch, command, out):
    (tmp_path / "folder.png").mkdir()
    if command == "explain" and out == "figure":
        return  # a folder of pictures
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("work was done"))
    what = {"figure": ["--images", "a.jpg"], "explain": ["a.jpg"], "gallery": []}[command]
    assert refused(call(command, *what, "--out", out), out)
    assert os.listdir(tmp_path) == ["folder.png"]


def test_empty_names_are_not_the_working_folder(call, demo, one):
    photo = next((demo / "val").rglob("*.JPEG"))
    assert misused(call("explain", "", "--model", one), "photos", "empty")
    assert misused(call("explain", photo, "--model", ""), "--model", "empty")
    for option in ("--out", "--data", "--models"):
        what = ["figure", "--models", one, "--data", demo, option, ""]
        assert misused(call(*what), option, "empty")


def test_one_picture_for_two_photos_is_refused(call, demo, one):
    photos = list((demo / "val" / "n03028079").glob("*.JPEG"))
    assert refused(call("explain", *photos, "--model", one, "--out", "x.png"), "x.png", "2 photos")


def test_pictures_know_their_size_on_paper(call, demo, one, tmp_path):
    what = ["figure", "--models", one, "--data", demo, "--dpi", 100, "--out"]
    result = call(*what, "a_b/figure.png")
    line = r"\\includegraphics\[width=1[56]\..cm]{a_b/figure.png}"
    assert re.search(rf"^a_b/figure.png\n{line}\n\\caption{{", result.stdout)
    assert "right on 50.0\\% of 40 val photos" in result.stdout
    with Image.open(tmp_path / "a_b/figure.png") as picture:
        assert picture.info["dpi"] == pytest.approx((100, 100), abs=0.1)
    assert call(*what, "figure.pdf").returncode == 0
    written = (tmp_path / "figure.pdf").read_bytes()
    box = [float(n) for n in re.search(rb"MediaBox \[ *([\d. ]+)\]", written)[1].split()]
    assert written.startswith(b"%PDF") and box[2] == pytest.approx(16 / 2.54 * 72, rel=0.03)


def test_seed_beyond_all_numbers_is_refused(call, demo, one):
    result = call("figure", "--models", one, "--data", demo, "--seed", "99999999999999999999")
    assert misused(result, "--seed")


def test_interrupt_ends_in_a_sentence(call, demo, one, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "predict_with_maps", interrupted)
    result = call("figure", "--models", one, "--data", demo)
    assert result.returncode == 130 and "nothing is left half-written" in result.stderr
    assert result.stderr.count("cam.py: ") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("not enough memory")])
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


@pytest.mark.parametrize("command", ["figure", "explain", "gallery"])
def test_garbage_checkpoints_are_refused(call, demo, tmp_path, command):
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint" * 100)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "stranger.pt")
    photo = next((demo / "val").glob("*/*.JPEG"))
    for name in ("garbage.pt", "stranger.pt", "missing.pt"):
        arguments = {"figure": ["--data", demo, "--models"], "explain": [photo, "--model"],
                     "gallery": ["--model"]}
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


@pytest.mark.parametrize("command", ["figure", "explain"])
def test_output_below_a_file_is_refused(call, demo, one, tmp_path, command):
    (tmp_path / "file").write_text("here first")
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = {"figure": ["--models", one, "--images", photo], "explain": [photo, "--model", one]}
    assert refused(call(command, *what[command], "--out", "file/new/out.png"), "file")
    assert (tmp_path / "file").read_text() == "here first" and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("options", [["--dpi", 0], ["--dpi", -5], ["--dpi", 10**9], ["--top", 0],
                                     ["--top", -1]])
def test_numbers_that_make_no_picture_are_refused(call, demo, one, options):
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert misused(call("explain", photo, "--model", one, *options), options[0])


def test_checkpoint_whose_numbers_are_not_finite_is_refused(call, demo, one, tmp_path):
    network, facts = models.load(one)
    nn.init.constant_(network.head.bias, float("nan"))
    models.save(tmp_path / "nan.pt", network, **{k: v for k, v in facts.items() if k != "format"})
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert refused(call("explain", photo, "--model", "nan.pt"), "nan.pt", "NaN or infinity")


@pytest.mark.parametrize("command", ["figure", "explain", "gallery"])
def test_help_shows_the_defaults(call, command):
    result = call(command, "--help")
    assert result.returncode == 0 and "default: " in result.stdout and "best.pt" in result.stdout


# ---------------------------------------------------------------- torchvision's networks, classes


def stock(path, classes=1000):
    """A file of torchvision's weights of a small network, the last layer with them."""
    torch.manual_seed(0)
    network = torchvision.models.mnasnet0_5(num_classes=classes)
    nn.init.normal_(network.classifier[1].weight, std=0.1)
    torch.save({"state_dict": network.state_dict()}, path)
    return path


def test_explain_a_network_of_torchvisions(call, demo, tmp_path, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = ["explain", photo, "--model", "mnasnet0_5", "--weights", stock(tmp_path / "mine.pth"),
            "--dpi", 40, "--top", 1]
    result = call(*what, "--class", "golf ball", "--class", "7")
    assert result.returncode == 0, result.stderr
    ((strip,),), = blocks
    names = [tile.text.split("\n")[0].rsplit(" ", 1)[0] for tile in strip.tiles[2:]]
    assert names == ["golf ball", "cock"]
    assert "weights of mine.pth, at 224 px: accuracy not measured" in strip.heading
    (written,) = os.listdir("figures")
    assert re.fullmatch(f"{photo.stem}-mnasnet0_5-mine-[0-9a-f]{{6}}-golf-ball-7.png", written)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    what[5] = stock(tmp_path / "two.pth", classes=2)
    assert call(*what, "--names", "names.txt", "--class", "cat", "--class", "dog",
                "--looks", "64,96").returncode == 0
    assert {tile.text.split(" ")[0] for tile in blocks[1][0][0].tiles[1:]} == {"cat", "dog"}
    assert ", at 64, 96 px" in blocks[1][0][0].heading
    assert refused(call(*what, "--class", "unicorn"), "no class 'unicorn'", "class 0, class 1")


def test_a_class_asked_for_is_shown_once_in_every_row(call, demo, one, two, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    asked = [word for name in CLASSES for word in ("--class", name)]
    what = ["explain", photo, "--model", one, "--model", two, "--dpi", 40, "--top", 2, *asked]
    assert call(*what).returncode == 0
    ((first, second),), = blocks
    for strip, model in ((first, one), (second, two)):
        network, facts = models.load(model)
        *_, probabilities = networks.predict_with_maps(
            network, facts, [torch.from_numpy(data.decode(photo))])
        top = [CLASSES[k] for k in probabilities[0].topk(2).indices]
        rest = [name for name in CLASSES if name not in top]
        shown = [re.sub(r" [\d.]+%.*", "", tile.text, flags=re.S) for tile in strip.tiles[1:]]
        assert shown == top + rest


def test_a_name_that_is_no_network_s(call, demo):
    photo = next((demo / "val").glob("*/*.JPEG"))
    result = call("explain", photo, "--model", "resnet81")
    assert refused(result, "no file and no network of torchvision's called resnet81", "resnet18")
    result = call("explain", photo, "--model", "mobilenet_v4")
    assert refused(result, "mobilenet_v2") and "quantized" not in result.stderr


def test_the_legend_of_one_photo_says_where_its_maps_are(call, demo, one, two, monkeypatch):
    photo, paper = next((demo / "val").glob("*/*.JPEG")), Written(monkeypatch)
    for models_, words in (([one, two], "Beside the photo: the map of each network's prediction"),
                           ([one], "below: the prediction")):
        paper.texts.clear()
        assert call("figure", "--images", photo, "--dpi", 40, "--models", *models_).returncode == 0
        assert words in " ".join(paper.texts)


# ---------------------------------------------------------------- a page to look into


def test_explain_writes_a_page(call, demo, one, two, tmp_path):
    photo = next((demo / "val").glob("*/*.JPEG"))
    result = call("explain", photo, "--model", one, "--model", two, "--out", "new/photo.html",
                  "--class", CLASSES[4], "--contrast", CLASSES[2], CLASSES[5])
    assert result.returncode == 0 and result.stdout == "new/photo.html\n", result.stderr
    page = (tmp_path / "new" / "photo.html").read_text(encoding="utf-8")
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert held["title"] == photo.name and held["classes"][held["first"]] == CLASSES[4]
    assert [network["label"] for network in held["networks"]] == ["cnn", "cnn (2)"]
    about = f"trained from scratch, at {SIZE} px: right on 50.0% of 40 val photos"
    assert held["networks"][0]["about"] == about
    assert os.listdir("new") == ["photo.html"] and len(page.encode()) < 300_000
    result = call("explain", photo, photo, "--model", one, "--out", "photo.html")
    assert refused(result, "photo.html is one picture for 2 photos")
    assert refused(call("explain", photo, "--model", one, "--out", "a.htm"), ".png, .pdf or .html")


def test_a_page_of_networks_whose_classes_come_in_another_order(call, demo, one, tmp_path):
    network, _ = models.load(one)
    for parameter in network.head.parameters():
        parameter.data = parameter.data.flip(0)
    models.save(tmp_path / "turned.pt", network, **facts_of(classes=CLASSES[::-1]))
    photo = next((demo / "val").glob("*/*.JPEG"))
    assert call("explain", photo, "--model", one, "--model", "turned.pt", "--out",
                "a.html").returncode == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    first, second = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["networks"]
    assert first["bias"] == second["bias"]
    assert first["logits"] == pytest.approx(second["logits"], abs=1e-5)
    maps, others = (np.stack([np.frombuffer(base64.b64decode(text), np.float32)
                              for text in network["maps"]]) for network in (first, second))
    assert np.allclose(maps, others, atol=1e-4)


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("command", ["figure", "explain", "gallery", "predict"])
def test_networks_compute_on_the_device_and_pictures_are_drawn_on_the_cpu(
        call, demo, one, monkeypatch, command):
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = {"figure": ["--data", demo, "--models", one, "--dpi", 40],
            "explain": [photo, "--model", one, "--dpi", 40],
            "gallery": ["--data", demo, "--model", one, "--dpi", 40],
            "predict": [photo, "--model", one]}[command]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(machine, "choose_device", lambda name: asked.append(name)
                      or torch.device("cpu"))
        assert call(command, *what).returncode == 0
        assert call(command, *what, "--device", "cuda:1").returncode == 0
    assert asked == ["auto", "cuda:1"]
    result = call(command, *what, "--device", "tpu")
    assert refused(result, "no device 'tpu' here")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("command", ["figure", "gallery"])
def test_a_gpu_draws_the_same(call, demo, one, seen, command):
    model = {"figure": "--models", "gallery": "--model"}[command]
    for device in ("cpu", "cuda"):
        assert call(command, model, one, "--data", demo, "--device", device).returncode == 0
    for ours, theirs in zip(seen[0][2], seen[1][2], strict=True):
        assert torch.allclose(ours.maps, theirs.maps, atol=1e-3) and ours.right == theirs.right


# ---------------------------------------------------------------- what is shown, said


def test_letters_of_other_alphabets(call, demo, tmp_path, monkeypatch):
    classes = ["Bj\u00f8rn", "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1", "\u72ac", "\u732b"]
    model = checkpoint(tmp_path / "best.pt", classes=classes)
    photo = next((demo / "val").glob("*/*.JPEG"))
    monkeypatch.setattr(fonts, "FOLDERS", [])
    paper = Written(monkeypatch)
    what = ["explain", photo, "--model", model, "--dpi", 40, "--top", 4]
    result = call(*what, "--contrast", "2", "3")
    words = {"class 1", "class 2", "class 3"} | {"Bjorn"}
    assert result.returncode == 0 and "letters of 3 classes: class 1 is \u0395" in result.stderr
    assert all(word in " ".join(paper.texts) for word in words), paper.texts
    assert "orange speaks for class 2, blue for class 3" in " ".join(paper.texts)
    assert not any("?" in text for text in paper.texts)
    result = call(*what, "--font", "missing.ttf")
    assert refused(result, "missing.ttf is no font")


def test_a_strong_map_that_greys_the_others_is_named(call, demo, one, monkeypatch):
    ask = networks.predict_with_maps

    def strong(network, facts, photos):
        maps, logits, probabilities = ask(network, facts, photos)
        maps[0] *= 1000
        return maps, logits, probabilities

    monkeypatch.setattr(networks, "predict_with_maps", strong)
    what = ["figure", "--models", one, "--data", demo, "--dpi", 40]
    result = call(*what)
    said = "9 of 10 maps stay below 25% of their scale, and are grey: --scale photo"
    assert result.returncode == 0 and f"cnn: {said}" in result.stderr
    assert "are grey" not in call(*what, "--scale", "photo").stderr
    monkeypatch.undo()


def test_a_contrast_has_a_line_for_each_of_the_two(call, demo, one, blocks):
    photo = next((demo / "val").glob("*/*.JPEG"))
    what = ["explain", photo, "--model", one, "--dpi", 40]
    assert call(*what, "--contrast", *CLASSES[:2]).returncode == call(*what).returncode == 0
    ((contrast,),), ((plain,),) = blocks
    assert [tile.both for tile in contrast.tiles] == [False] * 4 + [True]
    assert not any(tile.both for tile in plain.tiles)


def test_checkpoints_of_one_name_in_two_folders_have_two_pictures(call, demo, tmp_path):
    photo = next((demo / "val").glob("*/*.JPEG"))
    paths = [tmp_path / name for name in (
        "a/cnn/best.pt", "b/cnn/best.pt", "cnn/best.pt", "a-cnn/best.pt", "cnn.pt", "cnn.pth")]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint(path, seed=seed)
        for given in (path, path.relative_to(tmp_path)):  # the same file, the same name
            assert call("explain", photo, "--model", given, "--dpi", 40).returncode == 0
    written = [path.removeprefix(f"{photo.stem}-") for path in os.listdir("figures")]
    assert {"a-cnn.png", "b-cnn.png", "cnn.png"} < set(written) and len(written) == 6
    told = [re.sub("-[0-9a-f]{6}.png", "", path) for path in written if path.count("-") > 0]
    assert sorted(told) == ["a-cnn", "a-cnn.png", "b-cnn.png", "cnn", "cnn"]  # else with a digest


def test_long_names_are_cut_and_told_apart():
    """A name has 255 bytes at most, those of a half-written file included."""
    photo, model = Path(f"{'写' * 60}.png"), f"runs/{'真' * 50}/best.pt"
    words = ["English springer", "cassette player"] * 9
    names = [asked.explanation_names([photo], [model], [*words, last], Path("figures"))[0].name
             for last in ("church", "tench")]
    assert names[0] != names[1] and all(len(f"{name}.4194304.part".encode()) < 256
                                        for name in names)
    folder = Path("figures")
    twice = asked.explanation_names([Path("a/Cat.jpg"), Path("b/cat.jpg")], ["cnn"], [], folder)
    assert len({str(path).casefold() for path in twice}) == 2  # one file on a Mac's disk
    ((odd,),) = [asked.explanation_names([photo], ["cnn"], ["\udce9"], Path("figures"))]
    assert odd.suffix == ".png"  # no letter in this terminal's code


# ---------------------------------------------------------------- whose photos


def trained_checkpoint(path, folder, **more):
    """A checkpoint that knows its photos."""
    train, val = (folders.load(folder, split) for split in ("train", "val"))
    torch.manual_seed(1)
    network = models.cnn()
    nn.init.normal_(network.head.weight)
    facts = facts_of(settings={"data": [train.fingerprint, val.fingerprint]},
                     trained_on=list(train.digests), **more)
    models.save(path, network, **facts)
    return path


def test_the_photos_of_the_training_are_the_default(call, demo, tmp_path, seen):
    model = trained_checkpoint(tmp_path / "best.pt", demo, data=str(demo))
    for command, option in (("gallery", "--model"), ("figure", "--models")):
        result = call(command, option, model, "--dpi", 40)
        assert result.returncode == 0 and f"{demo}: 60 train" in result.stderr, result.stderr
        assert "not the val photos" not in result.stderr and "trained on" not in result.stderr
    model = trained_checkpoint(tmp_path / "best.pt", demo, data="gone")
    assert refused(call("gallery", "--model", model), "gone, on which cnn was trained", "--data")


def test_other_photos_than_the_accuracy_is_of_are_named(call, demo, tmp_path):
    model = trained_checkpoint(tmp_path / "best.pt", demo)
    other = tmp_path / "data" / "imagenette2-160"
    shutil.copytree(demo, other, ignore=shutil.ignore_patterns("*.pixels", "*.lock"))
    result = call("gallery", "--model", model, "--dpi", 40)
    assert result.returncode == 0 and "not the val photos" not in result.stderr  # a copy
    next((other / "val").glob("*/*.JPEG")).unlink()
    for command, option in (("gallery", "--model"), ("figure", "--models")):
        result = call(command, option, model, "--dpi", 40)
        said = "these are not the val photos of the training of cnn: its accuracy is of others"
        assert result.returncode == 0 and f"data/imagenette2-160: {said}" in result.stderr


def test_photos_that_were_trained_on_are_counted(call, demo, tmp_path):
    model = trained_checkpoint(tmp_path / "best.pt", demo)
    other = tmp_path / "turned"
    shutil.copytree(demo / "train", other / "val")
    shutil.copytree(demo / "val", other / "train")
    for folder in (other / "val").iterdir():  # one photo of each class, trained on; another, not
        first, *rest = sorted(folder.iterdir())
        for path in rest:
            path.unlink()
        Image.fromarray(noise_photo((50, 50), seed=ord(folder.name[-1])).numpy()).save(
            folder / "new.png")
    result = call("gallery", "--model", model, "--data", other, "--dpi", 40)
    assert "cnn was trained on 10 of these 20 val photos" in result.stderr
    result = call("figure", "--models", model, "--data", other, "--dpi", 40)
    assert re.search(r"cnn was trained on \d of these 10 val photos", result.stderr)


def test_the_network_that_one_trained_oneself_is_named_beside_torchvisions(tmp_path, monkeypatch,
                                                                           capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "load_networks", lambda paths, *given: paths)
    options = SimpleNamespace(weights=None, device="cpu", looks=None, names=None)
    for trained in (False, True):
        assert asked.load_networks(options, ["resnet18"]) == ["resnet18"]
        said = "resnet18 is ImageNet's; the one that you trained is runs/resnet18/best.pt\n"
        assert capsys.readouterr().err == said * trained
        (tmp_path / "runs/resnet18").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/resnet18/best.pt").touch()


def test_after_the_demo_its_networks_are_found(call, demo, tmp_path):
    photo = next((demo / "val").glob("*/*.JPEG"))
    for command in (["explain", photo], ["predict", photo], ["gallery"]):
        assert refused(call(*command), "runs/cnn/best.pt", "make train-cnn", "--model; resnet18")
    for name in ("cnn", "resnet18"):
        (tmp_path / "runs/demo" / name).mkdir(parents=True)
        trained_checkpoint(tmp_path / "runs/demo" / name / "best.pt", demo, data=str(demo))
    result = call("explain", photo, "--dpi", 40)
    assert result.returncode == 0 and "runs/demo/cnn/best.pt, of `make demo`" in result.stderr
    for command in (["figure"], ["gallery"], ["predict", photo]):
        result = call(*command)
        assert result.returncode == 0 and "of `make demo`" in result.stderr, result.stderr
    (tmp_path / "runs/cnn").mkdir()
    checkpoint(tmp_path / "runs/cnn/best.pt")
    assert "make demo" not in call("explain", photo, "--dpi", 40).stderr
