"""Exports: whole or refused, equal after coming back, and never over what is there."""

import json
import stat
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from clawloop_edge.cli.root import app
from clawloop_edge.errors import ExportInvalid, PoolError
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool import curation, export_parquet
from clawloop_edge.pool.curation import Curation, Curations, Word
from clawloop_edge.pool.exported import Chosen, Record, fields_in, fields_of, line_of, record_of
from clawloop_edge.pool.exporting import ExportFormat, export_pool
from clawloop_edge.pool.importing import Imported, check_export, import_export
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_shared.errors import ConfigError, StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Channel, Hint, Policy, Sampling, Signal, Step, Target

from .kept import kept_step

NAMES = ("out.jsonl", "out.jsonl.zst", "out.parquet")
OpenPool = Callable[[], Pool]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[OpenPool]:
    """Makes an empty pool; all are closed at the end."""
    pools: list[Pool] = []

    def make() -> Pool:
        pools.append(Pool.open(tmp_path / f"pool{len(pools)}", KnownKey.of(bytes([len(pools)]) * 32)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def mark(target: Target, target_id: str) -> Signal:
    hint = Hint(target_id, 2, [4, 5]) if target is Target.STEP else None
    return Signal(
        signal_id=new_id(),
        target=target,
        target_id=target_id,
        source="user",
        value=0.25,
        created_ms=7,
        evidence="exit code 1",
        hint=hint,
    )


ODD = (
    kept_step(
        "odd",
        messages=[{"role": "user", "content": "half \ud800 pair", "n": 2**70, "f": [1.0, 1, True, None]}],
        text="lone \udfff",
        sampling=Sampling(seed=2**63),
        untrainable="no logprob for every token",
        response_logprobs=[float("nan"), float("-inf")],
    ),
    kept_step("odd", response_ids=[], response_logprobs=[], untrainable="cut", channel=Channel.VAL, tools=[{"a": {}}]),
    kept_step("odd", trajectory_id="t", group_id="g", group_size=4, kind="title", app="ünï", first_token_ms=1002),
)


def fill(pool: Pool) -> None:
    """Two sessions with signals on a step, a run and a session, and one with what formats have no types for."""
    steps = [kept_step("s1", at_ms=1000 + n) for n in range(3)] + [kept_step("s2"), *ODD]
    marks = (
        mark(Target.STEP, steps[0].step.step_id),
        mark(Target.RUN, "run-s1"),
        mark(Target.SESSION, "s2"),
        mark(Target.TRAJECTORY, "t"),
    )
    for future in [pool.keep_step(kept) for kept in steps] + [pool.keep_signal(signal) for signal in marks]:
        future.result()
    curation.prepare(pool)
    for target, target_id in ((Target.STEP, steps[1].step.step_id), (Target.RUN, "run-s1"), (Target.SESSION, "s2")):
        word = Word(trainable=target is Target.RUN, quality=3, tags=["kept", target], note=f"a {target}")
        curation.curate(pool, target, target_id, word=word).result()


def everything(pool: Pool) -> dict[str, Any]:
    """All steps and signals by id, in a form in which NaN is equal to itself."""
    found = {}
    with pool.reading() as reading:
        for session in reading.sessions(100, None):
            for kept in reading.session_steps(session.session_id):
                found[kept.step.step_id] = repr(kept)
            for signal in reading.session_signals(session.session_id):
                found[signal.signal_id] = repr(signal)
            for said in Curations(reading.database, pool.keyring).of_session(session.session_id):
                found[said.curation_id] = repr(said)
    return found


def export(pool: Pool, path: Path, **chosen: Any) -> None:
    form = ExportFormat.PARQUET if path.suffix == ".parquet" else ExportFormat.JSONL
    export_pool(pool, path, Chosen(**chosen), form=form)


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_that_was_exported_and_imported_has_equal_steps_and_signals(
    fresh: OpenPool, tmp_path: Path, name: str
) -> None:
    one, other, path = fresh(), fresh(), tmp_path / name
    fill(one)
    export(one, path)
    head, manifest = check_export(path)
    assert (manifest.steps, manifest.signals, manifest.curations, manifest.sessions) == (7, 4, 3, 3)
    assert (head.pool_id, head.clawloop) == (one.keyring.pool_id, "0.1.0")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert import_export(other, path) == Imported(steps=7, signals=4, curations=3)
    assert everything(other) == everything(one)
    assert other.verify().ok
    assert import_export(other, path) == Imported(known=14)


def test_every_format_has_the_same_manifest(fresh: OpenPool, tmp_path: Path) -> None:
    pool = fresh()
    fill(pool)
    for name in NAMES:
        export(pool, tmp_path / name)
    assert len({msgspec.json.encode(check_export(tmp_path / name)[1]) for name in NAMES}) == 1


def test_a_table_has_columns_that_others_can_read(fresh: OpenPool, tmp_path: Path) -> None:
    parquet = import_module("pyarrow.parquet")
    pool, path = fresh(), tmp_path / "out.parquet"
    step = kept_step("s1")
    pool.keep_step(step).result()
    pool.keep_signal(mark(Target.STEP, step.step.step_id)).result()
    export(pool, path)
    rows = parquet.read_table(path).to_pylist()
    assert [row["type"] for row in rows] == ["step", "signal"]
    assert (rows[0]["prompt_ids"], rows[0]["response_logprobs"]) == ([1, 2, 3], [-0.1, -2.5])
    assert (rows[0]["adapter_version"], rows[0]["trainable"], rows[0]["temperature"]) == (3, True, 0.5)
    assert json.loads(rows[0]["messages"]) == [{"role": "user", "content": "hello"}]
    assert (rows[1]["value"], rows[1]["target"], rows[1]["step_id"]) == (0.25, "step", None)


def test_what_is_chosen_is_exported_and_nothing_else(fresh: OpenPool, tmp_path: Path) -> None:
    pool, path = fresh(), tmp_path / "out.jsonl"
    fill(pool)

    def ids(**chosen: Any) -> list[str]:
        export_pool(pool, path, Chosen(**chosen), replace=True)
        return [record["type"] for record in map(fields_in, path.read_bytes().splitlines()[1:-1])]

    assert ids(sessions=["s2"]) == ["step", "signal", "curation"]
    assert ids(sessions=["s1"], since_ms=1001, until_ms=1002) == ["step", "signal", "curation", "curation"], (
        "of the run"
    )
    assert ids(sessions=["s1"], since_ms=1002) == ["step", "signal", "curation"]
    assert ids(tags=["step"]) == ["step", "signal", "curation", "curation"]
    assert ids(quality_min=4) == []
    assert ids(trainable=False) == ["step", "step", "step", "signal", "curation"], "two that are not exact, and s2"
    assert ids(channel=Channel.VAL) == ["step"]
    assert ids(reward_min=0.2, reward_max=0.3, sessions=["s1"]) == ["step"] * 3 + ["signal"] * 2 + ["curation"] * 2
    assert ids(reward_min=0.3) == []
    assert ids(source="nobody") == []
    assert ids(since_ms=1003) == []
    export_pool(pool, path, Chosen(sessions=["s2"], text=False), replace=True)
    record = json.loads(path.read_text().splitlines()[1])
    assert not {"messages", "text", "reply", "tools"} & record.keys()
    assert "hello" not in path.read_text()
    other = fresh()
    assert import_export(other, path) == Imported(steps=1, signals=1, curations=1)
    assert [step.step for step in other.session_steps("s2")] == [step.step for step in pool.session_steps("s2")]
    with pytest.raises(PoolError, match="no session nobody"):
        export(pool, tmp_path / "none.jsonl", sessions=["nobody"])
    assert not list(tmp_path.glob("*none*")) + list(tmp_path.glob(".*"))


def test_what_was_forgotten_does_not_come_back(fresh: OpenPool, tmp_path: Path) -> None:
    pool, path = fresh(), tmp_path / "out.jsonl"
    fill(pool)
    export(pool, path)
    pool.submit(lambda db: pool.forgetting.forget(db, ["s1"])).result()
    before = everything(pool)
    assert import_export(pool, path) == Imported(known=7, forgotten=7)
    assert everything(pool) == before


def test_a_signal_on_what_is_not_here_is_counted(fresh: OpenPool, tmp_path: Path) -> None:
    one, other, path = fresh(), fresh(), tmp_path / "out.jsonl"
    fill(one)
    export(one, path, sessions=["s2"])
    other.submit(lambda db: other.forgetting.forget(db, ["s2"])).result()
    assert import_export(other, path) == Imported(forgotten=2, loose=1)


def test_what_is_there_is_not_replaced_unless_it_was_said(fresh: OpenPool, tmp_path: Path) -> None:
    pool, path = fresh(), tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(PoolError, match="--force"):
        export(pool, path)
    assert path.read_text() == "mine"
    export_pool(pool, path, Chosen(), replace=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    check_export(path)
    with pytest.raises(StorageError, match="cannot write"):
        export(pool, tmp_path / "nowhere" / "out.jsonl")


def test_a_file_that_came_meanwhile_is_not_replaced(
    fresh: OpenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, path = fresh(), tmp_path / "out.jsonl"
    pool.keep_step(kept_step()).result()
    with pytest.raises(PoolError, match="there already"):
        export_pool(pool, path, Chosen(), progress=lambda _: path.touch())
    assert path.read_bytes() == b""
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["out.jsonl"]


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _without_manifest(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


def _without_record(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([lines[0], *lines[2:]])


def _swapped(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([lines[0], lines[2], lines[1], *lines[3:]])


def _changed(data: bytes) -> bytes:
    assert b"-0.1" in data
    return data.replace(b"-0.1", b"-0.2", 1)


def _longer(data: bytes) -> bytes:
    return data + data.splitlines(keepends=True)[1]


def _other_version(data: bytes) -> bytes:
    return data.replace(b"clawloop.pool.v2", b"clawloop.pool.v9", 1)


def _other_type(data: bytes) -> bytes:
    return data.replace(b'"type":"step"', b'"type":"stop"', 1)


def _half_trainable(data: bytes) -> bytes:
    return data.replace(b'"trainable":true', b'"trainable":false', 1)


def _missing_field(data: bytes) -> bytes:
    return data.replace(b'"session_id"', b'"session"', 1)


JSONL_DAMAGES = (
    _cut,
    _without_manifest,
    _without_record,
    _swapped,
    _changed,
    _longer,
    _other_version,
    _other_type,
    _half_trainable,
    _missing_field,
)


@pytest.mark.parametrize("damage", JSONL_DAMAGES)
def test_a_file_that_is_not_what_was_written_is_refused_before_anything_is_kept(
    fresh: OpenPool, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    pool, path = fresh(), tmp_path / "out.jsonl"
    fill(pool)
    export(pool, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ExportInvalid, match=r"out\.jsonl"):
        check_export(path)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_changed_byte_is_refused_or_changes_no_record(fresh: OpenPool, tmp_path: Path, name: str) -> None:
    pool, path = fresh(), tmp_path / name
    fill(pool)
    export(pool, path)
    whole = path.read_bytes()
    _, manifest = check_export(path)
    refusals = 0
    for at in range(5, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert check_export(path)[1] == manifest
        except ExportInvalid:
            refusals += 1
        path.write_bytes(whole[:at])
        with pytest.raises(ExportInvalid):
            check_export(path)
    assert refusals > 10


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"[1]\n", b"no json\n", b"PAR1", b"\x28\xb5\x2f\xfd\x00\x00"])
def test_any_other_file_is_no_export(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.file"
    path.write_bytes(content)
    with pytest.raises(ExportInvalid, match=r"some\.file"):
        check_export(path)


def test_a_trainable_step_that_breaks_the_rules_of_steps_is_refused(fresh: OpenPool, tmp_path: Path) -> None:
    pool, path = fresh(), tmp_path / "out.jsonl"
    pool.keep_step(kept_step(response_logprobs=[0.5, -1.0])).result()
    export(pool, path)
    with pytest.raises(ExportInvalid, match="is not a finite number"):
        check_export(path)


def test_without_pyarrow_a_table_is_refused_by_name(
    fresh: OpenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(export_parquet, "import_module", missing)
    with pytest.raises(ConfigError, match=r"clawloop\[export\]"):
        export(fresh(), tmp_path / "out.parquet")
    assert not [one for one in tmp_path.iterdir() if one.is_file()]


texts = st.text(max_size=12)
numbers = st.integers(0, 2**62)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
steps = st.builds(
    Step,
    step_id=texts,
    session_id=texts,
    run_id=texts,
    prompt_ids=st.lists(numbers, max_size=4),
    response_ids=st.lists(numbers, max_size=4),
    response_logprobs=st.lists(st.none() | st.floats(allow_nan=False), max_size=4),
    policy=st.builds(Policy, line=texts, version=numbers, adapter_sha256=texts),
    sampling=st.builds(Sampling, temperature=st.floats(allow_nan=False), top_k=numbers, seed=st.none() | st.integers()),
    finish_reason=texts,
    created_ms=numbers,
    parent_id=texts,
    trajectory_id=texts,
    group_id=texts,
    group_size=numbers,
    channel=st.sampled_from(Channel),
    untrainable=texts,
    redacted=st.lists(st.tuples(numbers, numbers), max_size=2),
)
kept_steps = st.builds(
    KeptStep,
    step=steps,
    messages=st.lists(objects, max_size=3),
    reply=objects,
    tools=st.lists(objects, max_size=2),
    text=texts,
    kind=texts,
    app=texts,
    started_ms=numbers,
    first_token_ms=numbers,
    finished_ms=numbers,
)
signals = st.builds(
    Signal,
    signal_id=texts,
    target=st.sampled_from(Target),
    target_id=texts,
    source=texts,
    value=st.floats(allow_nan=False),
    created_ms=numbers,
    weight=st.floats(allow_nan=False),
    comment=texts,
    evidence=texts,
    hint=st.none() | st.builds(Hint, texts, numbers, st.lists(numbers, max_size=3)),
)
curations = st.builds(
    Curation,
    curation_id=texts,
    session_id=texts,
    target=st.sampled_from(Target),
    target_id=texts,
    created_ms=numbers,
    word=st.builds(
        Word,
        trainable=st.none() | st.booleans(),
        quality=st.none() | numbers,
        tags=st.lists(texts, max_size=2),
        untags=st.lists(texts, max_size=2),
        note=st.none() | texts,
    ),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kept_steps | signals | curations)
def test_every_field_of_a_record_comes_back(record: Record) -> None:
    assert record_of(fields_in(line_of(fields_of(record)))) == record


def run(home: EdgeHome, *arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments], input=given)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    """A home as `setup` makes it, with three sessions."""
    found = EdgeHome(tmp_path / "home")
    assert run(found, "setup", "--model", str(tiny_model), "--key-file", "--yes").exit_code == 0
    with open_pool(found, writer=True) as pool:
        fill(pool)
    return found


def test_the_command_says_that_the_file_is_not_encrypted(home: EdgeHome, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    told = run(home, "pool", "export", str(out), "--session", "s1")
    assert told.exit_code == 0, told.output
    assert "3 steps and 2 signals" in told.stdout
    assert "not encrypted" in told.stdout
    facts = json.loads(run(home, "pool", "export", str(tmp_path / "all.parquet"), "--json").stdout)
    assert (facts["steps"], facts["signals"], facts["encrypted"]) == (7, 4, False)
    assert (tmp_path / "all.parquet").read_bytes()[:4] == b"PAR1"
    assert isinstance(run(home, "pool", "export", str(out)).exception, PoolError)
    assert run(home, "pool", "export", str(out), "--force", "--tokens-only").exit_code == 0
    assert "hello" not in out.read_text()


def test_an_import_tells_what_it_took_and_asks_where_it_may_leave(home: EdgeHome, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    assert run(home, "pool", "export", str(out)).exit_code == 0
    known = json.loads(run(home, "pool", "import", str(out), "--json").stdout)
    assert (known["steps"], known["known"]) == (0, 14)
    assert "14 were here already" in run(home, "pool", "import", str(out)).stdout
    with open_pool(home, writer=True) as pool:
        ConsentLog(pool).set_level(Level.FULL)
    assert run(home, "pool", "import", str(out), given="n\n").exit_code == 1
    assert run(home, "pool", "import", str(out), "--yes").exit_code == 0
