"""Frozen networks: photos become their features once, and a head is trained on those.

    inputs = frozen.store(network, photos, size, mirrored, "train.features")    # see train.train

The features stand in a file, batch after batch: a pass that was killed goes on, and a second
training, with another learning rate or seed, starts at once.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import files
import models


class Features(NamedTuple):
    """What a frozen network says of photos: all that the training of its head needs of them."""

    vectors: torch.Tensor  # (views, N, C) float32: of the photos, and of their mirror images
    labels: torch.Tensor  # (N,), on the same device
    classes: list
    device: torch.device


@torch.no_grad()
def frozen_vectors(network, photos, size, mirrored, batch_size):
    """Yields, batch after batch, the features of `photos` at `size` px, averaged over the map, and,
    if `mirrored`, those of their mirror images: (B, 1 or 2, C) float32."""
    features = models.fold_norms(network).features
    for images, _ in data.eval_batches(photos, size, batch_size):
        views = [images, images.flip(3)] if mirrored else [images]
        yield torch.stack([features(view).mean((2, 3)) for view in views], 1)


def compute(network, photos, size, mirrored, label="features:"):
    """The `Features` of photos, in memory."""
    batches = frozen_vectors(network, photos, size, mirrored, 16)
    vectors = torch.cat([*files.progress(batches, label, len(photos), size=len)]).transpose(0, 1)
    return Features(vectors.contiguous(), photos.labels.to(photos.device), photos.classes,
                    photos.device)


def features_path(pixels, network, photos, size, mirrored):
    """The file of these features, beside that of the pixels: its name changes with the weights, the
    looks, the photos and the kind of device."""
    looks = getattr(network.features, "sizes", None)
    facts = [photos.fingerprint, looks, size, mirrored, photos.device.type]
    key = hashlib.blake2b(repr(facts).encode(), digest_size=6)
    for tensor in network.features.state_dict().values():
        key.update(tensor.cpu().contiguous().numpy().tobytes())
    return Path(pixels).with_suffix(f".{key.hexdigest()}.features")


def store(network, photos, size, mirrored, path, label="features:"):
    """The `Features` of photos. What `path` holds of them is read, and the rest computed."""
    count, views, channels = len(photos), 1 + mirrored, network.head.in_features
    batch_size = 16 if photos.device.type == "cpu" else 256
    row = 4 * views * channels  # bytes of a photo
    with files.lock(path), named(path), open(path, "ab") as file:
        done = file.tell() // row
        if done < count:
            done -= done % batch_size  # the same batches as without a kill: the same bits
            file.truncate(done * row)
            rest = photos.subset(torch.arange(done, count))
            batches = frozen_vectors(network, rest, size, mirrored, batch_size)
            for vectors in files.progress(batches, label, len(rest), size=len):
                file.write(vectors.cpu().numpy().tobytes())
                file.flush()
    vectors = torch.from_numpy(np.fromfile(path, np.float32, count * views * channels))
    vectors = vectors.view(count, views, channels).transpose(0, 1).contiguous()
    device = photos.device
    return Features(vectors.to(device), photos.labels.to(device), photos.classes, device)


@contextlib.contextmanager
def named(path):
    """Let an OSError of the block name `path`: a full disk names no file of its own accord."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
