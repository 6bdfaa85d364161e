"""models.py against torchvision's own networks, and the identity of map and logit."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, import_alone
from torch import nn
from torchvision import models as torchvision_models

import models

NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121",
            "regnet_y_400mf", "shufflenet_v2_x1_0", "mnasnet0_5", "swin_t"]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


@torch.no_grad()
def awake(network):
    """A network whose normalisations have seen images, as a trained one's have, in evaluation mode.

    A fresh one answers 1e-14 to everything (efficientnet_b0): there nothing equals nothing.
    """
    generator = torch.Generator().manual_seed(1)
    network.eval()
    for norm in norms(network):
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(0, 0.2, generator=generator)
        norm.momentum = 1.0  # the statistics of one batch, whole
        norm.train()
    network(noise(4, 3, 64, 64, seed=2))
    for norm in norms(network):
        norm.momentum = 0.1
    return network.eval()


def with_random_head(network, classes=10, seed=3):
    """The last layer of a new network is zero, and so would be both sides of any equation."""
    head = nn.Linear(network.head.in_features, classes)
    head.weight.data = noise(*head.weight.shape, seed=seed)
    head.bias.data = noise(classes, seed=seed + 1)
    return models.CAMNet(network.features, head.to(network.head.weight.dtype))


def close(a, b, tolerance):
    """Equal up to `tolerance` of the standard deviation of `b`: a common mean is no merit."""
    return float((a - b).abs().max()) <= tolerance * float(b.std())


def original(arch):
    torch.manual_seed(0)
    return awake(torchvision_models.get_model(arch, weights=None))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """(arch, torchvision's network of that name, the same taken apart): one at a time in memory,
    for reading only."""
    network = original(request.param)
    return request.param, network, models.take_apart(copy.deepcopy(network), request.param)


@pytest.fixture(scope="module")
def resnet18():
    return original("resnet18")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A computer without network, where torchvision has not downloaded anything yet."""

    def fail(url, *_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a CNN that is not fresh, with the facts that train.py writes: (path, network,
    facts)."""
    torch.manual_seed(0)
    network, path = awake(models.cnn(3)), tmp_path / "best.pt"
    facts = {"arch": "cnn", "classes": ["tench", "church", "parachute"], "mean": [0.4, 0.5, 0.6],
             "std": [0.2] * 3, "looks": [160], "accuracies": {"160": 0.75}, "epoch": 2,
             "settings": {"epochs": 3, "weights": None}}
    models.save(path, network, **facts)
    return path, network, facts


def refused(words, call, *arguments):
    """Whether the call ends in a ValueError of one line that has all these words."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    text = str(error.value)
    assert all(str(word) in text for word in words) and "\n" not in text, text
    return True


# ---------------------------------------------------------------- the contract


@torch.no_grad()
def logits_are_the_mean_of_the_maps(network, dtype):
    network = with_random_head(copy.deepcopy(network)).to(dtype)
    x, tolerance = noise(2, 3, 64, 100, dtype=dtype), 1e-10 if dtype == torch.float64 else 1e-4
    features = network.features(x)
    maps = torch.einsum("kc,nchw->nkhw", network.head.weight, features)  # (N, K, h, w), logits
    assert maps.shape[:2] == (2, 10) and maps.shape[2] < maps.shape[3] and maps.std() > 1e-3
    return close(maps.mean((2, 3)) + network.head.bias, network(x), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_the_mean_of_the_maps(network, dtype):
    assert logits_are_the_mean_of_the_maps(network[2], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_the_cnn_are_the_mean_of_its_maps(dtype):
    assert logits_are_the_mean_of_the_maps(awake(models.cnn()), dtype)


# ---------------------------------------------------------------- the CNN


def test_the_cnn_is_small():
    parameters = sum(p.numel() for p in models.cnn().parameters())
    assert parameters <= 3_100_000
    assert f"{parameters / 1e6:.1f} million parameters" in models.cnn.__doc__


@pytest.mark.parametrize(("height", "width"), [
    (64, 64), (128, 128), (160, 160), (160, 213), (120, 72)])
def test_the_map_of_the_cnn_is_an_eighth_of_the_photo(height, width):
    with torch.no_grad():
        features = models.cnn().eval().features(noise(1, 3, height, width))
    assert features.shape[2:] == (height // 8, width // 8)


@pytest.mark.parametrize("size", [63, 65, 97, 161])
def test_the_map_of_the_cnn_is_never_coarser_than_a_sixteenth(size):
    with torch.no_grad():
        assert models.cnn().eval().features(noise(1, 3, size, size)).shape[2] >= size / 16


def test_a_cell_of_the_map_lies_where_its_pixels_are():
    """The pixels that a cell sees have their centre in the middle of the 8 x 8 pixels that it is
    drawn over."""
    network = models.cnn().double().eval()
    for m in network.features.modules():
        if isinstance(m, nn.Conv2d):
            # Every pixel counts, and none is cut off by a ReLU.
            nn.init.constant_(m.weight, 1 / m.weight[0].numel())
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
    x = torch.ones(1, 3, 240, 240, dtype=torch.float64, requires_grad=True)
    network.features(x)[0, 0, 15, 14].backward()
    weight = x.grad[0].sum(0)
    centre = [float((weight.sum(1 - d) * torch.arange(240)).sum() / weight.sum())
              for d in (0, 1)]
    assert centre == pytest.approx([8 * 15 + 3.5, 8 * 14 + 3.5], abs=1e-6)


def test_whitened_filters_answer_uncorrelated_with_equal_variance_and_are_frozen():
    images = F.avg_pool2d(noise(16, 3, 69, 69), 6, 1)  # smooth
    network = models.cnn()
    models.whiten(network, images, eps=1e-6)
    conv = network.features[0][0]
    answers = F.conv2d(images, conv.weight, stride=conv.stride)
    answers = answers.transpose(0, 1).flatten(1)  # (C, N * places)
    half = len(answers) // 2
    assert torch.equal(conv.weight[half:], -conv.weight[:half])
    assert torch.allclose(torch.cov(answers[:half]), torch.eye(half), atol=1e-2)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ["features.0.0.weight"]


@pytest.mark.parametrize("first", [
    nn.Conv2d(3, 8, 3), nn.Conv2d(3, 9, 3, bias=False), nn.Conv2d(3, 56, 3, bias=False),
    nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.Conv2d(3, 8, 33, bias=False),
    nn.Conv2d(3, 8, 17, dilation=2, bias=False), nn.Identity()],
    ids=["bias", "odd", "too many", "groups", "too large", "too wide", "no convolution"])
def test_a_first_layer_that_whitening_does_not_fit_stays_as_it_is(first):
    network = models.CAMNet(nn.Sequential(first), nn.Linear(3, 10))
    before = copy.deepcopy(network.state_dict())
    models.whiten(network, noise(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("first", [
    nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 96, (2, 8), bias=False),
    nn.Conv2d(3, 8, 5, stride=3, padding="valid", dilation=2, bias=False)])
def test_a_first_layer_of_another_size_is_whitened_wherever_it_stands(first):
    network = models.CAMNet(nn.Sequential(nn.Identity(), nn.Sequential(first)), nn.Linear(3, 10))
    images = F.avg_pool2d(noise(64, 3, 37, 37), 6, 1)
    models.whiten(network, images, eps=1e-6)
    with torch.no_grad():
        answers = first(images).transpose(0, 1).flatten(1)
    half = len(answers) // 2
    assert torch.allclose(torch.cov(answers[:half]).diag(), torch.ones(half), atol=0.05)
    assert not first.weight.requires_grad


def test_the_cnn_takes_any_number_of_classes_and_no_weights():
    assert models.build("cnn", 7).head.out_features == 7
    assert refused(["from scratch", "WEIGHTS="], models.build, "cnn", 10, "imagenet")
    assert refused(["cnn", "no trained last layer"], models.build, "cnn", None)


# ---------------------------------------------------------------- torchvision's networks


def test_a_network_taken_apart_answers_as_torchvisions(network):
    """On another size, another shape and other numbers than those that take_apart looks at."""
    _, network, apart = network
    x = noise(3, 3, 101, 140, seed=5)
    with torch.no_grad():
        logits, ours = network(x), apart(x)
        assert close(ours - ours[:1], logits - logits[:1], 1e-4)  # and in how images differ
        assert close(ours, logits, 1e-4) and logits.std(0).min() > 1e-5 * logits.std()


def test_torchvisions_weights_load_and_are_used(network, tmp_path):
    arch, network, apart = network
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    x = noise(2, 3, 64, 96)
    built = models.build(arch, 10, str(tmp_path / "weights.pth")).eval()
    with torch.no_grad():
        assert torch.equal(built.features(x), apart.features(x))
        assert built.features(x).std() > 1e-3
        assert torch.equal(built(x), torch.zeros(2, 10))  # a new last layer begins at zero
    assert all(p.requires_grad for p in built.parameters())


def test_features_alone_load(tmp_path):
    network = original("mobilenet_v2")
    state = {k: v for k, v in network.state_dict().items() if k.startswith("features.")}
    assert len(state) == 312
    torch.save(state, tmp_path / "features.pth")
    x = noise(2, 3, 64, 96)
    with torch.no_grad():
        built = models.build("mobilenet_v2", 10, tmp_path / "features.pth").eval()
        assert torch.equal(built.features(x), network.features(x))


def old_densenet(key):
    """The names in torchvision's own densenet files: denselayer1.norm.1.weight."""
    *start, module, name = key.split(".")
    dotted = "denselayer" in key and module[:-1] in ("norm", "conv")
    return ".".join([*start, module[:-1], module[-1], name] if dotted else [*start, module, name])


@pytest.mark.parametrize("arch, rename", [("resnet18", str), ("densenet121", old_densenet)])
def test_weights_of_the_years_before_batches_were_counted_load(arch, rename, tmp_path):
    """As torchvision loads them: several of its files are older than `num_batches_tracked`."""
    network = original(arch)
    state = OrderedDict((rename(k), v) for k, v in network.state_dict().items()
                        if "num_batches" not in k)
    torch.save(state, tmp_path / "old.pth")
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        built = models.build(arch, 10, tmp_path / "old.pth").eval()
        assert torch.equal(built.features(x), models.take_apart(network, arch).features(x))


REFUSED = {  # and the reason that the sentence must give
    "alexnet": "ReLU",
    "vgg11": "ReLU",
    "convnext_tiny": "LayerNorm2d",
    "mobilenet_v3_small": "Hardswish",
    "squeezenet1_1": "Conv2d",
    "vit_b_16": "tokens",
    "googlenet": "branches",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of googlenet's initialisation
@pytest.mark.parametrize("arch", REFUSED)
def test_networks_that_cam_is_not_exact_for_are_refused(arch):
    assert refused([arch, "cannot be explained exactly", REFUSED[arch]], models.build, arch)


@pytest.mark.parametrize("arch", [
    "resnet19", "", "fcn_resnet50", "fasterrcnn_resnet50_fpn", "../resnet18"])
def test_names_of_no_classifier_are_refused(arch, no_network):
    """Those of torchvision's detectors and segmenters too, which would begin with a download."""
    assert refused([repr(arch), "resnet18"], models.build, arch)


class Pooled(nn.Module):
    """A network that looks like one of the CAM shape, but for what it does between its features and
    its last layer."""

    def __init__(self, pool, scale):
        super().__init__()
        self.features, self.fc, self.pool = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Linear(8, 5), pool
        for p in self.parameters():
            p.data = scale * noise(*p.shape)
        self.fc.bias.data.zero_()

    def forward(self, x):
        return self.fc(self.pool(self.features(x)))


@pytest.mark.parametrize("scale", [1, 1e-4])  # logits of 10, and of 1e-7: no fixed tolerance
def test_the_pooling_is_proved_to_be_the_average(scale):
    assert models.take_apart(Pooled(lambda f: f.mean((2, 3)), scale), "average")
    for pool in (lambda f: f.amax((2, 3)), lambda f: f.square().mean((2, 3)),
                 lambda f: f[:, :, 1:].mean((2, 3))):
        network = Pooled(pool, scale)
        assert refused(["cannot be explained exactly"], models.take_apart, network, "other")


def without(state, name):
    return OrderedDict((k, v) for k, v in state.items() if k != name)


WRONG_WEIGHTS = {  # what is in the file in place of resnet18's, and a word of the sentence
    "of another network": (
        lambda s: torchvision_models.mobilenet_v2(weights=None).state_dict(), "resnet18"),
    "of a deeper one": (lambda s: torchvision_models.resnet34(weights=None).state_dict(), "layer"),
    "of another shape": (
        lambda s: {**s, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "conv1.weight"),
    "one missing": (lambda s: without(s, "layer2.0.bn1.running_var"), "layer2.0.bn1.running_var"),
    "one too many": (lambda s: {**s, "layer5.weight": torch.zeros(1)}, "layer5.weight"),
    "empty": (lambda s: {}, "no state dict"),
    "inside something": (lambda s: {"epoch": 3, "weights": s}, "no state dict"),
    "wrapped around nothing": (lambda s: {"epoch": 3, "state_dict": None}, "no state dict"),
    "of another network, wrapped": (
        lambda s: {"model": {f"module.{k}": v for k, v in without(s, "conv1.weight").items()}},
        "conv1.weight"),
    "without names": (lambda s: dict(enumerate(s.values())), "no state dict"),
    "a list": (lambda s: list(s.values()), "no state dict"),
    "a tensor": (lambda s: torch.zeros(3), "no state dict"),
    "without data": (lambda s: {k: v.to("meta") for k, v in s.items()}, "no state dict"),
    "complex": (lambda s: {k: v.to(torch.complex64) for k, v in s.items()}, "no state dict"),
}


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(resnet18, what, tmp_path):
    contents, word = WRONG_WEIGHTS[what]
    torch.save(contents(resnet18.state_dict()), tmp_path / "weights.pth")
    path = tmp_path / "weights.pth"
    assert refused([path, word], models.build, "resnet18", 10, path)


WRAPPED = {  # as training scripts save them
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "model": lambda s: {"model": s, "args": {"lr": 0.1}},
    "parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "all of it": lambda s: {
        "model": {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}}},
}


@pytest.mark.parametrize("what", WRAPPED)
@pytest.mark.parametrize("arch", ["resnet18", "mnasnet0_5"])
def test_what_training_scripts_wrap_around_weights_is_taken_off(arch, what, tmp_path):
    network, x = original(arch), noise(2, 3, 64, 64)
    torch.save(WRAPPED[what](network.state_dict()), tmp_path / "weights.pth")
    built = models.build(arch, None, tmp_path / "weights.pth").eval()
    with torch.no_grad():
        assert close(built(x), network(x), 1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "densenet121"])
def test_without_a_number_of_classes_the_trained_head_stays(arch, tmp_path):
    network, x = original(arch), noise(2, 3, 64, 64)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    built = models.build(arch, None, tmp_path / "weights.pth").eval()
    with torch.no_grad():
        assert built.head.out_features == 1000 and close(built(x), network(x), 1e-4)
    *_, (last, _) = network.named_children()
    features = {k: v for k, v in network.state_dict().items() if not k.startswith(f"{last}.")}
    torch.save(features, tmp_path / "features.pth")
    words = ["features.pth", "no trained last layer"]
    assert refused(words, models.build, arch, None, tmp_path / "features.pth")
    assert refused([arch, "no trained last layer"], models.build, arch, None)


def test_a_network_saved_as_a_whole_is_explained(resnet18, tmp_path):
    torch.save(resnet18, tmp_path / "whole.pth")
    words = [tmp_path / "whole.pth", "whole network", "torch.save(network.state_dict()"]
    assert refused(words, models.build, "resnet18", 10, tmp_path / "whole.pth")
    assert refused(words, models.load, tmp_path / "whole.pth")


def test_missing_weights_are_refused(tmp_path):
    path = tmp_path / "none.pth"
    assert refused([path, "does not exist"], models.build, "resnet18", 10, path)


def test_imagenet_without_network_names_the_file_to_fetch(no_network):
    url = torchvision_models.ResNet18_Weights.DEFAULT.url
    assert refused([url, "WEIGHTS=", "resnet18"], models.build, "resnet18", 10, "imagenet")


def test_a_network_that_is_refused_is_not_downloaded_first(monkeypatch):
    monkeypatch.setattr(models, "read_weights", lambda *things: pytest.fail("download"))
    words = ["cannot be explained exactly"]
    assert refused(words, models.build, "mobilenet_v3_small", 10, "imagenet")


@pytest.mark.parametrize("weights", ["imagenet", "IMAGENET1K_V1", "DEFAULT"])
def test_imagenet_takes_what_torchvision_has_downloaded(no_network, resnet18, weights):
    no_network.mkdir(parents=True)
    name = torchvision_models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    torch.save(resnet18.state_dict(), no_network / name)
    x = noise(1, 3, 64, 64)
    with torch.no_grad():
        features = models.take_apart(copy.deepcopy(resnet18), "resnet18").features(x)
        assert torch.equal(models.build("resnet18", 10, weights).eval().features(x), features)


def test_older_weights_of_torchvision_have_a_name_of_their_own(no_network):
    old = torchvision_models.ResNet50_Weights.IMAGENET1K_V1.url
    assert old != torchvision_models.ResNet50_Weights.DEFAULT.url
    assert refused([old, "WEIGHTS="], models.build, "resnet50", 10, "IMAGENET1K_V1")
    words = ["IMAGENET1K_V2 does not exist"]  # resnet18 has none
    assert refused(words, models.build, "resnet18", 10, "IMAGENET1K_V2")


# ---------------------------------------------------------------- normalisations folded


@pytest.mark.parametrize(("arch", "left"), [
    ("cnn", 0), ("resnet18", 0), ("mobilenet_v2", 0), ("densenet121", 62)])
def test_folded_is_equal_and_the_original_untouched(arch, left):
    """left: 62 of densenet121's 121 normalisations follow a concatenation, and stay."""
    torch.manual_seed(0)
    network = with_random_head(awake(models.build(arch))).train()
    before, x = copy.deepcopy(network.state_dict()), noise(2, 3, 96, 72, seed=6)
    folded = models.fold_norms(network)
    assert network.training and network.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert len(norms(folded)) == left < len(norms(network)) and not folded.training
    network.eval()
    with torch.no_grad():
        features, logits = network.features(x), network(x)
        assert close(folded(x), logits, 1e-4)
        assert (folded.features(x) - features).norm() <= 1e-4 * features.norm()


def test_what_cannot_be_folded_stays_as_it_is():
    class NormFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.norm(x))

    network = awake(models.CAMNet(NormFirst(), nn.Linear(3, 2)))
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(models.fold_norms(network)(x), network(x))


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_as_it_was(checkpoint):
    path, network, facts = checkpoint
    loaded, read = models.load(path)
    assert {k: read[k] for k in facts} == facts and not loaded.training
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.state_dict().items())
    x = noise(2, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))


def test_a_checkpoint_of_torchvisions_network_comes_back(resnet18, tmp_path):
    network = with_random_head(models.take_apart(copy.deepcopy(resnet18), "resnet18"), 4)
    models.save(tmp_path / "best.pt", network, arch="resnet18", classes=list("abcd"), looks=[80],
                accuracies={})
    x = noise(2, 3, 64, 80)
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "best.pt")[0](x), network(x))


def test_a_checkpoint_holds_plain_types_only(checkpoint):
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (str, int, float, bool, torch.Tensor)

    assert plain(torch.load(checkpoint[0], weights_only=True))


class Command:
    """Unpickled by the unwary, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo > {self.marker}",)


@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, kind):
    path, marker = tmp_path / "best.pt", tmp_path / "marker"
    trap = {"format": "camnet-1", "arch": "cnn", "classes": ["a"], "state": Command(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap, 2))
    else:
        torch.save(trap, path)
    assert refused([path], models.load, path)
    assert refused([path], models.build, "resnet18", 10, path)
    assert not marker.exists()
    pickle.loads(path.read_bytes()) if kind == "pickle" else torch.load(path, weights_only=False)
    assert marker.exists()  # it was a trap indeed


GARBAGE = {
    "empty": lambda raw: b"",
    "text": lambda raw: b"hello",
    "zeros": lambda raw: bytes(1000),
    "pickle": lambda raw: pickle.dumps({"format": "camnet-1"}, 2),
    "one byte": lambda raw: raw[:1],
    "truncated": lambda raw: raw[: len(raw) // 2],
    "without its last byte": lambda raw: raw[:-1],
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_damaged_file_is_refused(checkpoint, what):
    path, *_ = checkpoint
    path.write_bytes(GARBAGE[what](path.read_bytes()))
    assert refused([path], models.load, path)
    assert refused([path], models.build, "resnet18", 10, path)


NONE_OF_OURS = "no checkpoint of this project"
FOREIGN = {  # from the contents of a good checkpoint, and a word of the sentence
    "a list": (lambda c: [c], NONE_OF_OURS),
    "a tensor": (lambda c: torch.zeros(3), NONE_OF_OURS),
    "a state dict": (lambda c: c["state"], NONE_OF_OURS),
    "of another program": (lambda c: {"epoch": 1, "state_dict": c["state"]}, NONE_OF_OURS),
    "another architecture": (lambda c: {**c, "arch": "resnet18"}, "says it is a resnet18"),
    "an unknown one": (lambda c: {**c, "arch": "resnet19"}, "resnet19"),
    "no name of one": (lambda c: {**c, "arch": None}, ""),
    "fewer classes": (lambda c: {**c, "classes": ["tench", "church"]}, "says it is a cnn"),
    "more classes": (lambda c: {**c, "classes": list("abcdefghij")}, "says it is a cnn"),
    "no classes": (lambda c: without(c, "classes"), "says it is a cnn"),
    "no weights": (lambda c: without(c, "state"), "says it is a cnn"),
    "weights missing": (
        lambda c: {**c, "state": without(c["state"], "head.bias")}, "says it is a cnn"),
    "weights without names": (lambda c: {**c, "state": {0: torch.zeros(3)}}, "says it is a cnn"),
    "no looks": (lambda c: {**c, "looks": []}, "says it is a cnn"),
    "looks left out": (lambda c: without(c, "looks"), "says it is a cnn"),
    "looks of another kind": (lambda c: {**c, "looks": None}, "says it is a cnn"),
    "accuracies of another kind": (lambda c: {**c, "accuracies": None}, "says it is a cnn"),
    "weights of another kind": (lambda c: {**c, "state": [1, 2]}, "says it is a cnn"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_file_is_refused(checkpoint, what):
    path, *_ = checkpoint
    change, word = FOREIGN[what]
    torch.save(change(torch.load(path, weights_only=True)), path)
    assert refused([word], models.load, path)


def test_a_checkpoint_of_other_code_is_refused(checkpoint, monkeypatch):
    """The weights fit, and the network computes something else."""
    path, *_ = checkpoint
    monkeypatch.setattr(nn, "ReLU", nn.SiLU)
    assert refused([path, "says it is a cnn", "has models.cnn changed"], models.load, path)
    older = without(torch.load(path, weights_only=True), "of_noise")
    torch.save(older, path)
    models.load(path)


@pytest.mark.parametrize("place", ["none.pt", "."])
def test_a_missing_checkpoint_is_refused(tmp_path, place):
    assert refused([tmp_path / place], models.load, tmp_path / place)


@pytest.mark.parametrize(("run", "command"), [
    ("cnn", "`make train-cnn`"), ("resnet18", "`make finetune ARCH=resnet18`")])
def test_a_missing_checkpoint_advises_the_command_that_makes_it(tmp_path, run, command):
    assert refused([command], models.load, tmp_path / "runs" / run / "best.pt")


# ---------------------------------------------------------------- the file alone


ALONE = import_alone("models") + """
files = os.listdir()
models.save("best.pt", models.cnn(2), arch="cnn", classes=["a", "b"], looks=[48], accuracies={})
logits = models.load("best.pt")[0](torch.zeros(1, 3, 32, 48))
print(json.dumps([models.__file__, sorted(project), files, list(logits.shape)]))
"""


def test_the_file_works_alone(tmp_path):
    shutil.copy(REPO / "models.py", tmp_path)
    alone = subprocess.run([sys.executable, "-I", "-B", "-c", ALONE], cwd=tmp_path, text=True,
                           capture_output=True)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout) == [str(tmp_path / "models.py"), [], ["models.py"], [1, 2]]


# ---------------------------------------------------------------- several looks


@pytest.mark.parametrize("arch", ["cnn", "resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_several_looks_keep_the_identity(arch):
    torch.manual_seed(0)
    plain = models.build(arch).double().eval()
    network = models.with_looks(plain, [64, 96, 128])
    x = torch.randn(2, 3, 128, 100, dtype=torch.double)
    # Random features can be tiny:
    torch.nn.init.normal_(plain.head.weight).div_(network.features(x).std())
    features, logits = network.features(x), network(x)
    maps = torch.einsum("kc,nchw->nkhw", network.head.weight, features)
    assert (maps.mean((2, 3)) + network.head.bias - logits).abs().max() < 1e-10
    assert logits.abs().max() > 1e-3


@torch.no_grad()
def test_looks_are_averaged_on_the_finest_of_their_maps():
    plain = models.cnn().eval()
    network, x = models.with_looks(plain, [32, 64]), torch.randn(2, 3, 64, 64)
    small = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    small = F.interpolate(plain.features(small), (8, 8), mode="bilinear")
    assert torch.allclose(network.features(x), (small + plain.features(x)) / 2, atol=1e-6)


def test_one_look_is_the_plain_network_and_looks_are_replaced_not_nested():
    plain = models.cnn()
    several = models.with_looks(plain, [64, 32])
    assert models.with_looks(plain, [64]).features is plain.features
    assert models.with_looks(several, [96, 32]).features.features is plain.features
    assert several.features.sizes == (32, 64)


@torch.no_grad()
def test_a_checkpoint_remembers_its_looks_and_takes_others(tmp_path):
    path, network = tmp_path / "best.pt", models.with_looks(models.cnn(3), [32, 64])
    accuracies = {"32 64": 0.5, "32": 0.25}
    models.save(path, network, arch="cnn", classes=["a", "b", "c"], looks=[32, 64],
                accuracies=accuracies)
    x = torch.randn(1, 3, 64, 64)
    again, facts = models.load(path)
    assert torch.equal(again(x), network.eval()(x))
    assert (facts["looks"], facts["size"], facts["accuracy"]) == ([32, 64], 64, 0.5)
    again, facts = models.load(path, looks=[32])
    assert torch.equal(again(x), models.with_looks(network, [32])(x))
    assert (facts["looks"], facts["size"], facts["accuracy"]) == ([32], 32, 0.25)
    assert models.load(path, looks=[64, 128])[1]["accuracy"] is None  # was never measured


def test_norms_are_folded_under_looks_too():
    network = models.with_looks(models.build("resnet18").eval(), [64, 96])
    folded, x = models.fold_norms(network), torch.randn(1, 3, 96, 96)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        assert torch.allclose(folded.features(x), network.features(x), atol=1e-3)


@pytest.mark.parametrize(("weight", "bias"), [
    (torch.zeros(10, 256), torch.zeros(10)), (torch.zeros(10, 512), torch.zeros(9)),
    (torch.zeros(10, 512), torch.tensor(0.0)), (torch.zeros(0, 512), torch.zeros(0))])
def test_a_last_layer_of_another_shape_is_refused(tmp_path, weight, bias):
    state = torchvision_models.resnet18().state_dict() | {"fc.weight": weight, "fc.bias": bias}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth holds a last layer that is not resnet18's"):
        models.build("resnet18", None, tmp_path / "odd.pth")


def test_weights_in_other_wrappers_are_taken_and_checkpoints_named(tmp_path):
    own = torchvision_models.resnet18().state_dict()
    lightning = {"state_dict": {f"model.{name}": tensor for name, tensor in own.items()}}
    for wrapped in ({"model_state_dict": own, "epoch": 3}, lightning,
                    {"model": "resnet18", "state_dict": own}):
        torch.save(wrapped, tmp_path / "file.pth")
        network = models.build("resnet18", weights=tmp_path / "file.pth")
        assert torch.equal(network.features.conv1.weight, own["conv1.weight"])
    models.save(tmp_path / "best.pt", models.cnn())
    with pytest.raises(ValueError, match="best.pt is a checkpoint of this project.*--model"):
        models.build("resnet18", weights=tmp_path / "best.pt")
