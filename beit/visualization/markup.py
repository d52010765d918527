"""HTML and SVG built of elements, so that what comes from a file or a user can never become markup."""

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is HTML already; everything else is escaped when it is put into an element."""

    __slots__ = ()


Content = str | Iterable["Content"] | None
_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})
_EMPTY = frozenset({"circle", "line", "path", "rect", "use"})  # of SVG


def element(tag: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """Returns an element.

    Args:
        tag: Its name.
        content: Texts, which are escaped, elements, which are not, and lists of both; None is left out.
        attributes: ``class_`` is ``class``, ``data_x`` is ``data-x``; True stands alone, None and False are left out.
    """
    start = tag + "".join(_attribute(key, value) for key, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{start}>")
    if tag in _EMPTY:
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{joined(content)}</{tag}>")


def joined(content: Content) -> Markup:
    """Returns texts and elements one after the other; the texts escaped."""
    if content is None:
        return Markup("")
    if isinstance(content, str):
        return content if isinstance(content, Markup) else Markup(escape(content, quote=False))
    return Markup("".join(joined(part) for part in content))


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
