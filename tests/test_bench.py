"""The benchmark's jobs run, and their numbers are of the right size. How fast they are is not tested."""

import json
import os
import subprocess
import sys

import bench
import pytest
import torch
from conftest import REPO

import models
import train

CPU, FLOAT32 = torch.device("cpu"), train.Precision(None, False, torch.channels_last)
FAKE = dict(seconds=2.0, images_per_second=50.0, peak=0.5, memory=1.5,
            shares=dict(batch=0.05, optimiser=0.1, average=0.01))  # what a job gives


def test_a_ratio_is_of_means_and_its_spread_of_turns():
    assert bench.cells("a", "s", [1.0, 2.0], [4.0, 4.0]) == ("a", "1.5 s", "4.0 s", "2.7 x (2.0 to 4.0)")
    assert bench.cells("a", "images/s", [600, 400], [250, 250])[1:] == ("500 images/s", "250 images/s",
                                                                        "2.0 x (1.6 to 2.4)")


def test_without_a_usual_way_the_spread_is_that_of_the_measurements():
    assert bench.cells("a", "%", [0.1, 0.05, 0.15], []) == ("a", "10.0%", "", "5.0% to 15.0%")
    assert bench.cells("a", "GiB", [0.5], [0.25]) == ("a", "0.50 GiB", "0.25 GiB", "")
    assert bench.cells("a", "TFLOP/s", [0.0532], []) == ("a", "0.0532 TFLOP/s", "", "")


def test_an_epoch_is_timed_with_its_waits(demo):
    result = bench.epoch(demo, CPU, FLOAT32, crop=32, batch_size=10)
    assert result["images_per_second"] == pytest.approx(60 / result["seconds"])
    assert set(result["shares"]) == {"batch", "optimiser", "average"}
    assert min(result["shares"].values()) > 0 and sum(result["shares"].values()) < 1


def test_the_usual_way_learns_from_the_same_photos(demo, monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 5)
    assert bench.epoch_usual(demo, CPU, FLOAT32, steps=5)["images_per_second"] > 0


def test_operations_are_counted_forward_and_backward():
    forward = [(3, 32, 4, 32), (32, 64, 4, 16), *[(64, 64, 3, 16)] * 4, (64, 192, 4, 8), *[(192, 192, 3, 8)] * 6,
               (192, 384, 3, 8), (384, 10, 1, 1)]
    forward = [2 * inputs * outputs * k**2 * side**2 for inputs, outputs, k, side in forward]
    backward = 2 * sum(forward[1:])  # to the weights and to the input; the first layer is frozen
    network, _ = bench.our_network(CPU, FLOAT32)
    assert 1e12 * bench.operations(network, 64) == pytest.approx(sum(forward))
    assert 1e12 * bench.operations(network, 64, backward=True) == pytest.approx(sum(forward) + backward)


def test_a_matrix_product_has_a_speed():
    assert bench.peak(None, CPU, FLOAT32, side=256)["peak"] > 0


def test_the_memory_of_a_command_is_seen():
    code = "import time; held = b'1' * 300_000_000; time.sleep(0.5); print(len(held))"
    out, memory = bench.run(sys.executable, "-c", code)
    assert out == "300000000\n" and (0.27 < memory < 0.5 or not bench.anonymous(os.getpid()))


@pytest.mark.parametrize("name", ["head_usual", "maps"])
def test_a_job_prints_its_seconds(name, demo):
    command = [sys.executable, REPO / "tests" / "bench.py", "--data", demo, "--device", "cpu", "--job"]
    done = subprocess.run([*map(str, command), json.dumps([name, {}])], capture_output=True, text=True)
    assert json.loads(done.stdout)["seconds"] > 0, done.stderr


def test_all_rows_are_printed_and_written_as_data(tmp_path, monkeypatch, demo, capsys):
    """The whole command, its jobs and the commands that it measures replaced by numbers."""
    monkeypatch.setattr(bench, "job", lambda command, name, **_: FAKE)
    monkeypatch.setattr(bench, "run", lambda *command: ("", 0.25))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    out = tmp_path / "new" / "bench.json"
    arguments = ["--data", str(demo), "--device", "cpu", "--peers", "x", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert written["machine"]["torch"] == torch.__version__ and written["command"].startswith("python tests/bench.py ")
    rows = {row["job"]: row for row in written["rows"]}
    assert rows["an epoch of the CNN, 64 px"] == dict(job="an epoch of the CNN, 64 px", unit="images/s",
                                                      here=[50.0] * 3, usual=[50.0] * 3)
    assert rows["share of a step: optimiser"]["here"] == [0.1] * 3
    forward = bench.operations(models.build("resnet18").eval(), 224)
    assert rows["share of a large matrix product, float32: maps"]["here"] == pytest.approx([50 * forward / 0.5] * 3)
    for row in written["rows"]:
        assert "| " + " | ".join(bench.cells(**row)) + " |" in printed


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, demo, capsys):
    def job(command, name, **_):
        if name == "head_usual":
            raise bench.data.DataError("no memory is left")
        return FAKE

    monkeypatch.setattr(bench, "job", job)
    monkeypatch.setattr(bench, "run", lambda *command: ("", 0.25))
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--data", str(demo), "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2 and "no memory is left" in capsys.readouterr().err
    rows = [row["job"] for row in json.loads(out.read_text())["rows"]]
    assert "all the photos, 64 px" in rows and "last layer of ResNet-18, 5 epochs" not in rows
