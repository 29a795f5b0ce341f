#!/usr/bin/env bash
# The published set-up on SLURM, 4 machines with 8 GPUs: sbatch recipes/accelerate/slurm.sh CONFIG.yaml OUTPUT_DIR
# Ten minutes before its time is up the job gets SIGTERM, saves a checkpoint, and puts itself in the queue again.
#SBATCH --job-name=scalekd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

config=$1 output_dir=$2
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000)) # another for each job: two may share a machine
started=$(mktemp)

# One task for each GPU and no launcher between, so that SIGTERM reaches the trainers and nobody cuts their saving short.
srun --kill-on-bad-exit=0 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
    LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec python recipes/distill.py "$0" --output_dir "$1"' "$config" "$output_dir"

for note in "$output_dir/_interrupted.json" "$output_dir/alone/_interrupted.json"; do
    if [ "$note" -nt "$started" ]; then # of this run, not of one before
        scontrol requeue "$SLURM_JOB_ID"
        break
    fi
done
