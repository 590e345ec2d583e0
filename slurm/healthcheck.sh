#!/usr/bin/env bash
# The health check of all nodes of a job: under srun, one task per node, as many processes as the run itself will have.
# Usage: healthcheck.sh PYTHON LIFE HEAD OVERRIDE...; exit code 1: a node is not well, and the output names it
set -euo pipefail

python=$1 life=$2 head=$3
shift 3
exec "$python" -m kairos_train.cli launch --check --logs "$life/healthcheck" --head "$head" "$@"
