#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster. Outside an allocation it submits a job (sbatch) that calls it again; inside one
# (salloc, or that job) it starts the processes (srun).
#
#   launch/slurm.sh [flags] -- [flags of dar_jax.main]
#
# --nodes=N          hosts (default 1); each is taken whole, as JAX numbers the GPUs of a host from 0
# --gpus_per_node=N  GPUs of a host (default 8)
# --per=gpu|host     one process per GPU (default), or one per host, which drives all its GPUs
# --venv=DIR         virtual environment with dar_jax (default .venv of this checkout); made by
#                    python -m venv .venv && .venv/bin/pip install -e ".[gpu]"
# --logs=DIR         where the job writes its log, dar_jax-JOB.log (default runs/logs of this checkout)
# --sbatch=OPTIONS   further options of sbatch, separated by spaces: --sbatch="--partition=gpu --time=24:00:00"
# --dry_run          prints the command that would submit or start, and runs nothing
# --requeue          set inside the job: back into the queue when a signal stopped the run
#
# The checkout, the environment and --workdir must be on storage that all hosts share; the run starts in the checkout.
# Two minutes before the time limit and at a preemption SLURM sends SIGTERM: the run saves, ends, and the job goes back
# into the queue, from where the same command goes on. After the failure of a host SLURM requeues by itself. An error on
# one process ends all of them, and the job; scancel ends it for good.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$checkout/launch/common.sh"

commands=""
flags="nodes gpus_per_node per venv logs sbatch"
switches="dry_run requeue"
nodes=1 gpus_per_node=8 per=gpu venv=$checkout/.venv logs=$checkout/runs/logs sbatch='' dry_run='' requeue=''
parse_flags "$@"
[[ $venv == /* ]] || venv=$PWD/$venv # the job starts in the checkout
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
  mkdir -p "$logs" # SLURM loses the log of a job whose directory is missing
  printf '#!/usr/bin/env bash\nexec %s\n' "$again" | "${words[@]}"
}

start() {
  local words stopped xla_flags
  xla_flags=$(grep '^--' "$checkout/dar_jax/planning/gpu_xla_flags.txt" | paste -sd ' ')
  words=(env "XLA_FLAGS=$xla_flags ${XLA_FLAGS:-}")
  # Under SLURM, JAX gives a process the one GPU whose number is its SLURM_LOCALID. So each must see all GPUs of its
  # host (no binding); and the one process of a host must be told that all are its own.
  [[ $per == gpu ]] || words+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus_per_node - 1)))")
  words+=(srun "${shape[@]}" --gpu-bind=none --cpu-bind=none --kill-on-bad-exit=1
    "$venv/bin/python" -m dar_jax.main --distributed=on "${main_flags[@]}")
  cd "$checkout" # for the relative path in --config
  if [[ $dry_run || -z $requeue ]]; then
    run "${words[@]}"
    return
  fi
  # A run that was stopped by a signal leaves with 0, like one that is done; its last line tells them apart.
  stopped=$("${words[@]}" | tee >(cat >&2) | { grep -c "^stopped by a signal" || true; })
  if ((stopped)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

if [[ ${SLURM_JOB_ID:-} ]]; then start; else submit; fi
