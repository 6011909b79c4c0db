#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster. Outside an allocation this script submits a job (sbatch), which calls the
# script again. Inside an allocation (salloc, or that job) it starts the processes (srun).
#
#   launch/slurm.sh [flags] -- [flags of dar_jax.main]
#
# --nodes=N          number of hosts (default 1); the job takes each host whole, as JAX numbers its GPUs from 0
# --gpus_per_node=N  number of GPUs of a host (default 8)
# --per=gpu|host     one process per GPU (default), or one per host, which drives all GPUs of the host
# --venv=DIR         virtual environment with dar_jax (default .venv of this checkout). Make it with
#                    python -m venv .venv && .venv/bin/pip install -e ".[gpu]"
# --logs=DIR         directory of the log of the job, dar_jax-JOB.log (default runs/logs of this checkout)
# --sbatch=OPTIONS   further options of sbatch, separated by spaces: --sbatch="--partition=gpu --time=24:00:00"
# --dry_run          prints the command that would submit or start, and runs nothing
# --requeue          puts the job back into the queue when a signal has stopped the run; the script itself sets this
#
# The checkout, the environment and --workdir must be on storage that all hosts share. The run starts in the checkout.
# SLURM sends SIGTERM two minutes before the time limit and at a preemption. The run then saves and ends. The job goes
# back into the queue, and the same command continues it. After the failure of a host, SLURM requeues by itself. An
# error in one process ends all processes and the job. scancel ends the job for good.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$checkout/launch/common.sh"

commands=""
flags="nodes gpus_per_node per venv logs sbatch"
switches="dry_run requeue"
nodes=1 gpus_per_node=8 per=gpu venv=$checkout/.venv logs=$checkout/runs/logs sbatch='' dry_run='' requeue=''
parse_flags "$@"
[[ $venv == /* ]] || venv=$PWD/$venv # absolute, because the job starts in the checkout
[[ $logs == /* ]] || logs=$PWD/$logs

[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes is not a number of hosts; write --nodes=2"
[[ $gpus_per_node =~ ^[1-9][0-9]*$ ]] || fail "--gpus_per_node=$gpus_per_node is not a number; write --gpus_per_node=8"
case $per in
  gpu) tasks=$gpus_per_node ;;
  host) tasks=1 ;;
  *) fail "--per=$per is unknown; write --per=gpu or --per=host" ;;
esac
check_main_flags
[[ -x $venv/bin/python || $dry_run ]] || fail "--venv=$venv has no bin/python; see --help for how to make it"
shape=(--nodes="$nodes" --ntasks-per-node="$tasks" --gpus-per-node="$gpus_per_node")

submit() {
  local words again
  read -ra words <<<"$sbatch"
  words=(sbatch --job-name=dar_jax "${shape[@]}" --exclusive --mem=0 --requeue --open-mode=append --signal=TERM@120
    --chdir="$checkout" --output="$logs/%x-%j.log" "${words[@]}")
  again=$(quote "$checkout/launch/slurm.sh" --requeue --nodes="$nodes" --gpus_per_node="$gpus_per_node" --per="$per" \
    --venv="$venv" -- "${main_flags[@]}")
  if [[ $dry_run ]]; then
    printf "%s <<'END'\n#!/usr/bin/env bash\nexec %s\nEND\n" "$(quote "${words[@]}")" "$again"
    return
  fi
  mkdir -p "$logs" # SLURM loses the log if its directory is missing
  printf '#!/usr/bin/env bash\nexec %s\n' "$again" | "${words[@]}"
}

start() {
  local words stopped xla_flags
  xla_flags=$(grep '^--' "$checkout/dar_jax/planning/gpu_xla_flags.txt" | paste -sd ' ')
  words=(env "XLA_FLAGS=$xla_flags ${XLA_FLAGS:-}")
  # Under SLURM, JAX gives a process the GPU whose number is its SLURM_LOCALID. So every process must see all GPUs of
  # its host, without binding. A process that is alone on its host must be told that all GPUs are its own.
  [[ $per == gpu ]] || words+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_node - 1)))")
  words+=(srun "${shape[@]}" --gpu-bind=none --cpu-bind=none --kill-on-bad-exit=1
    "$venv/bin/python" -m dar_jax.main --distributed=on "${main_flags[@]}")
  cd "$checkout" # --config may be a relative path
  if [[ $dry_run || -z $requeue ]]; then
    run "${words[@]}"
    return
  fi
  # A stopped run exits with 0, and so does a finished run. The last line of the log tells them apart.
  stopped=$("${words[@]}" | tee >(cat >&2) | { grep -c "^stopped by a signal" || true; })
  if ((stopped)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

if [[ ${SLURM_JOB_ID:-} ]]; then start; else submit; fi
