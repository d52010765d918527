"""Hooks of MkDocs (see mkdocs.yml): the pages stay where they read well on GitHub, and the site is made to fit them.

Pages outside docs/ and notebooks become pages of the site, and so does source code that a page links to; other linked
files are copied. A link means the same file as on GitHub.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import FunctionType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from beit import jobs
from semantic_segmentation.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "semantic_segmentation/README.md": "segmentation.md",
}
SETTINGS = """\
# Settings

Every job's, as flags of its command (`beit pretrain --epochs 100`), as keys of a YAML file for `--config`, and as
arguments of its function (`beit.pretrain(epochs=100)`).
"""
COLUMNS = "| setting | default | |\n| --- | --- | --- |\n"
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash"}
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`(?!\]))", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^]]*)\]\(([^)\s:]+)\)")
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
NAME = re.compile(r"<code>[^<]*</code>")
ROLE = re.compile(r":[a-z]+:<code>(.*?)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and files that docs/ does not hold."""
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        pages[f"docs/notebooks/{path.name}"] = _notebook(path)
    pages["docs/settings.md"] = _settings()
    pages |= {path: (ROOT / path).read_text(encoding="utf-8") for path in MOVED}
    linked = {path for page, text in pages.items() for path in _linked(page, text)}
    for path in sorted(linked - set(pages)):
        file = ROOT / path
        if file.suffix in LANGUAGES:
            pages[path] = f"# {path}\n\n```{LANGUAGES[file.suffix]}\n{file.read_text(encoding='utf-8')}```\n"
        elif file.is_file() and not path.startswith("docs/"):
            files.append(File.generated(config, _address(path), abs_src_path=str(file)))
    for path, text in pages.items():
        if files.get_file_from_path(_address(path)) is None:
            files.append(File.generated(config, _address(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Makes the links of a page, which are GitHub's, the site's; one to a folder becomes its text."""
    addresses = {address: path for path, address in MOVED.items()}
    here = addresses.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(link: re.Match[str]) -> str:
        text, target = link.groups()
        name, _, anchor = target.partition("#")
        if not name:
            return link[0]
        path = _resolve(here, name)
        if (ROOT / path).is_dir():
            return text
        address = posixpath.relpath(_address(path), posixpath.dirname(page.file.src_uri))
        return f"[{text}]({address}{anchor and '#' + anchor})"

    return "".join(part if CODE.fullmatch(part) else LINK.sub(rewrite, part) for part in CODE.split(markdown))


def on_page_content(html: str, **_: object) -> str:
    """Makes the roles of docstrings, such as :func:`beit.get_model`, links if the name has an entry.

    In tables, names may break after an underscore, and nowhere else.
    """
    html = ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
    return TABLE.sub(lambda table: NAME.sub(lambda name: name[0].replace("_", "_<wbr>"), table[0]), html)


def _linked(page: str, text: str) -> Iterator[str]:
    """Yields the files that a page links to, as paths in the repository."""
    for _, target in LINK.findall(CODE.sub("", text)):
        if name := target.partition("#")[0]:
            yield _resolve(page, name)


def _resolve(page: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _address(path: str) -> str:
    """Returns where a file of the repository lies in the site."""
    address = MOVED.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")
    suffix = posixpath.splitext(address)[1]
    return f"{address}.md" if suffix in LANGUAGES else re.sub(r"\.ipynb$", ".md", address)


def _notebook(path: Path) -> str:
    """Returns a notebook without outputs as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    blocks = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([blocks[0], f"[Download this notebook]({path.name})", *blocks[1:]])


def _settings() -> str:
    """Returns a page with the settings of every job, as its function in Python lists them."""
    text = SETTINGS
    for name, job in {**vars(jobs), "train_segmentor": jobs.as_function(COMMANDS["train"], "train_segmentor")}.items():
        if isinstance(job, FunctionType) and hasattr(job, "__signature__"):
            documentation = str(job.__doc__)
            about = dict(re.findall(r"^    (\w+): (.*)$", documentation, re.MULTILINE))
            text += f"\n## {name}\n\n{documentation.splitlines()[0]}\n\n{COLUMNS}"
            for setting in signature(job).parameters.values():
                cells = (f"`{setting.name}`", f"`{setting.default!r}`", about[setting.name])
                text += f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    return text
