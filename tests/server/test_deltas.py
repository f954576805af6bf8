"""What a device learned at home is kept sealed until a round takes it, and what is wrong with it is named."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import Candidate
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_candidate
from clawloop_server.vault.delta_intake import PER_HOUR, is_finite
from clawloop_server.vault.deltas import DeltaState
from clawloop_server.vault.forgetting import adapters_after
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.deltas import LoraDelta, Method
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe
from clawloop_shared.messages import ForgetRequest, UploadItem
from clawloop_shared.safetensors_header import read_header

from .made_deltas import item_of, make_delta, send_delta, with_tensors

AddDevice = Callable[..., str]
NOT_PLAYED = Evaluation(suite="", episodes=0, reward=0.0, reward_before=0.0, standard_error=0.0)


@pytest.fixture
def make(base: Base) -> Callable[..., LoraDelta]:
    """A delta of the served line."""
    return lambda **fields: make_delta(base.shape, fields.pop("line_id", base.line_id), **fields)


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


def release(registry: Registry, keys: ServerKeys, base: Base, *, round_id: str = "", base_version: int = 0) -> int:
    """A released adapter whose files are not looked at, and its round; its version."""
    round_id = registry.start_round(base.line_id, base_version=base_version, trajectories=1, steps=1, round_id=round_id)
    candidate = Candidate(
        round_id=round_id,
        line=base.line,
        files={CONFIG_FILE: b"{}", WEIGHTS_FILE: f"weights of {round_id}".encode()},
        rank=4,
        alpha=8.0,
        target_modules=["q_proj", "v_proj"],
        probe=Probe(ids=[1], logprobs=[]),
        evaluation=NOT_PLAYED,
        lineage_root="",
    )
    version = registry.record_candidate(candidate)
    release_candidate(registry, keys, version=version)
    return version


def reasons(vault: Vault) -> list[str]:
    return list(vault.stats().set_aside)


def tell_level(vault: Vault, device: str, level: Level) -> None:
    Devices(vault.database).mark_seen(device, 0, level=level)


def test_a_delta_waits_sealed_and_comes_out_as_it_came(vault: Vault, device: str, base: Base, make: Any) -> None:
    delta = make(reward=0.25)
    item = item_of(delta)
    (received,) = vault.receive(device, [item], now_ms=7)
    assert (received.item_id, received.received_ms, received.sha256) == (item.item_id, 7, sha256(item.body))
    (found,) = vault.deltas.waiting(base.line_id)
    assert (found.device_id, found.rank, found.trajectories, found.received_ms) == (device, 2, 5, 7)
    assert vault.deltas.read(found.delta_id) == delta
    (sealed,) = vault.database.row("SELECT sealed FROM deltas") or (b"",)
    assert delta.weights[:64] not in sealed
    assert vault.receive(device, [item], now_ms=9)[0].received_ms == 7, "what is sent twice counts once"
    assert vault.stats().deltas == {"waiting": 1}


def test_a_large_delta_is_sealed_in_parts(
    vault: Vault, device: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.vault.deltas._PART_BYTES", 100)
    delta = make()
    delta_id = send_delta(vault, device, delta)
    assert vault.deltas.read(delta_id) == delta


def test_the_newest_of_a_device_takes_the_place_of_those_that_wait(
    vault: Vault, add_device: AddDevice, base: Base, make: Any
) -> None:
    one, other = add_device(), add_device()
    old, theirs = send_delta(vault, one, make(seed=1)), send_delta(vault, other, make(seed=1))
    new = send_delta(vault, one, make(seed=2))
    assert {d.delta_id for d in vault.deltas.waiting(base.line_id)} == {new, theirs}
    assert {d.delta_id: d.state for d in vault.deltas.of_device(one)} == {
        old: DeltaState.REPLACED,
        new: DeltaState.WAITING,
    }
    assert vault.deltas.read(old) is None, "its weights are gone"
    assert vault.deltas.lost([old, new, "other"]) == {"other"}, "a round that read it before may use it"


def test_an_item_id_with_another_delta_is_set_aside(vault: Vault, device: str, make: Any) -> None:
    send_delta(vault, device, make(seed=1), item_id="same")
    send_delta(vault, device, make(seed=2), item_id="same")
    assert vault.stats().deltas == {"waiting": 1}
    assert reasons(vault) == ["changed"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"line_id": "another"}, "other model line"),
        ({"rank": 9}, "rank of a delta too large"),
        ({"base_version": 3}, "delta of another adapter"),
        ({"weights_sha256": "0" * 64}, "delta of another adapter"),
        ({"level": Level.METRICS}, "bad delta"),
        ({"level": Level.PRIVATE_DELTAS, "method": Method.FFA}, "bad delta"),
        ({"level": Level.PRIVATE_DELTAS, "method": Method.FFA, "clip": 1.0}, "bad delta"),
        ({"level": Level.PRIVATE_DELTAS, "clip": 1.0, "sigma": 1.0}, "bad delta"),
        ({"method": Method.ROLORA_A}, "bad delta"),
    ],
)
def test_what_breaks_a_rule_is_set_aside_under_its_name(
    vault: Vault, device: str, make: Any, change: dict[str, Any], reason: str
) -> None:
    assert send_delta(vault, device, make(**change)) == ""
    assert reasons(vault) == [reason]
    assert vault.stats().items == 1, "it is acknowledged, or it would be sent for ever"


def test_tensors_that_are_missing_or_of_another_shape_are_named(vault: Vault, device: str, make: Any) -> None:
    delta = make()
    tensors = load(delta.weights)
    name = next(iter(tensors))
    lacking = {n: t for n, t in tensors.items() if n != name}
    for bad in (lacking, tensors | {name: tensors[name][:1]}, tensors | {"surprise": tensors[name]}):
        send_delta(vault, device, with_tensors(delta, bad))
    send_delta(vault, device, msgspec.structs.replace(delta, weights=delta.weights[:-4]))
    send_delta(vault, device, with_tensors(delta, {n: t.astype("<i4") for n, t in tensors.items()}))
    assert vault.stats().deltas == {}
    assert vault.stats().set_aside == {"bad delta": 1}, "the same facts without their weights are one record"


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_a_number_that_is_none_is_found_wherever_it_is(
    vault: Vault, device: str, make: Any, number: float, kind: str
) -> None:
    delta = make()
    tensors = {name: tensor.astype(kind) for name, tensor in load(delta.weights).items()}
    assert send_delta(vault, device, with_tensors(delta, tensors))
    last = list(tensors)[-1]
    tensors[last][-1, -1] = number
    assert send_delta(vault, device, with_tensors(delta, tensors)) == ""
    assert reasons(vault) == ["delta not finite"]


def test_brain_floats_are_looked_at_too() -> None:
    def file(numbers: list[int]) -> bytes:
        header = f'{{"x":{{"dtype":"BF16","shape":[{len(numbers)}],"data_offsets":[0,{2 * len(numbers)}]}}}}'.encode()
        return len(header).to_bytes(8, "little") + header + np.array(numbers, "<u2").tobytes()

    for numbers, finite in (([0x3F80, 0xFF7F], True), ([0x3F80, 0x7F80], False), ([0xFFC0], False)):
        data = file(numbers)
        assert is_finite(data, read_header(data, max_bytes=1000)["x"]) is finite


def test_bombs_and_other_bytes_are_unreadable_and_not_kept_whole(
    vault: Vault, device: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = wire.encode(msgspec.structs.replace(make(), weights=bytes(64 << 20)))
    assert len(bomb) < 64 << 10
    other = wire.encode(make())[:-5]
    bodies = [bomb, other, b"no message of ours"]
    vault.receive(device, [UploadItem(item_id=new_id(), receipt_id="", kind="delta.v1", body=b) for b in bodies])
    assert vault.stats().set_aside == {"unreadable": 3}
    monkeypatch.setattr("clawloop_server.vault.delta_intake.MAX_BODY_BYTES", 100)
    send_delta(vault, device, make())
    assert vault.stats().set_aside["too large"] == 1
    assert vault.database.count("SELECT max(length(sealed)) FROM set_aside") < 8192


def test_a_device_may_be_more_private_than_its_level_and_never_less(vault: Vault, device: str, make: Any) -> None:
    private = {"level": Level.PRIVATE_DELTAS, "method": Method.FFA, "clip": 1.0, "sigma": 0.5}
    tell_level(vault, device, Level.PRIVATE_DELTAS)
    assert send_delta(vault, device, make()) == ""
    assert reasons(vault) == ["delta above its device's level"]
    assert send_delta(vault, device, make(**private))
    tell_level(vault, device, Level.FULL)
    assert send_delta(vault, device, make(**private))
    assert send_delta(vault, device, make())


def test_a_device_that_floods_is_read_no_more_within_the_hour(vault: Vault, add_device: AddDevice, make: Any) -> None:
    flooding, quiet = add_device(), add_device()
    for n in range(PER_HOUR + 3):
        bad = {"rank": 9} if n % 2 else {}
        vault.receive(flooding, [item_of(make(seed=n, task_id=f"t{n}", **bad))], now_ms=1_000_000 + n)
    assert vault.stats().set_aside == {"rank of a delta too large": PER_HOUR // 2, "too many deltas": 1}
    assert send_delta(vault, quiet, make(), now_ms=1_000_100)
    assert send_delta(vault, flooding, make(), now_ms=1_000_000 + 3_700_000)


def test_the_adapter_it_was_learned_beside_must_be_one_that_was_released(
    vault: Vault, device: str, make: Any, registry: Registry, keys: ServerKeys, base: Base
) -> None:
    version = release(registry, keys, base)
    digest = next(f.sha256 for f in registry.adapter(version).facts.files if f.name == WEIGHTS_FILE)
    beside = {"base_version": version, "weights_sha256": digest}
    assert send_delta(vault, device, make(**beside))
    assert send_delta(vault, device, make(**beside, method=Method.ROLORA_A, rank=4, alpha=8.0))
    reckoned = {"rank": 4, "alpha": 8.000000000000002}
    assert send_delta(vault, device, make(**beside, method=Method.ROLORA_B, **reckoned))
    for odd in ({"rank": 3}, {"alpha": 9.0}, {"targets": ("q_proj",)}):
        fields = {"rank": 4, "alpha": 8.0} | odd
        assert send_delta(vault, device, make(**beside, method=Method.ROLORA_B, **fields)) == ""
    assert reasons(vault) == ["bad delta"]
    assert send_delta(vault, device, make(base_version=version, weights_sha256="1" * 64)) == ""


def test_a_round_settles_what_it_looked_at(vault: Vault, add_device: AddDevice, base: Base, make: Any) -> None:
    ids = [send_delta(vault, add_device(), make(seed=n), now_ms=n + 1) for n in range(5)]
    vault.deltas.use("round", {ids[0]: "", ids[1]: "its cosine is -0.9"})
    vault.deltas.refuse(ids[2], "reward is worse", round_id="round")
    vault.deltas.outdate(ids[3], "5 adapters old")
    assert [(d.state, d.reason) for d in vault.deltas.of_round("round")] == [
        (DeltaState.JOINED, ""),
        (DeltaState.LEFT_OUT, "its cosine is -0.9"),
        (DeltaState.REFUSED, "reward is worse"),
    ]
    assert [d.delta_id for d in vault.deltas.waiting(base.line_id)] == [ids[4]]
    assert vault.deltas.counts(base.line_id) == {"joined": 1, "left out": 1, "refused": 1, "stale": 1, "waiting": 1}
    assert vault.database.count("SELECT count(*) FROM deltas WHERE sealed IS NOT NULL") == 1
    vault.deltas.refuse(ids[0], "late")
    assert vault.deltas.lost([ids[0]]) == {ids[0]}
    assert vault.deltas.of_round("round")[0].state is DeltaState.JOINED, "what was settled stays"


def asking(device: str, *ids: str, everything: bool = False) -> ForgetRequest:
    return ForgetRequest(request_id=new_id(), device_id=device, at_ms=50, record_ids=list(ids), everything=everything)


def test_a_delta_is_forgotten_by_the_name_of_its_item(vault: Vault, device: str, base: Base, make: Any) -> None:
    delta_id = send_delta(vault, device, make(seed=1), item_id="item")
    done = vault.forget(asking(device, "item"))
    assert (done.deleted, done.unknown, done.adapters) == (1, 0, [])
    assert vault.deltas.read(delta_id) is None
    assert vault.deltas.lost([delta_id]) == {delta_id}
    assert vault.stats().deltas == {}
    assert send_delta(vault, device, make(seed=1), item_id="item") == "", "and comes in no more"
    assert send_delta(vault, device, make(seed=1))


@pytest.mark.parametrize("how", ["named", "everything", "device"])
def test_the_adapters_that_joined_it_or_went_on_from_there_are_named(
    vault: Vault, add_device: AddDevice, base: Base, make: Any, registry: Registry, keys: ServerKeys, how: str
) -> None:
    device, other = add_device(), add_device()
    used, unused = send_delta(vault, device, make(seed=1), item_id="a"), send_delta(vault, other, make(seed=2))
    first = release(registry, keys, base, round_id="first")
    vault.deltas.use("first", {used: "", unused: "too unlike the others"})
    aside = release(registry, keys, base, round_id="aside")
    after = release(registry, keys, base, round_id="after", base_version=first)
    digest = next(f.sha256 for f in registry.adapter(first).facts.files if f.name == WEIGHTS_FILE)
    learned_there = send_delta(vault, other, make(base_version=first, weights_sha256=digest))
    joined_late = release(registry, keys, base, round_id="late", base_version=aside)
    vault.deltas.use("late", {learned_there: ""})

    if how == "device":
        erased = vault.delete_device(device)
        assert (erased.deltas, erased.rounds, erased.adapters) == (1, ["first"], [first, after, joined_late])
        assert vault.database.row("SELECT 1 FROM vault_keys WHERE owner_id = ?", [device]) is None
    else:
        done = vault.forget(asking(device, *(["a"] if how == "named" else []), everything=how == "everything"))
        assert (done.deleted, done.adapters) == (1, [first, after, joined_late])
    (row,) = vault.deltas.of_device(device)
    assert (row.state, row.round_id) == (DeltaState.SHREDDED, "first")
    assert vault.delete_device(other).rounds == ["late"], "a round that left one out has nothing of it"
    assert adapters_after(vault.database, ["aside"]) == [aside, joined_late]


def test_a_forgotten_delta_leaves_no_bytes(vault: Vault, home: Home, device: str, make: Any) -> None:
    send_delta(vault, device, make(), item_id="a")
    (sealed,) = vault.database.row("SELECT sealed FROM deltas") or (b"",)
    vault.delete_device(device)
    assert vault.database.rows("SELECT * FROM deltas") == []
    assert sealed[20:60] not in home.database.read_bytes()


def test_the_rank_is_bounded_by_the_settings(
    home: Home, keys: ServerKeys, vault: Vault, device: str, make: Any
) -> None:
    wide = Vault(vault.database, home=home, master_key=keys.master, federate=FederateSettings(rank=16))
    assert send_delta(wide, device, make(rank=16))
