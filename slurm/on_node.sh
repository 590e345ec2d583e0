#!/usr/bin/env bash
# On a node: unpack the job's code into a folder of the node's own, once in each life of the job, and become a command.
# Usage: on_node.sh SCRATCH COMMAND...
set -euo pipefail

trap '' USR1 USR2 # the command inherits this: a request that comes before it listens does not end it

code=$1/kairos-train-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_NODEID
shift
if [ ! -d "$code" ]; then
  mkdir -p "$(dirname "$code")"
  new=$(mktemp -d "$code.XXXXXX")
  tar -xzf "$(dirname "${BASH_SOURCE[0]}")/code.tar.gz" -C "$new"
  mv -T "$new" "$code"
fi
# Before what is installed; and never the working directory, which may be the checkout.
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
exec "$@"
