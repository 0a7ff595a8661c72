#!/usr/bin/env bash
# The main job on real text: the Python standard library's own sources become a tokenizer, token files, a small GRIN model trained
# on two ranks with expert parallelism 2, curves, a sampled continuation and a Hugging Face export that is loaded back.
#
#   launch/quickstart.sh                    everything, into runs/quickstart
#   launch/quickstart.sh --shuffle-labels   the control: trains on tokens in random order, whose loss must not fall
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONTROL=false
case "${1:-}" in
  "") ;;
  --shuffle-labels) CONTROL=true ;;
  *) echo "usage: launch/quickstart.sh [--shuffle-labels]" >&2; exit 2 ;;
esac

PYTHON="${PYTHON:-.venv/bin/python}"
DATA=runs/quickstart-data
RUN=runs/quickstart
NAME=stdlib
if $CONTROL; then RUN=runs/quickstart-control NAME=shuffled; fi
megagrin() { "$PYTHON" -m megagrin.cli "$@"; }
stage() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

rm -rf "$RUN"
mkdir -p "$DATA"

stage "collect the standard library's sources"
"$PYTHON" launch/stdlib_corpus.py --out "$DATA/stdlib.jsonl"

stage "train a SentencePiece tokenizer"
megagrin data train-tokenizer "$DATA/stdlib.jsonl" --output "$DATA/tokenizer.model" --vocab_size 1024 --overwrite true

stage "write token files"
megagrin data tokenize "$DATA/stdlib.jsonl" --tokenizer "$DATA/tokenizer.model" --output "$DATA/stdlib" \
  --valid_fraction 0.05 --overwrite true
if $CONTROL; then
  for part in train valid; do
    "$PYTHON" launch/shuffle_tokens.py --source "$DATA/stdlib_$part" --out "$DATA/shuffled_$part"
  done
fi
megagrin data verify "$DATA/${NAME}_train" "$DATA/${NAME}_valid" --tokenizer "$DATA/tokenizer.model"

stage "train with torchrun, experts split over the ranks"
read -r RANKS DTYPE < <("$PYTHON" - <<'CODE'
import torch
gpus = torch.cuda.device_count()
# bf16 where the hardware multiplies it: emulated bf16 is slower than fp32.
fast = gpus or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
# Two ranks, on the CPU or on two GPUs; a single GPU cannot hold two.
print(1 if gpus == 1 else 2, "bf16" if fast else "fp32")
CODE
)
PYTHON="$PYTHON" launch/local.sh --nproc "$RANKS" -- --config launch/recipes/quickstart.yaml --train.run_dir "$RUN" \
  --data.train "$DATA/${NAME}_train" --data.valid "$DATA/${NAME}_valid" --data.tokenizer "$DATA/tokenizer.model" \
  --parallel.ep "$RANKS" --engine.dtype "$DTYPE"

stage "draw loss curve and expert load"
megagrin plot --run "$RUN"

if ! $CONTROL; then
  stage "continue a snippet of Python"
  megagrin generate --checkpoint "$RUN" --max_new_tokens 120 --temperature 0.7 --top_p 0.9 --seed 1 --prompt 'def read_file(path):
    """'

  stage "export to Hugging Face and load it back"
  megagrin export-hf --checkpoint "$RUN" --out "$RUN/hf" --overwrite true --check true
fi

stage "result"
"$PYTHON" launch/quickstart_result.py --run "$RUN" --control "$CONTROL"
