#!/usr/bin/env bash
# Trains through torchrun: on this machine, or on several, where it is started once on each.
#
#   bash launch/torchrun.sh [--dry-run] CONFIG [section.key=value ...]
#   GPUS=8               ranks on this machine; default: its GPUs, or 1
#   NODES=1              machines; from 2 on these are needed, the last two alike on all:
#   NODE_RANK=0          which of them this is, from 0; Slurm tells it
#   MASTER_ADDR=host-a   the first machine, as the others reach it
#   MASTER_PORT=29500    a free port there
#
# SIGTERM, SIGUSR1 or Ctrl-C: the run saves and stops. Exit code: the ranks' own (0 complete, 75 stopped, 2 a mistake).
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
[ $# -gt 0 ] || { echo "usage: launch/torchrun.sh [--dry-run] CONFIG [section.key=value ...]" >&2; exit 2; }

NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [ "$NODES" -gt 1 ]; then
    MASTER_ADDR=${MASTER_ADDR:?the first machine, as the others reach it}
    MASTER_PORT=${MASTER_PORT:-29500}
else
    MASTER_ADDR=127.0.0.1
    MASTER_PORT=${MASTER_PORT:-$((20000 + (RANDOM * 32768 + RANDOM) % 12000))} # below the ports of outgoing connections
fi
# shellcheck source=launch/env.sh
. launch/env.sh

command=(python launch/torchrun.py --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --module lmim train "$@")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
