"""The report in a browser: it asks for nothing, says no error, and its diagrams can be zoomed and read."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from tests.tasks.test_report import finetuning_entry, make_run

from beit.commands.report import ReportConfig, main
from beit.tasks.settings import FinetuningConfig
from tests.conftest import NEEDS_BROWSER
from tests.visualization.test_page import HOSTILE

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
SILENT = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--enable-logging=stderr",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"{NEEDS_BROWSER}: none of {', '.join(BROWSERS)} is installed"),
]

# Does what a reader does, as events, and leaves what it sees in the page's title.
READER = """
const figure = document.querySelector("figure.diagram");
const plot = figure.querySelector("svg.plot");
const readout = figure.querySelector(".readout");
const path = () => plot.querySelector("svg.lines path").getAttribute("d");
const ticks = () => [...plot.querySelectorAll(".x-axis text")].map((text) => text.textContent);
const key = (name) => plot.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const box = plot.getBoundingClientRect();
const point = (type, share) => plot.dispatchEvent(new PointerEvent(type, {
  clientX: box.left + (58 + 410 * share) / 480 * box.width, clientY: box.top + box.height / 2, bubbles: true, button: 0,
}));
plot.setPointerCapture = () => {};  // there is no real pointer
const seen = { tools: figure.querySelectorAll(".tools button").length, whole: path(), wholeTicks: ticks() };
seen.folds = [...document.querySelectorAll("details")].map((fold) => fold.open);
dispatchEvent(new Event("beforeprint"));
seen.printed = [...document.querySelectorAll("details")].map((fold) => fold.open);
dispatchEvent(new Event("afterprint"));
point("pointermove", 0.99);
seen.last = readout.textContent;
point("pointerleave", 0.99);
seen.left = readout.hidden;
point("pointerdown", 0.3); point("pointermove", 0.6); point("pointerup", 0.7);
seen.zoomed = path(); seen.zoomedTicks = ticks();
plot.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
seen.again = path(); seen.againTicks = ticks();
point("pointerleave", 0.7); key("ArrowRight"); seen.first = readout.textContent;
seen.spoken = figure.querySelector("[role=status]").textContent;
key("ArrowRight"); seen.second = readout.textContent;
key("+"); seen.keyed = path();
key("0"); seen.reset = path();
seen.wide = document.documentElement.scrollWidth;
document.title = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    config = FinetuningConfig(epochs=10, data_path=HOSTILE, model_kwargs={"long": "x" * 300})
    runs = [make_run(folder / name, config, map(finetuning_entry, range(10))) for name in ("one", "another" * 8)]
    main(ReportConfig(runs=tuple(map(str, runs)), output=str(folder / "page" / "report.html"), title=HOSTILE))
    return folder / "page" / "report.html"


def browse(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Opens a page; returns its elements once its scripts have run, and what it said on the console."""
    done = subprocess.run(
        [BROWSER, *SILENT, f"--user-data-dir={profile}", *flags, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_reader(report: Path) -> Path:
    """Returns a copy with the test's script, which the page's own policy would rightly refuse."""
    text = report.read_text()
    policy, body = '<meta http-equiv="Content-Security-Policy"', "</body>"
    assert text.count(policy) == text.count(body) == 1
    copy = report.with_name("read.html")
    copy.write_text(text.replace(policy, "<meta name=none").replace(body, f"<script>{READER}</script>{body}"))
    return copy


def test_it_opens_without_an_error_and_asks_for_nothing(report, tmp_path):
    # Breaks if a style or script does not fit the policy, or anything is loaded: a picture, a font, an icon.
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(report.parent))

        def log_message(self, _format, *arguments):
            asked.append(str(arguments[0]))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        elements, console = browse(f"http://127.0.0.1:{server.server_port}/report.html", tmp_path / "profile")
        server.shutdown()
    assert console == []
    assert asked == ["GET /report.html HTTP/1.1"]
    assert 'class="tools"' in elements  # its own script has run


def test_a_script_of_somebody_else_does_not_run(report, tmp_path):
    # The other way round: what the test above looks at does see what is refused.
    page = tmp_path / "with.html"
    text = report.read_text().replace("</body>", "<script>document.title = 'taken'</script><img src=a.png></body>")
    page.write_text(text)
    elements, console = browse(page.as_uri(), tmp_path / "profile")
    assert "<title>taken" not in elements
    assert len(console) >= 2


@pytest.fixture(scope="module")
def seen(report, tmp_path_factory) -> dict:
    page = with_reader(report)
    profile = tmp_path_factory.mktemp("profile")
    elements, console = browse(page.as_uri(), profile, "--window-size=1400,2000")
    assert console == []
    return json.loads(title_of(elements))


def title_of(elements: str) -> str:
    (title,) = re.findall(r"<head>.*?<title>(.*?)</title>", elements, flags=re.DOTALL)
    return title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_folds_close_on_the_screen_and_open_in_print(seen):
    assert len(seen["folds"]) > 4
    assert not any(seen["folds"])
    assert all(seen["printed"])


def test_a_drag_zooms_and_a_double_click_shows_all_again(seen):
    assert seen["tools"] == 3
    assert seen["wholeTicks"] == ["2", "4", "6", "8", "10"]
    assert seen["zoomedTicks"] != seen["wholeTicks"]
    assert seen["zoomed"] != seen["whole"]
    assert seen["again"].split("L")[0] == seen["whole"].split("L")[0]
    assert numbers(seen["again"]) == pytest.approx(numbers(seen["whole"]), abs=0.11)  # Python and script agree
    assert seen["againTicks"] == seen["wholeTicks"]


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_values_are_read_with_pointer_and_keys(seen):
    # finetuning_entry: train loss 2, test loss 1.25 - 0.1 an epoch.
    assert seen["last"].startswith("epoch 10")
    assert "one test 0.35" in seen["last"]
    assert seen["left"] is True
    assert seen["first"].startswith("epoch 1")
    assert "one test 1.25" in seen["first"]
    assert seen["spoken"].startswith("epoch 1, ")
    assert seen["second"].startswith("epoch 2")
    assert seen["keyed"] != seen["reset"]
    assert numbers(seen["reset"]) == pytest.approx(numbers(seen["whole"]), abs=0.11)


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(report, tmp_path, width):
    # Breaks on a long name, path or value that does not wrap. Windows narrower than 500 pixels need a frame.
    page = with_reader(report)
    frame = report.with_name(f"frame{width}.html")
    frame.write_text(
        f'<iframe width={width} height=900 src="{page.name}"></iframe><script>onload = () => '
        "{ document.title = frames[0].document.title }</script>"
    )
    elements, _ = browse(
        frame.as_uri(), tmp_path / "profile", "--window-size=1600,1000", "--allow-file-access-from-files"
    )
    title = re.findall(r"<title>(.*?)</title>", elements)[0]
    assert json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))["wide"] <= width
