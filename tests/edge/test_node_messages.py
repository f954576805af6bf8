"""The device answers a fixed set of messages, and tells nothing of itself in an error."""

from collections.abc import Sequence

import pytest

from clawloop_edge.node.messages import answer
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.errors import WireError
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import (
    ADAPTER,
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    Invitation,
    ItemReceipt,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadItem,
    UploadReply,
    UploadRequest,
    read_invitation,
    write_invitation,
)
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")


class Handlers:
    """Notes what it was asked."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.more = False

    def status(self, request: StatusRequest) -> StatusReply:
        self.called.append(f"status {request.cohort}")
        return StatusReply("full", LINE, 3, 1, "0.1")

    def upload(self, request: UploadRequest) -> UploadReply:
        self.called.append(f"upload {len(request.receipts)}")
        return UploadReply([UploadItem("i", "r", "steps", b"body")], self.more, 3)

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        self.called.append("adapter")
        raise ValueError("a secret of the user")

    def learn(self, task: LearnTask) -> LearnReply:
        return LearnReply(task_id=task.task_id, accepted=False, reason="nothing to learn")

    def secure(self, request: SecureRequest) -> SecureReply:
        return SecureReply(request.sum_id, request.phase, refused="alone")

    def may_leave(self, item_ids: Sequence[str]) -> bool:
        return True

    def stopped(self, item_ids: Sequence[str]) -> None:
        """Nothing is sent here."""


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


def test_each_message_goes_to_its_handler(handlers: Handlers) -> None:
    status = answer(STATUS, wire.encode(StatusRequest(cohort=7)), handlers=handlers)
    assert wire.decode(status.payload, StatusReply).adapter_version == 3
    assert status.items == ()
    upload = answer(UPLOAD, wire.encode(UploadRequest([ItemReceipt(b"p", b"s")], 100)), handlers=handlers)
    assert wire.decode(upload.payload, UploadReply).items[0].body == b"body"
    assert upload.items == ("i",)
    assert handlers.called == ["status 7", "upload 1"]


@pytest.mark.parametrize("kind", ["train", "query.shell", "query.upload2", "", "query"])
def test_an_unknown_type_is_refused_and_nothing_runs(handlers: Handlers, kind: str) -> None:
    given = answer(kind, wire.encode(StatusRequest()), handlers=handlers)
    assert given.error == "unknown message type"
    assert given.payload == b""
    assert handlers.called == []


@pytest.mark.parametrize("payload", [b"", b"rubbish", wire.encode(UploadRequest([], 1))])
def test_a_payload_of_another_kind_is_refused_and_nothing_runs(handlers: Handlers, payload: bytes) -> None:
    assert answer(STATUS, payload, handlers=handlers).error == "WireError"
    assert handlers.called == []


def test_a_failing_handler_becomes_an_error_without_its_words(
    handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    offer = AdapterOffer(SignedManifest(b"m", "k", b"s"), {"f": b"x"})
    given = answer(ADAPTER, wire.encode(offer), handlers=handlers)
    assert given.error == "ValueError"
    assert "secret" not in caplog.text
    assert "ValueError" in caplog.text


def test_only_a_device_with_nothing_more_to_send_rests(handlers: Handlers) -> None:
    request = wire.encode(UploadRequest([], 1))
    assert not answer(UPLOAD, request, handlers=handlers).eager
    handlers.more = True
    assert answer(UPLOAD, request, handlers=handlers).eager


def test_an_invitation_survives_being_wrapped_by_a_mail_program() -> None:
    invitation = Invitation("https://example.org:8443", "-----BEGIN CERTIFICATE-----\nabc\n", b"k" * 32, "code")
    text = write_invitation(invitation)
    assert "\n" not in text
    wrapped = "\n  ".join(text[i : i + 60] for i in range(0, len(text), 60))
    assert read_invitation(f"  {wrapped}\n") == invitation


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-20], lambda t: t[20:], lambda t: t.replace("invite:", "invite:!"), str.upper]
)
def test_a_damaged_invitation_is_named_as_such(damage) -> None:  # type: ignore[no-untyped-def]
    text = write_invitation(Invitation("https://example.org", "pem", b"k" * 32, "code"))
    with pytest.raises(WireError, match="copy the whole line"):
        read_invitation(damage(text))
