#!/usr/bin/env bash
# The first hour on a GPU as one command: see docs/gpu-checklist.md.
#
#   bash scripts/gpu_checklist.sh                # about an hour
#   bash scripts/gpu_checklist.sh --short        # twelve minutes
#   bash scripts/gpu_checklist.sh --dry_run=1    # prints the commands
#
# Where the active Python, or python3, has torch, as in a container, that one is used; else
# scripts/setup.sh makes the environment first.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

python=""
for candidate in python python3; do
    if "$candidate" -c 'import torch' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    # shellcheck source=scripts/setup.sh
    source "$root/scripts/setup.sh"
    python=python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m scripts.gpu_checklist "$@"
