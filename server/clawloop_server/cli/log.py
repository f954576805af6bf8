"""`log`: the append-only log of released adapters, that devices check every adapter against."""

from __future__ import annotations

from typing import Annotated

import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    counted,
    group,
    open_server,
    print_json,
    print_table,
    when,
)

app = group("The log of released adapters: what is in it, and whether it is whole.")


@app.command()
def show(
    limit: Annotated[int, typer.Option(min=1, help="How many of the last entries of each line.")] = 20,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The last entries of each line's log, its size and its root."""
    with open_server(home) as server:
        log = server.registry.log
        found = []
        for line_id in log.lines():
            size, signed = log.size(line_id), log.head(line_id)
            found.append(
                {
                    "line_id": line_id,
                    "size": size,
                    "root": log.root(line_id, size).hex(),
                    "head": signed.body.decode() if signed else None,
                    "key_id": signed.key_id if signed else None,
                    "entries": log.entries(line_id, limit=limit),
                }
            )
    if as_json:
        print_json(found)
        return
    for each in found:
        rows = [(str(e.position), e.version, e.manifest_sha256, when(e.added_ms)) for e in each["entries"]]
        title = f"line {each['line_id']}: {counted(each['size'], 'entry')}, root {each['root']}"
        print_table(title, ("entry", "adapter", "manifest", "released"), rows=rows)
    if not found:
        typer.echo("nothing was released yet, so no log has an entry")


@app.command()
def verify(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Compute every log anew from the manifests in the registry; name what was removed, changed or moved (exit 1)."""
    from clawloop_server.release.keys import load_keys
    from clawloop_server.release.log_check import check_logs

    with open_server(home) as server:
        reports = check_logs(server.vault.database, load_keys(server.home).release_public)
    if as_json:
        print_json(reports)
    for report in () if as_json else reports:
        state = "whole" if report.is_whole else "NOT WHOLE"
        agreeing = f"{counted(report.heads, 'signed head')} agree{'s' if report.heads == 1 else ''}"
        other = f"; of {report.unchecked} signatures the key is another" if report.unchecked else ""
        typer.echo(
            f"line {report.line_id}: {state}, {counted(report.size, 'entry')}, root {report.root}, {agreeing}{other}"
        )
        for trouble in report.troubles:
            typer.echo(f"  {trouble}")
    if not reports and not as_json:
        typer.echo("nothing was released yet, so there is nothing to verify")
    if not all(report.is_whole for report in reports):
        typer.echo("restore the database from your backup: devices refuse what is not in the log they know", err=True)
        raise typer.Exit(1)
