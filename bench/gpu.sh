#!/usr/bin/env bash
# Everything worth running on a machine with a GPU, one stage after another:
#
#     bench/gpu.sh ceilings tests
#
#   ceilings   what the machine can do at our shapes (bench.ceilings), one result file per group of figures
#   kernels    every operation of fastjepa_kernels against eager, compiled and library PyTorch (bench/test_kernels.py)
#   step       whole training steps of ViT-L and ViT-H in every way of taking one (bench.steps), one result file a
#              model; the models share 480 s, so that ways may be missing: one model at a time (STEP_ARGS) has them all
#   profile    the components and the most expensive kernels of a ViT-H step (bench.steps --profile), as a text file
#   tests      the tests that need a GPU (pytest -m gpu), their output as a text file
#
# A stage has 540 seconds. One that fails or takes longer does not stop the next, but the script then ends with 1.
# Environment:
#   PYTHON          the interpreter (python)
#   OUT             where results go, relative to the repository (bench/results)
#   STEP_ARGS       more arguments for bench.steps in both of its stages, split at spaces, e.g. "--models vith_384";
#                   "--quick --device cpu" tries them anywhere
#   CEILINGS_ARGS   more arguments for bench.ceilings, split at spaces; "--quick --device cpu" tries the script anywhere
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
out=${OUT:-bench/results}
limit=540
valid="ceilings kernels step profile tests"

if (($# == 0)); then
    echo "Usage: bench/gpu.sh STAGE..., where a stage is one of: $valid." >&2
    exit 2
fi
for stage in "$@"; do
    if [[ " $valid " != *" $stage "* ]]; then
        echo "Stage '$stage' does not exist; the stages are: $valid." >&2
        exit 2
    fi
done
mkdir -p "$out"

# Runs "$@" for at most the limit; the second signal is for a process that a stuck kernel keeps from ending.
limited() { timeout --kill-after=10 "$limit" "$@"; }

run_ceilings() {
    # --device cuda: where CUDA is broken this must fail, not measure the processor. CEILINGS_ARGS comes last and wins.
    # shellcheck disable=SC2086
    limited "$python" -m bench.ceilings --device cuda --out "$out" ${CEILINGS_ARGS:-}
}

run_kernels() {
    local file
    file="$out/kernels-$(date -u +%Y-%m-%d).json"
    # The repository's own options skip benches. Without CUDA all of them are skipped: then no file means no result.
    limited "$python" -m pytest -q -rs -o addopts="--import-mode=importlib --strict-markers" bench/test_kernels.py \
        --benchmark-only --benchmark-json="$file" && [[ -s $file ]]
}

run_step() {
    # shellcheck disable=SC2086
    limited "$python" -m bench.steps --device cuda --models vitl,vith --budget 480 --out "$out" ${STEP_ARGS:-}
}

run_profile() {
    # shellcheck disable=SC2086
    limited "$python" -m bench.steps --device cuda --profile --models vith --out "$out" ${STEP_ARGS:-}
}

run_tests() {
    limited "$python" -m pytest -q -rs -m gpu tests 2>&1 | tee "$out/tests-gpu-$(date -u +%Y-%m-%d).txt"
}

marker=$(mktemp)
trap 'rm -f "$marker"' EXIT
exit_code=0
rows=()
for stage in "$@"; do
    echo "== $stage"
    touch "$marker"
    sleep 0.05 # file times move in ticks: a file of this stage must be newer than the marker
    started=$SECONDS
    code=0
    "run_$stage" || code=$?
    case $code in
        0) verdict=ok ;;
        124) verdict="timed out" ;;
        137) verdict=killed ;; # after the limit, or by the system for want of memory
        *) verdict="failed ($code)" ;;
    esac
    ((code == 0)) || exit_code=1
    mapfile -t files < <(find "$out" -type f -newer "$marker" ! -name '.*' -printf '%f\n' | sort)
    rows+=("$(printf '%-10s %8d  %-12s %s' "$stage" "$((SECONDS - started))" "$verdict" "${files[0]:-none}")")
    for file in "${files[@]:1}"; do
        rows+=("$(printf '%-10s %8s  %-12s %s' '' '' '' "$file")")
    done
done

echo
printf '%-10s %8s  %-12s %s\n' stage seconds verdict "files in $out"
printf '%s\n' "${rows[@]}"
exit $exit_code
