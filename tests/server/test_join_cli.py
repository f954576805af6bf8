"""The operator's commands for invitations, keys and devices that wait."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server import cli
from clawloop_server.bases import find_base
from clawloop_server.home import Home, open_home
from clawloop_server.hub.members import HubMembers
from clawloop_server.release.keys import load_keys
from clawloop_server.vault.store import Vault
from clawloop_shared import signing
from clawloop_shared.membership import RELEASE, open_statement
from clawloop_shared.messages import JoinRequest, read_invitation

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")  # typer's own import of click

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command; what it printed, as JSON if it was asked for."""

    def run(*arguments: str, code: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--home", str(tmp_path / "box")])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        return err if code else json.loads(out) if "--json" in arguments else out

    return run


@pytest.fixture
def made(run: Run, tmp_path: Path, model_folder: Path) -> Home:
    """A server that approves each device."""
    run("init", "--base", str(model_folder), "--yes")
    home = open_home(tmp_path / "box")
    home.config.write_text(home.config.read_text().replace("approve = false", "approve = true"))
    return home


def join(home: Home, text: str, key: bytes) -> str:
    """Use an invitation as the join desk would."""
    base = find_base(home)
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    request = JoinRequest(
        code=read_invitation(text).code, device_key=signing.public_key(key), node_key_pem=pem, line=base.line
    )
    vault = Vault.open(home, load_keys(home).master)
    try:
        return HubMembers(vault.database, line_id=base.line_id, approve=True).redeem(request).device_id
    finally:
        vault.close()


def test_the_keys_are_those_of_the_invitation(run: Run, made: Home) -> None:
    facts = run("keys", "--json")
    invitation = read_invitation(run("invite", "--json")["invitation"])
    assert facts["words"] == signing.key_words(invitation.root_key)
    assert facts["words"] in run("keys")
    keys = load_keys(made)
    said = open_statement(keys.release_statement(now_ms=10**12), invitation.root_key, purpose=RELEASE, now_ms=10**12)
    assert facts["release_key"] == signing.key_id(said.key)


def test_invitations_are_listed_and_taken_back(run: Run, made: Home) -> None:
    facts = run("invite", "--label", "Ada's Mac", "--json")
    code = read_invitation(facts["invitation"]).code
    (listed,) = run("invitations", "list", "--json")
    assert (listed["invitation_id"], listed["label"]) == (facts["invitation_id"], "Ada's Mac")
    assert (listed["state"], listed["device_id"]) == ("open", None)
    assert code not in json.dumps(listed) + run("invitations", "list")
    assert "lets nobody in" in run("invitations", "revoke", facts["invitation_id"])
    assert run("invitations", "list", "--json")[0]["state"] == "revoked"
    assert "invitations list" in run("invitations", "revoke", "00ff", code=1)


def test_a_device_waits_shows_its_words_and_is_approved_or_rejected(run: Run, made: Home) -> None:
    one, two = signing.new_key(), signing.new_key()
    first = join(made, run("invite", "--label", "Ada", "--json")["invitation"], one)
    second = join(made, run("invite", "--json")["invitation"], two)
    words = signing.key_words(signing.public_key(one))
    assert words in run("devices", "list")
    shown = run("devices", "show", first, "--json")
    assert (shown["state"], shown["key"], shown["invitation"]) == ("waiting", words, "Ada")
    assert f"devices approve {first}" in shown["waits_for"]
    assert run("status", "--json")["devices"]["waiting"] == 2
    assert "2 devices waiting for your word" in run("status")
    run("devices", "approve", first, "--yes")
    run("devices", "reject", second, "--yes")
    states = {device["device_id"]: device["state"] for device in run("devices", "list", "--json")}
    assert states == {first: "joined", second: "revoked"}
    assert "waits for nothing" in run("devices", "approve", second, "--yes", code=1)
    assert "approved" in run("devices", "show", first)


def test_a_device_is_shown_with_what_it_sent_and_waits_for(run: Run, made: Home) -> None:
    device = join(made, run("invite", "--json")["invitation"], signing.new_key())
    run("devices", "approve", device, "--yes")
    assert run("devices", "show", device, "--json")["waits_for"] == "being registered in Flower"
    vault = Vault.open(made, load_keys(made).master)
    try:
        members = HubMembers(vault.database, line_id=find_base(made).line_id)
        members.set_node(device, 9)
        members.devices.mark_seen(device, 0, level="deltas")
        with vault.database.write() as database:
            database.run("INSERT INTO items VALUES (?, x'01', x'02', x'03', 3, 4)", [device])
    finally:
        vault.close()
    found = run("devices", "show", device, "--json")
    assert (found["level"], found["node_id"], found["waits_for"], found["deltas"]) == ("deltas", 9, "", {})
    assert (found["items"], found["seen_ms"] > 0) == (1, True)
