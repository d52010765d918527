"""The report in a browser: it requests nothing, reports no error, and fits a phone."""

import http.server
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from beit.commands.report import main
from beit.commands.settings import ReportConfig
from beit.tasks.settings import FinetuningConfig
from tests.commands.test_report import HOSTILE, finetuning_entry, make_run
from tests.conftest import NEEDS_BROWSER

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


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    config = FinetuningConfig(epochs=10, data_path=HOSTILE, model_kwargs={"long": "x" * 300})
    runs = [
        make_run(folder / name, config, map(finetuning_entry, range(10)), command=["beit", "x" * 300])
        for name in ("one", "another" * 8)
    ]
    main(ReportConfig(runs=tuple(map(str, runs)), output=str(folder / "page" / "report.html"), title=HOSTILE))
    return folder / "page" / "report.html"


def browse(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Opens a page; returns its elements once its scripts have run, and what it wrote to the console."""
    done = subprocess.run(
        [BROWSER, *SILENT, f"--user-data-dir={profile}", *flags, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_it_opens_without_an_error_and_requests_nothing(report, tmp_path):
    # Breaks if a style does not fit the policy, or anything is loaded: a picture, a font, an icon.
    asked = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(report.parent))

        def log_message(self, _format, *arguments):
            asked.append(str(arguments[0]))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        _, console = browse(f"http://127.0.0.1:{server.server_port}/report.html", tmp_path / "profile")
        server.shutdown()
    assert console == []
    assert asked == ["GET /report.html HTTP/1.1"]


def test_nothing_that_somebody_puts_in_runs_or_loads(report, tmp_path):
    # The other way round: the console that the test above reads does report what is refused.
    page = tmp_path / "with.html"
    text = report.read_text().replace("</body>", "<script>document.title = 'taken'</script><img src=a.png></body>")
    page.write_text(text)
    elements, console = browse(page.as_uri(), tmp_path / "profile")
    assert "<title>taken" not in elements
    assert len(console) >= 2


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window(report, tmp_path, width):
    # Breaks on a long name, path or value that neither wraps nor scrolls in its box. Windows narrower than 500 pixels
    # need a frame, and the measuring script a copy without the policy that would refuse it.
    measure = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    text = report.read_text().replace('http-equiv="Content-Security-Policy"', "name=none").replace("</body>", measure)
    report.with_name("measured.html").write_text(text)
    frame = report.with_name(f"frame{width}.html")
    frame.write_text(
        f'<iframe width={width} height=900 src="measured.html"></iframe><script>onload = () => '
        "{ document.title = frames[0].document.title }</script>"
    )
    elements, _ = browse(
        frame.as_uri(), tmp_path / "profile", "--window-size=1600,1000", "--allow-file-access-from-files"
    )
    assert int(re.findall(r"<title>(\d+)</title>", elements)[0]) <= width
