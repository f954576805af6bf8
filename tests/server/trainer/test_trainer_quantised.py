"""A 4-bit folder of MLX from end to end: an engine samples, the server trains on that, the engine takes the adapter."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from clawloop_edge.adapters.activate import Activator
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest
from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_candidate
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import ATTENTION, CONFIG_FILE, LINEARS, parse_config
from clawloop_shared.manifest import open_manifest
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.model_line import read_shape
from clawloop_shared.records import Sampling, Signal, Step, Target

from .filled import configure, send
from .served import convert, random_model, save_as_hub

TRAIN: dict[str, object] = {
    "rank": 4,
    "lr": 0.02,
    "warmup_updates": 1,
    "batch_trajectories": 4,
    "updates_per_round": 2,
    "loss": {"kl_beta": 0.0},
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(
    params=[("qwen3", None), ("qwen3", mx.bfloat16), ("llama", mx.bfloat16), ("experts-only", mx.bfloat16)],
    ids=lambda param: f"{param[0]}-{'float32' if param[1] is None else 'bfloat16'}",
)
def model_folder(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Path:
    """What mlx_lm.convert makes of a random model, in 4 bits."""
    kind, dtype = request.param
    hub = save_as_hub(random_model(kind), tmp_path / "hub")
    folder = convert(hub, tmp_path / "mlx", bits=4, group_size=32, dtype=dtype)
    for name in TOKENIZER:
        if (tiny_folder / name).is_file():
            shutil.copyfile(tiny_folder / name, folder / name)
    return folder


async def sampled(engine: MlxEngine, prompt: list[int]) -> tuple[list[int], list[float]]:
    request = GenerateRequest(prompt_ids=prompt, max_tokens=6, sampling=Sampling(temperature=1.0))
    tokens = [token async for token in await engine.generate(request)]
    return [token.token_id for token in tokens], [token.logprob for token in tokens]


async def test_a_four_bit_folder_trains_and_its_engine_takes_the_adapter(
    home: Home,
    keys: ServerKeys,
    base: Base,
    vault: Vault,
    device: str,
    model_folder: Path,
    make_step: Callable[..., Step],
    make_signal: Callable[..., Signal],
    tmp_path: Path,
) -> None:
    assert base.line.quantization
    configure(home, train=TRAIN)
    engine = await MlxEngine.open(model_folder)
    assert engine.line == base.line
    rng = random.Random(0)
    for n in range(8):
        prompt = [rng.randrange(2, 200) for _ in range(5)]
        ids, logprobs = await sampled(engine, prompt)
        step = make_step(run_id=f"run-{n}", prompt_ids=prompt, response_ids=ids, logprobs=logprobs)
        send(vault, device, steps=[step], signals=[make_signal(Target.RUN, f"run-{n}", (-1.0, 1.0)[n % 2])])
    vault.close()

    worker = Worker.open(home)
    report = worker.run()
    assert (report.state, report.version, report.updates) == (RoundState.PASSED, 1, 2), report.reason
    registry = Registry(worker.vault.database, home.adapters)
    manifest, files = release_candidate(registry, keys, version=1), registry.files(1)
    worker.close()
    targets = parse_config(files[CONFIG_FILE]).target_modules
    assert set(targets) == set(ATTENTION if read_shape(model_folder).num_experts else LINEARS)

    activator = Activator(
        engine,
        AdapterStore(tmp_path / "adapters"),
        release_key=keys.release_public,
        shape=read_shape(model_folder),
        probe_tolerance=1e-3,  # a fiftieth of what a device allows
    )
    reply = await activator.install(AdapterOffer(manifest, files))
    assert reply.installed, reply.reason
    assert engine.policy.version == 1
    probe = open_manifest(manifest, keys.release_public).probe
    off = {
        version: max(
            abs(got - wanted)
            for got, wanted in zip(
                await engine.score(probe.ids[:1], probe.ids[1:], version=version, exact=True),
                probe.logprobs,
                strict=True,
            )
        )
        for version in (0, 1)
    }
    assert off[1] < 1e-3 < 0.05 < off[0]  # the base fails the probe: it tells one from the other
    await engine.close()


@pytest.mark.parametrize("model_folder", [("qwen3", None)], indirect=True)
def test_a_trainer_does_not_open_a_base_that_changed(
    home: Home, keys: ServerKeys, base: Base, vault: Vault, model_folder: Path
) -> None:
    vault.close()
    configure(home, train=TRAIN)
    weights = home.bases / base.line_id / "model.safetensors"
    with weights.open("r+b") as file:  # one bit of the last weight
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ConfigError, match=r"has changed since it was imported \(base\)"):
        Worker.open(home)
