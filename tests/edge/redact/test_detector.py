"""What the detector finds, what it leaves alone, and where exactly it says that something stands."""

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns
from clawloop_edge.privacy.redact.values import Value

HEX40 = "3f9a81c2d47e6b05a3f9c8d12e74b6a05f3c9d81"
DISCORD = "MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs"
GITHUB = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"
GOOGLE = "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY"


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(patterns())


def found(detector: Detector, text: str) -> list[str]:
    """The stretches of the text that would be taken out."""
    return [text[start:end] for start, end, _ in detector.find(text)]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"here is the token {HEX40}, use it", HEX40),
        (f"{HEX40} is our deploy key", HEX40),
        (f"the bot runs as {DISCORD} now", DISCORD),
        (f'{{\\"github_token\\": \\"{GITHUB}\\"}}', GITHUB),
        (f"text\\n{GITHUB}\\nmore", GITHUB),
        ("redis://:p4ssw0rd!@cache.corp.io:6379/0", "p4ssw0rd!"),
        ("call me at 555-0132 tonight", "555-0132"),
        (f"https://maps.googleapis.com/x?key={GOOGLE}&q=1", GOOGLE),
        (f"git clone https://{GITHUB}@github.com/a/b", GITHUB),
    ],
)
def test_what_other_packs_missed_is_found(detector: Detector, text: str, secret: str) -> None:
    assert found(detector, text) == [secret]


def test_a_session_token_of_320_characters_is_found_whole(detector: Detector) -> None:
    token = base64.b64encode(bytes(i * 89 % 251 for i in range(240))).decode()
    assert len(token) == 320
    assert found(detector, f'session_token = "{token}"') == [token]
    assert found(detector, f"session_token={token}") == [token]


@pytest.mark.parametrize(
    "text",
    [
        "def login(password: str, token: str | None = None) -> Session:",
        "self.password = config.password; token = get_token(user)",
        "api_key = os.environ['API_KEY']",
        "password: ${DB_PASSWORD}",
        "API_KEY=your-api-key-here",
        "commit 3f9a81c2d47e6b05a3f9c8d12e74b6a05f3c9d81",
        '"integrity": "sha512-9dKhlsgk1hXqU8Tz9vK0aYF8bqK4nJ9gq8x7c3m2L1pQw5Er6tYu7iOp8aSd9fGh0jKl1zXc2vBn3mQw4e5r=="',
        "finished in 120 tokens: chatcmpl-81dfm1U9JxPns7kDBQeeGZiFODoqk",
        "Runtime: agent=main | session=agent:main:t1 | sessionId=39c40423-8beb-4611-870b-872fc6df2021",
        '"prompt_cache_key": "0ff06c96-3aed-4c8a-8b8f-64a47518987f:0"',
        "version 10.0.19041.1, 127.0.0.1:8080, 255.255.255.0",
        "2026-03-01T12:00:00.123Z 1700000000 [0.123456, 0.234567, 0.345678]",
        "icon@2x.png, git@github.com:a/b.git, @decorator",
        "max_tokens: 4096, key: value, std::vector<int>, 12:30:45",
        "| `SMTP_PASSWORD` | `smtpPassword` |",
        "Give your password; then the token is sent.",
    ],
)
def test_code_ids_and_placeholders_are_left_alone(detector: Detector, text: str) -> None:
    assert found(detector, text) == []


def test_a_value_that_its_name_gave_away_is_found_wherever_it_stands(detector: Detector) -> None:
    text = "password: hunter2secret\nI typed hunter2secret twice, not xhunter2secretx"
    assert found(detector, text) == ["hunter2secret", "hunter2secret"]


def test_texts_that_are_searched_together_share_what_one_of_them_gives_away(detector: Detector) -> None:
    spans = detector.find_all(["is it hunter2secret?", "no word here", "password: hunter2secret"])
    assert [[span[:2] for span in each] for each in spans] == [[(6, 19)], [], [(10, 23)]]
    assert detector.find("is it hunter2secret?") == []


def test_an_ordinary_word_is_not_looked_for_elsewhere_because_it_was_a_password_once(detector: Detector) -> None:
    text = "password: 'sunshine'\nWhat a sunshine today"
    assert found(detector, text) == ["sunshine"]


@pytest.mark.parametrize("secret", ["hunter2secret", GITHUB, "pässwört-42", 'say "42"!'])
def test_what_is_hidden_by_json_is_marked_where_it_stands(detector: Detector, secret: str) -> None:
    inner = json.dumps({"password": secret})
    text = json.dumps({"text": inner, "more": "x"})
    (span,) = detector.find(text)
    assert json.loads(text.replace(text[span.start : span.end], "X"))["text"] == json.dumps({"password": "X"})


def test_what_is_hidden_by_percent_codes_is_marked_where_it_stands(detector: Detector) -> None:
    text = "GET /login?msg=" + quote("password=hünter2!secret&user=x", safe="")
    assert found(detector, text) == [quote("hünter2!secret", safe="")]


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, bytes.hex])
def test_base64_and_hex_that_hold_a_secret_are_taken_out_whole(
    detector: Detector, encode: Callable[[bytes], bytes | str]
) -> None:
    encoded = encode(b'{"user": "jana", "password": "hunter2secret?>~"}')
    blob = encoded if isinstance(encoded, str) else encoded.decode()
    assert found(detector, f"data: {blob} end") == [blob]


def test_base64_of_several_lines_is_read_as_one(detector: Detector) -> None:
    blob = base64.encodebytes(
        b"some text before it\nAPI_TOKEN=" + GITHUB.encode() + b"\nand more behind it, to fill lines"
    )
    text = f"base64 file\n{blob.decode()}$ "
    (span,) = detector.find(text)
    assert text[span.start : span.end].strip() == blob.decode().strip()


def test_base64_of_pictures_and_of_plain_text_stays(detector: Detector) -> None:
    picture = base64.b64encode(bytes([0x89, 0x50, 0x4E, 0x47, *range(256)])).decode()
    prose = base64.b64encode(b"a long and harmless sentence about gardens").decode()
    assert found(detector, f"data:image/png;base64,{picture} {prose}") == []


def test_powershell_commands_are_read(detector: Detector) -> None:
    blob = base64.b64encode("$env:DB_PASSWORD = 'hunter2secret'".encode("utf-16-le")).decode()
    assert found(detector, f"powershell -enc {blob}") == [blob]


def test_a_private_key_is_taken_out_from_begin_to_end_also_when_it_is_cut_off(detector: Detector) -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEAx7Tq\n" * 8 + "-----END RSA PRIVATE KEY-----"
    assert found(detector, f"see:\n{key}\nbye") == [key]
    assert found(detector, json.dumps(key)[1:-1]) == [json.dumps(key)[1:-1]]
    cut = key[: key.index("-----END")]
    assert found(detector, f"see:\n{cut}") == [cut]


def test_lone_surrogates_and_strange_letters_move_no_place(detector: Detector) -> None:
    text = "İ ſ \udc80\ud83d ß password: hunter2secret \udc80 İ hunter2secret"
    assert found(detector, text) == ["hunter2secret", "hunter2secret"]


def test_known_values_are_found_raw_encoded_and_within_other_base64(detector: Detector) -> None:
    secret = "correct-horse/7 battery"
    known = Detector(patterns(), [Value(secret, "known-secret")])
    binary = base64.b64encode(b"\x00\xff\x01" + secret.encode() + b"\xfe\x02").decode()
    for form in (secret, json.dumps(secret), quote(secret, safe=""), secret.encode().hex()):
        text = f"<< {form} >>"
        assert [span.kind for span in known.find(text)] == ["known-secret"], form
    (span,) = known.find(f"blob {binary} end")
    assert span.kind == "known-secret"
    assert detector.find(f"<< {secret} >>") == []


def test_own_words_are_found_in_any_case_as_whole_words() -> None:
    detector = Detector(patterns(), words=["Bluebird", "Žižkov 12"])
    text = "BLUEBIRD and bluebird's plan (bluebirds stay) at žižkov 12."
    assert found(detector, text) == ["BLUEBIRD", "bluebird", "žižkov 12"]


PIECES = (
    "password: ", "hunter2secret", "\n", " ", "\\n", '"', "\\", "%41", "=", "&", "jana@corp.io", GITHUB, "İ", "\udc80",
    "é", "cGFzc3dvcmQ6IGh1bnRlcjJzZWNyZXQ=", "+49 171 1234567", "://a:b1!c@d", "key", "{", "}", "a", "0",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_spans_are_sorted_within_the_text_and_apart(pieces: list[str]) -> None:
    text = "".join(pieces)
    spans = Detector(patterns()).find(text)
    at = 0
    for span in spans:
        assert at <= span.start < span.end <= len(text)
        at = span.end
    assert spans == Detector(patterns()).find(text)


@pytest.mark.parametrize("unseen", ["\u200b", "\u00ad\u200d", "\ufeff", "\u2063", "\U000e0041"])
def test_a_secret_with_characters_inside_that_nobody_sees_is_one_all_the_same(detector: Detector, unseen: str) -> None:
    hidden = GITHUB[:9] + unseen + GITHUB[9:30] + unseen + GITHUB[30:]
    assert found(detector, f"é\nfirst\nuse {hidden} here\nlast") == [hidden]
    assert found(detector, f"a family {unseen} and no secret") == []
