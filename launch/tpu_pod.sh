#!/usr/bin/env bash
# Trains on the hosts of a Cloud TPU slice. Makes the TPU, copies this checkout, installs it, starts
# python -m dar_jax.main on every host and follows the log. Continues after a preemption.
#
#   launch/tpu_pod.sh [flags] run -- [flags of dar_jax.main]
#   launch/tpu_pod.sh [flags] status | log | stop | delete
#
# run      Creates the TPU if it is missing, and otherwise uses it as it is. Then copies the files that git tracks,
#          with uncommitted changes, installs them, starts the run and follows the log. The run continues when this
#          command ends, and the same command follows the log again. If the TPU is preempted, this command deletes
#          it, asks for it again, and continues the run from its workdir.
# status   Prints the state of the TPU, and for every host: running, finished, stopped, interrupted or failed.
# log      Follows the log of worker 0, which is dar_jax_run/log in its home directory.
# stop     Sends SIGTERM to all hosts. The run saves and ends. The command "run" continues it later.
# delete   Deletes the TPU, and with --queued the request too. The TPU then costs nothing more.
#
# --name=NAME        name of the TPU, and of the queued resource
# --zone=ZONE        for example us-west4-a
# --project=PROJECT  default: the project of gcloud
# --type=TYPE        accelerator type, needed by "run": v4-128, v5litepod-256, v5p-64, v6e-64 ...
# --version=VERSION  software of the hosts; default: the version that Google names for the type
# --queued           asks by a queued resource, which waits for capacity, also after a preemption. Give this flag to
#                    all commands.
# --spot             asks for a cheaper TPU that may be preempted; best with --queued
# --nfs=HOST:/SHARE  mounts this NFS share on all hosts at /mnt/shared, for example of Filestore in the same network
# --dry_run          prints the commands for a TPU that does not exist yet, and runs nothing
#
# --workdir must be in a bucket, gs://BUCKET/NAME, or with --nfs below /mnt/shared. --config.data.path, the VAE and the
# reference are best placed there too. All hosts write checkpoints there, and nothing else outlives a preemption. The
# service account of the TPU needs the role Storage Object User on the bucket.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$checkout/launch/common.sh"

commands="run status log stop delete"
flags="name zone project type version nfs"
switches="queued spot dry_run"
name='' zone='' project='' type='' version='' nfs='' queued='' spot='' dry_run=''
parse_flags "$@"

pause=30 # seconds between two looks at a state
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

tpus() {
  run gcloud compute tpus "$@" "${where[@]}"
}

# on WORKER COMMAND: runs a line of bash on one host, or on all hosts if WORKER is "all".
on() {
  # Without these probes, ssh would wait for hours on a host that has vanished.
  tpus tpu-vm ssh "$name" --worker="$1" --ssh-flag="-o ServerAliveInterval=30" --command="$2"
}

# worker WORKER WORDS: calls launch/tpu_worker.sh on that host, with the LIBTPU_INIT_ARGS of this host.
worker() {
  local env=${LIBTPU_INIT_ARGS:+LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS@Q} }
  on "$1" "${env}bash dar_jax/launch/tpu_worker.sh $(quote "${@:2}")"
}

# state: prints what gcloud calls the state of the TPU, or MISSING.
state() {
  local kind=tpu-vm field=state
  if [[ $queued ]]; then kind=queued-resources field=state.state; fi
  tpus "$kind" describe "$name" --format="value($field)" 2>"$scratch/stderr" && return
  if grep -q NOT_FOUND "$scratch/stderr"; then
    echo MISSING
  else
    fail "gcloud cannot describe $name: $(tr '\n' ' ' <"$scratch/stderr")"
  fi
}

ready() {
  local now
  now=$(state)
  [[ $now == READY || $now == ACTIVE ]]
}

# Google's table of software versions: https://cloud.google.com/tpu/docs/runtimes
default_version() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local words=("$name" --accelerator-type="$type")
  [[ -z $spot ]] || words+=(--spot)
  if [[ $queued ]]; then
    tpus queued-resources create "${words[@]}" --node-id="$name" --runtime-version="$version"
  else
    tpus tpu-vm create "${words[@]}" --version="$version"
  fi || fail "$name could not be created (gcloud says why above); with --queued it waits for capacity"
}

delete() {
  if [[ $queued ]]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# ensure: returns when the TPU exists and is ready.
ensure() {
  local now before=''
  if [[ $dry_run ]]; then
    create
    return
  fi
  while :; do
    now=$(state)
    case $now in
      READY | ACTIVE) return ;;
      MISSING) create ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        echo "$name is $now: deleting it and asking again"
        delete
        ;;
      FAILED | STOPPED | HIDDEN)
        fail "$name is $now; gcloud describes why. Delete it with the same flags and \"delete\", then repeat"
        ;;
      *)
        [[ $now == "$before" ]] || echo "$name is $now: waiting"
        sleep "$pause"
        ;;
    esac
    before=$now
  done
}

# outcome: prints what tpu_worker.sh says of the run on worker 0. Prints "none" if there was no run, and "unreachable"
# if the host does not answer.
outcome() {
  on 0 'if [ -e dar_jax_run ]; then bash dar_jax/launch/tpu_worker.sh outcome; else echo none; fi' || echo unreachable
}

# install: copies this checkout to all hosts and installs it.
install() {
  local commit=HEAD
  if [[ -z $dry_run ]]; then
    commit=$(git -C "$checkout" stash create) || fail "git cannot read the changes in $checkout (it says why above)"
    echo "copying ${commit:+uncommitted changes on }commit $(git -C "$checkout" rev-parse --short HEAD)"
  fi
  run git -C "$checkout" archive --output="$scratch/dar_jax.tar.gz" "${commit:-HEAD}" &&
    tpus tpu-vm scp "$scratch/dar_jax.tar.gz" "$name:" --worker=all &&
    on all "rm -rf dar_jax && mkdir dar_jax && tar -xzf dar_jax.tar.gz -C dar_jax" &&
    worker all install ${nfs:+"--nfs=$nfs"}
}

# train: starts the run and follows it to its end, through preemptions.
train() {
  local result followed=''
  while :; do
    ensure
    result=$(outcome)
    if [[ $result == unreachable ]]; then
      echo "worker 0 of $name does not answer: trying again"
      sleep "$pause"
      continue
    fi
    if [[ $followed ]]; then # otherwise this is the outcome of an earlier run
      case $result in
        finished | stopped)
          echo "the run has $result; \"delete\" ends what the TPU costs"
          return
          ;;
        failed*)
          sleep "$pause" # a preempted host ends the others before gcloud reports the preemption
          if ready; then fail "the run has $result; its last words are above"; fi
          continue
          ;;
        interrupted) echo "the run was interrupted: starting it again" ;;
      esac
    fi
    if [[ $result != running ]] && ! { install && worker all start "${main_flags[@]}"; }; then
      sleep "$pause"
      if ready; then fail "the run could not be started on $name; the reason is above"; fi
      continue
    fi
    [[ $dry_run ]] || echo "following the log; Ctrl-C leaves the run going"
    worker 0 follow || true # the connection may break; the next round asks for the outcome
    followed=1
    [[ -z $dry_run ]] || return 0
  done
}

status() {
  state
  if [[ $dry_run ]] || ready; then worker all outcome; fi
}

[[ $command ]] || fail "no command; give one of: ${commands// /, }"
need name zone
if [[ $command == run ]]; then
  need type
  check_main_flags
  [[ $workdir == gs://* || ($nfs && $workdir == /mnt/shared/*) ]] ||
    fail "--workdir=$workdir is not shared by the hosts; write gs://BUCKET/NAME, or give --nfs and put it below /mnt/shared"
  version=${version:-$(default_version)}
fi
case $command in
  run) train ;;
  status) status ;;
  log) worker 0 follow ;;
  stop) worker all stop ;;
  delete) delete ;;
esac
