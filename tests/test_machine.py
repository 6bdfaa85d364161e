"""machine.py: the device, and what a number was measured on."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO

import machine

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpux", "meta"])
def test_unknown_devices_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"no device '{name}'.*--device"):
        machine.choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_is_refused_where_there_is_none_and_auto_does_without():
    with pytest.raises(ValueError, match="no device 'cuda'"):
        machine.choose_device("cuda")
    assert machine.choose_device("auto").type in ("cpu", "mps")


@pytest.mark.parametrize(("cuda", "mps", "best"), [
    (True, True, "cuda:0"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_the_best_there_is(monkeypatch, cuda, mps, best):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert machine.choose_device() == torch.device(best)
    assert current == [torch.device(best)] * cuda


def test_auto_does_without_an_mps_that_holds_nothing(monkeypatch, capsys):
    def fail(*size, device):
        if "mps" in str(device):
            raise RuntimeError("MPS backend out of memory (MPS allocated: 0 bytes)\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", fail)
    assert machine.choose_device() == CPU
    assert "does not compute (MPS backend out of memory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no device 'mps'"):
        machine.choose_device("mps")


def test_processes_of_torchrun_are_on_devices_that_can_add_up(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose_device("auto") == CPU
    with pytest.raises(ValueError, match="--device cuda"):
        machine.choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")  # each has a GPU of its own
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert machine.choose_device("cuda") == torch.device("cuda:1")


def test_tf32_is_cudas_alone(monkeypatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    before = torch.backends.cudnn.allow_tf32
    machine.allow_tf32(CPU, not before)
    assert not said and torch.backends.cudnn.allow_tf32 == before
    try:
        for allowed in (True, False):
            machine.allow_tf32(torch.device("cuda"), allowed)
            assert torch.backends.cudnn.allow_tf32 == allowed
        assert said == ["high", "highest"]
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_facts_are_plain_and_say_what_computes(monkeypatch):
    facts = machine.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert list(facts) == ["processor", "instructions", "cores", "memory", "gpu", "python", "torch",
                           "torchvision", "commit"]
    assert bool(facts["gpu"]) == torch.cuda.is_available()
    assert facts["processor"] and facts["cores"] == os.cpu_count()
    assert facts["torch"] == torch.__version__
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert machine.facts()["instructions"].endswith(", AMX")


def test_where_nothing_can_be_found_out_facts_are_none(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", fail)
    monkeypatch.setattr(subprocess, "run", fail)
    facts = machine.facts()
    assert facts["memory"] is facts["commit"] is None and facts["processor"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_and_nothing_happens_elsewhere(monkeypatch):
    code = """
import resource, torch, machine
def faults():  # pages that the kernel had to give, for a large tensor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
[faults() for _ in range(3)]
before = faults()
machine.keep_memory()
[faults() for _ in range(3)]
print(before, faults())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    before, after = map(int, result.stdout.split())
    assert after < before / 10 or after < 100, result
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: pytest.fail("called"))
    machine.keep_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: pytest.fail("called"))
    machine.keep_memory()
