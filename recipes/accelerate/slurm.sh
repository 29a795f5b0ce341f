#!/usr/bin/env bash
# The published set-up on SLURM, 4 machines with 8 GPUs: sbatch recipes/accelerate/slurm.sh CONFIG.yaml
# Ten minutes before its time is up the job gets SIGTERM, saves a checkpoint, and puts itself in the queue again.
#SBATCH --job-name=scalekd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node 8 --master_addr "$MASTER_ADDR" --master_port 29500 recipes/distill.py "$0" "${@:1}"' "$@"

output_dir=$(python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["output_dir"])' "$1")
if [ -e "$output_dir/_interrupted.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
