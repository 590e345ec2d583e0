#!/usr/bin/env bash
# On a node: unpack the job's code into a new folder that only this user can read or change, and become a command.
# Usage: on_node.sh SCRATCH COMMAND...; exit code 2: others could put code of theirs into SCRATCH
set -euo pipefail

trap '' USR1 USR2 # the command inherits this: a request that comes before it listens does not end it

refuse() {
  echo "$(hostname): cluster.scratch=$scratch: $1; name a folder of your own, or one of root's with its sticky bit set" >&2
  exit 2
}

# Who may exchange what lies below a folder: its owner, and all who may write to it without the sticky bit. The same
# holds for every folder above it. In a container without a root of its own, root's folders belong to the overflow user.
root=0
grep -qE '^ +0 ' /proc/self/uid_map || root=$(</proc/sys/kernel/overflowuid)
check() {
  local path=$1 owner mode
  while true; do
    read -r owner mode < <(stat --format='%u %a' -- "$path")
    ((owner == root || owner == EUID)) || refuse "$path belongs to another user ($owner)"
    if ((8#$mode & 8#22 && !(8#$mode & 8#1000))); then refuse "others may write to $path (mode $mode)"; fi
    [ "$path" != / ] || return 0
    path=$(dirname -- "$path")
  done
}

scratch=$1
shift
[ ! -L "${scratch%/}" ] || refuse "is a symbolic link to $(readlink -f -- "$scratch")"
(umask 077 && mkdir -p -- "$scratch")
physical=$(cd -P -- "$scratch" && pwd)
check "$physical"

# Nothing that lies here already is taken, not even of this job: `finish` removes what all of its steps made.
code=$(mktemp -d "$physical/kairos-train-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_NODEID.XXXXXX")
tar -xzf "$(dirname "${BASH_SOURCE[0]}")/code.tar.gz" -C "$code"
# Before what is installed; and never the working directory, which may be the checkout.
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# torch's own default is a folder of /tmp by the user's name, from which it would import whatever lies there.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$code/.torchinductor}
exec "$@"
