"""Texts made to be slow: the time for twice as much must be about twice as long, and never run away."""

import base64
import time

import pytest

from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns

CHARACTERS = 12_000
MAX_S_A_CHARACTER = 100e-6
"""The slowest of these takes a tenth of that on a busy machine; ordinary text a five-hundredth."""
UNITS = (
    "a", "0", " ", "\n", "\\", '"', "key=", "key ", "key: ", "password ", "token(", "api key ", "://", "://a:", "a@",
    "a@b.", "a.", "1 ", "1-", "0.0000, ", "%41", "%C3", "\\n", "\\u0041", "eyJ", "eyJaaaaaaaaa.",
    "-----BEGIN PRIVATE KEY-----", "Bearer ", "curl -u a", "mysql -pa", "1 A St, Aaaa ", "1 Aaa Bbb Ccc ",
    "12 rue de la ", "credentials for x y z ", "AA00 ", "::", "a:", "0:0:", "aa:", "$6$aaaaaaaa", "phone: 1",
    "call me ", "born on ", "seed phrase: abc ", "WIFI:P:", "cookie: a=b;", "A1 ", '"key": "value", ', "ghp_aaaa",
    "c2VjcmV0", "secret: |\n  ", "<password>", "name: token\nvalue: ", "straße 1", "Via A 1", "lat: 1.00000,", "°",
    "1°1'", "code 1", "card 4", "plate A", "x at y dot ", "(at)", "0000 ", "+1-", "T3BlbkFJ", "-us1", "Q~", "SK", "M",
    "AKIA aaaa", "print(token)\n", "backup code a1b2-", "/home/a", "İ", "\udc80",
)  # fmt: skip


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(patterns())


def seconds(detector: Detector, text: str) -> float:
    start = time.process_time()
    detector.find(text)
    return time.process_time() - start


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_no_repeated_piece_makes_a_search_slow(detector: Detector, unit: str) -> None:
    text = (unit * CHARACTERS)[:CHARACTERS]
    assert seconds(detector, text) < CHARACTERS * MAX_S_A_CHARACTER


@pytest.mark.parametrize("unit", ["key=", "cookie: a=b;", "-----BEGIN PRIVATE KEY-----", "a", "0", "\\u0041", "eyJ"])
def test_the_time_grows_with_the_length_and_not_with_its_square(detector: Detector, unit: str) -> None:
    seconds(detector, unit * 100)
    short = min(seconds(detector, (unit * 8_000)[:8_000]) for _ in range(3))
    long = min(seconds(detector, (unit * 32_000)[:32_000]) for _ in range(2))
    assert long < 10 * short + 0.05


def test_a_long_run_of_base64_within_base64_is_read_no_deeper_than_two_levels(detector: Detector) -> None:
    text = "password: hunter2secret"
    for _ in range(2):
        text = base64.b64encode(text.encode()).decode()
    assert detector.find(text)
    for _ in range(2):
        text = base64.b64encode(text.encode()).decode()
    assert not detector.find(text)
