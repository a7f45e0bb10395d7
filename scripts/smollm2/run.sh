#!/usr/bin/env bash
# A real pre-trained pair, from an empty clone to results/smollm2/report.md: SmolLM2-135M-Instruct teaches a student
# made of 20 of its 30 layers, by SFT, KD, SeqKD, MiniLLM and PromptKD, from one start and with as many updates each.
# About 4 GB of disk, 5 GB of memory. Run again, it keeps what is done and goes on where it was stopped. What can be
# changed is in settings.sh.
#
#   bash scripts/smollm2/run.sh [options of train.py for the five methods, such as --lr 1e-5]
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac

here=$(dirname "${BASH_SOURCE[0]}")
bash "$here/models.sh"
bash "$here/data.sh"
bash "$here/start.sh"
bash "$here/train.sh" "$@"
bash "$here/evaluate.sh"
