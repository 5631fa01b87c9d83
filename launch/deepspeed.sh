#!/usr/bin/env bash
# Trains through the deepspeed launcher: on this machine, or from here on all hosts of a hostfile.
#
#   bash launch/deepspeed.sh [--dry-run] CONFIG [section.key=value ...]
#   GPUS=8                    ranks on this machine, if there is no hostfile; default: its GPUs, or 1
#   HOSTFILE=launch/hostfile  hosts and their GPUs (launch/hostfile.example); inside a Slurm allocation: its own hosts
#   RUNNER=pdsh               what starts the ranks there: pdsh (over ssh), openmpi (mpirun) or slurm (srun)
#   RUNNER_ARGS=              further arguments of that
#   MASTER_ADDR, MASTER_PORT  where ranks meet; default: the first host, a port below those of outgoing connections
#
# To stop: `touch RUN_FOLDER/stop`. The launcher hands no signal on to other hosts. Judge the end by done.json there.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
[ $# -gt 0 ] || { echo "usage: launch/deepspeed.sh [--dry-run] CONFIG [section.key=value ...]" >&2; exit 2; }

RUNNER=${RUNNER:-pdsh}
MASTER_PORT=${MASTER_PORT:-$((20000 + (RANDOM * 32768 + RANDOM) % 12000))}
slots=() # lines of the hostfile
if [ -n "${HOSTFILE:-}" ] || [ -f launch/hostfile ]; then
    HOSTFILE=${HOSTFILE:-launch/hostfile}
    mapfile -t slots < <(grep -E '^[^#[:space:]]+[[:space:]]+slots=' "$HOSTFILE")
    [ ${#slots[@]} -gt 0 ] || { echo "error: HOSTFILE ($HOSTFILE) has no line such as 'gpu-01 slots=8'" >&2; exit 2; }
elif [ "$RUNNER" = slurm ]; then
    GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
    mapfile -t slots < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?salloc or sbatch gives hosts}" |
        sed "s/\$/ slots=$GPUS/")
    HOSTFILE=$(mktemp -t lmim-hostfile.XXXXXX)
    printf '%s\n' "${slots[@]}" > "$HOSTFILE"
fi

where=() program=(--module lmim)
if [ ${#slots[@]} = 0 ]; then # this machine; the launcher itself reads CUDA_VISIBLE_DEVICES, if it is told no number
    own_choice=${GPUS:-${CUDA_VISIBLE_DEVICES:+no}}
    # shellcheck source=launch/env.sh
    . launch/env.sh
    [ "$own_choice" = no ] || where=(--num_gpus "$GPUS")
else
    NODES=${#slots[@]} GPUS=${slots[0]##*slots=}
    # shellcheck source=launch/env.sh
    . launch/env.sh
    MASTER_ADDR=${MASTER_ADDR:-${slots[0]%%[[:space:]]*}}
    case $RUNNER in
        pdsh) arguments= ;;
        # mpirun would bind a rank and its loader workers to one core, and tell ranks no place to meet
        openmpi) arguments="--bind-to none -x MASTER_ADDR=$MASTER_ADDR -x MASTER_PORT=$MASTER_PORT" ;;
        # as in slurm.sbatch; this runner knows no --module, but the command `lmim` is a Python script
        slurm)
            arguments="--kill-on-bad-exit=0 --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}"
            program=("$(command -v lmim)")
            ;;
        *) echo "error: RUNNER ($RUNNER) must be pdsh, openmpi or slurm" >&2; exit 2 ;;
    esac
    # --force_multi: a single host of a hostfile need not be this one
    where=(--hostfile "$HOSTFILE" --force_multi --no_ssh_check --master_addr "$MASTER_ADDR" --launcher "$RUNNER"
        --launcher_args="$arguments${RUNNER_ARGS:+ $RUNNER_ARGS}")
fi

command=(deepspeed "${where[@]}" --master_port "$MASTER_PORT" "${program[@]}" train "$@")
if [ ${#slots[@]} -gt 0 ]; then
    # Of the environment the launcher hands on little. Keys and passwords are left out: it logs what it hands on.
    environment=$(env | grep -E '^(CUDA|DS|FI|GLOO|NCCL|OMP|RDMAV|TORCH|WANDB)_[A-Z0-9_]*=' |
        grep -v -E '^[A-Z0-9_]*(KEY|TOKEN|SECRET|PASSWORD)' | sort)
    if $dry_run; then
        printf '# %s\n' "${environment//$'\n'/$'\n# '}"
    else
        DS_ENV_FILE=$(mktemp -t lmim-environment.XXXXXX) # stays, for the launcher to read
        printf '%s\n' "$environment" > "$DS_ENV_FILE"
        export DS_ENV_FILE
    fi
fi
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
