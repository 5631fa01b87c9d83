#!/usr/bin/env bash
# From a fresh clone to a trained tiny model and a page about it, in minutes, with or without a GPU:
#   a virtual environment -> the embedded images as tar shards -> pretraining through the deepspeed launcher
#   (two CPU ranks, or every GPU) -> nearest-neighbour accuracy -> runs/quickstart/report.html.
# The last line is one JSON object. Started again it goes on from where it was, or draws the finished run anew.
#
#   bash launch/quickstart.sh [--dry-run] [section.key=value ...]
#   VENV=.venv      where the virtual environment is, or shall be
#   PYTHON=python3  what makes it (3.10 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true; shift; fi
venv=${VENV:-.venv}
run=runs/quickstart
for setting in "$@"; do case $setting in run.folder=*) run=${setting#run.folder=} ;; esac; done

say() { printf '\n== %s\n' "$*"; }
do_() { if $dry_run; then printf '%s\n' "$*"; else "$@"; fi; }

say "1/5 environment in $venv"
[ -x "$venv/bin/python" ] || do_ "${PYTHON:-python3}" -m venv "$venv"
do_ "$venv/bin/python" -m pip install --disable-pip-version-check -e ".[report]"

say "2/5 images to tar shards in $run/shards"
[ -f "$run/shards/eval/index.json" ] || do_ "$venv/bin/python" tools/shard_images.py embedded "$run/shards"

# Two ranks on CPUs; on GPUs all of them, or the most that divide the batch of 128.
ranks=2
if [ -x "$venv/bin/python" ]; then
  gpus=$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
  if [ "$gpus" -gt 0 ]; then
    ranks=$gpus
    while [ $((128 % ranks)) -ne 0 ]; do ranks=$((ranks - 1)); done
  fi
fi
say "3/5 pretraining with $ranks ranks (log: $run/train.log)"
# Below 32768: from there on the system may give a port that is free now to an outgoing connection.
port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
settings=(configs/quickstart.yaml "data.train=$run/shards/train" "data.eval=$run/shards/eval" "$@")
PATH="$PWD/$venv/bin:$PATH"
do_ deepspeed --num_gpus "$ranks" --master_port "$port" --module lmim train "${settings[@]}"

say "4/5 nearest-neighbour accuracy"
do_ python -m lmim eval knn "${settings[@]}"

say "5/5 page and picture"
do_ python -m lmim report "$run"
