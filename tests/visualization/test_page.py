"""The page of a report: nothing becomes markup that is not meant to, and it can be read without its script."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from beit.visualization.curves import Curve
from beit.visualization.diagram import diagram, round_steps, short, thinned, tick_text
from beit.visualization.markup import Markup, element, joined
from beit.visualization.page import WIDEST, fold, page, picture, section, table

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&"
VOID = {"br", "hr", "img", "input", "link", "meta"}


class Reader(HTMLParser):
    """Reads a page as a browser does; what is opened must be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_texts_are_escaped_and_elements_are_not():
    text = element(
        "p", HOSTILE, element("b", "x"), None, ["y", ["z"]], title=HOSTILE, class_="a", data_x=1, hidden=False
    )
    reader = Reader(text)
    assert [tag for tag, _ in reader.tags] == ["p", "b"]
    assert reader.tags[0][1] == {"title": HOSTILE, "class": "a", "data-x": "1"}
    assert "".join(reader.texts) == HOSTILE + "xyz"
    assert joined(Markup("<i></i>")) == "<i></i>"


def test_elements_without_contents_are_written_as_html_has_them():
    assert element("img", alt="") == '<img alt="">'
    assert element("line", x1=0.5, stroke_width=2) == '<line x1="0.5" stroke-width="2"/>'
    assert element("details", open=True) == "<details open></details>"


def hostile_page():
    curve = Curve(HOSTILE, [1, 2], [0.5, 0.25])
    contents = [
        diagram(HOSTILE, [curve], x_label=HOSTILE, number=0),
        fold(HOSTILE, HOSTILE, remark=HOSTILE),
        table((HOSTILE, HOSTILE), [[HOSTILE, HOSTILE]], "x", HOSTILE),
    ]
    return page(HOSTILE, element("h1", HOSTILE), section("a", HOSTILE, *contents), HOSTILE)


def test_hostile_texts_stay_texts():
    # Breaks if a single place puts a text into the page unescaped: there is one script, and no element of the text's.
    reader = Reader(hostile_page())
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert "img" not in [tag for tag, _ in reader.tags]
    assert not [attributes for _, attributes in reader.tags if any(name.startswith("on") for name in attributes)]
    (figure,) = (attributes for tag, attributes in reader.tags if tag == "figure")
    assert json.loads(figure["data-curves"]) == [{"label": HOSTILE, "points": [[1, 0.5], [2, 0.25]]}]


def test_the_policy_lets_only_the_pages_own_script_and_style_run():
    # Breaks if the page's script changes on its way into the page: a browser would refuse it.
    text = hostile_page()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    for name in ("script", "style"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src &#x27;sha256-{digest}&#x27;" in policy or f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith(("default-src 'none'", "default-src &#x27;none&#x27;"))
    assert "http" not in policy
    assert " style=" not in text  # which the policy would block
    assert '<link rel="icon" href="data:,">' in text  # or a browser with a window asks the server for one


def test_folds_are_open_without_a_script():
    assert "<details open>" in fold("title", "text")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.9, 16.1, [2, 4, 6, 8, 10, 12, 14, 16]),
        (0.9, 17.1, [5, 10, 15]),
        (-3.0, 2.5, [-3, -2, -1, 0, 1, 2]),
        (1.21e-5, 1.99e-5, [1.3e-5, 1.4e-5, 1.5e-5, 1.6e-5, 1.7e-5, 1.8e-5, 1.9e-5]),
        (0.0, 160000.0, [0, 20000, 40000, 60000, 80000, 100000, 120000, 140000, 160000]),
    ],
)
def test_the_numbers_of_an_axis_are_round_and_neither_few_nor_many(low, high, expected):
    assert round_steps(low, high) == pytest.approx(expected)


def test_there_are_always_three_to_nine_numbers_on_an_axis():
    rng = np.random.default_rng(0)
    for low, size in zip(rng.normal(size=300), 10.0 ** rng.uniform(-6, 6, size=300), strict=True):
        assert 3 <= len(round_steps(low, low + size)) <= 9


def test_numbers_are_short():
    assert [short(value) for value in (0.28465, 1249552, 1.63e-05, 17, 0.0, float("nan"), 312.395, 123456.7)] == [
        *("0.2847", "1,249,552", "1.63e-05", "17", "0", "nan", "312.4", "123,457")
    ]
    assert [tick_text(0.4, 0.05), tick_text(2e-5, 1e-5), tick_text(20000, 5000), tick_text(3, 1)] == [
        *("0.40", "2e-05", "20,000", "3")
    ]


def test_a_diagram_shows_its_points_where_they_belong():
    # Left is 58 of 480 units, right 12, above 10 of 300, below 40; 2 % of the epochs are left free at each side, and
    # 6 % of the values: epoch 3 of 1..5 is in the middle, and so is 0.5 of 0..1.
    text = diagram("loss", [Curve("train", [1, 3, 5], [0.0, 0.5, 1.0])], x_label="epoch", number=3)
    reader = Reader(text)
    (path,) = (attributes["d"] for tag, attributes in reader.tags if tag == "path" and attributes["d"] != "M1 6H27")
    points = [tuple(map(float, point.split())) for point in path.removeprefix("M").split("L")]
    width, height = 480 - 58 - 12, 300 - 10 - 40
    room = 4 * 0.02
    assert points[1] == (width / 2, height / 2)
    assert points[0] == pytest.approx((width * room / (4 + 2 * room), height * 1.06 / 1.12), abs=0.06)
    assert points[2][1] == pytest.approx(height * 0.06 / 1.12, abs=0.06)
    (title,) = re.findall(r"<title[^>]*>(.*?)</title>", text)
    assert title == "loss. train: 0 at epoch 1, 1 at epoch 5"


def test_runs_differ_by_colour_and_marker_and_test_by_dashes():
    curves = [Curve(f"{run} {part}", [1, 2], [1.0, 2.0], run) for run in range(24) for part in ("train", "test")]
    text = diagram("loss", curves, x_label="epoch", number=0)
    looks = re.findall(r'<g class="c(\d) (train|test)"><path[^>]*/><use href="(#marker-\d)"', text)
    assert len(set(looks)) == len(curves)


def test_a_diagram_of_one_value_or_one_epoch_can_be_drawn():
    for curve in (Curve("train", [1, 2], [0.5, 0.5]), Curve("train", [7], [0.0]), Curve("train", [1, 2], [0.0, 0.0])):
        Reader(diagram("x", [curve], x_label="epoch", number=0))


def test_thinning_keeps_both_ends():
    curve = thinned(Curve("train", list(range(1, 1001)), [float(x) for x in range(1, 1001)], 2), 10)
    assert (len(curve.epochs), curve.epochs[0], curve.epochs[-1], curve.run) == (10, 1, 1000, 2)
    assert curve.values == [float(x) for x in curve.epochs]


def test_pictures_become_small_and_keep_their_shape(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1200, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    text = picture(tmp_path / "noise.png", "caption", HOSTILE)
    ((_, attributes),) = ((tag, attributes) for tag, attributes in Reader(text).tags if tag == "img")
    assert (attributes["alt"], attributes["width"], attributes["height"]) == (HOSTILE, str(WIDEST), str(WIDEST // 2))
    assert attributes["src"].startswith("data:image/jpeg;base64,")  # of noise, a PNG would be three times as large
    assert len(text) < 1_500_000


def test_a_picture_of_few_colours_stays_exact_and_gets_a_white_ground(tmp_path):
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "empty.png")
    text = picture(tmp_path / "empty.png", "caption", "nothing")
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.convert("RGB").getcolors() == [(800, (255, 255, 255))]


def test_what_is_no_picture_is_none(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    assert picture(tmp_path / "a.png", "", "") is None
