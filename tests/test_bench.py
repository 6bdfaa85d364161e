"""The benchmark's jobs run, and their numbers are of the right size. How fast they are is not tested."""

import json
import subprocess
import sys

import bench
import pytest
import torch
from conftest import REPO

import train

CPU, FLOAT32 = torch.device("cpu"), train.Precision(None, False, torch.channels_last)


def test_a_ratio_is_of_means_and_its_spread_of_turns():
    assert bench.against([1.0, 2.0], [4.0, 4.0]) == ("1.5 s", "4.0 s", "2.7 x (2.0 to 4.0)")


def test_an_epoch_is_timed_with_its_waits(demo):
    result = bench.epoch(demo, CPU, FLOAT32, crop=32, batch_size=10)
    assert 0 < result["waited"] < 1 and result["images_per_second"] == pytest.approx(60 / result["seconds"])


def test_the_usual_way_learns_from_the_same_photos(demo, monkeypatch):
    monkeypatch.setattr(bench, "BATCH", 5)
    assert bench.epoch_usual(demo, CPU, FLOAT32, steps=5)["images_per_second"] > 0


def test_operations_are_counted_forward_and_backward(monkeypatch):
    result = bench.peak(None, CPU, FLOAT32)
    first = 2 * 32 * 3 * 16 * 32 * 32  # the frozen first layer: forward alone
    last = 3 * 2 * 256 * 128 * 9 * 8 * 8  # the last convolution: forward, and backward to its input and to its weights
    assert first + last < 1e12 * result["per_image"] < 1e9 and result["peak"] > 1e-3


@pytest.mark.parametrize("name", ["head_usual", "maps"])
def test_a_job_prints_its_seconds(name, demo):
    command = [sys.executable, REPO / "tests" / "bench.py", "--data", demo, "--device", "cpu", "--job"]
    done = subprocess.run([*map(str, command), json.dumps([name, {}])], capture_output=True, text=True)
    assert json.loads(done.stdout)["seconds"] > 0, done.stderr
