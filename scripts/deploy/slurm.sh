#!/usr/bin/env bash
# A server on one node, or one model cut over several: the processes find each other by what Slurm tells them.
#
#   sbatch scripts/deploy/slurm.sh --model Qwen/Qwen3-8B --mesh data=1,model=4
#   sbatch --nodes=2 --gpus-per-node=8 scripts/deploy/slurm.sh --model Qwen/Qwen3-235B-A22B --mesh data=1,model=4,expert=4
#
#SBATCH --job-name=jaxserve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
#SBATCH --output=jaxserve-%j.log
set -euo pipefail

# Slurm copies the script away from the checkout; the directory of submission is it.
cd "${SLURM_SUBMIT_DIR:-.}"
export JAXSERVE_CACHE="${JAXSERVE_CACHE:-$HOME/.cache/jaxserve}"
# The environment is made once, here, and not by every task at the same time on a shared disk.
source scripts/env.sh
ensure_env
echo "serving on $(hostname), first of ${SLURM_JOB_NUM_NODES:-1} nodes: gRPC 50051, HTTP 8000"
# SIGTERM reaches the server 60 s before the limit: running requests finish, new ones are refused. A task that ends in
# failure ends the others: a model with a piece missing answers nobody.
exec srun --kill-on-bad-exit=1 bash scripts/serve.sh --host 0.0.0.0 --log-format json --no-progress --drain-timeout 45 \
  --coordinator auto "$@"
