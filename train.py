"""Train the two networks: one loop, by hand.

    python train.py cnn                        the CNN from scratch: 64 x 64 crops, 100 epochs
    python train.py resnet18                   ImageNet weights, only a new last layer trained
    python train.py resnet18 --unfreeze        the same, every layer trained

This is the training itself: it touches no disk and prints nothing. `train` yields after each epoch,
and launch.py listens. Copy train.py, data.py, models.py, optim.py and recorded.py, and this trains
a network (a last layer alone is trained on features, which frozen.py computes, in place of
photos):

    import data
    from train import choose_precision, make_recipe, start, train

    photos, val = data.load("imagenette2-160", "train"), data.load("imagenette2-160", "val")
    recipe = make_recipe("cnn", epochs=5)
    precision = choose_precision(photos.device)
    for epoch in train(recipe, start(recipe, photos, precision), photos, val, precision):
        print(epoch.row)                       # epoch.network: to save; epoch.state: to go on from
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import models
from optim import Average, Muon
from recorded import Recorded


@dataclass(frozen=True)
class Recipe:
    """All that decides what a training gives."""

    arch: str
    weights: str | None  # where it starts: None (random), "imagenet" or a file
    training: str  # what is trained, a key of DEFAULTS
    epochs: int
    crop: int  # px, side of a training crop; at the end it is `size` (`at_the_end`)
    size: int  # px, side of the photos in evaluation, and for the features under a head
    looks: tuple  # px, sides of the photos when maps are made
    batch_size: int
    lr: float  # at its peak, of convolutions; all else gets 5 times it (`Muon`)
    weight_decay: float
    smoothing: float  # of labels
    width: int = 0  # of the cnn: channels at 1/8 of the photo's side
    plain_crop: bool = False
    holdout: float = 0.0  # share of train that is validated on, in place of val
    seed: int = 0
    version: int = 8  # raised where network, optimiser, schedule or crops change


DEFAULTS = {  # everything from random weights, the head of a pretrained network, or all its layers
    "scratch": dict(epochs=100, crop=64, batch_size=64, lr=0.03, weight_decay=0.05, smoothing=0.1,
                    width=192),
    "head": dict(epochs=5, crop=0, size=224, batch_size=64, lr=0.003, weight_decay=0.0,
                 smoothing=0.0),
    "all": dict(epochs=5, crop=160, size=160, batch_size=64, lr=0.002, weight_decay=5e-4,
                smoothing=0.1),
}


def make_recipe(arch, unfreeze=False, **given):
    """The `Recipe` of a network, with DEFAULTS for the fields that are not given."""
    training = "scratch" if arch == "cnn" else "all" if unfreeze else "head"
    weights = None if training == "scratch" else "imagenet"
    fields = dict(arch=arch, weights=weights, training=training) | DEFAULTS[training] | given
    if "size" not in fields:
        fields["size"] = matching_size(fields["crop"], fields["epochs"])
    if "looks" not in fields:  # a network of plain crops knows objects of one scale alone
        plain = fields.get("plain_crop")
        fields["looks"] = (fields["size"],) if plain else default_looks(training, fields["size"])
    return Recipe(**fields)


def default_looks(training, size):
    """Sizes (px) at which maps are made (RESULTS.md has what each gives).

    From scratch also 2/3 and 4/3 of `size`: finer maps, 0.7 points less accuracy. Of a frozen
    network 10/7 of it alone: finer, as accurate. All but `size` are multiples of a cell's width,
    8 or 32 px.
    """
    factors = {"scratch": (2 / 3, 1, 4 / 3), "head": (10 / 7,), "all": (1, 10 / 7)}[training]
    cell = 8 if training == "scratch" else 32
    return tuple(sorted({size if factor == 1 else whole_cells(factor * size, cell)
                         for factor in factors}))


def whole_cells(side, cell=8):
    """The multiple of `cell` px, 8 for the cnn's maps, that is nearest to `side`, and not 0."""
    return max(cell, cell * round(side / cell))


# ---------------------------------------------------------------- schedules


def one_cycle(step, steps, warmup=0.05):
    """The learning rate at `step`, as a share of its peak: linearly up, then down to 0."""
    rise = warmup * steps
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def sides(recipe, epoch):
    """Sides (px) of an epoch's training crops and validation photos.

    Both grow in steps of 8 px (a cell of the cnn's map) from 3/4 of their final size, which they
    reach after 1/2 to 3/4 of the training: small crops are faster, and harder to learn by heart
    (Howard 2018; Tan & Le 2021). At the end crops are as large as photos in validation.
    """
    if recipe.plain_crop or recipe.training == "head":
        return recipe.crop, recipe.size
    if at_the_end(recipe.epochs, epoch):
        return recipe.size, recipe.size
    grown = 3 / 4 + (epoch + 1) / recipe.epochs / 3
    crop = whole_cells(grown * recipe.crop)
    if grown >= 1 or crop >= recipe.crop:
        return recipe.crop, recipe.size
    return crop, whole_cells(crop * recipe.size / recipe.crop)


def at_the_end(epochs, epoch):
    """Whether it is in the last tenth (of ten epochs or more), which learns from crops as large as
    photos in validation, of half a photo or more: better maps (after Touvron et al. 2019)."""
    return epoch >= epochs - epochs // 10


def least_area(epochs, epoch=0):
    """The least share of a photo in an epoch's crops: 45 % in 5 epochs, 10 % in 100, which overfit
    more; at the end half."""
    return 0.5 if at_the_end(epochs, epoch) else epochs**-0.5


def matching_size(crop, epochs):
    """Side (px) at which whole photos show objects as large as crops do: 96 for 64 px, 100 epochs.

    A crop of a share s of a photo enlarges by s^(-1/2), on average over s from a to 1 by
    2 / (1 + sqrt(a)) (Touvron et al. 2019).
    """
    return whole_cells(crop * 2 / (1 + least_area(epochs) ** 0.5))


# ---------------------------------------------------------------- precision


class Precision(NamedTuple):
    """How a device computes."""

    dtype: torch.dtype | None  # of autocast; None: float32
    scale: bool  # of the loss, by a GradScaler, lest float16 lose small gradients
    memory_format: torch.memory_format
    products: torch.dtype = torch.float32  # of matrix products outside the network


def choose_precision(device, training="scratch"):
    """Mixed precision where the hardware computes it natively, float32 elsewhere.

    A head is trained in float32: on features in bfloat16 it was right 0.4 points less often.
    """
    # On MPS gradients of channels-last are wrong: pytorch#175189.
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    if training == "head" or device.type == "mps":
        return Precision(None, False, layout)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # below, bfloat16 is emulated
    else:
        native = any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)()  # private: may go
                     for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if native:
        return Precision(torch.bfloat16, False, layout, torch.bfloat16)
    scale = device.type == "cuda"
    return Precision(torch.float16 if scale else None, scale, layout)


# ---------------------------------------------------------------- optimiser and average


def make_optimizer(recipe, module, products=torch.float32):
    """What takes the steps. The loop sets each group's "lr", so any optimiser of torch will do.

    The recipe's lr and weight_decay are Muon's (decay as AdamW's, of filters alone): SGD wants its
    own, such as --lr 0.1 --weight-decay 5e-4.
    """
    return Muon(module, recipe.lr, recipe.weight_decay, dtype=products)


# ---------------------------------------------------------------- the loop


def make_step(network, optimizer, scaler, average, precision, smoothing):
    """A step of training: step(x, labels, rate, share) -> its loss, and how many it got right.

    x: images or features; rate: of learning; share: of the new weights in the average.
    """

    def step(x, labels, rate, share):
        """Forward, backward, the optimiser, the average: the heart of a training."""
        optimizer.zero_grad()
        with torch.autocast(x.device.type, precision.dtype, enabled=precision.dtype is not None,
                            cache_enabled=False):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        scaler.scale(loss).backward()
        combine_gradients(network, len(labels))
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
        average.update(network, share)
        return loss.detach(), (logits.argmax(1) == labels).sum()

    return step


def train_epoch(step, batches, rates, average):
    """One epoch of (x, labels), with a learning rate for each step.

    Returns the losses (steps,), how many photos were right, and of how many (steps,); they stay on
    the device, as reading a number would stop it.
    """
    losses, correct, counts = [], 0, []
    for (x, labels), rate in zip(batches, rates, strict=True):
        loss, right = step(x, labels, rate, average.next_share())
        losses.append(loss)
        correct = correct + right
        counts.append(float(len(labels)))
    return torch.stack(losses), correct, torch.tensor(counts, device=correct.device)


@torch.no_grad()
def evaluate(network, batches, precision, classes):
    """Sums over the photos of each of K `classes`: cross-entropy, right answers, photos. (3, K)."""
    network.eval()
    totals = torch.zeros(3, classes, device=next(network.parameters()).device)
    for x, labels in batches:
        with torch.autocast(x.device.type, precision.dtype, enabled=precision.dtype is not None):
            logits = network(x).float()
        loss = F.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(1) == labels).float()
        totals.index_add_(1, labels, torch.stack([loss, right, torch.ones_like(loss)]))
    return totals


def val_scores(totals):
    """The columns of the log that follow from the sums (3, K) of `evaluate`. The classes' accuracy
    is the mean of each class's own: small ones count as much as large ones."""
    loss, right, photos = totals.cpu().double()  # MPS knows no float64
    there = photos > 0
    return dict(val_loss=float(loss.sum() / photos.sum()),
                val_accuracy=float(right.sum() / photos.sum()),
                val_class_accuracy=float((right[there] / photos[there]).mean()))


# ---------------------------------------------------------------- a training


def start(recipe, photos, precision, goes_on=False):
    """A new network, where `photos` are; goes_on: weights of a state are to be loaded into it.

    All but a head is frozen, where a head is trained; else the first layer of random weights is
    whitened.
    """
    torch.manual_seed(recipe.seed)
    weights = None if goes_on else recipe.weights
    network = models.build(recipe.arch, len(photos.classes), weights, recipe.width)
    if recipe.training == "head":
        network.features.requires_grad_(False)
    elif recipe.weights is None:
        count = max(1, min(256, 2**22 // recipe.crop**2))  # no more pixels for larger crops
        seeded = torch.Generator().manual_seed(recipe.seed)
        crops = data.train_batches(photos, recipe.crop, count, seeded, plain=recipe.plain_crop)
        models.whiten(network, next(iter(crops))[0])
    return network.to(photos.device, memory_format=precision.memory_format)


def epoch_batches(recipe, photos, epoch, products):
    """An epoch's batches (x, labels); each process gets its part of every batch.

    x: random crops; for a head each photo's stored features.
    """
    rank, world = processes()
    generator = torch.Generator().manual_seed(epoch_seed(recipe, epoch))
    if recipe.training != "head":
        side, area = sides(recipe, epoch)[0], least_area(recipe.epochs, epoch)
        yield from data.train_batches(photos, side, recipe.batch_size, generator, area,
                                      recipe.plain_crop, (rank, world), products)
        return
    for index in data.shuffled(len(photos.labels), recipe.batch_size, generator):
        index = data.send(index[rank::world], photos.device)
        yield photos.vectors[index], photos.labels[index]


def val_batches(recipe, val, epoch):
    """This process's part of val: whole photos; or the features of all of it (each process counts
    all, and ratios stay right)."""
    if recipe.training == "head":
        return [(val.vectors, val.labels)]
    rank, world = processes()
    return data.eval_batches(val.subset(torch.arange(rank, len(val), world)),
                             sides(recipe, epoch)[1], 128)


def epoch_seed(recipe, epoch):
    """The number from which all chance in an epoch follows, whenever a training goes on from it."""
    return 1_000_003 * recipe.seed + epoch


class Epoch(NamedTuple):
    """What `train` yields."""

    row: dict  # of the log: losses, accuracies, rate, speed
    # The next epoch changes both: save or copy what is to be kept.
    network: torch.nn.Module  # with the averaged weights, which were validated
    state: dict  # of state dicts: all that is needed to go on


def train(recipe, network, photos, val, precision, state=None):
    """Train `network`, and yield an `Epoch` after each; state: of the last one, to go on from
    there.

    photos, val: `data.Photos`; where a head is trained, their `frozen.Features`.
    Raises ValueError where a loss is not finite.
    """
    head = recipe.training == "head"
    module = network.head if head else network  # what is trained
    steps = data.batch_count(len(photos.labels), recipe.batch_size)
    done = state["epoch"] if state else 0
    average = Average(module, done * steps)
    averaged = models.CAMNet(network.features, average.module) if head else average.module
    parts = dict(network=network, average=average.module,
                 optimizer=make_optimizer(recipe, module, precision.products),
                 scaler=torch.amp.GradScaler(photos.device.type, enabled=precision.scale))
    if state:
        for name, part in parts.items():
            if state[name]:  # a scaler's is empty where the run began on a device that needs none
                part.load_state_dict(state[name])
    step = make_step(module, parts["optimizer"], parts["scaler"], average, precision,
                     recipe.smoothing)
    if photos.device.type == "cuda" and processes()[1] == 1:
        step = Recorded(step, photos.device)
    for epoch in range(done, recipe.epochs):
        started = time.perf_counter()  # time.time() ticks 64 times a second on Windows
        torch.manual_seed(epoch_seed(recipe, epoch))  # of dropout
        rates = [recipe.lr * one_cycle(epoch * steps + i, recipe.epochs * steps)
                 for i in range(steps)]
        batches = epoch_batches(recipe, photos, epoch, precision.products)
        module.train()
        losses, correct, counts = train_epoch(step, batches, rates, average)
        losses, correct, counts = map(add_up, (losses * counts, correct, counts))
        losses, count = losses / counts, float(counts.sum())  # of the photos of all processes
        row = dict(epoch=epoch + 1, train_loss=float(losses.mean()),
                   train_accuracy=int(correct) / count, lr=rates[0],
                   images_per_second=count / (time.perf_counter() - started))
        take_statistics(module, average.module)
        totals = evaluate(average.module, val_batches(recipe, val, epoch), precision,
                          len(photos.classes))
        row |= val_scores(add_up(totals))
        check_finite([*losses.tolist(), row["val_loss"]], epoch)
        row["seconds"] = time.perf_counter() - started
        state = {name: part.state_dict() for name, part in parts.items()}
        yield Epoch(row, averaged, dict(state, epoch=epoch + 1))


def check_finite(losses, epoch):
    """Raise ValueError unless an epoch's losses, of each step, then of validation, are finite."""
    if bad := [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]:
        where = f"step {bad[0]}" if bad[0] < len(losses) else "validation"
        saved = f"what is saved is of epoch {epoch}" if epoch else "nothing is saved"
        raise ValueError(f"the loss is not finite in epoch {epoch + 1}, {where}: use a smaller "
                         f"--lr; {saved}")


# ---------------------------------------------------------------- several processes (torchrun)
# Each has a copy of the network, and its part of every batch. With one process nothing happens.


def processes():
    """(rank, number) of the processes that train together: (0, 1) for one alone."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def add_up(tensor):
    """The sum of `tensor` over all processes, on each of them."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def combine_gradients(module, count):
    """The gradients of a whole batch, from those of each process's part, of `count` photos: their
    mean, each weighted by its count, which is summed beside them."""
    if processes()[1] > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        parts = [gradient.flatten() for gradient in gradients]
        parts.append(torch.ones_like(parts[0][:1]))
        sums = add_up(count * torch.cat(parts))
        *means, _ = (sums / sums[-1]).split([*map(len, parts)])  # the last: of the ones
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def take_statistics(*modules):
    """Give all processes the first's statistics of batch normalisation: they saw other photos."""
    if processes()[1] > 1:
        for buffer in (buffer for module in modules for buffer in module.buffers()):
            dist.broadcast(buffer, 0)


if __name__ == "__main__":
    try:
        import launch
    except ModuleNotFoundError as error:
        print(f"train.py: {error}: the command needs the packages of requirements.txt, and the "
              "project's files beside it; its functions work with fewer", file=sys.stderr)
        sys.exit(2)
    launch.main()
