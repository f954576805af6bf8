"""Sealed bytes open only with their key, at their place, and unchanged."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared.envelope import Dictionary, derive_key, new_data_key, seal, unseal, unwrap_key, wrap_key
from clawloop_shared.errors import StorageError, WireError

KEY = bytes(range(32))


@given(st.binary(max_size=3000), st.binary(max_size=40))
def test_what_was_sealed_is_opened_again(plain: bytes, aad: bytes) -> None:
    sealed = seal(KEY, plain, aad=aad)
    assert unseal(KEY, sealed, aad=aad) == plain
    assert sealed != seal(KEY, plain, aad=aad)


@given(st.binary(max_size=200), st.data())
def test_any_changed_bit_and_any_cut_is_noticed(plain: bytes, data: st.DataObject) -> None:
    sealed = seal(KEY, plain, aad=b"here")
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    changed = bytearray(sealed)
    changed[bit // 8] ^= 1 << bit % 8
    cut = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    for broken in (bytes(changed), cut, sealed + b"\0"):
        with pytest.raises(StorageError):
            unseal(KEY, broken, aad=b"here")


def test_another_place_or_another_key_opens_nothing_and_tells_nothing() -> None:
    sealed = seal(KEY, b"a secret", aad=b"session one")
    for key, aad in ((KEY, b"session two"), (new_data_key(), b"session one")):
        with pytest.raises(StorageError, match="wrong key or changed") as caught:
            unseal(key, sealed, aad=aad)
        assert "a secret" not in str(caught.value)


def test_wrapped_keys_open_under_their_master_alone() -> None:
    key = new_data_key()
    wrapped = wrap_key(KEY, key, aad=b"scope")
    assert unwrap_key(KEY, wrapped, aad=b"scope") == key
    for master, data, aad in (
        (new_data_key(), wrapped, b"scope"),
        (KEY, wrapped, b"other"),
        (KEY, wrapped[:20], b"scope"),
    ):
        with pytest.raises(StorageError, match="wrong master key"):
            unwrap_key(master, data, aad=aad)


def test_derived_keys_differ_by_purpose_and_salt_and_do_not_give_the_master_away() -> None:
    keys = {derive_key(KEY, "file"), derive_key(KEY, "row"), derive_key(KEY, "file", salt=b"1"), KEY}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}
    assert derive_key(KEY, "file") in keys


@given(plain=st.binary(max_size=3000))
def test_in_buckets_a_size_tells_no_more_than_how_many_they_are(plain: bytes) -> None:
    key = bytes(range(32))
    sealed = seal(key, plain, aad=b"here", bucket_bytes=512)
    assert (len(sealed) - len(seal(key, b"", aad=b"here", bucket_bytes=512))) % 512 == 0
    assert unseal(key, sealed, aad=b"here") == plain


@given(st.binary(max_size=200), st.binary(max_size=2000))
def test_what_has_much_in_common_with_a_dictionary_is_sealed_smaller_and_comes_back(own: bytes, common: bytes) -> None:
    plain, dictionary = common + own + common, Dictionary(common)
    sealed = seal(KEY, plain, aad=b"here", dictionary=dictionary)
    assert unseal(KEY, sealed, aad=b"here", dictionary=Dictionary(common)) == plain
    assert unseal(KEY, seal(KEY, plain, aad=b"here"), aad=b"here", dictionary=dictionary) == plain


def test_what_was_sealed_with_a_dictionary_does_not_open_without_it() -> None:
    common = bytes(range(256)) * 4
    sealed = seal(KEY, common, aad=b"here", dictionary=Dictionary(common))
    assert len(sealed) < 100
    with pytest.raises(WireError, match="do not unpack"):
        unseal(KEY, sealed, aad=b"here")


def test_a_cipher_made_beforehand_does_what_its_key_does() -> None:
    assert unseal(KEY, seal(AESGCM(KEY), b"plain", aad=b""), aad=b"") == b"plain"
    assert unseal(AESGCM(KEY), seal(KEY, b"plain" * 10_000, aad=b""), aad=b"") == b"plain" * 10_000
