"""A server's home with a model folder that is just real enough: sizes, a vocabulary, files to hash."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clawloop_server import bases
from clawloop_server import home as homes
from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.hub.devices import Device, Devices, DeviceState
from clawloop_server.release.keys import ServerKeys, create_keys
from clawloop_server.vault.settings import RewardSettings
from clawloop_server.vault.store import Vault
from clawloop_shared import signing
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.records import Channel, Policy, Sampling, Signal, Step, Target

VOCABULARY = 1000


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model folder with one small tensor."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = sizes | {"num_key_value_heads": 1, "head_dim": 4, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "surprise.py").write_text("raise SystemExit('code must never be copied')")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """The folders of a server."""
    return homes.create(tmp_path / "server")


@pytest.fixture
def keys(home: Home) -> ServerKeys:
    """Its keys."""
    return create_keys(home)


@pytest.fixture
def base(home: Home, model_folder: Path) -> Base:
    """Its model line."""
    return bases.import_base(home, model_folder)


@pytest.fixture
def vault(home: Home, keys: ServerKeys, base: Base) -> Iterator[Vault]:
    """Its vault; what is judged does not wait for more."""
    vault = Vault.open(home, keys.master, settings=RewardSettings(settle_s=0))
    yield vault
    vault.close()


@pytest.fixture
def add_device(vault: Vault, base: Base) -> Callable[..., str]:
    """Let another device in; its id. `key` is the private key that it signs with."""

    def add(key: bytes = b"") -> str:
        device = Device(
            device_id=new_id(),
            device_key=signing.public_key(key or signing.new_key()),
            node_key_pem=f"PEM {new_id()}",
            node_id=None,
            line_id=base.line_id,
            state=DeviceState.JOINED,
            adapter_version=0,
            joined_ms=1,
            seen_ms=1,
        )
        Devices(vault.database).add(device)
        return device.device_id

    return add


@pytest.fixture
def device(add_device: Callable[..., str]) -> str:
    """A device that was let in."""
    return add_device()


MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]


@pytest.fixture
def make_step(base: Base) -> MakeStep:
    """A step of the served line; arguments replace its fields."""

    def make(
        *,
        run_id: str = "",
        session_id: str = "session",
        prompt_ids: list[int] | None = None,
        response_ids: list[int] | None = None,
        logprobs: list[float | None] | None = None,
        redacted: list[tuple[int, int]] | None = None,
        line: str | None = None,
        step_id: str | None = None,
        trajectory_id: str = "",
        group_id: str = "",
        group_size: int = 0,
        channel: Channel = Channel.TRAIN,
        created_ms: int = 1,
        untrainable: str = "",
    ) -> Step:
        response = response_ids or [4, 5]
        return Step(
            step_id=step_id or new_step_id(),
            session_id=session_id,
            run_id=run_id or new_id(),
            prompt_ids=prompt_ids or [1, 2, 3],
            response_ids=response,
            response_logprobs=logprobs if logprobs is not None else [-0.5] * len(response),
            policy=Policy(line=base.line_id if line is None else line),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=created_ms,
            trajectory_id=trajectory_id,
            group_id=group_id,
            group_size=group_size,
            channel=channel,
            untrainable=untrainable,
            redacted=redacted or [],
        )

    return make


@pytest.fixture
def make_signal() -> MakeSignal:
    """A signal on a target."""

    def make(target: Target, target_id: str, value: float = 1.0, *, created_ms: int = 2) -> Signal:
        return Signal(
            signal_id=new_id(),
            target=target,
            target_id=target_id,
            source="user",
            value=value,
            created_ms=created_ms,
        )

    return make
