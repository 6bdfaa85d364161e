"""What the commands share: files that are whole or not there, locks, progress, options, errors.

    with files.atomic("runs/cnn/log.csv") as file:              # there as a whole, or not at all
        file.write(b"...")
    for photo in files.progress(photos, "decoding", len(photos)):
        ...
    files.run_command(main)                                     # an error is one sentence

What a user can mend is a ValueError whose message says what and how, or an OSError that names the
file; `python -X dev` shows where it was raised.
"""

import argparse
import contextlib
import errno
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: there no process waits for another
    fcntl = None

WINDOWS = os.name == "nt"
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED",
             "MemoryError", "Invalid buffer size")
NO_OUTPUT = errno.EPIPE, errno.ENOSPC  # a stream was closed, or goes to a disk that is full


# ---------------------------------------------------------------- whole or not at all


@contextlib.contextmanager
def atomic(path):
    """Open `path` for binary writing, under another name until it is whole."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(part, path)
    except OSError as error:  # a full disk names no file of its own accord
        named = error.filename if error.filename != str(part) else None
        raise OSError(error.errno, error.strerror, named or str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # of a disk that has become read-only
            part.unlink(missing_ok=True)


def replace(part, path):
    """`os.replace`; on Windows, which refuses while anyone has the file open, a virus scanner too,
    it is tried for three seconds. An OSError names `path`."""
    for pause in (0.1, 0.3, 0.9, 1.7, None) if WINDOWS else (None,):
        try:
            return os.replace(part, path)
        except OSError as error:
            if pause is None or not isinstance(error, PermissionError):
                raise OSError(error.errno, error.strerror, str(path)) from error
        time.sleep(pause)


def takes_files(folder):
    """Whether files may be made in a folder; on Windows only a try tells."""
    if not WINDOWS:
        return os.access(folder, os.W_OK)
    probe = Path(folder, f"probe.{os.getpid()}.part")
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def write(path, contents):
    """Write bytes, whole or not at all; a file that holds them already is left alone."""
    if not (path.exists() and path.read_bytes() == contents):
        with atomic(path) as file:
            file.write(contents)


def make_writable(folder, advice):
    """Make a folder that can be written to; ValueError with `advice` where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if takes_files(folder) else "read-only"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"{folder} cannot be written to ({reason}): {advice}")


def check_place(path, option="--out"):
    """Raise ValueError, before any work, where no file can be written at `path`, of an option."""
    parents = Path(path).absolute().parents
    there = next((above for above in parents if above.exists()), parents[-1])  # a drive not there
    if not (there.is_dir() and takes_files(there)):
        reason = "is read-only" if there.is_dir() else "is no folder that takes files"
        raise ValueError(f"{path} cannot be written, for {there} {reason}: name another place with "
                         f"{option}")


def open_lock(path):
    """Open a lock file; another user's can be locked, too, though not written."""
    try:
        return open(path, "w")
    except PermissionError:
        if not os.path.exists(path):
            raise
        return open(path)


@contextlib.contextmanager
def lock(path, wait=True):
    """Hold `path`.lock: one process works, and others wait or, with wait=False, get a ValueError.

    What a process that was killed has left of `path` is removed. Without locks (Windows, some
    network drives) nobody waits.
    """
    with open_lock(f"{path}.lock") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = re.compile(re.escape(Path(path).name) + r"\.\d+\.part")
                for part in [p for p in Path(path).parent.iterdir() if left.fullmatch(p.name)]:
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
        except BlockingIOError:
            if not wait:
                raise ValueError(f"{path} is in use by another process: wait until it "
                                 "ends") from None
            print(f"waiting for another process that is making {path}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # of a file system without locks
            pass
        yield


# ---------------------------------------------------------------- progress


def progress(items, label, total, unit="photos", size=lambda item: 1):
    """Yield `items`, and say how many of `total` units are done.

    On a terminal one line rewrites itself; a log gets a line at each tenth, 10 seconds apart or
    more. size: item -> its units. """
    terminal, started, done, said = sys.stderr.isatty(), time.time(), 0, (0, time.time())
    for item in items:
        yield item
        done += size(item)
        now, share = time.time(), done / max(total, 1)
        rate = done / max(now - started, 1e-6)
        end = share >= 1
        if terminal or end or (share - said[0] >= 0.1 and now - said[1] >= 10):
            left = "" if end else f", {(total - done) / max(rate, 1e-6):.0f} s left"
            text = (f"{label} {done:,.0f} of {total:,.0f} {unit} ({share:.0%}), "
                    f"{rate:,.0f} {unit}/s{left}")
            print(f"\r{text:<90}" if terminal else text, end="\n" if end or not terminal else "",
                  file=sys.stderr, flush=True)
            said = share, now


# ---------------------------------------------------------------- options


def path(text):
    """An argparse type: a path, ~ expanded. An empty one would be the working folder: refused."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name one, or leave it out")
    return Path(os.path.expanduser(text))  # which leaves ~name as it is where nobody is called so


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """An argparse formatter: help with the defaults of those options that have one."""

    def _get_help_string(self, action):
        default = action.default
        none = default is False or default in (None, [])
        return action.help if none else super()._get_help_string(action)


def between(low, high=math.inf, kind=int):
    """An argparse type: a number from `low` to `high`."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is less than {low:g}, more than {high:g} or no number")
        return kind(text)

    parse.__name__ = kind.__name__  # what argparse calls it where it is none
    return parse


class Once(argparse.Action):
    """An argparse action: one value, and a sentence where a second would replace it."""

    def __call__(self, parser, options, value, option=None):
        if getattr(options, self.dest) is not None:
            parser.error(f"{option} is given twice, and takes one: leave one out")
        setattr(options, self.dest, value)


def sizes(text):
    """An argparse type: different sizes in px, "224,320", as an ascending tuple."""
    try:
        parsed = [between(1, 4096)(size) for size in text.split(",")]
    except ValueError as error:  # a photo, swallowed by an option of several lists
        raise argparse.ArgumentTypeError(f"{text} is no list of sizes such as 224,320; photos and "
                                         "checkpoints go before --looks") from error
    if len(set(parsed)) < len(parsed):
        raise argparse.ArgumentTypeError(f"{text} names a size twice")
    return tuple(sorted(parsed))


# ---------------------------------------------------------------- a command and its errors


def run_command(function, *arguments, out_of_memory="use smaller images",
                interrupted="nothing is half-written"):
    """Call a command. What its user can mend ends in one sentence and status 2, Ctrl-C in 130.

    out_of_memory, interrupted: what to do about it, and what is left, for the sentences.
    """
    script = Path(sys.argv[0]).name
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w")  # closed, as daemons' are
                              for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="backslashreplace")  # a name it has no letters for
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, signal.default_int_handler)
    try:
        return function(*arguments)
    except (KeyboardInterrupt, ValueError, OSError, RuntimeError, MemoryError) as error:
        message, status = error, 2
        if isinstance(error, KeyboardInterrupt):
            message, status = f"stopped: {interrupted}", 130
        elif isinstance(error, RuntimeError | MemoryError):  # torch has a type of its own on CUDA
            if not any(words in repr(error) for words in NO_MEMORY):
                raise
            message = f"not enough memory ({error!r:.100}): {out_of_memory}"
        elif isinstance(error, OSError) and not error.filename and error.errno in NO_OUTPUT:
            message = f"what it prints cannot be written ({error.strerror}): {interrupted}"
        elif isinstance(error, PermissionError) and error.filename:
            message = f"{error.filename}: permission denied: make it accessible, or name another"
        if sys.flags.dev_mode:
            traceback.print_exc()
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(status)
