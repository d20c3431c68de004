"""Extracts the text of an HTML page of license terms, without its scripts, styles and menus."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any


class _Text(HTMLParser):
    """Collects the text of an HTML article, with a blank line between its blocks."""

    _BLOCKS = ("p", "h1", "h2", "h3", "h4", "li", "tr", "div", "section", "ol", "ul")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.inside = 0
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside += ("class", "devsite-article-body") in [(k, (v or "").split()[0] if v else "") for k, v in attrs] or (
            tag == "div" and self.inside > 0
        )
        self.silent += tag in ("script", "style", "template", "button")
        if tag in self._BLOCKS:
            self.parts.append("\n\n")
        if tag == "li":
            self.parts.append("- ")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "div" and self.inside > 0
        self.silent -= tag in ("script", "style", "template", "button") and self.silent > 0

    def handle_data(self, data: str) -> None:
        if self.inside and not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))


def text_of(html: bytes) -> str:
    """Plain text, with a blank line between its blocks."""
    parser = _Text()
    parser.feed(html.decode("utf-8", "replace"))
    blocks = ("".join(parser.parts)).split("\n\n")
    return "\n\n".join(line for block in blocks if (line := " ".join(block.split())) and line != "-") + "\n"
