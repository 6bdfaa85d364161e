"""The measurements that RESULTS.md quotes beside the scores run, and agree with score.py."""

import signal

import cell_position
import looks
import pytest
import torch

import boxes
import data
import folders
import metrics
import models
import networks
import score


@pytest.fixture
def checkpoint(tmp_path):
    """A CNN with random weights, saved as train.py saves one."""
    torch.manual_seed(0)
    path = tmp_path / "best.pt"
    models.save(path, models.cnn(width=16), arch="cnn", classes=list(data.CLASSES.values()),
                mean=data.MEAN, std=data.STD, looks=[32], settings={}, accuracies={},
                accuracy_on="val", accuracy_n=20, epoch=1, how="")
    return path


def call(module, monkeypatch, *arguments):
    """The command line of a module of tests/, in this process."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    handlers = {end: signal.getsignal(end) for end in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main()
    finally:
        for end, handler in handlers.items():
            signal.signal(end, handler)


def rows_of(text):
    """The cells of Markdown's tables, and its other lines."""
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines()
            if line.strip("| -:")]


def test_each_list_of_looks_has_its_rows_of_scores(checkpoint, demo, monkeypatch, capsys):
    call(looks, monkeypatch, checkpoint, "--data", demo, "--boxes", demo, "--looks", "32", "16,32")
    rows = rows_of(capsys.readouterr().out)
    accuracy = [row for row in rows if len(row) == 5]
    assert [row[0] for row in accuracy] == ["looks, px", "32", "16, 32"]
    val = folders.load(demo, "val")
    ((network, facts),) = networks.load_networks([checkpoint], [[32]])
    logits, _ = score.logits_and_maps(network, data.eval_batches(val, 32, 20))
    right = logits.argmax(1) == val.labels
    assert accuracy[1][2] == str(metrics.mean_interval(right.float()))
    assert accuracy[1][3] == "" and accuracy[2][3].endswith("]") and float(accuracy[2][4]) > 0
    train, truth = boxes.load_boxes(demo, demo, val)[0][1]
    maps = looks.maps_of(models.fold_norms(network), train, facts, mirror=False)
    scores = score.localisation(maps, truth, len(truth))
    of_train = rows[rows.index(["Photos with boxes: train's 60"]):][2]
    assert of_train[::2] == ["32", *(str(scores[name]) for name in looks.SCORES)]


def test_heads_share_their_features(checkpoint, demo, tmp_path, monkeypatch, capsys):
    content, other = torch.load(checkpoint), tmp_path / "other.pt"
    del content["of_noise"]
    content["state"]["head.bias"] = torch.arange(10.0) * 100  # always the last class
    torch.save(content, other)
    call(looks, monkeypatch, checkpoint, other, "--data", demo, "--boxes", demo, "--looks", "32")
    accuracy = [row for row in rows_of(capsys.readouterr().out) if len(row) == 5]
    assert [row[1] for row in accuracy] == ["head", "1", "2"]
    assert accuracy[2][2].startswith("10.0 [")  # a tenth of val are of that class
    content["state"]["features.0.0.weight"] += 1
    torch.save(content, other)
    with pytest.raises(SystemExit, match="2"):
        call(looks, monkeypatch, checkpoint, other, "--data", demo, "--boxes", demo, "--looks", "9")
    assert "other.pt has other features than" in capsys.readouterr().err


def test_the_mirror_image_is_turned_back(checkpoint, demo):
    ((network, facts),) = networks.load_networks([checkpoint], [[32]])
    photos = folders.load(demo, "train")
    plain, mean = (looks.maps_of(network, photos, facts, mirror) for mirror in (False, True))
    assert mean.shape == plain.shape and not torch.allclose(mean, plain)
    turned = data.from_arrays([photos[i].flip(1) for i in range(len(photos))], photos.labels)
    assert torch.allclose(looks.maps_of(network, turned, facts, True).flip(3), mean, atol=1e-4)
    other = facts | dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert not torch.allclose(looks.maps_of(network, photos, other, False), plain, atol=1e-2)


@pytest.mark.parametrize("module", [looks, cell_position])
@pytest.mark.parametrize("what", ["no checkpoint", "no boxes of train"])
def test_what_cannot_be_measured_is_a_sentence(module, what, checkpoint, demo, monkeypatch, capsys):
    if what == "no boxes of train":
        monkeypatch.setattr(boxes, "load_boxes", lambda *_: ([1], "there are no boxes of train"))
    model = demo / "none.pt" if what == "no checkpoint" else checkpoint
    more = ["--looks", "32"] if module is looks else []
    with pytest.raises(SystemExit, match="2"):
        call(module, monkeypatch, model, "--data", demo, "--boxes", demo, *more)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{module.__name__}.py: ") and ("none.pt" in last or what in last)


def test_cells_lie_where_they_are_moved_to(checkpoint, demo, monkeypatch, capsys):
    spot = torch.zeros(1, 4, 4)
    spot[0, 1, 2] = 1
    plain = cell_position.shifted(spot, 16, 0)
    assert int(plain.argmax()) in (16 * y + x for y in (5, 6) for x in (9, 10))
    up_left = cell_position.shifted(spot, 16, 1)
    assert int(up_left.argmax()) in (16 * y + x for y in (1, 2) for x in (5, 6))
    call(cell_position, monkeypatch, checkpoint, "--data", demo, "--boxes", demo)
    said = capsys.readouterr().out
    assert "size 32, stride 8" in said and said.count("MaxBoxAccV2") == 2
