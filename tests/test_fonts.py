"""fonts.py: letters of other alphabets in pictures."""

import shutil

import pytest
import torch
from conftest import Written, noise_photo
from PIL import ImageFont

import fonts
import page

GREEK, DOG = "Ελλάδα", "犬"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system without fonts: its folder."""
    monkeypatch.setattr(fonts, "FOLDERS", [str(tmp_path / "fonts")])
    (tmp_path / "fonts").mkdir()
    return tmp_path / "fonts"


@pytest.fixture
def sans():
    """A font with Greek letters and without Chinese ones."""
    for path in fonts.system_fonts():
        if not fonts.missing([GREEK], fonts.letters_of(path)):
            return path
    pytest.skip("no font of this system has Greek letters")


@pytest.mark.parametrize(("text", "shown"), [
    ("Bjørn", "Bjorn"), ("Strauß", "Strauss"), ("łódź", "lodz"), ("Þingvellir", "Thingvellir"),
    ("Œuvre_ætt", "OEuvre aett"), ("cafe\u0301", "cafe"), ("İstanbul ışık", "Istanbul isik"),
    ("a–b", "a-b")])
def test_latin_letters_are_spelt_in_ascii(text, shown):
    assert page.printable(text) == shown
    assert page.printable(text, page.Paper(72).has) == shown
    assert fonts.choose([text]) is None and fonts.legible([text], None) == [text]


def test_a_font_of_the_system_is_taken_where_pillows_lacks_a_letter(sans, system, monkeypatch):
    assert fonts.choose([GREEK]) is None
    (system / "broken.ttf").write_bytes(b"no font")
    shutil.copy(sans, system / "a b.ttf")
    font = fonts.choose(["abc", GREEK])
    assert font == system / "a b.ttf" and fonts.choose(["abc", "Bjørn"]) is None
    paper, photo = Written(monkeypatch), noise_photo((20, 20))
    row = page.Row("cnn", torch.ones(1, 2, 2), [GREEK + " 90%"])
    page.compose([photo], [GREEK], [row], dpi=72, font=font)
    assert {GREEK, GREEK + " 90%"} <= set(paper.texts)
    assert all(face.getname() == ImageFont.truetype(sans, 9).getname() for face in paper.fonts)


def test_a_macs_font_of_boxes_is_passed_over(sans, system):
    shutil.copy(sans, system / f"LastResort{sans.suffix}")
    assert fonts.system_fonts() == []
    shutil.copy(sans, system / f"Last{sans.suffix}")
    assert [path.stem for path in fonts.system_fonts()] == ["Last"]


def test_names_without_a_font_are_numbers_and_it_is_said(system, capsys):
    names = ["cat", DOG, "犬?", "fox?"]
    font = fonts.choose(names)
    assert font is None
    assert fonts.legible(names, font) == ["cat", "class 1", "class 2", "fox?"]
    assert "letters of 2 classes: class 1 is 犬, class 2 is 犬?; --font" in capsys.readouterr().err


def test_a_font_of_ones_own_is_taken_and_no_font_is_refused(sans, system):
    assert fonts.choose(["abc"], sans) == sans
    (system / "text.ttf").write_text("no font")
    for bad in ("text.ttf", "missing.ttf"):
        with pytest.raises(ValueError, match=f"{bad} is no font .* name a .ttf"):
            fonts.choose(["abc"], system / bad)


def test_the_confusion_picture_has_the_letters_too(sans, monkeypatch):
    paper = Written(monkeypatch)
    page.confusion_picture(torch.eye(2), [GREEK, "Bjørn"], "title", 72, sans)
    assert {GREEK, "Bjørn"} <= set(paper.texts)
