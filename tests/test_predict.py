"""predict.py: a table of what a network says of photos, and its maps as numbers."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES, checkpoint, noise_photo, refused
from PIL import Image

import data
import figures
import models
import networks
import predict

SIZES = [(40, 90), (30, 20), (50, 50)]


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(SIZES):
        image = Image.fromarray(noise_photo(size, seed=i).numpy())
        image.save(tmp_path / "photos" / f"{'abc'[i]}, ø.png")
    return tmp_path / "photos"


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expected(model, photos):
    network, facts = models.load(model)
    images = [torch.from_numpy(data.decode(path)) for path in sorted(photos.iterdir())]
    return networks.predict_with_maps(network, facts, images)


def test_a_row_a_photo(call, one, photos):
    result = call("cam.py", "predict", "photos", "--model", one, "--out", "new/found.csv")
    assert result.returncode == 0 and result.stdout == "new/found.csv\n", result.stderr
    rows = rows_of("new/found.csv")
    assert [row["file"] for row in rows] == [f"photos/{name}, ø.png" for name in "abc"]
    _, logits, probabilities = expected(one, photos)
    for i, row in enumerate(rows):
        for place, k in enumerate(logits[i].argsort(descending=True)[:3].tolist(), 1):
            assert row[f"class_{place}"] == CLASSES[k]
            assert float(row[f"probability_{place}"]) == pytest.approx(float(probabilities[i, k]),
                                                                       rel=1e-5)
            assert float(row[f"logit_{place}"]) == pytest.approx(float(logits[i, k]), rel=1e-5)
    assert "class_4" not in rows[0] and os.listdir("new") == ["found.csv"]


def test_numpy_alone_adds_the_maps_up_to_the_logits(call, one, photos):
    assert call("cam.py", "predict", "photos", "--model", one, "--out", "a.csv", "--top", 99,
                "--maps", "maps.npz").returncode == 0
    found = np.load("maps.npz")  # no pickle in it
    assert np.allclose(found["maps"].mean((2, 3)) + found["bias"], found["logits"], atol=1e-4)
    maps, logits, _ = expected(one, photos)
    assert (found["maps"] == maps.numpy()).all() and (found["logits"] == logits.numpy()).all()
    assert found["classes"].tolist() == CLASSES
    assert found["sizes"].tolist() == [list(size) for size in SIZES]
    assert found["file"].tolist() == [row["file"] for row in rows_of("a.csv")]
    assert rows_of("a.csv")[0].keys() >= {"class_10", "logit_10"}


def test_a_head_without_bias_has_zeros(call, tmp_path, photos):
    class Headless:
        bias = None

    with open(tmp_path / "maps.npz", "wb") as file:
        maps = torch.randn(1, 2, 3, 3)
        predict.write_maps(file, type("", (), {"head": Headless}), {"classes": ["a", "b"]}, ["x"],
                           [((9, 9), maps, maps.mean((2, 3)))])
    found = np.load(tmp_path / "maps.npz")
    assert np.allclose(found["maps"].mean((2, 3)) + found["bias"], found["logits"], atol=1e-6)


def test_both_files_or_none(call, one, photos):
    shutil.copy(photos / "a, ø.png", "whole.png")
    (photos / "z.png").write_bytes(b"no photo")
    result = call("cam.py", "predict", "photos", "--model", one, "--maps", "m.npz")
    assert refused(result, "z.png") and sorted(os.listdir()) == ["figures", "photos", "whole.png"]


def test_names_and_photos_that_will_not_do(call, one, tmp_path):
    assert refused(call("cam.py", "predict", "a.png", "--model", one, "--out", "a.txt"), ".csv")
    assert refused(call("cam.py", "predict", "a.png", "--model", one, "--maps", "a.csv"), ".npz")
    assert refused(call("cam.py", "predict", "a.png", "--model", one), "a.png does not exist")
    two = call("cam.py", "predict", "a.png", "--model", one, "--model", one)
    assert two.returncode == 2 and "--model is given twice" in two.stderr
    assert call("cam.py", "predict").returncode == 2


def test_a_photo_is_asked_for_one_by_one(tmp_path, photos, monkeypatch):
    """Thousands of photos do not lie in memory with all their maps."""
    model, seen = checkpoint(tmp_path / "best.pt"), []
    ask = networks.predict_with_maps
    monkeypatch.setattr(networks, "predict_with_maps",
                        lambda *given: seen.append(len(given[2])) or ask(*given))
    monkeypatch.chdir(tmp_path)
    figures.main(["predict", "photos", "--model", str(model), "--maps", "m.npz"])
    assert seen == [1, 1, 1] and os.path.exists("figures/predictions.csv")
