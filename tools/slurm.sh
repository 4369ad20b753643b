#!/usr/bin/env bash
# One task a GPU under SLURM, started again by itself when the time is up or the job is preempted:
#
#     sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 12:00:00 tools/slurm.sh configs/dino_vits16.yaml \
#         data=/imagenet/train out=runs/vits16
#
#SBATCH --job-name dino_sd
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output %x-%j.log
# Three minutes before the end every task gets SIGUSR1: the ranks agree on a step, save it, and exit with 75. Then the
# job goes back into the queue, and the same command goes on where it was. Other codes are the job's own.
set -u
code=0
srun --kill-on-bad-exit=0 "${PYTHON:-python}" -m dino_sd train "$@" || code=$?
if [ "$code" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
