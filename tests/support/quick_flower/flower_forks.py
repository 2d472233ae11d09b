"""The processes of messages, forked off one that has imported what they need; and held up where a test says so.

A test that holds up what a node is asked in a round, e.g. to train in round 2, makes a file ``hold.train.2`` in the
node's ``FLWR_HOME``.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

FORKED = ("flwr-clientapp", "flwr-serverapp")
"""Commands of Flower's."""


LATER = ("fednorm.federation.server", "fednorm.federation.deployment.server", "fednorm.federation.deployment.site")
"""What they import besides."""


def begin() -> None:
    """Let this process, a SuperExec, have its :data:`FORKED` commands started by a process of ours."""
    popen = subprocess.Popen
    parent = popen([sys.executable, __file__], stdin=subprocess.PIPE)

    def started(arguments: Any, *rest: Any, **options: Any) -> Any:
        if arguments[0] not in FORKED:
            return popen(arguments, *rest, **options)
        parent.stdin.write(json.dumps(arguments).encode() + b"\n")
        parent.stdin.flush()
        return None

    subprocess.Popen = started


def serve(requests: Iterable[bytes]) -> None:
    """Import what a message's process needs, then fork one for each line of arguments."""
    from flwr.superlink.cli import flwr_serverapp
    from flwr.supernode.cli import flwr_clientapp

    from fednorm.federation import client

    for name in LATER:
        importlib.import_module(name)
    carry_out = client.carry_out

    def held_up(bench: Any, kind: str, content: Any, context: Any) -> Any:
        number = content.config_records.get("config", {}).get("server-round", 0)
        while os.path.exists(os.path.join(os.environ["FLWR_HOME"], f"hold.{kind}.{number}")):
            time.sleep(0.05)
        return carry_out(bench, kind, content, context)

    client.carry_out = held_up
    wait_for_messages()
    commands = dict(zip(FORKED, (flwr_clientapp, flwr_serverapp), strict=True))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for request in requests:
        arguments = json.loads(request)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(status(commands[arguments[0]], arguments))


def wait_for_messages() -> None:
    """Let a forked process of a client, which begins before its node has put its message down, ask for that again."""
    from flwr.supernode.runtime import run_clientapp

    class Patient(run_clientapp.RuntimeHttpClient):
        def PullMessages(self, request: Any) -> Any:
            until = time.monotonic() + 20
            while not (reply := super().PullMessages(request)).messages_list and time.monotonic() < until:
                time.sleep(0.05)
            return reply

    run_clientapp.RuntimeHttpClient = Patient


def status(command: Callable[[], None], arguments: list[str]) -> int:
    """Run a command of Flower's in this process, and return its exit status."""
    sys.argv = arguments
    code: Any = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    serve(sys.stdin.buffer)
