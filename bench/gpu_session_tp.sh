#!/usr/bin/env bash
# Tensor parallelism on a machine with two GPUs, in one call of at most 150 s: its tests, then
# bench/gpu_tp.py. A failure is printed as it happens, and whatever hangs is ended with the stacks of
# all its threads. SITE, JIT and OUT as in gpu_setup.sh.
set -u
cd "$(dirname "$0")/.."
export CUDA_VISIBLE_DEVICES=${TP_DEVICES:-0,1} NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=1
exec env STEPS="${STEPS:-tp_tests tp_decode}" bash bench/gpu_session_engine.sh
