"""What processes of Flower's begin with in tests of real nodes: less waiting.

A dead node is known after 10 s (60 s otherwise; the SuperLink takes it for dead after twice the interval), a SuperNode
looks for messages every 0.5 s (3 s), what is not there yet is asked for again after 0.1 s (1 s), a SuperLink that is
away after 1 s (20 s at most), and the process of a message is forked off one that has imported PyTorch and fednorm
(:mod:`flower_forks`), in place of importing them anew. How long that process may take to begin stays Flower's 30 s: a
node whose process is later than that waits for its answer for good, and a busy machine may take a while.
All else is Flower's: the same commands, a process a message, TLS, keys.
"""

import importlib
import os
import sys
import time

import flwr.common.constant
import flwr.supercore.constant

flwr.common.constant.MAX_RETRY_DELAY = 1
flwr.supercore.constant.PULL_INITIAL_BACKOFF = flwr.supercore.constant.PULL_BACKOFF_CAP = 0.1


def let(module: str, **values: float) -> None:
    """Give constants of one module of Flower's other values, and leave them to the rest of it."""
    vars(importlib.import_module(f"flwr.{module}")).update(values)


command = os.path.basename(sys.orig_argv[1]) if len(sys.orig_argv) > 1 else ""
if command == "flower-superlink":
    let("superlink.servicer.control.control_handlers", HEARTBEAT_DEFAULT_INTERVAL=5)
    let("superlink.servicer.fleet.fleet_handlers", HEARTBEAT_MIN_INTERVAL=5)
elif command == "flower-supernode":
    let("supernode.fleet_http_connection", HEARTBEAT_DEFAULT_INTERVAL=5)
    let("supercore.heartbeat", HEARTBEAT_DEFAULT_INTERVAL=5, HEARTBEAT_CALL_TIMEOUT=2)
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.5))
elif command == "flower-superexec":
    import flower_forks

    flower_forks.begin()
