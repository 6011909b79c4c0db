# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # the sourcing scripts read variables set here, and set variables read here
# Functions that the launch scripts share. The scripts source this file; nobody runs it.

((BASH_VERSINFO[0] >= 5)) || {
  echo "error: bash $BASH_VERSION is too old for this script; install bash 5 (macOS: brew install bash)" >&2
  exit 2
}

# fail TEXT: prints one line, which names the value and the fix, and exits with 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# usage: prints the comment at the top of the script, which is its --help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# quote WORDS: prints the words quoted, so that bash on this or another host reads the same words.
quote() {
  local word text=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then text+=("$word"); else text+=("${word@Q}"); fi
  done
  echo "${text[*]}"
}

# run WORDS: runs the command, or with --dry_run prints it.
run() {
  if [[ $dry_run ]]; then quote "$@"; else "$@"; fi
}

# parse_flags ARGUMENTS: sets the variables named in $flags (--name=value) and in $switches (--name). Puts the words
# after -- into main_flags, and the word that is one of $commands into command.
parse_flags() {
  local key
  main_flags=() command=
  while (($#)); do
    key=${1%%=*}
    key=${key#--}
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        main_flags=("$@")
        return
        ;;
      --*)
        if [[ " $switches " == *" $key "* ]]; then
          [[ $1 != *=* ]] || fail "$1: --$key is a switch; write --$key"
          printf -v "$key" 1
        elif [[ " $flags " == *" $key "* ]]; then
          [[ $1 == *=?* ]] || fail "--$key has no value; write --$key=VALUE"
          printf -v "$key" %s "${1#*=}"
        else
          fail "--$key is unknown; see --help. Flags of dar_jax.main come after --"
        fi
        ;;
      *)
        [[ " $commands " == *" $1 "* ]] ||
          fail "\"$1\" is not understood; see --help. Flags of dar_jax.main come after --"
        [[ -z $command ]] || fail "\"$1\" comes after \"$command\"; give one command"
        command=$1
        ;;
    esac
    shift
  done
}

# need NAMES: fails unless each of these flags was given.
need() {
  local key
  for key; do
    [[ ${!key} ]] || fail "--$key is required; write --$key=VALUE, see --help"
  done
}

# check_main_flags: fails unless main_flags hold what a run on many hosts needs. Sets workdir.
check_main_flags() {
  local word config=
  workdir=
  for word in "${main_flags[@]}"; do
    case $word in
      --config=?*) config=${word#*=} ;;
      --workdir=?*) workdir=${word#*=} ;;
      --distributed*) fail "$word is set by this script; leave it out" ;;
    esac
  done
  [[ $config ]] || fail "the flags after -- have no --config=FILE; write --config=configs/sit_xl_dar.py"
  [[ $workdir ]] || fail "the flags after -- have no --workdir=DIR; name a directory that all hosts share"
  [[ $workdir != *:/* || $workdir == gs://?* ]] || fail "--workdir=$workdir is neither a directory nor gs://BUCKET/NAME"
}
