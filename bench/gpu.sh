#!/usr/bin/env bash
# One call on a machine with GPUs: engine check, engine figures, KV transports, end to end on one and
# on two GPUs. SITE, JIT and OUT as in gpu_setup.sh.
set -u
cd "$(dirname "$0")/.."
source bench/gpu_setup.sh
step() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS; shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; local status=$?
  grep -vE 'Warning|warn' "$OUT/$name.log" | tail -n "${LINES_SHOWN:-24}"
  echo "-- $name: status $status, $((SECONDS - begin)) s"
}
gpus=$(nvidia-smi -L | wc -l)
for want in ${STEPS:-engine graphs transports one two}; do
  case $want in
  engine) step engine 240 python3 bench/gpu_engine_check.py --head-dims 128 ;;
  scheduler) step scheduler 200 python3 bench/gpu_scheduler.py ;;
  graphs) step graphs 120 python3 bench/gpu_engine_check.py --graphs --head-dims 128 ;;
  transports) [ "$gpus" -gt 1 ] && step transports 45 python3 bench/kv_transports.py --source cuda:0 --target cuda:1
    [ "$gpus" -gt 1 ] && UCX_TLS=cuda_ipc,cuda_copy,tcp,self step transports_tls 45 python3 bench/kv_transports.py --source cuda:0 --target cuda:1 ;;
  one) CUDA_VISIBLE_DEVICES=0 step one 110 python3 bench/end_to_end.py --shape 8b --rates "${RATES_ONE:-5,10}" --duration 8 ${E2E:-} --transports "${TRANSPORTS:-nixl}" ;;
  two) [ "$gpus" -gt 1 ] && step two 200 python3 bench/end_to_end.py --shape 8b --rates "${RATES_TWO:-20,30,36}" --duration ${DURATION:-12} ${E2E:-} --transports "${TRANSPORTS:-nixl}" ;;
  esac
done
tar czf "$OUT/jit.tgz" -C "$HOME/.cache" flashinfer 2>/dev/null
ls -la "$OUT"
