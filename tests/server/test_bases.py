"""Model lines of a server: imported once, refused where they cannot be trained, and noticed when they change."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from clawloop_server import bases
from clawloop_server.home import Home
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import ATTENTION, LINEARS, ModelShape
from clawloop_shared.model_line import read_shape


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_imported_base_is_unchanged_until_a_part_of_it_changes(home: Home, model_folder: Path) -> None:
    base = bases.import_base(home, model_folder, link=True)
    assert bases.check_unchanged(home, base) == bases.base_folder(home, base.line_id)
    spoilers: dict[str, Callable[[], object]] = {
        "tokenizer": lambda: (model_folder / "tokenizer.json").write_text("{ }"),
        "template": lambda: (model_folder / "chat_template.jinja").write_text("other"),
        "quantization": lambda: change(model_folder, quantization={"group_size": 64, "bits": 4}),
        "base": lambda: (model_folder / "model.safetensors").write_bytes(b"other"),
    }
    changed: list[str] = []
    for part, spoil in spoilers.items():
        spoil()
        changed.append(part)
        with pytest.raises(ConfigError, match="has changed since it was imported") as error:
            bases.check_unchanged(home, base)
        assert all(name in str(error.value) for name in changed)


def test_numbers_of_the_config_that_no_line_names_are_noticed_too(home: Home, model_folder: Path) -> None:
    base = bases.import_base(home, model_folder, link=True)
    change(model_folder, rope_theta=5.0)
    with pytest.raises(ConfigError, match=r"\(config.json\)"):
        bases.check_unchanged(home, base)
    older = msgspec.structs.replace(base, config_sha256="")
    assert bases.check_unchanged(home, older)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "mode 'mxfp4'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"num_attention_heads": 0}, r"num_attention_heads"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 attention heads share no 2"),
        ({"rope_parameters": {"rope_type": "zigzag", "rope_theta": 1.0}}, "type 'zigzag'"),
        ({"rope_scaling": {"type": "zigzag"}}, "type 'zigzag'"),
        ({"rope_scaling": {"full_attention": {"rope_type": ["x"]}}}, r"type \['x'\]"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_it_is_imported(
    values: dict[str, object], word: str, home: Home, model_folder: Path
) -> None:
    change(model_folder, **values)
    with pytest.raises(ConfigError, match=word):
        bases.import_base(home, model_folder)
    assert bases.list_bases(home) == []


def test_a_quantised_folder_is_a_line_of_its_own(home: Home, model_folder: Path) -> None:
    plain = bases.import_base(home, model_folder)
    change(model_folder, quantization={"group_size": 64, "bits": 4})
    quantised = bases.import_base(home, model_folder)
    assert quantised.line_id != plain.line_id
    assert quantised.line.base_sha256 == plain.line.base_sha256
    assert {base.line_id for base in bases.list_bases(home)} == {plain.line_id, quantised.line_id}


def test_the_shape_of_a_model_with_experts_names_the_layers_that_have_them(model_folder: Path) -> None:
    for words in ({"num_experts": 4}, {"num_local_experts": 4}):
        change(model_folder, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], **words)
        shape = read_shape(model_folder)
        assert [shape.has_experts(layer) for layer in range(4)] == [False, True, False, False]
        assert len(shape.linears()) == 4 * 4 + 3 * 3
        assert not any(".1.mlp." in path for path in shape.linears())
        assert shape.targets(LINEARS) == LINEARS
    change(model_folder, decoder_sparse_step=None, mlp_only_layers=None)
    assert read_shape(model_folder).targets(LINEARS) == ATTENTION


def test_a_shape_is_read_again_as_it_was_written(model_folder: Path) -> None:
    change(model_folder, num_experts=4, mlp_only_layers=[0])
    shape = read_shape(model_folder)
    assert msgspec.json.decode(msgspec.json.encode(shape), type=ModelShape) == shape
