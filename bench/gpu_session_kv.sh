#!/usr/bin/env bash
# The KV handover on a machine with two GPUs, in one call (its limits add up to 225 s): cuda_ipc's tests on real
# GPUs, kv_handover.py, and end_to_end.py at RATES requests/s over cuda_ipc and over NIXL. SITE, JIT
# and OUT as in gpu_setup.sh.
set -u
cd "$(dirname "$0")/.."
source bench/gpu_setup.sh
step() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS; shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "$name: status $?, $((SECONDS - begin)) s" | tee -a "$OUT/steps.txt"
}
: >"$OUT/steps.txt"
e2e=(python3 bench/end_to_end.py --shape 8b --lengths 2048 --rates "${RATES:-30}" --duration "${DURATION:-12}" "--flags=--cuda-graph-max-batch=128")
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
