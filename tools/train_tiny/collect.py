"""Read every source's files into clean documents, and say what each source is.

Runs one process a source, since cleaning and parsing a few hundred megabytes is the slowest part of
the preparation on a small machine.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import random
import re
import sysconfig
import urllib.parse
import warnings
import zipfile
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

from .chat import from_manual, from_python
from .small_talk import Exchange
from .sources import Source
from .texts import clean_html, clean_markup, clean_python, without_special_tokens

MAX_FILE_BYTES = 400_000
"""Longer files are tables or generated."""

NOTICE_CHARS = 2_000
"""Where a file's own licence notice stands, if it has one."""

TESTS_KEPT_OF = 5
"""One test file in this many is kept: they are many, long and alike."""

_TEST_PATH = re.compile(r"(^|/)(tests?|idle_test|testing|benchmarks?)/")
_VENDORED_PATH = re.compile(r"(^|/)(_?vendor|_?vendored)/")
_SHARE_ALIKE = re.compile(r"share[- ]?alike|non-?commercial|\b(A|L)?GPL-?[23]", re.IGNORECASE)
_MARKUP = (".rst", ".rst.txt", ".md", ".md.txt", ".rst.gz", ".txt")
_NOT_TEXT = re.compile(r"(requirements|robots|top_level|LICENSE|SOURCES|entry_points|AUTHORS)")


@dataclass(frozen=True)
class Document:
    """One cleaned file."""

    path: str
    """`<package>/<path inside it>`: stable between machines, never absolute."""

    text: str
    exchanges: list[Exchange] = field(default_factory=list)
    """Chat exchanges made from this file."""


@dataclass(frozen=True)
class Found:
    """A source's documents with what the package itself says of its version and licence."""

    source: Source
    version: str
    stated_licence: str
    documents: list[Document]


def collect(source: Source, work: Path, cap_bytes: int) -> Found | None:
    """Documents of `source`, at most `cap_bytes` of code or twice that of anything else; None if it
    is not on this machine."""
    opened = _open(source, work)
    if opened is None:
        return None
    version, licence, files = opened
    documents = []
    budget = 2 * cap_bytes if source.kind in {"stdlib", "debian"} else cap_bytes
    # By hash rather than by name, so that the cap takes an even sample.
    for path, read in sorted(files, key=lambda item: stable_hash(item[0])):
        if source.include and not any(part in path for part in source.include):
            continue
        if _TEST_PATH.search(path) and stable_hash(path) % TESTS_KEPT_OF:
            continue
        document = _document(f"{source.name}{path}", read())
        if document is None:
            continue
        budget -= len(document.text)
        if budget < 0:
            break
        documents.append(document)
    return Found(source, version, licence, documents)


def stable_hash(text: str) -> int:
    """A hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class _Read:
    """Reads one file when called: from disk, gzip-compressed or not, or from an archive."""

    where: Path
    member: str = ""

    def __call__(self) -> bytes:
        if self.member:
            with zipfile.ZipFile(self.where) as archive:
                return archive.read(self.member)
        data = self.where.read_bytes()
        return gzip.decompress(data) if self.where.suffix == ".gz" else data


Files = list[tuple[str, _Read]]


def _open(source: Source, work: Path) -> tuple[str, str, Files] | None:
    """`(version, stated licence, files)`."""
    match source.kind:
        case "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            python = [p for p in root.rglob("*.py") if "site-packages" not in p.parts]
            version = sysconfig.get_python_version()
            return version, "PSF-2.0", [(f"/{p.relative_to(root)}", _Read(p)) for p in python]
        case "installed":
            try:
                package = importlib.metadata.distribution(source.name)
            except importlib.metadata.PackageNotFoundError:
                return None
            found = [
                (f"/{entry}", _Read(Path(str(entry.locate()))))
                for entry in package.files or ()
                if entry.suffix == ".py" and ".." not in entry.parts
            ]
            return package.version, _stated(package.metadata), found
        case "wheel":
            return _open_wheel(source, work)
        case "debian":
            return _open_debian(source, work)


def _open_wheel(source: Source, work: Path) -> tuple[str, str, Files] | None:
    prefix = source.name.replace("-", "_")
    wheels = [p for p in (work / "wheels").glob("*.whl") if p.name.lower().startswith(f"{prefix}-")]
    if not wheels:
        return None
    with zipfile.ZipFile(wheels[0]) as archive:
        names = archive.namelist()
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        message = HeaderParser().parsestr(archive.read(metadata).decode())
    found = [(f"/{n}", _Read(wheels[0], n)) for n in names if n.endswith(".py")]
    return wheels[0].name.split("-")[1], _stated(message), found


def _open_debian(source: Source, work: Path) -> tuple[str, str, Files] | None:
    root = work / "debian" / source.name
    archives = list((work / "debian" / "archives").glob(f"{source.name}_*.deb"))
    if not root.exists() or not archives:
        return None
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    written = [
        p
        for p in files
        if {"_sources", "rst"} & set(p.parts) and "".join(p.suffixes[-2:]).endswith(_MARKUP)
    ]
    # What the authors wrote reads better than what a renderer made of it.
    chosen = written or [p for p in files if p.suffix in {".html", ".en"}]
    version = urllib.parse.unquote(archives[0].name.split("_")[1])
    statement = (root / "usr/share/doc" / source.name / "copyright").read_text(errors="replace")
    names = re.findall(r"^License: *(\S.*)$", statement, re.MULTILINE | re.IGNORECASE)
    licence = names[0] if names else "see debian/copyright"
    return version, licence, [(f"/{p.relative_to(root)}", _Read(p)) for p in chosen]


def _stated(metadata: importlib.metadata.PackageMetadata | Message) -> str:
    """What a distribution's metadata says of its licence, on one line."""
    for key in ("License-Expression", "Classifier", "License"):
        values = [str(value) for value in metadata.get_all(key) or ()]
        if key == "Classifier":
            values = [v.split(" :: ")[-1] for v in values if v.startswith("License")]
        if values:
            return values[0].split("\n")[0][:80]
    return "see the package"


def _document(path: str, data: bytes) -> Document | None:
    if len(data) > MAX_FILE_BYTES or _NOT_TEXT.search(Path(path).name):
        return None
    if _VENDORED_PATH.search(path):
        return None  # Other projects' files, under licences that nobody looked at here.
    try:
        raw = without_special_tokens(data.decode())
    except UnicodeDecodeError:
        return None
    rng = random.Random(stable_hash(path))
    name = path.removesuffix(".gz")
    if name.endswith(".py"):
        if _SHARE_ALIKE.search(raw[:NOTICE_CHARS]):
            return None
        text = clean_python(raw)
        with warnings.catch_warnings():
            # Old sources have invalid escapes; they are somebody else's.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            exchanges = from_python(text, _module_name(name), rng)
    else:
        text = clean_html(raw) if name.endswith((".html", ".en")) else clean_markup(raw)
        exchanges = from_manual(text, rng)
    return Document(path, text, exchanges) if text else None


def _module_name(path: str) -> str:
    """Dotted module name of a Python file: `python/email/utils.py` is `email.utils`."""
    parts = path.removesuffix(".py").split("/")[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
