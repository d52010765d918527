"""A page that stands alone: one HTML file with its style, script and pictures, which asks nothing of any network."""

import base64
import hashlib
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from beit.visualization.markup import Content, Markup, element, joined

WIDEST = 1200  # pixels of a picture on the page; it shows some 620, twice that on fine screens
LIGHT_BYTES = 250_000  # a larger PNG becomes a JPEG
JPEG_QUALITY = 85
MOST_PIXELS = 100_000_000  # of a picture that is opened
_MARKERS = {  # around (0, 0), by number; all weigh alike
    0: element("circle", r=3.2),
    1: element("rect", x=-2.9, y=-2.9, width=5.8, height=5.8),
    2: element("path", d="M0-4L3.7 2.7H-3.7Z"),
    3: element("path", d="M0-4.2L4.2 0L0 4.2L-4.2 0Z"),
}


def page(title: str, header: Content, sections: Content, footer: Content) -> str:
    """Returns a whole page.

    Its security policy lets nothing load and no other script run, whatever a text in it may say.

    Args:
        title: For the window.
        header: What stands above.
        sections: The contents.
        footer: What stands below.
    """
    style, script = _resource("page.css"), _resource("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("link", rel="icon", href="data:,"),  # or a browser asks the server for one
        element("style", Markup(style)),
    )
    body = element(
        "body",
        _store(),
        element("header", header),
        element("main", sections),
        element("footer", footer),
        element("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _store() -> Markup:
    symbols = (element("g", shape, id=f"marker-{number}") for number, shape in _MARKERS.items())
    return element("svg", element("defs", *symbols), class_="store", aria_hidden="true")


def _resource(name: str) -> str:
    return (resources.files("beit.visualization") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def section(name: str, title: str, *content: Content) -> Markup:
    """Returns a part of the page that links can lead to."""
    return element("section", element("h2", title, id=name), *content, aria_labelledby=name)


def fold(title: str, *content: Content, remark: str = "", class_: str | None = None) -> Markup:
    """Returns what is folded away until one asks for it."""
    summary = element("summary", title, element("span", f" · {remark}") if remark else None)
    return element("details", summary, element("div", *content), open=True, class_=class_)


def table(head: Sequence[str], rows: Sequence[Sequence[Content]], class_: str, caption: str) -> Markup:
    """Returns a table, whose rows become blocks on a phone.

    Args:
        head: Titles of the columns.
        rows: Cells; the first of a row names it.
        class_: For the style.
        caption: What it shows, for who cannot see it.
    """
    titles = element("thead", element("tr", *(element("th", title, scope="col") for title in head)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(cell(content, title) for content, title in zip(row[1:], head[1:], strict=True)),
        )
        for row in rows
    ]
    return element(
        "table", element("caption", caption, class_="unseen"), titles, element("tbody", *body), class_=f"stack {class_}"
    )


def cell(content: Content, title: str, class_: str | None = None) -> Markup:
    """Returns a cell of a table that knows its column's title."""
    inside = joined(content)
    return element("td", element("span", inside) if inside else None, data_label=title, class_=class_)


def picture(path: Path, caption: Content, alternative: str) -> Markup | None:
    """Returns a picture with its caption, made small enough for a page; None if the file is no picture.

    Args:
        path: A PNG file, or another that Pillow reads.
        caption: A line below.
        alternative: What it shows, for who cannot see it.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            size, data = _as_data(image)
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    shown = element("img", src=data, alt=alternative, width=size[0], height=size[1])
    return element("figure", shown, element("figcaption", caption), class_="picture")


def _as_data(image: Image.Image) -> tuple[tuple[int, int], str]:
    image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    kind, content = "png", _encoded(image, "PNG", optimize=True)
    if len(content) > LIGHT_BYTES:
        kind, content = "jpeg", _encoded(image, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return image.size, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()
