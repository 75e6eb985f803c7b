# Sourced by the scripts that measure on a GPU machine: $OUT, packages and kernels that it lacks.
#   SITE=.carry/site.txz   packages that the machine lacks (or wheels in .whl/)
#   JIT=.carry/gpu/jit.tgz kernels built by an earlier call, which leaves them in $OUT
export OUT=${OUT:-bench/out} PYTHONUNBUFFERED=1 FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_LOGGING_LEVEL=error
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
if [ ! -d /tmp/site ]; then
  if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
  elif [ -f "${SITE:-.carry/site.txz}" ]; then
    mkdir -p /tmp/site && tar xJf "${SITE:-.carry/site.txz}" -C /tmp/site
  fi
fi
[ -d /tmp/site ] && export PYTHONPATH=$PYTHONPATH:/tmp/site
jit=${JIT:-.carry/gpu/jit.tgz}
if [ -f "$jit" ]; then # where FlashInfer looks for modules that were built elsewhere
  aot=$(python3 -c 'from importlib.util import find_spec as f; print(f("flashinfer").submodule_search_locations[0])')/data/aot
  mkdir -p /tmp/jit && tar xf "$jit" -C /tmp/jit
  for so in $(find /tmp/jit -name '*.so'); do name=$(basename "$so" .so); mkdir -p "$aot/$name" && cp "$so" "$aot/$name/"; done
fi
