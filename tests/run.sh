#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest:
#
#     bash tests/run.sh tests/test_engine.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev
# Most tests keep one core busy, so that two workers halve the time. The tests of a file share what
# the first of them made, so that a file stays with one worker.
#
# One thread each: two workers of two threads on two cores wait for each other, and take half as
# long again.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# What is marked as nightly is for tests/nightly.sh.
exec python -m pytest -n 2 --dist loadfile --durations=10 -m "not nightly" "$@"
