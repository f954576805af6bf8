"""`redact`: see what would be taken out of a text before it leaves at level `redacted`, and what is looked for."""

from __future__ import annotations

import errno
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from clawloop_edge.cli.context import Json, console, home_of, print_json, print_table, shown
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.privacy.redact.spans import Span

redact = typer.Typer(help="See what redaction takes out.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="FILE", help="A text file, or `-` for what is piped in.")]
Show = Annotated[bool, typer.Option("--show", help="Show what would be taken out, marked, instead of hiding it.")]
MAX_BYTES = 64 << 20
_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})


@redact.command("test")
def try_on_text(context: typer.Context, file: File, as_json: Json = False, show: Show = False) -> None:
    """Print a text with what would be taken out of it, and count that by kind.

    It is searched for secrets and personal data by their shapes, for what this machine's credential files hold, and
    for your own words. With `--json`: places (in characters), kinds and counts, and the text itself with `--show`.
    """
    from clawloop_edge.privacy.redact.machine import detector

    text = _read(file)
    spans = detector(home_of(context)).find(text)
    counts = Counter(span.kind for span in spans)
    if as_json:
        found = [_fact(span, text if show else None) for span in spans]
        print_json({"characters": len(text), "counts": dict(counts.most_common()), "spans": found})
        return
    _print_marked(text, spans, show=show)
    print_table(("kind", "found"), counts.most_common(), empty="nothing would be taken out")


@redact.command("kinds")
def list_kinds(as_json: Json = False) -> None:
    """What is looked for."""
    from clawloop_edge.privacy.redact.kinds import PERSONAL, SECRETS, key_kinds

    keys = key_kinds()
    if as_json:
        print_json({**SECRETS, **keys, **PERSONAL})
        return
    services = ", ".join(kind.removesuffix("-key") for kind in keys)
    rows = [*SECRETS.items(), ("…-key", f"keys of {len(keys)} services: {services}"), *PERSONAL.items()]
    print_table(("kind", "what"), rows, empty="", whole=("kind",))


def _read(file: str) -> str:
    """The text. Raises ConfigError if it cannot be read, or is too large to be shown."""
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if file == "-" else _bytes(Path(file))
    except OSError as error:
        if error.errno in _NO_FILE:  # maybe a text: it is not repeated here
            raise ConfigError(
                "cannot read that: there is no such file; to try a text, pipe it to `redact test -`"
            ) from error
        raise ConfigError(f"cannot read {file}: {error.strerror}; name a text file, or - to read a pipe") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_BYTES >> 20} MiB; give a part of it")
    return data.decode("utf-8", errors="replace")


def _bytes(path: Path) -> bytes:
    with path.open("rb") as opened:
        return opened.read(MAX_BYTES + 1)


def _fact(span: Span, text: str | None) -> dict[str, object]:
    fact: dict[str, object] = {"start": span.start, "end": span.end, "kind": span.kind}
    return fact if text is None else {**fact, "text": text[span.start : span.end]}


def _print_marked(text: str, spans: Sequence[Span], *, show: bool) -> None:
    """The text with each span marked by its kind; what stands there only with `show`."""
    marked, at = Text(), 0
    for span in spans:
        marked.append_text(shown(text[at : span.start]))
        marked.append(f"▇{span.kind}▇", style="bold white on red")
        if show:
            marked.append(shown(text[span.start : span.end]).plain, style="red")
        at = span.end
    marked.append_text(shown(text[at:]))
    console.print(marked, soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.add_typer(redact, name="redact")
