#!/usr/bin/env bash
# Resumes a training run that diverged, from its newest undamaged checkpoint, with safe settings:
#
#   bash emergency_training.sh                                        # the run that saved last
#   bash emergency_training.sh ~/.cache/nanochat/base_checkpoints/d4  # this one
#
# All its settings stay as they were, except these: half the learning rate, gradients clipped at a
# norm of 1, blocks not compiled, and a checkpoint every two minutes. Elsewhere this script is
# called optimize_nan.sh; docs/numerical_stability.md has more.
set -euo pipefail

# Relative folders are relative to where the user is, not to this repository; Python expands ~.
case "${1:-}" in
    "" | -* | /* | \~ | \~/*) dir="${1:-}" ;;
    *) dir="$PWD/$1" ;;
esac
case "${NANOCHAT_BASE_DIR:-}" in
    "" | /* | \~*) ;;
    *) export NANOCHAT_BASE_DIR="$PWD/$NANOCHAT_BASE_DIR" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit
fi
if [ $# -gt 1 ]; then
    echo "error: emergency_training.sh takes one folder of checkpoints, or nothing" >&2
    exit 2
fi
source scripts/setup.sh || exit 1
exec python -m scripts.checkpoints "$dir" --rescue
