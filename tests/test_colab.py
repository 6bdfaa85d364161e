"""The notebook for Colab: ten cells or fewer, and they run, here on the demo's photos."""

import json
import re
import subprocess
import sys
import types

from conftest import REPO

NOTEBOOK = json.loads((REPO / "colab.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_is_short_and_holds_no_output():
    assert len(NOTEBOOK["cells"]) <= 10
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])


def test_the_cells_run(demo, tmp_path, monkeypatch):
    display = types.ModuleType("IPython.display")
    display.Image = display.HTML = lambda content: shown.append(content)
    shown, names = [], {}  # what was displayed, and the notebook's variables
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)

    def shell(line):
        """A line after `!`, {names} filled in, of the project's scripts."""
        line = re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), line)
        if line.startswith("python "):
            script, *arguments = line.split()[1:]
            if script == "train.py":
                arguments += ["--device", "cpu"]
            subprocess.run([sys.executable, REPO / script, *arguments], check=True)
        else:
            assert line.startswith(("git clone", "pip install", "[ -e")), line

    names["shell"] = shell
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            python = [f"shell({line[1:]!r})" if line.startswith("!") else line
                      for line in lines if not line.startswith("%")]
            exec("\n".join(python), names)
            if "options" in names:  # the first cell has set them
                names.update(weights="none", data=demo, options=(
                    "--epochs 1 --size 32 --looks 32 --batch-size 16"))
    picture, page = shown
    assert picture == "figure.png" and (tmp_path / picture).stat().st_size > 10_000
    assert page.startswith("<iframe srcdoc=") and "&lt;script" in page
