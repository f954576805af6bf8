"""`join`, `leave` and `keys`: which server this device works with, and by which keys they know each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_edge.cli.context import (
    Json,
    Yes,
    command,
    confirm,
    console,
    home_of,
    opened_pool,
    print_json,
    print_table,
)
from clawloop_shared.errors import ClawloopError, ConfigError

if TYPE_CHECKING:
    from clawloop_edge.node.join import Membership
    from clawloop_edge.pool.store import Pool

Invitation = Annotated[str, typer.Argument(help="The line that `clawloop-server invite` printed.")]
Forget = Annotated[
    bool, typer.Option("--forget", help="Also ask the server to delete everything that this device sent.")
]
keys = typer.Typer(no_args_is_help=True, help="The keys by which this device and its server know each other.")


def join(context: typer.Context, invitation: Invitation, yes: Yes = False) -> None:
    """Join a server by its invitation. Keys are made on this device; nothing else leaves at level off.

    Where the server's operator approves each device, compare the words that are shown with theirs.
    """
    from clawloop_edge import state
    from clawloop_edge.node.join import join as ask
    from clawloop_edge.node.standing import waiting_words
    from clawloop_edge.opening import model_folder
    from clawloop_edge.privacy.consent import ConsentLog, Recipient
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
        member = ask(invitation, line=line, keys=state.joining_keys(pool, found.code))
        ConsentLog(pool).set_recipient(Recipient(member.url, member.root_key))
        state.keep_membership(pool, member)
    if member.waiting:
        console.print(waiting_words(member))
    typer.echo(f"joined as device {member.device_id}; nothing leaves until: {command(home, 'privacy set LEVEL')}")


def leave(context: typer.Context, forget: Forget = False, yes: Yes = False) -> None:
    """Leave the server: this device answers it no more, and the level drops to off.

    The server is told, now or as soon as it can be reached. What was sent stays there, unless --forget asks for it
    back.
    """
    from clawloop_edge import state
    from clawloop_edge.node.deleting import ask_due
    from clawloop_edge.node.leaving import goodbyes, say_due
    from clawloop_edge.privacy.consent import ConsentLog, Recipient
    from clawloop_edge.privacy.deletions import Deletions
    from clawloop_shared.levels import Level

    with opened_pool(context) as pool:
        member = _member(pool)
        later = command(home_of(context), "sessions forget")
        stays = (
            "Everything that was sent is to be deleted there."
            if forget
            else (f"What was sent stays there; `{later}` asks for it back, also later.")
        )
        confirm(f"Leave {member.url}? {stays}", yes=yes)
        consent, deletions = ConsentLog(pool), Deletions(pool)
        consent.set_level(Level.OFF)
        if forget:
            server = state.server_of(member)
            pool.submit(lambda database: deletions.add_in(database, server, names=[], everything=True)).result()
        consent.set_recipient(Recipient())
        state.forget_membership(pool)
        ask_due(deletions, timeout_s=10.0)
        say_due(pool)
        untold = any(goodbye.server.device_id == member.device_id for goodbye in goodbyes(pool))
        undeleted = forget and any(each.server.device_id == member.device_id for each in deletions.waiting())
    console.print("left; the privacy level is off")
    if untold:
        console.print(f"{member.url} could not be told yet; it is told by the edge while it runs")
    if undeleted:
        console.print(f"it has not deleted everything yet: {command(home_of(context), 'privacy deletions')}")


@keys.command("show")
def show_keys(context: typer.Context, as_json: Json = False) -> None:
    """The words of the server's root key and of this device's key; the operator sees the same ones."""
    from clawloop_edge.node.rotating import pending
    from clawloop_shared.signing import key_id, key_words

    with opened_pool(context) as pool:
        member = _member(pool)
        rotating = pending(pool, member) is not None
    facts = {
        "server": member.url,
        "server_words": key_words(member.root_key),
        "release_key": key_id(member.release_key),
        "device_id": member.device_id,
        "device_words": key_words(member.keys.public),
        "device_key": key_id(member.keys.public),
        "rotating": rotating,
    }
    if as_json:
        print_json(facts)
    else:
        print_table(("what", "is"), [(name.replace("_", " "), value) for name, value in facts.items()], empty="")


@keys.command("rotate")
def rotate_keys(context: typer.Context, yes: Yes = False, as_json: Json = False) -> None:
    """Make new keys for this device and have the server take them; the old ones are worth nothing after that.

    Whatever is cut short is finished by the running edge, or by running this again.
    """
    from clawloop_edge.node.rotating import rotate
    from clawloop_shared.signing import key_words

    with opened_pool(context) as pool:
        member = _member(pool)
        confirm(f"Make new keys for device {member.device_id}?", yes=yes)
        try:
            made = rotate(pool, member)
        except ClawloopError as error:
            again = command(home_of(context), "keys rotate")
            raise ConfigError(
                f"the keys are not changed yet: {error}; run `{again}` again, or let the edge do"
            ) from error
    words = key_words(made.public)
    if as_json:
        print_json({"device_id": member.device_id, "device_words": words})
        return
    console.print(f"device {member.device_id} has new keys; its words: [bold]{words}[/bold]")


def _member(pool: Pool) -> Membership:
    from clawloop_edge import state

    member = state.membership(pool)
    if member is None:
        raise ConfigError("this device has joined no server")
    return member


def register(app: typer.Typer) -> None:
    app.command()(join)
    app.command()(leave)
    app.add_typer(keys, name="keys")
