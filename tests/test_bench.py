"""The benchmark's jobs run, and their numbers are of the right size. How fast they are is not
tested."""

import json
import os
import sys
from pathlib import Path

import bench
import pytest
import torch

import folders
import models
import train

CPU, FLOAT32 = torch.device("cpu"), train.Precision(None, False, torch.channels_last)
FAKE = dict(seconds=2.0, images_per_second=50.0, peak=0.5, memory=1.5,
            shares=dict(batch=0.05, optimiser=0.1, average=0.01))  # what a job gives


@pytest.fixture
def typed(monkeypatch):
    """typed("--data", folder, ...): the command, in this process."""

    def call(*arguments):
        command = ["tests/bench.py", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", command)
        bench.main()

    return call


def test_a_ratio_is_of_means_and_its_spread_of_turns():
    seconds = bench.cells("a", "s", [1.0, 2.0], [4.0, 4.0])
    assert seconds == ("a", "1.5 s", "4.0 s", "2.7 x (2.0 to 4.0)")
    speeds = bench.cells("a", "images/s", [600, 400], [250, 250])
    assert speeds[1:] == ("500 images/s", "250 images/s", "2.0 x (1.6 to 2.4)")


def test_without_a_usual_way_the_spread_is_that_of_the_measurements():
    assert bench.cells("a", "%", [0.1, 0.05, 0.15], []) == ("a", "10.0%", "", "5.0% to 15.0%")
    assert bench.cells("a", "GiB", [0.5], [0.25]) == ("a", "0.50 GiB", "0.25 GiB", "")
    assert bench.cells("a", "TFLOP/s", [0.0532], []) == ("a", "0.0532 TFLOP/s", "", "")


def test_an_epoch_is_timed_with_its_waits(demo):
    result = bench.epoch(demo, CPU, FLOAT32, crop=16, batch_size=20)
    assert result["images_per_second"] == pytest.approx(60 / result["seconds"])
    assert set(result["shares"]) == {"batch", "optimiser", "average"}
    assert min(result["shares"].values()) > 0 and sum(result["shares"].values()) < 1


@pytest.mark.parametrize("tuned", [False, True])
def test_the_usual_way_learns_from_the_same_photos(demo, monkeypatch, tuned):
    """Tuned, in the precision of the device."""
    seen, forward = [], models.CAMNet.forward
    monkeypatch.setattr(bench, "BATCH", 5)
    monkeypatch.setattr(models.CAMNet, "forward",
                        lambda self, x: seen.append(forward(self, x)) or seen[-1])
    bfloat16 = FLOAT32._replace(dtype=torch.bfloat16)
    assert bench.epoch_usual(demo, CPU, bfloat16, 5, tuned)["images_per_second"] > 0
    assert {logits.dtype for logits in seen} == {torch.bfloat16 if tuned else torch.float32}


def test_operations_are_counted_forward_and_backward():
    layers = [(3, 32, 3, 64), (32, 64, 3, 32), *[(64, 64, 3, 16)] * 4, (64, 192, 3, 16),
              *[(192, 192, 3, 8)] * 6, (192, 384, 3, 8), (384, 10, 1, 1)]
    forward = [2 * inputs * outputs * k**2 * side**2 for inputs, outputs, k, side in layers]
    backward = 2 * sum(forward[1:])  # to the weights and to the input; the first layer is frozen
    network, _ = bench.our_network(CPU, FLOAT32)
    assert 1e12 * bench.operations(network, 64) == pytest.approx(sum(forward))
    both = 1e12 * bench.operations(network, 64, backward=True)
    assert both == pytest.approx(sum(forward) + backward)


def test_a_matrix_product_has_a_speed():
    assert bench.peak(None, CPU, FLOAT32, side=256)["peak"] > 0


def test_the_memory_of_a_command_is_seen():
    code = "import time; held = b'1' * 300_000_000; time.sleep(0.5); print(len(held))"
    out, memory = bench.run(sys.executable, "-c", code)
    assert out == "300000000\n" and (0.27 < memory < 0.5 or not bench.anonymous(os.getpid()))


@pytest.mark.parametrize("name", ["head_usual", "maps"])
def test_a_job_prints_its_seconds(name, demo, typed, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZE", 96)
    typed("--data", demo, "--job", json.dumps([name, {}]))
    assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_a_last_layer_is_trained_on_features_that_nobody_has_stored(small, no_decoding,
                                                                    monkeypatch):
    def train_py(command, **options):
        photos = Path(command[command.index("--data") + 1])
        for split in folders.COUNTS:
            assert len(folders.load(photos, split)) == 20
        folders.pixels_path(photos, "train").with_suffix(".features").touch()

    for split in folders.COUNTS:
        folders.load(small, split)
    before = {path.name for path in small.iterdir()}
    no_decoding()
    monkeypatch.setattr(bench.subprocess, "run", train_py)
    assert bench.head(small, CPU, FLOAT32)["seconds"] > 0
    assert {path.name for path in small.iterdir()} == before


@pytest.fixture
def faked(monkeypatch):
    """Jobs, and the commands that they measure, are replaced by numbers."""
    monkeypatch.setattr(bench, "job", lambda command, name, **_: FAKE)
    monkeypatch.setattr(bench, "run", lambda *command: ("", 0.25))


def test_all_rows_are_printed_and_written_as_data(tmp_path, monkeypatch, demo, typed, faked,
                                                  capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    out = tmp_path / "new" / "bench.json"
    typed("--data", demo, "--peers", "x", "--out", out)
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert written["machine"]["torch"] == torch.__version__
    assert written["command"].startswith("python tests/bench.py ")
    rows = {row["job"]: row for row in written["rows"]}
    epoch = "an epoch of the CNN, 64 px; that way tuned"
    assert rows[epoch] == dict(job=epoch, unit="images/s", here=[50.0] * 3, usual=[50.0] * 3)
    assert rows["share of a step: optimiser"]["here"] == [0.1] * 3
    assert rows["last layer of ResNet-18, 5 epochs"]["here"] == [2.0] * 3
    share = 50 * bench.operations(models.build("resnet18").eval(), 224) / 0.5
    reached = rows["share of a large matrix product, float32: maps"]["here"]
    assert reached == pytest.approx([share] * 3)
    for row in written["rows"]:
        assert "| " + " | ".join(bench.cells(**row)) + " |" in printed


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, demo, typed, faked,
                                                    capsys):
    def job(command, name, **_):
        if name == "head_usual":
            raise ValueError("no memory is left")
        return FAKE

    monkeypatch.setattr(bench, "job", job)
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stopped:
        typed("--data", demo, "--out", out)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "bench.py: no memory is left"
    rows = [row["job"] for row in json.loads(out.read_text())["rows"]]
    assert "all the photos, 64 px" in rows and "last layer of ResNet-18, 5 epochs" not in rows
