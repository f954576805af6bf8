"""A transport that first asks how this device stands with its server, and again now and then.

So that `status` can say why a device is not served: it waits to be approved, was revoked, another edge has its keys,
the clock here is off, or it is not the server that was joined. Knows no Flower: it wraps whatever transport does.
"""

import os
import threading
import time
from collections.abc import Callable

from clawloop_edge.node.hub_api import HubRefused, post
from clawloop_edge.node.join import Membership
from clawloop_edge.node.transport import (
    Answer,
    ClockOff,
    Incoming,
    NodeRefused,
    Permit,
    ServerAway,
    Taken,
    Transport,
    Waiting,
)
from clawloop_shared import signing, wire
from clawloop_shared.errors import ClawloopError, InvalidError
from clawloop_shared.membership import (
    MAX_MEMBER_BYTES,
    RELEASE,
    STANDING_ANSWER_DOMAIN,
    STANDING_DOMAIN,
    STANDING_PATH,
    Stand,
    Standing,
    StandingRequest,
    open_answer,
    open_statement,
    sign_request,
)
from clawloop_shared.messages import SignedAnswer

EVERY_S = 300.0
SILENT_MS = 3 * 300_000
"""an edge that has not asked for so long does not serve any more"""
NEWS_MS = 3_600_000
"""for so long it is told that another edge with our keys was there"""
AHEAD_MS, BEHIND_MS = 4_000, 295_000
"""how far the clock here may be off: Flower takes timestamps from 5 s ahead to 305 s behind (flwr 1.41)"""

COPIED = "an edge with a copy of this home; leave and join again with one of them"


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_instance() -> str:
    """A name for a running edge."""
    return os.urandom(8).hex()


def waiting_words(member: Membership) -> str:
    """What to tell a person while the operator has not approved this device."""
    return f"waiting for the operator: compare these words: {signing.key_words(member.keys.public)}"


def ask_standing(member: Membership, instance: str, *, takes: bool, at_ms: int, timeout_s: float = 30.0) -> Standing:
    """The server's word on this device.

    Raises:
        ServerAway: nobody answers, or not now.
        NodeRefused: the server does not know these keys, or is not the one that was joined.
        NodeError: another server answers there.
    """
    request = StandingRequest(device_id=member.device_id, at_ms=at_ms, instance=instance, takes=takes)
    body = wire.encode(sign_request(request, STANDING_DOMAIN, private_key=member.device_key))
    url, ca_pem = member.url, member.ca_pem
    try:
        data = post(
            url, STANDING_PATH, ca_pem=ca_pem, body=body, max_bytes=MAX_MEMBER_BYTES, timeout_s=timeout_s, any_time=True
        )
    except HubRefused as error:
        raise NodeRefused(f"{error}; was it deleted there, or were its keys rotated in another copy?") from error
    try:
        signed = wire.decode(data, SignedAnswer, max_bytes=MAX_MEMBER_BYTES)
        found = open_answer(signed, STANDING_ANSWER_DOMAIN, kind=Standing, public_key=member.release_key)
    except ClawloopError as error:
        raise NodeRefused(f"{url} does not prove that it is the server that was joined: {error}") from error
    if (found.device_id, found.instance) != (member.device_id, instance):
        raise NodeRefused(f"{url} answered for another device ({found.device_id}); is it the server that was joined?")
    return found


class MemberTransport:
    """Another transport, behind the question how this device stands."""

    def __init__(
        self,
        inner: Transport,
        member: Membership,
        *,
        instance: str,
        note: Callable[[Standing], None] = lambda _: None,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        """`instance` names the running edge; `note` is told what the server says."""
        self._inner, self._member, self._instance, self._note = inner, member, instance, note
        self._every_s, self._clock, self._now_ms = every_s, clock, now_ms
        self._took = self._taken = self._was_cut = False
        self._due_s = float("-inf")
        self._lock = threading.Lock()
        self._warning = ""

    @property
    def warning(self) -> str:
        """What is odd though we are served; empty if nothing is."""
        with self._lock:
            return self._warning

    def connect(self) -> None:
        """Ask, then become reachable. Raises what `Transport.connect` does, and Waiting, Taken, ClockOff."""
        self._was_cut = False
        self._ask()
        try:
            self._inner.connect()
        except NodeRefused as error:  # the hub knows us and our clock is right, so its Flower is behind
            raise ServerAway(f"the server is about to let this device in ({error})") from error

    def receive(self) -> Incoming | None:
        """The next message, or None."""
        if self._clock() >= self._due_s and not self._was_cut:
            self._ask()
        return self._inner.receive()

    def send(self, incoming: Incoming, answer: Answer, *, permit: Permit) -> None:
        """Answer a message."""
        self._inner.send(incoming, answer, permit=permit)

    def cut(self) -> None:
        """Break off whatever is being sent; nothing more is asked either."""
        self._was_cut = True
        self._inner.cut()

    def close(self, *, goodbye: bool = True) -> None:
        """Free what was held. No goodbye while another edge has our keys: it would be put out by it."""
        self._inner.close(goodbye=goodbye and not self._taken)

    def _ask(self) -> None:
        found = self._heard(takes=not self._took)
        if found.state is Stand.JOINED and not found.holds and found.at_ms - found.held_ms > SILENT_MS:
            found = self._heard(takes=True)
        self._note(found)
        self._judge(found)
        self._due_s = self._clock() + self._every_s

    def _heard(self, *, takes: bool) -> Standing:
        asked_ms = self._now_ms()
        found = ask_standing(self._member, self._instance, takes=takes, at_ms=asked_ms)
        self._check_clock(found.at_ms, asked_ms=asked_ms, heard_ms=self._now_ms())
        self._check_release_key(found)
        return found

    def _check_clock(self, server_ms: int, *, asked_ms: int, heard_ms: int) -> None:
        ahead_ms, behind_ms = asked_ms - server_ms, server_ms - heard_ms
        if ahead_ms > AHEAD_MS or behind_ms > BEHIND_MS:
            off = f"ahead by {_span(ahead_ms)}" if ahead_ms > 0 else f"behind by {_span(behind_ms)}"
            raise ClockOff(f"this device's clock is {off} of {self._member.url}'s; set it, and sync goes on by itself")

    def _check_release_key(self, found: Standing) -> None:
        statement = found.statement or self._member.statement  # without a new word, the old one holds until it is over
        if statement is None:
            raise NodeRefused(f"{self._member.url} shows no word of its root key; is it the server that was joined?")
        try:
            said = open_statement(statement, self._member.root_key, purpose=RELEASE, now_ms=self._now_ms())
        except InvalidError as error:
            raise NodeRefused(f"{self._member.url} does not have the root key that was compared: {error}") from error
        if said.key != self._member.release_key:
            raise NodeRefused(
                f"{self._member.url} has another release key, and this device takes none but the one that it joined "
                "with; leave, and join again with a new invitation"
            )

    def _judge(self, found: Standing) -> None:
        if found.state is Stand.WAITING:
            raise Waiting(waiting_words(self._member))
        if found.state is not Stand.JOINED:
            how = "the operator lets it sync no more" if found.state is Stand.REVOKED else "it has left"
            raise NodeRefused(f"{self._member.url} serves this device no more: {how}; ask for a new invitation")
        self._taken = not found.holds
        if self._taken:
            raise Taken(f"another edge has come in with this device's keys: {COPIED}")
        self._took = True
        rival = found.rival_ms and found.at_ms - found.rival_ms < NEWS_MS
        with self._lock:
            self._warning = f"another edge tries to come in with this device's keys: {COPIED}" if rival else ""


def _span(ms: int) -> str:
    hours = ms / 3_600_000
    return f"{hours:.1f} h" if hours >= 1 else f"{ms / 1000:.0f} s"
