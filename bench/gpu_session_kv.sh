#!/usr/bin/env bash
# The KV handover on a machine with two GPUs, in one call (its limits add up to 225 s): cuda_ipc's tests on real
# GPUs, kv_handover.py, and end_to_end.py at 30 requests/s over cuda_ipc and over NIXL. Wheels that
# the machine lacks lie in .whl, or unpacked in .carry/site.txz; results go to $OUT.
set -u
cd "$(dirname "$0")/.."
export OUT=${OUT:-bench/out} PYTHONUNBUFFERED=1 FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_LOGGING_LEVEL=error
mkdir -p "$OUT"
site=/tmp/site
if compgen -G '.whl/*.whl' >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $site .whl/*.whl || exit 1
fi
if [ -f .carry/site.txz ] && [ ! -d $site ]; then mkdir -p $site && tar xJf .carry/site.txz -C $site; fi
export PYTHONPATH=$PWD:$site
for jit in .carry/gpu/jit.tgz .carry/jit.tgz; do # kernels of an earlier call; sources must look older
  [ -f $jit ] && mkdir -p ~/.cache && tar xf $jit -C ~/.cache && find $site -exec touch -h -d 2020-01-01 {} +
done
step() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS; shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "$name: status $?, $((SECONDS - begin)) s" | tee -a "$OUT/steps.txt"
}
: >"$OUT/steps.txt"
e2e=(python3 bench/end_to_end.py --shape 8b --lengths 2048 --rates 30 --duration 12 "--flags=--cuda-graph-max-batch=128")
step tests 45 python3 -m pytest -q -rA -p no:cacheprovider tests/kvtransfer/test_cuda_ipc_gpu.py -k "0to1 or window"
step handover 50 python3 bench/kv_handover.py --rounds 5 --json "$OUT/handover.json" --plot "$OUT/handover.svg"
step e2e_cuda_ipc 65 "${e2e[@]}" --transports cuda_ipc --json "$OUT/e2e_cuda_ipc.json"
step e2e_nixl 65 "${e2e[@]}" --transports nixl --json "$OUT/e2e_nixl.json"
echo "== tests"; grep -E "^(PASSED|FAILED|ERROR|E  )|passed|failed" "$OUT/tests.log" | tail -n 25
echo "== handover"; grep -vE "[Ww]arn" "$OUT/handover.log" | awk 'BEGIN{n=0} /^$/{n=1} n' | tail -n 60
for name in e2e_cuda_ipc e2e_nixl; do
  echo "== $name"; grep -vE "[Ww]arn" "$OUT/$name.log" | tail -n 8
done
cat "$OUT/steps.txt"
