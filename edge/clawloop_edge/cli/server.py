"""`join` and `leave`: which server this device works with."""

from __future__ import annotations

from typing import Annotated

import typer

from clawloop_edge.cli.context import Yes, command, confirm, console, home_of, opened_pool
from clawloop_shared.errors import ConfigError

Invitation = Annotated[str, typer.Argument(help="The line that `clawloop-server invite` printed.")]


def join(context: typer.Context, invitation: Invitation, yes: Yes = False) -> None:
    """Join a server by its invitation. Keys are made on this device; nothing else leaves at level off."""
    from clawloop_edge import state
    from clawloop_edge.node.join import join as ask
    from clawloop_edge.opening import model_folder
    from clawloop_edge.privacy.consent import ConsentLog, Recipient, device_key
    from clawloop_shared.messages import read_invitation
    from clawloop_shared.model_line import read_line
    from clawloop_shared.signing import key_words

    found = read_invitation(invitation)
    console.print(f"server {found.url}\nits words: [bold]{key_words(found.root_key)}[/bold]")
    confirm("Are these the words that the operator sees?", yes=yes)
    home = home_of(context).require()
    model = home.load_config().model
    if model.kind == "upstream" and not model.path:
        raise ConfigError(
            "nothing is learned before an upstream server without its model folder; name it with setup --model"
        )
    line = read_line(model_folder(model.path))
    with opened_pool(context) as pool:
        if state.membership(pool) is not None:
            raise ConfigError(f"this device has joined a server; run `{command(home, 'leave')}` first")
        member = ask(invitation, line=line, device_key=device_key(pool))
        ConsentLog(pool).set_recipient(Recipient(member.url, member.root_key))
        state.keep_membership(pool, member)
    typer.echo(f"joined as device {member.device_id}; nothing leaves until: {command(home, 'privacy set LEVEL')}")


def leave(context: typer.Context, yes: Yes = False) -> None:
    """Leave the server: this device answers it no more, and the level drops to off."""
    from clawloop_edge import state
    from clawloop_edge.privacy.consent import ConsentLog, Recipient
    from clawloop_shared.levels import Level

    with opened_pool(context) as pool:
        member = state.membership(pool)
        if member is None:
            raise ConfigError("this device has joined no server")
        forget = command(home_of(context), "sessions forget")
        confirm(f"Leave {member.url}? What was sent stays there; `{forget}` asks for it back, also later.", yes=yes)
        consent = ConsentLog(pool)
        consent.set_level(Level.OFF)
        consent.set_recipient(Recipient())
        state.forget_membership(pool)
    console.print("left; the privacy level is off")


def register(app: typer.Typer) -> None:
    app.command()(join)
    app.command()(leave)
