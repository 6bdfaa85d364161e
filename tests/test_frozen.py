"""frozen.py: the features of photos, computed once, and again only where something has changed."""

import contextlib

import pytest
import torch
from conftest import features_one_by_one, frozen_resnet, full_disk

import data
import files
import folders
import frozen
import models


@pytest.fixture(scope="module")
def val(demo):
    return folders.load(demo, "val")


@pytest.fixture
def passes(monkeypatch):
    """How many photos went through a network, in each pass."""
    counts, batches = [], data.eval_batches
    monkeypatch.setattr(data, "eval_batches", lambda photos, *rest:
                        counts.append(len(photos)) or batches(photos, *rest))
    return counts


def test_stored_features_are_those_of_the_network(val, tmp_path):
    network = frozen_resnet()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    stored = frozen.store(network, val, 32, tmp_path / "val.features")
    vectors = stored.vectors
    assert torch.equal(stored.labels, val.labels) and stored.classes == val.classes
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    own = features_one_by_one(network, val, 32)
    assert torch.allclose(vectors, own, rtol=1e-4, atol=1e-4)
    assert torch.equal(frozen.compute(network, val, 32).vectors, vectors)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_features_of_several_looks_are_their_mean(val, tmp_path):
    plain = frozen_resnet()
    network = models.with_looks(plain, [32, 64])
    stored = frozen.store(network, val, 64, tmp_path / "val.features").vectors
    own = features_one_by_one(network, val, 64)
    assert torch.allclose(stored, own, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stored, features_one_by_one(plain, val, 32), atol=1e-3)


def test_a_pass_that_was_killed_goes_on_to_the_same_bits(val, tmp_path, passes, capfd):
    network, path = frozen_resnet(), tmp_path / "val.features"
    whole = frozen.store(network, val, 32, path).vectors
    contents, row = path.read_bytes(), path.stat().st_size // len(val)
    assert passes == [20] and "features: 20 of 20 photos" in capfd.readouterr().err
    for rows in (0, 0.5, 17.5, 20):  # batches are of 16 photos
        path.write_bytes(contents[: int(rows * row)])
        assert torch.equal(frozen.store(network, val, 32, path).vectors, whole)
        assert path.read_bytes() == contents
    assert passes == [20, 20, 20, 4]  # and none where all are there


def test_two_passes_without_a_lock_write_the_same(val, tmp_path, monkeypatch):
    network, path, pass_over = frozen_resnet(), tmp_path / "val.features", frozen.frozen_vectors
    alone = frozen.compute(network, val, 32).vectors

    def first(*these):
        yield next(pass_over(*these))
        raise KeyboardInterrupt

    def overtaken(*these):
        """Another process writes a batch before this one, which has seen an empty file, does."""
        monkeypatch.setattr(frozen, "frozen_vectors", first)
        with pytest.raises(KeyboardInterrupt):
            frozen.store(network, val, 32, path)
        yield from pass_over(*these)

    monkeypatch.setattr(files, "lock", lambda path: contextlib.nullcontext())
    monkeypatch.setattr(frozen, "frozen_vectors", overtaken)
    assert torch.equal(frozen.store(network, val, 32, path).vectors, alone)
    assert torch.equal(frozen.store(network, val, 32, path).vectors, alone)  # as the file has them


def test_other_weights_sizes_or_photos_have_a_file_of_their_own(val):
    network, pixels = frozen_resnet(), "folder/val.pixels"
    few = val.subset(torch.arange(5))
    path = frozen.features_path(pixels, network, val, 32)
    assert path == frozen.features_path(pixels, frozen_resnet(), val, 32)
    assert path.parent.name == "folder" and path.name.startswith("val.")
    others = [frozen.features_path(pixels, network, few, 32),
              frozen.features_path(pixels, network, val, 64)]
    network.features.bn1.running_mean[3] += 1e-3
    others.append(frozen.features_path(pixels, network, val, 32))
    assert len({path, *others}) == 4


def test_a_disk_full_of_features_names_the_file_and_keeps_what_fits(val, tmp_path, passes):
    network, path = frozen_resnet(), tmp_path / "val.features"
    with full_disk(40_000), pytest.raises(OSError, match="val.features"):  # bytes: 19 photos of 20
        frozen.store(network, val, 32, path)
    vectors = frozen.store(network, val, 32, path).vectors
    assert passes == [20, 4]  # the first 16 were there
    assert torch.allclose(vectors, features_one_by_one(network, val, 32), rtol=1e-4, atol=1e-4)
