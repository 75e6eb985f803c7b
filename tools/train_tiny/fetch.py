"""Download the packages that `sources.py` lists and this machine lacks, without installing them.

Debian packages come through `apt-get download`, wheels through `pip download`: the ordinary
clients with whatever mirrors they are configured for. On a machine without apt the Debian part is
skipped with a warning, and the corpus is smaller.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from .settings import DEFAULT_WORK
from .sources import DEBIAN, WHEELS, Source

TEXT_SUFFIXES = (".html", ".en", ".rst", ".md", ".txt", ".rst.gz", ".txt.gz")


def fetch_debian(folder: Path) -> None:
    """Download and unpack each Debian package into `folder/<package>/`."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print("no apt here: the Debian documentation is left out", file=sys.stderr)
        return
    downloads = folder / "archives"
    downloads.mkdir(parents=True, exist_ok=True)
    missing = [s.name for s in DEBIAN if not list(downloads.glob(f"{s.name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=downloads, check=True)
    for source in DEBIAN:
        target = folder / source.name
        if not target.exists():
            unpack(next(downloads.glob(f"{source.name}_*.deb")), source, target)


def unpack(archive: Path, source: Source, target: Path) -> None:
    """Unpack what may be read of a Debian package: text files and the copyright statement.

    The rest, such as half a gigabyte of generated API pages, would take minutes to write."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    partial = target.with_name(target.name + ".partial")
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as members,
    ):
        for member in members:
            if member.isfile() and _is_wanted(member.name, source):
                members.extract(member, partial, filter="data")
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    partial.rename(target)


def _is_wanted(name: str, source: Source) -> bool:
    if name.endswith("/copyright"):
        return True
    included = not source.include or any(part in name for part in source.include)
    return included and name.endswith(TEXT_SUFFIXES)


def fetch_wheels(folder: Path) -> None:
    """Download each wheel into `folder`; they are read as zip archives."""
    folder.mkdir(parents=True, exist_ok=True)
    have = {p.name.split("-")[0].lower().replace("_", "-") for p in folder.glob("*.whl")}
    missing = [s.name for s in WHEELS if s.name not in have]
    if missing:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "-d", str(folder), *missing], check=True)


def main() -> None:
    """Fill `<work>/debian` and `<work>/wheels`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    work: Path = parser.parse_args().work
    fetch_debian(work / "debian")
    fetch_wheels(work / "wheels")


if __name__ == "__main__":
    main()
