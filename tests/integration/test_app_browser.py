"""``beit app`` in a browser: real clicks, and what is then seen; nothing leaves the machine or the folder."""

import io
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from beit.commands.app import Page, build_page, find_examples, serve
from beit.commands.settings import AppConfig
from tests.commands.test_app import CLASSIFIER, folder, image  # noqa: F401  (fixtures)
from tests.commands.test_visualize import site  # noqa: F401  (a fixture)
from tests.conftest import NEEDS_BROWSER
from tests.integration.test_report_browser import BROWSER, BROWSERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"{NEEDS_BROWSER}: none of {', '.join(BROWSERS)} is installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GREY, FRAME = (128, 128, 128), (214, 94, 0)
ROWS, COLUMNS = 4, 6


@pytest.fixture(scope="module")
def address(folder):  # noqa: F811
    page = build_page(Page(config := AppConfig(path=str(folder))), find_examples(config))
    yield serve(page, None)
    page.close()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(address, chromium):
    """The page, once its first predictions are there; it knows what it has ``asked`` for and ``complained`` of."""
    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    page.asked, page.complained = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complained.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#prediction figure")
    yield page
    page.close()


def seen(tab, part="#canvas img"):
    """What is on the screen there, as pixels."""
    return np.asarray(Image.open(io.BytesIO(tab.locator(part).first.screenshot())).convert("RGB")).astype(int)


def patches_of(pixels, colour, shares=((0.5, 0.5),)):
    """The patches of the canvas that show a colour at all of these places in them."""
    height, width, _ = pixels.shape
    found = set()
    for row in range(ROWS):
        for column in range(COLUMNS):
            places = [(int((row + y) * height / ROWS), int((column + x) * width / COLUMNS)) for y, x in shares]
            if all(abs(pixels[place] - colour).max() < 12 for place in places):
                found.add((row, column))
    return found


def click(tab, row, column, then):
    """Clicks the middle of a patch and waits for what it changes."""
    box = tab.locator("#canvas img").bounding_box()
    place = {"x": (column + 0.5) * box["width"] / COLUMNS, "y": (row + 0.5) * box["height"] / ROWS}
    tab.locator("#canvas img").click(position=place)
    wait(tab, then)


def wait(tab, condition):
    for _ in range(400):
        if condition():
            return
        tab.wait_for_timeout(200)
    raise AssertionError("the page does not change as expected")


def choose(tab, name):
    tab.locator("#checkpoint input").click()
    tab.get_by_role("option", name=name).click()


def masked(tab):
    return patches_of(seen(tab), GREY, ((0.5, 0.5), (0.3, 0.3), (0.7, 0.7)))


def test_a_mask_is_painted_and_cleared_and_the_prediction_follows(tab):
    first = masked(tab)
    assert 0 < len(first) <= 9  # 75 of 196, of 24 patches
    titles = tab.locator("#prediction figcaption").all_inner_texts()
    assert titles[:2] == ["image", "masked"]
    assert titles[-1] == "confidence"
    free = next((row, column) for row in range(ROWS) for column in range(COLUMNS) if (row, column) not in first)
    click(tab, *free, lambda: masked(tab) == first | {free})
    wait(tab, lambda: f"of {len(first) + 1} tokens right" in tab.locator("#prediction").inner_text())
    tab.locator("#clear").click()
    wait(tab, lambda: not masked(tab) and not tab.locator("#prediction figure").count())
    tab.locator("#blocks").click()
    wait(tab, lambda: masked(tab) == first)  # the same number, the same seed
    tab.get_by_label("unmasks", exact=True).check()
    click(tab, *min(first), lambda: masked(tab) == first - {min(first)})


def test_attention_is_of_the_clicked_patch(tab):
    edge = ((0.5, 0.02), (0.02, 0.5))
    assert patches_of(seen(tab), FRAME, edge) == {(2, 3)}
    before = seen(tab, "#attention img")
    tab.get_by_label("shows its attention").check()
    click(tab, 1, 4, lambda: patches_of(seen(tab), FRAME, edge) == {(1, 4)})
    wait(tab, lambda: (after := seen(tab, "#attention img")).shape != before.shape or (after != before).mean() > 0.05)


def test_each_kind_of_checkpoint_has_its_parts(tab, image):  # noqa: F811
    assert not tab.locator("#classes").is_visible()
    choose(tab, CLASSIFIER)
    tab.wait_for_selector("#classes")
    assert "class " in tab.locator("#classes").inner_text()
    wait(tab, lambda: not tab.locator("#blocks").is_visible() and not tab.locator("#prediction figure").count())
    choose(tab, "segmentor.pth · segmentor")
    tab.wait_for_selector("#segmentation img")
    wait(tab, lambda: not tab.locator("#classes").is_visible())
    assert seen(tab, "#segmentation img").std() > 10
    choose(tab, "without/checkpoint-0.pth · pre-trained")
    tab.get_by_text("--tokenizer is missing").wait_for()


def test_an_image_of_ones_own_and_one_that_is_none(tab, tmp_path):
    Image.new("CMYK", (90, 60), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    tab.locator("#file input").set_input_files(tmp_path / "red.jpg")
    wait(tab, lambda: ((seen(tab) - (254, 0, 0)).__abs__().max(axis=2) < 8).mean() > 0.4)
    (tmp_path / "broken.png").write_bytes(b"no image")
    tab.reload()
    tab.wait_for_selector("#prediction figure")
    tab.locator("#file input").set_input_files(tmp_path / "broken.png")
    tab.get_by_text("cannot read the image").first.wait_for()


def test_nothing_is_requested_elsewhere_and_nothing_is_wider_than_a_phone(tab, address):
    assert {urllib.parse.urlsplit(url).hostname for url in tab.asked if not url.startswith(("data:", "blob:"))} == {
        "127.0.0.1"
    }
    assert urllib.parse.urlsplit(address).hostname == "127.0.0.1"
    assert tab.complained == []
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_timeout(300)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator("#canvas img").bounding_box()["width"] > 300


@pytest.mark.parametrize("path", ["/etc/hostname", "{site}/bare.pth", "{folder}/segmentor.pth", "{folder}/../x"])
def test_the_server_gives_no_files_away(address, folder, site, path):  # noqa: F811
    with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
        urllib.request.urlopen(f"{address}gradio_api/file={path.format(folder=folder, site=site)}")
