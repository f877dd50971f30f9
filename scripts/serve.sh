#!/usr/bin/env bash
# Serves a model: makes .venv where there is none, then starts `python -m serving.launch` with your arguments.
#
#   bash scripts/serve.sh                                   the default model, gRPC on 127.0.0.1:50051
#   bash scripts/serve.sh --model model.gguf --mesh data=1,model=2
#   bash scripts/serve.sh --help                            every flag
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_env
exec "$VENV/bin/python" -m serving.launch "$@"
