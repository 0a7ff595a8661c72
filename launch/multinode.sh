#!/usr/bin/env bash
# Train on several machines: run this with the same arguments on each of them.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/multinode.sh --head HOST --nnodes N --id NAME [--port P] [--nproc N] [--] <arguments of megagrin train>

  --head HOST   name or address of the machine where the others meet, itself one of them (environment: HEAD)
  --nnodes N    machines (NNODES)
  --id NAME     any name that the machines of this run share and no other run has (RDZV_ID)
  --port P      free port on the head (PORT); 29500
  --nproc N     ranks on this machine, the same number on each (NPROC); one per GPU

Each machine checks configuration, data files and GPUs before it joins. Further environment variables (IS_HEAD, LOCAL_ADDR,
JOIN_TIMEOUT, REQUIRE_GPUS, PYTHON, LOG_DIR, MAX_RESTARTS, SHUTDOWN_TIMEOUT, OMP_NUM_THREADS): docs/launch.md
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

while (($#)); do
  case $1 in
    --head | --nnodes | --id | --port | --nproc) need_value "$1" $# ;;&
    --head) HEAD=$2 && shift 2 ;;
    --nnodes) NNODES=$2 && shift 2 ;;
    --id) RDZV_ID=$2 && shift 2 ;;
    --port) PORT=$2 && shift 2 ;;
    --nproc) NPROC=$2 && shift 2 ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) break ;;
  esac
done

missing=()
[[ -n ${HEAD:-} ]] || missing+=("--head (HEAD)")
[[ -n ${NNODES:-} ]] || missing+=("--nnodes (NNODES)")
[[ -n ${RDZV_ID:-} ]] || missing+=("--id (RDZV_ID)")
((${#missing[@]} == 0)) || fail "missing: ${missing[*]}; --help shows all options"
PORT=${PORT:-29500} JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}
require_count --nnodes "$NNODES" 1
require_count --port "$PORT" 1
((PORT < 65536)) || fail "--port: $PORT must be below 65536"
require_count JOIN_TIMEOUT "$JOIN_TIMEOUT" 1
[[ -z ${NPROC:-} ]] || require_count --nproc "$NPROC" 1

find_python "$(dirname "$here")"
gpus=$(gpu_count)
NPROC=${NPROC:-$gpus}
((NPROC > 0)) || fail "--nproc: $(uname -n) has no GPU that torch sees; give the number of CPU ranks to run it all the same"
on_cpu "$@" || check_gpus "$NPROC" "$gpus" "${REQUIRE_GPUS:-0}"
PREFIX="$(uname -n): " check_run $((NNODES * NPROC)) "$@"
set_environment "$NPROC"

# The head may be minutes late where hundreds of nodes import torch from one file system: both waits have the same length.
rdzv_conf=join_timeout=$JOIN_TIMEOUT,read_timeout=$JOIN_TIMEOUT${IS_HEAD:+,is_host=$IS_HEAD}
run_torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RDZV_ID" --rdzv-conf "$rdzv_conf" \
  -m megagrin.cli train "$@"
