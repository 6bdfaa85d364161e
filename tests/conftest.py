"""What the tests share: a small demo data set, drawn once, and a way to run the commands as a user would."""

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import demo as drawing
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # small tensors gain nothing from more, and threads that wait for each other lose a lot


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder in ImageNette's layout: 6 photos of each class to train on, 2 to validate. Do not change it."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    drawing.draw(folder, train=6, val=2)
    return folder


@pytest.fixture
def run(tmp_path):
    """run("train.py", "cnn", ...) in an empty folder: a CompletedProcess with text output."""

    def call(script, *arguments, cwd=tmp_path, **options):
        command = [sys.executable, str(REPO / script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **options)

    return call


def refused(result, *words):
    """Whether a command ended as bad input should: status 2, one sentence on stderr that has `words`, no traceback."""
    lines = [line for line in result.stderr.splitlines() if ".py: " in line]
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]
    return True


@contextlib.contextmanager
def serving(server):
    """`server` of the standard library, answering from a thread of its own as long as the block runs."""
    with server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def import_alone(module):
    """Code that imports `module` from the working directory and fails where that asks the network, sets a seed or
    starts a device; `project` then holds the names of the project's other modules that came along."""
    return f"""
import json, os, socket, sys, torch
def refuse(*_, **__):
    raise AssertionError("network at import")
socket.socket.connect, state, sys.path[:0] = refuse, torch.get_rng_state(), [os.getcwd()]
import {module}
assert torch.equal(torch.get_rng_state(), state), "a seed at import"
assert not torch.cuda.is_initialized(), "a device at import"
project = ({{"data", "models", "train", "cam", "score", "demo", "conftest"}} - {{"{module}"}}) & set(sys.modules)
"""


class FakeDevice(TorchDispatchMode):
    """Tensors on "cuda" are fake: they have a shape and no numbers. What asks one for a number raises, as it would
    wait for the device; so does a copy that waits, in either direction. All else happens as always."""

    copies = 0  # to the device
    watches = True  # a network may be made on the device while it looks away

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if func is torch.ops.aten._to_copy.default and target is not None and self.watches:
            if target.type == "cuda" and not fake:
                assert kwargs.get("non_blocking"), "a copy to the device that waits for it"
                self.copies += 1
            assert not (fake and target.type == "cpu"), "a copy from the device"
        real = not fake and (target is None or target.type != "cuda")
        with unset_fake_temporarily() if real else contextlib.nullcontext():
            return func(*args, **kwargs)


@pytest.fixture
def fake_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # there is no driver to pin for
    with FakeTensorMode(allow_non_fake_inputs=True), FakeDevice() as device:
        yield device


def on_fake_cuda(photos, moved=True):
    """Photos that fit on the fake device, or, moved=False, do not."""
    pixels = torch.empty_like(photos.pixels, device="cuda") if moved else photos.pixels
    return replace(photos, pixels=pixels, device=torch.device("cuda"))
