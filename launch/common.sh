# Sourced by the scripts beside it: errors in one line, the Python to use, GPUs, threads, the check before a start.
# shellcheck shell=bash

fail() {
  echo "megagrin: error: $*" >&2
  exit 2
}

# require_count NAME VALUE LEAST
require_count() {
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
    fail "$1: '$2' must be an integer of at least $3"
  fi
}

# need_value OPTION REMAINING-ARGUMENTS
need_value() {
  (($2 >= 2)) || fail "$1: a value must follow"
}

# Sets PYTHON and makes the checkout these scripts lie in, if they lie in one, the megagrin that is run.
find_python() {
  local root=$1
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
  fi
  local found
  found=$(command -v "$PYTHON") || fail "PYTHON: no program $PYTHON; create the environment with \`make setup\`, or set PYTHON"
  PYTHON=$found
  "$PYTHON" -c 'import sys, importlib.util as i; sys.exit(i.find_spec("torch") is None)' ||
    fail "PYTHON: $PYTHON has no torch; create the environment with \`make setup\`, or set PYTHON to one that has it"
  if [[ -d $root/megagrin ]]; then
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  fi
}

# Prints the number of GPUs torch can use on this node. torch is asked only where there is a driver: the import takes seconds.
gpu_count() {
  if ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! command -v nvidia-smi >/dev/null; then
    echo 0
    return
  fi
  "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' || fail "$PYTHON cannot import torch; see the lines above"
}

# A node whose driver is down would otherwise join with CPU ranks, and the others would wait for it in their first collective.
check_gpus() {
  local ranks=$1 gpus=$2 required=$3
  if ((gpus < ranks && (gpus > 0 || required))); then
    fail "$(uname -n): torch sees $gpus GPUs on this node, but $ranks ranks are to run on it, one GPU each"
  fi
}

# Does some argument of `megagrin train` take the run off the GPUs?
on_cpu() {
  local arguments=" $* "
  [[ $arguments == *" --runtime.device=cpu "* || $arguments == *" --runtime.device cpu "* ]]
}

# Asks for text instead of a run?
only_asks() {
  local argument
  for argument in "$@"; do
    case $argument in -h | --help | --dry_run | --print_config | --print_config=*) return 0 ;; esac
  done
  return 1
}

# One process against the same arguments: what is wrong is said once, and before torchrun wraps it into its own messages.
# Job managers that set RANK on each node would silence all but the first one here.
train_once() {
  local ranks=$1
  shift
  env -u RANK -u LOCAL_RANK -u WORLD_SIZE "$PYTHON" -m megagrin.cli train "$@" --world_size "$ranks"
}

# check_run RANKS ARGUMENTS...: silent when all is well; PREFIX (a node's name) goes in front of what it has to say.
check_run() {
  local messages status=0
  messages=$(train_once "$@" --dry_run 2>&1 >/dev/null) || status=$?
  [[ -z $messages ]] || echo "${PREFIX:-}$messages" >&2
  return "$status"
}

# Defaults that any value in the environment overrides.
set_environment() {
  local ranks=$1 cores
  if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc)
    export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
  fi
  export MAX_RESTARTS=${MAX_RESTARTS:-0} SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600}
  require_count MAX_RESTARTS "$MAX_RESTARTS" 0
  require_count SHUTDOWN_TIMEOUT "$SHUTDOWN_TIMEOUT" 1
  # torchrun's --shutdown-timeout, as a variable because torch 2.11 does not know it and would stop at the option.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN_TIMEOUT
  # torch 2.13 keeps one store for all attempts, where restarted ranks find the addresses of the dead ones. Of 8 killed ranks (gloo)
  # none was survived without this ("connectFullMesh failed", or a hang), and 10 of 10 with it: each attempt has its own store.
  if ((MAX_RESTARTS > 0)); then
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  fi
  # A rank that dies of a signal inside C++ leaves the Python lines that led there.
  export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
}

# Becomes torchrun. With LOG_DIR, each rank's output is kept in a file, too, and the lines on the terminal name their rank.
run_torchrun() {
  local options=(--max-restarts "$MAX_RESTARTS")
  if [[ -n ${LOG_DIR:-} ]]; then
    mkdir -p "$LOG_DIR" || fail "LOG_DIR: cannot create $LOG_DIR"
    # shellcheck disable=SC2016  # torchrun fills it in
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
    options+=(--log-dir "$LOG_DIR" --tee 3)
  fi
  exec "$PYTHON" -m torch.distributed.run "${options[@]}" "$@"
}
