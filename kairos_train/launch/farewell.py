"""The launchers of a job leave together.

The first to leave would take the others along: Slurm ends the tasks of a step when one of them fails, and node 0 holds
the rendezvous, which torchrun's agents ask as long as they have ranks. A rank that still writes its last lines, or a
node that still writes down how its ranks ended, would be cut off.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from kairos_train.basics.errors import MachineFault
from kairos_train.basics.log import logger
from kairos_train.launch.environment import NodeLaunch

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ENDED, LEAVING = "kairos/ended", "kairos/leaving"
POLL = 0.1  # seconds
CONNECT_SECONDS = 10.0


def hold_store(node: NodeLaunch) -> TCPStore | None:
    """The store at `node.head`, held by this process: node 0's, whose agent shares it. None on other nodes.

    Raises:
        MachineFault: the port cannot be had.
    """
    if node.node or node.nodes == 1:
        return None
    try:
        return _connect(node, holds=True)
    except RuntimeError as error:
        raise MachineFault(
            f"no rendezvous at {node.head}:{node.port}: {str(error).splitlines()[0]}; "
            "another process may have the port: see `ss -tlnp` there"
        ) from error


def leave_together(node: NodeLaunch, store: TCPStore | None, *, seconds: float) -> None:
    """Wait until the ranks of all nodes have ended; where some do not in time, say so and go.

    Args:
        store: what `hold_store` gave.
        seconds: at most.
    """
    if node.nodes == 1:
        return
    # In a thread: torch's client waits for ever for a store whose process is stopped.
    seen = [0]
    thread = threading.Thread(target=_wait, args=(node, store, seen, seconds), daemon=True)
    thread.start()
    thread.join(seconds + CONNECT_SECONDS)
    if seen[0] < node.nodes:
        logger.warning(
            f"{node.name}: the ranks of only {seen[0]} of {node.nodes} nodes are known to have ended after "
            f"{seconds:g} s; not waiting any longer"
        )


def _wait(node: NodeLaunch, store: TCPStore | None, seen: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    try:
        store = store or _connect(node, holds=False)
        seen[0] = store.add(ENDED, 1)
        while seen[0] < node.nodes and time.monotonic() < end:
            time.sleep(POLL)
            seen[0] = store.add(ENDED, 0)
        left = store.add(LEAVING, 1)  # the last that this node asks; the store goes with node 0
        while node.node == 0 and left < seen[0] and time.monotonic() < end:
            time.sleep(POLL)
            left = store.add(LEAVING, 0)
    except RuntimeError:  # of torch.distributed: the store is gone, and node 0 with it
        return


def _connect(node: NodeLaunch, *, holds: bool) -> TCPStore:
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(node.head, node.port, None, holds, timeout=timeout, wait_for_workers=False, multi_tenant=True)
