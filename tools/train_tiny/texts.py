"""Turn files into plain text worth learning from, or into nothing.

Three kinds come in: Python sources, reStructuredText or Markdown, and HTML pages. What goes out has
no licence headers (the same thousand characters in front of every file teach nothing), no markup
that only a renderer reads, and no tables of data.
"""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser

from .settings import SPECIAL_TOKENS

MIN_CHARS = 200
"""Shorter files are re-exports and stubs."""

_BLOCKS = {"p", "div", "section", "article", "table", "tr", "ul", "ol", "dl", "blockquote", "br"}
_SKIPPED = {"script", "style", "nav", "header", "footer", "head", "svg", "button", "form"}
_CHROME = re.compile(r"navheader|navfooter|sidebar|related|headerlink|toctree|breadcrumb|menu")
_VOID = {"br", "img", "hr", "meta", "link", "input", "col", "wbr", "area", "base", "source"}


def clean_python(text: str) -> str:
    """The source without its leading licence comment; "" if it is data rather than code."""
    lines = text.replace("\r\n", "\n").split("\n")
    lead = 0
    while lead < len(lines) and (lines[lead].startswith("#") or not lines[lead].strip()):
        lead += 1
    if re.search(r"licen[sc]e|copyright|#!|coding[:=]", "\n".join(lines[:lead]), re.IGNORECASE):
        lines = lines[lead:]
    text = "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"
    return "" if _is_data(text) else text


def clean_markup(text: str) -> str:
    """reStructuredText or Markdown with roles, labels and index directives reduced to words."""
    text = text.replace("\r\n", "\n")
    text = re.sub(r":[\w+:.-]+:`[!~]?([^`<]*?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w+:.-]+:`[!~]?([^`]*)`", r"`\1`", text)
    text = re.sub(r"`([^`<\n]+?)\s*<[^`>\n]+>`_+", r"\1", text)
    text = re.sub(r"\|([\w ]+)\|_?", r"\1", text)
    kept: list[str] = []
    dropping: int | None = None
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        if dropping is not None and (not line.strip() or indent > dropping):
            continue
        dropping = None
        if re.match(
            r"\s*\.\. (_|index|toctree|include|contents|module|currentmodule|meta|image|figure"
            r"|highlight|sectionauthor|moduleauthor|only|raw|autosummary|py:module|\|)",
            line,
        ):
            dropping = indent
            continue
        if re.match(r"\s*:(maxdepth|synopsis|hidden|caption|noindex|platform|orphan)\b", line):
            continue
        kept.append(line.rstrip())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"
    return text if _is_english(text) and not _is_data(text) else ""


class _PageText(HTMLParser):
    """Collects the readable part of an HTML page as lightly marked-up text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self._skip: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag == "br":
                self.out.append("\n")
            return
        names = " ".join(v or "" for k, v in attrs if k in {"class", "id", "role"})
        if self._skip or tag in _SKIPPED or _CHROME.search(names):
            self._skip.append(tag)
            return
        if tag == "pre":
            self._pre += 1
            self.out.append("\n\n")
        elif re.fullmatch(r"h[1-6]", tag):
            self.out.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag in {"li", "dt"}:
            self.out.append("\n\n- " if tag == "li" else "\n\n")
        elif tag == "dd":
            self.out.append("\n")
        elif tag in {"td", "th"}:
            self.out.append(" ")
        elif tag in _BLOCKS:
            self.out.append("\n\n")
        elif tag in {"code", "tt"} and not self._pre:
            self.out.append("`")

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if self._skip:
            # Pages leave <p> and <li> open; close up to the tag that really ends.
            if tag in self._skip:
                while self._skip.pop() != tag:
                    pass
            return
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
            self.out.append("\n\n")
        elif re.fullmatch(r"h[1-6]", tag) or tag in _BLOCKS:
            self.out.append("\n\n")
        elif tag in {"code", "tt"} and not self._pre:
            self.out.append("`")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.out.append(data if self._pre else re.sub(r"\s+", " ", data))


def clean_html(page: str) -> str:
    """The text of an HTML page, headings as `#`, literal code kept as it is laid out."""
    body = re.search(r"<(main|article)\b.*</\1>", page, re.DOTALL)
    parser = _PageText()
    parser.feed(body.group(0) if body else page)
    text = "".join(parser.out).replace("\N{PILCROW SIGN}", "").replace("``", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n (?=\S)", "\n", text)
    text = re.sub(r"- \n+", "- ", text)
    # Five short items in a row are navigation: a table of contents, a list of sibling pages.
    text = re.sub(r"(?:^- .{0,70}\n+){5,}", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text if _is_english(text) and not _is_data(text) else ""


def without_special_tokens(text: str) -> str:
    """Text in which no special token is spelled out: only the preparation may place those."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text


def long_line_hashes(text: str, min_chars: int) -> list[tuple[int, int]]:
    """`(hash, characters)` of each stripped line of at least `min_chars`; stable between runs."""
    found = []
    for line in text.split("\n"):
        stripped = line.strip()
        if len(stripped) >= min_chars:
            digest = hashlib.blake2b(stripped.encode(), digest_size=8).digest()
            found.append((int.from_bytes(digest, "little"), len(stripped)))
    return found


def _is_english(text: str) -> bool:
    """Whether the commonest English word is about as common as in technical English."""
    return text.lower().count(" the ") * 1500 > len(text)


def _is_data(text: str) -> bool:
    """Whether text is too short, or mostly numbers, blobs or tables."""
    if len(text) < MIN_CHARS:
        return True
    lines = text.split("\n")
    if max(map(len, lines)) > 4000 or len(text) / len(lines) > 400:
        return True
    sample = text[:20_000] + text[len(text) // 2 : len(text) // 2 + 20_000]
    letters = sum(c.isalpha() for c in sample)
    digits = sum(c.isdigit() for c in sample)
    spaces = sum(c.isspace() for c in sample)
    return letters < 0.4 * (len(sample) - spaces) or digits > 0.2 * (len(sample) - spaces)
