"""From a signed offer to an adapter in use: what is verified, converted, probed, kept and rolled back."""

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from clawloop_edge.adapters.activate import Activator
from clawloop_edge.adapters.errors import Expired, OldVersion, WrongLine
from clawloop_edge.adapters.log import KnownLog, LogBook
from clawloop_edge.adapters.store import AdapterStore, Pointer, kept_files
from clawloop_edge.adapters.verify import AdapterLimits, VerifiedAdapter, verify_offer
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest
from clawloop_shared import merkle, signing
from clawloop_shared.errors import AdapterInvalid, SignatureInvalid, StorageError
from clawloop_shared.files import sha256
from clawloop_shared.log_head import LogProof, TreeHead, entry_leaf, sign_head
from clawloop_shared.lora import parse_config
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, SignedManifest, sign_manifest
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.model_line import ModelLine, read_line, read_shape
from clawloop_shared.records import Policy, Sampling

Files = dict[str, bytes]
MakeAdapter = Callable[..., Files]
NOW_MS = 1_800_000_000_000
KEY = signing.new_key()
PROBE_IDS = [5, 300, 301, 302, 400, 410, 17]


def make_manifest(files: Files, *, line: ModelLine, version: int, probe: list[float], **changes: Any) -> Manifest:
    config = parse_config(files["adapter_config.json"])
    manifest = Manifest(
        line=line,
        version=version,
        previous_sha256="",
        files=[FileEntry(name, len(data), sha256(data)) for name, data in files.items()],
        rank=config.r,
        alpha=config.lora_alpha,
        target_modules=config.target_modules,
        probe=Probe(PROBE_IDS, probe),
        evaluation=Evaluation("none", 0, 0.0, 0.0, 0.0),
        round_id="r",
        lineage_root="",
        created_ms=NOW_MS,
        expires_ms=NOW_MS + 1000,
    )
    return msgspec.structs.replace(manifest, **changes)


def offer_of(files: Files, manifest: Manifest, *, key: bytes = KEY) -> AdapterOffer:
    return AdapterOffer(sign_manifest(manifest, key), files)


class Desk:
    """An engine with its activator, and the server's side of releasing adapters for it."""

    def __init__(self, engine: MlxEngine, folder: Path, model: Path, make_adapter: MakeAdapter) -> None:
        self.engine, self.make_adapter = engine, make_adapter
        self.store = AdapterStore(folder)
        self.activator = Activator(
            engine,
            self.store,
            release_key=signing.public_key(KEY),
            shape=read_shape(model),
            now_ms=lambda: NOW_MS,
        )

    async def probe(self, files: Files) -> list[float]:
        """What the model with this adapter gives to the probe's ids."""
        number = 10_000
        await self.engine.load(Policy(self.engine.line.line_id, number, "probe"), files)
        found = await self.engine.score(PROBE_IDS[:1], PROBE_IDS[1:], version=number)
        await self.engine.unload(number)
        return found

    async def offer(self, version: int, **changes: Any) -> AdapterOffer:
        files = self.make_adapter(seed=version)
        probe = await self.probe(files)
        return offer_of(files, make_manifest(files, line=self.engine.line, version=version, probe=probe, **changes))


@pytest.fixture
def desk(engine: MlxEngine, tmp_path: Path, tiny_model: Path, make_adapter: MakeAdapter) -> Desk:
    return Desk(engine, tmp_path / "adapters", tiny_model, make_adapter)


@pytest.fixture
def line(tiny_model: Path) -> ModelLine:
    return read_line(tiny_model)


def check(offer: AdapterOffer, *, line: ModelLine, model: Path, **changes: Any) -> VerifiedAdapter:
    settings: dict[str, Any] = {
        "release_key": signing.public_key(KEY),
        "shape": read_shape(model),
        "seen_version": 0,
        "now_ms": NOW_MS,
        "limits": AdapterLimits(),
    }
    return verify_offer(offer, line=line, **(settings | changes))


PROBE = [-1.0] * (len(PROBE_IDS) - 1)


def test_a_true_offer_is_verified_and_names_its_policy(
    line: ModelLine, tiny_model: Path, make_adapter: MakeAdapter
) -> None:
    files = make_adapter()
    verified = check(
        offer_of(files, make_manifest(files, line=line, version=3, probe=PROBE)), line=line, model=tiny_model
    )
    assert verified.policy == Policy(line.line_id, 3, sha256(files["adapter_model.safetensors"]))


def test_each_lie_of_an_offer_has_its_own_error(line: ModelLine, tiny_model: Path, make_adapter: MakeAdapter) -> None:
    files = make_adapter()
    good = make_manifest(files, line=line, version=3, probe=PROBE)

    def refused(kind: type[Exception], offer: AdapterOffer, match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            check(offer, line=line, model=tiny_model, **changes)

    def changed(**fields: Any) -> AdapterOffer:
        return offer_of(files, msgspec.structs.replace(good, **fields))

    other = msgspec.structs.replace(line, tokenizer_sha256="0" * 64)
    true = offer_of(files, good)
    refused(SignatureInvalid, offer_of(files, good, key=signing.new_key()), "signed by key")
    forged = SignedManifest(true.manifest.body.replace(b'"r"', b'"s"'), true.manifest.key_id, true.manifest.signature)
    refused(SignatureInvalid, AdapterOffer(forged, files), "was not made")
    refused(WrongLine, changed(line=other), "for line")
    refused(Expired, changed(expires_ms=NOW_MS), "expired")
    refused(OldVersion, true, "not newer than 3", seen_version=3)
    refused(AdapterInvalid, AdapterOffer(true.manifest, files | {"x.py": b""}), "its manifest names")
    swapped = files | {"adapter_model.safetensors": make_adapter(seed=9)["adapter_model.safetensors"]}
    refused(AdapterInvalid, AdapterOffer(true.manifest, swapped), "hash")
    refused(AdapterInvalid, true, "over this device's 2", limits=AdapterLimits(max_rank=2))
    refused(AdapterInvalid, true, "limit is 100", limits=AdapterLimits(max_bytes=100))
    refused(AdapterInvalid, changed(alpha=9.0), "differ")
    refused(AdapterInvalid, changed(probe=Probe([1], [])), "probe")
    narrow = msgspec.structs.replace(read_shape(tiny_model), intermediate_size=8)
    refused(AdapterInvalid, true, "of shape", shape=narrow)
    assert check(changed(expires_ms=0), line=line, model=tiny_model, now_ms=None)


async def test_installing_probes_keeps_and_uses_an_adapter(desk: Desk) -> None:
    reply = await desk.activator.install(await desk.offer(1))
    assert (reply.version, reply.installed, reply.reason) == (1, True, "")
    assert desk.engine.policy.version == 1
    assert desk.store.pointer() == Pointer(1, 1)
    folder = desk.store._folder / "1"
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "manifest.bin"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_an_offer_that_came_twice_is_answered_with_yes_twice(desk: Desk) -> None:
    offer = await desk.offer(1)
    assert (await desk.activator.install(offer)).installed
    again = await desk.activator.install(offer)
    assert (again.version, again.installed) == (1, True)
    other = await desk.activator.install(await desk.offer(1, round_id="other"))
    assert not other.installed
    assert "not newer" in other.reason


async def test_a_bad_adapter_is_refused_with_its_reason_and_the_old_one_serves(desk: Desk) -> None:
    assert (await desk.activator.install(await desk.offer(1))).installed
    files = desk.make_adapter(seed=2)
    line, probe = desk.engine.line, await desk.probe(files)
    nan = desk.make_adapter(size=float("nan"))
    other = msgspec.structs.replace(line, base_sha256="0" * 64)
    small = desk.make_adapter(rank=3)
    mixed = files | {"adapter_model.safetensors": small["adapter_model.safetensors"]}
    offers = {
        "signed by key": offer_of(
            files, make_manifest(files, line=line, version=2, probe=probe), key=signing.new_key()
        ),
        "is for line": offer_of(files, make_manifest(files, line=other, version=2, probe=probe)),
        "of shape": offer_of(mixed, make_manifest(mixed, line=line, version=2, probe=probe)),
        "not finite": offer_of(nan, make_manifest(nan, line=line, version=2, probe=probe)),
        "probe is off": offer_of(files, make_manifest(files, line=line, version=2, probe=[p - 0.1 for p in probe])),
    }
    for reason, offer in offers.items():
        reply = await desk.activator.install(offer)
        assert (reply.version, reply.installed) == (1, False)
        assert reason in reply.reason
        assert desk.engine.policy.version == 1
        assert desk.engine.health().versions == [0, 1]
        assert desk.store.versions() == [1]
    assert (await desk.activator.install(await desk.offer(2))).version == 2


async def test_an_adapter_that_is_not_in_the_log_is_refused_and_the_old_one_serves(desk: Desk) -> None:
    def logged(offer: AdapterOffer, *, before: bytes = b"") -> AdapterOffer:
        """In a log of one entry, or of two of which the first is `before`."""
        manifest = msgspec.json.decode(offer.manifest.body, type=Manifest)
        leaf = entry_leaf(manifest.version, offer.manifest.sha256)
        root, size = (merkle.node_hash(before, leaf), 2) if before else (leaf, 1)
        head = sign_head(TreeHead(line_id=manifest.line.line_id, size=size, root=root.hex(), at_ms=1), KEY)
        proofs = [before] if before else []
        return msgspec.structs.replace(offer, log=LogProof(head, size - 1, proofs, size - 1, [leaf] if before else []))

    kept = [KnownLog()]
    desk.activator.log = LogBook(
        release_key=signing.public_key(KEY), load=lambda: kept[-1], keep=kept.append, now_ms=lambda: NOW_MS
    )
    first = logged(await desk.offer(1))
    assert (await desk.activator.install(first)).installed
    assert kept[-1].size == 1
    second = await desk.offer(2)
    for reason, bad in (("came without the log", second), ("is not the one that was seen", logged(second))):
        reply = await desk.activator.install(bad)
        assert (reply.version, reply.installed) == (1, False)
        assert reason in reply.reason
        assert reason in kept[-1].stopped
        assert desk.engine.health().versions == [0, 1], "no framework saw it"
        assert desk.activator.refusal(second) is not None
        assert (await desk.activator.use(0)).version == 0
        assert (await desk.activator.use(1)).version == 1
        kept.append(KnownLog(kept[1].head))
    leaf = entry_leaf(1, first.manifest.sha256)
    assert desk.activator.refusal(logged(second, before=leaf)) is None
    assert (await desk.activator.install(logged(second, before=leaf))).version == 2
    assert kept[-1].size == 2


async def test_no_call_fails_while_adapters_arrive(desk: Desk) -> None:
    versions = (1, 2, 3, 4)
    offers = [await desk.offer(version) for version in versions]
    seen = {version: asyncio.Event() for version in (0, *versions)}

    async def agent(seed: int) -> None:
        while not seen[4].is_set():
            ask = GenerateRequest(prompt_ids=[300 + seed, 310, 320, 330], max_tokens=12, sampling=Sampling())
            generation = await desk.engine.generate(ask)
            tokens = [token async for token in generation]
            ids, version = [token.token_id for token in tokens], generation.policy.version
            if version in desk.engine.health().versions:
                scored = await desk.engine.score(ask.prompt_ids, ids, version=version)
                assert max(abs(t.logprob - s) for t, s in zip(tokens, scored, strict=True)) < 1e-3
            seen[version].set()

    async with asyncio.TaskGroup() as group:
        for n in range(8):
            group.create_task(agent(n))
        for version, offer in zip(versions, offers, strict=True):
            assert (await desk.activator.install(offer)).installed
            await seen[version].wait()


async def test_rollback_and_use_move_between_kept_versions(desk: Desk) -> None:
    for version in (1, 2, 3, 4):
        assert (await desk.activator.install(await desk.offer(version))).installed
    assert desk.store.versions() == [2, 3, 4]
    assert (await desk.activator.rollback()).version == 3
    assert desk.store.pointer() == Pointer(3, 4)
    assert not (await desk.activator.install(await desk.offer(4))).installed
    assert (await desk.activator.use(2)).version == 2
    assert (await desk.activator.rollback()).version == 0
    assert (await desk.activator.use(4)).version == 4
    with pytest.raises(StorageError, match="adapter 1 cannot be read"):
        await desk.activator.use(1)
    assert desk.engine.policy.version == 4


async def test_a_restart_verifies_and_loads_what_was_in_use(
    desk: Desk, tiny_model: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    for version in (1, 2, 3):
        assert (await desk.activator.install(await desk.offer(version))).installed
    await desk.activator.use(2)
    engine = await MlxEngine.open(tiny_model)
    reborn = Desk(engine, tmp_path / "adapters", tiny_model, make_adapter)
    restored = await reborn.activator.restore()
    assert restored.policy.version == engine.policy.version == 2
    assert restored.refused == []

    weights = tmp_path / "adapters" / "2" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    restored = await reborn.activator.restore()
    assert restored.policy.version == 1
    assert "hash" in restored.refused[0]
    await engine.close()


def test_the_store_sweeps_drafts_and_keeps_the_current_version(
    tmp_path: Path, line: ModelLine, make_adapter: MakeAdapter
) -> None:
    files = make_adapter()
    store = AdapterStore(tmp_path / "a", keep=2)
    (tmp_path / "a" / ".draft-7-x").mkdir()
    AdapterStore(tmp_path / "a", keep=2)
    assert (tmp_path / "a" / ".draft-7-x").is_dir(), "another process looks on while the edge publishes"
    store.sweep_drafts()
    for version in (1, 2, 3):
        store.publish(version, offer_of(files, make_manifest(files, line=line, version=version, probe=PROBE)))
        store.point(1)
    assert store.versions() == [1, 2, 3]
    store.point(3)
    assert store.versions() == [2, 3]
    assert store.pointer() == Pointer(3, 3)
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["2", "3", "current.json"]
    (tmp_path / "a" / "current.json").write_bytes(b"{")
    with pytest.raises(StorageError, match="remove it"):
        store.pointer()


async def test_an_adapter_that_a_crash_left_before_its_first_use_can_be_offered_again(desk: Desk) -> None:
    offer = await desk.offer(1)
    desk.store.publish(1, offer)  # and then kill -9, before the pointer named it
    assert desk.store.pointer() == Pointer(0, 0)
    reply = await desk.activator.install(offer)
    assert (reply.version, reply.installed, reply.reason) == (1, True, "")


async def test_a_probe_that_is_not_a_number_is_refused_wherever_it_stands(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = await desk.offer(1)
    right = msgspec.json.decode(offer.manifest.body, type=Manifest).probe.logprobs

    async def score(*_: Any, **__: Any) -> list[float]:
        return [*right[:-1], float("nan")]

    monkeypatch.setattr(desk.engine, "score", score)
    reply = await desk.activator.install(offer)
    assert not reply.installed
    assert "probe is off" in reply.reason
    assert desk.engine.health().versions == [0]


async def test_a_trouble_of_this_device_is_told_by_its_kind_alone(desk: Desk, tmp_path: Path) -> None:
    offer = await desk.offer(1)
    (tmp_path / "adapters" / "current.json").write_bytes(b"{")
    assert (await desk.activator.install(offer)).reason == "StorageError"


def test_each_server_has_versions_of_its_own_and_a_step_finds_its_adapter(
    tmp_path: Path, line: ModelLine, make_adapter: MakeAdapter
) -> None:
    first, second = make_adapter(seed=1), make_adapter(seed=2)
    for key, files in ((b"a" * 32, first), (b"b" * 32, second)):
        store = AdapterStore.of_key(tmp_path / "adapters", key)
        assert store.pointer() == Pointer(0, 0)
        store.publish(1, offer_of(files, make_manifest(files, line=line, version=1, probe=PROBE)))
        store.point(1)
    policy = Policy(line.line_id, 1, sha256(second["adapter_model.safetensors"]))
    assert kept_files(tmp_path / "adapters", policy) == second
    with pytest.raises(StorageError, match="no more"):
        kept_files(tmp_path / "adapters", Policy(line.line_id, 1, "0" * 64))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(4, 8.0, False), (8, 16.0, True), (3, 1.0, False)])
def test_mlx_gives_the_logits_that_torch_gives_with_the_same_adapter(
    tiny_model: Path, make_adapter: MakeAdapter, tmp_path: Path, rank: int, alpha: float, rslora: bool
) -> None:
    import mlx.core as mx
    import torch
    from mlx_lm.utils import load_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from clawloop_edge.adapters.convert import read_factors
    from clawloop_edge.engine.lora import with_adapter

    torch.set_num_threads(1)
    files = make_adapter(rank=rank, alpha=alpha, rslora=rslora)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    ids = [[5, 300, 17, 400, 401, 402, 33, 350]]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor(ids)).logits.numpy()
        wanted = PeftModel.from_pretrained(base, tmp_path)(torch.tensor(ids)).logits.numpy()
    model, _ = load_model(tiny_model)
    found = np.array(with_adapter(model, read_factors(files, rank_max=64))(mx.array(ids)))
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(np.array(model(mx.array(ids))) - plain).max() < 1e-4
    assert np.abs(wanted - plain).max() > 0.1


def test_a_quantised_base_takes_adapters_and_stays_as_it_is(random_model: Path, make_adapter: MakeAdapter) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    from clawloop_edge.adapters.convert import read_factors
    from clawloop_edge.engine.lora import with_adapter

    model, _ = load_model(random_model)
    nn.quantize(model, group_size=32, bits=4)
    ids = mx.array([[5, 300, 17, 400]])
    before = np.array(model(ids))
    files = make_adapter(folder=random_model)
    changed = np.array(with_adapter(model, read_factors(files, rank_max=64))(ids))
    assert np.abs(changed - before).max() > 0.1
    assert np.array_equal(np.array(model(ids)), before)
    factors = read_factors(files, rank_max=64)
    for linear in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.0.{linear}"
        module = dict(model.named_modules())[name]
        a, b = factors[name]
        full = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
        x = mx.random.normal((1, 3, full.shape[1]))
        wrapped = dict(with_adapter(model, factors).named_modules())[name]
        assert np.abs(np.array(wrapped(x) - x @ (full.T + a @ b))).max() < 1e-4
