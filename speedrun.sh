#!/usr/bin/env bash
# From nothing to a chat, on the hardware that is here.
#
#     bash speedrun.sh                   # 15 minutes on a CPU; on GPUs depth 20, if they can do it
#     MINUTES=60 bash speedrun.sh        # the one dial: time, shared out over the stages; from 20
#                                        # minutes on there is reinforcement learning, too
#     DATA=notes/ bash speedrun.sh       # your own txt, md, jsonl, json, csv or parquet
#     CUSTOM=qa.jsonl bash speedrun.sh   # your own conversations, among those of ours
#     NAME=Bob bash speedrun.sh          # the model's name
#     GPUS=2 bash speedrun.sh            # two GPUs instead of all; GPUS=0 trains on the CPU
#     DEPTH=12 bash speedrun.sh          # layers of the model; without it the plan chooses
#     MODEL=mla bash speedrun.sh         # another kind of model (docs/models/families.md)
#     STAGES=mid_train,chat_sft,report bash speedrun.sh    # these stages alone, each with its share
#                                                          # of MINUTES as in the whole pipeline
#     DRY_RUN=1 bash speedrun.sh         # print the commands only (GPUS=8: as if there were eight)
#
# DEVICE_BATCH_SIZE and TOTAL_BATCH_SIZE are base_train's, instead of those that the plan chooses.
# Ctrl+C saves; the same command resumes the run. Everything is written under NANOCHAT_BASE_DIR
# (~/.cache/nanochat).
set -euo pipefail
refuse() { echo "error: $*" >&2; exit 2; }
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit
fi
if [ $# -gt 0 ]; then
    refuse "speedrun.sh takes no arguments, but variables before it: MINUTES=3 bash speedrun.sh"
fi
caller="$PWD" caller_base="${NANOCHAT_BASE_DIR:-}" caller_python="$(command -v python || true)"
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/supervise.sh    # begin_run, stage, run_seconds, end_run

# --------------------------------------------------------------------------------------------------
# What is asked for, and the hardware

# home_folder: $HOME. Where that is not set (a service, a container), bash says what the system
# lists for this user, and / for one whom it does not list.
home_folder() {
    local home="${HOME:-}"
    if [ -z "$home" ]; then
        home="$(unset HOME && echo ~)"
        if [ "$home" = / ]; then
            refuse "HOME is not set, and the system does not list this user:" \
                "set NANOCHAT_BASE_DIR to a folder you can write"
        fi
    fi
    echo "$home"
}

# absolute PATH: the path as the caller meant it, for commands that run in the repository. As in
# Python, ~ and ~NAME are also expanded where they were quoted.
absolute() {
    local user="${1%%/*}" home
    case "$1" in
        /*) echo "$1" ;;
        \~ | \~/*)
            home="$(home_folder)" || exit
            echo "$home${1:1}"
            ;;
        \~*)
            if ! [[ "$user" =~ ^~[A-Za-z_][A-Za-z0-9_.-]*$ ]] ||
                ! id -- "${user:1}" >/dev/null 2>&1; then
                refuse "$1: there is no user ${user:1}, write ./$1 or the whole path"
            fi
            eval "home=$user"
            echo "$home${1#"$user"}"
            ;;
        *) echo "$caller/$1" ;;
    esac
}

DRY_RUN="${DRY_RUN:-}" DATA="${DATA:-}" MINUTES="${MINUTES:-}" GPUS="${GPUS:-}"
CUSTOM="${CUSTOM:-}" NAME="${NAME:-}" DEPTH="${DEPTH:-}" STAGES="${STAGES:-}"
MODEL="${MODEL:-}"
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-}" TOTAL_BATCH_SIZE="${TOTAL_BATCH_SIZE:-}"
if [ "$DRY_RUN" = 0 ]; then DRY_RUN=""; fi
# Windows' subsystem for Linux gives every process a NAME: the machine's.
if [ -n "${WSL_DISTRO_NAME:-}" ] && [ "$NAME" = "${HOSTNAME:-}" ]; then NAME=""; fi
if [ -z "${NANOCHAT_BASE_DIR:-}" ]; then NANOCHAT_BASE_DIR="$(home_folder)/.cache/nanochat"; fi
NANOCHAT_BASE_DIR="$(absolute "$NANOCHAT_BASE_DIR")"
export NANOCHAT_BASE_DIR
if [ -n "$DATA" ]; then
    given="$DATA"
    DATA="$(absolute "$DATA")"
    if [ ! -e "$DATA" ]; then
        refuse "DATA=$given does not exist: name a file or a folder"
    fi
fi
if [ -n "$CUSTOM" ]; then
    given="$CUSTOM"
    CUSTOM="$(absolute "$CUSTOM")"
    if [ ! -f "$CUSTOM" ]; then
        refuse "CUSTOM=$given is not a file: name one with conversations (docs/conversations.md)"
    fi
fi
if [[ "$NAME" == *$'\n'* ]] || [ "${#NAME}" -gt 60 ]; then
    refuse "NAME must be one line of at most 60 characters"
fi
if [ -n "$MINUTES" ] && ! [[ "$MINUTES" =~ ^[0-9]+(\.[0-9]+)?$ && "$MINUTES" =~ [1-9] ]]; then
    refuse "MINUTES=$MINUTES is not a number of minutes above zero"
fi
if [ -n "$GPUS" ] && ! [[ "$GPUS" =~ ^(0|[1-9][0-9]{0,3})$ ]]; then
    refuse "GPUS=$GPUS is not a number of GPUs"
fi

for setting in DEPTH DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE; do
    if [ -n "${!setting}" ] && ! [[ "${!setting}" =~ ^[1-9][0-9]{0,9}$ ]]; then
        refuse "$setting=${!setting} is not a whole number above zero"
    fi
done
if [ -n "$MODEL" ]; then
    # its row in the table of models; a name with _ there is chosen by base_train alone
    table=nanochat/variants/__init__.py
    if ! [[ "$MODEL" =~ ^[a-z0-9]+$ ]] || ! grep -q "^    \"$MODEL\": " "$table"; then
        refuse "MODEL=$MODEL does not exist: docs/models/families.md has those that do"
    fi
fi
known="dataset,tok_train,tok_eval,base_train,base_loss,base_eval,mid_train,chat_sft,chat_rl"
known="$known,chat_eval,report"
given="$STAGES" STAGES=""
for name in ${given//,/ }; do
    case ",$known," in
        *",$name,"*) STAGES="${STAGES:+$STAGES,}$name" ;;
        *) refuse "STAGES has $name, which is no stage: choose from $known" ;;
    esac
done
if [ -n "$given" ] && [ -z "$STAGES" ]; then
    refuse "STAGES=$given names no stage: choose from $known"
fi
if [ "$STAGES" = report ]; then
    refuse "a report needs another stage: python -m nanochat.report writes that of the last run"
fi

# A GPU has one of these files, also where torch cannot use it. Training on the CPU beside an idle
# GPU must be asked for.
gpu_files="${GPU_FILES-/dev/nvidia0 /dev/kfd}"

# choose_gpus: sets GPUS to all that torch sees, unless the caller has set it.
choose_gpus() {
    local counted seen file patience
    # Importing scripts hides integrated GPUs. Older versions of torchrun do not read how long they
    # shall wait for a save. Where Python fails, the assignment ends the script; read would not.
    counted="$(python -c "
import scripts, inspect, torch, torch.distributed.launcher.api as launcher
patience = 600 if 'TORCH_ELASTIC_SHUTDOWN_TIMEOUT' in inspect.getsource(launcher) else 30
print(torch.cuda.device_count(), patience)")"
    read -r seen patience <<<"$counted"
    for file in $gpu_files; do
        if [ "$seen" = 0 ] && [ -e "$file" ]; then
            refuse "$file is here, but torch sees no GPU: check the driver, or install its torch" \
                "(. scripts/setup.sh; uv pip install --reinstall --torch-backend=auto torch)," \
                "or train on the CPU all the same with GPUS=0"
        fi
    done
    GPUS="${GPUS:-$seen}"
    if [ "$GPUS" -gt "$seen" ]; then
        refuse "GPUS=$GPUS, but torch sees $seen: ask for fewer; GPUS=0 trains on the CPU"
    fi
    if [ "$GPUS" -gt 1 ] && [ "${patience:-600}" = 30 ]; then
        echo "note: this version of torch ends its ranks 30 seconds after Ctrl+C: a model that" \
            "takes longer to save resumes from its last checkpoint; newer versions wait for 600"
    fi
}

# check_own: refuses a NAME or a file CUSTOM that chat_sft would refuse after the pretraining.
check_own() {
    local program="
import sys
from nanochat.common import install_error_hook
from tasks.customjson import CustomJSON
from tasks.identity import check_name
install_error_hook()
custom, name = sys.argv[1:]
check_name(name or None)
custom and CustomJSON(custom)"
    python -c "$program" "$CUSTOM" "$NAME" || exit
}

# can_practise: prints whether reinforcement learning can practise the MODEL, for which it must
# predict from left to right.
can_practise() {
    local program="
import sys
from nanochat.variants import CAUSAL
print('yes' if sys.argv[1] in CAUSAL else 'no')"
    python -c "$program" "$MODEL"
}

device=""    # empty: each stage chooses
can_rl=yes
if [ "$GPUS" = 0 ]; then device=cpu; fi
if [ -z "$DRY_RUN" ]; then
    source scripts/setup.sh || exit 1
    if [ "$device" = cpu ]; then
        # For tok_train, which has no such setting and takes a larger vocabulary on a GPU.
        export CUDA_VISIBLE_DEVICES=-1 HIP_VISIBLE_DEVICES=-1
    else
        choose_gpus
    fi
    if [ -n "$CUSTOM$NAME" ]; then check_own; fi
    if [ -n "$MODEL" ]; then can_rl="$(can_practise)"; fi
elif [ -n "$MODEL" ]; then
    can_rl="$(can_practise 2>/dev/null || echo yes)"   # a list of commands needs no torch
fi
GPUS="${GPUS:-0}"

# --------------------------------------------------------------------------------------------------
# What follows from it

# On GPUs the horizon of training follows from the depth, unless MINUTES limits it.
if [ "$GPUS" = 0 ]; then MINUTES="${MINUTES:-15}"; fi

# Where one of these is set, the plan is another: a run of its own for supervise.sh.
also=""
for setting in DEPTH MODEL DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE STAGES; do
    if [ -n "${!setting}" ]; then also="$also $setting=${!setting}"; fi
done

# is_named STAGE: whether STAGES names it, so that it is wanted also where it would be left out. A
# script that has made STAGES of those to leave out says in NAMED_STAGES what its caller named.
is_named() { [[ ",${NAMED_STAGES-$STAGES}," == *",$1,"* ]]; }

# has_rl: whether reinforcement learning is a part of this run. On a CPU its rollouts take minutes
# that the other stages need first. It practises the built-in tasks, which a chat about a text of
# yours is not judged by.
has_rl() {
    if is_named chat_rl; then return 0; fi
    if ! is_wanted chat_rl || [ -n "$DATA" ] || [ "$can_rl" = no ]; then return 1; fi
    [ -z "$MINUTES" ] || LC_ALL=C awk -v total="$MINUTES" 'BEGIN { exit !(total >= 20) }'
}

# The stage whose model is the chat that is evaluated and talked to.
chat_source=sft
if has_rl; then chat_source=rl; fi

# shards_of DEPTH: shards of FineWeb-Edu, of 250 M characters each, for 20 tokens of 4.8 characters
# for each weight in a matmul. Depth 20 at a vocabulary of 65,536 has 477 M (393 M in the blocks'
# matrices, 84 M in the head): 183 shards, and seven to be on the safe side.
shards_of() {
    LC_ALL=C awk -v depth="$1" 'BEGIN {
        width = 64 * depth
        weights = 12 * depth * width ^ 2 + 65536 * width
        shards = int(1.035 * weights * 20 * 4.8 / 250e6) + 1
        print (shards < 1822) ? shards : 1822
    }'
}

# planned_depth: the layers of the model that base_train will choose on this machine; without a
# machine, those of the documented run.
planned_depth() {
    local words=("--gpus=$GPUS")
    if [ -n "$DRY_RUN" ]; then
        echo 20
        return
    fi
    if [ -n "$MINUTES" ]; then words+=("--minutes=$(minutes_of base_train)"); fi
    if [ -n "$MODEL" ]; then words+=("--model=$MODEL"); fi
    python -m scripts.plan "${words[@]}" |
        python -c 'import json, sys; print(json.loads(sys.stdin.readlines()[-1])["depth"])'
}

# minutes_of STAGE: what a training stage gets of MINUTES. Reinforcement learning takes an eighth,
# ten minutes at most. The two chat stages need two minutes even where there are only three, and get
# a third of what comes on top. The other stages and start-up are not in MINUTES: about a minute and
# a half on two slow cores.
minutes_of() {
    LC_ALL=C awk -v total="$MINUTES" -v stage="$1" -v source="$chat_source" 'BEGIN {
        if (source == "rl") minutes["chat_rl"] = total < 80 ? total / 8 : 10
        total -= minutes["chat_rl"]
        base = total > 2.4 ? 0.63 * total - 0.99 : 0.2 * total
        minutes["base_train"] = base
        minutes["mid_train"] = 0.4 * (total - base)
        minutes["chat_sft"] = 0.6 * (total - base)
        printf "%.3f", minutes[stage]
    }'
}

# is_trial: whether MINUTES are so few that a run only shows that every stage works. base_train then
# scores fewer documents (TRIAL_MINUTES in nanochat/plan.py), and chat_eval asks fewer questions.
is_trial() {
    [ -n "$MINUTES" ] && LC_ALL=C awk -v total="$MINUTES" 'BEGIN { exit !(total < 1.25) }'
}

# tag_settings: prints two words, the setting that names this run's chat model and its base model,
# or - where a command without it takes that model.
tag_settings() {
    python -c "
import os, sys
from nanochat.folders import tag_setting
run = os.environ['NANOCHAT_RUN']
print(*(tag_setting(stage, run) or '-' for stage in (sys.argv[1], 'base')))" "$chat_source"
}

# how_to_talk: prints the commands that use the model, as they work where the caller stands.
how_to_talk() {
    local folder="" activate chat base
    read -r chat base <<<"$(tag_settings)"
    if [ "$chat" = - ]; then chat=""; fi
    if [ "$base" = - ]; then base=""; fi
    if [ "$chat_source" = rl ]; then chat="--source=rl${chat:+ $chat}"; fi
    activate="$(dirname "$(command -v python)")/activate"
    if [ -n "$caller_base" ]; then
        folder="$(printf 'NANOCHAT_BASE_DIR=%q ' "$NANOCHAT_BASE_DIR")"
    fi
    echo "The model is ready. To talk to it:"
    if [ "$caller" != "$PWD" ]; then printf '  cd %q\n' "$PWD"; fi
    if [ "$(command -v python)" != "$caller_python" ]; then
        printf '  source %q\n' "${activate#"$PWD/"}"
    fi
    echo "  ${folder}python -m scripts.chat_cli${chat:+ $chat}    # in the terminal"
    echo "  ${folder}python -m scripts.chat_web${chat:+ $chat}    # in the browser"
    echo "  ${folder}python -m scripts.complete${base:+ $base} \"My name is\"" \
        "   # the base model continues a text"
}

# model_stage NAME SETTING...: a stage that runs the model, in one process for each GPU.
model_stage() {
    local name="$1" command
    shift
    if [ -n "$device" ]; then set -- "$@" "--device_type=$device"; fi
    if [ "$GPUS" -gt 1 ]; then
        # The two dashes end torchrun's own settings.
        command=(torchrun --standalone "--nproc_per_node=$GPUS" -m "scripts.$name" --)
    else
        command=(python -m "scripts.$name")
    fi
    stage "$name" "${command[@]}" "$@"
}

# --------------------------------------------------------------------------------------------------
# The stages. ${X:+"--x=$X"} is one word where X is set, and nothing where it is empty.

if [ -z "$DRY_RUN" ]; then
    begin_run "$NANOCHAT_BASE_DIR" \
        "plan minutes=$MINUTES data=$DATA gpus=$GPUS custom=$CUSTOM name=$NAME$also"
fi

# 1. Text: on a CPU what this machine's Python packages say, on GPUs FineWeb-Edu, or your own. The
#    tokenizer learns from eight shards (2 billion characters); the rest comes meanwhile.
fetch=(python -m nanochat.dataset --source=fineweb)
shards=0 first=0
if [ -z "$DATA" ] && [ "$GPUS" = 0 ]; then
    stage dataset python -m nanochat.dataset --source=local
elif [ -z "$DATA" ] && is_wanted dataset; then
    if [ -z "$DEPTH" ]; then depth="$(planned_depth)"; fi
    shards="$(shards_of "${DEPTH:-$depth}")"
    first=$((shards < 8 ? shards : 8))
    stage dataset "${fetch[@]}" -n "$first"
    if [ "$shards" -gt "$first" ]; then background dataset_rest "${fetch[@]}" -n "$shards"; fi
fi

# 2. The tokenizer learns which byte sequences are common enough to become tokens. A portable model
#    is to leave for llama.cpp as well, which reads numbers digit by digit (docs/export.md).
digits=""
if [ "$MODEL" = portable ]; then digits=1; fi
stage tok_train python -m scripts.tok_train ${DATA:+"--data=$DATA"} ${digits:+"--digits=$digits"}
stage tok_eval python -m scripts.tok_eval ${DATA:+"--data=$DATA"}

# 3. Pretraining: the model learns to predict the next token of the text, which takes most time.
if [ "$shards" -gt "$first" ]; then wait_for dataset_rest; fi
model_stage base_train ${DATA:+"--data=$DATA"} ${DEPTH:+"--depth=$DEPTH"} \
    ${MODEL:+"--model=$MODEL"} \
    ${DEVICE_BATCH_SIZE:+"--device_batch_size=$DEVICE_BATCH_SIZE"} \
    ${TOTAL_BATCH_SIZE:+"--total_batch_size=$TOTAL_BATCH_SIZE"} \
    ${MINUTES:+"--minutes=$(minutes_of base_train)"}
if [ "$GPUS" -gt 0 ] || is_named base_loss; then
    model_stage base_loss ${DATA:+"--data=$DATA"}
fi
# CORE: on a CPU a model of minutes would only guess, for longer than it has been trained.
if [ "$GPUS" -gt 0 ] || is_named base_eval; then
    model_stage base_eval --optional=1    # without its questions it says where to get them
fi

# 4. Midtraining: the model meets conversations, their special tokens, and tools.
model_stage mid_train ${NAME:+"--name=$NAME"} ${MINUTES:+"--minutes=$(minutes_of mid_train)"}

# 5. Fine-tuning: the model learns to answer as the assistant of a conversation.
model_stage chat_sft ${CUSTOM:+"--custom=$CUSTOM"} ${NAME:+"--name=$NAME"} \
    ${MINUTES:+"--minutes=$(minutes_of chat_sft)"}

# 6. Reinforcement learning: the model learns from those of its own answers that were right.
# 7. Evaluation: the chat model answers questions whose answers are known.
items=""
if is_trial; then items=32; fi
if [ "$chat_source" = rl ]; then
    model_stage chat_rl ${MINUTES:+"--minutes=$(minutes_of chat_rl)"}
    model_stage chat_eval --source=rl
else
    model_stage chat_eval ${items:+"--items=$items"}
fi

# 8. The report gathers the numbers of all stages in report.md.
if ! is_wanted report; then
    if [ -z "$DRY_RUN" ]; then end_run; fi
    exit
fi
if [ -n "$DRY_RUN" ]; then
    echo "python -m nanochat.report --speedrun"
    exit
fi
report="$(python -m nanochat.report --speedrun "--seconds=$(run_seconds)")"
end_run
how_to_talk
echo "$report"    # what the model can do, then the record of the run
