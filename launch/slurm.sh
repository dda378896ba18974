#!/usr/bin/env bash
# Submit a run to SLURM: one process a GPU, as JAX expects it there, on one node or on many.
#
#   launch/slurm.sh --nodes=2 [--gpus=8] [--time=24:00:00] [--partition=P] [--account=A] [--name=cai_jax]
#                   [--restarts=100] [--dry-run] -- --config=cai_7b --run_dir=/shared/runs/cai_7b
#
# Run it from a checkout on a disk that all nodes share, with its environment in .venv:
#
#   python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[cuda]'
#
# The run folder must lie on that disk, too. Two minutes before the time is up, and when the job is preempted, the
# processes get SIGTERM; the job then goes back to the queue and continues where it stopped. --gpus: of each node.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

opt_nodes='' opt_gpus=8 opt_time=24:00:00 opt_partition='' opt_account='' opt_name=cai_jax opt_restarts=100
parse "nodes gpus time partition account name restarts" "" "$@"
[ ${#words[@]} -eq 0 ] || fail "${words[0]} belongs to no option; the flags of the run come after --"
required nodes
for number in "$opt_nodes" "$opt_gpus" "$opt_restarts"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "--nodes, --gpus and --restarts are whole numbers, not '$number'"
done
require_run_flags
need sbatch https://slurm.schedmd.com
[ -n "$dry_run" ] || [ -x "$root/.venv/bin/python" ] || fail "$root/.venv is missing; --help says how to make it"

job=(
  --job-name="$opt_name" --chdir="$root" --nodes="$opt_nodes"
  --ntasks-per-node="$opt_gpus" --gpus-per-node="$opt_gpus" --time="$opt_time"
  --requeue --signal=TERM@120 --open-mode=append --output="$opt_name-%j.log"
  --export="ALL,CAI_JAX_RESTARTS=$opt_restarts"
)
[ -z "$opt_partition" ] || job+=(--partition="$opt_partition")
[ -z "$opt_account" ] || job+=(--account="$opt_account")
run sbatch "${job[@]}" "$root/launch/slurm_job.sh" "${flags[@]}"
