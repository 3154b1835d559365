#!/usr/bin/env bash
# Everything worth running on a machine with a GPU, one stage after another:
#
#     bench/gpu.sh ceilings tests step
#
#   ceilings   what the machine can do at our shapes (bench.ceilings), one result file per group of figures
#   tests      the tests that need a GPU (pytest -m gpu), their output as a text file
#   kernels    every operation of fastjepa_kernels beside what it replaces (bench/test_kernels.py)
#   step       whole training steps of ViT-L, ViT-H and ViT-H 384 in pairs of ways (bench/test_step.py), the pairs that
#              matter most first; what the time does not allow is a row that says so
#   public     the library's step beside the public code's (bench/test_public.py); JEPA_REPO names a checkout of it
#   data       decoders and the loader, alone and beside a step, and what a step costs by its sizes
#              (bench/test_data.py, bench/test_scaling.py)
#   profile    the components and the most expensive kernels of a ViT-H step (bench.step), as a text file
#
# A stage has 540 seconds and begins no case that could take longer. Not all cases of a stage need fit: those that matter
# most come first, what was left out says so, and BENCH_ARGS="-k vith" or "-k scaling" measures a part of them, which the
# report puts together with the rest. A stage that fails or takes longer does not stop the next, but the
# script then ends with 1.
# Environment:
#   PYTHON          the interpreter (python)
#   OUT             where results go, relative to the repository (bench/results)
#   BENCH_ARGS      more arguments for pytest in the stages kernels, step, public and data, split at spaces, e.g.
#                   "-k vith": some of the cases, in a result file of their own
#   PROFILE_ARGS    more arguments for bench.step, e.g. "--models vitl --way reference"
#   CEILINGS_ARGS   more arguments for bench.ceilings; "--quick --device cpu" tries it anywhere
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
out=${OUT:-bench/results}
limit=540
valid="ceilings tests kernels step public data profile"

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

# Cases of pytest-benchmark, of which none begins after $1 seconds: as long as the longest takes before the limit.
# Without a figure there is no result: where all of them are skipped, the stage has failed.
cases() {
    local budget=$1
    shift
    # shellcheck disable=SC2086
    limited "$python" -m pytest -q "$@" --benchmark-only --results "$out" --budget "$budget" ${BENCH_ARGS:-} &&
        [[ -n $(find "$out" -name '*.json' -newer "$marker" -print -quit) ]]
}

run_ceilings() {
    # --device cuda: where CUDA is broken this must fail, not measure the processor. CEILINGS_ARGS comes last and wins.
    # shellcheck disable=SC2086
    limited "$python" -m bench.ceilings --device cuda --out "$out" ${CEILINGS_ARGS:-}
}

run_tests() {
    limited "$python" -m pytest -q -rs -m gpu tests 2>&1 | tee "$out/tests-gpu-$(date -u +%Y-%m-%d).txt"
}

run_kernels() { cases 500 bench/test_kernels.py; }

run_step() { cases 360 bench/test_step.py; }

run_public() { cases 360 bench/test_public.py; }

run_data() { cases 420 bench/test_data.py bench/test_scaling.py; }

run_profile() {
    # shellcheck disable=SC2086
    limited "$python" -m bench.step --device cuda --models vith --out "$out" ${PROFILE_ARGS:-}
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
