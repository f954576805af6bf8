"""What both sides use of flwr, private parts included: fails first when flwr moves, and says what to look at.

No process is started: names, signatures, wire paths, fields of messages, options of programs. Whether they still mean
the same is for test_flower.py, which runs them.
"""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.node import flower, records
from clawloop_server.fleet.control import quiet_flwr
from clawloop_server.hub.front import CODE_CALL, FLEET_CALLS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("edge", "server", "shared")
LOOK = (
    "flwr moved. All that we use of it is in edge/clawloop_edge/node/_flwr.py (used by flower.py),"
    " edge/clawloop_edge/node/_flwr_runtime.py (used by stock.py), server/clawloop_server/fleet/control.py, bridge.py,"
    " polls.py, pushes.py, replies.py, and the programs in superlink.py. Mend those and this, run test_flower.py and"
    " test_stock.py, and pin the new version in pyproject.toml, constraints.txt and flower.FLWR_VERSION. What moved: "
)
MODULES = {
    "edge/clawloop_edge/node/_flwr.py",
    "edge/clawloop_edge/node/_flwr_runtime.py",
    "server/clawloop_server/fleet/bridge.py",
    "server/clawloop_server/fleet/control.py",
    "server/clawloop_server/fleet/polls.py",
    "server/clawloop_server/fleet/pushes.py",
    "server/clawloop_server/fleet/replies.py",
    "server/clawloop_server/fleet/fab/clawloop_bridge/app.py",
    "server/clawloop_server/simulate/_flwr.py",
}
FLEET = {
    "ActivateNode": "activate-node",
    "ConfirmMessageReceived": "confirm-message-received",
    "DeactivateNode": "deactivate-node",
    "PullMessages": "pull-messages",
    "PullObject": "pull-object",
    "PushMessages": "push-messages",
    "PushObject": "push-object",
    "SendNodeHeartbeat": "send-node-heartbeat",
}
RUNTIME = {
    "AcquireTask": "acquire-task",
    "ConfirmMessageReceived": "confirm-message-received",
    "PullMessages": "pull-messages",
    "PullObject": "pull-object",
    "PullTaskInput": "pull-task-input",
    "PushMessages": "push-messages",
    "PushObject": "push-object",
    "PushTaskOutput": "push-task-output",
    "SendTaskHeartbeat": "send-task-heartbeat",
}
CONTROL = {
    "ListNodes": "list-nodes",
    "ListRuns": "list-runs",
    "RegisterNode": "register-node",
    "StartRun": "start-run",
    "StopRun": "stop-run",
    "UnregisterNode": "unregister-node",
}
FIELDS = {
    "fleet_pb2.ActivateNodeRequest": {"public_key", "heartbeat_interval"},
    "fleet_pb2.ActivateNodeResponse": {"node_id"},
    "fleet_pb2.DeactivateNodeRequest": {"node_id"},
    "fleet_pb2.PullMessagesRequest": {"node"},
    "fleet_pb2.PullMessagesResponse": {"messages_list", "message_object_trees"},
    "runtime_pb2.PullAppMessagesRequest": {"message_ids"},
    "runtime_pb2.PullAppMessagesResponse": {"messages_list", "message_object_trees"},
    "fleet_pb2.PushMessagesRequest": {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
    "fleet_pb2.PushMessagesResponse": {"objects_to_push", "session_id"},
    "heartbeat_pb2.SendNodeHeartbeatRequest": {"node", "heartbeat_interval"},
    "message_pb2.PullObjectRequest": {"node", "run_id", "object_id"},
    "message_pb2.PullObjectResponse": {"object_found", "object_available", "object_content"},
    "message_pb2.PushObjectRequest": {"node", "run_id", "object_id", "object_content", "session_id"},
    "message_pb2.PushObjectResponse": {"stored"},
    "message_pb2.ConfirmMessageReceivedRequest": {"node", "run_id", "message_object_id"},
    "control_pb2.ListNodesResponse": {"nodes_info"},
    "control_pb2.RegisterNodeRequest": {"public_key", "name"},
    "control_pb2.StartRunRequest": {"fab"},
    "control_pb2.StartRunResponse": {"run_id"},
    "control_pb2.ListRunsRequest": {"run_id", "limit"},
    "control_pb2.ListRunsResponse": {"run_dict"},
    "node_pb2.NodeInfo": {"node_id", "name", "public_key", "unregistered_at"},
    "runtime_pb2.AcquireTaskRequest": {"supported_task_types"},
    "runtime_pb2.AcquireTaskResponse": {"task", "token"},
    "runtime_pb2.PullTaskInputResponse": {"context", "run", "fab", "task_id"},
    "runtime_pb2.PushAppMessagesRequest": {"messages_list", "message_object_trees"},
    "runtime_pb2.PushTaskOutputRequest": {"context", "sub_status", "details"},
}
OPTIONS = {
    "flower-superlink": {
        "--host",
        "--port",
        "--ssl-certfile",
        "--ssl-keyfile",
        "--ssl-ca-certfile",
        "--enable-supernode-auth",
        "--isolation",
        "--superexec-auth-secret-file",
        "--disable-runtime-dependency-installation",
    },
    "flower-superexec": {"--runtime-api-address", "--root-certificates", "--superexec-auth-secret-file"},
    "flower-supernode": {
        "--superlink",
        "--root-certificates",
        "--auth-supernode-private-key",
        "--isolation",
        "--host",
        "--port",
        "--superexec-auth-secret-file",
        "--max-retries",
    },
}


@pytest.fixture(scope="module")
def flwr() -> Any:
    quiet_flwr()
    return flower.load_flwr()


def told(found: object) -> str:
    return f"{LOOK}{found}"


def parameters(call: Callable[..., object]) -> set[str]:
    return set(inspect.signature(call).parameters)


def paths(client_class: type, names: dict[str, str]) -> dict[str, str]:
    """Where each call of a client goes, without sending it."""
    client: Any = object.__new__(client_class)
    client._unary_unary = lambda **call: call["path"]
    return {name: getattr(client, name)(None) for name in names}


def test_the_version_is_pinned_to_the_one_that_is_installed() -> None:
    found = importlib.metadata.version("flwr")
    assert found == flower.FLWR_VERSION, told(f"version {found}, ours is {flower.FLWR_VERSION}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for extra in ("edge", "server"):
        assert f"flwr=={found}" in project["project"]["optional-dependencies"][extra], extra
    assert f"flwr=={found}" in (ROOT / "constraints.txt").read_text().splitlines()


def imports_of_flwr() -> Iterator[str]:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if any(name == "flwr" or name.startswith("flwr.") for name in names):
                    yield str(path.relative_to(ROOT))


def test_flwr_is_imported_in_these_modules_alone() -> None:
    assert set(imports_of_flwr()) <= MODULES, told("another module imports it")


def test_the_nodes_parts_take_what_they_are_given(flwr: Any) -> None:
    wanted: dict[Callable[..., object], set[str]] = {
        flwr.FleetHttpClient: {"base_url", "interceptors", "verify", "timeout"},
        flwr.NodeAuthHttpInterceptor: {"private_key", "public_key"},
        flwr.RuntimeVersionMetadata.from_local_component: {"component_name"},
        flwr.get_all_nested_objects: {"obj"},
        flwr.get_object_tree: {"obj"},
        flwr.iterate_object_tree: {"tree"},
        flwr.inflate_object_from_contents: {"object_id", "object_contents"},
        flwr.no_object_id_recompute: set(),
        flwr.Message: {"reply_to", "metadata", "content", "error"},
        flwr.Array: {"dtype", "shape", "stype", "data"},
    }
    missing = {part.__qualname__: names - parameters(part) for part, names in wanted.items()}
    assert not any(missing.values()), told(missing)


def test_the_clients_insides_that_we_change_are_there(flwr: Any) -> None:
    client = flwr.FleetHttpClient("https://127.0.0.1:1", interceptors=[])
    try:
        found = [hasattr(client._client, name) for name in ("follow_redirects", "timeout")]
    finally:
        client.close()
    assert all(found), told("FleetHttpClient._client: redirects are switched off there")


def test_calls_of_the_fleet_go_where_the_front_lets_them_through(flwr: Any) -> None:
    found = paths(flwr.FleetHttpClient, FLEET)
    assert found == {name: f"/v1/fleet/{path}" for name, path in FLEET.items()}, told(found)
    assert set(FLEET.values()) <= FLEET_CALLS
    code = paths(flwr.FleetHttpClient, {"GetFab": CODE_CALL})
    assert code == {"GetFab": f"/v1/fleet/{CODE_CALL}"}, told(code)
    assert CODE_CALL not in FLEET_CALLS, "code is published to nobody who did not ask for a stock SuperNode"


def test_calls_of_the_hub_and_of_the_stock_driver_go_where_they_went(flwr: Any) -> None:
    from flwr.supercore.control import ControlHttpClient

    from clawloop_edge.node import _flwr_runtime

    found = paths(ControlHttpClient, CONTROL)
    assert found == {name: f"/v1/control/{path}" for name, path in CONTROL.items()}, told(found)
    found = paths(_flwr_runtime.RuntimeHttpClient, RUNTIME)
    assert found == {name: f"/v1/runtime/{path}" for name, path in RUNTIME.items()}, told(found)


def test_the_stock_drivers_parts_take_what_they_are_given(flwr: Any) -> None:
    from clawloop_edge.node import _flwr_runtime as runtime

    wanted: dict[Callable[..., object], set[str]] = {
        runtime.RuntimeHttpClient: {"base_url", "interceptors", "timeout"},
        runtime.SuperExecAuthHttpInterceptor: {"master_secret", "protected_methods"},
        runtime.RuntimeTokenHttpInterceptor: {"token"},
    }
    missing = {part.__qualname__: names - parameters(part) for part, names in wanted.items()}
    assert not any(missing.values()), told(missing)
    assert {runtime.TaskType.CLIENT_APP, runtime.SubStatus.COMPLETED, runtime.SubStatus.FAILED}


def test_the_bridges_grid_shows_what_replies_are_fetched_with(flwr: Any) -> None:
    from flwr.app import Message
    from flwr.supercore.inflatable import inflatable_object, inflatable_protobuf_utils, inflatable_utils
    from flwr.superlink.grid.http_grid import HttpGrid

    for name, names in {"push_messages": {"messages"}, "get_nodes": set[str]()}.items():
        found = parameters(getattr(HttpGrid, name))
        assert names <= found, told(f"HttpGrid.{name} takes {found}")
    assert isinstance(HttpGrid._runtime_client, property), told("HttpGrid has no _runtime_client")
    assert hasattr(HttpGrid("127.0.0.1:1", insecure=True, token="t"), "node"), told("HttpGrid has no node")
    wanted: dict[Callable[..., object], set[str]] = {
        inflatable_protobuf_utils.make_pull_object_fn_protobuf: {"pull_object_protobuf", "node", "run_id"},
        inflatable_utils.inflate_object_from_contents: {"object_id", "object_contents"},
        inflatable_object.iterate_object_tree: {"tree"},
    }
    for call, names in wanted.items():
        assert names <= parameters(call), told(f"{call.__name__} takes {parameters(call)}")
    assert issubclass(inflatable_utils.ObjectUnavailableError, Exception)
    assert issubclass(inflatable_utils.ObjectPullError, Exception)
    assert {"content", "error", "metadata", "has_error"} <= set(dir(Message))


@pytest.mark.parametrize("name", FIELDS)
def test_messages_have_the_fields_that_we_read_and_write(flwr: Any, name: str) -> None:
    module, _, kind = name.partition(".")
    found = getattr(importlib.import_module(f"flwr.proto.{module}"), kind).DESCRIPTOR.fields_by_name
    assert FIELDS[name] <= set(found), told(f"{name} has {sorted(found)}")


@pytest.mark.parametrize("program", OPTIONS)
def test_programs_take_the_options_that_they_are_given(program: str) -> None:
    command = [str(Path(sys.executable).parent / program), "--help"]
    environment = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    missing = {option for option in OPTIONS[program] if option not in done.stdout}
    assert not missing, told(f"{program} no longer takes {sorted(missing)}")


def test_the_codes_that_we_send_and_wait_for_are_the_same(flwr: Any) -> None:
    from flwr.common.constant import ErrorCode, Status

    from clawloop_server.fleet import control

    assert int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION) == records.ERROR_CODE, told("ErrorCode")
    assert control._FINISHED == Status.FINISHED, told("Status.FINISHED")
