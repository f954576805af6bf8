"""The safetensors header and the LoRA configuration are checked in full before a framework sees them."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.lora import ModelShape, check_tensors, expected_tensors, parse_config
from clawloop_shared.safetensors_header import read_header

SHAPE = ModelShape(
    hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4
)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def pack(header: dict[str, Any] | str, body: bytes) -> bytes:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def whole(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return pack(header, bytes(at))


def test_a_sound_adapter_passes() -> None:
    config = parse_config(json.dumps(CONFIG).encode())
    tensors = read_header(whole(expected_tensors(config, SHAPE)), max_bytes=1 << 20)
    check_tensors(tensors, config, shape=SHAPE)
    assert len(tensors) == 2 * 2 * 2
    assert config.scale == 2.0


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        pack("[]", b""),
        pack('{"a":1,"a":2}', b""),
        pack('{"a":NaN}', b""),
        pack("[" * 100_000, b""),
        pack({"a": ONE}, b""),
        pack({"a": ONE}, bytes(5)),
        pack({"a": ONE, "b": ONE}, bytes(4)),
        pack({"a": {**ONE, "dtype": "F99"}}, bytes(4)),
        pack({"a": {**ONE, "shape": [-1]}}, bytes(4)),
        pack({"a": {**ONE, "shape": [True]}}, bytes(4)),
        pack({"a": {**ONE, "shape": [2**62, 2**62]}}, bytes(4)),
        pack({"a": {**ONE, "shape": [0], "data_offsets": [0, 0]}}, b""),
        pack({"a": {**ONE, "more": 1}}, bytes(4)),
        pack({"a": {**ONE, "data_offsets": [4, 8]}}, bytes(8)),
    ],
)
def test_a_header_that_is_not_exactly_right_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterInvalid):
        read_header(data, max_bytes=1 << 20)


def test_a_file_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(AdapterInvalid, match="limit is 10"):
        read_header(bytes(11), max_bytes=10)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(AdapterInvalid):
        read_header(struct.pack("<Q", len(data)) + data + b"x", max_bytes=1 << 20)


@pytest.mark.parametrize("change", ["missing", "extra", "transposed"])
def test_tensors_that_do_not_fit_the_base_are_refused(change: str) -> None:
    config = parse_config(json.dumps(CONFIG).encode())
    tensors: dict[str, tuple[int, ...]] = dict(expected_tensors(config, SHAPE))
    name = next(iter(tensors))
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["lm_head.weight"] = (2, 2)
    else:
        tensors[name] = tensors[name][::-1]
    with pytest.raises(AdapterInvalid):
        check_tensors(read_header(whole(tensors), max_bytes=1 << 20), config, shape=SHAPE)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": ["none"]},
        {"layers_pattern": {"a": 1}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"r": 0},
        {"r": 10_000},
        {"r": "8"},
        {"lora_alpha": -1},
        {"target_modules": ["lm_head"]},
        {"target_modules": []},
        {"auto_mapping": {"base_model_class": "x"}},
        {"rank_pattern": {"q_proj": 4}},
        {"layers_to_transform": [0]},
    ],
)
def test_anything_but_plain_lora_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(AdapterInvalid):
        parse_config(json.dumps(CONFIG | change).encode())


@given(st.binary(max_size=100))
def test_a_config_of_random_bytes_is_refused_and_never_crashes(data: bytes) -> None:
    with pytest.raises(AdapterInvalid):
        parse_config(b'{"r":"' + data)


def test_a_configuration_nested_too_deep_is_refused() -> None:
    raw = json.dumps(CONFIG).encode()[:-1] + b', "more": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    with pytest.raises(AdapterInvalid):
        parse_config(raw)
