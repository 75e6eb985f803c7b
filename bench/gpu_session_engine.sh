#!/usr/bin/env bash
# The engine's tests and figures in one call on a machine with a Hopper GPU, the most telling first,
# each under its own time limit, so that one that fails or hangs does not stop the rest; a table last.
# SITE, JIT and OUT as in gpu_setup.sh.
#   STEPS="tests decode ..."  some of the steps only (tp_tests and tp_decode: gpu_session_tp.sh)
# Results go to $OUT (default: bench/out). Building kernels takes 100 s of 16 cores the first time.
set -u
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
source bench/gpu_setup.sh
table=$OUT/table.txt
: >"$table"
step() { # name, seconds, lines of the table, command...
  local name=$1 limit=$2 lines=$3 begin=$SECONDS; shift 3
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1; local status=$?
  { echo "== $name: status $status, $((SECONDS - begin)) s"
    grep -vE 'Warning|warn|^$' "$OUT/$name.log" | grep -v "capturing decode" | tail -n "$lines" | cut -c1-170; } | tee -a "$table"
}
T=tests/engine/execution
PYTEST="python3 -m pytest -p no:cacheprovider -q -m gpu --timeout 60 --timeout-method thread -rfEs"
for want in ${STEPS:-kernels accuracy tests decode memory warmup cost offline fp8 deterministic}; do
  case $want in
  kernels) [ -f "$jit" ] || step kernels 200 3 python3 bench/gpu_kernels.py ;;
  accuracy) step accuracy 60 16 $PYTEST -s --tb=line $T/test_gpu_accuracy.py ;;
  tests) for file in $T/test_gpu.py $T/test_gpu_scheduler.py $T/test_gpu_memory.py tests/engine/memory/test_host_tier_gpu.py $T/test_token_mask.py; do
      step "$(basename "$file" .py)" 60 12 $PYTEST --tb=short "$file" # a process each: none can spoil another
    done ;;
  decode) step decode 75 46 python3 bench/gpu_scheduler.py --overlap on --rows 256 --kernels 1,8,64 --prefill --no-offline --figure "$OUT/idle.svg" --json "$OUT/decode.json" ;;
  mixed) step mixed 60 30 $PYTEST --tb=short $T/test_gpu_scheduler.py $T/test_gpu_memory.py ;;
  products) step products 45 24 python3 bench/gpu_products.py --json "$OUT/products.json" ;;
  memory) step memory 60 12 python3 bench/gpu_memory.py ;;
  warmup) step warmup 60 12 python3 -m baton warmup --model models/baton-tiny --kernel-cache "$OUT/kernel-cache" ;;
  cost) step cost 60 24 python3 bench/gpu_scheduler.py --overlap on --batches 1,64,256 --rows 256 --kernels 1 --prefill --no-offline --deterministic --json "$OUT/deterministic.json" ;;
  offline) step offline 85 6 python3 bench/gpu_scheduler.py --overlap on --batches "" --json "$OUT/offline.json" ;;
  fp8) step fp8 40 12 python3 bench/gpu_scheduler.py --overlap on --batches 1,64,256 --rows 256 --kernels "" --no-offline --kv-cache-dtype fp8_e4m3 --json "$OUT/fp8.json" ;;
  deterministic) step deterministic 80 14 $PYTEST $T/test_gpu_deterministic.py ;;
  tp_tests) step tp_tests 85 30 $PYTEST -s --tb=short tests/engine/parallel/test_tensor_parallel_gpu.py ;;
  tp_decode) step tp_decode 60 12 python3 bench/gpu_tp.py ;;
  esac
done
[ -f "$jit" ] || tar czf "$OUT/jit.tgz" -C "$HOME/.cache" --exclude='*.o' --exclude='*.d' flashinfer 2>/dev/null
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader | tee -a "$table"
echo "==== all ===="
cat "$table"
