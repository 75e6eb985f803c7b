"""Where the training text comes from, and under which licence.

Only text whose licence allows copies and derived works without a share-alike duty is listed. What
a licence field here says was read from the package (`debian/copyright`, or the wheel's metadata);
`prepare.py` reads it again and writes both, with the version it met, into the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["stdlib", "installed", "wheel", "debian"]


@dataclass(frozen=True)
class Source:
    """One package whose text is used."""

    kind: Kind
    """`stdlib`: this interpreter's own library; `installed`: a distribution of this environment;
    `wheel`: fetched from PyPI, never installed; `debian`: a documentation package."""

    name: str
    """Name of the distribution or of the Debian package."""

    licence: str
    """SPDX expression of the parts that are read."""

    include: tuple[str, ...] = ()
    """Substrings, one of which a file's path must have; empty takes every suitable file."""


def _all(kind: Kind, licences: dict[str, str]) -> tuple[Source, ...]:
    return tuple(
        Source(kind, name, licence) for licence, names in licences.items() for name in names.split()
    )


STDLIB = (Source("stdlib", "python", "PSF-2.0"),)

INSTALLED = _all(
    "installed",
    {
        "MIT": "anyio fastapi filelock h11 mypy pip platformdirs "
        "pluggy pre-commit pydantic pytest PyYAML rich setuptools typer typing-inspection "
        "virtualenv wheel",
        "BSD-3-Clause": "click fsspec httpcore httpx idna Jinja2 MarkupSafe mpmath networkx psutil "
        "starlette sympy torch uvicorn protobuf nodeenv",
        "BSD-3-Clause AND MIT": "numpy",
        "BSD-2-Clause": "Pygments grimp import-linter",
        "Apache-2.0": "grpcio huggingface-hub openai opentelemetry-api packaging "
        "prometheus-client pytest-asyncio sortedcontainers transformers",
        "PSF-2.0": "typing-extensions distlib",
    },
)

WHEELS = _all(
    "wheel",
    {
        "BSD-3-Clause": "astropy celery dask distributed django flask ipython kombu pandas "
        "scikit-image scikit-learn scipy statsmodels werkzeug",
        "BSD-2-Clause": "sphinx",
        "MIT": "black poetry sqlalchemy textual twisted urllib3",
        "Apache-2.0": "jax keras nltk requests tornado xarray",
        "Apache-2.0 AND MIT": "aiohttp",
        "BSD-derived (Repoze)": "pyramid",
        "PSF-based (Matplotlib)": "matplotlib",
        "Public Domain AND BSD-2-Clause AND PSF-2.0": "docutils",
    },
)

DEBIAN = (
    *_all(
        "debian",
        {
            "PSF-2.0": "python3.11-doc",
            "PostgreSQL": "postgresql-doc-15",
            "Public Domain": "sqlite3-doc",
            "BSD-3-Clause": "python-django-doc python-pandas-doc python-dask-doc "
            "python-distributed-doc python-flask-doc python-werkzeug-doc python-jinja2-doc "
            "python-kombu-doc python-ipython-doc python-sympy-doc",
            "BSD-2-Clause": "sphinx-doc",
            "MIT": "python-sqlalchemy-doc python-pytest-doc python-setuptools-doc twisted-doc "
            "nodejs-doc",
            "Apache-2.0": "python-tornado-doc python-aiohttp-doc python-requests-doc "
            "cinder-doc keystone-doc nova-doc neutron-doc",
            "Apache-2.0 WITH LLVM-exception": "llvm-15-doc",
        },
    ),
    Source("debian", "apache2-doc", "Apache-2.0", include=("/manual/en/",)),
    Source(
        "debian",
        "rust-doc",
        "MIT OR Apache-2.0",
        # The books; the generated API pages are half a gigabyte of tables, and the embedded book's
        # prose is under a share-alike licence.
        include=tuple(
            f"/html/{book}/"
            for book in (
                "book",
                "edition-guide",
                "nomicon",
                "reference",
                "rust-by-example",
                "rustc",
                "rustdoc",
            )
        ),
    ),
)

SOURCES: tuple[Source, ...] = (*STDLIB, *DEBIAN, *INSTALLED, *WHEELS)
