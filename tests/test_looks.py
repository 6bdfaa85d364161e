"""The measurements that RESULTS.md quotes beside the scores run, and agree with score.py."""

import signal

import cell_position
import looks
import pytest
import torch

import boxes
import data
import folders
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


def test_each_list_of_looks_has_a_row_of_train_s_scores(checkpoint, demo, monkeypatch, capsys):
    call(looks, monkeypatch, checkpoint, "--data", demo, "--boxes", demo, "--looks", "32", "16,32")
    lines = capsys.readouterr().out.splitlines()
    _, _, one, two = (line.strip("| ").split(" | ") for line in lines)
    assert one[0].strip() == "32" and two[0].strip() == "16, 32"
    assert int(one[1]) == 60  # all photos of train
    assert float(one[-1]) == 1.0 and float(two[-1]) > 0
    ((network, facts),) = networks.load_networks([checkpoint], [[32]])
    train, truth = boxes.load_boxes(demo, demo, folders.load(demo, "val"))[0][1]
    maps = looks.maps_of(models.fold_norms(network), train, 32, mirror=False)
    scores = score.localisation(maps[None], truth, len(truth))
    assert str(scores["pointing game"]) == one[2].strip()


def test_the_mirror_image_is_turned_back(checkpoint, demo):
    ((network, _),) = networks.load_networks([checkpoint], [[32]])
    photos = folders.load(demo, "train")
    plain, mean = (looks.maps_of(network, photos, 32, mirror) for mirror in (False, True))
    assert mean.shape == plain.shape and not torch.allclose(mean, plain)
    turned = data.from_arrays([photos[i].flip(1) for i in range(len(photos))], photos.labels)
    assert torch.allclose(looks.maps_of(network, turned, 32, True).flip(2), mean, atol=1e-4)


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
