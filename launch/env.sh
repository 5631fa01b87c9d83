# shellcheck shell=bash
# What the launch scripts set for every rank, each with its reason. What is set outside stays as it is, also if empty.
#   NODES=1       machines
#   GPUS=         ranks on each; default: the GPUs of this one, or 1
#   VENV=.venv    virtual environment to take python from, if it is there

if [ -d "${VENV:-.venv}/bin" ]; then
    PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"
    export PATH
fi

if [ -z "${GPUS:-}" ]; then
    GPUS=$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')
fi

default() { # NAME VALUE
    [ -n "${!1+set}" ] || export "$1=$2"
}

# Lines of the log as they are written; a stack, not silence, where native code crashes.
default PYTHONUNBUFFERED 1
default PYTHONFAULTHANDLER 1

# A rank's share of the cores. torchrun would set 1; under Slurm a rank that is bound to its share would share it again.
cores=$(($(nproc) / GPUS))
default OMP_NUM_THREADS "$((cores > 1 ? cores : 1))"

# NCCL's version and its errors; INFO tells of every ring and link.
default NCCL_DEBUG WARN

if [ "${NODES:-1}" -gt 1 ]; then
    # The interface of the default route. gloo would take the address that the host's own name stands for, which is
    # 127.0.1.1 on Debian and Ubuntu; NCCL might take a bridge between a host's own containers. This is how NCCL meets,
    # and its data where there is neither InfiniBand nor EFA: several such networks are named by a list, eth0,eth1.
    route=$(awk '$2 == "00000000" { print $1; exit }' /proc/net/route)
    if [ -n "$route" ]; then
        default GLOO_SOCKET_IFNAME "$route"
        default NCCL_SOCKET_IFNAME "$route"
    fi
fi

# EFA (AWS): the provider is named, so that a host whose plugin is missing fails rather than falls back to TCP.
if compgen -G '/sys/class/infiniband/*efa*' > /dev/null || compgen -G '/sys/class/infiniband/rdmap*' > /dev/null; then
    default FI_PROVIDER efa
    default FI_EFA_FORK_SAFE 1 # loader workers are forked from a rank that has registered memory with the adapter
# InfiniBand and RoCE.
elif [ -d /sys/class/infiniband ]; then
    default RDMAV_FORK_SAFE 1 # as above; kernels from 5.12 on do it by themselves
    # 4 µs · 2^22 = 17 s before a packet is sent again, 7 times: a link that flaps for a minute ends no run of days.
    default NCCL_IB_TIMEOUT 22
    default NCCL_IB_RETRY_CNT 7
fi
unset cores route
