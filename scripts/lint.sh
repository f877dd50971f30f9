#!/usr/bin/env bash
# What the code is held to beside its tests: ruff (lint and format), pyright, import contracts. Fails when any of them does.
#
#   bash scripts/lint.sh          looks
#   bash scripts/lint.sh --fix    mends what ruff can mend, then looks
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env dev || exit 1
cd "$REPO"

bin="$VENV/bin"
if [ "${1:-}" = "--fix" ]; then
  "$bin/ruff" check --fix --quiet .
  "$bin/ruff" format --quiet .
fi

failed=0
check() {
  local name="$1"
  shift
  printf '\n== %s\n' "$name"
  if "$@"; then
    printf 'ok      %s\n' "$name"
  else
    printf 'FAILED  %s\n' "$name"
    failed=1
  fi
}

check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "pyright" "$bin/pyright"
check "pyright, strictly" "$bin/pyright" -p pyright.strict.json
check "import contracts" "$bin/lint-imports"
exit "$failed"
