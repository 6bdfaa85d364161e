"""`make results`: from made-up measurements to RESULTS.md, and README's numbers."""

import json
import re
import sys

import pytest
from conftest import REPO

import folders
import results
import train

MACHINE = dict(processor="Made Up 9", instructions="AVX512", cores=2, memory=24, python="3.11.7",
               torch="2.14.1", torchvision="0.29.1", commit="abc1234")


@pytest.fixture
def gathered(tmp_path, monkeypatch):
    """gathered(): RESULTS.md, written anew from tmp_path's folders runs, figures and results."""
    monkeypatch.setattr(sys, "argv", ["tests/results.py"])
    for name in ("runs", "figures"):
        (tmp_path / name).mkdir()

    def call():
        folders = [f"--{name}={tmp_path / name}" for name in ("runs", "figures", "results")]
        results.main([*folders, f"--out={tmp_path / 'RESULTS.md'}"])
        return (tmp_path / "RESULTS.md").read_text()

    return call


def training(folder, name, last=0.9, seed=0, machine=(), more=(), **recipe):
    """Leave in `folder` what a training called `name` would have."""
    kind = recipe.get("training", "scratch")
    usual = dict(arch="cnn", weights=None, training=kind, size=96, looks=[64, 96, 128],
                 plain_crop=False, holdout=0.0, seed=seed, version=train.Recipe.version,
                 photos=list(folders.COUNTS.values()))
    recipe = usual | train.DEFAULTS[kind] | recipe
    command = f"python train.py {recipe['arch']} --seed {seed} --data /secret/place/imagenette"
    facts = dict(best_accuracy=last + 0.01, best_epoch=3, last_accuracy=last,
                 accuracies={"96": last}, accuracy_on="val", accuracy_n=3925, seconds=3600.0,
                 command=command, recipe=recipe, parameters=3_000_000, device="cpu",
                 precision="float32", threads=1, processes=1,
                 machine=MACHINE | dict(machine)) | dict(more)
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "result.json").write_text(json.dumps(facts))
    (folder / "runs" / name / "log.csv").write_text("epoch,val_accuracy\r\n1,0.5\r\n")


def scored(folder, name="scores", n=3925, minus=0.05):
    """Leave in `folder` what score.py would have, of one network."""
    network = dict(path="runs/cnn/best.pt", description="a cnn", looks=[96], accuracy_n=n,
                   epochs=20, best_epoch=19, seed=0)
    facts = dict(command="python score.py runs/cnn/best.pt", machine=MACHINE, precision="float32",
                 seconds=dict(cnn=60), networks=dict(cnn=network))
    (folder / "figures" / f"{name}.json").write_text(json.dumps(facts))
    (folder / "figures" / f"{name}.csv").write_text(
        "score,network,map,n,value,low,high\n"
        f"accuracy,cnn,its own map,{n},0.9,0.89,0.91\n"
        "pointing game,cnn,its own map,134,0.8,0.7,0.9\n"
        "pointing game,cnn,centred square,134,0.75,0.7,0.8\n"
        f"pointing game,cnn,its own map minus centred square,134,{minus},-0.01,0.1\n"
        "average drop,cnn,its own map,1000,0.2,0.1,0.3\n"
        "average drop,cnn,random weights,50,0.4,0.3,0.5\n")


def row(text, start):
    """The cells of the only row of a table that starts with `start`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, lines
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_without_measurements_every_row_is_not_measured(gathered):
    text = gathered()
    names = [name for name, _, _ in results.PROTOCOLS]
    assert [name for name in re.findall(r"^\| ([^|]+) \|", text, re.M) if name in names] == names
    for name in names:
        assert row(text, f"{name} |")[2:] == ["not measured", "", ""]
    for name in ("an epoch of the CNN", "this project", "the usual way", "pointing game |"):
        assert "not measured" in row(text, name)


def test_a_training_is_a_row_with_its_source(gathered, tmp_path):
    training(tmp_path, "cnn", last=0.89534, epochs=100)
    text = gathered()
    cells = row(text, "CNN, 64 → 96 px, 100 epochs")
    assert cells[1:] == ["72 % (report)", "89.53 %", "60 min", "1"]
    source = " ".join(re.search(r"^1\. .*?(?=\n\n)", text, re.M | re.S)[0].split())
    assert source == ("1. `python train.py cnn --seed 0 --data imagenette`; seed 0; 100 epochs; "
                      "3,925 photos of val; best 90.53 % after epoch 3; commit abc1234; Made Up 9, "
                      "AVX512, 2 cores, 24 GiB, float32, 1 thread; Python 3.11.7, torch 2.14.1, "
                      "torchvision 0.29.1; `results/cnn-abc1234/result.json`")
    assert (tmp_path / "results/cnn-abc1234/log.csv").read_bytes() == b"epoch,val_accuracy\n1,0.5\n"
    assert "secret" not in (tmp_path / "results/cnn-abc1234/result.json").read_text()


def test_seeds_are_one_row_with_mean_and_deviation(gathered, tmp_path):
    for seed, last in enumerate((0.87, 0.88, 0.89)):
        training(tmp_path, f"cnn-128-5-{seed}", last, seed, epochs=5, crop=128, size=128)
    text = gathered()
    name = "CNN, 128 → 128 px, 5 epochs, 3 seeds"
    assert row(text, name)[:3] == [name, "87.43 % (leaderboard)", "88.00 ± 1.00 %"]
    assert "seeds 0, 1, 2; 5 epochs" in text and "best 89.00 ± 1.00 %" in " ".join(text.split())


def test_a_seed_of_two_commits_is_two_rows(gathered, tmp_path):
    training(tmp_path, "cnn", 0.85, epochs=20, size=88)
    gathered()
    (tmp_path / "runs").rename(tmp_path / "old")
    training(tmp_path, "cnn", 0.86, epochs=20, size=88, machine=dict(commit="def5678"))
    text = gathered()
    accuracies = re.findall(r"^\| CNN, 64 → 88 px, 20 epochs \|.* (\S+ %) \|", text, re.M)
    assert accuracies == ["85.00 %", "86.00 %"]


def test_looks_crops_and_other_recipes_have_rows_of_their_own(gathered, tmp_path):
    head = dict(arch="mobilenet_v2", training="head", weights="../elsewhere/weights.pth")
    training(tmp_path, "one", 0.97, looks=[224], **head)
    training(tmp_path, "two", 0.98, looks=[320], **head)
    training(tmp_path, "plain", 0.85, plain_crop=True, epochs=40, size=160)
    training(tmp_path, "wide", 0.91, width=256)
    training(tmp_path, "held", 0.92, holdout=0.15,
             more=dict(accuracy_on="held-out train", accuracy_n=1420))
    text = gathered()
    accuracies = {"`one`": "97.00 %", "MobileNetV2, last layer": "98.00 %",
                  "CNN, plain 64 px crops → 160 px, 40 epochs": "85.00 %", "`wide`": "91.00 %",
                  "`held`": "92.00 %"}
    assert {name: row(text, name)[2] for name in accuracies} == accuracies
    assert "1,420 photos of held-out train" in " ".join(text.split())
    assert row(text, "CNN, 64 → 96 px, 100 epochs")[2] == "not measured"
    assert "elsewhere" not in (tmp_path / "results/two-abc1234/result.json").read_text()


def test_an_earlier_recipe_is_named_so(gathered, tmp_path):
    training(tmp_path, "cnn", 0.85, epochs=20, size=88, version=3)
    assert row(gathered(), "CNN, 64 → 88 px, 20 epochs, v3")[2] == "85.00 %"


def test_two_machines_do_not_overwrite_each_other_and_a_repetition_replaces(gathered, tmp_path):
    for processor, last in (("one", 0.8), ("two", 0.81), ("one", 0.82)):
        training(tmp_path, "cnn", last, machine=dict(processor=processor))
        text = gathered()
        (tmp_path / "runs").rename(tmp_path / f"old-{last}")
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["cnn-abc1234", "cnn-abc1234-2"]
    assert "82.00 %" in text and "81.00 %" in text and "80.00 %" not in text


def test_scores_are_the_tables_of_score(gathered, tmp_path):
    scored(tmp_path)
    scored(tmp_path, "demo-scores", n=20)
    text = gathered()
    assert row(text, "accuracy ↑") == ["accuracy ↑", "3,925", "90.0 [89.0, 91.0]", ""]
    assert row(text, "pointing game ↑")[2:] == ["80.0 [70.0, 90.0]", "75.0 [70.0, 80.0]"]
    assert row(text, "  minus centred square")[2] == "5.0 [-1.0, 10.0]"
    assert row(text, "average drop") == ["average drop", "cnn", "20.0 [10.0, 30.0]",
                                         "40.0 [30.0, 50.0]", ""]
    assert "epoch 19 of 20; scored in 60 s" in " ".join(text.split())
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["scores-abc1234"]


def test_speed_and_time_to_accuracy(gathered, tmp_path):
    facts = dict(command="python tests/bench.py", machine=MACHINE, precision="bfloat16",
                 device="cpu", repeats=3)
    rows = [dict(job="an epoch of the CNN, 64 px", unit="images/s", here=[600, 600],
                 usual=[200, 300])]
    (tmp_path / "figures/bench.json").write_text(json.dumps(facts | dict(rows=rows)))
    rows = [dict(way="this project", seconds=100.0, epochs=5, of_epochs=20, settings="a"),
            dict(way="ResNet-18", seconds=1000.0, epochs=30, of_epochs=40, settings="b"),
            dict(way="the CNN", seconds=None, epochs=None, of_epochs=40, settings="c", best=0.832,
                 all_seconds=800.0)]
    facts_of_accuracy = json.dumps(facts | dict(accuracy=0.85, rows=rows))
    (tmp_path / "figures/bench-accuracy.json").write_text(facts_of_accuracy)
    text = gathered()
    cells = row(text, "an epoch of the CNN, 64 px")
    assert cells[1:] == ["600 images/s", "250 images/s", "2.4 x (2.0 to 3.0)"]
    assert row(text, "this project")[1:] == ["100 s", "5 of 20", "1.0"]
    assert row(text, "ResNet-18")[1:] == ["17 min", "30 of 40", "10.0"]
    assert row(text, "the CNN")[1:] == ["83.2% after 13 min", "40", "more than 8.0"]
    assert "3. ResNet-18: b" in text
    assert "results/bench-abc1234/bench.json" in text and "bfloat16" in text


def test_a_second_run_changes_nothing_and_prose_is_kept(gathered, tmp_path):
    training(tmp_path, "cnn")
    scored(tmp_path)
    text = gathered()
    text = text.replace("<!-- prose speed -->\n", "<!-- prose speed -->\nFast {as} \\1 ever.\n")
    mine = "<!-- prose of mine -->\nKept.\n<!-- /prose -->\n"
    (tmp_path / "RESULTS.md").write_text(mine + text)
    once = gathered()
    assert "\nFast {as} \\1 ever.\n" in once and once.endswith(mine)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert gathered() == once
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrong", ["<!-- prose a -->\nno end\n",
                                   2 * "<!-- prose a -->\ntwice\n<!-- /prose -->\n"])
def test_prose_that_could_be_lost_is_refused(gathered, tmp_path, capsys, wrong):
    (tmp_path / "RESULTS.md").write_text(wrong)
    with pytest.raises(SystemExit, match="2"):
        gathered()
    assert "RESULTS.md" in capsys.readouterr().err
    assert (tmp_path / "RESULTS.md").read_text() == wrong


def test_trainings_on_other_photos_are_left_out(gathered, tmp_path, capsys):
    training(tmp_path, "mine", photos=[24, 12])
    training(tmp_path, "held-out", photos=[8049, 1420], holdout=0.15)
    assert "`held-out`" in gathered()
    assert "mine/result.json was left out" in capsys.readouterr().out
    assert not list((tmp_path / "results").glob("mine*"))


@pytest.mark.parametrize("more", [dict(machine=None), dict(command='python "'),
                                  dict(seconds="long")])
def test_a_file_that_holds_something_else_is_a_sentence(gathered, tmp_path, capsys, more):
    training(tmp_path, "odd", more=more)
    with pytest.raises(SystemExit, match="2"):
        gathered()
    odd = tmp_path / "runs/odd/result.json"
    assert capsys.readouterr().err.startswith(f"results.py: {odd} holds something else")
    assert not (tmp_path / "results").exists()


def test_what_is_damaged_is_named_and_what_is_older_left_out(gathered, tmp_path, capsys):
    (tmp_path / "runs/old").mkdir()
    (tmp_path / "runs/old/result.json").write_text(json.dumps(dict(best_accuracy=0.9)))
    gathered()
    assert "old" in capsys.readouterr().out and not (tmp_path / "results").exists()
    (tmp_path / "figures/scores.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        gathered()
    assert "scores.json is damaged" in capsys.readouterr().err


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    """RESULTS.md from results/, as both are in the repository; no table is wider than 100
    characters."""
    text = (REPO / "RESULTS.md").read_text()
    (tmp_path / "RESULTS.md").write_text(text)
    results.write_document(tmp_path / "RESULTS.md", results.read_results(REPO / "results"))
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 100


def test_the_numbers_of_the_readme_are_those_of_the_results():
    readme, page = ((REPO / name).read_text() for name in ("README.md", "RESULTS.md"))
    for line in re.findall(r"^\|.*", readme, re.M):
        for number in re.findall(r"\d[\d.,-]*(?: ± [\d.]+)? ?%", line):
            found = re.search(rf"(?<![\d.,]){re.escape(number)}", page)
            assert found, f"README.md says {number}, RESULTS.md does not"
