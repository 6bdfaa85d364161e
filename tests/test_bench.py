"""The benchmark's jobs run, and their numbers are of the right size. How fast they are is not tested."""

import json
import os
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


def test_operations_are_counted_forward_and_backward():
    forward = [(3, 32, 4, 32), (32, 64, 4, 16), *[(64, 64, 3, 16)] * 4, (64, 192, 4, 8), *[(192, 192, 3, 8)] * 6,
               (192, 384, 3, 8), (384, 10, 1, 1)]
    forward = [2 * inputs * outputs * k**2 * side**2 for inputs, outputs, k, side in forward]
    backward = 2 * sum(forward[1:])  # to the weights and to the input; the first layer is frozen
    result = bench.peak(None, CPU, FLOAT32, side=256)
    assert 1e12 * result["per_image"] == pytest.approx(sum(forward) + backward, rel=1e-6) and result["peak"] > 0


def test_the_memory_of_a_command_is_seen():
    code = "import time; held = b'1' * 300_000_000; time.sleep(0.5); print(len(held))"
    out, memory = bench.run(sys.executable, "-c", code)
    assert out == "300000000\n" and (0.27 < memory < 0.5 or not bench.anonymous(os.getpid()))


@pytest.mark.parametrize("name", ["head_usual", "maps"])
def test_a_job_prints_its_seconds(name, demo):
    command = [sys.executable, REPO / "tests" / "bench.py", "--data", demo, "--device", "cpu", "--job"]
    done = subprocess.run([*map(str, command), json.dumps([name, {}])], capture_output=True, text=True)
    assert json.loads(done.stdout)["seconds"] > 0, done.stderr
