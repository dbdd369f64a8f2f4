#!/bin/bash
# A sweep as a job array: sbatch docs/ci/slurm.sh
#SBATCH --job-name=outrider-sweep
#SBATCH --array=0-31
#SBATCH --cpus-per-task=2
#SBATCH --mem=2G
#SBATCH --time=01:00:00
exec outrider-sim sweep --seeds 1000000 --jobs "$SLURM_CPUS_PER_TASK" --time-budget 3300 \
    --save "failures" --junit "sweep-$SLURM_ARRAY_TASK_ID.xml"
