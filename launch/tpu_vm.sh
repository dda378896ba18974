#!/usr/bin/env bash
# Run on Cloud TPU VMs, of one host or of many.
#
#   launch/tpu_vm.sh create  --name=NAME --zone=ZONE --accelerator=v4-32 [--spot] [--queued]
#   launch/tpu_vm.sh install --name=NAME --zone=ZONE --nfs=HOST:/SHARE | --bucket=BUCKET [--env-file=FILE]
#   launch/tpu_vm.sh run     --name=NAME --zone=ZONE -- --config=ppo_7b --set sampler.rows=256
#   launch/tpu_vm.sh logs    --name=NAME --zone=ZONE [--worker=0]
#   launch/tpu_vm.sh stop    --name=NAME --zone=ZONE
#   launch/tpu_vm.sh state   --name=NAME --zone=ZONE
#   launch/tpu_vm.sh delete  --name=NAME --zone=ZONE
#   launch/tpu_vm.sh watch   (all options of create and install) [--interval=60] [--restarts=100] -- FLAGS
#
# `watch` does the first three, and again whenever the VM was preempted or the run broke off, until the run is done; it
# goes on where it stopped. Leave it running somewhere that stays on; started again, it finds the VM as it is.
#
#   --accelerator   v2-8, v3-8, v4-8 ..., v5e-8 (v5litepod-8) ..., v5p-8 ..., v6e-8 ...
#   --spot          cheaper, may be taken away at any time     --queued   ask through a queued resource (v5p, v6e)
#   --project       the Google Cloud project; without it, gcloud's own
#   --nfs           a share that every worker mounts at /mnt/cai_jax: Filestore, in the VM's network
#   --bucket        or a bucket, through gcsfuse: with hierarchical namespace, so that folders are renamed at once
#   --env-file      lines NAME=VALUE for the run, such as HF_TOKEN and WANDB_API_KEY
#   --dry-run       print the commands
#
# All workers need one run folder. It is /mnt/cai_jax/runs/NAME, or what --run_dir among FLAGS says.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

opt_name='' opt_zone='' opt_project='' opt_accelerator='' opt_spot='' opt_queued='' opt_nfs='' opt_bucket='' opt_env_file=''
opt_worker=0 opt_interval=60 opt_restarts=100
parse "name zone project accelerator nfs bucket env-file worker interval restarts" "spot queued" "$@"

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

main() {
  [ ${#words[@]} -eq 1 ] || fail "say one thing to do: create, install, run, logs, stop, state, delete or watch"
  required name zone
  need gcloud https://cloud.google.com/sdk/docs/install
  where=(--zone="$opt_zone")
  [ -z "$opt_project" ] || where+=(--project="$opt_project")
  case ${words[0]} in
    create) required accelerator && runtime_version >/dev/null && create ;;
    install) check_install && install ;;
    run) require_run_flags && start ;;
    logs) run gcloud compute tpus tpu-vm ssh "$opt_name" "${where[@]}" --worker="$opt_worker" --command="tail -n 100 -f cai_jax.log" ;;
    stop) on_workers all "$(worker stop)" ;;
    state) vm_state && run_state ;;
    delete) delete ;;
    watch) required accelerator && runtime_version >/dev/null && check_install && require_run_flags && watch ;;
    *) fail "there is no command ${words[0]}; --help lists them" ;;
  esac
}

# Google's own names: https://cloud.google.com/tpu/docs/runtimes
runtime_version() {
  case $opt_accelerator in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5e-* | v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--accelerator=$opt_accelerator is no TPU that is known here; write v4-32, v5e-16, v5p-32 or v6e-16, say" ;;
  esac
}

create() {
  local kind=(tpu-vm create "$opt_name" --version="$(runtime_version)")
  [ -z "$opt_queued" ] || kind=(queued-resources create "$opt_name" --node-id="$opt_name" --runtime-version="$(runtime_version)")
  [ -z "$opt_spot" ] || kind+=(--spot)
  run gcloud compute tpus "${kind[@]}" --accelerator-type="${opt_accelerator/#v5e-/v5litepod-}" "${where[@]}"
}

delete() {
  if [ -n "$opt_queued" ]; then
    run gcloud compute tpus queued-resources delete "$opt_name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$opt_name" "${where[@]}" --quiet
  fi
}

on_workers() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$opt_name" "${where[@]}" --quiet --worker="$1" --command="$2"
}

check_install() {
  [ -n "$opt_nfs$opt_bucket" ] || fail "all workers need one run folder: give --nfs=HOST:/SHARE or --bucket=BUCKET"
  [ -z "$opt_nfs" ] || [ -z "$opt_bucket" ] || fail "give --nfs or --bucket, not both"
  [ -z "$opt_env_file" ] || [ -r "$opt_env_file" ] || fail "--env-file=$opt_env_file: there is no such file"
}

# The checkout as it lies here goes to every worker.
install() {
  local archive=${TMPDIR:-/tmp}/$opt_name-cai_jax.tar.gz share=("${opt_nfs:+nfs}${opt_bucket:+bucket}" "$opt_nfs$opt_bucket")
  run tar -czf "$archive" -C "$root" --exclude=./.git --exclude=./.venv --exclude=./runs . &&
    to_workers "$archive" cai_jax.tar.gz &&
    { [ -z "$opt_env_file" ] || to_workers "$opt_env_file" cai_jax.env; } &&
    on_workers all "rm -rf cai_jax && mkdir cai_jax && tar -xzf cai_jax.tar.gz -C cai_jax && $(worker install "${share[@]}")"
}

to_workers() { # FILE NAME_THERE
  run gcloud compute tpus tpu-vm scp "$1" "$opt_name:$2" "${where[@]}" --quiet --worker=all
}

worker() {
  quoted bash cai_jax/launch/tpu_worker.sh "$@"
}

start() {
  [[ " ${flags[*]} " == *" --run_dir"* ]] || flags+=(--run_dir="/mnt/cai_jax/runs/$opt_name")
  on_workers all "$(worker run "${flags[@]}")"
}

# READY, GONE (preempted), NONE (never there, or deleted), WAIT (on its way), UNKNOWN (it could not be asked).
vm_state() {
  local kind=(tpu-vm describe "$opt_name" "${where[@]}" "--format=value(state)") said
  [ -z "$opt_queued" ] || kind=(queued-resources describe "$opt_name" "${where[@]}" "--format=value(state.state)")
  if [ -n "$dry_run" ]; then
    run gcloud compute tpus "${kind[@]}"
  elif said=$(gcloud compute tpus "${kind[@]}" 2>"$errors"); then
    case $said in
      READY | ACTIVE) echo READY ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED) echo GONE ;;
      *) echo WAIT ;;
    esac
  elif grep -qi 'not[_ ]found' "$errors"; then
    echo NONE
  else
    tail -n 1 "$errors" >&2
    echo UNKNOWN
  fi
}

# "running", "done CODE", "idle" (installed, not started), "bare" (not installed), or nothing: it could not be asked.
run_state() {
  { on_workers 0 "$(worker state) 2>/dev/null || echo bare" 2>/dev/null || true; } | tail -n 1
}

watch() {
  local restarts=0 state
  if [ -n "$dry_run" ]; then
    create && install && start
    echo "# then every $opt_interval s, and the above again where the VM is gone or the run broke off:"
    vm_state && run_state
    return
  fi
  while :; do
    state=$(vm_state)
    [ "$state" != READY ] || state=$(run_state)
    say "${state:-worker 0 does not answer}"
    case $state in
      GONE) delete || say "deleting it failed" ;;
      NONE) create || say "creating it failed" ;;
      bare) install || say "installing failed" ;;
      idle) start || say "starting failed" ;;
      "done 0") return ;;
      "done 2") fail "the run refused its flags or its inputs; launch/tpu_vm.sh logs says why" ;;
      done*)
        restarts=$((restarts + 1))
        [ "$restarts" -le "$opt_restarts" ] || fail "the run broke off $restarts times; launch/tpu_vm.sh logs says why"
        { on_workers all "$(worker stop)" && start; } || say "starting failed"
        ;;
    esac
    sleep "$opt_interval"
  done
}

say() {
  echo "$(date '+%F %T') $opt_name: $*"
}

main
