"""kube-apiserver and kube-controller-manager from Debian's source package, and etcd.

Debian 12 has the source of Kubernetes 1.20 with all that it builds from, and packages only its
client. What the build makes is kept by its version. It takes minutes, more than a test may:
`make test-k8s` runs this module first.

Usage: python -m tests.kubernetes.build
"""

import fcntl
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.debian import PATIENT, SetUpError, apart, cache_folder, install, run, set_up

PROGRAMS = ("kube-apiserver", "kube-controller-manager")
PACKAGES = {
    "dpkg-source": "dpkg-dev",
    "etcd": "etcd-server",
    "gcc": "gcc",
    "go": "golang-go",
    "ip": "iproute2",
    "iptables": "iptables",
    "jq": "jq",
    "make": "make",
    "rsync": "rsync",
    "unshare": "util-linux",
}
"""Program -> the package that holds it. gcc: Go's tools link with it."""

BUILD_LIMIT_S = 2400.0


@dataclass(frozen=True)
class Programs:
    """Where each program of the control plane is."""

    apiserver: Path
    controller_manager: Path
    etcd: Path


def programs(cache: Path) -> Programs:
    """All three, built or installed where they are missing. Raises SetUpError.

    Args:
        cache: where the built programs stay for the next run. About 250 MB.
    """
    if os.geteuid() != 0:
        raise SetUpError("pods of their own network need root")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install(PACKAGES)
        built = _built(cache) or _build(cache)
    etcd = shutil.which("etcd")
    if etcd is None:
        raise SetUpError("etcd-server is installed, and there is no etcd in PATH")
    return Programs(built / PROGRAMS[0], built / PROGRAMS[1], Path(etcd))


def _built(cache: Path) -> Path | None:
    """The newest build that is whole."""
    found = [d for d in cache.glob("1.*") if all((d / name).exists() for name in PROGRAMS)]
    return max(found, key=lambda d: d.stat().st_mtime, default=None)


def _build(cache: Path) -> Path:
    work = cache / "work"
    shutil.rmtree(work, ignore_errors=True)
    source = _source(work)
    version = re.search(r"really([\d.]+\d)", source.name)
    # Generators find themselves by their place under a GOPATH.
    home = source / ".go" / "src" / "k8s.io"
    home.mkdir(parents=True)
    (home / "kubernetes").symlink_to("../../..")
    environment = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GO111MODULE": "off",
        # Without the drivers of the public clouds, which make half of the code.
        "GOFLAGS": "-tags=providerless",
        "GOPATH": str(source / ".go"),
        "HOME": str(work),
    }
    what = " ".join(f"cmd/{name}" for name in PROGRAMS)
    run(
        *("make", f"WHAT={what}"),
        directory=source,
        environment=environment,
        limit_s=BUILD_LIMIT_S,
    )
    target = cache / (version[1] if version else "1.unknown")
    fresh = work / "fresh"
    fresh.mkdir()
    for name in PROGRAMS:
        shutil.copy2(source / "_output" / "bin" / name, fresh / name)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    shutil.rmtree(work)
    return target


def _source(work: Path) -> Path:
    """Debian's signed source, unpacked and patched."""
    options = apart(work, "deb-src {} bookworm main")
    run("apt-get", *options, *PATIENT, "update")
    run("apt-get", *options, *PATIENT, "source", "kubernetes", directory=work)
    (source,) = (path for path in work.glob("kubernetes-*") if path.is_dir())
    return source


if __name__ == "__main__":
    sys.exit(set_up(lambda: f"kube-apiserver is {programs(cache_folder('kubernetes')).apiserver}"))
