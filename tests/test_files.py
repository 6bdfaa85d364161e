"""files.py: whole files, locks, progress, options, and errors that are one sentence."""

import argparse
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, end

import files

# ---------------------------------------------------------------- whole or not at all


def test_a_disk_that_becomes_read_only_is_said_of_the_file_that_was_named(tmp_path, monkeypatch):
    def unlink(path, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OSError, match="Read-only file system: '.*file'$"):
        with files.atomic(tmp_path / "file"):
            raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.skipif(os.name == "nt", reason="sh closes them")
def test_a_command_whose_streams_are_closed_does_its_work(tmp_path):
    code = ("import files, sys\n"
            "def work():\n"
            "    print('said')\n"
            "    list(files.progress(range(3), 'three:', 3))\n"
            "    open(sys.argv[1], 'w').write('done')\n"
            "files.run_command(work)")
    path, closed = tmp_path / "file", f'exec "{sys.executable}" -c "$0" "$1" 2>&- >&-'
    assert subprocess.run(["sh", "-c", closed, code, path], cwd=REPO).returncode == 0
    assert path.read_text() == "done"


def test_atomic_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    with files.atomic(path) as file:
        file.write(b"old")
        assert not path.exists()  # not before it is complete
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(failure)) as error:
            with files.atomic(path) as file:
                file.write(b"new")
                raise failure
        assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"
        if isinstance(failure, OSError):  # the disk never says which file
            assert error.value.filename == str(path)


def test_a_disk_that_is_full_at_the_very_end_keeps_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="file"):
        files.write(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize(("windows", "opened", "tries"), [
    (True, 2, 3), (True, 99, 5), (False, 99, 1)])
def test_on_windows_a_file_that_is_open_elsewhere_is_waited_for(tmp_path, monkeypatch, windows,
                                                                opened, tries):
    replace, asked, slept = os.replace, [], []

    def refuse(*paths):
        asked.append(paths)
        if len(asked) <= opened:
            raise PermissionError(errno.EACCES, "in use", *map(str, paths))
        replace(*paths)

    monkeypatch.setattr(files, "WINDOWS", windows)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", slept.append)
    path = tmp_path / "log.csv"
    with pytest.raises(PermissionError) if opened == 99 else contextlib.nullcontext() as error:
        files.write(path, b"new")
    assert len(asked) == tries == len(slept) + 1 and sum(slept) <= 3
    assert path.exists() == (opened < 99) and not [*tmp_path.glob("*.part")]
    assert opened < 99 or error.value.filename == str(path)


def test_on_windows_only_a_try_tells_whether_a_folder_takes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    assert files.takes_files(tmp_path) and not [*tmp_path.iterdir()]
    assert not files.takes_files(tmp_path / "missing")


def test_a_drive_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(files.Path, "exists", lambda path: False)
    monkeypatch.setattr(files.Path, "is_dir", lambda path: False)
    with pytest.raises(ValueError, match="cannot be written.*--out"):
        files.check_place("/there/figure.png")


def test_a_file_that_holds_the_same_is_left_alone(tmp_path):
    path = tmp_path / "file"
    files.write(path, b"old")
    os.utime(path, (1, 1))
    files.write(path, b"old")
    assert path.stat().st_mtime == 1
    files.write(path, b"new")
    assert path.stat().st_mtime > 1 and path.read_bytes() == b"new"


# ---------------------------------------------------------------- locks


def test_who_does_not_wait_for_a_lock_is_told(tmp_path, monkeypatch):
    def flock(file, how):
        raise BlockingIOError

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with pytest.raises(ValueError, match="run is in use by another process"):
        with files.lock(tmp_path / "run", wait=False):
            pass


@pytest.mark.skipif(not files.fcntl, reason="there are no locks here")
def test_a_lock_is_held_while_the_block_runs_and_let_go_by_an_error(tmp_path):
    with pytest.raises(KeyError):
        with files.lock(tmp_path / "run"):
            with pytest.raises(ValueError, match="in use"):
                with files.lock(tmp_path / "run", wait=False):
                    pass
            raise KeyError
    with files.lock(tmp_path / "run", wait=False):
        pass


@pytest.mark.skipif(not files.fcntl, reason="there are no locks here")
def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "a[1].7.part").mkdir()
    (tmp_path / "a[1].7.part" / "photo").write_bytes(b"half of it")
    (tmp_path / "a[1].8.part").write_bytes(b"half of it")
    others = ["a[1]", "a[1].mine.part", "a1.7.part", "b.7.part", "a[1].2024.7.part",
              "a[1].1st.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    with files.lock(tmp_path / "a[1]"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a[1].lock"])


@pytest.mark.skipif(not files.fcntl, reason="there are no locks here")
def test_the_lock_of_another_user_is_waited_for_as_well(tmp_path, monkeypatch):
    def theirs(path, mode="r"):
        if mode == "w":
            raise PermissionError(13, "Permission denied", path)
        return open(path, mode)

    monkeypatch.setattr(files, "open", theirs, raising=False)
    with pytest.raises(PermissionError):  # in a folder that is theirs, too
        with files.lock(tmp_path / "run"):
            pass
    (tmp_path / "run.lock").touch()
    with files.lock(tmp_path / "run"):
        with pytest.raises(ValueError, match="in use"):
            with files.lock(tmp_path / "run", wait=False):
                pass


@pytest.mark.parametrize("there", ["none at all", "not on this disk"])
def test_without_locks_nobody_waits(tmp_path, monkeypatch, there):
    def flock(file, how):
        raise OSError(95, "Operation not supported")

    without = SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(files, "fcntl", without if there == "not on this disk" else None)
    (tmp_path / "run.7.part").write_bytes(b"of a process that is writing it, perhaps")
    with files.lock(tmp_path / "run", wait=False), files.lock(tmp_path / "run", wait=False):
        assert (tmp_path / "run.7.part").exists()


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is to be moved by hand, `clock[0]` in seconds."""
    now = [1000.0]
    monkeypatch.setattr(files.time, "time", lambda: now[0])
    return now


def watched(clock, stream, monkeypatch, items, seconds, *given, **options):
    """What `progress` prints while each item takes so many seconds."""
    monkeypatch.setattr(sys, "stderr", stream)
    found = []
    for item in files.progress(items, *given, **options):
        found.append(item)
        clock[0] += seconds
    assert found == items
    return stream.getvalue()


def test_a_terminal_sees_each_step_on_one_line(clock, monkeypatch):
    text = watched(clock, Terminal(), monkeypatch, list("abcd"), 1, "made", 4)
    first, *_, last = text.split("\r")[1:]
    assert first.rstrip(" ") == "made 1 of 4 photos (25%), 1 photos/s, 3 s left"
    assert last.rstrip(" \n") == "made 4 of 4 photos (100%), 1 photos/s"
    assert text.count("\r") == 4 and text.count("\n") == 1 and text.endswith("\n")


def test_a_log_gets_a_line_at_each_tenth_and_one_at_the_end(clock, monkeypatch):
    text = watched(clock, io.StringIO(), monkeypatch, list(range(100)), 2, "made", 100)
    lines = text.splitlines()
    assert len(lines) == 10 and "\r" not in text
    assert lines[0] == "made 10 of 100 photos (10%), 0 photos/s, 180 s left"
    assert lines[-1] == "made 100 of 100 photos (100%), 0 photos/s"


def test_a_log_of_what_is_fast_gets_one_line(clock, monkeypatch):
    text = watched(clock, io.StringIO(), monkeypatch, [30, 30, 3], 0.5, "read", 63, "MB",
                   size=lambda item: item)
    assert text == "read 63 of 63 MB (100%), 42 MB/s\n"


def test_progress_of_nothing_and_in_no_time(clock, monkeypatch):
    assert watched(clock, io.StringIO(), monkeypatch, [], 0, "made", 0) == ""
    assert "(100%)" in watched(clock, io.StringIO(), monkeypatch, [1], 0, "made", 1)


# ---------------------------------------------------------------- options


def refuses(kind, text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        kind(text)
    return True


def test_a_path_knows_home_and_is_not_empty(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.path("~/runs") == Path("/home/me/runs")
    assert files.path("~no-such-user/runs") == Path("~no-such-user/runs")
    assert refuses(files.path, "")


def test_numbers_are_between_their_limits_and_are_numbers():
    percent, share = files.between(1, 100), files.between(0, 1, float)
    assert (percent("1"), percent("100"), share("0.5")) == (1, 100, 0.5)
    for text in ("0", "101", "1.5", "many", ""):
        assert refuses(percent, text)
    for text in ("-0.1", "1.1", "nan", "inf"):
        assert refuses(share, text)
    assert percent.__name__ == "int" and share.__name__ == "float"  # in argparse's sentence


def test_sizes_ascend_and_differ():
    assert files.sizes("320,224") == (224, 320) and files.sizes("8") == (8,)
    for text in ("", "0", "8,", "8,8", "8,4097", "a", "8;9"):
        assert refuses(files.sizes, text)
    with pytest.raises(argparse.ArgumentTypeError, match="photo.jpg is no list .* before --looks"):
        files.sizes("photo.jpg")


def test_help_has_the_defaults_of_options_that_have_one():
    parser = argparse.ArgumentParser(formatter_class=files.Help)
    for name, default in (("none", None), ("off", False), ("empty", []), ("zero", 0), ("one", 1)):
        parser.add_argument(f"--{name}", default=default, help=f"is {name}")
    shown = parser.format_help()
    assert shown.count("default") == 2
    assert "is zero (default: 0)" in shown and "is one (default: 1)" in shown


# ---------------------------------------------------------------- a command and its errors


@pytest.fixture
def ended(monkeypatch, capsys):
    """How a command ends that raises an error: its status, and what it says."""
    handlers = {end: signal.getsignal(end) for end in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["folder/score.py"])

    def call(error, **options):
        def fail():
            raise error

        with pytest.raises(SystemExit) as stop:
            files.run_command(fail, **options)
        return stop.value.code, capsys.readouterr().err

    yield call
    for end_, handler in handlers.items():
        signal.signal(end_, handler)


def test_what_a_user_can_mend_is_one_sentence(ended):
    assert ended(ValueError("--lr is odd: use another")) == (
        2, "score.py: --lr is odd: use another\n")
    missing = FileNotFoundError(2, "No such file or directory", "a.csv")
    assert ended(missing) == (2, "score.py: [Errno 2] No such file or directory: 'a.csv'\n")
    status, text = ended(PermissionError(13, "Permission denied", "runs"))
    assert status == 2 and text.startswith("score.py: runs: permission denied: make it accessible")
    assert ended(BrokenPipeError(32, "Broken pipe"), interrupted="go on") == (
        2, "score.py: what it prints cannot be written (Broken pipe): go on\n")


def test_ctrl_c_says_what_is_left(ended):
    assert ended(KeyboardInterrupt()) == (130, "score.py: stopped: nothing is half-written\n")
    assert ended(KeyboardInterrupt(), interrupted="go on") == (130, "score.py: stopped: go on\n")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_too_little_memory_is_a_sentence_with_the_way_out(ended, error):
    status, text = ended(error, out_of_memory="use fewer photos")
    assert status == 2 and text.count("\n") == 1
    assert text.startswith("score.py: not enough memory (") and text.endswith("use fewer photos\n")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("no"), KeyError("no")])
def test_a_defect_of_the_program_is_a_traceback(error):
    def fail():
        raise error

    handlers = {end: signal.getsignal(end) for end in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(type(error)):
        files.run_command(fail)
    for end_, handler in handlers.items():
        signal.signal(end_, handler)


def test_a_notebook_has_streams_of_another_kind(ended, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    assert files.run_command(lambda: 3) == 3


def test_a_command_returns_what_its_function_does(ended):
    assert files.run_command(lambda a, b: (a, b), 1, 2) == (1, 2)


SCRIPT = """
import sys, time
sys.path.insert(0, {repo!r})
import files

def command():
    print("a name: \\N{{CAMERA}}", flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
    raise ValueError("no \\N{{CAMERA}} here")

files.run_command(command)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(repo=str(REPO)))
    return path


def test_only_developers_see_where_an_error_was_raised(script):
    def stderr(*options):
        command = [sys.executable, *options, str(script), "fail"]
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 2 and result.stdout == "a name: \\U0001f4f7\n"
        return result.stderr

    assert stderr() == "script.py: no \\U0001f4f7 here\n"
    assert "Traceback" in stderr("-X", "dev") and 'raise ValueError("no' in stderr("-X", "dev")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_sentence(start, script, number):
    process = start(script, "wait")
    process.stdout.readline()
    process.send_signal(number)
    result = end(process)
    assert (result.returncode, result.stderr) == (
        130, "script.py: stopped: nothing is half-written\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
@pytest.mark.parametrize(("script", "library"), [
    ("train.py", "libtorch_python"), ("train.py", "torchvision"), ("data.py", "libtorch_python"),
    ("cam.py", "libtorch_python"), ("score.py", "libtorch_python")])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(start, script, library):
    process = start(REPO / script, "--help")
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        pass
    process.send_signal(signal.SIGINT)
    result = end(process)
    assert result.returncode in (130, 0) and "Traceback" not in result.stderr
