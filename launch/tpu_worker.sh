#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a TPU VM, in the home folder that holds cai_jax/.
#
#   tpu_worker.sh install nfs HOST:/SHARE | install bucket BUCKET
#   tpu_worker.sh run FLAGS...     start the run in the background: log in cai_jax.log, exit code in cai_jax.exit
#   tpu_worker.sh stop             end it, with two minutes to save
#   tpu_worker.sh state            running | done CODE | idle
set -euo pipefail
share=/mnt/cai_jax

alive() {
  [ -f cai_jax.pid ] && kill -0 "$(cat cai_jax.pid)" 2>/dev/null
}

case ${1:-} in
  install)
    # The system's Python may be older than 3.11; uv brings one.
    python3 -m pip install --user --quiet uv
    cd cai_jax
    python3 -m uv venv --quiet --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv -c constraints.txt -e '.[tpu]'
    mountpoint -q "$share" && exit
    sudo mkdir -p "$share"
    sudo chown "$USER" "$share"
    if [ "$2" = nfs ]; then
      sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
      sudo mount -t nfs "$3" "$share"
    else
      if ! command -v gcsfuse >/dev/null; then
        key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
        curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
        echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
        sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
      fi
      # Without caches every worker sees at once what another has written.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 "$3" "$share"
    fi
    ;;
  run)
    shift
    if alive; then
      echo "error: a run is under way; stop it first" >&2
      exit 2
    fi
    rm -f cai_jax.exit
    if [ -f cai_jax.env ]; then
      chmod 600 cai_jax.env
      set -a
      # shellcheck source=/dev/null
      . ./cai_jax.env
      set +a
    fi
    # shellcheck disable=SC2016 # the inner shell expands it
    setsid nohup bash -c 'cd cai_jax && .venv/bin/python -m cai_jax.launch "$@"; echo $? >../cai_jax.exit' \
      cai_jax "$@" >>cai_jax.log 2>&1 </dev/null &
    echo $! >cai_jax.pid
    ;;
  stop)
    alive || exit 0
    kill -TERM -- "-$(cat cai_jax.pid)"
    for _ in $(seq 120); do
      alive || exit 0
      sleep 1
    done
    kill -KILL -- "-$(cat cai_jax.pid)"
    ;;
  state)
    if [ -f cai_jax.exit ]; then
      echo "done $(cat cai_jax.exit)"
    elif alive; then
      echo running
    elif [ -x cai_jax/.venv/bin/python ] && mountpoint -q "$share"; then
      echo idle
    else
      echo bare # also after a reboot, which forgets the mount
    fi
    ;;
  *)
    echo "error: write $0 install, run, stop or state" >&2
    exit 2
    ;;
esac
