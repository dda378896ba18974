# shellcheck shell=bash
# What the launchers share: errors, options, --dry-run. Works with the bash 3.2 of macOS.

dry_run=
words=() # arguments without a dash
flags=() # everything after --

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a launcher is its help.
usage() {
  sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$0"
}

# parse "VALUED ..." "SWITCH ..." ARGUMENT...: sets opt_NAME for every --NAME, words, flags and dry_run.
parse() {
  local valued=" $1 " switches=" $2 " name
  shift 2
  while [ $# -gt 0 ]; do
    name=${1#--} name=${name%%=*}
    case $1 in
      --) shift && flags=("$@") && return ;;
      --help | -h) usage && exit 0 ;;
      --dry-run) dry_run=yes ;;
      --*=*)
        [[ $valued == *" $name "* ]] || fail "there is no option --$name with a value; --help lists them"
        printf -v "opt_${name//-/_}" %s "${1#*=}"
        ;;
      --*)
        if [[ $switches == *" $name "* ]]; then
          printf -v "opt_${name//-/_}" yes
        else
          [[ $valued == *" $name "* ]] || fail "there is no option --$name; --help lists them"
          [ $# -gt 1 ] || fail "--$name needs a value"
          printf -v "opt_${name//-/_}" %s "$2"
          shift
        fi
        ;;
      -*) fail "there is no option $1; --help lists them" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

# required NAME...: these options have a value.
required() {
  local name variable
  for name; do
    variable=opt_${name//-/_}
    [ -n "${!variable}" ] || fail "--$name is missing; --help says more"
  done
}

# need PROGRAM WHERE_TO_GET_IT
need() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed; see $2"
}

# Arguments as any shell takes them back.
quoted() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Run a command; with --dry-run print it instead.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# The flags after -- must name a run.
require_run_flags() {
  [[ " ${flags[*]-} " == *" --config"* ]] || fail "the flags of the run are missing: write them at the end, -- --config=NAME"
}
