"""No byte of what was said is in any file of the home, whether the edge runs, stopped, or was killed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.consent import ConsentLog, Recipient
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared.levels import Level
from clawloop_shared.records import Signal

from .conftest import Acknowledging

MakeKept = Callable[..., KeptStep]
MakeSignal = Callable[..., Signal]


def canaries() -> Iterator[str]:
    """Endless distinct secrets."""
    number = 0
    while True:
        number += 1
        yield f"CANARY{number:04d}kXq9vT2"


def found_in(folder: Path, secrets: list[str]) -> list[str]:
    """Where a secret shows in a file, in UTF-8 or UTF-16, or in a file's name."""
    hits = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in secrets:
            shapes = (secret.encode(), secret.encode("utf-16-le"), secret.encode().hex().encode())
            if secret in path.name or any(shape in content for shape in shapes):
                hits.append(f"{secret} in {path.name}")
    return hits


def plant(pool: Pool, make_kept: MakeKept, *, make_signal: MakeSignal) -> list[str]:
    """Secrets in every field that can hold one, through the pool, the receipts and each state of the outbox."""
    fresh, planted = canaries(), list[str]()

    def secret() -> str:
        planted.append(next(fresh))
        return planted[-1]

    consent, outbox = ConsentLog(pool), Outbox(pool, hold_s=0)
    consent.set_recipient(Recipient(url=f"https://{secret()}:8443", key=b"k" * 32))
    consent.set_level(Level.FULL)
    pool.set_state("membership", secret().encode()).result()
    for _ in range(6):
        kept = make_kept(
            session=f"session-{secret()}",
            words=secret(),
            messages=[
                {"role": "system", "content": f"{secret()} " * 100},
                {"role": "user", "content": secret()},
                {"role": "tool", "content": secret(), secret(): 1},
            ],
            tools=[{"type": "function", "function": {"name": "read", "description": secret()}}],
            prompt=list(secret().encode()),
            response=list(secret().encode()),
            text=secret(),
            app=secret(),
            kind=secret(),
        )
        pool.keep_step(kept, index={"reply": secret().encode()}).result()
        pool.keep_signal(make_signal(kept.step.step_id, comment=secret())).result()
        outbox.fill()
    items = [item.item_id for item in outbox.list()]
    assert len(items) == 6
    outbox.approve(items[0])
    outbox.drop(items[1])
    outbox.mark_sent(items[2:4])
    Acknowledging().acknowledge(outbox, items[2:3])
    AuditLog(pool).append("adapter", 10, sha256="0" * 64)
    return planted


def test_no_secret_is_in_any_file_of_a_running_or_stopped_pool(
    tmp_path: Path, key: bytes, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    with Pool.open(tmp_path, KnownKey.of(key), writer=True) as pool:
        secrets = plant(pool, make_kept, make_signal=make_signal)
        assert len(secrets) >= 70
        assert (tmp_path / "pool.db-wal").stat().st_size > 0
        assert found_in(tmp_path, secrets) == []
        assert pool.verify().problems == []
        ConsentLog(pool).set_level(Level.OFF)
        assert pool.verify().problems == []
        assert found_in(tmp_path, secrets) == []
    assert found_in(tmp_path, secrets) == []
    assert not [path for path in tmp_path.iterdir() if path.stat().st_mode & 0o077]


def test_errors_and_logs_of_a_damaged_pool_hold_no_secret(
    tmp_path: Path, key: bytes, make_kept: MakeKept, caplog: pytest.LogCaptureFixture
) -> None:
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        kept = make_kept(words="CANARY", messages=[{"role": "user", "content": "CANARY" * 800}])
        pool.keep_step(kept).result()
        pool.submit(lambda database: database.execute("UPDATE parts SET body = x'0102'")).result()
        problems = pool.verify().problems
    assert problems
    assert "CANARY" not in "".join(problems) + caplog.text


def test_dropping_an_item_destroys_its_key(pool: Pool, make_kept: MakeKept) -> None:
    ConsentLog(pool).set_level(Level.FULL)
    outbox = Outbox(pool, hold_s=0)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    (item,) = outbox.list()
    query = "SELECT count(*) FROM keys WHERE scope LIKE 'outbox/%'"
    with pool.read() as database:
        assert database.execute(query).fetchone()[0] == 1
    outbox.drop(item.item_id)
    with pool.read() as database:
        assert database.execute(query).fetchone()[0] == 0
