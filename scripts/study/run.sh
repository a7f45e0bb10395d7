#!/usr/bin/env bash
# Runs a declared study. Run it again to continue where it was stopped: finished runs are kept.
#   bash scripts/study/run.sh scripts/study/small.yaml [--save FOLDER] [--plan] [--only STAGE] [--parallel N] [--report]
# Two runs share the machine, with one thread each (OMP_NUM_THREADS), unless --parallel says otherwise.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PROMPTKD_PYTHON:-$root/.venv/bin/python}
[ -n "${PROMPTKD_PYTHON:-}" ] || [ -x "$python" ] || bash "$root/install.sh" >&2
unset PYTHONHOME
export PYTHONPATH=$root PYTHONNOUSERSITE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
exec "$python" "$root/tools/study.py" "$@"
