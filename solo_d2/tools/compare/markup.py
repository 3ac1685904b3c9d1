"""HTML and SVG from nested calls: what is not markup is escaped, so no name can break a page."""

from __future__ import annotations

import html
import re

_VOID = {"meta", "input", "line", "polyline", "path", "rect", "circle", "use", "image"}
# Not allowed in XML, and of no use in HTML.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Any value as markup: markup as it is, everything else as text."""
    if isinstance(value, Markup):
        return value
    # A file name that is not UTF-8 has surrogates in Python.
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Markup(html.escape(_CONTROL.sub("", text)))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """``element("td", name, class_="n", data_v=3)`` is ``<td class="n" data-v="3">name</td>``.

    Children that are None and attributes that are None or False are left out. An underscore in an
    attribute's name stands for a dash; one at its end is dropped (``class_``). The result is both
    HTML and XML.
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None and value is not False:
            text = "" if value is True else escape(value)
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{text}"')
    if tag in _VOID:
        return Markup("".join(parts) + "/>")
    return Markup("".join(parts) + ">" + join(*children) + f"</{tag}>")


def join(*children: object) -> Markup:
    """The children one after the other; None is nothing."""
    return Markup("".join(escape(child) for child in children if child is not None))
