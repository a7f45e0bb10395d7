# shellcheck shell=bash
# Common part of scripts/<family>/reproduce.sh, which source it with the family's name: starts tools/reproduce.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PROMPTKD_PYTHON:-$root/.venv/bin/python}
[ -n "${PROMPTKD_PYTHON:-}" ] || [ -x "$python" ] || bash "$root/install.sh" >&2
unset PYTHONHOME
export PYTHONPATH=$root PYTHONNOUSERSITE=1 TOKENIZERS_PARALLELISM=false PROMPTKD_PYTHON=$python
exec "$python" "$root/tools/reproduce.py" "$@"
