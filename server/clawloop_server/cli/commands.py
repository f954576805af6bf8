"""The whole of `clawloop-server`, put together."""

import typer

from clawloop_server.cli import (
    adapters,
    bases,
    cohorts,
    data,
    devices,
    invitations,
    keys,
    log,
    rounds,
    run,
    setup,
    simulate,
)
from clawloop_server.cli.common import HomeOption, group

app = group("The clawloop server: lets devices in, learns from what they let out, and gives back better adapters.")


@app.callback()
def root(context: typer.Context, home: HomeOption = None) -> None:
    context.obj = home


app.command("init")(setup.init)
app.command("serve")(run.serve)
app.command("status")(run.status)
app.command("invite")(setup.invite)
app.command("simulate")(simulate.simulate)
app.command("keys")(keys.keys)
app.add_typer(invitations.app, name="invitations")
app.add_typer(devices.app, name="devices")
app.add_typer(cohorts.app, name="cohorts")
app.add_typer(bases.app, name="base")
app.add_typer(rounds.train, name="train")
app.add_typer(rounds.app, name="rounds")
app.add_typer(adapters.app, name="adapters")
app.add_typer(log.app, name="log")
app.add_typer(data.app, name="data")
