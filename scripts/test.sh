#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest: bash scripts/test.sh tests/unit/data
# One worker per core, each with one thread: more of either makes them wait for each other (-n 0: no workers).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh

workers=$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
unset PYTHONHOME
export PYTHONPATH=$PWD PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$((workers < 8 ? workers : 8))" "$@"
