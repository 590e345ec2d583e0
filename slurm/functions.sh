# What all jobs do. `kairos-train submit` puts this into every script.

set -uo pipefail
job_dir={{job_dir}}
python={{python}}
life=$job_dir/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} # one folder for each life of the job

export SLURM_EXIT_ERROR=4 # what srun ends with when it fails itself, where nothing was started

# Who sends a signal to this script means the run.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'scancel --signal=USR2 "$SLURM_JOB_ID"' USR2

# Run a command on each node, from the node's own copy of the code; the exit code is the highest of the nodes.
step() {
  srun {{srun}} bash "$job_dir/on_node.sh" {{scratch}} "$@" &
  wait_for $!
}

# The exit code of a process. A trap interrupts `wait`, not the process.
wait_for() {
  local code
  while true; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || break
  done
  wait "$1" 2>/dev/null
  local again=$?
  ((again == 127)) || code=$again
  return "$code"
}

# End the job with an exit code. 4, 75 and those of processes that were killed put it into the queue again.
finish() {
  local code=$1 node
  for node in "$life"/node-*; do
    [ -e "$node" ] || continue
    case $(<"$node") in
      0 | 4 | 75) ;;
      *) code=$(<"$node") ;; # what would happen again counts before what others made of it
    esac
  done
  timeout 60 srun {{srun_plain}} bash -c \
    'find "$0/" -maxdepth 1 -type d -user "$EUID" -name "kairos-train-$SLURM_JOB_ID-$1-$SLURM_NODEID.??????" \
      -exec rm -rf {} +' {{scratch}} "${SLURM_RESTART_COUNT:-0}" || true
  if ((code == 4 || code == 75 || code > 128)); then
    if ((${SLURM_RESTART_COUNT:-0} < {{max_restarts}})); then
      echo "exit code $code: job $SLURM_JOB_ID goes into the queue again, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "exit code $code: cluster.max_restarts={{max_restarts}} are used up; submit again to go on" >&2
    fi
  fi
  exit "$code"
}
