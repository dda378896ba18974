#!/usr/bin/env bash
# The job that launch/slurm.sh submits, in the folder of the checkout. Exit code 2 is a mistake that a restart does not mend.
set -euo pipefail

code=0
srun --kill-on-bad-exit=1 .venv/bin/python -m cai_jax.launch "$@" || code=$?
if [ $code -ne 0 ] && [ $code -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$CAI_JAX_RESTARTS" ]; then
  echo "the run broke off with code $code; back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
