"""Where libraries lie that were built with an image, beside the packages that call them."""

import sys
from pathlib import Path


def prebuilt_directory() -> Path:
    return Path(sys.prefix) / "lib" / "baton-native"
