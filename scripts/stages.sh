# shellcheck shell=bash
# What scripts that run a whole experiment share: they source it from the project's root, with $out, the folder that
# everything goes into. A stage that is done is kept; the next run begins where the last one was stopped.
set -euo pipefail

python=${PROMPTKD_PYTHON:-.venv/bin/python}
[ -n "${PROMPTKD_PYTHON:-}" ] || bash install.sh
mkdir -p "$out/done"
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Threads that wait for each other sleep soon: where something else uses the cores, spinning makes a step seven times
# as long.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

stage() { # NAME "EARLIER STAGES" COMMAND...: unless it was done with the same files behind the same earlier stages
    local name=$1 earlier=$2 began=$SECONDS key
    shift 2
    key=$(key_of "$@" $(printf "$out/done/%s\n" $earlier))
    if [ "$(cat "$out/done/$name" 2>/dev/null)" = "$key" ]; then echo "== $name: done before" && return; fi
    if [ "$(cat "$out/done/$name.begun" 2>/dev/null)" != "$key" ]; then # what is there comes from other settings
        rm -rf "${out:?}/$name" "$out/done/$name"
        echo "$key" >"$out/done/$name.begun"
    fi
    echo "== $name: $*"
    "$@"
    echo "$key" >"$out/done/$name"
    echo "== $name: $((SECONDS - began)) s"
}

key_of() { # WORDS...: of the words, and of the content of those that are files
    for word in "$@"; do
        echo "$word"
        if [ -f "$word" ] && [ "$word" != "$python" ]; then cat "$word"; fi
    done | cksum
}
