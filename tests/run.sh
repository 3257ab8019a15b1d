#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest: bash tests/run.sh tests/test_engine.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev
exec python -m pytest --durations=10 "$@"
