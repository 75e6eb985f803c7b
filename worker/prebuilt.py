"""`python -m worker.prebuilt`: builds the C of engine and kvtransfer for each level of
x86-64, into where a worker without a compiler looks for it (native/prebuilt.py).
"""

import shutil
import sys

from engine.models import cpu_library
from kvtransfer import cpu_digest
from native.levels import levels
from native.library import build, file_name
from native.prebuilt import prebuilt_directory


def main() -> int:
    """The exit status."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("no C compiler (cc)", file=sys.stderr)
        return 1
    prebuilt_directory().mkdir(parents=True, exist_ok=True)  # for everybody to read
    for sources in (cpu_library.SOURCES, cpu_digest.SOURCES):
        for level in levels():
            path = prebuilt_directory() / file_name(sources, level)
            build(sources, path, compiler=compiler, target=level)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
