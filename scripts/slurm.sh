#!/usr/bin/env bash
# Any of the training scripts as a Slurm job that goes on by itself when its time is over:
#
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 --time 12:00:00 \
#       scripts/slurm.sh scripts/opt/promptkd/promptkd_1.3B.sh [base_path] [options...]
#
# One task is one rank on one GPU. A task may see all GPUs of its machine, or one of its own (--gpus-per-task 1). Two
# minutes before the end Slurm sends SIGUSR1: the ranks finish their step, write a checkpoint and leave with status 0
# (docs/resuming.md). Then the job is requeued, and --resume auto continues from there. All machines have to
# see the folder of --save. Should a step take longer than that, raise the 120 below.
#SBATCH --job-name=promptkd
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

stop() {
    printf 'slurm.sh: error: %s\n' "$1" >&2
    exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || stop "this is for sbatch: sbatch scripts/slurm.sh SCRIPT [base_path] [options...]"
[ $# -gt 0 ] && [ -f "$1" ] || stop "${1:-no script}: name a script of scripts/<model>/<method>/"
script=$1 base_path=.
shift
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    base_path=$1
    shift
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a machine do not meet
export MASTER_ADDR MASTER_PORT PROMPTKD_LAUNCHER=none

warned=
# shellcheck disable=SC2016 # expanded by each task
srun --kill-on-bad-exit=1 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec bash "$0" "$@"' "$script" "$base_path" "$MASTER_PORT" "${SLURM_NTASKS_PER_NODE:-1}" "$@" --resume auto &
step=$!
trap 'warned=yes; kill -USR1 "$step"' USR1 # srun passes it on to every task

wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    wait "$step"
    status=$?
done
if [ -n "$warned" ] && [ "$status" -eq 0 ]; then
    echo "slurm.sh: stopped with a checkpoint, queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
