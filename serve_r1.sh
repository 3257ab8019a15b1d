#!/usr/bin/env bash
# DeepSeek-R1 on eight Instinct MI350X: vLLM in docker. docs/models/deepseek-r1.md has the reasons.
#
#     bash serve_r1.sh [start]          # check the machine, start the container, wait for an answer
#     bash serve_r1.sh status           # container, health, model; exit code 0 if it answers
#     bash serve_r1.sh logs             # follow the log
#     bash serve_r1.sh throughput       # generated tokens a second, by the server's own counter
#     bash serve_r1.sh test             # one request and its answer
#     bash serve_r1.sh stop
#     bash serve_r1.sh --dry-run VERB   # print all commands and run none; works on any machine
#     bash serve_r1.sh start -- --max-num-seqs 64       # words after -- go to `vllm serve`
#
# Every setting below is a variable: MAX_MODEL_LEN=8192 PORT=9000 bash serve_r1.sh start.
# A second start finds the container and continues to wait.
# Exit code 2: nothing was begun, and the line says what to change; 1: it was begun and failed.
set -euo pipefail
export LC_ALL=C    # a point in numbers, plain ranges in patterns
refuse() { local line="$*"; echo "error: ${line//[[:cntrl:]]/?}" >&2; exit 2; }
fail() { echo "error: $*" >&2; exit 1; }
say() { echo "serve_r1: $*"; }
render="$(getent group render 2>/dev/null | cut -d: -f3)" || render=""

# --------------------------------------------------------------------------------------------------
# Settings. 'Documented' is the deployment that docs/models/deepseek-r1.md begins with.
# Where empty is allowed, empty leaves the flag out.

# As documented; vLLM 0.11.2 has known CVEs, fixed by 0.19.0: the docs have the upgrade.
IMAGE="${IMAGE:-rocm/vllm:rocm7.0.0_vllm_0.11.2_20251210}"
# As documented.
MODEL="${MODEL:-deepseek-ai/DeepSeek-R1}"
# Documented: none, so the newest commit. Here empty: the commit that the first download fetched.
REVISION="${REVISION-}"
# As documented.
CONTAINER="${CONTAINER:-deepseek-r1}"
# Documented: none, which is every interface. Any but loopback needs VLLM_API_KEY.
ADDRESS="${ADDRESS:-127.0.0.1}"
# As documented.
PORT="${PORT:-8000}"
# Documented: none. Handed over by name, so that no command line shows it.
VLLM_API_KEY="${VLLM_API_KEY:-}"
# Documented: none, and R1 needs none. It makes downloads faster. Handed over by name, too.
HF_TOKEN="${HF_TOKEN:-}"

# vllm serve

# As documented: over all eight GPUs, without expert parallelism.
TENSOR_PARALLEL_SIZE="${TENSOR_PARALLEL_SIZE:-8}"
# As documented. It runs code from the model's repository, one more reason to pin REVISION.
TRUST_REMOTE_CODE="${TRUST_REMOTE_CODE-1}"
# Documented: 8192, which cuts long thinking. The MLA cache has 70 KB a token, and over 150 GiB.
MAX_MODEL_LEN="${MAX_MODEL_LEN:-32768}"
# As documented: AITER's MLA kernels in this version want it. Empty with newer images.
BLOCK_SIZE="${BLOCK_SIZE-1}"
# Documented: none, so on. Here off, since blocks of one token make it hash every token of a prompt.
# 1 is on.
PREFIX_CACHING="${PREFIX_CACHING-0}"
# Documented: none, so the thinking is part of the answer. Here it gets a field of its own.
REASONING_PARSER="${REASONING_PARSER-deepseek_r1}"
# Documented: none, so ["*"]: any web page may ask the server. Here: no page of another origin.
ALLOWED_ORIGINS="${ALLOWED_ORIGINS-[]}"

# The container's environment

# As documented, but it is advice for MI300X: compare `throughput` with NCCL_MIN_NCHANNELS= (none).
NCCL_MIN_NCHANNELS="${NCCL_MIN_NCHANNELS-112}"
# As documented.
VLLM_ROCM_USE_AITER="${VLLM_ROCM_USE_AITER-1}"
# As documented. This image sets it itself, others may not.
HIP_FORCE_DEV_KERNARG="${HIP_FORCE_DEV_KERNARG-1}"
# As documented.
TORCH_BLAS_PREFER_HIPBLASLT="${TORCH_BLAS_PREFER_HIPBLASLT-1}"

# docker run

# Documented: nothing mounted, so that every new container downloads 163 shards again.
HF_CACHE="${HF_CACHE:-${HF_HOME:-${HOME:-/root}/.cache/huggingface}}"
# As documented. On any other network the port is published at ADDRESS.
NETWORK="${NETWORK:-host}"
# As documented.
DEVICES="${DEVICES:-/dev/kfd /dev/dri}"
# Documented: none. These groups own the devices. The host's number stands for render, since images
# may lack the name.
GPU_GROUPS="${GPU_GROUPS-video${render:+ $render}}"
# Documented: none, so 64 MB of shared memory, which is too little for eight workers.
IPC="${IPC-host}"
# Documented: none. docker's filter forbids the memory placement calls of ROCm.
SECCOMP="${SECCOMP-unconfined}"
# Documented: none. After this many deaths in a row the container stays down.
RESTARTS="${RESTARTS:-3}"
# Documented: no health check. Failures within this time, while the model loads, do not count.
HEALTH_START="${HEALTH_START:-30m}"
# After that the health is checked this often ...
HEALTH_INTERVAL="${HEALTH_INTERVAL:-30s}"
# ... and the container is unhealthy after this many failures in a row.
HEALTH_RETRIES="${HEALTH_RETRIES:-3}"
# Documented: none, so docker's 10. The time that running requests have to end.
STOP_SECONDS="${STOP_SECONDS:-60}"
# Documented: none, so a log that grows without limit.
LOG_SIZE="${LOG_SIZE:-100m}"
LOG_FILES="${LOG_FILES:-5}"

# This script

# `start` waits this long, and can be called again.
READY_SECONDS="${READY_SECONDS:-1800}"
# The weights: 163 shards of about 4.3 GB, so within 2 %. What the cache has already is subtracted.
DISK_GB="${DISK_GB:-700}"
# Host memory that eight workers need while loading: an estimate.
MEMORY_GB="${MEMORY_GB:-64}"
# What `test` asks, as documented.
PROMPT="${PROMPT:-Hello!}"
# The limit of its answer. Documented: 100, which ends in the middle of the thinking.
MAX_TOKENS="${MAX_TOKENS:-2048}"
# Tests look for /dev, /proc and /sys under another folder.
SYSTEM_ROOT="${SYSTEM_ROOT:-}"
DRY_RUN="${DRY_RUN:-}"
if [ "$DRY_RUN" = 0 ]; then DRY_RUN=""; fi

# --------------------------------------------------------------------------------------------------
# The command line, and what a setting may be

verb="" extra=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
        --dry-run) DRY_RUN=1 ;;
        --) shift; extra=("$@"); break ;;
        start | stop | status | logs | throughput | test)
            if [ -n "$verb" ]; then refuse "one verb at a time: $verb or $1"; fi
            verb="$1" ;;
        *) refuse "unknown word '$1': choose start, stop, status, logs, throughput or test;" \
            "--dry-run prints the commands" ;;
    esac
    shift
done
verb="${verb:-start}"
if [ ${#extra[@]} -gt 0 ] && [ "$verb" != start ]; then
    refuse "words after -- go to 'vllm serve', so they belong to start"
fi

# whole NAME MIN MAX: refuses the setting unless it is a whole number in this range.
whole() {
    local value="${!1}"
    if ! [[ "$value" =~ ^[1-9][0-9]{0,8}$|^0$ ]] ||
        [ "$value" -lt "$2" ] || [ "$value" -gt "$3" ]; then
        refuse "$1=$value is not a whole number from $2 to $3"
    fi
}
whole PORT 1 65535
whole TENSOR_PARALLEL_SIZE 1 64
whole MAX_MODEL_LEN 1 163840    # what R1's configuration allows
whole RESTARTS 0 100
whole LOG_FILES 1 1000
whole HEALTH_RETRIES 1 1000
whole STOP_SECONDS 0 86400
whole READY_SECONDS 1 999999
whole DISK_GB 0 999999
whole MEMORY_GB 0 999999
whole MAX_TOKENS 1 163840

if ! [[ "$ADDRESS" =~ ^[A-Za-z0-9.-]+$ ]]; then
    refuse "ADDRESS=$ADDRESS is neither an IPv4 address nor a host's name"
fi
if [ "$NETWORK" != host ] && [[ "$ADDRESS" == *[!0-9.]* ]]; then
    refuse "ADDRESS=$ADDRESS must be an IPv4 address where NETWORK is not host"
fi
for name in HEALTH_START HEALTH_INTERVAL; do
    if ! [[ "${!name}" =~ ^[1-9][0-9]*[smh]$ ]]; then
        refuse "$name=${!name} is no time such as 30s, 5m or 1h"
    fi
done
if ! [[ "$LOG_SIZE" =~ ^[1-9][0-9]*[kmg]$ ]]; then
    refuse "LOG_SIZE=$LOG_SIZE is no size such as 100m"
fi
if ! [[ "$CONTAINER" =~ ^[A-Za-z0-9][A-Za-z0-9_.-]+$ ]]; then
    refuse "CONTAINER=$CONTAINER is no name for a container: letters, digits, _ . -"
fi
case "$BLOCK_SIZE" in
    *[!0-9]*) refuse "BLOCK_SIZE=$BLOCK_SIZE is not a number of tokens; empty leaves it to vLLM" ;;
esac
case "$PREFIX_CACHING" in
    0 | 1 | "") ;;
    *) refuse "PREFIX_CACHING=$PREFIX_CACHING must be 0, 1 or empty" ;;
esac
case "$TRUST_REMOTE_CODE" in
    0 | 1 | "") ;;
    *) refuse "TRUST_REMOTE_CODE=$TRUST_REMOTE_CODE must be 0 or 1" ;;
esac
case "$VLLM_API_KEY" in
    *[!!-~]*) refuse "VLLM_API_KEY must be printable ASCII without spaces" ;;
esac
case "$HF_CACHE" in
    *:*) refuse "HF_CACHE=$HF_CACHE has a colon, which docker takes for the end of the path" ;;
    /*) ;;
    *) HF_CACHE="$PWD/$HF_CACHE" ;;
esac
loopback='^(127(\.[0-9]{1,3}){3}|localhost)$'
if ! [[ "$ADDRESS" =~ $loopback ]] && [ -z "$VLLM_API_KEY" ]; then
    refuse "ADDRESS=$ADDRESS lets others in: set VLLM_API_KEY to a long secret, or keep 127.0.0.1"
fi

# printable NAME VALUE: refuses what could write to the terminal or begin a new line.
printable() {
    case "$2" in
        *[[:cntrl:]]*) refuse "a line break or control character in $1: leave it out" ;;
    esac
}
for name in IMAGE MODEL REVISION HF_CACHE HF_TOKEN PROMPT ALLOWED_ORIGINS REASONING_PARSER \
    NETWORK DEVICES GPU_GROUPS IPC SECCOMP NCCL_MIN_NCHANNELS VLLM_ROCM_USE_AITER \
    HIP_FORCE_DEV_KERNARG TORCH_BLAS_PREFER_HIPBLASLT; do
    printable "$name" "${!name-}"
done
printable "the words after --" "${extra[*]-}"

# --------------------------------------------------------------------------------------------------
# The commands, each an array: what a dry run prints is what a real run runs

inside="$ADDRESS"    # where the server listens, in its own network
if [ "$NETWORK" != host ]; then inside=0.0.0.0; fi
health_address="${inside/#0.0.0.0/127.0.0.1}"
health="python3 -c \"import urllib.request as u;"
health="$health u.urlopen('http://$health_address:$PORT/health', timeout=5)\""
url="http://${ADDRESS/#0.0.0.0/127.0.0.1}:$PORT"
cached="$HF_CACHE/hub/models--${MODEL//\//--}"

# docker's options: network and devices
options=(--name "$CONTAINER" --network "$NETWORK")
if [ "$NETWORK" != host ]; then options+=(--publish "$ADDRESS:$PORT:$PORT"); fi
for device in $DEVICES; do options+=(--device "$device"); done
for group in $GPU_GROUPS; do options+=(--group-add "$group"); done
if [ -n "$IPC" ]; then options+=("--ipc=$IPC"); fi
if [ -n "$SECCOMP" ]; then options+=(--security-opt "seccomp=$SECCOMP"); fi

# Files and environment. docker takes the value of a variable that is given by name from our own.
options+=(--volume "$HF_CACHE:/root/.cache/huggingface" --env HF_HOME=/root/.cache/huggingface)
for name in NCCL_MIN_NCHANNELS VLLM_ROCM_USE_AITER HIP_FORCE_DEV_KERNARG \
    TORCH_BLAS_PREFER_HIPBLASLT; do
    if [ -n "${!name}" ]; then options+=(--env "$name=${!name}"); fi
done
if [ -n "$VLLM_API_KEY" ]; then options+=(--env VLLM_API_KEY); export VLLM_API_KEY; fi

# Health, restarts and logs
options+=(
    --health-cmd "$health"
    --health-interval "$HEALTH_INTERVAL"
    --health-timeout 10s
    --health-retries "$HEALTH_RETRIES"
    --health-start-period "$HEALTH_START"
)
if [ "$RESTARTS" = 0 ]; then
    options+=(--restart no)
else
    options+=(--restart "on-failure:$RESTARTS")
fi
options+=(--log-driver json-file --log-opt "max-size=$LOG_SIZE" --log-opt "max-file=$LOG_FILES")
options+=(--entrypoint "")    # some images begin with `vllm serve` themselves

serve=(
    vllm serve "$MODEL"
    --tensor-parallel-size "$TENSOR_PARALLEL_SIZE"
    --max-model-len "$MAX_MODEL_LEN"
    --host "$inside"
    --port "$PORT"
)
if [ "$TRUST_REMOTE_CODE" = 1 ]; then serve+=(--trust-remote-code); fi
if [ -n "$BLOCK_SIZE" ]; then serve+=(--block-size "$BLOCK_SIZE"); fi
case "$PREFIX_CACHING" in
    0) serve+=(--no-enable-prefix-caching) ;;
    1) serve+=(--enable-prefix-caching) ;;
esac
if [ -n "$REASONING_PARSER" ]; then serve+=(--reasoning-parser "$REASONING_PARSER"); fi
if [ -n "$ALLOWED_ORIGINS" ]; then serve+=(--allowed-origins "$ALLOWED_ORIGINS"); fi
if [ -n "$REVISION" ]; then serve+=(--revision "$REVISION"); fi
if [ ${#extra[@]} -gt 0 ]; then serve+=("${extra[@]}"); fi

# The label tells our container from another of that name, and whether it runs with these settings.
# What follows it is no setting: a token for downloads, and the commit, known only after the first
# start.
label="$(printf '%s\0' "${options[@]}" "$IMAGE" "${serve[@]}" | cksum | cut -d' ' -f1)"
if [ -n "$HF_TOKEN" ]; then options+=(--env HF_TOKEN); export HF_TOKEN; fi
if [ -z "$REVISION" ] && [ -s "$cached/refs/main" ]; then
    serve+=(--revision "$(head -n 1 "$cached/refs/main")")
fi
run=(docker run --detach --label "nanochat.serve_r1=$label" "${options[@]}" "$IMAGE" "${serve[@]}")

state_format='{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}'
state_format="$state_format {{index .Config.Labels \"nanochat.serve_r1\"}}"
inspect=(docker container inspect --format "$state_format" "$CONTAINER")

health_format='{{.State.Status}}, health {{with .State.Health}}{{.Status}}{{end}},'
health_format="$health_format {{.RestartCount}} restarts, started {{.State.StartedAt}}"
inspect_health=(docker container inspect --format "$health_format" "$CONTAINER")

last_line=(docker logs --tail 1 "$CONTAINER")

json() { printf '"%s"' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')"; }
one_token="{\"model\": $(json "$MODEL"), \"prompt\": \"1\", \"max_tokens\": 1}"
messages="[{\"role\": \"user\", \"content\": $(json "$PROMPT")}]"
question="{\"model\": $(json "$MODEL"), \"messages\": $messages, \"max_tokens\": $MAX_TOKENS}"

# ask SECONDS PATH [JSON]: sets `words` to the command. No proxy: the server is this machine.
ask() {
    words=(curl --silent --noproxy '*' --max-time "$1" "$url$2")
    if [ $# -gt 2 ]; then
        words+=(--header 'Content-Type: application/json' --data-binary "$3")
    fi
}

# request SECONDS PATH [JSON]: sets `body` and `code`, the HTTP status; 000 where nothing answers.
request() {
    local said words
    ask "$@"
    words+=(--write-out '\n%{http_code}')
    if [ -n "$VLLM_API_KEY" ]; then
        # From a file descriptor: the key is on no command line.
        said="$("${words[@]}" \
            --header @<(printf 'Authorization: Bearer %s\n' "$VLLM_API_KEY"))" || true
    else
        said="$("${words[@]}")" || true
    fi
    code="${said##*$'\n'}" body="${said%$'\n'*}"
    code="${code:-000}"
}

# has JSON: whether it stands in the body, whatever the spaces.
has() { [[ "$(tr -d ' \n' <<<"$body")" == *"$(tr -d ' \n' <<<"$1")"* ]]; }

# quote WORD: the word as it would be typed.
quote() {
    case "$1" in
        "" | *[!A-Za-z0-9_@%+=:,./-]*) echo "'$(printf %s "$1" | sed "s/'/'\\\\''/g")'" ;;
        *) echo "$1" ;;
    esac
}

# show WORD...: the command on one line, as it would be typed.
show() {
    local word line=""
    for word in "$@"; do line="$line $(quote "$word")"; done
    echo "${line# }"
}

show_request() {
    local words key=""
    ask "$@"
    if [ -n "$VLLM_API_KEY" ]; then
        # shellcheck disable=SC2016  # the secret's name is printed, never the secret
        key=' --header @<(printf "Authorization: Bearer %s\n" "$VLLM_API_KEY")'
    fi
    echo "$(show "${words[@]}")$key"
}

show_ready() {
    show_request 10 /health
    show_request 10 /v1/models
    show_request 120 /v1/completions "$one_token"
}

# --------------------------------------------------------------------------------------------------
# What is there

# read_state: sets `status` (empty: no such container), `restarts`, `exit_code`, and the label as
# `owner`.
read_state() {
    local said
    said="$("${inspect[@]}" 2>/dev/null)" || said=""
    read -r status restarts exit_code owner <<<"$said" || true
    if [ "$owner" = "<no value>" ]; then owner=""; fi
}

last_lines() {
    docker logs --tail 30 "$CONTAINER" 2>&1 | tr -d '\000-\010\013-\037\177' >&2 || true
}

findings=0
finding() {
    findings=$((findings + 1))
    if [ -n "$DRY_RUN" ]; then echo "warning: $*" >&2; else echo "error: $*" >&2; fi
}

check_docker() {
    if ! command -v docker >/dev/null; then
        finding "docker is missing: install Docker Engine"
    elif ! docker version --format '{{.Server.Version}}' >/dev/null 2>&1; then
        finding "docker does not answer: start it (sudo systemctl start docker)," \
            "or join its group (sudo usermod -aG docker \$USER)"
    fi
}

check_curl() {
    if ! command -v curl >/dev/null; then finding "curl is missing: install it"; fi
}

check_gpus() {
    local path used total card count=0
    for path in "$SYSTEM_ROOT"/sys/class/drm/card[0-9]*/device/mem_info_vram_total; do
        if [ ! -r "$path" ]; then continue; fi
        total="$(cat "$path")"
        used="$(cat "${path%total}used")"
        if [ "$total" -lt $((64 << 30)) ]; then continue; fi    # an integrated one
        count=$((count + 1))
        card="${path%/device/*}"
        if [ $((used * 10)) -gt "$total" ]; then
            finding "GPU ${card##*/} has $((used >> 30)) of $((total >> 30)) GiB in use," \
                "vLLM takes 90 %: end what holds it (rocm-smi --showpids)"
        fi
    done
    if [ "$count" -lt "$TENSOR_PARALLEL_SIZE" ]; then
        finding "$count GPUs of 64 GiB or more, $TENSOR_PARALLEL_SIZE are needed: check rocm-smi;" \
            "TENSOR_PARALLEL_SIZE=N for another number"
    fi
}

# check_disk: whether what is still to be downloaded fits. All sizes in KiB, as du and df have them.
check_disk() {
    local folder="$HF_CACHE" free have="" need
    while [ ! -d "$folder" ]; do folder="$(dirname "$folder")"; done
    if [ ! -w "$folder" ]; then
        finding "cannot write to $folder: set HF_CACHE to a folder you can write"
    fi
    if [ -d "$cached" ]; then have="$(du -sk "$cached" 2>/dev/null | cut -f1)" || true; fi
    free="$(df -Pk "$folder" 2>/dev/null | awk 'NR == 2 { print $4 }')" || true

    # DISK_GB is a sum of rounded sizes: when less than 2 % is missing, everything is there.
    need=$((DISK_GB * 1000000000 / 1024 - ${have:-0}))
    if [ "$need" -lt $((DISK_GB * 20000000 / 1024)) ]; then need=0; fi

    if [ -z "$free" ]; then
        finding "df does not say how much is free in $folder:" \
            "set HF_CACHE to a folder on a disk of this machine"
    elif [ "$need" -gt "$free" ]; then
        finding "$(gigabytes "$free") GB are free in $folder," \
            "$(gigabytes "$need") GB are still to come: make room or set HF_CACHE"
    elif [ "$need" -gt 0 ] && [ -z "$DRY_RUN" ]; then
        say "up to $(gigabytes "$need") GB are still to be downloaded into $HF_CACHE:" \
            "an hour and a half at 1 Gbit/s for all of R1"
    fi
}

# gigabytes KIB
gigabytes() { echo $(($1 * 1024 / 1000000000)); }

check_memory() {
    local available
    available="$(awk '/^MemAvailable:/ { print int($2 * 1024 / 1e9) }' \
        "$SYSTEM_ROOT/proc/meminfo" 2>/dev/null)" || available=""
    if [ -z "$available" ] || [ "$available" -lt "$MEMORY_GB" ]; then
        finding "${available:-unknown} GB of host memory available, $MEMORY_GB are wanted:" \
            "end something, or set MEMORY_GB"
    fi
}

# check_machine: what a new container needs. A running container of ours holds these things itself.
check_machine() {
    local device
    for device in $DEVICES; do
        if [ ! -e "$SYSTEM_ROOT$device" ]; then
            finding "$device is missing: load the amdgpu driver, or use the machine with the GPUs"
        fi
    done
    if ! getent group video >/dev/null 2>&1 || [ -z "$render" ]; then
        echo "warning: this machine lacks the group video or render," \
            "which ROCm's installation makes" >&2
    fi
    check_gpus
    check_disk
    check_memory
    if [ -z "$REVISION" ] && [ ! -s "$cached/refs/main" ]; then
        echo "warning: REVISION is empty and nothing is downloaded yet:" \
            "whatever $MODEL's main is now will run; REVISION=COMMIT pins it" >&2
    fi
    if (exec 3<>"/dev/tcp/${ADDRESS/#0.0.0.0/127.0.0.1}/$PORT") 2>/dev/null; then
        finding "port $PORT is taken: end what listens there (ss -ltnp), or set PORT"
    fi
}

# preflight: names all that is wrong, not only the first thing.
preflight() {
    check_docker
    check_curl
    read_state
    if [ -n "$owner" ] && [[ "$status" =~ ^(running|restarting|paused)$ ]]; then
        if [ "$owner" != "$label" ]; then
            finding "$CONTAINER runs with other settings: bash serve_r1.sh stop, then start"
        fi
    else
        if [ -n "$status" ] && [ -z "$owner" ]; then
            finding "a container named $CONTAINER is there that this script did not make:" \
                "CONTAINER=another-name, or docker rm -f $CONTAINER"
        fi
        check_machine
    fi
    if [ "$findings" -gt 0 ] && [ -z "$DRY_RUN" ]; then exit 2; fi
}

# answers: /health is 200, the model is listed, and one token is generated. Otherwise `waiting` says
# what is missing.
answers() {
    waiting="for /health"
    request 10 /health
    if [ "$code" != 200 ]; then return 1; fi

    waiting="for $MODEL in /v1/models"
    request 10 /v1/models
    if [ "$code" = 401 ]; then
        waiting="for the right key: set VLLM_API_KEY to the one the container was started with"
    fi
    if [ "$code" != 200 ]; then return 1; fi
    if ! has "\"id\": $(json "$MODEL")"; then return 1; fi

    waiting="for the first token"
    request 120 /v1/completions "$one_token"
    [ "$code" = 200 ]
}

stop_waiting() {
    echo
    say "not waiting any longer; it continues to load: bash serve_r1.sh status, logs or stop"
    exit 130
}

wait_ready() {
    local begin elapsed shown=-30 deaths="" line
    begin="$(date +%s)"
    trap stop_waiting INT
    while :; do
        read_state
        elapsed=$(($(date +%s) - begin))
        case "$status" in
            "") fail "the container $CONTAINER is gone: somebody removed it" ;;
            exited | dead)
                last_lines
                fail "$CONTAINER ended with status $exit_code after $restarts restarts:" \
                    "the lines above say why" ;;
        esac
        if [ "$restarts" -gt "${deaths:-$restarts}" ]; then
            last_lines
            say "it died with the lines above and was started again," \
                "$restarts of $RESTARTS times"
        fi
        deaths="$restarts"

        if answers; then
            say "ready after $elapsed s: $url/v1"
            return
        fi
        if [ "$code" = 401 ]; then fail "waiting $waiting"; fi
        if [ "$elapsed" -ge "$READY_SECONDS" ]; then
            fail "not ready after $elapsed s, waiting $waiting. It continues to load:" \
                "start again to continue waiting, logs to see why, stop to end it"
        fi

        # Every half minute the last line of its log shows what it does.
        if [ $((elapsed - shown)) -ge 30 ]; then
            line="$("${last_line[@]}" 2>&1 | tr -d '[:cntrl:]' | cut -c 1-100)"
            say "$elapsed of at most $READY_SECONDS s, waiting $waiting: $line"
            shown="$elapsed"
        fi
        sleep 15
    done
}

# counter NAME: the sum of a Prometheus metric over all engines. The value is the last word: a label
# may hold spaces.
counter() {
    request 10 /metrics
    if [ "$code" != 200 ]; then
        fail "no metrics at $url/metrics (status $code): bash serve_r1.sh status"
    fi
    awk -v name="$1" '
        index($0, name "{") == 1 || $1 == name { sum += $NF; found = 1 }
        END { if (!found) exit 1; printf "%.0f\n", sum }
    ' <<<"$body" || fail "$url/metrics has no $1: is this vLLM?"
}

# --------------------------------------------------------------------------------------------------
# The verbs

start() {
    preflight
    local folder=(mkdir -p "$HF_CACHE")
    local known=(docker image inspect "$IMAGE")
    local pull=(docker pull "$IMAGE")
    local remove=(docker rm "$CONTAINER")
    local there=""
    case "$status" in running | restarting | paused) there=1 ;; esac

    if [ -n "$DRY_RUN" ]; then
        if [ -z "$there" ]; then
            show "${folder[@]}"
            show "${known[@]}"
            show "${pull[@]}"    # unless the line before found it
            if [ -n "$status" ]; then show "${remove[@]}"; fi
            show "${run[@]}"
        fi
        show "${inspect[@]}"
        show_ready
        show "${last_line[@]}"
        return
    fi

    if [ -n "$there" ]; then
        say "$CONTAINER is there already ($status)"
    else
        "${folder[@]}"
        if ! "${known[@]}" >/dev/null 2>&1; then
            "${pull[@]}" || fail "could not pull $IMAGE"
        fi
        if [ -n "$status" ]; then
            "${remove[@]}" >/dev/null || fail "could not remove the old, stopped $CONTAINER"
        fi
        say "$(show "${run[@]}")"
        "${run[@]}" >/dev/null ||
            fail "docker could not start the container: the line above says why"
    fi
    wait_ready
}

stop() {
    local halt=(docker stop -t "$STOP_SECONDS" "$CONTAINER")
    local remove=(docker rm "$CONTAINER")
    if [ -n "$DRY_RUN" ]; then
        show "${halt[@]}"
        show "${remove[@]}"
        return
    fi
    read_state
    if [ -z "$status" ]; then
        say "no container $CONTAINER: nothing to stop"
        return
    fi
    if [ -z "$owner" ]; then
        refuse "this script did not make the container $CONTAINER:" \
            "docker stop $CONTAINER, if it is yours"
    fi
    say "stopping $CONTAINER, running requests have $STOP_SECONDS s"
    { "${halt[@]}" && "${remove[@]}"; } >/dev/null || fail "docker could not stop $CONTAINER"
    say "stopped and removed; the weights stay in $HF_CACHE"
}

status() {
    local said
    if [ -n "$DRY_RUN" ]; then
        show "${inspect_health[@]}"
        show_ready
        return
    fi
    said="$("${inspect_health[@]}" 2>/dev/null)" || said="no such container"
    say "$CONTAINER: $said"
    if ! answers; then fail "not ready, waiting $waiting (status $code)"; fi
    say "ready: $MODEL at $url/v1"
}

logs() {
    local follow=(docker logs --tail 100 --follow "$CONTAINER")
    if [ -n "$DRY_RUN" ]; then
        show "${follow[@]}"
        return
    fi
    read_state
    if [ -z "$status" ]; then refuse "no container $CONTAINER: bash serve_r1.sh start"; fi
    exec "${follow[@]}"
}

throughput() {
    local before after running tokens
    if [ -n "$DRY_RUN" ]; then
        show_request 10 /metrics
        show sleep 10
        show_request 10 /metrics
        return
    fi
    before="$(counter vllm:generation_tokens_total)"
    sleep 10
    after="$(counter vllm:generation_tokens_total)"
    running="$(counter vllm:num_requests_running)"
    if [ "$after" -lt "$before" ]; then
        fail "the counter went back, so the server was restarted: ask again"
    fi
    tokens=$((after - before))
    say "$(awk -v n="$tokens" 'BEGIN { printf "%.1f", n / 10 }') tokens/s:" \
        "$tokens in 10 s, $running requests now"
}

test_request() {
    if [ -n "$DRY_RUN" ]; then
        show_request 600 /v1/chat/completions "$question"
        return
    fi
    request 600 /v1/chat/completions "$question"
    if [ -n "$body" ]; then echo "$body"; fi
    if [ "$code" != 200 ]; then
        fail "no answer from $url (status $code): bash serve_r1.sh status"
    fi
    if has '"finish_reason": "stop"'; then return; fi
    if has '"finish_reason": "length"'; then
        fail "the answer was cut at $MAX_TOKENS tokens: set MAX_TOKENS higher"
    fi
    fail "the answer has no finish_reason: it is not whole"
}

# What a verb needs must be there. start's preflight has these checks among others.
if [ -z "$DRY_RUN" ]; then
    case "$verb" in
        status) check_docker; check_curl ;;
        stop | logs) check_docker ;;
        throughput | test) check_curl ;;
    esac
    if [ "$findings" -gt 0 ]; then exit 2; fi
fi

case "$verb" in
    test) test_request ;;
    *) "$verb" ;;
esac
