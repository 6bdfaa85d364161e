"""networks.py: checkpoints that belong together, what networks say of photos, in every type."""

import argparse
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import (
    CLASSES,
    OTHER_SHAPES,
    SIZE,
    checkpoint,
    facts_of,
    noise_photo,
    other_shape,
    untrained,
)
from torch import nn

import data
import models
import networks

FACTS = {"size": SIZE}
PHOTOS = [noise_photo((40, 50)), noise_photo((30, 20), seed=1)]


def modes(network):
    return [module.training for module in network.modules()]


# ---------------------------------------------------------------- predictions


def test_prediction_is_the_network_s_and_its_maps_explain_it():
    network = untrained("cnn").float()
    maps, logits, probabilities = networks.predict_with_maps(network, FACTS, PHOTOS)
    for i, photo in enumerate(PHOTOS):
        ((images, _),) = data.eval_batches(data.from_arrays([photo]), SIZE, 1)
        with torch.no_grad():
            assert torch.equal(logits[i : i + 1], network(images))
    assert torch.equal(probabilities, logits.softmax(1))
    assert torch.allclose(maps.mean((2, 3)) + network.head.bias, logits, atol=1e-4)


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_prediction_refuses_networks_of_another_shape(name):
    with pytest.raises(ValueError, match="miss the logits"):
        networks.predict_with_maps(other_shape(name, torch.float), FACTS, PHOTOS)


def test_a_network_that_is_training_predicts_as_if_it_were_not_and_goes_on_training():
    network = untrained("cnn").float()
    expected = networks.predict_with_maps(network, FACTS, PHOTOS)
    network.train()
    network.features[1].eval()  # as a frozen layer would be
    before = modes(network), {k: v.clone() for k, v in network.state_dict().items()}
    for given, wanted in zip(networks.predict_with_maps(network, FACTS, PHOTOS), expected,
                             strict=True):
        assert torch.equal(given, wanted)
    assert modes(network) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in network.state_dict().items())


def test_a_refused_network_goes_on_training_too():
    network = other_shape("hidden layer", torch.float).train()
    with pytest.raises(ValueError, match="miss the logits"):
        networks.predict_with_maps(network, FACTS, PHOTOS)
    assert all(modes(network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_every_float_type_say_the_same(dtype):
    expected = networks.predict_with_maps(untrained("cnn").float(), FACTS, PHOTOS)
    found = networks.predict_with_maps(untrained("cnn").to(dtype), FACTS, PHOTOS)
    precise = torch.promote_types(dtype, torch.float32)
    for given, wanted in zip(found, expected, strict=True):
        assert given.dtype == precise
        error = (given - wanted).abs().max() / (1 + wanted.abs().max())
        assert error < 8 * torch.finfo(dtype).eps + 1e-5
    assert torch.allclose(found[2].sum(1), torch.ones(2, dtype=precise))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_network_says_the_same(wrap):
    network = untrained("cnn").float()
    expected = networks.predict_with_maps(network, FACTS, PHOTOS)
    wrapped = wrap(network) if wrap is nn.DataParallel else wrap(network, backend="eager")
    for given, wanted in zip(networks.predict_with_maps(wrapped, FACTS, PHOTOS), expected,
                             strict=True):
        assert torch.allclose(given, wanted, atol=1e-5)


def test_a_head_without_bias_is_explained_as_well():
    network = untrained("cnn").float()
    network.head.bias = None
    maps, logits, _ = networks.predict_with_maps(network, FACTS, PHOTOS)
    assert torch.allclose(maps.mean((2, 3)), logits, atol=1e-4)


def test_networks_without_maps_or_probabilities_are_refused():
    network = untrained("cnn").float()
    convolution = models.CAMNet(network.features, nn.Conv2d(network.head.in_features, 10, 1))
    one_output = models.CAMNet(network.features, nn.Linear(network.head.in_features, 1))
    for given, words in ((convolution, "linear head"), (one_output, "one output"),
                         (nn.Conv2d(3, 8, 3), "a Conv2d has no maps")):
        with pytest.raises(ValueError, match=words):
            networks.predict_with_maps(given, FACTS, PHOTOS)


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_are_loaded_in_order_with_one_list_of_looks_or_one_each(tmp_path):
    first = checkpoint(tmp_path / "first.pt", seed=1)
    turned = checkpoint(tmp_path / "turned.pt", seed=2, classes=CLASSES[::-1])
    for looks, sizes in ((None, [[SIZE]] * 2), ([(32, 48)], [[32, 48]] * 2),
                         ([(48,), (32, 64)], [[48], [32, 64]])):
        loaded = networks.load_networks([first, turned], looks)
        assert [list(facts["looks"]) for _, facts in loaded] == sizes
        assert [facts["classes"][0] for _, facts in loaded] == [CLASSES[0], CLASSES[-1]]
    with pytest.raises(ValueError, match="--looks has 3 lists for 2 checkpoints"):
        networks.load_networks([first, turned], [(32,)] * 3)


def test_weights_that_explain_nothing_are_named(tmp_path):
    network = models.build("resnet18", 3)
    network.head.weight.data[1, 2] = torch.nan
    models.save(tmp_path / "nan.pt", network, **facts_of(arch="resnet18", classes=CLASSES[:3]))
    models.save(tmp_path / "one.pt", models.cnn(1), **facts_of(classes=CLASSES[:1]))
    for name, words in (("nan", "nan.pt .*NaN or infinity"), ("one", "one.pt .*one output")):
        with pytest.raises(ValueError, match=words):
            networks.load_networks([tmp_path / f"{name}.pt"])


def test_checkpoints_of_other_classes_are_refused(tmp_path):
    first = checkpoint(tmp_path / "first.pt")
    pets = checkpoint(tmp_path / "pets.pt", classes=["cat", "dog"])
    fewer = checkpoint(tmp_path / "fewer.pt", classes=CLASSES[:-1])
    with pytest.raises(ValueError, match="pets.pt knows other classes than .*first.pt .*cat, dog"):
        networks.load_networks([first, pets])
    with pytest.raises(ValueError, match=f"without {CLASSES[-1]}, but with none"):
        networks.load_networks([first, fewer])


def test_looks_that_a_network_cannot_take_are_refused(tmp_path):
    models.save(tmp_path / "dense.pt", models.build("densenet121"), **facts_of(arch="densenet121"))
    with pytest.raises(ValueError, match="dense.pt cannot look at 16 x 16 px: .* --looks"):
        networks.load_networks([tmp_path / "dense.pt"], [(16, 64)])


def test_checkpoints_that_do_not_say_how_they_were_trained_are_refused(tmp_path):
    facts = facts_of()
    del facts["how"]
    models.save(tmp_path / "strange.pt", models.cnn(), **facts)
    with pytest.raises(ValueError, match="strange.pt does not say how it was trained"):
        networks.load_networks([tmp_path / "strange.pt"])


def test_looks_are_parsed_by_the_command_line(capsys):
    parser = argparse.ArgumentParser()
    networks.add_looks_option(parser)
    looks = parser.parse_args(["--looks", "320,224", "64"]).looks
    assert looks == [(224, 320), (64,)] and parser.parse_args([]).looks is None
    for bad in ("a", "32,", "32,32", "99999", "0", ""):
        with pytest.raises(SystemExit):
            parser.parse_args(["--looks", bad])
        assert "--looks" in capsys.readouterr().err


def test_caption_of_a_network_says_only_what_is_known():
    facts = facts_of(accuracy=0.8751, accuracy_n=3925)
    line = f"cnn, trained from scratch, at {SIZE} px: right on 87.5% of 3,925 val photos"
    assert networks.describe(facts) == line
    facts |= dict(accuracy_on="held-out train", looks=[64, 96])
    line = "at 64, 96 px: right on 87.5% of 3,925 held-out train photos"
    assert networks.describe(facts).endswith(line)
    line = ": right on 87.5% of held-out train"
    assert networks.describe(facts | dict(accuracy_n=None)).endswith(line)
    unknown = facts | dict(accuracy=None, accuracies={})
    assert networks.describe(unknown).endswith(": accuracy not measured")
    of_another_look = unknown | dict(accuracies={"224": 0.5})
    assert networks.describe(of_another_look).endswith(
        "at 64, 96 px: right on 50.0% of 3,925 held-out train photos at 224 px")


# ---------------------------------------------------------------- torchvision's networks, by name


def imagenet_file(path, arch="mnasnet0_5", classes=1000, seed=0):
    """A file of torchvision's weights, the last layer with them, as its user would save it."""
    torch.manual_seed(seed)
    network = torchvision.models.get_model(arch, num_classes=classes)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    torch.save(network.state_dict(), path)
    return network.eval()


def torchvisions_own(network, photo, size):
    """The logits of a network of torchvision's for a whole photo at `size`."""
    ((images, _),) = data.eval_batches(data.from_arrays([photo]), size, 1)
    with torch.no_grad():
        return network(images)


@pytest.mark.parametrize("arch", ["mnasnet0_5", "mobilenet_v2", "densenet121", "regnet_y_400mf"])
def test_a_network_of_torchvisions_says_what_torchvision_says(tmp_path, arch, capsys):
    own = imagenet_file(tmp_path / "file.pth", arch)
    ((network, facts),) = networks.load_networks([arch], weights=[tmp_path / "file.pth"])
    assert "file.pth: its 1,000 classes are called as ImageNet's" in capsys.readouterr().err
    assert facts["classes"][:2] == ["tench", "goldfish"] and len(facts["classes"]) == 1000
    assert facts["looks"] == [224] and facts["size"] == 224
    assert networks.describe(facts) == (f"{arch}, weights of file.pth, at 224 px: accuracy not "
                                        "measured")
    maps, logits, _ = networks.predict_with_maps(network, facts, PHOTOS[:1])
    expected = torchvisions_own(own, PHOTOS[0], 224)
    assert torch.allclose(logits, expected, atol=1e-5 * float(1 + expected.abs().max()))
    assert torch.allclose(maps.mean((2, 3)) + network.head.bias, logits, atol=1e-3)


def test_imagenets_weights_are_torchvisions_best_or_those_named(tmp_path, monkeypatch):
    own, asked = imagenet_file(tmp_path / "file.pth"), []
    entry = torchvision.models.get_model_weights("mnasnet0_5")

    def download(weights, **_):
        asked.append(weights.name)
        return torch.load(tmp_path / "file.pth", weights_only=True)

    monkeypatch.setattr(entry, "get_state_dict", download)
    for weights in (None, [Path("IMAGENET1K_V1")], [Path("imagenet")], [Path("DEFAULT")]):
        ((network, facts),) = networks.load_networks([Path("mnasnet0_5")], weights=weights)
        assert facts["how"] == "torchvision's IMAGENET1K_V1" and facts["classes"][0] == "tench"
        _, logits, _ = networks.predict_with_maps(network, facts, PHOTOS[:1])
        assert torch.allclose(logits, torchvisions_own(own, PHOTOS[0], 224), atol=1e-4)
    assert asked == ["IMAGENET1K_V1"] * 4


def test_a_network_sees_images_as_torchvision_normalises_them():
    facts = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}  # efficientnet_v2_l's are 0.5
    pixels = torch.rand(2, 3, 4, 4)
    ours, theirs = ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
                    for mean, std in ((data.MEAN, data.STD), facts.values()))
    assert torch.allclose(networks.normalised(ours, facts), theirs, atol=1e-5)
    assert networks.normalised(ours, {"mean": list(data.MEAN), "std": data.STD}) is ours


def test_classes_of_a_file_are_called_by_a_file_or_by_numbers(tmp_path):
    imagenet_file(tmp_path / "file.pth", classes=3)

    def classes(names=None):
        ((_, facts),) = networks.load_networks(["mnasnet0_5"], weights=[tmp_path / "file.pth"],
                                               names=names)
        return facts["classes"]

    assert classes() == ["class 0", "class 1", "class 2"]
    names = tmp_path / "names.txt"
    names.write_text("\ufeffcafe\u0301\nBj\u00f8rn\r\n\ntea \n", encoding="utf-8")
    assert classes(names) == ["caf\u00e9", "Bj\u00f8rn", "tea"]
    names.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="names.txt names 2 classes, and .*file.pth has 3"):
        classes(names)
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="names.txt is no text in UTF-8"):
        classes(names)


def test_weights_and_names_are_for_networks_by_name(tmp_path, monkeypatch):
    one = checkpoint(tmp_path / "best.pt")
    for given in ({"weights": ["a.pth"]}, {"names": tmp_path / "names.txt"}):
        with pytest.raises(ValueError, match="are for networks of torchvision's, and 0 are named"):
            networks.load_networks([one], **given)
    with pytest.raises(ValueError, match="1 are named"):
        networks.load_networks(["resnet18"], weights=["a.pth", "b.pth"])
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "resnet18")  # a file of that name goes first
    assert networks.load_networks(["resnet18"])[0][1]["arch"] == "cnn"
    with pytest.raises(ValueError, match="vgg11 cannot be explained exactly"):
        networks.load_networks(["vgg11"])


def test_a_class_is_asked_for_by_name_or_number():
    classes = ["tench", "caf\u00e9", "crane", "crane", "7", "Golf ball", "golf ball"]
    for asked, k in (("tench", 0), ("cafe\u0301", 1), ("CAF\u00c9", 1), ("7", 4), ("3", 3),
                     ("golf ball", 6), ("Golf ball", 5)):
        assert networks.class_index(asked, classes) == k
    with pytest.raises(ValueError, match="'crane' is the name of classes 2, 3: say a number"):
        networks.class_index("crane", classes)
    with pytest.raises(ValueError, match="no class '8': the networks know tench, "):
        networks.class_index("8", classes)
    many = [f"class {k}" for k in range(999)] + ["golf ball"]
    with pytest.raises(ValueError, match=r"no class 'golfball': the networks know golf ball, \.\."):
        networks.class_index("golfball", many)


def test_images_are_made_where_the_network_is(monkeypatch):
    """So that an MPS device gets them contiguous (`data.resample`)."""
    class Asked(Exception):
        pass

    def batches(photos, *_):
        raise Asked(photos.device)

    network = models.cnn(width=16).to("meta")
    monkeypatch.setattr(data, "eval_batches", batches)
    with pytest.raises(Asked, match="meta"):
        networks.predict_with_maps(network, {"size": 32}, PHOTOS[:1])


def test_networks_go_to_the_device_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(str(device)) or self)
    moved = []
    imagenet_file(tmp_path / "file.pth")
    networks.load_networks(["mnasnet0_5"], device="mps", weights=[tmp_path / "file.pth"])
    networks.load_networks([checkpoint(tmp_path / "best.pt")], device="mps")
    assert moved == ["mps", "mps"]
