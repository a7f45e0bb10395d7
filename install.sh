#!/usr/bin/env bash
# Create .venv beside this file and install the package in it, in editable mode and with the exact versions of
# constraints.txt, for CPU and CUDA machines. Run it again at any time: a complete installation is kept, changed
# versions are updated in place, and an interrupted installation starts over.
#
#   bash install.sh
#   bash install.sh --extras wandb,trackio            # with extras of pyproject.toml, which later runs keep
#   PYTHON=/path/to/python3.12 bash install.sh        # another interpreter than python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
log=$venv/install.log     # written first: its presence says that this script made the folder
stamp=$venv/install.stamp # written last: its presence says that the installation is complete
wanted=$venv/install.extras # the extras, and the checkout that the folder belongs to
pip_version=26.3
cpu_index=https://download.pytorch.org/whl/cpu

# Nothing of an active environment or of the user's packages may leak in; DeepSpeed must compile nothing.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0

say() { printf 'install.sh: %s\n' "$1"; }
stop() {
    say "$1" >&2
    exit 2
}
recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
venv_python() { "$venv/bin/python" "$@"; }

# The extras to install: the usual ones, those of earlier runs, and those of --extras.
choose_extras() {
    local known name
    known=$(sed -n '/optional-dependencies/,/^\[project.scripts/ s/^\([a-z]*\) = .*/\1/p' "$root/pyproject.toml" | xargs)
    case "$#:${1:-}" in
    0:) ;;
    2:--extras) for name in ${2//,/ }; do
        [[ " $known " == *" $name "* ]] || stop "--extras $name: choose from $known"
    done ;;
    *) stop "the only option is --extras NAME,NAME with names from $known" ;;
    esac
    extras=$(printf '%s\n' dev bnb data "$(sed -n 1p "$wanted" 2>/dev/null)" "${2:-}" |
        tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd, -)
}

# What the installation is made from. The path counts: scripts in .venv/bin name it and break when it moves.
fingerprint() {
    cat "$root"/{pyproject.toml,constraints.txt} | cksum
    printf 'pip %s\nextras %s\n%s\n' "$pip_version" "$extras" "$root"
}

usable() { # .venv has a working Python, and the one that was asked for
    venv_python -c pass 2>/dev/null &&
        { [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -V 2>&1)" = "$(venv_python -V 2>&1)" ]; }
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || stop "PYTHON=$PYTHON is not there: name another or none"
        recent_python "$PYTHON" || stop "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1): name 3.10 or newer"
        python=$PYTHON
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10; do
        if recent_python "$candidate"; then
            python=$candidate
            return
        fi
    done
    stop "no Python 3.10 or newer (python3: $(python3 -V 2>/dev/null || echo missing)): name one in PYTHON"
}

need_disk() { # GB for the finished .venv and the archives that pip unpacks; what .venv holds already counts
    local free used=0
    free=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
    if [ -d "$venv" ]; then
        free=$(df -Pk "$venv/" | awk 'NR == 2 { print $4 }')
        used=$(du -sk "$venv/" | cut -f1)
    fi
    [ $(((free + used) / 1000000)) -ge "$1" ] ||
        stop "$((free / 1000000)) GB free, $1 GB needed: free some disk, or make .venv a link to another"
}

# PyPI's PyTorch for Linux brings CUDA. Where pip knows a place that has the CPU build, it takes that one.
finds_cpu_build() { # arguments: options of pip
    ${limit:+timeout "$limit"} "$venv/bin/python" -m pip index versions torch "$@" 2>/dev/null |
        grep -F "$torch+cpu" >/dev/null
}

# Without an NVIDIA GPU the CPU build is enough. It is fetched without its dependencies, so that these come from the
# machine's own index. An index that is set is the only one asked. Whatever fails here leaves PyPI's build.
install_torch() {
    torch=$(sed -n 's/^torch==//p' "$root/constraints.txt")
    if compgen -G "$venv/lib/python3*/site-packages/torch-$torch*.dist-info" >/dev/null ||
        [ "$(uname -s)" != Linux ] || finds_cpu_build; then
        return
    fi
    if ! [ -e /proc/driver/nvidia ] && ! command -v nvidia-smi >/dev/null &&
        ! venv_python -m pip config list | grep -E '\.(index-url|no-index)=' >/dev/null &&
        limit=10 finds_cpu_build --index-url "$cpu_index" --timeout 4 --retries 0; then
        say "no NVIDIA GPU here: installing the CPU build of torch (0.2 GB)"
        say "for the CUDA build: rm -r .venv && PIP_INDEX_URL=https://pypi.org/simple bash install.sh"
        venv_python -m pip install --progress-bar off --no-deps --index-url "$cpu_index" "torch==$torch" \
            >>"$log" 2>&1 && return
    fi
    say "installing PyPI's build of torch (3 GB with CUDA)"
    need_disk 9
}

show_progress() {
    awk '/Downloading .*\(([2-9][0-9]|[0-9][0-9][0-9]+)\.[0-9]+ MB\)/ {
             print "  downloading " $2 " " $3 " " $4; fflush() }
         /^Building wheels for/ { sub(/^.*: /, ""); print "  building " $0; fflush() }
         /^Installing collected packages/ && NF > 4 { print "  unpacking " NF - 3 " packages"; fflush() }'
}

remedy() {
    case $(tail -n 80 "$log") in
    *"No space left"* | *"Disk quota"*)
        echo "the disk is full: free some space (TMPDIR=/another/folder moves pip's temporary files)" ;;
    *"Retrying (Retry"* | *"Read timed out"* | *SSLError*)
        echo "the package index did not answer: check the network, or name a mirror in PIP_INDEX_URL" ;;
    *"No matching distribution"*)
        echo "a package has no build for $(venv_python -V) here: try PYTHON=python3.11 bash install.sh" ;;
    *) echo "the whole log is $log" ;;
    esac
}

logged() { # runs a command with its output in the log; when it fails: the log's end and a remedy
    local status=0
    "$@" 2>&1 | tee -a "$log" | show_progress || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 12 "$log" | cut -c 1-300 >&2
        stop "not finished; $(remedy)"
    fi
}

make_venv() {
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python lacks venv: sudo apt-get install python3-venv, or name another Python in PYTHON"
    mkdir -p "$venv"
    # Emptied rather than removed: it may be a link to another disk.
    find "$venv/" -mindepth 1 -maxdepth 1 -exec rm -rf {} +
    : >"$log"
    say "making .venv with $("$python" -V)"
    logged "$python" -m venv "$venv"
}

prepare_venv() { # leaves a .venv that pip can install into
    if [ -d "$venv" ] && [ ! -f "$log" ] && [ -n "$(ls -A "$venv")" ]; then
        stop "$venv was not made by this script: move it away or delete it"
    fi
    owner=$(sed -n 2p "$wanted" 2>/dev/null || true)
    if [ -n "$owner" ] && ! [ "$owner" -ef "$root" ] && [ "$owner/.venv" -ef "$venv" ]; then
        stop "$venv is a link to the environment of $owner: delete the link, and run this again"
    fi
    need_disk 3
    if grep -qxF "$root" "$stamp" 2>/dev/null && usable; then
        rm "$stamp"
        say "pyproject.toml, constraints.txt or the extras have changed: updating .venv"
    else
        find_python
        make_venv
    fi
    printf '%s\n' "$extras" "$root" >"$wanted"
    logged venv_python -m pip install "pip==$pip_version"
}

# Two runs at once would spoil each other's work. Where the file system has no locks, nobody waits.
if command -v flock >/dev/null; then
    exec 9<"$root/install.sh"
    flock -n 9 || { say "waiting for another run" && flock 9; } || true
fi

choose_extras "$@"
if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && usable; then
    say ".venv is up to date"
    exit 0
fi

prepare_venv
install_torch
say "installing the packages: some minutes; details in .venv/install.log"
logged venv_python -m pip install --progress-bar off --build-constraint "$root/constraints.txt" \
    --constraint "$root/constraints.txt" --editable "$root[$extras]"
say "checking that they import"
logged venv_python -m pip check
logged venv_python -c 'import deepspeed, matplotlib, peft, promptkd, rouge_score, sentencepiece, transformers'
fingerprint >"$stamp"
say "ready: $(venv_python -V), $(venv_python -c 'import torch
print("torch", torch.__version__, "with", torch.cuda.device_count(), "CUDA devices")')"
