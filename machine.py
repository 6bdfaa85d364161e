"""The machine: which device computes, what a number was measured on, how memory is kept.

    device = machine.choose_device("auto")                      # the best there is
    machine.facts()                                             # processor, cores, versions, commit
"""

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import torchvision


def choose_device(name="auto"):
    """The torch.device called `name`: cpu, cuda, mps, or "auto", the best there is.

    Raises ValueError where it is not here.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)  # of torchrun
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if processes == 1 and mps_computes() else "cpu")  # it adds up no gradients
    if processes > 1 and name.startswith("cuda:"):
        raise ValueError(f"--device {name} would put all {processes} processes on one GPU: use "
                         "--device cuda")
    try:
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(own if name == "cuda" else name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} is no device to compute on")
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose streams and graphs are made from now on
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here: use --device cpu, cuda, mps or auto "
                         f"({str(error).splitlines()[0]:.80})") from error
    return device


def mps_computes():
    """Whether there is an MPS device that computes: that of a virtual Mac holds nothing."""
    if not torch.backends.mps.is_available():
        return False
    try:
        torch.zeros(1, device="mps")
    except RuntimeError as error:
        print(f"MPS is here and does not compute ({str(error).splitlines()[0]:.80}): the CPU does",
              file=sys.stderr)
        return False
    return True


def allow_tf32(device, allowed):
    """Whether CUDA may round float32 to TF32 in products: fine in steps of training; maps and
    scores are to be those of a CPU. On other devices nothing changes."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def facts():
    """What a number was measured on, in plain types: processor, instructions, cores, memory (GiB),
    GPU, versions, the commit of this folder, with a + where files have changed. None: not to be
    found out, or not there. """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError, AttributeError):  # no Linux
        cpuinfo, memory = "", None
    processor = re.search(r"model name\s*: (.*)", cpuinfo)
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    processor = processor[1] if processor else platform.processor() or platform.machine()
    return dict(processor=processor,
                instructions=torch.backends.cpu.get_cpu_capability()
                + ", AMX" * (hasattr(torch.cpu, "_is_amx_tile_supported")  # private: may go
                             and torch.cpu._is_amx_tile_supported()),
                cores=os.cpu_count(), memory=memory,
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                python=platform.python_version(),
                torch=torch.__version__, torchvision=torchvision.__version__, commit=commit or None)


def keep_memory():
    """Let glibc keep freed memory for the next tensor: asking the kernel for each large one anew,
    page by page, costs passes of large images on a CPU dearly. Nothing where there is no glibc."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
