#!/bin/sh
# install-locked ENVIRONMENT LOCK: installs exactly what a lock file names, hashes checked, into a
# virtual environment of the image. Wheels in /wheels come first; without network they suffice.
set -eu
environment=$1 lock=$2
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
if [ -z "${PIP_INDEX_URL:-}" ]; then
    unset PIP_INDEX_URL
fi
set -- --quiet --require-hashes --no-deps --only-binary :all: --requirement "$lock"
if [ "$environment" = /tools ]; then
    exec /tools/bin/pip install "$@"
fi
# A lock of one package that lies at hand needs no index, and must not wait for one out of reach.
wheel=$(sed -n 's/^torch==\([^ ]*+[^ ]*\).*/torch-\1-/p' "$lock")
if [ -n "$wheel" ] && ls /wheels/"$wheel"*.whl >/dev/null 2>&1; then
    set -- --no-index "$@"
fi
exec /tools/bin/pip --python "$environment/bin/python" install --find-links /wheels "$@"
