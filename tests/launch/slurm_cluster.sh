#!/usr/bin/env bash
# Runs a command inside a SLURM cluster of two nodes, n1 and n2, made for it on this host and taken down after it:
#   tests/launch/slurm_cluster.sh .venv/bin/python -m pytest -m slow tests/launch/test_slurm.py
# Needs root and no systemd; installs slurm-wlm and munge with apt where they are missing. Keys, sockets, ports, configuration
# and state live in a temporary folder, so a SLURM that the machine has already is neither used nor disturbed.
set -euo pipefail

(($#)) || { echo "usage: $0 COMMAND [ARGUMENTS...]" >&2; exit 2; }
((EUID == 0)) || { echo "$0: must run as root: slurmd starts jobs as the user who submitted them" >&2; exit 2; }

if ! { command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch; } >/dev/null; then
  echo "$0: installing slurm-wlm and munge"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq </dev/null
  apt-get install -qq -y --no-install-recommends slurm-wlm munge </dev/null >/dev/null
fi

# The folder's path must be short: a unix socket's has at most 107 characters.
work=$(mktemp -d /tmp/slurm-XXXXXX)
pids=()

start() { # NAME COMMAND...: in the background, output to NAME.log
  "${@:2}" >"$work/$1.log" 2>&1 </dev/null &
  pids+=($!)
}

show_logs() {
  local log
  for log in "$work"/*.log; do
    echo "--- ${log##*/}"
    tail -n 40 "$log"
  done >&2
}

stop() {
  local status=$?
  trap - EXIT
  if ((status != 0)); then show_logs; fi
  # Jobs first: their steps are children of slurmd, and outlive it.
  timeout 20 scancel --user=root 2>/dev/null || true
  for _ in $(seq 30); do
    [[ -n $(timeout 5 squeue -h 2>/dev/null) ]] || break
    sleep 1
  done
  ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 20); do
    [[ -n $(jobs -rp) ]] || break
    sleep 0.5
  done
  ((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2>/dev/null || true
  rm -rf "$work"
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT TERM

read -r ctld n1 n2 < <(python3 - <<'PY'
import socket

# Below the ephemeral range, so that no outgoing connection takes one between this check and the daemon's start.
free = []
for port in range(26000, 32000):
    with socket.socket() as candidate:
        try:
            candidate.bind(("", port))
        except OSError:
            continue
    free.append(port)
    if len(free) == 3:
        break
print(*free)
PY
)
export SLURM_CONF=$work/slurm.conf
megabytes=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
host=$(hostname -s)
chmod 711 "$work"
mkdir -p "$work"/{state,n1,n2}
install -d -o munge -m 755 "$work/munge"
(umask 377 && head -c 1024 /dev/urandom >"$work/munge/key")
chown munge: "$work/munge/key"

# cred_expire: a requeued job waits that long, 120 s by default. config_overrides: both nodes may claim the same cores.
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctld
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$work/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=20
SlurmdParameters=config_overrides
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/%n.pid
SlurmdSpoolDir=$work/%n
StateSaveLocation=$work/state
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$n1 CPUs=$(nproc) RealMemory=$((megabytes / 2)) State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$n2 CPUs=$(nproc) RealMemory=$((megabytes / 2)) State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF

start munged setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --key-file="$work/munge/key" \
  --socket="$work/munge/socket" --pid-file="$work/munge/pid" --seed-file="$work/munge/seed" --log-file="$work/munge/log"
for _ in $(seq 50); do
  [[ -S $work/munge/socket ]] && break
  sleep 0.1
done
start slurmctld slurmctld -D -c -f "$SLURM_CONF"
start slurmd-n1 slurmd -D -N n1 -f "$SLURM_CONF"
start slurmd-n2 slurmd -D -N n2 -f "$SLURM_CONF"

for _ in $(seq 60); do
  idle=$(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | tr '\n' ' ' || true)
  [[ $idle == "n1 n2 " ]] && break
  sleep 0.5
done
if [[ $idle != "n1 n2 " ]]; then
  echo "$0: the nodes did not become idle within 30 s" >&2
  exit 1
fi

"$@"
