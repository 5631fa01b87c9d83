#!/bin/sh
# Healthy as long as something below /runs was written in the last LMIM_SILENCE_MINUTES: the log, a checkpoint, a figure.
# `lmim doctor CONFIG` checks a machine before a run; this watches one that goes on, and costs nothing.
set -eu
written=$(find "${LMIM_RUNS:-/runs}" -type f -mmin "-${LMIM_SILENCE_MINUTES:-60}" -print -quit)
[ -n "$written" ] || {
    echo "nothing below ${LMIM_RUNS:-/runs} was written in the last ${LMIM_SILENCE_MINUTES:-60} minutes"
    exit 1
}
