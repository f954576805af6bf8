"""Redaction of token ids: nothing moves, nothing of a secret stays, whatever ids the text is made of."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_edge.privacy.redact.tokens import PLACEHOLDER, TokenTable, redact_ids, runs, turns
from clawloop_shared.errors import ConfigError

ROOT = Path(__file__).parents[3]
DEMO_MODEL = ROOT / "scripts" / "demoworld" / "model"
TABLE = TokenTable.of(DEMO_MODEL)
SEQUENCES = 1_000
"""over all models"""
SECRETS = (
    "sk-proj-9fK2mQ7xT4bW",
    "pässwörd-Ω-😀-geheim",
    "AKIA2E0A8F3B244C9986",
    "東京都千代田区1-1",
    "alice@example.org",
)
FILLER = (
    "the tool said ",
    "café ",
    "😀",
    "\n",
    '{"key": "',
    '"}',
    "Ōsaka",
    " ",
    "x",
    "ß",
    "、",
    "0",
    "…",
    "a b c d e f ",
)


class Match(NamedTuple):
    start: int
    end: int


class Model(NamedTuple):
    """A folder, its table, and the tokenizer that decodes for real."""

    folder: Path
    table: TokenTable
    backend: Any

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))


def exactly(*secrets: str) -> Callable[[str], Iterator[Match]]:
    """A search that finds these texts wherever they stand."""

    def find(text: str) -> Iterator[Match]:
        for secret in secrets:
            at = text.find(secret)
            while at >= 0:
                yield Match(at, at + len(secret))
                at = text.find(secret, at + 1)

    return find


def save_model(folder: Path, backend: Any, *, rows: int = 0, **settings: Any) -> Path:
    """A folder with this tokenizer and just enough beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": rows or backend.get_vocab_size(), "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_byte_fallback(folder: Path) -> Path:
    """A vocabulary as sentencepiece's BPE makes it: `▁` for spaces, `<0x0A>` for bytes of rare characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    letters = sorted({c for text in (*SECRETS[:1], *SECRETS[2:3], *FILLER) for c in text if c.isascii() and c != " "})
    merges = [
        ("\u2581", "t"),
        ("t", "h"),
        ("s", "k"),
        ("k", "e"),
        ("o", "l"),
        ("A", "K"),
        ("AK", "I"),
        ("\u2581t", "h"),
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    backend.add_special_tokens([AddedToken("<|turn|>", normalized=False)])
    return save_model(folder, backend, bos_token="<s>", eos_token={"content": "</s>"}, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tokenizers import Tokenizer

    folder = DEMO_MODEL if request.param == "byte-level" else with_byte_fallback(tmp_path_factory.mktemp("fallback"))
    return Model(folder, TokenTable.of(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))


def planted(rng: random.Random) -> tuple[str, list[str]]:
    """A text with one to four secrets at random places, some of them next to each other or cut by other characters."""
    secrets = [rng.choice(SECRETS) for _ in range(rng.randint(1, 4))]
    parts = [rng.choice(FILLER) for _ in range(rng.randint(0, 30))]
    for secret in secrets:
        parts.insert(rng.randint(0, len(parts)), secret)
    return "".join(parts), secrets


def any_ids_of(data: bytes, table: TokenTable, *, rng: random.Random) -> list[int]:
    """Ids with these bytes, chosen at random: what no tokenizer would choose, but a model may sample."""
    by_bytes: dict[bytes, list[int]] = {}
    for number, piece in enumerate(table.pieces):
        if piece and number != table.reserved_id and number not in table.special_ids:
            by_bytes.setdefault(piece, []).append(number)
    longest = max(map(len, by_bytes))
    found, at = [], 0
    while at < len(data):
        sizes = [size for size in range(1, longest + 1) if data[at : at + size] in by_bytes and at + size <= len(data)]
        size = rng.choice(sizes)
        found.append(rng.choice(by_bytes[data[at : at + size]]))
        at += size
    return found


def sequence(model: Model, rng: random.Random) -> tuple[list[int], list[str]]:
    """Ids of several turns with secrets in them: the tokenizer's own, or any others, or both, with noise between."""
    ids: list[int] = []
    secrets: list[str] = []
    for _ in range(rng.randint(1, 4)):
        text, found = planted(rng)
        canonical = rng.random() < 0.5
        ids += model.backend.encode(text, add_special_tokens=False).ids if canonical else any_ids_of(
            text.encode(), model.table, rng=rng
        )  # fmt: skip
        if rng.random() < 0.2:  # what a model may sample too: half a character, an id without text
            ids += [rng.randrange(len(model.table.pieces) + 3) for _ in range(rng.randint(1, 5))]
        secrets += found
        ids.append(rng.choice(sorted(model.table.special_ids)))
    return ids, secrets


def tokens_with(ids: Sequence[int], table: TokenTable, secrets: Sequence[str]) -> set[int]:
    """Places of the tokens that have a byte of a secret, found the slow way."""
    hit: set[int] = set()
    for start, end in turns(ids, table.special_ids):
        pieces = [table.pieces[number] if number < len(table.pieces) else b"" for number in ids[start:end]]
        owner = [start + place for place, piece in enumerate(pieces) for _ in piece]
        data = b"".join(pieces)
        for secret in map(str.encode, secrets):
            at = data.find(secret)
            while at >= 0:
                hit |= set(range(owner[at], owner[at + len(secret) - 1] + 1))
                at = data.find(secret, at + 1)
    return hit


def test_a_thousand_sequences_keep_their_length_and_lose_their_secrets(model: Model) -> None:
    rng, table = random.Random(20_261_122), model.table
    for _ in range(SEQUENCES // 2):
        ids, secrets = sequence(model, rng)
        find = exactly(*secrets)
        for strict in (False, True):
            done = redact_ids(ids, table, find=find, strict=strict)
            assert len(done.ids) == len(ids)
            assert redact_ids(done.ids, table, find=find, strict=strict) == done
            replaced = {at for at, number in enumerate(done.ids) if number == table.reserved_id}
            assert replaced == {at for start, length in done.spans for at in range(start, start + length)}
            assert all(new == old for new, old in zip(done.ids, ids, strict=True) if new != table.reserved_id)
            decoded = model.decode([number for number in done.ids if number < len(table.pieces)])
            assert not any(secret in decoded for secret in secrets)
            must = tokens_with(ids, table, secrets)
            assert must <= replaced
            if not strict:
                assert replaced - must <= {at for at, number in enumerate(ids) if number == table.reserved_id}


def test_the_length_of_a_run_tells_only_how_long_it_is_about(model: Model) -> None:
    rng, table = random.Random(7), model.table
    for _ in range(100):
        ids, secrets = sequence(model, rng)
        done = redact_ids(ids, table, find=exactly(*secrets))
        whole = {(start, end - start) for start, end in turns(done.ids, table.special_ids)}
        assert all(length in (4, 8, 16, 32, 64, 128, 256) or (start, length) in whole for start, length in done.spans)


def test_text_of_ids_is_what_the_tokenizer_decodes(model: Model) -> None:
    rng, table = random.Random(3), model.table
    plain = [n for n in range(len(table.pieces)) if n not in table.special_ids and n != table.reserved_id]
    for _ in range(300):
        text, _ = planted(rng)
        ids = any_ids_of(text.encode(), table, rng=rng) if rng.random() < 0.5 else rng.choices(plain, k=1)
        shown = table.view(ids).text
        if "\ufffd" not in shown:
            assert shown.removeprefix(" ") == model.decode(ids).removeprefix(" ")


def test_a_search_never_sees_half_a_character() -> None:
    table = TABLE
    seen: list[str] = []
    half = [table.pieces.index(bytes([byte])) for byte in "😀".encode()[:2]]

    def find(text: str) -> list[Match]:
        seen.append(text)
        return []

    redact_ids([*half, table.reserved_id], table, find=find, strict=False)
    assert seen == [f"\ufffd\ufffd{PLACEHOLDER}"]
    seen[0].encode()


@given(st.lists(st.integers(0, 1_540), max_size=60), st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_is_found_the_result_is_at_rest(ids: list[int], data: st.DataObject) -> None:
    every = data.draw(st.integers(2, 9))

    def find(text: str) -> list[Match]:  # a search that finds new things in what it is given back
        return [
            Match(at, at + 1) for at, c in enumerate(text) if c != PLACEHOLDER and (ord(c) + len(text)) % every == 0
        ]

    done = redact_ids(ids, TABLE, find=find)
    assert redact_ids(done.ids, TABLE, find=find) == done
    assert len(done.ids) == len(ids)


def test_a_search_that_never_rests_takes_the_turn_out_whole() -> None:
    table = TABLE
    ids = list(range(100, 200))
    one_more = redact_ids(
        ids, table, find=lambda text: [Match(text.rfind(PLACEHOLDER) + 1, text.rfind(PLACEHOLDER) + 2)], strict=False
    )
    assert one_more.ids == [table.reserved_id] * 100


def test_what_is_found_in_one_turn_does_not_touch_the_next() -> None:
    from tokenizers import Tokenizer

    table, backend = TokenTable.of(DEMO_MODEL), Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    ids = backend.encode(
        "<|im_start|>user\nkey SECRET<|im_end|>\n<|im_start|>assistant\nok", add_special_tokens=False
    ).ids
    done = redact_ids(ids, table, find=exactly("SECRET"))
    kept = backend.decode([number for number in done.ids if number != table.reserved_id], skip_special_tokens=False)
    assert kept.startswith("<|im_start|>")
    assert kept.endswith("<|im_end|>\n<|im_start|>assistant\nok")
    assert len(done.spans) == 1


def test_empty_ids_and_empty_finds_change_nothing() -> None:
    table = TABLE
    assert redact_ids([], table, find=lambda text: [Match(0, 0)]).ids == []
    assert redact_ids([300, 301], table, find=lambda text: [Match(1, 1)]).spans == []


def test_runs_are_found_at_both_ends() -> None:
    assert runs([3, 3, 5, 3], 3) == [(0, 2), (3, 1)]
    assert runs([5], 3) == []


# The reserved id.


def small_backend(*added: tuple[str, bool]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    backend = Tokenizer(BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    for name, special in added:
        (backend.add_special_tokens if special else backend.add_tokens)([AddedToken(name, normalized=False)])
    return backend


@pytest.mark.parametrize(
    ("added", "rows", "chosen"),
    [
        ([("<s>", True), ("<|reserved_special_token_0|>", True), ("<|redacted|>", True)], 0, "<|redacted|>"),
        ([("<s>", True), ("<box>", True), ("<|reserved_special_token_0|>", True)], 0, "<|reserved_special_token_0|>"),
        ([("<s>", True), ("<turn>", True), ("<box>", True), ("<pad>", True)], 0, "<box>"),
        ([("<s>", True), ("<turn>", True), ("<pad>", True), ("<think>", False)], 0, "<pad>"),
        ([("<s>", True), ("<unk>", True)], 0, "<unk>"),
        ([("<unk>", True), ("<|redacted|>", True)], 4, "<unk>"),
    ],
)
def test_the_reserved_id_is_the_first_of_its_kind(
    tmp_path: Path, added: list[tuple[str, bool]], rows: int, chosen: str
) -> None:
    backend = small_backend(*added)
    roles = {
        "bos_token": "<s>",
        "pad_token": {"content": "<pad>"},
        "unk_token": "<unk>",
        "chat_template": "<turn>{{x}}",
    }
    folder = save_model(tmp_path, backend, rows=rows, **roles)
    table = TokenTable.of(folder)
    assert table.reserved_id == backend.token_to_id(chosen)
    assert table.reserved_id not in table.special_ids


def test_the_demo_model_has_a_token_named_for_it() -> None:
    assert TokenTable.of(DEMO_MODEL).reserved_id == 3


def test_a_model_without_a_token_to_spare_cannot_redact(tmp_path: Path) -> None:
    folder = save_model(tmp_path, small_backend(("<s>", True)), bos_token="<s>")
    with pytest.raises(ConfigError, match=r"no special token to redact with; choose a level below `redacted`"):
        TokenTable.of(folder)


def test_a_tokenizer_whose_ids_have_no_bytes_is_refused(tmp_path: Path) -> None:
    from tokenizers import decoders

    backend = small_backend(("<|redacted|>", True))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="does not know how the decoder WordPiece makes text"):
        TokenTable.of(save_model(tmp_path, backend))


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="redaction needs the model's tokenizer"):
        TokenTable.of(tmp_path)
