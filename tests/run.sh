#!/usr/bin/env bash
# Makes a virtual environment and runs the tests in it, two at a time; with further words, pytest gets those instead.
#   VENV=.venv      where the virtual environment is, or shall be
#   PYTHON=python3  what makes it (3.10 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! cmp -s setup.cfg "$venv/installed.cfg"; then # what was installed last, whole
    "$venv/bin/python" -m pip install --disable-pip-version-check -q -e ".[test]"
    cp setup.cfg "$venv/installed.cfg"
fi
PATH="$(cd "$venv/bin" && pwd):$PATH"
ruff check --config .ci/ruff.toml .
ruff format --check --config .ci/ruff.toml .
[ "$#" -gt 0 ] || set -- -n 2 --dist worksteal # most take one core; the slow ones take all, one after another
exec python -m pytest "$@"
