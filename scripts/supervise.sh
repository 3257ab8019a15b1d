# shellcheck shell=bash
# Runs the stages of a script one after another; the same command resumes an interrupted run.
# To be sourced, which defines functions and does nothing else:
#
#     source scripts/supervise.sh
#     begin_run FOLDER "plan minutes=15"   # resume the run of this plan, or begin one
#     stage NAME COMMAND...                # run a stage, unless this run has finished it already
#     background NAME COMMAND...           # begin a command beside the stages that follow
#     wait_for NAME                        # wait for that command; the script ends if it failed
#     run_seconds                          # print what the stages took, interrupted ones included
#     end_run                              # forget the state: the next call begins a new run
#
# Where DRY_RUN is not empty, a stage only prints its command, and begin_run must not be called.
# Where STAGES is not empty, a list of names with commas, stages of other names are left out.
#
# A run keeps its state in FOLDER/speedrun.N.state, where N is a checksum of its plan: a call with
# another plan begins a run of its own, and leaves the first for its own command to resume. One
# fact a line:
#
#     plan minutes=15 data= gpus=0 custom= name=    the first line
#     run 1763750000-4242             exported as NANOCHAT_RUN: the name of the run in metrics.jsonl
#                                     and in its checkpoints
#     begun base_train                a training stage that was begun before gets --resume
#     pid 4711                        the process group of the stage that was started last
#     background 4712                 and of the command in the background
#     done dataset_rest               a command of this name that has ended well
#     seconds 240                     what a stage took
#
# One run at a time: two would train in the time of each other. FOLDER/speedrun.pid has the process
# of the script that runs now, and its name.
#
# Whether a stage is finished is not in the state: a finished stage has a line in
# FOLDER/metrics.jsonl that names the stage and the run.

# The folder and the state file of the run, and the file that names this process.
run_folder="" run_state="" run_pid_file=""
# The process group of the stage that runs now; 0: none.
run_child=0
# The process group of the command in the background; 0: none.
run_background=0
# The exit status that a signal asked for; 0: no signal came.
run_stopped=0

begin_run() {
    local folder="$1" plan="$2"
    run_folder="$folder" run_state="$folder/speedrun.$(checksum "$plan").state"

    if ! mkdir -p "$folder" 2>/dev/null; then
        echo "error: cannot create $folder: set NANOCHAT_BASE_DIR to a folder you can write" >&2
        exit 2
    fi
    claim_folder "$folder"
    if [ "$(head -n 1 "$run_state" 2>/dev/null)" = "$plan" ]; then
        echo "speedrun: resuming where the last one stopped ($run_state)"
        NANOCHAT_RUN="$(awk '$1 == "run" { print $2 }' "$run_state")"
    else
        NANOCHAT_RUN="$(date +%s)-$$"
        echo "{\"stage\": \"start\", \"run\": \"$NANOCHAT_RUN\"}" >>"$folder/metrics.jsonl"
        printf '%s\n' "$plan" "run $NANOCHAT_RUN" >"$run_state"
    fi
    export NANOCHAT_RUN
    # torchrun kills its ranks this many seconds after a signal, 30 by default: too few to save a
    # large model.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

    stop_what_was_left
    trap 'forward_signal INT 130' INT
    trap 'forward_signal TERM 143' TERM
    trap 'forward_signal HUP 129' HUP
}

# checksum TEXT: a number.
checksum() {
    printf '%s' "$1" | cksum | awk '{ print $1 }'
}

# claim_folder FOLDER: writes this process into FOLDER/speedrun.pid until the script ends. Refuses
# where the process that is written there is still running.
claim_folder() {
    local other name
    run_pid_file="$1/speedrun.pid"
    # noclobber: of two scripts, one creates the file
    if ! (set -C && echo "$$ ${0##*/}" >"$run_pid_file") 2>/dev/null; then
        read -r other name <"$run_pid_file" || true
        if is_running "${other:-}" "${name:-}"; then
            echo "error: another $name is running with the same NANOCHAT_BASE_DIR (process" \
                "$other): wait until it ends, or set another NANOCHAT_BASE_DIR" >&2
            exit 2
        fi
        echo "$$ ${0##*/}" >"$run_pid_file"
    fi
    trap 'end_background; rm -f "$run_pid_file"' EXIT
}

# is_running PROCESS NAME: whether that process is there, and its command names the script. After a
# crash the number may be another program's, and in a container that was started again our own.
is_running() {
    local command
    if [ -z "$1" ] || [ "$1" = $$ ] || ! kill -0 "$1" 2>/dev/null; then return 1; fi
    command="$(tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null || ps -o args= -p "$1" 2>/dev/null)"
    case "$command" in *"$2"*) return 0 ;; *) return 1 ;; esac
}

# A script that was killed without its stage leaves the stage running. Two processes must not train
# the same model, nor two models in the time of each other, so whatever plan the stage is of, it is
# asked to save and end, and has a minute for that.
stop_what_was_left() {
    local state
    for state in "$run_folder"/speedrun.*.state; do
        if [ -e "$state" ]; then stop_stage_of "$state"; fi
    done
}

# stop_stage_of STATE: stops the stage that the state file of a run names, where it is running, and
# the command in the background.
stop_stage_of() {
    local name stage background
    name="$(awk '$1 == "run" { print $2 }' "$1")"
    stage="$(awk '$1 == "pid" { pid = $2 } END { print pid }' "$1")"
    background="$(awk '$1 == "background" { pid = $2 } END { print pid }' "$1")"
    if [ -n "$stage" ]; then stop_process "$stage" "$name"; fi
    if [ -n "$background" ]; then stop_process "$background" "$name"; fi
}

# stop_process PROCESS RUN: stops the group of a process, where it is one of that run.
stop_process() {
    local left="$1" name="$2" i
    # The number may belong to another process by now: only one with the run's name is ours.
    if ! grep -qsz "^NANOCHAT_RUN=$name$" "/proc/$left/environ"; then return; fi

    echo "speedrun: the last one's stage is still running; stopping process $left," \
        "which may take a minute"
    kill -s TERM -- "-$left" 2>/dev/null || true
    for ((i = 0; i < 600; i++)); do
        if ! kill -0 -- "-$left" 2>/dev/null; then break; fi
        sleep 0.1 || true    # Ctrl+C ends it, which is no failure
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

# is_wanted NAME: whether STAGES has the name, or is empty.
is_wanted() {
    case ",${STAGES:-$1}," in *",$1,"*) return 0 ;; *) return 1 ;; esac
}

stage() {
    local name="$1"
    if ! is_wanted "$name"; then return; fi
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
        base_train | mid_train | chat_sft | chat_rl) return 0 ;;
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
        echo "speedrun: stopped in $name (status $status). $(what_resumes "$status")" >&2
        exit "$status"
    fi
}

# what_resumes STATUS: what to do after a stage that failed. Status 2 is bad input, which stays bad.
what_resumes() {
    if [ "$1" = 2 ]; then
        echo "Once that is mended, the same command resumes it."
    else
        echo "The same command resumes it."
    fi
}

# --------------------------------------------------------------------------------------------------
# a command in the background, such as a download; its output is in FOLDER/NAME.log

background() {
    local name="$1"
    shift
    if [ -n "$DRY_RUN" ]; then
        printf '%q ' "$@"
        echo "&"
        return
    fi
    if [ "$run_stopped" != 0 ]; then exit "$run_stopped"; fi
    if grep -qx "done $name" "$run_state"; then return; fi
    echo "speedrun: $* (in the background, $run_folder/$name.log)"
    set -m
    "$@" >"$run_folder/$name.log" 2>&1 &
    set +m
    run_background=$!
    echo "background $run_background" >>"$run_state"
}

# A download that is ended so continues where it was with the next call.
end_background() {
    if [ "$run_background" != 0 ]; then
        kill -s TERM -- "-$run_background" 2>/dev/null || true
        run_background=0
    fi
}

# wait_for NAME: every ten seconds the last line of its output shows what it does.
wait_for() {
    local name="$1" log="$run_folder/$1.log" status=0 begin="$SECONDS" shown="$SECONDS"
    if [ -n "$DRY_RUN" ]; then
        echo "wait"
        return
    fi
    if [ "$run_background" = 0 ]; then return; fi
    while [ "$run_stopped" = 0 ] && kill -0 "$run_background" 2>/dev/null; do
        if [ $((SECONDS - shown)) -ge 10 ]; then
            shown="$SECONDS"
            echo "speedrun: waiting for $name: $(tail -n 1 "$log")"
        fi
        sleep 0.2 || true    # Ctrl+C ends it as well: the loop ends by run_stopped
    done
    if [ "$run_stopped" = 0 ]; then wait "$run_background" || status=$?; fi
    if [ "$run_stopped" != 0 ]; then status="$run_stopped"; fi
    echo "seconds $((SECONDS - begin))" >>"$run_state"
    if [ "$status" != 0 ]; then
        tail -n 3 "$log" >&2
        echo "speedrun: stopped in $name (status $status). $(what_resumes "$status")" >&2
        exit "$status"    # which ends what is left of it
    fi
    run_background=0
    echo "done $name" >>"$run_state"
}

run_seconds() {
    LC_ALL=C awk '$1 == "seconds" { sum += $2 } END { print sum + 0 }' "$run_state"
}

end_run() {
    rm "$run_state"
}
