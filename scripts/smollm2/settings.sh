# shellcheck shell=bash
# Settings that the scripts of this folder share. Environment variables override the values after :=, and options of
# train.py or evaluate.py at the end of a script override its own:
#
#   STEPS=300 METHODS="sft promptkd" OUT=results/try bash scripts/smollm2/run.sh
#   DATA=data/dolly/raw.jsonl DATA_ROOT=data PROMPT_LENGTH=160 LENGTH=224 DEV_ROWS=1000 bash scripts/smollm2/run.sh
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${OUT:=results/smollm2}"
: "${MODEL:=}"     # folder of another instruct model (Qwen, Llama 3, ...); empty: SmolLM2 from its package
: "${DATA:=}"      # jsonl of instruction, input, output, its first DEV_ROWS for evaluations; empty: generated exercises
: "${DATA_ROOT:=}" # folder of test sets; empty: the generated one, or the dev rows of DATA
: "${TEST_SETS:=dolly self_inst vicuna}" "${TEST_ROWS:=60}" # sets below DATA_ROOT, and rows of each (-1: all)
: "${PROMPT_LENGTH:=96}" "${LENGTH:=128}"                   # most tokens of a prompt, of prompt and response
: "${ANSWERS:=600}"    # training prompts that the teacher answers; as many exercises are generated
: "${DEV_ROWS:=60}" "${SHOWN_DEV_ROWS:=40}" # rows kept from training; those that are evaluated during training
: "${KEEP_LAYERS:=20}" # of the teacher's layers, in the student
: "${START_STEPS:=150}" "${START_LR:=2e-4}" # optimizer steps and rate of the start that all methods share
: "${METHODS:=sft kd seqkd minillm promptkd}"
: "${STEPS:=60}" "${BATCH:=8}" "${LR:=5e-5}" # of each method: optimizer steps, examples in each, rate
: "${SEEDS:=10 20 30}" # of the evaluation

read -ra methods <<<"$METHODS"
read -ra seeds <<<"$SEEDS"
read -ra sets <<<"$TEST_SETS"
out=$OUT teacher=${MODEL:-$OUT/teacher} raw=${DATA:-$OUT/exercises/raw.jsonl}
sizes=(--max-length "$LENGTH" --max-prompt-length "$PROMPT_LENGTH")
train_options=("${sizes[@]}" --batch-size "$BATCH" --dev-num "$SHOWN_DEV_ROWS" --warmup-iters 10 --resume auto
    --keep-checkpoints 1 --checkpoint-minutes 10)
source scripts/stages.sh
