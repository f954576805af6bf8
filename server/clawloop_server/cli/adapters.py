"""`adapters`: what was learned, and what devices may use of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    YesOption,
    confirm,
    counted,
    group,
    open_server,
    print_facts,
    print_json,
    print_table,
    when,
)

if TYPE_CHECKING:
    from clawloop_server.cli.differing import Compared
    from clawloop_server.release.records import Act, AdapterRecord

app = group("Adapters: candidates, releases, and going back.")
VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", min=1, help="As `adapters list` shows it.")]


def _facts(record: AdapterRecord, rejections: Mapping[int, Act]) -> dict[str, object]:
    facts = record.facts
    return {
        "version": record.version,
        "state": record.state.value,
        "line_id": record.line_id,
        "cohort": record.cohort,
        "round_id": facts.round_id,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "target_modules": facts.target_modules,
        "files": facts.files,
        "evaluation": facts.evaluation,
        "lineage_root": facts.lineage_root,
        "manifest_sha256": record.manifest.sha256 if record.manifest else "",
        "created_ms": record.created_ms,
        "released_ms": record.released_ms,
        "rejection": rejections.get(record.version),
    }


@app.command("list")
def list_adapters(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every adapter, newest first."""
    with open_server(home) as server:
        found, rejections = server.registry.adapters(), server.registry.rejections()
    if as_json:
        print_json([_facts(record, rejections) for record in found])
        return
    rows: list[tuple[object, ...]] = []
    for record in found:
        measured, rank = record.facts.evaluation, f"rank {record.facts.rank}"
        scores, played = "", "none played"
        if measured.episodes:
            scores = f"{measured.reward_before:.3f} → {measured.reward:.3f}"
            played = counted(measured.episodes, "episode")
        released = f"released {when(record.released_ms)}" if record.released_ms else "not released"
        if record.version in rejections:
            released = f"rejected {rejections[record.version].in_words}"
        rows.append((str(record.version), record.state.value, scores, record.facts.round_id))
        rows.append(("", record.cohort, f"{played}, {rank}", released))
    print_table("adapters", ("version", "state", "reward before → after", "round"), rows=rows)


@app.command()
def show(version: VersionArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One adapter: where it comes from, what it scored, what its manifest says."""
    with open_server(home) as server:
        record, rejections = server.registry.adapter(version), server.registry.rejections()
    if as_json:
        print_json(_facts(record, rejections))
        return
    measured = record.facts.evaluation
    scores = f"{measured.reward:.3f}, before {measured.reward_before:.3f} (se {measured.standard_error:.3f})"
    rejection = rejections.get(version)
    shown = _facts(record, rejections) | {
        "target_modules": ", ".join(record.facts.target_modules),
        "files": ", ".join(f"{entry.name} ({entry.size_bytes} bytes)" for entry in record.facts.files),
        "evaluation": f"{scores}, {measured.episodes} episodes of {measured.suite or 'nothing'}",
        "created_ms": when(record.created_ms),
        "released_ms": when(record.released_ms),
        "rejection": rejection.in_words if rejection else "",
    }
    print_facts("adapter", {name.removesuffix("_ms").replace("_", " "): value for name, value in shown.items()})


@app.command()
def diff(
    a: Annotated[int, typer.Argument(metavar="A", min=1, help="The one to compare with, as `adapters list` shows it.")],
    b: Annotated[int, typer.Argument(metavar="B", min=1, help="The one that is compared.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """How two adapters differ: what was learned between them, what they scored, how far their updates are apart."""
    from clawloop_server.cli import differing

    found = _compared(home, a, b)
    if as_json:
        print_json(differing.as_facts(found))
        return
    print_table(f"adapters {a} and {b}", ("", str(a), str(b)), rows=differing.side_rows(found))
    typer.echo(f"\n{differing.lineage_in_words(found)}")
    if rounds := differing.round_rows(found):
        print_table("rounds of one alone", differing.ROUND_COLUMNS, rows=rounds)
    typer.echo()
    print_table(f"updates: a is {a}, b is {b}", differing.LAYER_COLUMNS, rows=differing.layer_rows(found))
    if found.manifest:
        typer.echo()
        rows = differing.manifest_rows(found)
        print_table("manifests, where they differ", ("", str(a), str(b)), rows=rows)


def _compared(home: Path | None, a: int, b: int) -> Compared:
    from clawloop_server.aggregate.difference import differences
    from clawloop_server.cli.differing import Compared
    from clawloop_server.release.lineage import between, manifest_changes
    from clawloop_server.trainer.joining import update_in

    with open_server(home) as server:
        first, second = server.registry.adapter(a), server.registry.adapter(b)
        lineage = between(server.registry, first, second)
        overall, layers = differences(*(update_in(server.registry.files(version)) for version in (a, b)))
        changes = manifest_changes(first, second)
    return Compared(a=first, b=second, between=lineage, overall=overall, layers=layers, manifest=changes)


@app.command()
def export(
    version: VersionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; an empty one may be there.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a released adapter to a folder as peft and vLLM read it, with its signed manifest as manifest.json."""
    from clawloop_shared.folders import new_folder
    from clawloop_shared.manifest_file import MANIFEST_JSON, manifest_file

    with open_server(home) as server:
        offer = server.registry.offer(version)
    files = {**offer.files, MANIFEST_JSON: manifest_file(offer.manifest)}
    sizes = {name: len(data) for name, data in sorted(files.items())}
    with new_folder(out, needs_bytes=sum(sizes.values())) as (draft, target):
        for name, data in files.items():
            (draft / name).write_bytes(data)
    if as_json:
        print_json({"version": version, "folder": target, "files": sizes, "size_bytes": sum(sizes.values())})
        return
    typer.echo(f"adapter {version} is in {target} ({sum(sizes.values()):,} bytes): {', '.join(sizes)}")


@app.command()
def release(version: VersionArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Sign a candidate (or held) adapter and offer it to the devices."""
    from clawloop_server.release.keys import load_keys
    from clawloop_server.release.release import release_candidate
    from clawloop_shared.manifest import open_manifest

    with open_server(home) as server:
        days = server.config.release.expires_days
        keys = load_keys(server.home)
        signed = release_candidate(server.registry, keys, version=version, expires_days=days)
    version = open_manifest(signed, keys.release_public).version  # another where a renewal was in between
    if as_json:
        print_json({"version": version, "manifest_sha256": signed.sha256, "key_id": signed.key_id})
        return
    typer.echo(f"adapter {version} is released, signed by key {signed.key_id}")


@app.command()
def hold(version: VersionArgument, home: HomeOption = None) -> None:
    """Keep a candidate back until `adapters release`."""
    with open_server(home) as server:
        server.registry.hold(version)
    typer.echo(f"adapter {version} is held")


@app.command()
def reject(
    version: VersionArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it is kept, and shown to whoever asks.")] = "",
    with_later: Annotated[
        bool, typer.Option("--with-later", help="Also those that wait and have what it learned.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rule that a candidate (or held) adapter is never released; training does not go on from it."""
    from clawloop_server.release.rejecting import reject as reject_adapter

    with open_server(home) as server:
        rejected = reject_adapter(server.registry, version=version, who=_who(), why=reason, with_later=with_later)
        rejections = server.registry.rejections()
    if as_json:
        print_json([rejections[one] for one in rejected])
        return
    for one in rejected:
        typer.echo(f"adapter {one} is rejected {rejections[one].in_words}")


def _who() -> str:
    """The name of whoever runs this on this machine, or their number where they have none."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return f"uid {os.getuid()}"


@app.command()
def rollback(
    to: Annotated[int, typer.Option(min=1, help="The older version to go back to.")],
    cohort: Annotated[
        str | None, typer.Option(metavar="NAME", help="For that cohort; without, for whom the older one was.")
    ] = None,
    with_cohorts: Annotated[
        bool, typer.Option("--with-cohorts", help="Also the cohorts that go on from what is taken back.")
    ] = False,
    home: HomeOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go back: release the files of an older adapter as a new version, since versions only grow."""
    from clawloop_server.release.keys import load_keys
    from clawloop_server.release.release import descendants, roll_back

    with open_server(home) as server:
        whose = server.registry.adapter(to).cohort if cohort is None else cohort
        devices = f"all devices of cohort {whose}" if whose else "all devices that are in no cohort"
        others = descendants(server.registry, to_version=to, cohort=whose)
        named = f"cohort {', '.join(others)}"
        if others and not with_cohorts:
            typer.echo(f"{named}: goes on from what is taken back, and keeps it without --with-cohorts", err=True)
        more = f" and of {named}" if others and with_cohorts else ""
        confirm(f"Take back every adapter after {to} on {devices}{more}?", yes=yes)
        days = server.config.release.expires_days
        keys, cohorts = load_keys(server.home), dict[str, int]()
        with server.registry.within():
            version = roll_back(server.registry, keys, to_version=to, cohort=whose, expires_days=days)
            for name in others if with_cohorts else ():
                cohorts[name] = roll_back(server.registry, keys, to_version=to, cohort=name, expires_days=days)
    if as_json:
        kept = [] if with_cohorts else others
        print_json({"version": version, "files_of": to, "cohorts": cohorts, "cohorts_kept": kept})
        return
    typer.echo(f"adapter {version} is released; it has the files of {to}")
    for name, copy in cohorts.items():
        typer.echo(f"so does {copy}, for cohort {name}")
