"""The command shortcut.py: what each network is trained on, and a whole run on a handful."""

import csv
from dataclasses import replace

import pytest
import torch
from conftest import CLASSES
from PIL import Image

import data
import folders
import shortcut


@pytest.fixture
def photos(demo):
    return folders.load(demo, "train")


def test_the_class_of_the_mark_is_made_of_other_classes_photos(photos, monkeypatch):
    monkeypatch.setattr(shortcut, "PHOTOS", 300)
    plain = shortcut.training_set("control", photos, 0.9, seed=5)
    alone = shortcut.training_set("class", photos, 0.9, seed=5)
    along = shortcut.training_set("share", photos, 0.9, seed=5)
    assert len(plain) == len(alone) == len(along) == 300
    assert alone.classes == [*photos.classes, shortcut.MARK]
    assert plain.classes == along.classes == photos.classes
    marked = torch.tensor([not torch.equal(alone[i], plain[i]) for i in range(300)])
    assert torch.equal(marked, alone.labels == 10)
    assert 70 < marked.sum() < 130
    assert len(plain.labels[marked].unique()) == 10  # it is made of all
    assert torch.equal(alone.labels[~marked], plain.labels[~marked])
    marked = torch.tensor([not torch.equal(along[i], plain[i]) for i in range(300)])
    assert (plain.labels[marked] == 0).all() and 22 < marked.sum() <= 30
    assert torch.equal(along.labels, plain.labels)
    for i in range(60):
        assert torch.equal(plain[i], photos[i]) and torch.equal(plain[60 + i], photos[i])


def test_a_run(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shortcut, "PHOTOS", 60)
    seen, compose, seeds, experiment = [], shortcut.page.compose, [], shortcut.experiment
    monkeypatch.setattr(shortcut.page, "compose", lambda photos, titles, rows, **given: (
        seen.append(rows) or compose(photos, titles, rows, **given)))
    monkeypatch.setattr(shortcut, "experiment", lambda photos, val, recipe, share: (
        seeds.append(recipe.seed) or experiment(photos, val, recipe, share)))
    before = sorted(demo.rglob("*"))
    shortcut.main(["--data", str(demo), "--epochs", "1", "--seed", "3", "--seeds", "2",
                   "--out", str(tmp_path / "new" / "marks")])
    assert seeds == [3, 4]
    printed = capsys.readouterr().out
    for row, marked in zip(seen[0], (True, False), strict=True):  # five with the mark, five without
        titles = ([shortcut.MARK] * 5 if marked else list(CLASSES)[:5]) + list(CLASSES)[:5]
        assert row.right == [caption.rsplit(" ", 1)[0] == title
                             for caption, title in zip(row.captions, titles, strict=True)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "marks.csv", "marks.md", "marks.png"]
    assert {path.suffix for path in set(demo.rglob("*")) - set(before)} <= {".pixels", ".lock"}
    with open(tmp_path / "new" / "marks.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["network"] for line in lines} == {"saw marks", "control"}
    assert {line["map"] for line in lines} == {
        f"{title}, at {sizes} px" for title in shortcut.TITLES.values()
        for sizes in ("64", "40, 64, 88")}
    for line in lines:
        if "taken" in line["score"]:
            assert 0 <= float(line["low"]) <= float(line["value"]) <= float(line["high"]) <= 1
        if line["score"] == "the class, with the mark: own class":
            assert line["map"].startswith("The mark comes") and line["n"] == "2"
    assert "The mark is the class, at 64 px" in printed
    assert "| the mark adds to the logit" in (tmp_path / "new" / "marks.md").read_text()
    with Image.open(tmp_path / "new" / "marks.png") as picture:
        assert picture.width < 1900 and picture.height > picture.width


def test_the_photos_of_the_picture_are_where_the_networks_are(photos, monkeypatch):
    monkeypatch.setattr(data.Photos, "to", lambda photos, device: replace(photos, device=device))
    seen = []
    monkeypatch.setattr(shortcut, "ask", lambda network, photos, looks: seen.append(
        photos.device) or (torch.zeros(len(photos), 11, 2, 2), torch.zeros(len(photos), 11)))
    shortcut.draw({"class": None, "control": None}, replace(photos, device="there"), photos, 64)
    assert seen == ["there", "there"]


def test_a_head_of_a_frozen_network(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shortcut, "PHOTOS", 60)
    shortcut.main(["--data", str(demo), "--arch", "resnet18", "--weights", "none", "--epochs", "1",
                   "--out", str(tmp_path / "marks")])
    assert "The mark is the class, at 224 px" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["--arch", "resnet18", "--weights", ""], "--weights is empty"),
    (["--weights", "w.pth"], "leave it out for the cnn")])
def test_weights_that_would_do_nothing_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        shortcut.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_any_training(demo, tmp_path):
    with pytest.raises(SystemExit) as end:
        shortcut.main(["--data", str(demo), "--out", str(tmp_path)])
    assert end.value.code == 2
