#!/usr/bin/env bash
# From an empty clone to a comparison of six methods on a small scale, in minutes, on a CPU or a GPU:
# results/demo/report.md. Run it again to continue where it was stopped: finished stages are kept.
#   bash scripts/demo.sh [--fresh] [options of train.py for the six students, such as --total-iters 600]
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=results/demo
if [ "${1:-}" = --fresh ]; then rm -rf "$out" && shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # models of this size have no work for more threads
source scripts/stages.sh

sizes=(--max-length 64 --max-prompt-length 48)
train() { # NAME "EARLIER STAGES" OPTIONS...
    stage "$1" "$2" "$python" train.py --save "$out/$1" "${sizes[@]}" --batch-size 32 --lr-decay-style noam \
        --overwrite "${@:3}"
}
first=(--method sft --lr 0.003 --warmup-iters 50 --eval-interval 250)
student=(--lr 0.002 --warmup-iters 20 --eval-interval 100 --total-iters 400 --model-path "$out/start/last")
data=(--data-dir "$out/data")
teacher=(--teacher-model-path "$out/teacher/last")

stage data "" "$python" tools/make_demo.py --save "$out"
train teacher data "${first[@]}" --total-iters 1000 --model-path "$out/models/teacher" --data-dir "$out/teacher_data"
train start data "${first[@]}" --total-iters 300 --model-path "$out/models/student" --data-dir "$out/data"
train sft start --method sft "${student[@]}" "${data[@]}" "$@"
for method in kd gkd distillm minillm promptkd; do
    [ "$method" != minillm ] || data=(--prompt-data-dir "$out/data")
    train "$method" "start teacher" --method "$method" "${student[@]}" "${data[@]}" "${teacher[@]}" "$@"
    data=(--data-dir "$out/data")
done
for model in teacher start sft kd gkd distillm minillm promptkd; do
    stage "eval-$model" "$model" "$python" evaluate.py --model-path "$out/$model/last" --save "$out/$model/eval" \
        --overwrite --data-dir "$out" --data-names test --seeds 10 20 30 40 50 "${sizes[@]}" --no-repeat-ngram-size 0
done
"$python" tools/report.py "$out"/{sft,kd,gkd,distillm,minillm,promptkd} --references "$out"/{teacher,start} \
    --baseline sft --save "$out" --title "The demo: six methods from one start" --samples 12
