#!/usr/bin/env bash
# From nothing to a chat, on the hardware that is here.
#
#     bash speedrun.sh                   # 15 minutes on a CPU; on GPUs the documented depth-20 run
#     MINUTES=60 bash speedrun.sh        # the one dial: time, shared out over the stages
#     DATA=notes/ bash speedrun.sh       # your own .txt, .md, .jsonl or parquet
#     DRY_RUN=1 bash speedrun.sh         # print the commands and do nothing (GPUS=8: as if there were eight)
#
# Ctrl+C saves; the same command goes on from there. Everything is written under NANOCHAT_BASE_DIR (~/.cache/nanochat).
set -euo pipefail
refuse() { echo "error: $*" >&2; exit 2; }
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; fi
if [ $# -gt 0 ]; then refuse "speedrun.sh takes no arguments, but variables before it: MINUTES=3 bash speedrun.sh"; fi
DRY_RUN="${DRY_RUN:-}" DATA="${DATA:-}" MINUTES="${MINUTES:-}" GPUS="${GPUS:-}"
if [ -n "$DATA" ] && [ ! -e "$DATA" ]; then refuse "DATA=$DATA does not exist: name a file or a folder"; fi
case "$DATA" in "" | /*) ;; *) DATA="$PWD/$DATA" ;; esac
case "$GPUS" in *[!0-9]*) refuse "GPUS=$GPUS is not a number of GPUs" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -z "$DRY_RUN" ]; then
    source scripts/setup.sh || exit 1
    GPUS="$(python -c 'import torch; print(torch.cuda.device_count())')"
fi
GPUS="${GPUS:-0}"
if [ "$GPUS" = 0 ]; then MINUTES="${MINUTES:-15}"; fi
if ! [[ "${MINUTES:-1}" =~ ^[0-9]+(\.[0-9]+)?$ && "${MINUTES:-1}" =~ [1-9] ]]; then refuse "MINUTES=$MINUTES is not a number of minutes above zero"; fi

# What a stage gets. The chat needs two minutes of training whatever the rest; tokenizer, validation, evaluation and
# start-up come on top, about a minute and a half on two slow cores.
share() { awk -v m="$MINUTES" "BEGIN { base = m > 2.4 ? 0.63 * m - 0.99 : 0.2 * m; printf \"%.3f\", ($1) }"; }
base_time=() mid_time=() sft_time=()
if [ -n "$MINUTES" ]; then
    base_time=("--minutes=$(share 'base')")
    mid_time=("--minutes=$(share '0.4 * (m - base)')")
    sft_time=("--minutes=$(share '0.6 * (m - base)')")
fi

# A second call goes on where the first one stopped: what was begun stands in the state, and a stage that ended left its record
# in metrics.jsonl, with the run that it was part of.
base_dir="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
state="$base_dir/speedrun.state"
plan="plan minutes=$MINUTES data=$DATA gpus=$GPUS"
if [ -z "$DRY_RUN" ]; then
    mkdir -p "$base_dir" 2>/dev/null || refuse "cannot create $base_dir: set NANOCHAT_BASE_DIR to a folder you can write"
    if [ "$(head -n 1 "$state" 2>/dev/null)" = "$plan" ]; then
        echo "speedrun: going on where the last one stopped ($state)"
    else
        printf '%s\n' "$plan" "run $(date +%s)-$$" >"$state"
        echo '{"stage": "start"}' >>"$base_dir/metrics.jsonl"
    fi
    NANOCHAT_RUN="$(awk '$1 == "run" { print $2 }' "$state")"
    export NANOCHAT_RUN
    # A script that was killed alone leaves its stage behind.
    left="$(awk '$1 == "pid" { pid = $2 } END { print pid }' "$state")"
    if [ -n "$left" ] && grep -qsz "^NANOCHAT_RUN=$NANOCHAT_RUN$" "/proc/$left/environ"; then
        echo "speedrun: the last one's stage goes on without it; stopping process $left, which saves"
        kill -s TERM -- "-$left" 2>/dev/null || true
        for ((i = 0; i < 600; i++)); do
            if ! kill -0 -- "-$left" 2>/dev/null; then break; fi
            sleep 0.1
        done
    fi
fi

# A signal goes on to the stage, which runs in a process group of its own: it saves and says so, and the script stops below.
child=0 stopped=0
forward() { stopped="$2"; if [ "$child" != 0 ]; then kill -s "$1" -- "-$child" 2>/dev/null || true; fi; }
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM
trap 'forward HUP 129' HUP
seconds() { awk '$1 == "seconds" { s += $2 } END { print s + 0 }' "$state"; }

# stage NAME COMMAND...: run it, unless it is done; a training stage that was begun is resumed.
stage() {
    local name="$1" begin status=0
    shift
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    if [ "$stopped" != 0 ]; then exit "$stopped"; fi
    if grep -qs "^{\"stage\": \"$name\", .*\"run\": \"$NANOCHAT_RUN\"" "$base_dir/metrics.jsonl"; then return; fi
    if grep -qx "begun $name" "$state" && [[ "$name" == base_train || "$name" == mid_train || "$name" == chat_sft ]]; then
        set -- "$@" --resume
    fi
    echo "begun $name" >>"$state"
    echo "speedrun: $*"
    begin=$SECONDS
    set -m
    "$@" &
    set +m
    child=$!
    echo "pid $child" >>"$state"
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ended the waiting, not the stage
        status=0
        wait "$child" || status=$?
    done
    child=0
    if [ "$stopped" != 0 ]; then status="$stopped"; fi  # torchrun's own is 1 then
    echo "seconds $((SECONDS - begin))" >>"$state"
    if [ "$status" != 0 ]; then
        echo "speedrun: stopped in $name (status $status). The same command goes on from there." >&2
        exit "$status"
    fi
}

run=(python -m)
if [ "$GPUS" -gt 1 ]; then run=(torchrun --standalone "--nproc_per_node=$GPUS" -m); fi
dashes=() data=() depth=()
if [ "$GPUS" -gt 1 ]; then dashes=(--); fi
if [ -n "$DATA" ]; then data=("--data=$DATA"); fi
if [ "$GPUS" -gt 0 ] && [ -z "$MINUTES" ]; then depth=(--depth=20); fi

if [ -z "$DATA" ]; then
    # 435 M weights in matmuls x 20 tokens x 4.8 characters is 167 shards of 250 M characters
    if [ "$GPUS" -gt 0 ]; then stage dataset python -m nanochat.dataset --source=fineweb -n 180
    else stage dataset python -m nanochat.dataset --source=local; fi
fi
stage tok_train python -m scripts.tok_train ${data[@]+"${data[@]}"}
stage tok_eval python -m scripts.tok_eval ${data[@]+"${data[@]}"}
stage base_train "${run[@]}" scripts.base_train ${dashes[@]+"${dashes[@]}"} ${depth[@]+"${depth[@]}"} ${data[@]+"${data[@]}"} ${base_time[@]+"${base_time[@]}"}
if [ "$GPUS" -gt 0 ]; then stage base_loss "${run[@]}" scripts.base_loss ${dashes[@]+"${dashes[@]}"} ${data[@]+"${data[@]}"}; fi
stage mid_train "${run[@]}" scripts.mid_train ${dashes[@]+"${dashes[@]}"} ${mid_time[@]+"${mid_time[@]}"}
stage chat_sft "${run[@]}" scripts.chat_sft ${dashes[@]+"${dashes[@]}"} ${sft_time[@]+"${sft_time[@]}"}
stage chat_eval "${run[@]}" scripts.chat_eval
if [ -n "$DRY_RUN" ]; then
    echo "python -m nanochat.report --speedrun"
    exit 0
fi
report="$(python -m nanochat.report --speedrun "--seconds=$(seconds)")"
rm "$state"
echo "Talk to it:  python -m scripts.chat_cli   or   python -m scripts.chat_web   (source .venv/bin/activate first)"
echo "$report"
