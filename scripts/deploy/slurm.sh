#!/usr/bin/env bash
# One server on one node: sbatch scripts/deploy/slurm.sh --model Qwen/Qwen3-8B --mesh data=1,model=4
#
#SBATCH --job-name=jaxserve
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@60
#SBATCH --output=jaxserve-%j.log
set -euo pipefail

# Slurm copies the script away from the checkout; the directory of submission is it.
cd "${SLURM_SUBMIT_DIR:-.}"
export JAXSERVE_CACHE="${JAXSERVE_CACHE:-$HOME/.cache/jaxserve}"
echo "serving on $(hostname): gRPC 50051, HTTP 8000"
# SIGTERM reaches the server 60 s before the limit: running requests finish, new ones are refused.
exec srun --kill-on-bad-exit=1 bash scripts/serve.sh --host 0.0.0.0 --log-format json --no-progress --drain-timeout 45 "$@"
