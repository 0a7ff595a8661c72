#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch, Triton, numpy and a C compiler, without a network and without installing
# anything. Stages, limits and commands: benchmarks/gpu_stages.py; a stage that fails or hangs does not stop the next one.
#
#   make gpu                      both halves, into runs/gpu
#   make gpu HALF=first           at most 5 minutes: is it right, and how fast with the blocks that are there; every goal gets a number
#   make gpu HALF=second          at most 6 minutes: tuned blocks, the same with them, profile of a step, a long sequence, sanitizer
#   make gpu OUT=/some/folder
#   MEGAGRIN_GPU_DRY=1 make gpu   walks all stages on the CPU with tiny shapes: tests this script, measures nothing
#
# pytest is not needed for the figures. Where it is absent, it comes from the wheels in WHEELS (default: wheels), see gpu_wheels.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/common.sh

find_python "$PWD"
OUT=${OUT:-runs/gpu}
DRY=${MEGAGRIN_GPU_DRY:-0}
HALF=${HALF:-both}
WHEELS=${WHEELS:-wheels}
PACKAGES=  # a folder of our own that is removed in the end, whatever the environment says
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
{ mkdir -p "$OUT" && [[ -w $OUT ]]; } 2>/dev/null || fail "OUT: cannot create $OUT, or not write into it"
export PYTHONUNBUFFERED=1

if ! "$PYTHON" -c 'import pytest' 2>/dev/null && compgen -G "$WHEELS/*.whl" >/dev/null; then
  PACKAGES=$(mktemp -d)
  for wheel in "$WHEELS"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$PACKAGES" || echo "megagrin: $wheel cannot be unpacked" >&2
  done
  export PYTHONPATH=$PYTHONPATH:$PACKAGES
fi

arguments=(--out "$OUT" --half "$HALF" ${PACKAGES:+--scratch "$PACKAGES"})
if [[ $DRY == 1 ]]; then
  # One thread: tiny shapes only wait for each other, for minutes where other work runs beside them.
  export MEGAGRIN_GPU_DRY CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  arguments+=(--dry)
fi
# In the place of this shell, which would not hand on the signals that end a run.
exec "$PYTHON" benchmarks/gpu_run.py "${arguments[@]}"
