#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build with CUDA, test, time, one report. It has never run on one.
#   bench/gpu.sh [FOLDER]     FOLDER (default build/gpu) gets report.txt, ops.json, decode.json and vllm.json
# PYTHON: of an environment with a CUDA build of torch and this package's dependencies (default python).
# VLLM_PYTHON: of one with vllm, which pins a torch of its own (default $PYTHON).
set -uo pipefail
export STARS_BUILD_EXT=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python}
vllm_python=${VLLM_PYTHON:-$python}
out=${1:-build/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
report=$out/report.txt
failed=0

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: $python -c 'import torch; torch.cuda.is_available()'" >&2
    exit 2
fi

step() {  # step NAME COMMAND...: run it, its output here and in the report, and go on whatever becomes of it
    local name=$1 began=$SECONDS status
    shift
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$report"
    "$@" 2>&1 | tee -a "$report"
    status=${PIPESTATUS[0]}
    printf '== %s: %s, %d s\n' "$name" "$([ "$status" = 0 ] && echo done || echo "FAILED with $status")" \
        $((SECONDS - began)) | tee -a "$report"
    [ "$status" = 0 ] || failed=1
}

printf 'stars-kernels on a GPU, %s, commit %s\n' "$(date -u +%Y-%m-%dT%H:%MZ)" \
    "$(git rev-parse HEAD 2>/dev/null || echo unknown)" | tee "$report"
step device nvidia-smi
step build "$python" setup.py --quiet build_ext --inplace
step "built with CUDA" "$python" -c \
    'import json, sys; info = json.load(open("stars_kernels/_build_info.json")); print(info); sys.exit(not info["cuda"])'
step test "$python" -m pytest -m gpu -s
step ops "$python" -m bench ops --device cuda --quick --json "$out/ops.json"
step decode "$python" -m bench decode --device cuda --quick --json "$out/decode.json"
if "$vllm_python" -c 'import vllm' 2>/dev/null; then
    step vllm "$vllm_python" -m bench.rival_vllm --quick --json "$out/vllm.json"
else
    echo "NOT RUN: vllm is not installed for $vllm_python. Give it an environment of its own (pip install vllm, and this" \
        "package with its demo dependencies), and name its python: VLLM_PYTHON=..." | tee -a "$report"
fi
[ "$failed" = 0 ] && echo "all done: $report" || echo "something FAILED: $report"
exit "$failed"
