#!/bin/bash
# One submission for each task of a Slurm array job (sbatch(1), --array), on folders that all nodes see. From the
# course's tree, with as many tasks as there are submissions, of which 50 run at a time:
#
#     sbatch --array=0-$(($(ls -b SUBMISSIONS | wc -l) - 1))%50 tools/cluster/slurm.sh SUBMISSIONS RESULTS --lesson=3
#
# Without --lesson all lessons are graded; there are also --engine and --seeds. When the array is done, the same as
# `make grade-all SUBMISSIONS=... RESULTS=... LESSON=3` grades what is missing, and writes points and pages. A node needs the packages that `tools/setup run svm vmx grade` installs, and the cache of the emulated
# machines (README, KVMLAB_CACHE).
#SBATCH --job-name=kvmlab
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=00:30:00
#SBATCH --output=kvmlab-%A_%a.log
set -eu

if [ $# -lt 2 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "kvmlab: say: sbatch --array=0-N tools/cluster/slurm.sh SUBMISSIONS RESULTS [--lesson=n]" >&2
    exit 2
fi
# Slurm runs a copy of this file, in the folder where sbatch was called.
if [ ! -d tools/kvmlab ]; then
    echo "kvmlab: $PWD is not the course's tree: call sbatch from there" >&2
    exit 2
fi
submissions=$1 results=$2
shift 2
export PYTHONPATH=tools PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 -m kvmlab grade-item "$SLURM_ARRAY_TASK_ID" "$submissions" --results="$results" "$@"
