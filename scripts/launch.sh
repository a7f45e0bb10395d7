# shellcheck shell=bash
# What the scripts of scripts/<model>/ share; they source it:
#
#   bash scripts/<model>/<folder>/<name>.sh [base_path] [port] [gpus] [options...]
#
# base_path  folder of checkpoints/, data/, processed_data/ and results/; default: the project's
# port       where the processes meet; default, or 0: a free one
# gpus       processes on this machine; default: the GPUs that are visible, else 1. A number other than the
#            published one keeps the effective batch by changing --gradient-accumulation-steps
# options    of train.py, evaluate.py or the tool; the last of two wins, so they override the script's
#
# The first argument with a dash begins the options. --dry-run prints all settings as JSON and runs nothing: without
# gpus the published ones. Environment:
#
# NNODES, NODE_RANK, MASTER_ADDR   several machines: the same command on each; gpus counts those of one machine
# MASTER_PORT                      the same as port, where that is not given
# MAX_RESTARTS                     training alone: when a rank dies, torchrun starts all of them again, up to so many
#                                  times, and --resume auto takes them to the newest checkpoint
# PROMPTKD_LAUNCHER=none           this is one rank of several that something else starts (scripts/slurm.sh), with
#                                  RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
# PROMPTKD_PYTHON                  another interpreter than .venv/bin/python
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }
stop() {
    say "error: $1"
    exit 2
}

# Sourced without arguments, this sees the script's own: what remains in "$@" afterwards are the options.
positional=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
    positional+=("$1")
    shift
done
[ "${#positional[@]}" -le 4 ] || stop "${positional[4]}: too many arguments before the options, which begin with --"
base_path=${positional[0]:-} port=${positional[1]:-0} gpus=${positional[2]:-} checkpoint=${positional[3]:-}
given=" $* " # to look for an option, with whatever dashes
nodes=${NNODES:-1} node=${NODE_RANK:-0} restarts=${MAX_RESTARTS:-0}
[ "$port" != 0 ] || port=${MASTER_PORT:-0}

[[ $port =~ ^(0|[1-9][0-9]{0,4})$ && $port -lt 65536 ]] || stop "port $port: give a number below 65536, or 0 for a free port"
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || stop "gpus $gpus: give the number of processes on this machine"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || stop "NNODES=$nodes: give the number of machines"
[[ $node =~ ^(0|[1-9][0-9]*)$ && $node -lt $nodes ]] ||
    stop "NODE_RANK=$node: give this machine's number, from 0 to NNODES - 1"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || stop "MAX_RESTARTS=$restarts: give a number of restarts, or 0"
case ${PROMPTKD_LAUNCHER:-torchrun} in
torchrun) ranks= ;;
none)
    ranks=${WORLD_SIZE:-}
    [[ $ranks =~ ^[1-9][0-9]*$ ]] ||
        stop "PROMPTKD_LAUNCHER=none needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    ;;
*) stop "PROMPTKD_LAUNCHER=$PROMPTKD_LAUNCHER: say torchrun, or none where ranks are started by something else" ;;
esac
if [ -z "$base_path" ]; then # paths stay short where the project is the working directory
    base_path=$([ . -ef "$root" ] && echo . || echo "$root")
fi
[ -d "$base_path" ] || stop "base path $base_path: no such folder"
base=${base_path%/}/
[ "$base" != ./ ] || base=
configs=$root/configs/deepspeed/
[ ! "$base_path" -ef "$root" ] || configs=${base}configs/deepspeed/

decoding=(--do-sample --temperature 1.0 --top-k 0 --top-p 1.0)
lengths=(--max-length 512 --max-prompt-length 256)

train() { # METHOD OPTIONS...: published_gpus says what the options are made for
    local method=$1
    shift
    [ -z "$checkpoint" ] || stop "$checkpoint: a fourth argument is not for training; options begin with --"
    local shared=(--dev-num 1000 --weight-decay 1e-2 --clip-grad 1.0)
    case $method in
    sft) shared+=(--lr-decay-style cosine --warmup-iters 0) ;;
    kd | seqkd) shared+=(--lr-decay-style cosine --warmup-iters 0 --kd-ratio 0.5) ;;
    gkd | distillm) shared+=(--lr-decay-style cosine --warmup-iters 0 --kd-ratio 1.0) ;;
    distillm2) shared+=(--lr-decay-style cosine --warmup-iters 0) ;;
    promptkd)
        shared+=(--lr-decay-style constant --warmup-iters 100 --prompt-len 7)
        shared+=(--prompt-init-text "Suppose you are a student.")
        shared+=(--teacher-kld-type reverse --base-kld-type reverse --base-coef 1.0)
        ;;
    minillm)
        shared=(--dev-num 1000 --epochs 10 --total-iters 5000 --eval-interval 100)
        shared+=(--lr 5e-6 --lr-min 5e-6 --warmup-iters 100 --kd-ratio 0.5)
        shared+=(--num-rollouts 256 --ppo-epochs 4 --seed-ppo 42 --seed-lm 7)
        shared+=(--teacher-mixed-alpha 0.2 --reward-scaling 0.5 --cliprange-reward 100)
        shared+=(--length-norm --single-step-reg)
        ;;
    esac
    set -- --method "$method" --seed 10 "${lengths[@]}" "${decoding[@]}" "${shared[@]}" "$@"
    keep_batch "$@"
    launch train.py "$@" "${scaled[@]+"${scaled[@]}"}"
}

# --seed stays out of it: 10 is the default, and --seeds could not be given beside it.
evaluate() { # FAMILY SET CHECKPOINT OPTIONS...
    local save=${base}results/$1/eval_main/ model=${base}$3/
    if [ -n "$checkpoint" ]; then # each checkpoint and set has its own folder, or the next would meet the results
        model=$(below_base "$checkpoint") save=$save$2/$(flat_name "$checkpoint")
    fi
    shift 3
    launch evaluate.py --model-path "$model" --save "$save" "${lengths[@]}" "${decoding[@]}" --dev-num -1 \
        --eval-batch-size 16 "$@"
}

generate() { # MODEL OPTIONS...: the script's own model answers the training prompts, or the checkpoint that is given
    local model=$1
    shift
    [ -z "$checkpoint" ] || model=$checkpoint
    launch tools/generate.py --model-path "$(below_base "$model")" --seed 10 "${lengths[@]}" "${decoding[@]}" \
        --seed-ppo 42 --eval-batch-size 16 "$@"
}

process() { # COMMAND OPTIONS... of tools/process_data.py
    [ "${#positional[@]}" -le 1 ] || stop "${positional[1]}: only the base path comes before the options"
    find_python
    if prints_only; then # of several calls in a script the first one's, so that stdout is one JSON object
        exec "$python" "$root/tools/process_data.py" "$@"
    fi
    "$python" "$root/tools/process_data.py" "$@"
}

below_base() { case $1 in /*) echo "$1" ;; *) echo "$base$1" ;; esac; }

flat_name() { # a path as one folder's name: checkpoints/gpt2/x/ -> checkpoints_gpt2_x
    local name=${1#./}
    name=${name#/} name=${name%/}
    echo "${name//\//_}"
}

value_of() { # NAME OPTIONS...: the value that wins
    local name=$1 value=
    shift
    while [ $# -gt 0 ]; do
        case ${1//_/-} in
        "$name") value=${2:-} ;;
        "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

prints_only() { [[ $given == *" --dry"[-_]"run "* || $given == *" --help "* || $given == *" -h "* ]]; }

# batch size x accumulation x GPUs is what a step sees; groups of GPUs where --model-parallel lets them share examples.
# With another number of them `scaled` becomes the accumulation that keeps it; the user's accumulation is left alone.
keep_batch() { # OPTIONS...
    local batch steps world copies teachers unit=GPUs
    scaled=()
    [[ $given != *" --gradient"[-_]"accumulation"[-_]"steps"[\ =]* ]] || return 0
    if prints_only && [ -z "$gpus" ]; then
        return 0
    fi
    count_gpus
    copies=$(value_of --model-parallel-size "$@") teachers=$(value_of --teacher-model-parallel-size "$@")
    [[ "${copies:-1}" =~ ^[1-9][0-9]*$ && "${teachers:-1}" =~ ^[1-9][0-9]*$ ]] || return 0
    copies=$((${teachers:-1} > ${copies:-1} ? teachers : ${copies:-1})) # GPUs that work on the same examples
    world=${ranks:-$((gpus * nodes))}
    [ $((world % copies)) -eq 0 ] || return 0
    [ "$copies" -eq 1 ] || unit="groups of $copies GPUs"
    world=$((world / copies))
    [ "$world" -ne "$published_gpus" ] || return 0
    batch=$(value_of --batch-size "$@") steps=$(value_of --gradient-accumulation-steps "$@")
    [[ $batch =~ ^[1-9][0-9]*$ ]] || return 0 # train.py says what is wrong with it
    local all=$((batch * steps * published_gpus))
    [ $((steps * published_gpus % world)) -eq 0 ] || refuse_gpus "$world" "$batch" "$steps" "$all" "$unit"
    scaled=(--gradient-accumulation-steps $((steps * published_gpus / world)))
    say "$world $unit instead of $published_gpus: accumulation $steps -> ${scaled[1]} keeps $all examples a step"
}

refuse_gpus() { # WORLD BATCH STEPS ALL UNIT: names the numbers that do
    local count fit= other=
    for ((count = 1; count <= $3 * published_gpus; count++)); do
        [ $(($3 * published_gpus % count)) -ne 0 ] || fit+=" $count"
    done
    if [ $(($4 % $1)) -eq 0 ]; then # the largest batch size up to the recipe's that divides this GPU's share
        for ((count = $2; $4 / $1 % count; count--)); do :; done
        other=", or --batch-size $count --gradient-accumulation-steps $(($4 / $1 / count))"
    fi
    stop "$1 $5 do not divide $4 examples a step (batch $2 x accumulation $3 x $published_gpus GPUs): use$fit$other"
}

count_gpus() { # sets gpus where it was not given
    local visible
    [ -z "$gpus" ] || return 0
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        visible=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
    else
        visible=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    fi
    gpus=$((visible > 0 ? visible : 1))
}

find_python() { # sets python; imports come from this checkout and from no other environment
    unset PYTHONHOME
    export PYTHONPATH=$root PYTHONNOUSERSITE=1 TOKENIZERS_PARALLELISM=false
    python=${PROMPTKD_PYTHON:-$root/.venv/bin/python}
    if [ -z "${PROMPTKD_PYTHON:-}" ]; then
        [ -x "$python" ] || bash "$root/install.sh" >&2
    fi
    command -v "$python" >/dev/null || stop "PROMPTKD_PYTHON=$python is not there: name another or none"
}

launch() { # ENTRY OPTIONS...: plain Python for one process or for a rank that was started, torchrun for several
    local entry=$root/$1 meet
    shift
    find_python
    if prints_only; then
        exec "$python" "$entry" "$@"
    fi
    count_gpus
    if [ -n "$ranks" ] || { [ $((gpus * nodes)) -eq 1 ] && [ "$restarts" -eq 0 ]; }; then
        exec "$python" "$entry" "$@"
    elif [ "$nodes" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || stop "NNODES=$nodes needs MASTER_ADDR, the first machine's address, and NODE_RANK"
        [ "$port" -ne 0 ] || port=29500
        meet=(--nnodes "$nodes" --node_rank "$node" --master_addr "$MASTER_ADDR" --master_port "$port")
        if [ "$restarts" -gt 0 ]; then # here the machines agree on when all start again
            meet=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id promptkd --rdzv-endpoint "$MASTER_ADDR:$port")
        fi
    elif [ "$port" -ne 0 ]; then
        meet=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$port")
    else
        meet=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0)
    fi
    if [ "$restarts" -gt 0 ] && [[ $entry == */train.py ]]; then
        meet+=(--max_restarts "$restarts")
        [[ $given == *" --resume"[\ =]* ]] || set -- "$@" --resume auto
    fi
    exec "$python" -m torch.distributed.run --nproc_per_node "$gpus" "${meet[@]}" "$entry" "$@"
}
