#!/bin/sh
# lmim with the container's words; under torchrun where PET_NPROC_PER_NODE asks for ranks (a number, or gpu: one for each
# GPU). torchrun reads the rest too: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT.
set -eu
if [ -n "${PET_NPROC_PER_NODE:-}" ]; then
    exec torchrun --module lmim "$@"
fi
exec lmim "$@"
