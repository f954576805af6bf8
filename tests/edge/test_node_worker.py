"""The node comes back after every failure by itself, and says goodbye when it is stopped."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from clawloop_edge.node.transport import Answer, Incoming, NodeRefused, Permit, ServerAway, Withdrawn
from clawloop_edge.node.worker import NodeSettings, NodeState, NodeWorker
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.messages import (
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadItem,
    UploadReply,
    UploadRequest,
)
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
QUICK = NodeSettings(poll_s=0.01, quick_s=0.001, retry_s=0.005, max_retry_s=0.02, refused_s=0.02)


class Wire:
    """A transport whose server is this test."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self.answers: list[Answer] = []
        self.connects = self.closes = self.polls = self.goodbyes = 0
        self.slow = False
        self.sending, self.was_cut = threading.Event(), threading.Event()

    def connect(self) -> None:
        self.connects += 1
        self.was_cut.clear()
        self._fail()

    def receive(self) -> Incoming | None:
        self.polls += 1
        self._fail()
        return None if self.inbox.empty() else self.inbox.get()

    def send(self, incoming: Incoming, answer: Answer, *, permit: Permit) -> None:
        self._fail()
        if not permit():
            raise Withdrawn("not this one")
        self.sending.set()
        if self.slow and not self.was_cut.wait(10):
            raise AssertionError("nobody cut it")
        if self.was_cut.is_set():
            raise Withdrawn("cut")
        self.answers.append(answer)

    def cut(self) -> None:
        self.was_cut.set()

    def close(self, *, goodbye: bool = True) -> None:
        self.closes += 1
        self.goodbyes += goodbye

    def _fail(self) -> None:
        if self.trouble:
            raise self.trouble


class Handlers:
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.allowed = True
        self.trouble: Exception | None = None
        self.withdrawn: set[str] = set()
        self.told_stopped: list[str] = []

    def status(self, request: StatusRequest) -> StatusReply:
        self.gate.wait(10)
        return StatusReply("off", LINE, 0, 0, "0")

    def upload(self, request: UploadRequest) -> UploadReply:
        return UploadReply([UploadItem("item", "receipt", "steps", b"body")], False, 0)

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        return AdapterReply(0, False)

    def learn(self, task: LearnTask) -> LearnReply:
        return LearnReply(task_id=task.task_id, accepted=False, reason="nothing to learn")

    def secure(self, request: SecureRequest) -> SecureReply:
        return SecureReply(request.sum_id, request.phase, refused="alone")

    def may_leave(self, item_ids: Sequence[str]) -> bool:
        if self.trouble:
            raise self.trouble
        return self.allowed and not self.withdrawn & set(item_ids)

    def stopped(self, item_ids: Sequence[str]) -> None:
        self.told_stopped += item_ids


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@pytest.fixture
def line() -> Wire:
    return Wire()


@pytest.fixture
def worker(line: Wire, handlers: Handlers) -> Iterator[NodeWorker]:
    worker = NodeWorker(line, handlers, settings=QUICK)
    yield worker
    worker.stop()


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


def ask(line: Wire) -> None:
    line.inbox.put(Incoming(STATUS, wire.encode(StatusRequest()), None))


def ask_upload(line: Wire) -> None:
    line.inbox.put(Incoming(UPLOAD, wire.encode(UploadRequest([], 100)), None))


def test_messages_are_answered(line: Wire, worker: NodeWorker) -> None:
    worker.start()
    ask(line)
    until(lambda: line.answers)
    assert wire.decode(line.answers[0].payload, StatusReply).level == "off"
    until(lambda: worker.status.messages == 1)
    assert worker.status.state is NodeState.ONLINE


def test_what_nobody_foresaw_does_not_end_the_sync(line: Wire, worker: NodeWorker) -> None:
    worker.start()
    until(lambda: worker.status.state is NodeState.ONLINE)
    line.trouble = KeyError("what the server sent")
    until(lambda: worker.status.state is NodeState.AWAY)
    assert "KeyError" in worker.status.detail
    assert "what the server sent" not in worker.status.detail
    line.trouble = None
    ask(line)
    until(lambda: line.answers)


@pytest.mark.parametrize(
    ("trouble", "state"), [(ServerAway("away"), NodeState.AWAY), (NodeRefused("who?"), NodeState.REFUSED)]
)
def test_after_a_failure_it_connects_again_until_it_works(
    line: Wire, worker: NodeWorker, trouble: Exception, state: NodeState
) -> None:
    worker.start()
    until(lambda: worker.status.state is NodeState.ONLINE)
    line.trouble = trouble
    until(lambda: worker.status.state is state)
    assert worker.status.detail == str(trouble)
    until(lambda: line.connects > 4)
    line.trouble = None
    ask(line)
    until(lambda: line.answers)
    assert worker.status.state is NodeState.ONLINE
    assert line.closes >= 3


def test_a_server_that_was_never_there_does_not_hold_up_the_start(line: Wire, worker: NodeWorker) -> None:
    line.trouble = ServerAway("no route")
    began = time.monotonic()
    worker.start()
    assert time.monotonic() - began < 5
    until(lambda: worker.status.state is NodeState.AWAY)


def test_stopping_closes_the_connection(line: Wire, worker: NodeWorker) -> None:
    worker.start()
    until(lambda: worker.status.state is NodeState.ONLINE)
    assert worker.stop()
    assert line.closes == 1
    assert worker.status.state is NodeState.STOPPED


def test_stopping_does_not_wait_for_the_next_poll(line: Wire) -> None:
    worker = NodeWorker(line, Handlers(), settings=NodeSettings(poll_s=60, quick_s=60))
    worker.start()
    until(lambda: line.polls)
    began = time.monotonic()
    assert worker.stop()
    assert time.monotonic() - began < 5


def test_a_poke_asks_the_server_at_once(line: Wire) -> None:
    worker = NodeWorker(line, Handlers(), settings=NodeSettings(poll_s=60, quick_s=60))
    worker.start()
    until(lambda: line.polls == 1)
    ask(line)
    worker.poke()
    until(lambda: line.answers)
    worker.stop()


def test_a_handler_that_hangs_is_told_of(line: Wire) -> None:
    handlers = Handlers()
    handlers.gate.clear()
    worker = NodeWorker(line, handlers, settings=QUICK)
    worker.start()
    ask(line)
    until(lambda: line.inbox.empty())
    assert not worker.stop(timeout_s=0.1)
    handlers.gate.set()
    until(lambda: worker.status.state is NodeState.STOPPED)


def test_what_may_no_longer_leave_is_cut_in_its_midst_and_told_of(
    line: Wire, handlers: Handlers, worker: NodeWorker
) -> None:
    line.slow = True
    worker.start()
    ask_upload(line)
    assert line.sending.wait(10)
    began = time.monotonic()
    handlers.withdrawn = {"item"}
    until(lambda: handlers.told_stopped)
    assert time.monotonic() - began < 5  # one that is not cut takes ten seconds
    assert (handlers.told_stopped, line.answers, line.goodbyes) == (["item"], [], 0)
    line.slow = False
    ask(line)
    until(lambda: line.answers)


def test_an_upload_goes_on_while_it_may(line: Wire, handlers: Handlers, worker: NodeWorker) -> None:
    line.slow = True
    worker.start()
    ask_upload(line)
    assert line.sending.wait(10)
    assert not line.was_cut.wait(0.5)
    handlers.allowed = False
    assert line.was_cut.wait(1)


def test_while_nothing_may_leave_the_server_is_not_even_called(
    line: Wire, handlers: Handlers, worker: NodeWorker
) -> None:
    handlers.allowed = False
    worker.start()
    until(lambda: line.closes)
    assert (line.connects, line.goodbyes) == (0, 0)
    handlers.allowed = True
    until(lambda: line.connects)


def test_stopping_silently_breaks_off_what_is_sent_and_says_no_goodbye(
    line: Wire, handlers: Handlers, worker: NodeWorker
) -> None:
    line.slow = True
    worker.start()
    ask_upload(line)
    assert line.sending.wait(10)
    assert worker.stop(silent=True)
    assert (line.answers, line.goodbyes) == ([], 0)


def test_what_cannot_be_asked_is_cut(line: Wire, handlers: Handlers, worker: NodeWorker) -> None:
    line.slow = True
    worker.start()
    ask_upload(line)
    assert line.sending.wait(10)
    handlers.trouble = OSError("the disk is gone")
    assert line.was_cut.wait(1)
