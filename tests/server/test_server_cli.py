import http.client
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server import cli
from clawloop_server.app import sole_server
from clawloop_server.bases import Base, find_base
from clawloop_server.errors import HomeError
from clawloop_server.home import Home, open_home
from clawloop_server.hub.devices import Device, Devices, DeviceState
from clawloop_server.hub.status import Part, Running, read_running, write_running
from clawloop_server.release.keys import load_keys
from clawloop_server.release.records import Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.vault.store import Vault
from clawloop_shared import signing, wire
from clawloop_shared.ids import new_id
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe
from clawloop_shared.membership import prove_join
from clawloop_shared.messages import (
    FORGET_PATH,
    JOIN_PATH,
    ForgetRequest,
    Invitation,
    JoinReply,
    JoinRequest,
    SignedAnswer,
    UploadItem,
    read_invitation,
)
from clawloop_shared.receipts import open_forgotten, sign_forget
from clawloop_shared.records import Policy, Sampling, Signal, Step, StepBatch, Target

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")  # typer's own import of click

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "box"


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command; its exit code and output, or with `--json` what it printed."""

    def run(*arguments: str, code: int = 0, home: Path = folder) -> Any:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--home", str(home)])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        if code:
            assert "Traceback" not in err
            return err
        return json.loads(out) if "--json" in arguments else out

    return run


@pytest.fixture
def made(run: Run, folder: Path, model_folder: Path) -> Home:
    """A server made by `init`."""
    run("init", "--base", str(model_folder), "--port", "9443", "--name", "gpu.example", "--yes")
    return open_home(folder)


@pytest.fixture
def opened(made: Home) -> Iterator[Vault]:
    vault = Vault.open(made, load_keys(made).master)
    yield vault
    vault.close()


@pytest.mark.parametrize("words", [["status"], ["devices", "list"]])
def test_the_home_may_be_named_before_the_command(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAWLOOP_SERVER_HOME", "/elsewhere")
    for arguments in (["--home", "{}", *words], [*words, "--home", "{}"], ["--home", "/nowhere", *words, "--home={}"]):
        with pytest.raises(SystemExit):
            cli.main([argument.format(tmp_path) for argument in arguments])
        assert f"{tmp_path} holds no server" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "/elsewhere holds no server" in capsys.readouterr().err


def join(vault: Vault, base: Base) -> str:
    device = Device(
        device_id=new_id(),
        device_key=signing.public_key(signing.new_key()),
        node_key_pem=f"PEM {new_id()}",
        node_id=None,
        line_id=base.line_id,
        state=DeviceState.JOINED,
        adapter_version=0,
        joined_ms=1,
        seen_ms=1,
    )
    Devices(vault.database).add(device)
    return device.device_id


def send(vault: Vault, device: str, base: Base) -> None:
    step = Step(
        step_id=f"chatcmpl-{new_id()}",
        session_id="s",
        run_id="r",
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-0.5],
        policy=Policy(line=base.line_id),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    judged = Signal(signal_id=new_id(), target=Target.RUN, target_id="r", source="f", value=1.0, created_ms=1)
    body = wire.encode(StepBatch([step], [judged]))
    vault.receive(device, [UploadItem(new_id(), "r", "steps", body), UploadItem(new_id(), "r", "steps", b"?")])


def add_adapter(registry: Registry, base: Base) -> int:
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=1, steps=1)
    candidate = Candidate(
        round_id=round_id,
        line=base.line,
        files={CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"},
        rank=8,
        alpha=16.0,
        target_modules=["q_proj"],
        probe=Probe(ids=[1, 2], logprobs=[-0.5]),
        evaluation=Evaluation(suite="tools", episodes=8, reward=0.5, reward_before=0.25, standard_error=0.1),
        lineage_root="root",
    )
    with registry.within():
        version = registry.record_candidate(candidate)
        registry.finish_round(round_id, RoundState.PASSED, version=version, reason="better")
    return version


def test_init_makes_a_private_home_and_again_keeps_what_is_there(run: Run, made: Home, model_folder: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in made.folders()} == {0o700}
    keys, line = load_keys(made), find_base(made).line_id
    facts = run("init", "--admin-port", "9001", "--yes", "--json")
    assert load_keys(made) == keys
    assert facts["model_lines"] == [line]
    assert facts["url"] == "https://gpu.example:9443", "an earlier setting stays"
    assert "admin_port = 9001" in made.config.read_text()


def test_init_refuses_what_is_no_model_and_a_bad_port(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no model folder" in run("init", "--base", str(tmp_path / "empty"), "--yes", code=1)
    assert "99999" in run("init", "--port", "99999", "--yes", code=1)


def test_an_invitation_names_the_server_its_certificate_and_its_key(run: Run, made: Home) -> None:
    facts = run("invite", "--expires", "30m", "--json")
    invitation = read_invitation(facts["invitation"])
    assert (invitation.url, facts["expires_s"]) == ("https://gpu.example:9443", 1800.0)
    assert invitation.root_key == load_keys(made).root_public
    assert invitation.ca_pem.startswith("-----BEGIN CERTIFICATE")
    assert read_invitation(run("invite")).code != invitation.code
    assert "no time such as" in run("invite", "--expires", "soon", code=2)
    assert "30 days" in run("invite", "--expires", "99d", code=1)


def test_devices_are_listed_shown_revoked_and_deleted(run: Run, made: Home, opened: Vault) -> None:
    base = find_base(made)
    device = join(opened, base)
    send(opened, device, base)
    (listed,) = run("devices", "list", "--json")
    assert listed | {"forgotten": []} == run("devices", "show", device, "--json")
    assert (listed["device_id"], listed["state"]) == (device, "joined")
    assert device in run("devices", "list")
    assert device in run("devices", "show", device)
    run("devices", "revoke", device, "--yes")
    assert run("devices", "show", device, "--json")["state"] == "revoked"
    deleted = run("devices", "delete", device, "--yes", "--json")
    counts = {"steps": 1, "signals": 1, "items": 2, "set_aside": 1, "deltas": 0}
    assert deleted == counts | {"rounds": [], "adapters": []}
    assert run("devices", "show", device, "--json")["state"] == "deleted"
    assert "devices list" in run("devices", "show", "nobody", code=1)
    assert "deleted" in run("devices", "revoke", device, "--yes", code=1)


def test_what_a_device_asked_to_forget_is_shown_without_what_it_was(run: Run, made: Home, opened: Vault) -> None:
    base = find_base(made)
    device = join(opened, base)
    send(opened, device, base)
    named = ForgetRequest(request_id="first", device_id=device, at_ms=1, record_ids=["a secret name"])
    opened.forget(named, now_ms=1)
    opened.forget(ForgetRequest(request_id="second", device_id=device, at_ms=1, everything=True), now_ms=2)
    first, second = run("devices", "show", device, "--json")["forgotten"]
    assert (first["request_id"], first["everything"], first["deleted"], first["unknown"]) == ("first", False, 1, 1)
    assert (second["request_id"], second["everything"], second["deleted"]) == ("second", True, 2)
    shown = run("devices", "show", device)
    assert "asked to forget" in shown
    assert "everything" in shown
    assert "secret" not in shown


def test_data_stats_counts_and_says_what_was_set_aside(run: Run, made: Home, opened: Vault) -> None:
    base = find_base(made)
    send(opened, join(opened, base), base)
    with made.config.open("a") as config:
        config.write("[reward]\nsettle_s = 0.0\n")
    stats = run("data", "stats", "--json")
    assert (stats["steps"], stats["signals"], stats["items"]) == (1, 1, 2)
    assert stats["trajectories"] == {"train": {"judged": 1}}
    assert stats["set_aside"] == {"unreadable": 1}
    assert "unreadable" in run("data", "stats")
    status = run("status", "--json")
    assert (status["running"], status["ready_trajectories"], status["devices"]["joined"]) == (False, 1, 1)
    assert run("train", "status", "--json")["trainer"] == "down"
    assert "not running" in run("status")


def test_without_a_terminal_a_question_names_the_option_that_answers_it(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "no terminal to ask at; give --yes" in run("init", code=1)
    assert not folder.exists()


def test_adapters_are_released_held_and_rolled_back(run: Run, made: Home, opened: Vault) -> None:
    base, registry = find_base(made), Registry(opened.database, made.adapters)
    for _ in range(2):
        add_adapter(registry, base)
    assert [a["state"] for a in run("adapters", "list", "--json")] == ["candidate", "candidate"]
    released = run("adapters", "release", "1", "--json")
    assert released["key_id"] == signing.key_id(load_keys(made).release_public)
    run("adapters", "hold", "2")
    assert run("adapters", "show", "2", "--json")["state"] == "held"
    assert "released" in run("adapters", "release", "2")
    assert run("adapters", "rollback", "--to", "1", "--yes", "--json") == {
        "version": 3,
        "files_of": 1,
        "cohorts": {},
        "cohorts_kept": [],
    }
    assert run("status", "--json")["adapter"]["version"] == 3
    assert "rolled_back" in run("adapters", "list")
    assert "8 episodes of tools" in " ".join(run("adapters", "show", "3").split())
    assert "adapters list" in run("adapters", "show", "9", code=1)
    run("adapters", "show", "0", code=2)


def test_rounds_are_listed_and_shown(run: Run, made: Home, opened: Vault) -> None:
    add_adapter(Registry(opened.database, made.adapters), find_base(made))
    (found,) = run("rounds", "list", "--json")
    assert (found["state"], found["version"], found["reason"]) == ("passed", 1, "better")
    assert run("rounds", "show", found["round_id"], "--json") == {"round": found, "updates": [], "lineage": []}
    assert "better" in run("rounds", "show", found["round_id"])
    listed = " ".join(run("rounds", "list").split())
    assert "0 → 1" in listed
    assert "better" in listed
    assert run("train", "status", "--json")["last_round"] == found
    assert "rounds list" in run("rounds", "show", "nothing", code=1)


def test_a_round_is_explained_by_the_voices_that_made_its_rewards(run: Run, made: Home, opened: Vault) -> None:
    base = find_base(made)
    device = join(opened, base)
    send(opened, device, base)
    round_id = Registry(opened.database, made.adapters).start_round(
        base.line_id, base_version=0, trajectories=1, steps=1
    )
    opened.consume(round_id, opened.ready(base.line_id, 9, now_ms=1 << 50))
    (found,) = run("rounds", "explain", round_id, "--json")["trajectories"]
    assert (found["device_id"], found["account"]["reward"]) == (device, {"value": 1.0, "weight": 0.5})
    assert [(v["source"], v["factor"], v["share"]) for v in found["account"]["voices"]] == [("f", 0.5, 1.0)]
    assert "f +1.00 (100%)" in run("rounds", "explain", round_id)
    opened.delete_device(device)
    assert "forgotten since" in run("rounds", "explain", round_id)
    assert "rounds list" in run("rounds", "explain", "nothing", code=1)


def test_bases_are_imported_and_listed(run: Run, made: Home, model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").write_text("another")
    line = run("base", "import", str(model_folder), "--json")["line_id"]
    assert line in {base["line_id"] for base in run("base", "list", "--json")}
    assert line in run("base", "list")
    assert "several model lines" in run("status", code=1)


def test_what_is_wrong_is_said_before_anything_is_made(run: Run, folder: Path, tmp_path: Path) -> None:
    assert f"{tmp_path} is no model folder" in run("init", "--base", str(tmp_path), "--yes", code=1)
    assert "admin_port 99999 is not in 0..65535" in run("init", "--admin-port", "99999", "--yes", code=1)
    assert not folder.exists()


def test_a_home_that_is_not_there_is_one_line_and_exit_1(run: Run, tmp_path: Path) -> None:
    for command in (["status"], ["serve"], ["invite"], ["devices", "list"], ["data", "stats"], ["base", "list"]):
        error = run(*command, code=1, home=tmp_path / "nothing")
        assert error.startswith("clawloop-server: ")
        assert error.count("\n") == 1
        assert "clawloop-server init" in error


def test_a_bad_configuration_is_named(run: Run, made: Home) -> None:
    made.config.write_text("[hub]\nprot = 1\n")
    assert "prot" in run("status", code=1)


def test_help_is_quick_and_imports_no_framework(made: Home) -> None:
    code = "import sys; from clawloop_server.cli import commands; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "flwr", "transformers", "peft", "aiohttp", "sqlite_utils", "sqlcipher3"}
    assert heavy.isdisjoint(loaded)


def test_a_missing_extra_is_named(
    run: Run, made: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'clawloop[server]'" in run("serve", code=1)


def test_status_says_how_many_adapters_wait_for_a_decision(run: Run, made: Home, opened: Vault) -> None:
    assert run("status", "--json")["waiting_adapters"] == 0
    registry, base = Registry(opened.database, made.adapters), find_base(made)
    registry.hold(add_adapter(registry, base))
    add_adapter(registry, base)
    assert run("status", "--json")["waiting_adapters"] == 2
    assert "2 adapters are not released" in run("status")
    run("adapters", "release", "2")
    assert run("status", "--json")["waiting_adapters"] == 0


def test_a_part_that_keeps_failing_says_when_it_is_tried_again_and_where_to_look() -> None:
    part = Part(name="trainer", pid=0, restarts=4, last_exit=1, wait_s=41.3, log="/logs/trainer.log")
    assert part.summary == "down, tried again in 41 s: it ended with 1, see /logs/trainer.log"
    assert "restarted 4 times; it ended with 1" in msgspec.structs.replace(part, pid=7).summary
    assert Part(name="trainer", pid=7, restarts=0).summary == "up"


def test_a_server_that_is_too_busy_to_answer_is_not_called_down(
    run: Run, made: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.cli.common._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        write_running(made, Running(pid=1, url="https://x", port=1, admin_port=port))
        (made.folder / "admin.token").touch(mode=0o600)
        assert f"a server is on port {port} but did not answer" in run("status", code=1)


def until(found: Callable[[], Any], *, timeout_s: float = 180.0) -> Any:
    """What `found` gives as soon as it gives something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def group_lives(leader: int) -> bool:
    """Whether any process is left of the group that a part's guard leads."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def ask_to_join(text: str, base: Base, *, key: bytes) -> JoinReply:
    """Join as a device would: over TLS, trusting the invitation's certificate alone."""
    invitation = read_invitation(text)
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    device_key = signing.public_key(key)
    request = JoinRequest(code=invitation.code, device_key=device_key, node_key_pem=pem, line=base.line)
    request = prove_join(request, key)
    return wire.decode(posted(invitation, JOIN_PATH, body=wire.encode(request)), JoinReply)


def posted(invitation: Invitation, path: str, *, body: bytes) -> bytes:
    context = ssl.create_default_context(cadata=invitation.ca_pem)
    connection = http.client.HTTPSConnection(urlsplit(invitation.url).netloc, timeout=30, context=context)
    connection.request("POST", path, body)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status == 200, answer
    return answer


def test_serve_releases_lets_in_puts_out_and_leaves_nothing_behind(run: Run, made: Home) -> None:
    """The trainer dies again and again here, since the model is none: the rest goes on."""
    run("init", "--port", "0", "--admin-port", "0", "--name", "127.0.0.1", "--yes")
    command = [sys.executable, "-c", "from clawloop_server.cli import main; main()"]
    log = made.logs / "test.log"
    with log.open("wb") as output:
        server = subprocess.Popen([*command, "serve", "--home", str(made.folder)], stdout=output, stderr=output)
    try:
        running = until(lambda: read_running(made) or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        assert running.pid == server.pid

        with Vault.open(made, load_keys(made).master).database.write() as database:
            add_adapter(Registry(database, made.adapters), find_base(made))
        until(lambda: (run("status", "--json")["adapter"] or {}).get("version") == 1)

        def parts() -> dict[str, Any]:
            return {part["name"]: part for part in run("status", "--json")["parts"]}

        key, invitation = signing.new_key(), run("invite")
        joined = ask_to_join(invitation, find_base(made), key=key)
        assert joined.release_key == load_keys(made).release_public
        assert run("devices", "show", joined.device_id, "--json")["node_id"] == joined.node_id
        run("devices", "revoke", joined.device_id, "--yes")
        request = ForgetRequest(
            request_id="r", device_id=joined.device_id, at_ms=time.time_ns() // 1_000_000, everything=True
        )
        answer = posted(read_invitation(invitation), FORGET_PATH, body=wire.encode(sign_forget(request, key)))
        assert open_forgotten(wire.decode(answer, SignedAnswer), joined.release_key).request_id == "r"
        until(lambda: run("devices", "show", joined.device_id, "--json")["node_id"] is None)

        assert {"superlink", "superexec", "trainer"} == parts().keys()
        assert parts()["superlink"]["restarts"] == 0
        assert read_invitation(run("invite")).url == running.url
        with pytest.raises(HomeError, match="another server runs"), sole_server(made):
            pass
        groups = [part["pid"] for part in parts().values() if part["pid"]]
        assert len(groups) >= 2
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(timeout=60) == 0, log.read_text()
        until(lambda: not any(group_lives(leader) for leader in groups), timeout_s=30)
    finally:
        server.kill()
        server.wait()
    assert read_running(made) is None
    assert run("status", "--json")["running"] is False
