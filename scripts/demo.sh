#!/usr/bin/env bash
# From an empty clone to a comparison of methods on a small scale, in minutes, on a CPU or a GPU:
# results/demo/report.md. Run it again to continue where it was stopped: finished stages are kept.
#   bash scripts/demo.sh [--fresh] [options of train.py for the students, such as --total-iters 600]
# Data, models and updates are those of scripts/study/small.yaml, but the teacher has 1,200 updates instead of 4,000.
# Each method has the rate and options that the study chose for it on the dev set (docs/results.md). One training seed
# and a weaker teacher cannot rank methods; the study can.
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=results/demo
if [ "${1:-}" = --fresh ]; then rm -rf "$out" && shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # models of this size have no work for more threads
source scripts/stages.sh

lengths=(--max-length 40 --max-prompt-length 24)
train() { # NAME "EARLIER STAGES" OPTIONS...
    stage "$1" "$2" "$python" train.py --save "$out/$1" --method sft --data-dir "$out/world/data" --overwrite \
        "${lengths[@]}" --batch-size 32 "${@:3}"
}
first=(--lr-decay-style cosine --no-curves)
stage world "" "$python" -m tools.make_world --save "$out/world"
train teacher world "${first[@]}" --lr 0.002 --warmup-iters 60 --total-iters 1200 --eval-interval 400 --batch-size 64 \
    --model-path "$out/world/models/teacher" --data-dir "$out/world/teacher_data" --max-length 48 --max-prompt-length 34
train start world "${first[@]}" --lr 0.004 --warmup-iters 20 --total-iters 1000 --eval-interval 100 \
    --model-path "$out/world/models/small"

teacher=(--teacher-model-path "$out/teacher/best_loss")
student() { # NAME METHOD LEARNING_RATE OPTIONS...
    train "$1" "start teacher" --method "$2" --lr "$3" --lr-decay-style noam --warmup-iters 10 --total-iters 240 \
        --eval-interval 80 --model-path "$out/start/best_loss" "${@:4}"
}
student sft sft 0.002 "$@"
student kd kd 0.004 --kd-ratio 1 "${teacher[@]}" "$@"
student gkd gkd 0.004 "${teacher[@]}" "$@"
student on-policy gkd 0.004 --divergence reverse_kl --student-data-fraction 1 "${teacher[@]}" "$@"
student distillm distillm 0.004 --divergence skew_reverse_kl "${teacher[@]}" "$@"
student minillm minillm 0.001 --teacher-mixed-alpha 0 "${teacher[@]}" --data-dir= \
    --prompt-data-dir "$out/world/data" "$@"
student promptkd promptkd 0.002 "${teacher[@]}" "$@"

for model in teacher/best_loss start/best_loss {sft,kd,gkd,on-policy,distillm,minillm,promptkd}/best_rougeL; do
    name=${model%/*}
    stage "eval-$name" "$name" "$python" evaluate.py --model-path "$out/$model" --save "$out/$name/eval" --overwrite \
        --data-dir "$out/world/test" --data-names test --seeds 10 20 30 40 50 "${lengths[@]}" --no-repeat-ngram-size 0
done
"$python" tools/report.py "$out"/{sft,kd,gkd,on-policy,distillm,minillm,promptkd} --samples 12 \
    --references "$out"/{teacher,start} --baseline sft --save "$out" --title "The demo: one seed of each method, at the rate that a study chose on dev data"
