"""The benchmark of time until an accuracy: its loops work, and its rows are what make results
reads."""

import json

import bench_accuracy
import pytest
import torch
from torch import nn

import machine

CPU = torch.device("cpu")


@pytest.fixture
def finished_run(tmp_path):
    """A folder with what train.py leaves of a training of three epochs, made up."""
    result = dict(command="python train.py cnn --data /secret/place", machine=machine.facts(),
                  precision="float32", device="cpu", processes=1, threads=2, accuracy_on="val",
                  recipe=dict(crop=64, size=96, batch_size=64, epochs=3))
    folder = tmp_path / "cnn"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    log = "epoch,val_accuracy,seconds\n1,0.7,10.5\n2,0.85,10\n3,0.9,10\n"
    (folder / "log.csv").write_text(log)
    return folder


def tiny():
    """A network that is trained in no time."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))


def test_the_first_epoch_that_gets_there_counts():
    rows = [(0.5, 1.0), (0.86, 2.0), (0.84, 4.0), (0.9, 8.0)]
    of_all = dict(best=0.9, all_seconds=15.0)
    assert bench_accuracy.first_pass(rows, 0.85) == dict(seconds=3.0, epochs=2, **of_all)
    assert bench_accuracy.first_pass(rows, 0.95) == dict(seconds=None, epochs=None, **of_all)


def test_a_finished_run_is_read(finished_run):
    row = bench_accuracy.this_project(finished_run, None, CPU, 0.85, 10)
    assert (row["seconds"], row["epochs"], row["of_epochs"]) == (20.5, 2, 3)
    assert row["settings"].startswith("`python train.py cnn --data place`")
    assert "64 px crops" in row["settings"]


@pytest.mark.parametrize(("key", "value", "word"), [
    ("accuracy_on", "held-out train", "held-out"),
    ("machine", dict(processor="other"), "another machine"),
    ("machine", None, "no finished training"), ("recipe", dict(crop=32, size=48), "64 px crops")])
def test_a_run_that_cannot_be_compared_is_refused(finished_run, key, value, word):
    result = json.loads((finished_run / "result.json").read_text())
    (finished_run / "result.json").write_text(json.dumps(result | {key: value}))
    with pytest.raises(ValueError, match=word):
        bench_accuracy.this_project(finished_run, None, CPU, 0.85, 10)


def test_an_unfinished_run_is_refused(finished_run):
    (finished_run / "result.json").unlink()
    with pytest.raises(ValueError, match="no finished training"):
        bench_accuracy.this_project(finished_run, None, CPU, 0.85, 10)


@pytest.mark.parametrize(("accuracy", "epochs"), [(0.0, 1), (1.1, None)])
def test_the_usual_way_trains_until_it_is_there(demo, monkeypatch, accuracy, epochs):
    monkeypatch.setattr(bench_accuracy, "BATCH", 20)
    network = tiny()
    before = network[2].weight.detach().clone()
    row = bench_accuracy.usual_way("tiny", network, demo, CPU, accuracy, 2)
    assert row["epochs"] == epochs and row["of_epochs"] == 2
    assert (row["seconds"] is None) == (epochs is None)
    assert not torch.equal(network[2].weight, before)


def test_without_a_run_a_new_one_is_trained(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_accuracy, "HERE", tmp_path)
    copy = f"shutil.copytree({str(finished_run)!r}, options['--runs'] + '/cnn')"
    (tmp_path / "train.py").write_text(
        "import shutil, sys; options = dict(zip(sys.argv[2::2], sys.argv[3::2])); "
        f"assert sys.argv[1] == 'cnn' and options['--epochs'] == '7'; {copy}")
    assert bench_accuracy.this_project(None, "photos", CPU, 0.85, 7)["seconds"] == 20.5
    (tmp_path / "train.py").write_text("raise SystemExit(2)")
    with pytest.raises(ValueError, match=r"train\.py.* returned non-zero exit status 2"):
        bench_accuracy.this_project(None, "photos", CPU, 0.85, 7)


def test_the_command_writes_a_row_for_each(demo, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_accuracy, "BATCH", 20)
    monkeypatch.setattr(bench_accuracy.torchvision.models, "resnet18", lambda num_classes: tiny())
    monkeypatch.setattr(bench_accuracy.models, "cnn", tiny)
    out = tmp_path / "new" / "bench-accuracy.json"
    bench_accuracy.main([f"--data={demo}", "--device=cpu", f"--run={finished_run}",
                         "--usual-epochs=1", f"--out={out}"])
    facts = json.loads(out.read_text())
    assert facts["accuracy"] == 0.85
    assert [row["epochs"] for row in facts["rows"]] == [2, None, None]
