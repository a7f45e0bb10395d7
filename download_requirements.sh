#!/usr/bin/env bash
# Gets the published checkpoints and data from the Hugging Face hub into checkpoints/, data/ and processed_data/.
# Asks nothing; may be stopped and started again.
#
#   bash download_requirements.sh --list                                  what there is, its size, what is here
#   bash download_requirements.sh --only gpt2/promptkd/base --only 'data/*'
#   bash download_requirements.sh --models gpt2                           a family's checkpoints
#   bash download_requirements.sh --data                                  all data sets
#   bash download_requirements.sh                                         everything: about 450 GB
#
# A mirror: HF_ENDPOINT=https://... ; a token: HF_TOKEN ; no network: HF_HUB_OFFLINE=1
# Another interpreter than .venv/bin/python, which is installed where it is missing: PROMPTKD_PYTHON
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=${PROMPTKD_PYTHON:-$root/.venv/bin/python}
[ -n "${PROMPTKD_PYTHON:-}" ] || [ -x "$python" ] || bash "$root/install.sh" >&2
command -v "$python" >/dev/null || {
    echo "download_requirements.sh: error: PROMPTKD_PYTHON=$python is not there: name another or none" >&2
    exit 2
}
PYTHONPATH=$root exec "$python" "$root/tools/download.py" "$@"
