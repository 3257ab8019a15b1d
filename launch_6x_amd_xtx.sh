#!/usr/bin/env bash
# The whole pipeline on six AMD Radeon RX 7900 XTX of 24 GB, or on the AMD cards that are here.
#
#     bash launch_6x_amd_xtx.sh                            # all stages, on all discrete cards
#     bash launch_6x_amd_xtx.sh --dry_run=1                # print every command; on any machine
#     bash launch_6x_amd_xtx.sh --gpus=2                   # two of the cards
#     bash launch_6x_amd_xtx.sh --depth=12                 # 20 without it and without MINUTES
#     bash launch_6x_amd_xtx.sh --device_batch_size=6      # sequences per card and pass
#     bash launch_6x_amd_xtx.sh --stages=base_train,base_loss    # these stages alone
#     bash launch_6x_amd_xtx.sh --skip=dataset,tok_train,tok_eval,base_train,base_loss
#
# The stages: dataset tok_train tok_eval base_train base_loss base_eval mid_train chat_sft chat_rl
# chat_eval report.
# It sets what ROCm and RCCL read, finds the cards and their memory, takes the batch from it, tests
# whether the cards can reach each other's memory, and starts speedrun.sh, whose variables (MINUTES,
# DATA, CUSTOM, NAME) work here as well. A variable that you have exported stands. --vram_gb=24 in
# place of what rocm-smi says. Ctrl+C saves, and the same command resumes.
set -euo pipefail
export LC_ALL=C    # a point in numbers, plain ranges in patterns
refuse() { local line="$*"; echo "error: ${line//[[:cntrl:]]/?}" >&2; exit 2; }
say() { echo "launch: $*"; }

# --------------------------------------------------------------------------------------------------
# Settings

# speedrun.sh's variables, before what the command line says
gpus="${GPUS:-}" depth="${DEPTH:-}" device_batch_size="${DEVICE_BATCH_SIZE:-}"
total_batch_size="${TOTAL_BATCH_SIZE:-}" stages="${STAGES:-}" dry_run="${DRY_RUN:-}"
skip="" vram_gb=""
all_stages="dataset,tok_train,tok_eval,base_train,base_loss,base_eval,mid_train,chat_sft,chat_rl"
all_stages="$all_stages,chat_eval,report"
choices="--gpus=N --depth=N --device_batch_size=N --stages=A,B --skip=A,B --vram_gb=N --dry_run=1"

for word in "$@"; do
    case "$word" in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
        --gpus=*) gpus="${word#*=}" ;;
        --depth=*) depth="${word#*=}" ;;
        --device_batch_size=*) device_batch_size="${word#*=}" ;;
        --vram_gb=*) vram_gb="${word#*=}" ;;
        --stages=*) stages="${word#*=}" ;;
        --skip=*) skip="${word#*=}" ;;
        --dry_run=[01]) dry_run="${word#*=}" ;;
        *) refuse "unknown word '$word': choose from $choices" ;;
    esac
done
if [ "$dry_run" = 0 ]; then dry_run=""; fi
# Of minutes the plan makes the depth.
if [ -z "${MINUTES:-}" ]; then depth="${depth:-20}"; fi
stages="${stages// /,}" skip="${skip// /,}"

for name in gpus depth device_batch_size total_batch_size vram_gb; do
    if [ -n "${!name}" ] && ! [[ "${!name}" =~ ^[1-9][0-9]{0,5}$ ]]; then
        refuse "$name=${!name} is not a whole number from 1 to 999999"
    fi
done
for name in ${stages//,/ } ${skip//,/ }; do
    case ",$all_stages," in
        *",$name,"*) ;;
        *) refuse "$name is no stage: choose from $all_stages" ;;
    esac
done

# --------------------------------------------------------------------------------------------------
# What ROCm, RCCL and torch read; docs/gpu.md has the reasons

exports=()

# default NAME VALUE: exports NAME, with VALUE where it is not set.
default() {
    local value="${!1-$2}"
    export "$1=$value"
    exports+=("$1=$value")
}

# As documented, all but the last. Not here: NCCL_MIN_NCHANNELS, which is advice for MI300X.
user_p2p="${NCCL_P2P_DISABLE+set}"
default HSA_FORCE_FINE_GRAIN_PCIE 1     # cards may write to each other's memory over PCIe
default HSA_ENABLE_INTERRUPT 1          # wait for the cards without spinning
default HSA_XNACK 0                     # these cards cannot repeat an access after a page fault
default NCCL_P2P_LEVEL PHB              # peer to peer also between PCIe bridges of one CPU
default NCCL_P2P_DISABLE 0
default NCCL_BUFFSIZE 33554432          # 32 MB for each pair of cards in place of 4
default NCCL_IB_DISABLE 1               # one machine, no InfiniBand
default NCCL_DMABUF_ENABLE 1            # buffers are shared through the kernel's dma-buf
# Hangs or is unsupported on these cards (docs/traps.md). The two older names stand as well.
if [ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_HIP_ALLOC_CONF+set}" ]; then
    default PYTORCH_ALLOC_CONF expandable_segments:False
fi

# --------------------------------------------------------------------------------------------------
# The cards

# list_cards: "INDEX BYTES" of each GPU that rocm-smi knows.
list_cards() {
    rocm-smi --showmeminfo vram --csv 2>/dev/null |
        awk -F, '/^card[0-9]+,[0-9]+/ { sub("card", "", $1); print $1, $2 }'
}

# discrete: of the lines of list_cards those of cards with at least half of the memory of the
# largest. An integrated GPU has a small part of the machine's memory.
discrete() {
    awk '{ index_of[NR] = $1; bytes[NR] = $2; if ($2 > most) most = $2 }
         END { for (i = 1; i <= NR; i++) if (2 * bytes[i] >= most) print index_of[i], bytes[i] }'
}

cards="" own_choice="${HIP_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}"
if command -v rocm-smi >/dev/null; then cards="$(list_cards)" || cards=""; fi
if [ -n "$cards" ]; then
    kept="$(discrete <<<"$cards")"
    found="$(grep -c . <<<"$kept")"
    if [ -n "$own_choice" ]; then
        found="$(tr , '\n' <<<"$own_choice" | grep -c .)"
    elif [ "$kept" != "$cards" ]; then
        default HIP_VISIBLE_DEVICES "$(cut -d' ' -f1 <<<"$kept" | paste -sd, -)"
    fi
    # GiB of the smallest
    memory="$(sort -n -k2 <<<"$kept" | awk 'NR == 1 { printf "%.0f", $2 / 2 ^ 30 }')"
elif [ -n "$dry_run" ]; then
    echo "warning: rocm-smi lists no GPU here: as if there were six of 24 GB" >&2
    found=6 memory=24
elif [ -n "$gpus" ] && [ -n "$vram_gb" ]; then
    found="$gpus" memory="$vram_gb"
else
    refuse "rocm-smi lists no GPU: install ROCm and check the amdgpu driver, or give --gpus=6" \
        "--vram_gb=24; --dry_run=1 prints the commands on any machine"
fi
gpus="${gpus:-$found}" vram_gb="${vram_gb:-$memory}"
if [ "$gpus" -gt "$found" ] && [ -n "$cards" ]; then
    refuse "--gpus=$gpus, but there are $found cards: ask for fewer, or check rocm-smi"
fi

# --------------------------------------------------------------------------------------------------
# The batch. At depth 20, 7 sequences of 2,048 tokens fit a card of 24 GB, as documented; 4 GB are
# taken by weights and optimizer, whatever the batch. At other depths the plan chooses. A step has
# at most 524,288 tokens, in whole passes: 7 x 6 x 2,048 x 6 = 516,096. Where whole passes of the
# largest batch that fits would leave over a tenth of these, a smaller batch is taken.

# total_of SEQUENCES: tokens of a step, of so many sequences per card and pass.
total_of() {
    local tokens=$(($1 * gpus * 2048)) passes
    passes=$((524288 / tokens))
    echo $((tokens * (passes > 1 ? passes : 1)))
}

if [ -z "$device_batch_size" ] && [ "$depth" = 20 ]; then
    if [ "$vram_gb" -lt 10 ]; then
        refuse "$vram_gb GB of memory are too few for depth 20: give --depth=12 or less"
    fi
    most=$((7 * (vram_gb - 4) / 20))
    if [ "$most" -gt 32 ]; then most=32; fi    # as in the plan
    device_batch_size=1
    for ((sequences = most; sequences > 1; sequences--)); do
        total="$(total_of "$sequences")"
        if [ "$total" -le 524288 ] && [ "$total" -ge 471859 ]; then
            device_batch_size="$sequences"
            break
        fi
    done
fi
if [ -n "$device_batch_size" ] && [ -z "$total_batch_size" ]; then
    total_batch_size="$(total_of "$device_batch_size")"
fi

# --------------------------------------------------------------------------------------------------
# The stages that are left

wanted=""
for name in $(tr , ' ' <<<"$all_stages"); do
    case ",${stages:-$all_stages}," in *",$name,"*) ;; *) continue ;; esac
    case ",$skip," in *",$name,"*) continue ;; esac
    wanted="${wanted:+$wanted,}$name"
done
if [ -z "$wanted" ]; then refuse "--stages=$stages --skip=$skip leave no stage"; fi
if [ "$wanted" = "$all_stages" ]; then wanted="" stages=""; fi    # the plan of a plain call

# --------------------------------------------------------------------------------------------------
# Start

root="$(dirname "${BASH_SOURCE[0]}")"
variables=(
    "GPUS=$gpus" "DEPTH=$depth" "DEVICE_BATCH_SIZE=$device_batch_size"
    "TOTAL_BATCH_SIZE=$total_batch_size" "STAGES=$wanted" "NAMED_STAGES=$stages"
    "DRY_RUN=$dry_run")

if [ -n "$dry_run" ]; then
    printf 'export %q\n' "${exports[@]}"
    exec env "${variables[@]}" bash "$root/speedrun.sh"
fi

# probe_peers: whether an all-reduce between the cards works, in one line, "REMEDY: DETAIL". On some
# boards transfers between cards hang; RCCL takes the way through the CPU's memory where
# NCCL_P2P_DISABLE is 1. In a subshell, so that speedrun.sh sees the caller's environment.
probe_peers() {
    local program="
import sys, scripts
from nanochat.selftest import peer_to_peer_probe
finding = peer_to_peer_probe(int(sys.argv[1]))
print(finding.remedy or 'works', finding.detail, sep=': ')"
    source "$root/scripts/setup.sh" >&2 || exit 1
    say "testing transfers between $gpus cards, which takes up to two minutes" >&2
    cd "$root"
    python -c "$program" "$gpus" || true    # training would say what is wrong
}

if [ "$gpus" -gt 1 ] && [ -z "$user_p2p" ]; then
    finding="$(probe_peers)"
    if [ -n "$finding" ]; then say "transfers between cards: $finding"; fi
    case "$finding" in
        *NCCL_P2P_DISABLE=1:*)
            export NCCL_P2P_DISABLE=1
            say "training with NCCL_P2P_DISABLE=1, which is slower; export NCCL_P2P_DISABLE=0 to" \
                "train without it all the same" ;;
    esac
fi
say "$gpus cards of $vram_gb GB, depth ${depth:-as the plan chooses}," \
    "${device_batch_size:-as the plan chooses} sequences per card and pass"
exec env "${variables[@]}" bash "$root/speedrun.sh"
