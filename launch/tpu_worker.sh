#!/usr/bin/env bash
# tpu_pod.sh calls this script on every host of a TPU slice. In the home directory of the host, dar_jax/ is the
# checkout, dar_jax_venv/ is its virtual environment, and dar_jax_run/ has the log and the state of the run.
#
#   tpu_worker.sh install [--nfs=HOST:/SHARE]   installs dar_jax, and mounts the share at /mnt/shared
#   tpu_worker.sh start FLAGS   starts python -m dar_jax.main FLAGS in the background, after it has killed what is left
#                               of a broken run
#   tpu_worker.sh follow        prints the log until the run ends
#   tpu_worker.sh outcome       prints running, finished, stopped (on request), interrupted (by a signal or a reboot),
#                               failed with exit code N, or none
#   tpu_worker.sh stop          sends SIGTERM and waits until the run has saved and ended

set -euo pipefail
cd "$HOME"
shared=/mnt/shared
state=$HOME/dar_jax_run
venv=$HOME/dar_jax_venv

mount_nfs() {
  sudo apt-get -qq install -y nfs-common
  sudo mount -t nfs "$1" "$shared"
  sudo chmod a+rwx "$shared"
}

install() {
  if [[ ${1:-} == --nfs=* ]] && ! mountpoint -q "$shared"; then
    sudo mkdir -p "$shared"
    mount_nfs "${1#*=}"
  fi
  # The images of the hosts bring Python 3.10. dar_jax needs 3.11, which uv fetches.
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -e $venv ]] || uv venv --quiet --seed --python=3.11 "$venv"
  (cd dar_jax && "$venv/bin/python" -m pip install --quiet -e ".[tpu,gcs]")
}

# alive: succeeds if the supervisor of the latest run is running. After a reboot another process may have its number.
alive() {
  [[ -e $state/pid ]] && grep -qs tpu_worker.sh "/proc/$(<"$state/pid")/cmdline"
}

start() {
  local pid flags
  mkdir -p "$state"
  if alive; then
    pid=$(<"$state/pid")
    kill -KILL -- "-$pid" # setsid has made the run a process group
    while alive; do sleep 1; done
  fi
  rm -f "$state/exit_code" "$state/stop_asked"
  [[ ! -e $state/log ]] || mv "$state/log" "$state/log.previous"
  flags=$(grep '^--' dar_jax/dar_jax/planning/tpu_xla_flags.txt | paste -sd ' ')
  export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS:-}"
  setsid nohup bash dar_jax/launch/tpu_worker.sh supervise "$@" >"$state/log" 2>&1 </dev/null &
  echo $! >"$state/pid"
}

# supervise FLAGS: runs dar_jax.main, passes SIGTERM on to it, and keeps its exit code.
supervise() {
  local child code again=1
  cd dar_jax
  "$venv/bin/python" -m dar_jax.main --distributed=on "$@" &
  child=$!
  trap 'again=1; kill -TERM "$child" || true' TERM
  while [[ $again ]]; do # a signal ends "wait" before the child ends
    again='' code=0
    wait "$child" || code=$?
  done
  echo "$code" >"$state/exit_code"
}

follow() {
  [[ -e $state/pid ]] || { echo "error: nothing was started on this host; use the command run" >&2 && exit 2; }
  tail --lines=200 --pid="$(<"$state/pid")" -F "$state/log" 2>/dev/null
}

outcome() {
  if alive; then
    echo running
  elif [[ ! -e $state/pid ]]; then
    echo none
  elif [[ -e $state/stop_asked ]]; then
    echo stopped
  elif [[ ! -e $state/exit_code ]]; then
    echo interrupted
  elif [[ $(<"$state/exit_code") != 0 ]]; then
    echo "failed with exit code $(<"$state/exit_code")"
  elif grep -q "^stopped by a signal" "$state/log"; then
    echo interrupted
  else
    echo finished
  fi
}

stop() {
  if ! alive; then
    outcome
    return
  fi
  touch "$state/stop_asked"
  kill -TERM "$(<"$state/pid")"
  follow
}

"$@"
