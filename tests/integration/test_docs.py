"""The docs tell the truth: every setting, command and file that they name is there, and every setting is in them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from clawloop_edge.cli.root import app as edge_app
from clawloop_edge.config import EdgeConfig
from clawloop_server.cli.commands import app as server_app
from clawloop_server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `\[([a-z._]+)\] (\w+)` \| (.*?) \|", re.M)


def settings(config: msgspec.Struct) -> Iterator[tuple[str, str, Any]]:
    def walk(fields: dict[str, Any], section: str) -> Iterator[tuple[str, str, Any]]:
        for name, value in fields.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{section}.{name}".strip("."))
            else:
                yield section, name, value

    yield from walk(msgspec.to_builtins(config), "")


def documented(side: str) -> dict[tuple[str, str], str]:
    text = (ROOT / "docs/configuration.md").read_text()
    edge, server = text.split("## Server")
    return {(section, name): default for section, name, default in ROW.findall(edge if side == "edge" else server)}


@pytest.mark.parametrize(("side", "config"), [("edge", EdgeConfig()), ("server", ServerConfig())])
def test_every_setting_is_documented_with_its_default(side: str, config: msgspec.Struct) -> None:
    rows = documented(side)
    assert {(section, name) for section, name, _ in settings(config)} == rows.keys()
    for section, name, value in settings(config):
        stated = rows[section, name]
        if stated.startswith("`"):
            written = msgspec.toml.decode(f"x = {stated.strip('`')}")["x"]
            assert written == (list(value) if isinstance(value, tuple) else value), (section, name)


@pytest.mark.parametrize(("command", "app"), [("clawloop-edge", edge_app), ("clawloop-server", server_app)])
def test_every_command_that_the_readme_shows_exists(command: str, app: typer.Typer) -> None:
    shown = set(re.findall(rf"^{command} ([a-z]+(?: [a-z]+)?)", (ROOT / "README.md").read_text(), re.M))
    assert shown
    for words in shown:
        wanted = [word for word in words.split() if word not in {"full"}]
        done = CliRunner().invoke(app, [*wanted, "--help"])
        assert done.exit_code == 0, (words, done.output)


def test_every_file_that_the_readme_names_is_there() -> None:
    tree = (ROOT / "README.md").read_text().split("## Where things are", 1)[1].split("```")[1]
    folder, named = "", set()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name.rstrip("/")
        path = ROOT / folder if not line.startswith(" ") else ROOT / folder / name
        assert path.exists(), path
        named.add(path.resolve())
    for side in ("edge/clawloop_edge", "server/clawloop_server", "shared/clawloop_shared"):
        for part in (ROOT / side).iterdir():
            if part.name not in {"__pycache__", "__init__.py", "py.typed"}:
                assert part.resolve() in named, f"{part.relative_to(ROOT)} is not in the README's file tree"


def test_links_between_the_docs_lead_somewhere() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
