#!/usr/bin/env bash
# Runs the tests: makes .venv with the test tools where they are missing, then pytest in parallel with your arguments.
#
#   bash scripts/test.sh                          everything but the tests marked slow
#   bash scripts/test.sh tests/ops -x -k paged    what pytest would make of it
#   bash scripts/test.sh -n 0 tests/ops           in one process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env test
cd "$REPO"

# One worker a core, four at most: each holds a JAX runtime and a torch oracle. The workers' own thread pools are kept
# small, or they would fight over the cores.
cores="$("$VENV/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PJRT_NPROC="${PJRT_NPROC:-$((cores / workers > 2 ? cores / workers : 2))}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

# Programs compiled by an earlier run are reused: kept outside the repository, in the user's cache folder.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$USER_CACHE/jaxserve/test-programs}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# loadfile: the tests of a file share its fixtures (a loaded model), so they stay on one worker.
exec "$VENV/bin/python" -m pytest -n "$workers" --dist loadfile -m "not slow" "$@"
