"""`from clawloop_edge import Client`: a program that holds the tokens itself, through a real edge."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clawloop_edge import Client
from clawloop_edge.client import CallRefused, EdgeAway, Generated
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Channel, Signal, Step
from demoworld.stage import Part, free_ports, make_edge

PROMPT = [5, 300, 301, 302]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Part]:
    """A real edge with a real model, that judges answers by `exact`."""
    settings = {"signals": {"scorers": [], "compute_reward": "exact"}}
    found = make_edge(tmp_path_factory.mktemp("client"), tiny_model, name="edge", settings=settings)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def client(edge: Part) -> Iterator[Client]:
    with Client(home=edge.home) as found:
        yield found


def kept(edge: Part, trajectory_id: str) -> tuple[list[Step], list[Signal]]:
    with open_pool(EdgeHome(edge.home), writer=False) as pool, pool.reading() as reading:
        steps = [kept.step for kept in reading.session_steps(trajectory_id)]
        return steps, reading.session_signals(trajectory_id)


def test_a_white_box_trajectory_is_kept_exactly_and_may_be_learned_from(edge: Part, client: Client) -> None:
    trajectory = client.trajectory(group="sums", group_size=2, channel="val", metadata={"answer": "4"})
    first = client.generate(PROMPT, max_tokens=8, temperature=1.0)
    assert len(first.token_ids) == len(first.log_probs) > 0
    second = client.generate([*PROMPT, *first.token_ids, 7], max_tokens=4)
    steps = [
        trajectory.step(PROMPT, first),
        trajectory.step([*PROMPT, *first.token_ids, 7], second, index=1, is_last=True),
    ]
    assert client.submit_steps(steps, channel="val") == 2
    assert trajectory.complete(reward=0.5).steps == 2
    found, signals = kept(edge, trajectory.trajectory_id)
    assert [step.response_ids for step in found] == [first.token_ids, second.token_ids]
    assert all(step.trainable for step in found)
    assert {(step.group_id, step.group_size, step.channel) for step in found} == {("sums", 2, Channel.VAL)}
    assert [(signal.source, signal.value) for signal in signals] == [("claw-r1", 0.5)]


def test_a_step_that_was_not_drawn_here_is_kept_and_never_learned_from(edge: Part, client: Client) -> None:
    trajectory = client.trajectory()
    made_up = Generated(token_ids=[9, 9, 9], log_probs=[-1.0] * 3, stop_reason="stop")
    assert client.submit_steps([trajectory.step(PROMPT, made_up)]) == 1
    assert [step.untrainable for step in kept(edge, trajectory.trajectory_id)[0]] == ["not sampled here"]


def test_chat_feedback_and_a_reward_of_the_edges_own_scorer(edge: Part, client: Client) -> None:
    trajectory = client.trajectory(group="row/7 ü", metadata={"x": 1})
    said = trajectory.chat([{"role": "user", "content": "hello"}], max_tokens=4, temperature=1.0)
    assert said.step_id.startswith("chatcmpl-")
    assert said.trainable == "yes"
    judged = client.feedback(value=-1, weight=0.5, source="mine", step_id=said.step_id)
    assert (judged.target, judged.target_id, judged.value) == ("step", said.step_id, -1.0)
    assert trajectory.complete().reward is None
    steps, signals = kept(edge, trajectory.trajectory_id)
    assert [step.group_id for step in steps] == ["row/7 ü"]
    assert [(signal.source, signal.value, signal.weight) for signal in signals] == [("mine", -1.0, 0.5)]
    drawn = client.generate(PROMPT, max_tokens=2)
    computed = client.compute_reward(PROMPT, drawn.token_ids, dataset_fields={"answer": "no such answer"})
    assert computed.reward == -1.0
    assert client.compute_reward(PROMPT, drawn.token_ids).reward is None, "no answer, no opinion"


def test_what_the_edge_refuses_is_an_error_with_its_own_words(edge: Part, client: Client) -> None:
    with pytest.raises(CallRefused, match="token id -1 is outside") as refused:
        client.generate([-1])
    assert refused.value.status == 400
    with pytest.raises(CallRefused) as unknown:
        client.feedback(value=1, step_id="chatcmpl-none")
    assert (unknown.value.status, unknown.value.code) == (404, "unknown_target")
    client._call("/x/1/v1/register_trajectory", {"group_size": 2})
    with pytest.raises(CallRefused) as conflict:
        client._call("/x/1/v1/register_trajectory", {"group_size": 3})
    assert (conflict.value.status, conflict.value.param) == (409, "group_size")
    with pytest.raises(CallRefused) as stranger:
        Client(client.url, "wrong").generate(PROMPT)
    assert stranger.value.status == 401
    named = Client(f"http://clawloop:{edge.token()}@127.0.0.1:{edge.port}")
    assert named.generate(PROMPT, max_tokens=1).token_ids
    assert edge.token() not in named.url


def test_threads_may_share_a_client(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda seed: client.generate(PROMPT, max_tokens=3, seed=seed), range(16)))
    assert all(len(one.token_ids) == len(one.log_probs) for one in drawn)


@pytest.fixture
def busy() -> Iterator[ThreadingHTTPServer]:
    """A server that is busy twice, then answers; a third path is busy for good and names no pause."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            refused = len(asked) < 3 or self.path == "/compute_reward"
            body = {"error": {"message": "the engine is busy"}} if refused else _DRAWN
            data = json.dumps(body).encode()
            self.send_response(503 if refused else 200)
            if refused and self.path == "/generate":
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Not to the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = asked  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


_DRAWN = {"token_ids": [1], "log_probs": [-0.5], "stop_reason": "stop"}


def test_a_busy_edge_is_asked_again_after_the_pause_that_it_names(busy: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{busy.server_address[1]}"
    assert Client(url, "t").generate(PROMPT) == Generated([1], [-0.5], "stop")
    assert busy.asked == ["/generate"] * 3  # type: ignore[attr-defined]
    with pytest.raises(CallRefused, match="the engine is busy"):
        Client(url, "t").compute_reward([1], [1])
    assert len(busy.asked) == 4  # type: ignore[attr-defined]
    with pytest.raises(EdgeAway, match="not as an edge does"):
        Client(url, "t").submit_steps([])


def test_an_edge_that_is_away_or_was_never_set_up_says_what_to_do(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(EdgeAway, match="clawloop-edge serve"):
        Client(f"http://127.0.0.1:{port}", "t").generate(PROMPT)
    with pytest.raises(ConfigError, match="clawloop-edge setup"):
        Client(home=tmp_path / "none")
    with pytest.raises(ConfigError, match="no URL"):
        Client("127.0.0.1:8100", "t")


def test_importing_the_client_loads_no_framework() -> None:
    code = "from clawloop_edge import Client; print([m for m in ('mlx', 'torch', 'aiohttp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
