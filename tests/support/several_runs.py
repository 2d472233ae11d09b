"""An app of Flower's that makes several runs on one start of it, one after the other.

Every message says which run it is of; a client begins each with nothing kept.
"""

import json
from functools import cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fednorm.config import resolve
from fednorm.federation.client import make_client_app
from fednorm.federation.deployment.grid import AddressedGrid
from fednorm.federation.deployment.kept import SITE
from fednorm.federation.server import serve
from fednorm.federation.workbench import Workbench, workbench_of
from fednorm.records.record import RunRecord

RUN = "run"

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    for name, values in json.loads(str(context.run_config["configs"])).items():
        config, addressed = resolve(values), AddressedGrid(grid)
        addressed.addressed = lambda _, name=name: {RUN: name}
        serve(addressed, workbench_of(config), RunRecord(Path(str(context.run_config["runs"])), config), None)


@cache
def workbench(configs: str, name: str) -> Workbench:
    return workbench_of(resolve(json.loads(configs)[name]))


class Several(ClientApp):
    """A client of each of the runs in turn."""

    def __call__(self, message: Message, context: Context) -> Message:
        name = str(message.content.config_records[SITE][RUN])
        if context.state.config_records.get(RUN) != ConfigRecord({RUN: name}):
            for key in list(context.state):
                del context.state[key]
            context.state[RUN] = ConfigRecord({RUN: name})
        bench = workbench(str(context.run_config["configs"]), name)
        return make_client_app(lambda _: bench)(message, context)


client = Several()
