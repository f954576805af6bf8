"""`rewards`: what each source of signals says, and whether it can be trusted."""

from __future__ import annotations

import typer

from clawloop_edge.cli.context import Json, console, opened_pool, print_json, print_table, shown

_BLOCKS = " ▁▂▃▄▅▆▇█"


def rewards(context: typer.Context, as_json: Json = False) -> None:
    """What each source of signals says, whether sources agree, and what is odd about them.

    The counts are those that the running edge has made so far.
    """
    from clawloop_edge.signals.health import report_of, warnings_of
    from clawloop_edge.signals.watch import kept_sums

    with opened_pool(context) as pool:
        sums = kept_sums(pool)
    if as_json:
        print_json(report_of(sums))
        return
    rows = [
        (
            name,
            source.count,
            f"{source.mean:+.2f}",
            _bars(source.histogram),
            f"{source.fast:+.2f}",
            f"{source.lengths.correlation:+.2f}",
            f"{source.calls.correlation:+.2f}",
        )
        for name, source in sorted(sums.sources.items())
    ]
    columns = ("source", "signals", "mean", "-1 … 1", "of late", "with length", "with calls")
    print_table(columns, rows, empty="no signal yet; judge an answer by /v1/feedback, or see docs/signals.md")
    pairs = [(*name.split(" "), pair.both, f"{pair.share:.0%}") for name, pair in sorted(sums.pairs.items())]
    if pairs:
        print_table(("source", "other", "judged by both", "same sign"), pairs, empty="")
    for warning in warnings_of(sums):
        console.print(shown(warning, style="yellow"))


def _bars(histogram: list[int]) -> str:
    """The counts as one character each, the tallest full."""
    most = max(*histogram, 1)
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // most)] for count in histogram)


def register(app: typer.Typer) -> None:
    app.command()(rewards)
