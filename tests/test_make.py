"""The Makefile says the right words: make runs with a stand-in for Python that writes down what it
is asked to do."""

import re
import shutil
import subprocess
import tomllib

import pytest
import reading
from conftest import REPO

import metrics
import tables

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")

STAND_IN = """#!/bin/sh
[ "$1" = -c ] && exit
for word in "$@"; do printf '<%s>' "$word" >> words.txt; done; echo >> words.txt
"""


@pytest.fixture(autouse=True)
def without_the_variables_of_make_test(monkeypatch):
    monkeypatch.delenv("MAKEFLAGS", raising=False)  # of `make test PYTHON=python`


@pytest.fixture
def make(tmp_path):
    """make("figure", "RUNS=old runs"): the lines of words, each in <>, that Python was asked in an
    empty folder."""
    shutil.copy(REPO / "Makefile", tmp_path)
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def call(*arguments):
        (tmp_path / "words.txt").unlink(missing_ok=True)
        command = ["make", *arguments, f"PYTHON={python}"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        words = tmp_path / "words.txt"
        return words.read_text().splitlines() if words.exists() else []

    return call


def test_clean_removes_figures_and_nothing_of_ones_own(make, tmp_path):
    for name in ("old", "runs", "old runs", "figures", "old figures"):
        (tmp_path / name).mkdir()
    make("clean", "RUNS=old runs", "FIGURES=old figures")  # a thesis may lie there
    left = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert left == {"old", "runs", "old runs", "old figures"}
    make("clean-runs", "RUNS=old runs", "FIGURES=old figures")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == left - {"old runs"}


def test_names_with_spaces_stay_one_word_in_every_command(make):
    spaced = ["DATA=my photos", "RUNS=old runs", "FIGURES=my figures", "WEIGHTS=my weights.pth",
              "BOXES=my boxes"]
    assert make("data", *spaced) == ["<data.py><my photos>"]
    assert make("train-cnn", *spaced)[1] == "<train.py><cnn><--data><my photos><--runs><old runs>"
    assert make("finetune", *spaced)[1] == ("<train.py><resnet18><--data><my photos>"
                                            "<--runs><old runs><--weights><my weights.pth>")
    models = "<old runs/resnet18/best.pt><old runs/cnn/best.pt>"
    assert make("figure", *spaced)[-1] == (f"<cam.py><figure><--data><my photos><--models>{models}"
                                           "<--out><my figures/figure.png>")
    assert make("score", *spaced)[-1] == (f"<score.py>{models}<--data><my photos>"
                                          "<--boxes><my boxes><--out><my figures/scores>")
    assert "<old runs/demo>" in make("demo", *spaced)[1]
    (results,) = make("results", *spaced)
    assert results == "<tests/results.py><--runs><old runs><--figures><my figures>"
    assert make("bench-accuracy", *spaced, "RUN=old runs/cnn")[-1] == (
        "<tests/bench_accuracy.py><--data><my photos><--run><old runs/cnn>"
        "<--out><my figures/bench-accuracy.json>")


def test_a_tilde_that_the_shell_leaves_is_the_home_folder(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tilde = ["RUNS=~/my  runs", "FIGURES=~/figures", "WEIGHTS=~/weights.pth"]
    runs = tmp_path / "home" / "my  runs"
    for name in ("resnet18", "cnn"):
        (runs / name).mkdir(parents=True)
        (runs / name / "result.json").touch()
    *_, figure = make("figure", *tilde)
    models = f"<--models><{runs}/resnet18/best.pt><{runs}/cnn/best.pt>"
    assert f"{models}<--out><{tmp_path}/home/figures/" in figure
    assert f"<--weights><{tmp_path}/home/weights.pth>" in make("finetune", *tilde)[1]
    make("clean-runs", *tilde)
    assert not runs.exists()


def test_folders_that_are_given_empty_are_those_of_old(make):
    assert make("results", "RUNS=", "FIGURES=") == make("results")
    assert all("></" not in line for line in make("demo", "RUNS=", "FIGURES="))


def test_figure_makes_what_is_missing_and_no_more(make, tmp_path):
    scripts = [line.split(">")[0] for line in make("figure")]
    assert scripts == ["<data.py", "<data.py", "<train.py", "<data.py", "<train.py", "<cam.py"]
    for name in ("resnet18", "cnn"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").touch()
    assert [line.split(">")[0] for line in make("figure")] == ["<data.py", "<cam.py"]
    asked = [line for line in make("figure", "EPOCHS=2") if "<train.py>" in line]
    assert len(asked) == 2 and all("<--epochs><2>" in line for line in asked)
    asked = [line for line in make("figure", "WEIGHTS=mine.pth", "SIZE=96") if "<train.py>" in line]
    assert [line.split(">")[1] for line in asked] == ["<resnet18"]  # the cnn has none of these
    (tmp_path / "runs" / "cnn" / "result.json").unlink()
    assert [line.split(">")[1] for line in make("score") if "<train.py>" in line] == ["<cnn"]


def test_side_by_side_everything_is_still_made_in_order_and_without_a_warning(make, tmp_path):
    command = ["make", "-j2", "figure", f"PYTHON={tmp_path / 'python'}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    lines = (tmp_path / "words.txt").read_text().splitlines()
    scripts = [line.split(">")[0] for line in lines if "<data.py>" not in line]
    assert scripts == ["<train.py", "<train.py", "<cam.py"]


def test_the_cnn_alone_is_drawn_once(make):
    assert "<resnet18>" in " ".join(make("finetune", "ARCH="))  # of a variable that is not set
    (line,) = [line for line in make("figure", "ARCH=cnn") if "<cam.py>" in line]
    assert line.count("best.pt") == 1


def test_one_network_is_named(tmp_path):
    shutil.copy(REPO / "Makefile", tmp_path)
    result = subprocess.run(["make", "figure", "ARCH=cnn resnet18"], cwd=tmp_path, text=True,
                            capture_output=True, timeout=60)
    assert result.returncode == 2 and 'names one network beside the cnn, not "cnn' in result.stderr


def test_options_go_to_the_training_they_are_for(make):
    values = ["EPOCHS=3", "SEED=1", "DEVICE=cpu", "SIZE=96", "LOOKS=96,128", "ARCH=resnet50"]
    _, head = make("finetune", *values)
    assert head == ("<train.py><resnet50><--runs><runs><--epochs><3><--device><cpu><--seed><1>"
                    "<--size><96><--looks><96,128>")
    _, scratch = make("train-cnn", *values)
    assert scratch == "<train.py><cnn><--runs><runs><--epochs><3><--device><cpu><--seed><1>"
    assert make("shortcut", *values) == ["<shortcut.py><--device><cpu><--epochs><3><--seed><1>"
                                         "<--out><figures/shortcut>"]


@pytest.mark.parametrize("target", ["figure", "score", "demo", "shortcut", "bench",
                                    "bench-accuracy"])
def test_what_computes_does_so_on_the_device_that_is_named(make, tmp_path, target):
    (tmp_path / ".peers").mkdir()
    others = ("<data.py>", "<tests/demo.py>", "<tests/reading.py>")
    at_work = [line for line in make(target, "DEVICE=cuda") if not line.startswith(others)]
    assert at_work and all(line.count("<--device><cuda>") == 1 for line in at_work)


@pytest.fixture
def newcomer(tmp_path):
    """newcomer(python3="...", ...): what make says where there are these shell scripts and no other
    Python."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("rm", "touch", "mkdir", "ln"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def call(*arguments, **programs):
        for name, script in programs.items():
            path = tmp_path / "bin" / name.replace("_", ".")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        command = [shutil.which("make"), *(arguments or ["data"]), f"PATH={tmp_path / 'bin'}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return call


def sentence(result, *words):
    """Whether make ended with status 2 and one sentence of the Makefile's own that has `words`."""
    lines = [line for line in result.stderr.splitlines()
             if line.startswith("make: ") and "***" not in line]
    return result.returncode == 2 and len(lines) == 1 and all(word in lines[0] for word in words)


OLD = "exit 1"  # what is asked of it first is whether it is new enough
NO_VENV = 'case "$2" in venv) mkdir .venv; exit 1;; esac'
PYTHON = 'case "$2" in venv) mkdir -p .venv/bin; ln -sf ../../bin/pip .venv/bin/python;; esac'


@pytest.mark.parametrize("programs", [{}, {"python3": OLD}, {"python3": OLD, "python3_11": OLD}])
def test_an_old_python_is_refused_in_a_sentence(newcomer, tmp_path, programs):
    assert sentence(newcomer(**programs), "Python 3.11", "PYTHON=")
    assert not (tmp_path / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_taken(newcomer, tmp_path):
    result = newcomer(python3=OLD, python3_12=PYTHON, pip="")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / ".venv" / ".runs").exists()


def test_a_missing_venv_module_is_a_sentence(newcomer, tmp_path):
    assert sentence(newcomer(python3=NO_VENV), "apt install python3-venv")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("target", ["data", "test"])
def test_packages_that_cannot_be_installed_are_a_sentence_and_the_same_command_goes_on(
        newcomer, tmp_path, target):
    listed = f"requirements{'-dev' * (target == 'test')}.txt"
    fails = f'case "$*" in *{listed}) echo "no network" >&2; exit 1;; esac'
    assert sentence(newcomer(target, python3=PYTHON, pip=fails), "network", "free disk", "compiler",
                    "PYTHON=")
    assert newcomer(target, pip="").returncode == 0


@pytest.mark.parametrize("script", [None, OLD])
@pytest.mark.parametrize(("target", "packages"), [("data", "requirements.txt"),
                                                  ("test", "requirements-dev.txt")])
def test_a_python_that_is_named_and_lacks_what_is_needed_is_a_sentence(newcomer, tmp_path, script,
                                                                       target, packages):
    programs = {"mine": script} if script else {}
    result = newcomer(target, f"PYTHON={tmp_path / 'bin' / 'mine'}", **programs)
    assert sentence(result, "bin/mine", packages)


def test_the_packages_stand_in_pyproject_as_in_requirements():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == (REPO / "requirements.txt").read_text().splitlines()


# ---------------------------------------------------------------- what the demo ends with


def estimates(value, difference):
    """The scores of a network by the map that they are of; difference: (low, high) of its own map
    minus the square."""
    centre = sum(difference) / 2
    return {reading.OWN: metrics.Estimate(value, value - 0.1, value + 0.1, 200),
            reading.SQUARE: metrics.Estimate(value - centre, 0, 1, 200),
            f"{reading.OWN} minus {reading.SQUARE}": metrics.Estimate(centre, *difference, 200)}


def test_the_demo_ends_with_what_its_table_says(tmp_path, capsys):
    assert (reading.OWN, reading.SQUARE) == (tables.OWN, tables.SQUARE)
    scores = {"accuracy": 0.93, "pointing game": 0.8, "MaxBoxAccV2, cross-fitted": 0.5}
    assert scores.keys() <= set(tables.SUMMARY)
    better, worse, same = (0.05, 0.15), (-0.15, -0.05), (-0.05, 0.15)
    a, b = {"pointing game": better}, {"pointing game": worse}
    results = {name: {"a": estimates(value, a.get(name, same)), "a minus b": estimates(0, same),
                      "b": estimates(value - 0.2, b.get(name, same))}
               for name, value in scores.items()}
    (tmp_path / "scores.csv").write_text(tables.csv_table({
        (name, network, kind): estimate for name, networks in results.items()
        for network, kinds in networks.items() for kind, estimate in kinds.items()}))
    reading.main(tmp_path / "scores.csv", "demo.png")
    _, files, accuracy, pointing, boxes, _ = capsys.readouterr().out.splitlines()
    assert "demo.png" in files and "scores.md" in files
    assert accuracy == "  right about the class of 200 photos: a 93 %, b 73 %"
    assert pointing.endswith(": a 80 % (clearly more), b 60 % (clearly less); middle of the photo "
                             "70 %")
    assert boxes.endswith(": a 50 % (no clear difference), b 30 % (no clear difference); middle of "
                          "the photo 45 %")


def test_the_demo_ends_with_its_picture(make):
    picture, last = make("demo")[-2:]
    assert picture.startswith("<cam.py><figure>") and picture.endswith("<--out><figures/demo.png>")
    assert last == "<tests/reading.py><figures/demo-scores.csv><figures/demo.png>"


def test_what_the_readme_links_is_there():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", text):
        assert (REPO / name).is_file(), name
