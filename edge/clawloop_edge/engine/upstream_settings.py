"""Which server stands behind the engine `upstream`, and how far its word is taken."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

_Wait = Annotated[float, Meta(gt=0, le=86_400)]


class UpstreamSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`url` is what OpenAI's clients call the base URL; `key_file` holds the server's key, if it wants one.

    `ids` = `auto` is exact where the server returns token ids and agrees with the model folder's tokenizer; `off` never
    is. `logprobs` says which ones the server returns (vLLM's `--logprobs-mode`): those `processed` by the temperature,
    or `raw` ones, which say what was sampled from at temperature 1 alone. `adapters` = `vllm` loads them through vLLM's
    endpoints; the server must see `adapter_folder` under the same path.
    """

    url: str = ""
    key_file: str = ""
    model: str = ""
    ids: Literal["auto", "off"] = "auto"
    logprobs: Literal["processed", "raw"] = "raw"
    adapters: Literal["off", "vllm"] = "off"
    adapter_folder: str = ""
    connect_timeout_s: _Wait = 5.0
    read_timeout_s: _Wait = 600.0
    max_connections: Annotated[int, Meta(ge=0, le=100_000)] = 0
