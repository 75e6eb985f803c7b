#!/usr/bin/env bash
# Make models/baton-tiny from nothing: fetch, prepare, train in pieces, evaluate, export.
#
#   tools/train_tiny/run.sh [OUT]            the real thing, one GPU, under 20 minutes
#   MINIATURE=1 tools/train_tiny/run.sh OUT  the same path at a toy's size, on a CPU
#
# Stop it whenever you like and start it again: finished steps are skipped, training resumes.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-models/baton-tiny}
work=${WORK:-build/train_tiny}
python=${TRAIN_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
small=${MINIATURE:+--miniature}

step() { "$python" -m "tools.train_tiny.$1" --work "$work" "${@:2}"; }

if [ ! -f "$work/corpus/manifest.json" ]; then
  step fetch
  step prepare
fi
# Each piece saves and stops in under nine minutes; the file says when the budget is used up.
until [ -f "$work/run/done" ]; do
  step train $small ${TRAIN_ARGS:-}
done
step evaluate $small ${EVALUATE_ARGS:-}
step export $small --out "$out"
