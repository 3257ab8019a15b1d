# shellcheck shell=bash
# Runs the stages of a script one after another; the same command resumes an interrupted run.
# To be sourced, which defines functions and does nothing else:
#
#     source scripts/supervise.sh
#     begin_run FOLDER "plan minutes=15"   # resume the run that has this plan, or begin one
#     stage NAME COMMAND...                # run a stage, unless this run has finished it already
#     run_seconds                          # print what the stages took, interrupted ones included
#     end_run                              # forget the state: the next call begins a new run
#
# Where DRY_RUN is not empty, a stage only prints its command, and begin_run must not be called.
#
# A run keeps its state in FOLDER/speedrun.state, one fact a line:
#
#     plan minutes=15 data= gpus=0 custom= name=    the first line; another plan begins a new run
#     run 1763750000-4242             exported as NANOCHAT_RUN: the name of the run in metrics.jsonl
#     begun base_train                a training stage that was begun before gets --resume
#     pid 4711                        the process group of the stage that was started last
#     seconds 240                     what a stage took
#
# Whether a stage is finished is not in the state: a finished stage has a line in
# FOLDER/metrics.jsonl that names the stage and the run.

# The folder and the state file of the run.
run_folder="" run_state=""
# The process group of the stage that runs now; 0: none.
run_child=0
# The exit status that a signal asked for; 0: no signal came.
run_stopped=0

begin_run() {
    local folder="$1" plan="$2"
    run_folder="$folder" run_state="$folder/speedrun.state"

    if ! mkdir -p "$folder" 2>/dev/null; then
        echo "error: cannot create $folder: set NANOCHAT_BASE_DIR to a folder you can write" >&2
        exit 2
    fi
    if [ "$(head -n 1 "$run_state" 2>/dev/null)" = "$plan" ]; then
        echo "speedrun: resuming where the last one stopped ($run_state)"
    else
        printf '%s\n' "$plan" "run $(date +%s)-$$" >"$run_state"
        echo '{"stage": "start"}' >>"$folder/metrics.jsonl"
    fi
    NANOCHAT_RUN="$(awk '$1 == "run" { print $2 }' "$run_state")"
    export NANOCHAT_RUN
    # torchrun kills its ranks this many seconds after a signal, 30 by default: too few to save a
    # large model.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

    stop_what_was_left
    trap 'forward_signal INT 130' INT
    trap 'forward_signal TERM 143' TERM
    trap 'forward_signal HUP 129' HUP
}

# A script that was killed without its stage leaves the stage running. Two processes must not train
# the same model, so the stage is asked to save and end, and has a minute for that.
stop_what_was_left() {
    local left i
    left="$(awk '$1 == "pid" { pid = $2 } END { print pid }' "$run_state")"
    if [ -z "$left" ]; then return; fi

    # The number may belong to another process by now: only one with this run's name is ours.
    if ! grep -qsz "^NANOCHAT_RUN=$NANOCHAT_RUN$" "/proc/$left/environ"; then return; fi

    echo "speedrun: the last one's stage is still running; stopping process $left, which saves"
    kill -s TERM -- "-$left" 2>/dev/null || true
    for ((i = 0; i < 600; i++)); do
        if ! kill -0 -- "-$left" 2>/dev/null; then break; fi
        sleep 0.1
    done
}

# forward_signal NAME STATUS: hands a signal to the stage, which saves and says so. The script exits
# with STATUS once the stage has ended.
forward_signal() {
    run_stopped="$2"
    if [ "$run_child" != 0 ]; then
        kill -s "$1" -- "-$run_child" 2>/dev/null || true
    fi
}

stage() {
    local name="$1"
    shift
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    if [ "$run_stopped" != 0 ]; then exit "$run_stopped"; fi
    if is_finished "$name"; then return; fi
    if is_resumable "$name" && grep -qx "begun $name" "$run_state"; then
        set -- "$@" --resume
    fi
    run_stage "$name" "$@"
}

is_finished() {
    grep -qs "^{\"stage\": \"$1\", .*\"run\": \"$NANOCHAT_RUN\"" "$run_folder/metrics.jsonl"
}

# Training stages have checkpoints to resume from; the others simply run again.
is_resumable() {
    case "$1" in
        base_train | mid_train | chat_sft) return 0 ;;
        *) return 1 ;;
    esac
}

# run_stage NAME COMMAND...: runs the command to its end. Exits the script where the command failed
# or a signal came.
run_stage() {
    local name="$1" begin="$SECONDS" status=0
    shift
    echo "begun $name" >>"$run_state"
    echo "speedrun: $*"

    # Job control gives the stage a process group of its own: Ctrl+C reaches it by forward_signal,
    # once.
    set -m
    "$@" &
    set +m
    run_child=$!
    if [ "$run_stopped" != 0 ]; then forward_signal TERM "$run_stopped"; fi    # it came just before
    echo "pid $run_child" >>"$run_state"

    # A signal ends `wait`, but not the stage: wait again until the stage is gone.
    wait "$run_child" || status=$?
    while kill -0 "$run_child" 2>/dev/null; do
        status=0
        wait "$run_child" || status=$?
    done
    run_child=0

    # After a signal torchrun exits with 1; the signal's own status says more.
    if [ "$run_stopped" != 0 ]; then status="$run_stopped"; fi
    echo "seconds $((SECONDS - begin))" >>"$run_state"
    if [ "$status" != 0 ]; then
        echo "speedrun: stopped in $name (status $status). The same command resumes it." >&2
        exit "$status"
    fi
}

run_seconds() {
    LC_ALL=C awk '$1 == "seconds" { sum += $2 } END { print sum + 0 }' "$run_state"
}

end_run() {
    rm "$run_state"
}
