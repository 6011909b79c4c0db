#!/usr/bin/env bash
# Trains on the hosts of a Cloud TPU slice: makes the TPU, copies this checkout, installs it, starts
# python -m dar_jax.main on every host, follows the log, and goes on after a preemption.
#
#   launch/tpu_pod.sh [flags] run -- [flags of dar_jax.main]
#   launch/tpu_pod.sh [flags] status | log | stop | delete
#
# run      Creates the TPU if it is missing, else uses it as it is. Then copies the files git tracks, with uncommitted
#          changes, installs, starts, and follows the log. The run goes on if this command ends; the same command
#          follows it again. A preempted TPU is deleted and asked for again, and the run goes on from its workdir.
# status   The state of the TPU, and on every host: running, finished, stopped, interrupted or failed.
# log      Follows the log of worker 0 (dar_jax_run/log in its home directory).
# stop     SIGTERM on all hosts: the run saves and ends. "run" goes on from there.
# delete   Deletes the TPU (with --queued the request too), which ends what it costs.
#
# --name=NAME        of the TPU (and of the queued resource)
# --zone=ZONE        for example us-west4-a
# --project=PROJECT  default: that of gcloud
# --type=TYPE        accelerator type: v4-128, v5litepod-256, v5p-64, v6e-64 ...; for "run"
# --version=VERSION  software of the hosts; default: the one Google names for the type
# --queued           by a queued resource: waits until there is capacity, also after a preemption. Give it to all
#                    commands.
# --spot             cheaper, and may be preempted; best with --queued
# --bucket=BUCKET    mounts this bucket on all hosts at /mnt/shared (gcsfuse)
# --nfs=HOST:/SHARE  or this NFS share, for example of Filestore in the same network
# --dry_run          prints the commands for a TPU that does not exist yet, and runs nothing
#
# One of --bucket and --nfs is needed, and --workdir (best also --config.data.path) must be below /mnt/shared: all
# hosts write checkpoints there, and it is all that outlives a preemption. A gs:// path is no directory to dar_jax.
# Checkpoints become valid by renaming a directory, so the bucket must have a hierarchical namespace:
#
#   gcloud storage buckets create gs://BUCKET --location=REGION --uniform-bucket-level-access \
#       --enable-hierarchical-namespace
#
# and the TPU's service account needs the role Storage Object User on it.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$checkout/launch/common.sh"

commands="run status log stop delete"
flags="name zone project type version bucket nfs"
switches="queued spot dry_run"
name='' zone='' project='' type='' version='' bucket='' nfs='' queued='' spot='' dry_run=''
parse_flags "$@"

pause=30 # seconds between two looks at a state
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

tpus() {
  run gcloud compute tpus "$@" "${where[@]}"
}

# on WORKER COMMAND: runs a line of bash on one host, or on "all".
on() {
  # Without the probes, a connection to a host that has vanished would be waited on for hours.
  tpus tpu-vm ssh "$name" --worker="$1" --ssh-flag="-o ServerAliveInterval=30" --command="$2"
}

# worker WORKER WORDS: calls launch/tpu_worker.sh there, with the compiler flags of the environment here.
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

# ensure: returns when the TPU is there and ready.
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

# outcome: prints what tpu_worker.sh says of the run on worker 0; none, if there was none; unreachable.
outcome() {
  on 0 'if [ -e dar_jax_run ]; then bash dar_jax/launch/tpu_worker.sh outcome; else echo none; fi' || echo unreachable
}

# install: this checkout, on all hosts.
install() {
  local commit=HEAD
  if [[ -z $dry_run ]]; then
    commit=$(git -C "$checkout" stash create) || fail "git cannot read the changes in $checkout (it says why above)"
    echo "copying ${commit:+uncommitted changes on }commit $(git -C "$checkout" rev-parse --short HEAD)"
  fi
  run git -C "$checkout" archive --output="$scratch/dar_jax.tar.gz" "${commit:-HEAD}" &&
    tpus tpu-vm scp "$scratch/dar_jax.tar.gz" "$name:" --worker=all &&
    on all "rm -rf dar_jax && mkdir dar_jax && tar -xzf dar_jax.tar.gz -C dar_jax" &&
    worker all install "${bucket:+--bucket=$bucket}${nfs:+--nfs=$nfs}"
}

# train: starts the run and follows it to its end, over preemptions.
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
    if [[ $followed ]]; then # else it is the result of an earlier run
      case $result in
        finished | stopped)
          echo "the run has $result; \"delete\" ends what the TPU costs"
          return
          ;;
        failed*)
          sleep "$pause" # a host that is being preempted takes the others with it before the state says so
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
    worker 0 follow || true # a broken connection; what became of the run is asked next
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
  [[ $bucket || $nfs ]] || fail "neither --bucket nor --nfs is given; the hosts need storage they share, see --help"
  [[ -z $bucket || -z $nfs ]] || fail "--bucket=$bucket and --nfs=$nfs are both given; choose one"
  [[ $bucket != gs://* ]] || fail "--bucket=$bucket: write the name alone, --bucket=${bucket#gs://}"
  [[ $workdir == /mnt/shared/* ]] || fail "--workdir=$workdir is not shared by the hosts; put it below /mnt/shared"
  version=${version:-$(default_version)}
fi
case $command in
  run) train ;;
  status) status ;;
  log) worker 0 follow ;;
  stop) worker all stop ;;
  delete) delete ;;
esac
