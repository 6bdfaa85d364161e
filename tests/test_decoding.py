"""Photos decoded by forked processes: the same, in order, and all of them end."""

import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, draw_classes

import data
import decoding

pytestmark = pytest.mark.skipif(sys.platform != "linux",
                                reason="elsewhere photos are decoded by threads")


def test_they_are_the_same_in_the_same_order(tmp_path, monkeypatch):
    folder = draw_classes(tmp_path / "ab", a=150, b=2)
    paths = sorted(folder.rglob("*.png"))
    paths[7].write_bytes(b"damaged")
    paths.insert(70, folder / "none.png")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    several = list(decoding.decode_all(paths, 256))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    alone = list(decoding.decode_all(paths, 256))
    for i, (ours, theirs) in enumerate(zip(several, alone, strict=True)):
        assert ours[1] == theirs[1]
        if i in (7, 70):
            assert str(ours[0]) == str(theirs[0]) and paths[i].name in str(ours[0])
        else:
            assert np.array_equal(ours[0], theirs[0])


def test_they_end_when_nobody_reads_on():
    decoded = decoding.forked(lambda item: np.zeros(100_000, np.uint8), list(range(100)), 3)
    next(decoded)
    decoded.close()
    with pytest.raises(ChildProcessError):  # none is left, and none is a zombie
        os.waitpid(-1, os.WNOHANG)


def test_they_end_when_the_reader_is_killed():
    code = ("import os, decoding\n"
            "def one(i): os.write(1, b'%d ' % os.getpid()); return bytes(1_000_000)\n"
            "decoded = decoding.forked(one, list(range(100)), 3)\n"
            "for _ in range(4): next(decoded)\n"
            "os.kill(os.getpid(), 9)")
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE,
                           text=True, timeout=60)  # returns when all have closed stdout
    assert ended.returncode == -signal.SIGKILL
    assert len(set(ended.stdout.split())) == 3 and len(ended.stdout.split()) < 100


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_is_killed_is_want_of_memory_and_named_by_its_photo(sent):
    def one(item):
        if item == "c.png":
            os.kill(os.getpid(), sent)
        return item

    decoded = decoding.forked(one, ["a.png", "b.png", "c.png", "d.png"], 2)
    assert [next(decoded), next(decoded)] == ["a.png", "b.png"]
    with pytest.raises(MemoryError, match="c.png: the process that reads it was ended"):
        next(decoded)


def test_they_end_with_an_error_that_somebody_keeps(tmp_path, monkeypatch):
    """A traceback holds on to the loop, and they would hold locks."""
    folder = draw_classes(tmp_path / "ab", a=150, b=2)
    paths = sorted(folder.rglob("*.png"))
    paths[7].write_bytes(b"damaged")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    with pytest.raises(ValueError, match="cannot be read as a photo") as kept:
        data.pack(io.BytesIO(), paths, map(str, paths), [0] * len(paths),
                  decode_all=decoding.decode_all)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert kept.tb is not None


def test_where_no_process_may_begin_threads_decode(tmp_path, monkeypatch):
    paths = sorted(draw_classes(tmp_path / "ab", a=150, b=2).rglob("*.png"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    expected = [digest for _, digest in decoding.decode_all(paths, 256)]
    fork, asked = os.fork, []

    def refuse_the_second():
        asked.append(1)
        if len(asked) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refuse_the_second)
    assert [digest for _, digest in decoding.decode_all(paths, 256)] == expected
    assert len(asked) == 2
