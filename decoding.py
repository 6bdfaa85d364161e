"""Photos decoded by all cores of a machine: by forked processes, where those are faster.

    for pixels, digest in decoding.decode_all(paths, 256):      # in order, as data.decode_all
        ...

Small photos keep Python as busy as the decoder, and Python runs one thread at a time.
"""

import os
import pickle
import signal
import sys
from contextlib import contextmanager
from functools import partial

import data


def decode_all(paths, side):
    """As `data.decode_all`, by processes where there are more than two cores (on two, threads are
    as fast) and where processes are forked (Linux), which starts nothing anew; elsewhere by
    threads. Close it (contextlib.closing) where an error may end the loop."""
    paths = list(paths)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if cores > 2 and len(paths) > 100:
        try:
            yield from forked(partial(data.read_photo, side=side), paths, min(16, cores))
            return
        except BlockingIOError:  # no more processes are allowed
            pass
    yield from data.decode_all(paths, side)


def forked(function, items, count):
    """Yields function(item) of each of a list, in order, from `count` forked processes: of every
    count-th item each. One whose reader is gone, however it ended, ends at its next result.

    Close it (contextlib.closing) where an error may end the loop: its children hold locks, too.
    Raises MemoryError where a child was ended from outside, which a system does that runs short.
    """
    children, pipes = [], []
    try:
        for k in range(count):
            end, start = os.pipe()
            pipes.append(open(end, "rb"))
            with open(start, "wb") as pipe, ends_wait():
                child = os.fork()
                if not child:
                    work(function, items[k::count], pipe, pipes)
                children.append(child)
        for i, item in enumerate(items):
            try:
                yield pickle.load(pipes[i % count])
            except (EOFError, pickle.UnpicklingError) as error:
                raise MemoryError(f"{item}: the process that reads it was ended") from error
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            os.waitpid(child, 0)


@contextmanager
def ends_wait():
    """Let Ctrl-C and SIGTERM wait until the block is left: a child must not act as its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(function, items, pipe, ends):
    """A child's life: function(item) of each item into `pipe`, and nothing after it. ends: of
    pipes, the parent's, which alone may keep them open."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent says what is to be said
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        for end in ends:
            end.close()
        for item in items:
            pickle.dump(function(item), pipe, protocol=5)
            pipe.flush()  # what is done is sent, whatever comes next
    finally:
        os._exit(0)
