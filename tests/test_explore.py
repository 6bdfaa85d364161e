"""The page to look into: what explore.py writes and, in a headless Chromium, what the page says."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import demo as drawing
import numpy as np
import pytest
import torch
from PIL import Image

import cam
import explore

NAMES = ["tench", "</script><b>bold</b>", "golf ball", "gas pump <!--", "{{DATA}}", "naïve & “so”"]


def network(label, rows, columns, classes=NAMES, seed=0, about=""):
    """Random smooth maps that add up to their logits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(len(classes), 3, 3, generator=generator)
    maps = 5 * cam.upsample(coarse, (rows, columns)) + coarse[:, :1, :1]
    bias = torch.randn(len(classes), generator=generator)
    return explore.Network(label, list(classes), maps, maps.mean((1, 2)) + bias, bias, about)


@pytest.fixture(scope="module")
def photo():
    image, _ = drawing.draw_photo("n03445777", np.random.default_rng(0))
    return image


@pytest.fixture(scope="module")
def networks():
    return [network("ResNet-18", 5, 7, about="at 224 px"), network("CNN", 8, 11, seed=1)]


def contents(page):
    """What a page holds."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    return json.loads(text)


def values(text, dtype=np.float32):
    return np.frombuffer(base64.b64decode(text), dtype)


# ---------------------------------------------------------------- without a browser


def test_the_page_holds_pythons_numbers(photo, networks):
    held = contents(explore.page(photo, "ball.jpg", networks))
    ranked = [NAMES.index(name) for name in held["classes"]]
    chance = sum(network.logits.softmax(0) for network in networks)
    assert sorted(ranked) == list(range(6)) and (chance[ranked].diff() <= 0).all()
    assert held["first"] == 0 and held["title"] == "ball.jpg"
    for network, written in zip(networks, held["networks"], strict=True):
        shape = written["rows"], written["columns"]
        maps = np.stack([values(text).reshape(shape) for text in written["maps"]])
        assert (maps == network.maps[ranked].numpy()).all()
        assert written["bias"] == network.bias[ranked].tolist()
        assert written["logits"] == network.logits[ranked].tolist()
        assert written["probabilities"] == network.logits.softmax(0)[ranked].tolist()
        assert written["scale"] == cam.scale_of(network.maps)
        assert np.allclose(maps.mean((1, 2)) + written["bias"], written["logits"], atol=1e-5)


def test_the_photo_in_the_page(photo, networks):
    held = contents(explore.page(photo, "", networks))
    assert (held["width"], held["height"]) == photo.size
    grey = values(held["grey"], np.uint8).reshape(photo.height, photo.width)
    light = cam.lightness(torch.from_numpy(np.array(photo)))
    same = cam.lightness(torch.from_numpy(grey.copy())[..., None].expand(-1, -1, 3))
    assert (same - light).abs().max() < 0.02
    pixels = torch.from_numpy(np.array(photo))
    assert contents(explore.page(pixels, "", networks)) == held  # a tensor, or a PIL image


def test_names_are_data_and_never_markup(photo, networks):
    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            links.extend(value for name, value in attributes if name in ("src", "href"))

    tags, links = [], []
    Tags().feed(explore.page(photo, "<img src=x onerror=alert(1)>", networks))
    usual, tags = tags, []
    plain = [network("a", 5, 7, "abcdef"), network("b", 8, 11, "abcdef", seed=1)]
    Tags().feed(explore.page(photo, "photo", plain))
    assert tags == usual and not links
    page = explore.page(photo, "<img src=x onerror=alert(1)>", networks)
    assert page.count("</script>") == 2 and page.count("<!--") == 0
    assert set(contents(page)["classes"]) == set(NAMES)
    assert contents(page)["title"] == "<img src=x onerror=alert(1)>"


def test_the_page_asks_for_nothing(photo, networks):
    page = explore.page(photo, "", networks)
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//\w+\.|@import|\bfetch\(|url\(", page.replace("://", ""))


def test_a_page_is_small():
    noise = torch.randint(256, (1200, 900, 3), dtype=torch.uint8)
    names = [f"class {k}" for k in range(1000)]
    seen = [network("ResNet-18", 10, 7, names), network("CNN", 20, 15, names, seed=1)]
    page = explore.page(noise, "noise", seen)
    assert len(page.encode()) <= 300_000
    held = contents(page)
    assert len(held["classes"]) == explore.MOST_CLASSES
    assert 70_000 < held["width"] * held["height"] <= explore.MOST_PIXELS
    assert held["width"] / held["height"] == pytest.approx(0.75, abs=0.01)


def test_classes_asked_for_are_there_and_come_first(photo):
    names = [f"class {k}" for k in range(50)]
    one = network("CNN", 5, 7, names)
    last = one.logits.argsort()[:2].tolist()  # the two least likely
    held = contents(explore.page(photo, "", [one], asked=last))
    assert len(held["classes"]) == explore.MOST_CLASSES
    assert held["classes"][-2:] == [names[last[1]], names[last[0]]]
    assert held["classes"][held["first"]] == names[last[0]]


def test_networks_whose_classes_come_in_another_order(photo, networks):
    order = [3, 0, 5, 1, 4, 2]
    first, other = networks
    turned = explore.Network(other.label, [NAMES[k] for k in order], other.maps[order],
                             other.logits[order], other.bias[order])
    pages = [explore.page(photo, "", [first, second]) for second in (other, turned)]
    assert contents(pages[0]) == contents(pages[1])


def test_two_classes_of_one_name(photo):
    held = contents(explore.page(photo, "", [network("CNN", 5, 7, ["crane", "tench", "crane"])]))
    assert sorted(held["classes"]) == ["crane", "crane", "tench"]
    assert len(set(held["networks"][0]["maps"])) == 3


def test_what_cannot_be_compared_or_explained_is_refused(photo, networks):
    with pytest.raises(ValueError, match="CNN knows other classes than ResNet-18"):
        explore.page(photo, "", [networks[0], network("CNN", 5, 7, "abcdef")])
    wrong = networks[0]._replace(logits=networks[0].logits + 1)
    with pytest.raises(ValueError, match="miss the logits"):
        explore.page(photo, "", [wrong])


def test_a_path_or_an_open_file(tmp_path, photo, networks):
    file = io.BytesIO()
    explore.write_page(file, photo, "ball", networks)
    explore.write_page(tmp_path / "ball.html", photo, "ball", networks)
    assert (tmp_path / "ball.html").read_bytes() == file.getvalue()
    assert file.getvalue().decode() == explore.page(photo, "ball", networks)


# ---------------------------------------------------------------- in a browser

WIDE, PHONE = (1360, 900), (380, 760)


class Browser:
    """Headless Chromium with a page open in it."""

    def __init__(self, driver):
        self.driver = driver
        self.script = driver.execute_script

    def open(self, path, size=WIDE, dark=False):
        width, height = size
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=size == PHONE)
        self.command("Emulation.setTouchEmulationEnabled", enabled=size == PHONE)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[theme])
        self.driver.get(f"file://{path}")
        assert not self.driver.get_log("browser")  # no error, nothing that the policy stopped

    def command(self, name, **options):
        return self.driver.execute_cdp_cmd(name, options)

    def text(self, selector):
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def place(self, selector, x, y):
        """Where (x, y), in sides of the n-th element that `selector` names, is in the window."""
        return self.script("""
            const box = document.querySelector(arguments[0]).getBoundingClientRect();
            return [box.left + arguments[1] * box.width, box.top + arguments[2] * box.height]""",
                           selector, x, y)

    def mouse(self, kind, selector, x, y, buttons=0, modifiers=0):
        left, top = self.place(selector, x, y)
        self.command("Input.dispatchMouseEvent", type=kind, x=left, y=top, buttons=buttons,
                     button="left" if buttons or kind != "mouseMoved" else "none", clickCount=1,
                     modifiers=modifiers)

    def click(self, selector, shift=False):
        self.script("document.querySelector(arguments[0]).scrollIntoView({block: 'nearest'})",
                    selector)
        for kind, buttons in (("mousePressed", 1), ("mouseReleased", 0)):
            self.mouse(kind, selector, 0.3, 0.5, buttons, 8 if shift else 0)

    def drag(self, selector, start, end):
        self.mouse("mousePressed", selector, *start, buttons=1)
        self.mouse("mouseMoved", selector, *end, buttons=1)
        self.mouse("mouseReleased", selector, *end)

    def touch(self, selector, *places):
        for kind, place in zip(("touchStart", *["touchMove"] * (len(places) - 1)), places,
                               strict=True):
            x, y = self.place(selector, *place)
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def keys(self, *names):
        for name in names:
            text = {"Enter": "\r", "-": "-"}.get(name)
            code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38,
                    "ArrowRight": 39, "ArrowDown": 40, "-": 189}[name]
            options = {"key": name, "windowsVirtualKeyCode": code}
            self.command("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown",
                         **options, **({"text": text} if text else {}))
            self.command("Input.dispatchKeyEvent", type="keyUp", **options)

    def terms(self, n):
        """What the sum of the n-th network says: {label: number}."""
        return self.script("""
            const terms = document.querySelectorAll('figure')[arguments[0] + 1]
                .querySelectorAll('.term');
            return Object.fromEntries([...terms].map((term) => [
                term.querySelector('small').textContent.trim(),
                +term.querySelector('data').value]))""", n)

    def classes(self):
        """The class shown, the one subtracted, and the one in focus."""
        return self.script("""
            const name = (row) => row?.querySelector('.name').textContent;
            return [...['.shown', '.against'].map((s) => name(document.querySelector(s))),
                    name(document.activeElement.closest('tr'))]""")

    def pixels(self, n):
        """The n-th map, as it is drawn: (H, W, 3) uint8."""
        url = self.script("return document.querySelectorAll('.map')[arguments[0]].toDataURL()", n)
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return np.array(image.convert("RGB"))


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, server = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and server):
        pytest.skip("no browser: install Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1360,1000",
                   "--disable-dev-shm-usage", "--force-color-profile=srgb"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(server))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    return Browser(driver)


@pytest.fixture(scope="module")
def path(tmp_path_factory, photo, networks):
    path = tmp_path_factory.mktemp("page") / "ball.html"
    explore.write_page(path, photo, "ball.jpg", networks)
    return path


@pytest.fixture(scope="module")
def ranked(networks):
    """Classes in the order of the page."""
    return explore.ranked_classes(networks)


def row(k, part=".name"):
    return f"#rows tr:nth-child({k + 1}) {part}"


def view(n):
    return f"#maps figure:nth-child({n + 1}) .view"


def inside(class_map, left, right, top, bottom):
    """The sum of a map over a part of the photo: each cell by the part of it that lies inside."""
    def parts(low, high, n):
        edges = torch.arange(n + 1, dtype=torch.float64).clamp(low * n, high * n)
        return edges.diff()

    h, w = class_map.shape
    return (parts(top, bottom, h) @ class_map.double() @ parts(left, right, w)).item()


def test_a_rectangle_of_whole_cells_and_of_parts(browser, path, networks, ranked):
    browser.open(path)
    first, second = (network.maps[ranked[0]] for network in networks)
    browser.drag(view(0), (1.5 / 7, 0.5 / 5), (4.5 / 7, 2.5 / 5))  # columns 1 to 4, rows 0 to 2
    terms = browser.terms(0)
    total = first[0:3, 1:5].sum().item()
    assert terms["inside"] * 35 == pytest.approx(total, rel=1e-4)
    assert terms["outside"] * 35 == pytest.approx(first.sum().item() - total, rel=1e-4)
    parts = inside(second, 1 / 7, 5 / 7, 0, 3 / 5)  # the other network's cells are smaller
    assert browser.terms(1)["inside"] * 88 == pytest.approx(parts, rel=1e-4)
    positive = first.clamp(min=0)
    share = 100 * positive[0:3, 1:5].sum() / positive.sum()
    assert (f"Inside: {share:.0f}% of the positive evidence on 34% of the area, 12 of 35 cells."
            == browser.text(".share"))
    browser.drag(view(0), (0.5, 0.5), (1.4, 1.05))  # beyond the edges
    total = first[2:, 3:].sum().item()
    assert browser.terms(0)["inside"] * 35 == pytest.approx(total, rel=1e-4)


def test_on_the_photo_a_rectangle_is_as_it_is_drawn(browser, path, networks, ranked):
    browser.open(path)
    browser.drag("#photo .view", (0.2, 0.9), (0.7, 0.3))  # from below
    for n, network in enumerate(networks):
        total = inside(network.maps[ranked[0]], 0.2, 0.7, 0.3, 0.9)
        count = network.maps[0].numel()
        assert browser.terms(n)["inside"] * count == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("box", [False, True])
def test_all_cells_and_the_bias_are_the_logit(browser, path, networks, ranked, box):
    browser.open(path)
    if box:
        browser.drag(view(1), (0.1, 0.1), (0.6, 0.6))
    for n, network in enumerate(networks):
        terms = browser.terms(n)
        logit = terms.pop("logit")
        cells = {"inside", "outside"} if box else {f"{[35, 88][n]} cells"}
        assert terms.keys() == cells | {"bias"}
        assert sum(terms.values()) == pytest.approx(logit, abs=1e-5)
        assert logit == pytest.approx(network.logits[ranked[0]].item(), abs=1e-6)


def test_the_pointer_says_what_a_cell_adds_in_both_networks(browser, path, networks, ranked):
    browser.open(path)
    browser.mouse("mouseMoved", view(0), 2.5 / 7, 3.5 / 5)
    name = NAMES[ranked[0]]
    for n, (i, j) in enumerate([(3, 2), (int(0.7 * 8), int(2.5 / 7 * 11))]):
        class_map, logit = networks[n].maps[ranked[0]], networks[n].logits[ranked[0]].item()
        says = browser.text(f"#maps figure:nth-child({n + 1}) .says").replace("−", "-")
        adds, of = re.match(rf"This cell adds (\S+) to {re.escape(name)}’s (\S+)\. ", says).groups()
        assert float(adds) == pytest.approx(float(class_map[i, j]) / class_map.numel(), abs=6e-3)
        assert float(of) == pytest.approx(logit, abs=6e-3) and adds[0] in "+-"
    cell = browser.script("return document.querySelector('#maps .cell').getAttribute('d')")
    numbers = [float(number) for number in re.findall(r"[\d.]+", cell)]
    assert numbers == pytest.approx([2 / 7, 3 / 5, 3 / 7, 4 / 5, 2 / 7])
    browser.mouse("mouseMoved", "h1", 0.1, 0.1)
    assert browser.text(".says") == "Point at a cell for what it adds."


def test_a_click_shows_a_class_and_a_shift_click_subtracts_one(
        browser, path, photo, networks, ranked):
    browser.open(path)
    a, b = ranked[2], ranked[4]
    browser.click(row(2))
    assert browser.text("h1") == f"What speaks for {NAMES[a]}?"
    browser.click(row(4), shift=True)
    assert browser.text("h1") == f"Why {NAMES[a]} and not {NAMES[b]}?"
    assert browser.classes()[:2] == [NAMES[a], NAMES[b]]
    for n, network in enumerate(networks):
        difference = network.logits[a] - network.logits[b]
        assert browser.terms(n)["difference"] == pytest.approx(difference.item(), abs=1e-5)
    browser.drag(view(0), (0.5 / 7, 0.5 / 5), (1.5 / 7, 1.5 / 5))
    contrast = cam.contrast_map(networks[0].maps[None], a, b)[0]
    total = contrast[:2, :2].sum().item()
    assert browser.terms(0)["inside"] * 35 == pytest.approx(total, rel=1e-4)
    browser.click(row(4, ".minus"))  # and back again
    assert browser.classes()[:2] == [NAMES[a], None]


@pytest.mark.parametrize("against", [None, 3])
def test_the_colours_are_those_of_overlay(browser, path, photo, networks, ranked, against):
    browser.open(path)
    browser.click(row(1))
    if against:
        browser.click(row(against, ".minus"))
    for n, network in enumerate(networks):
        class_map = network.maps[ranked[1]]
        if against:
            class_map = class_map - network.maps[ranked[against]]
        pixels = cam.overlay(photo, class_map, cam.scale_of(network.maps)).numpy().astype(int)
        assert np.abs(browser.pixels(n) - pixels).max() <= 3
        assert (np.abs(browser.pixels(n) - pixels) > 1).mean() < 0.01


def test_the_line_lies_at_half_of_the_maximum(browser, path, photo, networks, ranked):
    browser.open(path)
    path_of_line = browser.script("return document.querySelector('path.line').getAttribute('d')")
    points = np.array(re.findall(r"[ML]([\d.]+),([\d.]+)", path_of_line), float)
    field = cam.upsample(networks[0].maps[ranked[:1]], (photo.height, photo.width))
    grid = torch.tensor(2 * points - 1).float()[None, None]
    at = torch.nn.functional.grid_sample(field[None], grid, align_corners=False)
    assert len(points) > 20
    assert (at / field.max() - 0.5).abs().max() < 0.005


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-4, 3.0])
def test_maps_of_one_cell_or_of_one_value(browser, tmp_path, photo, value):
    maps, bias = torch.full((2, 1, 1), value), torch.tensor([0.5, -0.5])
    one = explore.Network("CNN", ["a", "b"], maps, maps.mean((1, 2)) + bias, bias)
    flat = one._replace(label="flat", maps=maps.expand(2, 4, 6))
    explore.write_page(tmp_path / "flat.html", photo, "flat", [one, flat])
    browser.open(tmp_path / "flat.html")
    browser.drag(view(1), (0.1, 0.1), (0.4, 0.4))  # columns 0 to 2, rows 0 and 1
    for n in range(2):
        assert browser.terms(n)["inside"] == pytest.approx(value / 4, abs=1e-6)
    share = "Inside: 25% of" if value > 0 else "Inside: 0% of"
    assert browser.text(".share").startswith(share) and not browser.driver.get_log("browser")
    assert not browser.script("return document.querySelector('path.line').getAttribute('d')")


def test_the_list_by_keyboard(browser, path, ranked):
    browser.open(path)
    names = [NAMES[k] for k in ranked]
    browser.keys("Tab")
    assert browser.classes() == [names[0], None, names[0]]
    browser.keys("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    assert browser.classes() == [names[1], None, names[1]]
    browser.keys("ArrowDown", "-")
    assert browser.classes() == [names[1], names[2], names[2]]
    assert browser.text("#spoken").startswith(f"Why {names[1]} and not {names[2]}? ResNet-18: ")
    browser.keys("Tab")  # the list is one stop
    assert browser.script("return document.activeElement.ariaLabel").startswith("ResNet-18: map of")
    browser.keys("Tab", "Tab")
    assert browser.script("return document.activeElement.id") == "numbers"


def test_a_map_by_keyboard(browser, path, networks, ranked):
    browser.open(path)
    browser.keys("Tab", "Tab", "ArrowLeft")  # the first key shows the strongest cell
    class_map = networks[0].maps[ranked[0]]
    i, j = divmod(int(class_map.argmax()), 7)
    assert browser.text("#spoken").startswith(f"Row {i + 1}, column {j + 1}. This cell adds +")
    browser.keys(*["ArrowLeft"] * 7, *["ArrowUp"] * 5, "ArrowDown", "Enter")  # row 1, column 0
    browser.keys("ArrowRight", "ArrowRight", "ArrowDown", "Enter", "ArrowDown")
    total = class_map[1:3, :3].sum().item()
    assert browser.terms(0)["inside"] * 35 == pytest.approx(total, rel=1e-4)
    assert "inside" in browser.text("#spoken") and "Row 4, column 3." in browser.text("#spoken")
    browser.keys("Escape")
    assert set(browser.terms(0)) == {"35 cells", "bias", "logit"}


def test_a_rectangle_by_touch_on_a_phone(browser, path, networks, ranked):
    browser.open(path, PHONE)
    browser.script("document.querySelector('#maps').scrollIntoView()")
    browser.touch(view(0), (1.5 / 7, 1.5 / 5), (2.5 / 7, 2.2 / 5), (4.5 / 7, 3.5 / 5))
    total = networks[0].maps[ranked[0]][1:4, 1:5].sum().item()
    assert browser.terms(0)["inside"] * 35 == pytest.approx(total, rel=1e-4)
    assert browser.text(".says").startswith("This cell adds ")  # it stays when the finger is up


def test_each_cell_can_say_its_number_or_its_sign(browser, path, networks, ranked):
    browser.open(path)
    assert not browser.script("return document.querySelectorAll('.numbers span').length")
    browser.click("#numbers")
    written = browser.script("return [...document.querySelectorAll('.numbers')].map((cells) =>"
                             " [...cells.children].map((cell) => cell.textContent))")
    numbers = [float(text.replace("−", "-")) for text in written[0]]
    assert numbers == pytest.approx((networks[0].maps[ranked[0]] / 35).flatten(), abs=6e-3)
    marks = {1: "+", -1: "−"}
    for text, value in zip(written[1], networks[1].maps[ranked[0]].flatten(), strict=True):
        assert text in ("", marks[int(value.sign())])


@pytest.mark.parametrize("name, size, dark",
                         [("light", WIDE, False), ("dark", WIDE, True), ("phone", PHONE, False),
                          ("phone-dark", PHONE, True), ("tablet", (820, 1180), False)])
def test_it_fits_and_follows_the_readers_theme(browser, path, tmp_path, name, size, dark):
    browser.open(path, size, dark)
    browser.click(row(3), shift=True)
    browser.drag(view(0), (0.3, 0.3), (0.6, 0.6))
    width, whole = browser.script("return [innerWidth, document.documentElement.scrollWidth]")
    assert whole <= width == size[0]
    paper = browser.script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    tops = browser.script("return ['#classes', '#maps'].map((name) =>"
                          " document.querySelector(name).getBoundingClientRect().top)")
    assert size == WIDE or tops[0] < tops[1]  # narrow: the classes above the maps
    assert browser.driver.save_screenshot(str(tmp_path / f"{name}.png"))
    assert not browser.script("return performance.getEntriesByType('resource').filter("
                              "(entry) => !entry.name.startsWith('data:')).length")


def test_it_works_in_a_sandboxed_frame_as_notebooks_have_them(browser, path, tmp_path):
    frame = tmp_path / "notebook.html"
    frame.write_text(f'<iframe sandbox="allow-scripts" src="{path}" width="900" height="700">')
    browser.driver.get(f"file://{frame}")
    browser.driver.switch_to.frame(0)
    assert browser.text("h1").startswith("What speaks for ") and browser.pixels(0).any()
    assert not browser.driver.get_log("browser")
