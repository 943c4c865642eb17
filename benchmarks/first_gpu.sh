#!/usr/bin/env bash
# A GPU in two calls of under ten minutes each: is it right, then how fast is it.
#
#   benchmarks/first_gpu.sh check   FOLDER    # tests of every kernel, and compute-sanitizer on the small cases
#   benchmarks/first_gpu.sh measure FOLDER    # launch shapes, the benchmark's tables, counters of the slowest kernels
#
# Logs and results go to FOLDER; a line per step says how it ended. CHECK_S and MEASURE_S bound a step of each, in
# seconds (from hidden states it is a minute more); PYTHON, WORKERS and COMMIT (of a checkout without git) can be set.
# compute-sanitizer and ncu are used where they are found.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:?check or measure}
out=$(mkdir -p "${2:?a folder for logs and results}" && cd "$2" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: its output in FOLDER/NAME.log, its last line and exit status here.
step() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - begin)) s: $(tail -n 1 "$out/$name.log")"
}

tests() { "$python" -m pytest -q -p no:benchmark -p no:cacheprovider "$@"; }
sanitized() { # TOOL PYTEST-ARGUMENTS...
    local tool=$1
    shift
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes application-only \
        --error-exitcode 9 "$python" -m pytest -q -p no:benchmark -p no:cacheprovider -p no:xdist tests/kernels/test_gpu.py "$@"
}
counters() { # KERNEL OF-TUNE
    ncu --clock-control none --launch-skip 1 --launch-count 1 -k "regex:$1" --section SpeedOfLight --section LaunchStats \
        --section MemoryWorkloadAnalysis --section SchedulerStats --section WarpStateStats --section Occupancy \
        "$python" - "$2" <<'PROGRAM'
import sys

import torch

from benchmarks.tune import Key, generation, workload

device = torch.device("cuda", 0)
run = workload(Key(sys.argv[1], generation(device), "bf16", 151936), device, 8192)
for _ in range(3):
    run()
torch.cuda.synchronize()
PROGRAM
}
export -f tests sanitized counters
export python

case $what in
check)
    limit=${CHECK_S:-240} workers=${WORKERS:-6}
    "$python" -m pytest --version >/dev/null || exit 1
    step gpu "$limit" bash -c "tests -m gpu tests/kernels/test_gpu.py -n $workers" &
    step kernels "$limit" bash -c "tests -n $workers tests/losses/test_token_pass.py tests/logits/test_statistics.py \
        tests/logits/test_gradient_in_forward.py tests/tokens/test_entropy_quantile.py tests/kernels/test_launch.py tests/entropy/test_temperature.py" &
    if command -v compute-sanitizer >/dev/null; then
        step memcheck "$limit" bash -c 'sanitized memcheck -k "(statistics and (3-7- or 300-1000 or 3-50257)) or cutoff \
            or temperature or from_logits or single_launch_is or from_hidden"' &
        # Not from hidden states: inside cuBLAS it finds hazards, or fails itself.
        step racecheck "$limit" bash -c 'sanitized racecheck -k "(statistics and (3-1000 or 300-1000)) or (cutoff and 4097) \
            or (from_logits and dtype0) or (single_launch_is and dtype0)"' &
    fi
    step doctor "$limit" "$python" -m rlloss.cli doctor &
    step demo "$limit" "$python" -m rlloss.cli demo --quick --output "$out/demo" &
    wait
    ;;
measure)
    limit=${MEASURE_S:-150}
    commit=()
    git rev-parse HEAD >/dev/null 2>&1 || commit=(--commit "${COMMIT:-unknown}")
    smoke=(--tests tests/kernels/test_gpu.py::test_rows_that_are_split_have_the_same_bits "${commit[@]}" --quick)
    tune=("$python" -m benchmarks.tune --dtypes bf16 --V 151936 --rows 8192 --minutes 0.4 --write --only)
    step shapes "$limit" "${tune[@]}" statistics gradient split
    step tiles "$limit" "${tune[@]}" single_launch tile
    step logits "$limit" "$python" -m benchmarks.run "${smoke[@]}" --minutes 1.2 --out "$out" \
        --suites "token pass" logits loss
    step hidden $((limit + 60)) "$python" -m benchmarks.run "${smoke[@]}" --minutes 2.5 --out "$out" --no-compile \
        --suites step hidden
    if command -v ncu >/dev/null; then
        step forward 60 bash -c "counters token_stats_forward statistics"
        step backward 60 bash -c "counters token_stats_backward gradient"
    fi
    cp kernels/launch_table.py "$out/"
    ;;
*)
    echo "first_gpu.sh: found '$what', expected check or measure" >&2
    exit 2
    ;;
esac
