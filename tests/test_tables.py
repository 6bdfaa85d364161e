"""tables.py: rows of scores as text, Markdown, LaTeX and CSV, and files of all of them."""

import pytest
import torch
from PIL import Image

import files
import metrics
import page
import tables


def test_a_table_as_text_markdown_and_latex():
    rows = [["%", "cnn_1", "ones"], ["pointing game ↑", "50.0 [-25.0, 75.0]", "100.0"],
            ["  minus cnn-2", "-1.0", ""]]
    assert tables.write_table(rows, "text").splitlines() == [
        "%                             cnn_1   ones",
        "pointing game ↑  50.0 [-25.0, 75.0]  100.0",
        "  minus cnn-2                  -1.0       ",
    ]
    markdown = tables.write_table(rows, "markdown").splitlines()
    assert markdown[1] == "| --------------- | -----------------: | ----: |"
    assert {len(line) for line in markdown} == {len(markdown[0])}
    assert tables.write_table(rows, "latex").splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"\% & cnn\_1 & ones \\",
        r"\midrule",
        r"pointing game $\uparrow$ & 50.0 [$-$25.0, 75.0] & 100.0 \\",
        r"\quad minus cnn-2 & $-$1.0 &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    escaped = tables.escape_latex("a\\b~c^d #1 & {x}$")
    assert escaped == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d \#1 \& \{x\}\$"


def test_a_summary_of_many_networks_stays_within_a_terminal():
    estimate = metrics.mean_interval(torch.tensor([1.0, 0, 1, 1]))
    names = [f"shufflenet_v2_x1_0-{i}" for i in range(5)]
    scores = {kind: {"pointing game": estimate} for kind in ("its own map", "centred square")}
    results = tables.compare({name: scores for name in names})
    text = tables.summary(results, names)
    assert max(map(len, text.splitlines())) <= 100 and all(name in text for name in names)


def test_three_networks_are_compared_to_the_first():
    estimate = metrics.mean_interval(torch.tensor([1.0, 0, 1, 1]))
    results = tables.compare({name: {"its own map": {"accuracy": estimate}} for name in "abc"})
    assert [network for _, network, _ in results] == ["a", "b", "b minus a", "c", "c minus a"]


def test_the_name_of_the_tables_keeps_its_dot(tmp_path):
    assert tables.check_out(str(tmp_path / "t" / "0.15")) == str(tmp_path / "t" / "0.15")
    assert tables.check_out(str(tmp_path / "t.md")) == str(tmp_path / "t")


@pytest.mark.parametrize("full", ["a table", "a picture"])
def test_a_full_disk_leaves_all_tables_as_they_were(tmp_path, monkeypatch, full):
    def no_space(*_):
        raise OSError(28, "No space left on device", "somewhere")

    out, picture = str(tmp_path / "t" / "0.15"), Image.new("RGB", (9, 9))
    tables.write(out, {".md": "old", ".csv": "old"}, {"-confusion-cnn.png": picture})
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    assert set(before) == {"0.15.md", "0.15.csv", "0.15-confusion-cnn.png"}
    write = files.write
    if full == "a picture":
        monkeypatch.setattr(page, "save_picture", no_space)
    else:
        monkeypatch.setattr(files, "write", lambda path, contents: (
            no_space() if path.suffix == ".csv" else write(path, contents)))
    message = "No space left on device, all tables are as they were"
    with pytest.raises(OSError, match=message) as error:
        tables.write(out, {".md": "new", ".csv": "new"}, {"-confusion-cnn.png": picture})
    assert error.value.filename == out
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before
