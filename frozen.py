"""Frozen networks: photos become their features once, and a head is trained on those.

    features = frozen.store(network, photos, size, "train.features")     # see train.train

The features stand in a file, batch after batch: a pass that was killed goes on, and a second
training, with another learning rate or seed, starts at once.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import files
import models


class Features(NamedTuple):
    """What a frozen network says of photos: all that the training of its head needs of them."""

    vectors: torch.Tensor  # (N, C) float32, each a mean over the map
    labels: torch.Tensor  # (N,), on the same device
    classes: list
    device: torch.device


@torch.no_grad()
def frozen_vectors(network, photos, size, batch_size=16):
    """Yields, batch after batch, the features of `photos` at `size` px, averaged over the map:
    (B, C) float32. Mirror images, or a second look, made no head more accurate."""
    features = models.fold_norms(network).features
    for images, _ in data.eval_batches(photos, size, batch_size):
        yield features(images).mean((2, 3))


def compute(network, photos, size, label="features:"):
    """The `Features` of photos, in memory."""
    batches = frozen_vectors(network, photos, size)
    return with_labels(torch.cat([*files.progress(batches, label, len(photos), size=len)]), photos)


def with_labels(vectors, photos):
    """`Features`, on the photos' device."""
    device = photos.device
    return Features(vectors.to(device), photos.labels.to(device), photos.classes, device)


def features_path(pixels, network, photos, size):
    """The file of these features, beside that of the pixels: its name changes with the weights, the
    size, the photos and the kind of device."""
    facts = [photos.fingerprint, size, photos.device.type]
    key = hashlib.blake2b(repr(facts).encode(), digest_size=6)
    for tensor in network.features.state_dict().values():
        key.update(tensor.cpu().contiguous().numpy().tobytes())
    return Path(pixels).with_suffix(f".{key.hexdigest()}.features")


def store(network, photos, size, path, label="features:"):
    """The `Features` of photos. What `path` holds of them is read, and the rest computed."""
    count, channels = len(photos), network.head.in_features
    batch_size = 16 if photos.device.type == "cpu" else 256
    path.touch()
    with files.lock(path), named(path), open(path, "r+b") as file:
        done = file.seek(0, os.SEEK_END) // (4 * channels)
        if done < count:
            done -= done % batch_size  # the same batches as without a kill: the same bits
            file.seek(4 * channels * done)  # two processes without a lock write the same there
            rest = photos.subset(torch.arange(done, count))
            batches = frozen_vectors(network, rest, size, batch_size)
            for vectors in files.progress(batches, label, len(rest), size=len):
                file.write(vectors.cpu().numpy().tobytes())
                file.flush()
    vectors = torch.from_numpy(np.fromfile(path, np.float32, count * channels))
    return with_labels(vectors.view(count, channels), photos)


@contextlib.contextmanager
def named(path):
    """Let an OSError of the block name `path`: a full disk names no file of its own accord."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
