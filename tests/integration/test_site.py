"""The documentation's site: it builds without a warning, shows what GitHub shows, and loads nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import beit
import semantic_segmentation
from beit.zoo import list_models

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.html",
    "CHANGELOG.md": "changelog.html",
    "CONTRIBUTING.md": "contributing.html",
    "semantic_segmentation/README.md": "segmentation.html",
}
SHAPED = {"h1", "h2", "h3", "h4", "li", "pre", "img", "table", "tr", "th", "td"}

pytestmark = pytest.mark.slow


def build(source, *arguments):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *map(str, arguments)]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, "--site-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


class Article(HTMLParser):
    """Counts elements and collects the text of a page, of a whole site's only the part between its bars."""

    def __init__(self, html):
        super().__init__()
        self.inside = "<article" not in html
        self.elements, self.text = Counter(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.inside |= tag == "article"
        self.elements.update({tag} & SHAPED if self.inside else ())

    def handle_endtag(self, tag):
        self.inside &= tag != "article"

    def handle_data(self, data):
        self.text += re.sub(r"[\s¶]", "", data) if self.inside else ""


def test_a_page_shows_what_github_shows(site):
    # Breaks with Markdown that the two read differently, such as a list inside a list that is indented by two spaces.
    pages = {ROOT / path: site / page for path, page in OUTSIDE.items()}
    for path in (ROOT / "docs").rglob("*.md"):
        pages[path] = site / path.relative_to(ROOT / "docs").with_suffix(".html")
    del pages[ROOT / "docs" / "api.md"]  # its docstrings are not in the file
    render = MarkdownIt("commonmark").enable("table").render
    for source, page in pages.items():
        ours, theirs = Article(page.read_text("utf-8")), Article(render(source.read_text("utf-8")))
        assert ours.text == theirs.text, source
        assert ours.elements == theirs.elements, source


def test_the_reference_has_every_public_name(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    names = {f"beit.{name}" for name in set(beit.__all__) - set(list_models())}
    names |= {f"semantic_segmentation.{name}" for name in semantic_segmentation.__all__}
    settings = (site / "settings.html").read_text(encoding="utf-8")  # of the jobs
    assert not {name for name in names if f'id="{name}"' not in page and f'id="{name.split(".")[1]}"' not in settings}
    assert not re.findall(r":\w+:<code>|:\w+:`", page)  # roles of docstrings


def test_links_to_code_show_it(site):
    page = (site / "architecture.html").read_text(encoding="utf-8")
    assert 'href="files/examples/rotation.py.html"' in page
    assert "classRotation(Task" in Article((site / "files/examples/rotation.py.html").read_text("utf-8")).text
    assert (site / "files/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loading = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert loading
        assert not [tag for tag in loading if re.search(r"(?:src|href)=\W?(?:https?:)?//", tag)], page


@pytest.mark.parametrize("link", ["[x](data.md#nowhere)", "[x](#nowhere)", "[x](../nothing.md)"])
def test_a_dead_link_fails(link, tmp_path):
    for name in (*OUTSIDE, "mkdocs.yml", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "broken.yml").write_text("INHERIT: mkdocs.yml\nplugins: []\nwatch: []\n")
    with (tmp_path / "docs" / "faq.md").open("a") as page:
        page.write(f"\n{link}\n")
    done = build(tmp_path, "--config-file", "broken.yml")
    assert done.returncode != 0
    assert "faq.md" in done.stderr
