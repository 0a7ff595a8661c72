#!/usr/bin/env bash
# Train on this machine: one rank per GPU, or 2 ranks on the CPU.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/local.sh [--nproc N] [--] <arguments of megagrin train>

  --nproc N   ranks (environment: NPROC); one per GPU where there are GPUs, otherwise 2

Checks the configuration and the data files first, in one process. Example:
  launch/local.sh --config launch/recipes/<name>.yaml --data.train data/train
Further environment variables (PYTHON, LOG_DIR, MAX_RESTARTS, SHUTDOWN_TIMEOUT, OMP_NUM_THREADS): docs/launch.md
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

while (($#)); do
  case $1 in
    --nproc) need_value "$1" $# && NPROC=$2 && shift 2 ;;
    --nproc=*) NPROC=${1#*=} && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) break ;;
  esac
done

find_python "$(dirname "$here")"
[[ -z ${NPROC:-} ]] || require_count --nproc "$NPROC" 1
gpus=$(gpu_count)
if [[ -z ${NPROC:-} ]]; then
  NPROC=$((gpus > 0 ? gpus : 2))
fi
if only_asks "$@"; then
  train_once "$NPROC" "$@"
  exit
fi
on_cpu "$@" || check_gpus "$NPROC" "$gpus" 0
check_run "$NPROC" "$@"
set_environment "$NPROC"
run_torchrun --standalone --nproc-per-node "$NPROC" -m megagrin.cli train "$@"
