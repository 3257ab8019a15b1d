#!/usr/bin/env bash
# Takes the families of models that have no speedrun of their own elsewhere from nothing to a chat
# that is asked a question. Arguments are names of families:
#
#     bash tests/families.sh                       # mla, deepseek and llada, three minutes each
#     MINUTES=0.5 bash tests/families.sh mla       # one, in which next to nothing is learnt
#
# They share one text and one tokenizer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

export MINUTES="${MINUTES:-3}" GPUS=0
NANOCHAT_BASE_DIR="$(mktemp -d)"
export NANOCHAT_BASE_DIR
trap 'rm -rf "$NANOCHAT_BASE_DIR"' EXIT
output="$NANOCHAT_BASE_DIR/output.txt"
if [ $# = 0 ]; then set -- mla deepseek llada; fi

# is_whole: whether the record of a speedrun has figures where a family must leave them. A diffusion
# model has a bound on its bits per byte, not the figure itself.
is_whole() {
    python -c '
import json, sys

row = json.loads(sys.stdin.read())
has_bits = row["val_bpb"] is not None or row["val_bpb_bound"] is not None
has_accuracies = None not in row["accuracy"].values()
sys.exit(not (row["stage"] == "speedrun" and has_bits and has_accuracies))'
}

stages=""
for model in "$@"; do
    echo "families: $model, $MINUTES minutes"
    MODEL="$model" STAGES="$stages" bash speedrun.sh | tee "$output"
    tail -n 1 "$output" | is_whole || { echo "families: $model left no whole record"; exit 1; }
    python -m scripts.chat_cli -p "What is 12 times 7?" --max_tokens=16
    stages=base_train,mid_train,chat_sft,chat_eval,report
done
echo "families: all of them answered"
