"""Two networks behind one contract: features -> global average pooling -> one linear layer.

    network = models.cnn()                                  hand-written, to train from scratch
    network = models.build("resnet18", weights="imagenet")  torchvision's, its last layer new
    network, facts = models.load("runs/cnn/best.pt")        a trained one, and facts about it

For networks of this shape, and for no others, the class activation map is exact: `logits ==
maps.mean((2, 3)) + head.bias` with `maps = einsum("kc,nchw->nkhw", head.weight, features(x))`. This
file imports nothing of the project: copy it alone and it works. """

import copy
import pickle
import re
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models as torchvision_models

FORMAT = "camnet-1"  # of the checkpoints of `save`


class CAMNet(nn.Module):
    """features: (N, 3, H, W) -> (N, C, h, w) for any H and W; head: nn.Linear, C -> K classes."""

    def __init__(self, features, head):
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))  # (N, K), logits


class Looks(nn.Module):
    """The mean of an image's features at several sizes; itself the `features` of a CAMNet.

    sizes: px, ascending. (N, 3, H, W) -> (N, C, h, w): the image is resized to a square of each
    size (feed it at the largest), and the feature maps are upsampled to the largest and averaged.
    """

    def __init__(self, features, sizes):
        super().__init__()
        self.features = features
        self.sizes = tuple(sizes)

    def forward(self, x):
        *coarser, finest = [self.features(resize(x, (size, size))) for size in self.sizes]
        return sum([resize(maps, finest.shape[2:]) for maps in coarser], finest) / len(self.sizes)


def resize(x, size):
    """(N, C, H, W) at `size` (h, w), bilinear, antialiased where it shrinks."""
    if x.shape[2:] == torch.Size(size):
        return x
    shrinks = x.shape[2] > size[0] or x.shape[3] > size[1]
    return F.interpolate(x, size, mode="bilinear", antialias=shrinks)


def with_looks(network, sizes):
    """A CAMNet of the same modules that looks at `sizes` (px), in place of the looks it may have.

    One size needs no `Looks`: feed the network images of that size. (): none, the plain network.
    """
    own = network.features
    features = own.features if isinstance(own, Looks) else own
    return CAMNet(features if len(sizes) <= 1 else Looks(features, sorted(sizes)), network.head)


# ---------------------------------------------------------------- the CNN


class ConvNorm(nn.Sequential):
    """Convolution (without bias: the normalisation has one), batch normalisation, ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """x + f(x), f two convolutions. f begins as 0, so that a block begins as the identity (Goyal et
    al. 2017)."""

    def __init__(self, channels):
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(self.first(x))))


def cnn(classes=10, width=192):
    """The CNN that is trained from scratch: 2.9 million parameters, maps of 1/8 of the image's
    side.

    width: channels at 1/8, where they are cheap (few pixels are left), and where the map is made.
    Averages of 2 x 2 halve the image with less aliasing (Zhang 2019): after 5 epochs 3 points more
    are right than with convolutions of stride 2. And a cell of the map is drawn over the pixels it
    stands for, where 3 x 3 filters of stride 2 would shift it by 3.5 pixels. If a side is no
    multiple of 8, the last pixels have no cell, and a map drawn over all of it is stretched by as
    much. (`whiten`, called by train.start, sets the first convolution and freezes it.)
    """
    features = nn.Sequential(
        ConvNorm(3, 32), nn.AvgPool2d(2),  # 1/2
        ConvNorm(32, 64), nn.AvgPool2d(2),  # 1/4
        Residual(64),
        Residual(64),
        ConvNorm(64, width), nn.AvgPool2d(2),  # 1/8
        Residual(width),
        Residual(width),
        Residual(width),
        ConvNorm(width, 2 * width),
    )
    return CAMNet(features, nn.Linear(2 * width, classes))


@torch.no_grad()
def whiten(network, images, eps=1e-3):
    """Make the first convolution the principal components of patches of `images`, and freeze it.

    images: (N, 3, H, W). Pixels of a patch vary together; its largest principal components are
    uncorrelated, and, each divided by its standard deviation, vary alike: the layers above learn
    from all of them at once (Coates & Ng 2012; Jordan 2024). eps: added to variances, so that noise
    is not blown up. Half of the filters are the negatives of the others, because ReLU drops one
    side. A first convolution of another kind (a bias, groups, an odd number of filters, or more
    than two a component) stays as it is.
    """
    conv = next((m for m in network.features.modules() if isinstance(m, nn.Conv2d)), None)
    if (conv is None or conv.bias is not None or conv.weight.shape[1] != images.shape[1]
            or conv.out_channels % 2 or conv.out_channels > 2 * conv.weight[0].numel()
            or min(images.shape[2:]) < max(conv.kernel_size) * max(conv.dilation)):
        return
    patches = F.unfold(images.float().cpu(), conv.kernel_size, conv.dilation, stride=conv.stride)
    patches = patches.transpose(0, 1).flatten(1)  # (N, P, places) -> (P, N * places)
    variances, components = torch.linalg.eigh(torch.cov(patches))  # ascending; a column each
    filters = (components / (variances + eps).sqrt()).T.flip(0)[: conv.out_channels // 2]
    conv.weight.copy_(torch.cat([filters, -filters]).view_as(conv.weight))
    conv.weight.requires_grad_(False)


# ---------------------------------------------------------------- torchvision's networks


def classifiers():
    """The names of torchvision's networks that classify images."""
    return torchvision_models.list_models(torchvision_models)


def build(arch, classes=10, weights=None, width=192):
    """The network named `arch`: "cnn", or any torchvision classifier that CAM is exact for.

    weights: None (random), "imagenet" (torchvision's download, verified), a name of torchvision's
    ("IMAGENET1K_V1"), or a file of a state dict with torchvision's key names.
    classes: of the last layer, which is new, and zero; None keeps that of the weights.
    Raises ValueError: unknown, not of the CAM shape, weights that do not fit, no download.
    """
    if arch == "cnn":
        if weights:
            raise ValueError("the cnn is trained from scratch and takes no weights: leave "
                             "--weights (WEIGHTS=) out")
        if classes is None:
            raise ValueError("the cnn has no trained last layer: say how many classes it knows")
        return cnn(classes, width)
    if arch not in classifiers():
        raise ValueError(f"there is no network {arch!r}: try one of cnn, resnet18, resnet34, "
                         "resnet50, mobilenet_v2, efficientnet_b0, densenet121, regnet_y_400mf")
    original = torchvision_models.get_model(arch, weights=None)
    network = take_apart(original, arch)  # refused before any download; the two share their modules
    state = read_weights(weights, arch) if weights else {}
    if state:
        load_features(original, state, weights, arch)
    name = next(name for name, module in original.named_modules() if module is network.head)
    trained = {key: state.get(f"{name}.{key}") for key in ("weight", "bias")}
    if classes is None and None in trained.values():
        raise ValueError(f"{weights or arch} holds no trained last layer: name weights that do, "
                         "or a checkpoint of train.py")
    inputs = network.head.in_features
    if classes is None and not (trained["bias"].dim() == 1 and len(trained["bias"])
                                and trained["weight"].shape == (len(trained["bias"]), inputs)):
        raise ValueError(f"{weights} holds a last layer that is not {arch}'s: name the network "
                         "they are of")
    network.head = nn.Linear(inputs, classes or len(trained["bias"]))
    if classes is None:
        network.head.load_state_dict(trained)
    else:
        nn.init.zeros_(network.head.weight)  # the logits begin at 0
        nn.init.zeros_(network.head.bias)
    return network


def take_apart(network, arch):
    """A torchvision classifier as a CAMNet of the same modules, checked against its own forward.

    All before the pooling becomes `features`; what comes after it must be one linear layer.
    """
    *body, (_, last) = network.named_children()
    steps = [m for m in (last if isinstance(last, nn.Sequential) else [last])
             if not isinstance(m, (nn.Dropout, nn.Flatten))]
    if len(steps) != 1 or not isinstance(steps[0], nn.Linear):
        between = ", ".join(type(m).__name__ for m in steps)
        raise ValueError(f"{arch} cannot be explained exactly: after its pooling come {between}, "
                         "where CAM needs one linear layer and nothing else; resnet18 and "
                         "mobilenet_v2 are of that shape")
    body = OrderedDict((name, m) for name, m in body
                       if not isinstance(m, (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout)))
    if isinstance(network, torchvision_models.DenseNet):
        body["relu"] = nn.ReLU()  # a line of its forward, not a module
    features = body["features"] if list(body) == ["features"] else nn.Sequential(body)
    apart = CAMNet(features, steps[0])
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():  # differences: a new network's logits can be 1e-14, beside its bias
            own, ours = (logits[0] - logits[1] for logits in (network.eval()(x), apart.eval()(x)))
        same = (own - ours).norm() <= 1e-2 * own.norm()
    except Exception:  # parts that do not even fit together: branches, tokens, fixed sizes
        same = False
    if not same:
        raise ValueError(f"{arch} cannot be explained exactly: its logits are not a linear layer "
                         "on the average of a feature map (other pooling, branches or tokens); "
                         "resnet18 and mobilenet_v2 are")
    return apart


def named_weights(weights, arch):
    """torchvision's weights of `arch` that are called so, its best "imagenet"; None: a file's."""
    named = torchvision_models.get_model_weights(arch).__members__
    return named.get("DEFAULT" if str(weights) == "imagenet" else str(weights))


def read_weights(weights, arch):
    """A state dict of `arch`: torchvision's, by its name, kept in torch's own cache, or a file's.

    What training scripts wrap around it is taken off: {"state_dict": ...}, "module." before names.
    """
    if entry := named_weights(weights, arch):
        try:
            return entry.get_state_dict(check_hash=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
            raise ValueError(f"cannot download the ImageNet weights of {arch} ({error}): fetch "
                             f"{entry.url} elsewhere and name the file with --weights (WEIGHTS=)"
                             ) from error
    if not Path(weights).exists():
        named = ", ".join(torchvision_models.get_model_weights(arch).__members__)
        raise ValueError(f"{weights} does not exist, and is no name of weights for {arch} "
                         f"(imagenet, {named}): name one with --weights")
    state = read(weights)
    if isinstance(state, dict) and state.get("format") == FORMAT:
        raise ValueError(f"{weights} is a checkpoint of this project, no file of weights: cam.py "
                         "takes it with --model, and a training goes on with its own by itself")
    wrappers = "model", "model_state_dict", "state_dict"
    while isinstance(state, dict) and (
            inner := [key for key in wrappers if isinstance(state.get(key), dict)]):
        state = state[inner[0]]
    if not (isinstance(state, dict) and state and all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided
            and not (v.is_meta or v.is_quantized or v.is_complex()) for k, v in state.items())):
        raise ValueError(f"{weights} holds no state dict: it must be a file of torchvision's "
                         f"weights for {arch}")
    return {re.sub(r"^(module\.|_orig_mod\.|model\.)+", "", k): v for k, v in state.items()}


def load_features(network, state, source, arch):
    """Load all but the last layer of a state dict with torchvision's key names."""
    *_, (last, _) = network.named_children()
    own = network.state_dict()
    # densenet's files say denselayer1.norm.1 where its modules are named denselayer1.norm1
    state = OrderedDict((re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", k), v)
                        for k, v in state.items() if not k.startswith(f"{last}."))
    state._metadata = own._metadata  # mnasnet asks for the version in it
    needed = [k for k in own
              if not k.startswith(f"{last}.") and not k.endswith(".num_batches_tracked")]
    wrong = [k for k in needed if k not in state]
    wrong += [k for k in state if k not in own or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{source} does not hold the weights of {arch} ({len(wrong)} of its "
                         f"tensors are missing, of another shape or unknown, {wrong[0]} first): "
                         "name the network they are of")
    network.load_state_dict(state, strict=False)


def fold_norms(network):
    """A copy for inference, every BatchNorm folded into the convolution before it: faster, and
    equal up to rounding. An unfolded copy where folding would change what it computes."""
    plain = copy.deepcopy(network).eval()
    folded = copy.deepcopy(plain)
    for module in list(folded.modules()):  # children stand in the order of their use
        for (name, conv), (next_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())
    same = torch.allclose(*(said_of_noise(net.features, 2) for net in (plain, folded)),
                          rtol=1e-3, atol=1e-4)
    return folded if same else plain


@torch.no_grad()
def said_of_noise(module, count=1):
    """What a module in evaluation mode says of `count` images of noise, 64 x 64, always the same:
    it shows whether two modules compute the same."""
    x = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which is too coarse
        return module(x.to(next(module.parameters()))).float().cpu()


# ---------------------------------------------------------------- checkpoints


def read(path):
    """The contents of a file of tensors and plain types. Raises ValueError; runs no code of the
    file."""
    path = Path(path)
    if not path.is_file():
        what, run = "is a folder" if path.is_dir() else "does not exist", path.parent.name
        if path.name == "best.pt":
            known = run in classifiers()
            what += f" (`make {f'finetune ARCH={run}' if known else 'train-cnn'}` makes one)"
        raise ValueError(f"{path} {what}: name a file that is there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a stranger's file fails in as many ways as there are files
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            raise ValueError(f"{path} holds a whole network or other objects, which could run "
                             "code: save its weights alone, torch.save(network.state_dict(), "
                             "...)") from error
        raise ValueError(f"{path} is no file of weights, is damaged, or holds more than tensors "
                         "and plain types: name another") from error


def looks_key(looks):
    """How a checkpoint's `accuracies` name a list of sizes: "224 320"."""
    return " ".join(map(str, looks))


def save(file, network, **facts):
    """Write a `checkpoint` of `network` into `file`, a path or an open file."""
    plain = copy.deepcopy(with_looks(network, ())).eval()  # the network stays in its mode
    torch.save(checkpoint(plain.state_dict(), of_noise=said_of_noise(plain), **facts), file)


def checkpoint(state, **facts):
    """What `load` reads. state: the state dict of a CAMNet without `Looks`; facts, in plain types:

    arch, classes (names in the order of the labels), mean, std, looks (sizes in px), accuracies
    ({`looks_key`: share}), accuracy_on ("val" or "held-out train"), accuracy_n, how (it was
    trained), settings, epoch, of_noise (`said_of_noise` of it, to tell whether the code that loads
    it computes the same).
    """
    return {"format": FORMAT, **facts, "state": state}


def load(path, device="cpu", looks=None):
    """A checkpoint of `save`: (network in evaluation mode on `device`, facts).

    looks: sizes (px) in place of its own. Feed the network images of facts["size"], the largest of
    facts["looks"]. facts["accuracy"] is that of exactly these looks, None where it was not
    measured; facts["width"] is a cnn's. Raises ValueError. """
    facts = read(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this project: train.py writes them "
                         "(runs/*/best.pt)")
    try:
        state = facts.pop("state")
        facts.setdefault("width", state["head.weight"].shape[1] // 2)  # of a cnn
        network = build(facts["arch"], len(facts["classes"]), width=facts["width"])
        network.load_state_dict(state)
        if (then := facts.pop("of_noise", None)) is not None:
            now = said_of_noise(network.eval())
            if (now - then).abs().max() > 0.01 * then.abs().max():  # devices differ by far less
                raise ValueError("the weights fit, and the network computes something else")
        facts["looks"] = sorted(looks or facts["looks"])
        facts["size"] = facts["looks"][-1]
        facts["accuracy"] = facts["accuracies"].get(looks_key(facts["looks"]))
        network = with_looks(network, facts["looks"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} says it is a {facts.get('arch')}, but its contents are not that "
                         "network's (has models.cnn changed since?): train it again, or name "
                         "another file") from error
    return network.to(device).eval(), facts
