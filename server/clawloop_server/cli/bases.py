"""`base`: the model lines that are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clawloop_server.cli.common import HomeOption, JsonOption, group, home_of, print_json, print_table

app = group("The model lines that this server trains.")


@app.command("import")
def import_base(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder: config, weights, tokenizer, template.")],
    link: Annotated[bool, typer.Option("--link", help="Link to the folder instead of copying it.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a model folder, the very one that the devices serve. Code in it is never copied or run."""
    from clawloop_server import bases

    base = bases.import_base(home_of(home), folder, link=link)
    if as_json:
        print_json({"line_id": base.line_id, **_facts(base)})
        return
    typer.echo(f"model line {base.line_id} is here ({base.size_bytes / 1e6:.1f} MB)")


@app.command("list")
def list_bases(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every model line."""
    from clawloop_server import bases

    found = bases.list_bases(home_of(home))
    if as_json:
        print_json([{"line_id": base.line_id, **_facts(base)} for base in found])
        return
    rows = [(b.line_id, b.shape.num_hidden_layers, b.shape.hidden_size, f"{b.size_bytes / 1e6:.1f}") for b in found]
    print_table("model lines", ("line", "layers", "width", "MB"), rows=rows)


def _facts(base: object) -> dict[str, object]:
    import msgspec

    found = msgspec.to_builtins(base)
    assert isinstance(found, dict)
    return found
