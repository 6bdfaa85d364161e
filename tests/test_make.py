"""The Makefile says the right words: make runs with a stand-in for Python that writes down what it is asked to do."""

import shutil
import subprocess

import pytest
from conftest import REPO

STAND_IN = """#!/bin/sh
for word in "$@"; do printf '<%s>' "$word" >> words.txt; done; echo >> words.txt
"""


@pytest.fixture
def make(tmp_path):
    """make("figure", "RUNS=old runs"): the lines of words, each in <>, that Python was asked in an empty folder."""
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


def test_clean_removes_the_figures_that_are_named_and_nothing_else(make, tmp_path):
    for name in ("old", "runs", "old runs", "figures", "old figures"):
        (tmp_path / name).mkdir()
    make("clean", "RUNS=old runs", "FIGURES=old figures")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"old", "runs", "old runs", "figures"}
    make("clean-runs", "RUNS=old runs", "FIGURES=old figures")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"old", "runs", "figures"}


def test_names_with_spaces_stay_one_word_in_every_command(make):
    spaced = ["DATA=my photos", "RUNS=old runs", "FIGURES=my figures", "WEIGHTS=my weights.pth", "BOXES=my boxes"]
    assert make("data", *spaced) == ["<data.py><my photos>"]
    assert make("train-cnn", *spaced)[1] == "<train.py><cnn><--data><my photos><--runs><old runs>"
    assert make("finetune", *spaced)[1] == ("<train.py><resnet18><--data><my photos><--runs><old runs>"
                                            "<--weights><my weights.pth>")
    models = "<old runs/resnet18/best.pt><old runs/cnn/best.pt>"
    assert make("figure", *spaced)[-1] == (f"<cam.py><figure><--data><my photos><--models>{models}"
                                           "<--out><my figures/figure.png>")
    assert make("score", *spaced)[-1] == (f"<score.py>{models}<--data><my photos><--boxes><my boxes>"
                                          "<--out><my figures/scores>")
    assert "<old runs/demo>" in make("demo", *spaced)[1]


def test_figure_makes_what_is_missing_and_no_more(make, tmp_path):
    scripts = [line.split(">")[0] + ">" for line in make("figure")]
    assert scripts == ["<data.py>", "<data.py>", "<train.py>", "<data.py>", "<train.py>", "<cam.py>"]
    for name in ("resnet18", "cnn"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").touch()
    assert [line.split(">")[0] for line in make("figure")] == ["<data.py", "<cam.py"]
    (tmp_path / "runs" / "cnn" / "result.json").unlink()
    assert [line.split(">")[1] for line in make("score") if "<train.py>" in line] == ["<cnn"]


def test_the_cnn_alone_is_drawn_once(make):
    (line,) = [line for line in make("figure", "ARCH=cnn") if "<cam.py>" in line]
    assert line.count("best.pt") == 1


def test_options_go_to_the_training_they_are_for(make):
    values = ["EPOCHS=3", "SEED=1", "DEVICE=cpu", "SIZE=96", "LOOKS=96,128", "ARCH=resnet50"]
    _, head = make("finetune", *values)
    assert head == ("<train.py><resnet50><--runs><runs><--epochs><3><--device><cpu><--seed><1>"
                    "<--size><96><--looks><96,128>")
    _, scratch = make("train-cnn", *values)
    assert scratch == "<train.py><cnn><--runs><runs><--epochs><3><--device><cpu><--seed><1>"


def test_an_old_python_is_refused_in_a_sentence(tmp_path):
    shutil.copy(REPO / "Makefile", tmp_path)
    shutil.copy(REPO / "requirements.txt", tmp_path)
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what is asked of it first is whether it is new enough
    old.chmod(0o755)
    result = subprocess.run(["make", "data", f"PATH={tmp_path}:/usr/bin:/bin"], cwd=tmp_path, capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 2 and "Python 3.11" in result.stderr and not (tmp_path / ".venv").exists()
