#!/usr/bin/env bash
# What takes too long for every change: a list of steps, each of which ends the script if it fails.
#
#     bash tests/nightly.sh
#
# Everything is installed into an environment of its own, which the next night finds again. The
# first one compiles llama.cpp: half an hour on one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NIGHTLY_VENV="${NIGHTLY_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/nanochat-nightly}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "nightly: the environment, $NIGHTLY_VENV"
if [ ! -f "$NIGHTLY_VENV/bin/activate" ]; then
    # Debian may lack the pip of an environment, which uv does without
    python3 -m venv "$NIGHTLY_VENV" 2>/dev/null || python3 -m venv --without-pip "$NIGHTLY_VENV"
fi
export VIRTUAL_ENV="$NIGHTLY_VENV"    # the one that setup.sh fills
source scripts/setup.sh dev

echo "nightly: llama.cpp"
if ! python -c "import llama_cpp" 2>/dev/null; then
    setup_uv
    # without its models of pictures and sounds, which are half of it
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF" \
        setup_run uv pip install llama-cpp-python
fi

echo "nightly: exports are the same model in llama.cpp"
python -m pytest --no-skips tests/test_export.py -k "llama_cpp"

echo "nightly: the tests that run.sh leaves out"
python -m pytest -n 2 --dist loadfile --durations=10 -m nightly

echo "nightly: every family of models, from nothing to a chat"
bash tests/families.sh

echo "nightly: passed"
