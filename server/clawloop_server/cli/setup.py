"""`init` and `invite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    YesOption,
    confirm,
    folder_of,
    open_server,
    parse_duration_s,
    print_facts,
    print_json,
)


def init(
    home: HomeOption = None,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder to train; imported.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Link to the model folder instead of copying it.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = None,
    port: Annotated[int | None, typer.Option(help="TLS port for devices.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Admin port, on loopback.")] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Host name or address by which devices call; may be repeated.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a server: folder, keys, TLS certificate, database, configuration. Running it again keeps what is there."""
    from clawloop_server import bases
    from clawloop_server import home as homes
    from clawloop_server.config import load_config, save_config
    from clawloop_server.fleet.tls import ensure_tls
    from clawloop_server.release.keys import create_keys
    from clawloop_server.vault.store import Vault
    from clawloop_shared.model_line import read_shape
    from clawloop_shared.signing import key_words

    folder = folder_of(home)
    confirm(f"Make a clawloop server in {folder}?", yes=yes or folder.exists())
    asked = base or _ask_base(folder, yes=yes)
    # Whatever is wrong with what was given is said before anything is made.
    if asked is not None:
        read_shape(asked.expanduser())
    config = _changed(
        load_config(homes.Home(folder.absolute()).config),
        {"host": host, "port": port, "admin_port": admin_port, "names": tuple(name) if name else None},
    )
    made = homes.create(folder)
    keys = create_keys(made)
    ensure_tls(made.keys, config.certificate_names)
    Vault.open(made, keys.master).close()
    save_config(made.config, config)
    if asked is not None:
        bases.import_base(made, asked, link=link)
    lines = [found.line_id for found in bases.list_bases(made)]
    facts = {"home": str(made.folder), "url": config.url(), "model_lines": lines, "key": key_words(keys.root_public)}
    if as_json:
        print_json(facts)
        return
    print_facts("clawloop server", {**facts, "model_lines": ", ".join(lines) or "none"})
    typer.echo("next: clawloop-server " + ("serve" if lines else "base import DIR"))


def _ask_base(folder: Path, *, yes: bool) -> Path | None:
    if yes or (folder / "base").is_dir():
        return None
    answer: str = typer.prompt("Model folder to train (empty: later)", default="", show_default=False)
    return Path(answer) if answer else None


def _changed(config: Any, fields: dict[str, object]) -> Any:
    from clawloop_server.config import check_config

    given = {name: value for name, value in fields.items() if value is not None}
    return check_config(msgspec.structs.replace(config, hub=msgspec.structs.replace(config.hub, **given)))


def invite(
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long it is valid: 30m, 24h, 7d.")] = "24h",
    label: Annotated[str, typer.Option(help="Whom it is for, shown by `invitations list`; devices never see it.")] = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a one-time invitation: a line of text for the owner of one device. It is shown once and stored nowhere."""
    from clawloop_server.errors import InvitationError
    from clawloop_server.fleet.tls import ensure_tls
    from clawloop_server.hub.invitations import Invitations, invitation_id
    from clawloop_server.hub.status import read_running
    from clawloop_server.release.keys import load_keys
    from clawloop_shared.messages import Invitation, write_invitation
    from clawloop_shared.signing import key_words

    expires_s = parse_duration_s(expires)
    with open_server(home) as server:
        running = read_running(server.home)
        keys = load_keys(server.home)
        tls = ensure_tls(server.home.keys, server.config.certificate_names)
        url = server.config.url(port=running.port if running else 0)
        if url.endswith(":0"):
            raise InvitationError("[hub] port is 0, so the address is known only while the server runs; start it first")
        code = Invitations(server.vault.database).create(expires_s=expires_s, label=label)
        approve = server.config.hub.approve
    text = write_invitation(Invitation(url=url, ca_pem=tls.ca.read_text(), root_key=keys.root_public, code=code))
    words = key_words(keys.root_public)
    if as_json:
        facts = {"invitation": text, "invitation_id": invitation_id(code), "label": label, "approve": approve}
        print_json(facts | {"url": url, "expires_s": expires_s, "key": words})
        return
    typer.echo(text)
    typer.echo(f"valid once, for {expires}, at {url}; on the device: clawloop-edge join INVITATION", err=True)
    typer.echo(f"the device should show this key: {words}", err=True)
    if approve:
        typer.echo("the device then waits: compare its words, and let it in with: devices approve", err=True)
