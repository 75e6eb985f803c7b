#!/bin/sh
# slim SITE_PACKAGES: takes out of the router's packages what a router never runs, some 100 MB.
# Everything is imported afterwards (deploy/Dockerfile), so what is needed cannot go unnoticed.
set -eu
cd "$1"
# The Kubernetes client twice, blocking and asyncio; the router uses the first. Of the hundreds of
# modules of that one, compiled code suffices.
rm -rf kubernetes/aio
python3 -m compileall -q -b kubernetes
find kubernetes -name '*.py' -delete
find kubernetes -name __pycache__ -prune -exec rm -rf {} +
# What only the asyncio client needs.
rm -rf aiohttp aiohttp_retry
# A faster way to download weights, which a router has no use for; without it, plain HTTP serves.
rm -rf hf_xet
# Hundreds of languages to highlight; the tables of `baton ps` need one at most.
rm -rf pygments/lexers/__pycache__ pygments/styles/__pycache__
find pygments/lexers -name '*.py' ! -name __init__.py ! -name _mapping.py ! -name python.py -delete
# What type checkers read.
find . -name '*.pyi' -delete
# Debugging symbols.
find . -name '*.so' -size +1M -exec strip --strip-unneeded {} +
# Sources of compiled modules, and tests.
find . \( -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' \) -delete
find . -type d \( -name tests -o -name testdata \) -prune -exec rm -rf {} +
