#!/usr/bin/env bash
# Everything that needs a GPU, in about 10 minutes, on a machine with torch, Triton, numpy, pytest and a C compiler, without a network.
# A stage that fails or runs out of its time does not stop the next one.
#
#   make gpu                      into runs/gpu
#   make gpu HALF=first           4 minutes (limits: 8): is it right, and how fast with the blocks that are there; after it every goal has a number
#   make gpu HALF=second          5 minutes (limits: 7): tuned blocks, the same measurements with them, sanitizer, profile of a step
#   make gpu OUT=/some/folder
#   MEGAGRIN_GPU_DRY=1 make gpu   walks all stages on the CPU with tiny shapes: tests this script, measures nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

find_python "$PWD"
OUT=${OUT:-runs/gpu}
DRY=${MEGAGRIN_GPU_DRY:-0}
HALF=${HALF:-both}
case $HALF in first | second | both) ;; *) fail "HALF: '$HALF' must be first, second or both" ;; esac
[[ $DRY == 0 || $DRY == 1 ]] || fail "MEGAGRIN_GPU_DRY: '$DRY' must be 0 or 1"
if [[ $DRY == 0 ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  fail "make gpu: torch sees no GPU here; MEGAGRIN_GPU_DRY=1 walks the stages on the CPU"
fi
# Triton builds the stub that starts a kernel: without these every test would fail, each with a page of its own.
if [[ $DRY == 0 ]]; then
  [[ -n ${CC:-} ]] || command -v gcc >/dev/null || command -v clang >/dev/null ||
    fail "make gpu: no C compiler, and Triton needs one: install gcc or clang, or set CC"
  "$PYTHON" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    fail "make gpu: $PYTHON has no Python.h, and Triton needs it: install the headers of this Python"
fi
mkdir -p "$OUT" || fail "OUT: cannot create $OUT"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt SUMMARY=$OUT/summary.txt
: >"$LOG"
: >"$SUMMARY"
export PYTHONUNBUFFERED=1
FAILED=0

# stage LIMIT-IN-SECONDS NAME COMMAND...: its output goes to the terminal and, under a heading, to the log.
stage() {
  local limit=$1 name=$2 begin=$SECONDS status=0 word
  shift 2
  printf '\n== %s (limit %d s): %s\n' "$name" "$limit" "$*" | tee -a "$LOG"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG" || status=${PIPESTATUS[0]}
  case $status in
    0) word=ok ;;
    124 | 137) word="FAILED: not done after $limit s" ;;
    *) word="FAILED: status $status" ;;
  esac
  ((status == 0)) || FAILED=1
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - begin)) "$word" >>"$SUMMARY"
}

environment() {
  nvidia-smi 2>&1 || echo "no nvidia-smi"
  "$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); import moe_report
for name, value in moe_report.environment().items(): print(f"{name}: {value}")'
  git log -1 --format='commit %H' 2>/dev/null || true
}

environment >"$OUT/environment.txt" 2>&1 || FAILED=1
cat "$OUT/environment.txt"

SHAPES=(--shape 32768x4096x6400x16x2 --shape 8192x4096x6400x16x2 --shape 32768x2048x768x128x8 --shape 32768x4096x2048x64x4)
# Not tests/conftest.py: it needs packages that are not there.
SANITIZER=("$PYTHON" -m pytest -m gpu --confcutdir=tests/gpu -p no:cacheprovider -rs tests/gpu/sanitizer)
first() {
  stage 100 tests "$PYTHON" tests/gpu/run.py --limit 95 --junit "$OUT/junit.xml"
  stage 130 benchmark "$PYTHON" benchmarks/moe_layer.py --seconds 85 --out "$OUT"
  stage 120 model "$PYTHON" benchmarks/model_step.py --out "$OUT"
  stage 100 training "$PYTHON" benchmarks/tiny_training.py --device cuda --steps 60
}

second() {
  stage 100 tune "$PYTHON" -m megagrin.cli kernels tune "${SHAPES[@]}" --seconds 80 --out "$OUT"
  export MEGAGRIN_TUNED=$OUT
  mkdir -p "$OUT/tuned"
  stage 130 tuned "$PYTHON" benchmarks/moe_layer.py --seconds 85 --out "$OUT/tuned"
  stage 120 profile "$PYTHON" benchmarks/model_step.py --profile --out "$OUT/tuned"
  stage 60 sanitizer "${SANITIZER[@]}"
}

dry_first() {
  stage 120 tests "$PYTHON" tests/gpu/run.py --limit 110 --junit "$OUT/junit.xml"
  stage 120 benchmark "$PYTHON" benchmarks/moe_layer.py --smoke --rounds 1 --pause 0 --out "$OUT"
  stage 120 model "$PYTHON" benchmarks/model_step.py --smoke --out "$OUT"
  stage 120 training "$PYTHON" benchmarks/tiny_training.py --device cpu --steps 6
}

dry_second() {
  # shellcheck disable=SC2016  # the inner shell's arguments
  stage 60 tune bash -c '"$@"; (($? == 2))' bash "$PYTHON" -m megagrin.cli kernels tune "${SHAPES[@]}"  # refused, in one line
  mkdir -p "$OUT/tuned"
  stage 120 tuned "$PYTHON" benchmarks/moe_layer.py --smoke --rounds 1 --pause 0 --out "$OUT/tuned"
  stage 120 profile "$PYTHON" benchmarks/model_step.py --smoke --profile --out "$OUT/tuned"
  stage 60 sanitizer "${SANITIZER[@]}"
}

if [[ $DRY == 1 ]]; then
  export MEGAGRIN_GPU_DRY CUDA_VISIBLE_DEVICES=''
  [[ $HALF == second ]] || dry_first
  [[ $HALF == first ]] || dry_second
else
  [[ $HALF == second ]] || first
  [[ $HALF == first ]] || second
fi

printf '\n== summary (%d s, in %s)\n' "$SECONDS" "$OUT"
cat "$SUMMARY"
exit "$FAILED"
