"""The contract with flwr: these fail first when its private parts move, and say which."""

import inspect
import logging
import os
import subprocess
import sys

import pytest

from clawloop_edge.node import flower, records
from clawloop_edge.node.transport import NodeError

CALLS = [
    "ActivateNode",
    "DeactivateNode",
    "SendNodeHeartbeat",
    "PullMessages",
    "PushMessages",
    "PullObject",
    "PushObject",
    "ConfirmMessageReceived",
]
GLOBALS = """
import logging, os, signal, sys, threading
before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
from clawloop_edge.node import flower
flower.load_flwr()
assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)] == before
assert threading.enumerate() == [threading.main_thread()]
assert logging.getLogger().handlers == [] and logging.getLogger("flwr").handlers == []
assert sys.modules["flwr.supercore.telemetry"].FLWR_TELEMETRY_ENABLED == "0"
assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
assert "torch" not in sys.modules
"""


class Holding:
    """A message as far as its content goes (flwr lets only a running app make a real one)."""

    def __init__(self, content: object) -> None:
        self.content = content

    def has_content(self) -> bool:
        return True


def test_every_private_part_of_flwr_is_there() -> None:
    flwr = flower.load_flwr()
    assert [name for name in flwr.__all__ if not hasattr(flwr, name)] == []
    assert [name for name in CALLS if not callable(getattr(flwr.FleetHttpClient, name, None))] == []


def test_the_client_takes_our_certificate_check_and_follows_no_redirect() -> None:
    flwr = flower.load_flwr()
    assert {"interceptors", "verify", "timeout"} <= set(inspect.signature(flwr.FleetHttpClient).parameters)
    client = flwr.FleetHttpClient("https://127.0.0.1:1", verify=False)
    client._client.follow_redirects = False
    client.close()


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) + 1, 6 << 20])
def test_a_payload_survives_flwrs_objects(size: int) -> None:
    flwr = flower.load_flwr()
    payload = os.urandom(size)
    record = records.record_of(flwr, payload)
    with flwr.no_object_id_recompute():
        contents = {key: held.deflate() for key, held in flwr.get_all_nested_objects(record).items()}
        again = flwr.inflate_object_from_contents(record.object_id, contents)
    assert records.payload_of(Holding(again)) == payload


def test_a_message_without_our_record_has_an_empty_payload() -> None:
    flwr = flower.load_flwr()
    for content in (flwr.RecordDict({}), flwr.RecordDict({"payload": flwr.ConfigRecord({"other": b"x"})})):
        assert records.payload_of(Holding(content)) == b""


def test_another_version_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "FLWR_VERSION", "0.0.1")
    with pytest.raises(NodeError, match=r"pip install flwr==0\.0\.1"):
        flower.check_flwr()


def test_loading_flwr_touches_nothing_of_the_process() -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", GLOBALS], check=True, env=environment, timeout=60)


def test_flwr_writes_nothing_to_the_console(capfd: pytest.CaptureFixture[str]) -> None:
    flower.load_flwr()
    logging.getLogger("flwr").error("not for the console")
    assert "not for the console" not in capfd.readouterr().err
