"""Two networks behind one contract: features -> global average pooling -> one linear layer.

    network = models.cnn()                                     hand-written, to train from scratch
    network = models.build("resnet18", weights="imagenet")     torchvision's, its last layer new
    network, facts = models.load("runs/cnn/best.pt")           a trained one, with what was written down of it

For networks of this shape, and for no others, the class activation map is exact:
`logits == maps.mean((2, 3)) + head.bias` with `maps = einsum("kc,nchw->nkhw", head.weight, features(x))`.
This file imports nothing of the project: copy it alone and it works.
"""

import contextlib
import copy
import ctypes
import io
import os
import pickle
import platform
import re
import subprocess
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models as torchvision_models


class ModelError(Exception):
    """Something the user can mend; the message is one sentence that says what and how."""


class CAMNet(nn.Module):
    """features: (N, 3, H, W) -> (N, C, h, w) for any H and W; head: nn.Linear, C -> K classes."""

    def __init__(self, features, head):
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))  # (N, K), logits


class Looks(nn.Module):
    """The features of an image, averaged over looks at several sizes; itself the `features` of a CAMNet.

    sizes: px, ascending. (N, 3, H, W) -> (N, C, h, w): the image is resized to a square of each size, antialiased
    (feed it at the largest), and the feature maps are upsampled to the largest of them before they are averaged.
    """

    def __init__(self, features, sizes):
        super().__init__()
        self.features = features
        self.sizes = tuple(sizes)

    def forward(self, x):
        *coarser, finest = [self.features(resize(x, (size, size))) for size in self.sizes]
        return sum([resize(maps, finest.shape[2:]) for maps in coarser], finest) / len(self.sizes)


def resize(x, size):
    """(N, C, H, W) at `size` (h, w), bilinear; antialiased where it shrinks. As it is where the size is its own."""
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=x.shape[2] > size[0] or x.shape[3] > size[1])


def with_looks(network, sizes):
    """A CAMNet of the same modules that looks at an image at all of `sizes` (px), in place of the looks it may have.
    One size needs no `Looks`: feed the network images of that size."""
    features = network.features.features if isinstance(network.features, Looks) else network.features
    return CAMNet(features if len(sizes) == 1 else Looks(features, sorted(sizes)), network.head)


# ---------------------------------------------------------------- the CNN


class ConvNorm(nn.Sequential):
    """A convolution without bias (the normalisation has one), batch normalisation, ReLU.

    stride 2 halves the image with 4 x 4 filters, whose centres lie on those of 2 x 2 blocks of pixels, so that a
    cell of the map lies exactly where upsampling draws it; the centres of 3 x 3 filters would be half a pixel off,
    0.5 * (1 + 2 + 4) = 3.5 pixels of the image after three halvings.
    """

    def __init__(self, inputs, outputs, stride=1):
        super().__init__(
            nn.Conv2d(inputs, outputs, 4 if stride == 2 else 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """x + f(x), f two convolutions. f begins as zero, so that the network begins shallow (Goyal et al. 2017)."""

    def __init__(self, channels):
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(self.first(x))))


def cnn(classes=10, width=192):
    """The CNN that is trained from scratch: 3.0 million parameters, a map of 1/8 of the input (20 x 20 at 160 px).

    width: the channels at 1/8 of the input, where they are cheap: few pixels are left, and the map is made there.
    """
    features = nn.Sequential(
        ConvNorm(3, 32, stride=2),  # 1/2
        ConvNorm(32, 64, stride=2),  # 1/4
        Residual(64),
        Residual(64),
        ConvNorm(64, width, stride=2),  # 1/8
        Residual(width),
        Residual(width),
        Residual(width),
        ConvNorm(width, 2 * width),
    )
    return CAMNet(features, nn.Linear(2 * width, classes))


@torch.no_grad()
def whiten(network, images, eps=1e-3):
    """Make the first layer of a `cnn` the principal components of the patches of `images` (N, 3, H, W), and freeze it.

    The 4 x 4 x 3 patches that its filters see vary mostly in brightness. Their 16 largest principal components, each
    divided by its standard deviation, are uncorrelated and vary alike, so that the layers above learn from all of them
    at once (Coates & Ng 2012; Jordan 2024). The other 16 filters are their negatives, for ReLU drops one side.
    """
    conv = network.features[0][0]
    patches = F.unfold(images.float().cpu(), conv.kernel_size, stride=conv.stride)  # (N, P, places)
    patches = patches.transpose(0, 1).flatten(1)  # (P, N * places)
    variances, components = torch.linalg.eigh(torch.cov(patches))  # ascending; a column each
    filters = (components / (variances + eps).sqrt()).T.flip(0)[: conv.out_channels // 2]
    conv.weight.copy_(torch.cat([filters, -filters]).view_as(conv.weight))
    conv.weight.requires_grad_(False)


# ---------------------------------------------------------------- torchvision's networks


def build(arch, classes=10, weights=None, width=192):
    """The network named `arch`: "cnn", or any torchvision classifier that CAM is exact for.

    weights: None (random), "imagenet" (torchvision's verified download) or a file with torchvision's own key
    names, the last layer included or not. Their last layer is new, and zero, in any case: the logits begin at 0.
    width: of the cnn.
    Raises ModelError: unknown, not of the CAM shape, no network, weights that do not fit.
    """
    if arch == "cnn":
        if weights:
            raise ModelError("the cnn is trained from scratch and takes no weights: leave --weights (WEIGHTS=) out")
        return cnn(classes, width)
    if arch not in torchvision_models.list_models(torchvision_models):  # classifiers; a detector begins with a download
        names = "cnn, resnet18, resnet34, resnet50, mobilenet_v2, efficientnet_b0, densenet121, regnet_y_400mf"
        raise ModelError(f"there is no network {arch!r}: try one of {names}")
    original = torchvision_models.get_model(arch, weights=None)
    network = take_apart(original, arch)  # before any download; the two share their modules
    if weights:
        state = download(arch) if weights == "imagenet" else read(weights)
        load_torchvision_state(original, state, weights, arch)
    network.head = nn.Linear(network.head.in_features, classes)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    return network


def take_apart(network, arch):
    """A torchvision classifier as a CAMNet of the same modules, checked against its own forward.

    All that comes before the pooling becomes `features`; what comes after it must be one linear layer.
    """
    *body, (_, last) = network.named_children()
    steps = [m for m in (last if isinstance(last, nn.Sequential) else [last])
             if not isinstance(m, (nn.Dropout, nn.Flatten))]
    if len(steps) != 1 or not isinstance(steps[0], nn.Linear):
        between = ", ".join(type(m).__name__ for m in steps)
        raise ModelError(f"{arch} cannot be explained exactly: after its pooling come {between}, where CAM needs "
                         "one linear layer and nothing else; resnet18 and mobilenet_v2 are of that shape")
    body = OrderedDict((name, m) for name, m in body
                       if not isinstance(m, (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout)))
    if isinstance(network, torchvision_models.DenseNet):
        body["relu"] = nn.ReLU()  # a line of its forward, not a module
    apart = CAMNet(body["features"] if list(body) == ["features"] else nn.Sequential(body), steps[0])
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():  # how two images differ, relatively: a new network's logits can be 1e-14
            own, ours = (logits[0] - logits[1] for logits in (network.eval()(x), apart.eval()(x)))
        same = (own - ours).norm() <= 1e-2 * own.norm()
    except Exception:  # parts that do not even fit together: branches, tokens, fixed sizes
        same = False
    if not same:
        raise ModelError(f"{arch} cannot be explained exactly: its logits are not a linear layer on the average of "
                         "a feature map (other pooling, branches or tokens); resnet18 and mobilenet_v2 are")
    return apart


def download(arch):
    """torchvision's ImageNet weights of `arch`, verified by their checksum, kept in torch's own cache."""
    weights = torchvision_models.get_model_weights(arch).DEFAULT
    try:
        return weights.get_state_dict(check_hash=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        raise ModelError(f"cannot download the ImageNet weights of {arch} ({error}): fetch {weights.url} elsewhere "
                         "and name the file with --weights (WEIGHTS=)") from error


def load_torchvision_state(network, state, source, arch):
    """Load a state dict of torchvision's key names, complete or without the last layer, and nothing else."""
    *_, (last, _) = network.named_children()
    own = network.state_dict()
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                              for k, v in state.items()):
        raise ModelError(f"{source} holds no state dict: it must be a file of torchvision's weights for {arch}")
    metadata = getattr(state, "_metadata", None)  # mnasnet asks for the version in it
    # densenet's files say denselayer1.norm.1 where its modules are named denselayer1.norm1
    state = OrderedDict((re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", k), v)
                        for k, v in state.items() if not k.startswith(f"{last}."))
    state._metadata = metadata
    needed = [k for k in own if not k.startswith(f"{last}.") and not k.endswith(".num_batches_tracked")]
    wrong = [k for k in needed if k not in state]
    wrong += [k for k in state if k not in own or state[k].shape != own[k].shape]
    if wrong:
        raise ModelError(f"{source} does not hold the weights of {arch} ({len(wrong)} of its tensors are missing, of "
                         f"another shape or unknown, {wrong[0]} first): name the network they are of")
    network.load_state_dict(state, strict=False)


def fold_norms(network):
    """A copy for inference in which every BatchNorm is folded into the convolution before it: faster, and equal up to
    rounding. An unfolded copy where folding would change what it computes."""
    plain = copy.deepcopy(network).eval()
    folded = copy.deepcopy(plain)
    for module in list(folded.modules()):  # children stand in the order of their use
        for (name, conv), (next_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())
    weight = next(network.parameters())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 is too coarse
        same = torch.allclose(plain.features(x), folded.features(x), rtol=1e-3, atol=1e-4)
    return folded if same else plain


def keep_memory():
    """Let glibc keep freed memory for the next tensor, instead of asking the kernel for every large one page by page,
    which costs passes of large images on a CPU dearly. Nothing where there is no glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error):
    """Whether an error says that memory ran out; torch has a type of its own for that on CUDA alone."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"))


def machine():
    """Where and with what a number was measured, in plain types: processor, instructions, cores, memory (GiB),
    versions, and the commit of this folder, with a + where files have been changed since; what cannot be found out is
    None."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError, AttributeError):  # no Linux
        facts, memory = "", None
    processor = re.search(r"model name\s*: (.*)", facts)
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return dict(processor=processor[1] if processor else platform.processor() or platform.machine(),
                instructions=torch.backends.cpu.get_cpu_capability() + ", AMX" * torch.cpu._is_amx_tile_supported(),
                cores=os.cpu_count(), memory=memory, python=platform.python_version(),
                torch=torch.__version__, torchvision=torchvision.__version__, commit=commit)


# ---------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def atomic(path):
    """Open `path` for binary writing so that it appears whole or not at all: temporary name, flush, rename."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk names no file of its own accord
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(part).unlink(missing_ok=True)


def write(path, contents):
    """Write tensors and plain types so that `read` gets them back."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with atomic(path) as file:
        file.write(buffer.getbuffer())


def read(path):
    """The contents of a file of tensors and plain types; anything that would run code is refused."""
    path = Path(path)
    if not path.is_file():
        what, run = "is a folder" if path.is_dir() else "does not exist", path.parent.name
        if path.name == "best.pt":
            command = f"finetune ARCH={run}" if run in torchvision_models.list_models() else "train-cnn"
            what += f" (`make {command}` makes one)"
        raise ModelError(f"{path} {what}: name a file that is there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a stranger's file fails in as many ways as there are files
        raise ModelError(f"{path} is no file of weights, is damaged, or holds more than tensors and plain types: "
                         "name another") from error


def looks_key(looks):
    """How a checkpoint's `accuracies` name a list of sizes: "224 320"."""
    return " ".join(map(str, looks))


def save(path, network, **facts):
    """Write a checkpoint. facts: what is needed to rebuild and use the network, plain types only: arch, classes
    (names in the order of the labels), mean, std, looks (sizes in px at which photos are looked at), accuracies
    ({`looks_key`: share}), accuracy_on ("val" or "held-out train"), accuracy_n, how (it was trained), settings, epoch.
    """
    plain = with_looks(network, [0])  # one look, and so no `Looks`: others may be taken when it is loaded
    write(path, {"format": "camnet-1", **facts, "state": plain.state_dict()})


def load(path, device="cpu", looks=None):
    """A checkpoint of `save`: (network in evaluation mode on `device`, facts). looks: sizes (px) in place of its own.

    The network looks at images at all the sizes of facts["looks"]; feed it images of facts["size"], the largest of
    them. facts["accuracy"] is that of exactly these looks, or None where it was not measured;
    facts["width"] is a cnn's. Raises ModelError.
    """
    facts = read(path)
    if not isinstance(facts, dict) or facts.get("format") != "camnet-1":
        raise ModelError(f"{path} is no checkpoint of this project: train.py writes them (runs/*/best.pt)")
    try:
        state = facts.pop("state")
        facts["width"] = state["head.weight"].shape[1] // 2  # of a cnn
        network = build(facts["arch"], len(facts["classes"]), width=facts["width"])
        network.load_state_dict(state)
        if "looks" not in facts and "size" in facts:  # a checkpoint from before there were looks
            settings = facts.get("settings", {})
            facts |= dict(looks=[facts["size"]], accuracies={looks_key([facts["size"]]): facts.get("accuracy")},
                          accuracy_on="held-out train" if settings.get("holdout") else "val", accuracy_n=None,
                          how="only its last layer trained" if settings.get("frozen") else "trained")
        if "looks" in facts:
            facts["looks"] = sorted(looks or facts["looks"])
            facts["size"] = facts["looks"][-1]
            facts["accuracy"] = facts.get("accuracies", {}).get(looks_key(facts["looks"]))
            network = with_looks(network, facts["looks"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} says it is a {facts.get('arch')}, but its contents are not that network's: "
                         "train it again, or name another file") from error
    return network.to(device).eval(), facts
