#!/usr/bin/env bash
# Run on TPUs of Google Kubernetes Engine, as a JobSet (https://jobset.sigs.k8s.io, installed in the cluster).
#
#   launch/gke.sh apply --name=NAME --accelerator=v4-32 --image=IMAGE --claim=CLAIM | --bucket=BUCKET
#                       [--account=SERVICE_ACCOUNT] [--spot] [--restarts=100] [--dry-run] -- --config=ppo_7b
#   launch/gke.sh logs   --name=NAME
#   launch/gke.sh state  --name=NAME
#   launch/gke.sh delete --name=NAME
#
#   --accelerator   v4-8 ... v4-1024, v5p-8 ... v5p-1024, v5e-1 ... v5e-256, v6e-1 ... v6e-256; the cluster needs a node
#                   pool of that topology (Autopilot makes one)
#   --image         made with launch/image.sh --backend=tpu
#   --claim         a persistent volume claim that many pods can write (Filestore), mounted at /mnt/cai_jax
#   --bucket        or a bucket with hierarchical namespace, through the Cloud Storage FUSE driver
#   --account       the Kubernetes service account, which must be allowed to write the bucket
#   --dry-run       print the JobSet and the command
#
# All pods need one run folder. It is /mnt/cai_jax/runs/NAME, or what --run_dir among FLAGS says. Tokens come from a
# secret, if there is one: kubectl create secret generic cai-jax --from-literal=HF_TOKEN=... A pod that is preempted
# restarts all of them, and the run goes on where it stopped; exit code 2 (a mistake) ends the JobSet.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

opt_name='' opt_accelerator='' opt_image='' opt_claim='' opt_bucket='' opt_account=default opt_spot='' opt_restarts=100
parse "name accelerator image claim bucket account restarts" "spot" "$@"

main() {
  [ ${#words[@]} -eq 1 ] || fail "say one thing to do: apply, logs, state or delete"
  required name
  [[ $opt_name =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ ]] ||
    fail "--name=$opt_name: Kubernetes takes up to 32 of a-z, 0-9 and -, a letter first"
  need kubectl https://kubernetes.io/docs/tasks/tools
  case ${words[0]} in
    apply) apply ;;
    logs) run kubectl logs --follow --tail=100 --selector="jobset.sigs.k8s.io/jobset-name=$opt_name,batch.kubernetes.io/job-completion-index=0" ;;
    state) run kubectl get "jobset/$opt_name" --output=wide ;;
    delete) run kubectl delete "jobset/$opt_name" ;;
    *) fail "there is no command ${words[0]}; --help lists them" ;;
  esac
}

apply() {
  required accelerator image
  [ -n "$opt_claim$opt_bucket" ] || fail "all pods need one run folder: give --claim=CLAIM or --bucket=BUCKET"
  [ -z "$opt_claim" ] || [ -z "$opt_bucket" ] || fail "give --claim or --bucket, not both"
  [[ $opt_restarts =~ ^[0-9]+$ ]] || fail "--restarts is a whole number, not '$opt_restarts'"
  require_run_flags
  [[ ${flags[*]} != *$'\n'* ]] || fail "a flag of the run has a line break, which the JobSet cannot carry"
  [[ " ${flags[*]} " == *" --run_dir"* ]] || flags+=(--run_dir="/mnt/cai_jax/runs/$opt_name")
  slice
  if [ -n "$dry_run" ]; then
    jobset
    echo "# kubectl apply --filename=-"
  else
    jobset | kubectl apply --filename=-
  fi
}

# The label of the nodes, the topology, pods and chips a pod: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
slice() {
  local family=${opt_accelerator%-*} size=${opt_accelerator##*-}
  case $family in
    v4) label=tpu-v4-podslice ;;
    v5p) label=tpu-v5p-slice ;;
    v5e | v5litepod) label=tpu-v5-lite-podslice ;;
    v6e) label=tpu-v6e-slice ;;
    *) label= ;;
  esac
  case $family:$size in
    v4:8 | v5p:8) topology=2x2x1 chips=4 ;; # these names count two cores a chip
    v4:16 | v5p:16) topology=2x2x2 chips=8 ;;
    v4:32 | v5p:32) topology=2x2x4 chips=16 ;;
    v4:64 | v5p:64) topology=2x4x4 chips=32 ;;
    v4:128 | v5p:128) topology=4x4x4 chips=64 ;;
    v4:256 | v5p:256) topology=4x4x8 chips=128 ;;
    v4:512 | v5p:512) topology=4x8x8 chips=256 ;;
    v4:1024 | v5p:1024) topology=8x8x8 chips=512 ;;
    v5*:1 | v6e:1) topology=1x1 chips=1 ;;
    v5*:4 | v6e:4) topology=2x2 chips=4 ;;
    v5*:8 | v6e:8) topology=2x4 chips=8 ;;
    v5*:16 | v6e:16) topology=4x4 chips=16 ;;
    v5*:32 | v6e:32) topology=4x8 chips=32 ;;
    v5*:64 | v6e:64) topology=8x8 chips=64 ;;
    v5*:128 | v6e:128) topology=8x16 chips=128 ;;
    v5*:256 | v6e:256) topology=16x16 chips=256 ;;
    *) label= ;;
  esac
  [ -n "$label" ] || fail "--accelerator=$opt_accelerator is no slice that is known here; --help lists them"
  # Four chips a machine; v5e and v6e also come with one, and with eight where that is the whole slice.
  per_pod=4
  [[ $topology != 1x1 && $topology != 2x4 ]] || per_pod=$chips
}

# A text as a YAML string.
yaml() {
  printf "'%s'" "$(printf %s "$1" | sed "s/'/''/g")"
}

arguments() {
  local flag
  for flag in "${flags[@]}"; do echo "                    - $(yaml "$flag")"; done
}

volume() {
  if [ -n "$opt_claim" ]; then
    echo "persistentVolumeClaim: {claimName: $(yaml "$opt_claim")}"
  else
    # Without caches every pod sees at once what another has written.
    echo "csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: $(yaml "$opt_bucket"), mountOptions: 'implicit-dirs,metadata-cache:ttl-secs:0'}}"
  fi
}

jobset() {
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $opt_name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # all pods in one slice
spec:
  failurePolicy:
    maxRestarts: $opt_restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $((chips / per_pod))
          completions: $((chips / per_pod))
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: cai-jax, operator: In, values: [2]}
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              serviceAccountName: $(yaml "$opt_account")
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $label
                cloud.google.com/gke-tpu-topology: $topology
$([ -z "$opt_spot" ] || echo "                cloud.google.com/gke-spot: 'true'")
              containers:
                - name: cai-jax
                  image: $(yaml "$opt_image")
                  args:
$(arguments)
                  envFrom:
                    - secretRef: {name: cai-jax, optional: true}
                  ports:
                    - containerPort: 8471
                  resources:
                    requests: {google.com/tpu: $per_pod}
                    limits: {google.com/tpu: $per_pod}
                  volumeMounts:
                    - {name: share, mountPath: /mnt/cai_jax}
              volumes:
                - name: share
                  $(volume)
EOF
}

main
