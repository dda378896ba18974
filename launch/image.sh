#!/usr/bin/env bash
# Make the container image of this checkout.
#
#   launch/image.sh --backend=cpu|tpu|cuda --tag=REGISTRY/NAME:TAG [--push] [--dry-run]
#
# Its entry point is python -m cai_jax.launch; give it flags: docker run TAG --list
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

opt_backend='' opt_tag='' opt_push=''
parse "backend tag" "push" "$@"
[ ${#words[@]} -eq 0 ] || fail "${words[0]} belongs to no option; --help lists them"
required backend tag
[[ $opt_backend =~ ^(cpu|tpu|cuda)$ ]] || fail "--backend is cpu, tpu or cuda, not '$opt_backend'"
need docker https://docs.docker.com/get-docker
run docker build --file "$root/launch/Dockerfile" --build-arg BACKEND="$opt_backend" --tag "$opt_tag" "$root"
[ -z "$opt_push" ] || run docker push "$opt_tag"
