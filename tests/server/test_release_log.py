"""The server's log of released adapters: every release is in it, and `log verify` finds what was done to it."""

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from clawloop_server.bases import Base
from clawloop_server.cli.commands import app
from clawloop_server.errors import ReleaseError
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.log_check import check_logs
from clawloop_server.release.records import Candidate
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import give_again, release_candidate, renew_expiring, roll_back
from clawloop_server.vault import schema
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.store import Vault
from clawloop_shared import merkle, signing, wire
from clawloop_shared.database import migrate, open_database, transaction
from clawloop_shared.envelope import derive_key
from clawloop_shared.errors import StorageError
from clawloop_shared.log_head import LogProof, TreeHead, entry_leaf, open_head, sign_head
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe, SignedManifest

DAY_MS = 86_400_000


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


@pytest.fixture
def seven(registry: Registry, keys: ServerKeys, base: Base) -> Registry:
    """Seven releases, versions 1 to 7 in entries 0 to 6."""
    for number in range(7):
        release(registry, keys, base, now_ms=1000 + number)
    return registry


def add(registry: Registry, base: Base, *, cohort: str = "") -> int:
    made = Candidate(
        round_id="round",
        line=base.line,
        files={CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"},
        rank=8,
        alpha=16.0,
        target_modules=["q_proj"],
        probe=Probe(ids=[1, 2], logprobs=[-0.5]),
        evaluation=Evaluation(suite="tools", episodes=8, reward=0.5, reward_before=0.25, standard_error=0.1),
        lineage_root="root",
        cohort=cohort,
    )
    return registry.record_candidate(made)


def release(registry: Registry, keys: ServerKeys, base: Base, *, now_ms: int, cohort: str = "") -> int:
    version = add(registry, base, cohort=cohort)
    release_candidate(registry, keys, version=version, now_ms=now_ms)
    return version


def versions(registry: Registry, base: Base) -> list[int]:
    return [entry.version for entry in registry.log.entries(base.line_id, limit=99)][::-1]


def checked(proof: LogProof | None, registry: Registry, keys: ServerKeys, *, version: int) -> TreeHead:
    """The head, if the proof shows what it says it does."""
    assert proof
    head, manifest = open_head(proof.head, keys.release_public), registry.adapter(version).manifest
    assert manifest
    leaf, root = entry_leaf(version, manifest.sha256), bytes.fromhex(head.root)
    merkle.check_inclusion(leaf, proof.index, size=head.size, proof=proof.inclusion, root=root)
    old = registry.log.root(head.line_id, proof.from_size)
    merkle.check_consistency(proof.from_size, old, new_size=head.size, new_root=root, proof=proof.consistency)
    return head


def test_every_way_to_release_is_in_the_log_in_the_order_of_release(
    registry: Registry, keys: ServerKeys, base: Base
) -> None:
    release(registry, keys, base, now_ms=1000)
    waiting = add(registry, base)
    release(registry, keys, base, now_ms=1001, cohort="apart")
    release_candidate(registry, keys, version=waiting, now_ms=1002)
    back = roll_back(registry, keys, to_version=1, now_ms=1003)
    renewed = renew_expiring(registry, keys, line_id=base.line_id, expires_days=14, now_ms=13 * DAY_MS)
    again = give_again(registry, keys, line_id=base.line_id, cohort="apart", above=99, now_ms=14 * DAY_MS)
    logged = versions(registry, base)
    assert len(logged) == len(set(logged)) == 6
    assert logged[0] == 1
    assert logged[-3:] == [back, renewed, again]
    assert {record.version for record in registry.adapters() if record.manifest} == set(logged)
    head = checked(registry.log.proof(logged[2], from_size=2), registry, keys, version=logged[2])
    assert (head.size, head.line_id, head.at_ms) == (6, base.line_id, 14 * DAY_MS)
    (report,) = check_logs(registry.log._database, keys.release_public)
    assert (report.is_whole, report.size, report.heads, report.root) == (True, 6, 6, head.root)


def test_a_release_that_fails_leaves_no_entry(registry: Registry, keys: ServerKeys, base: Base) -> None:
    version = release(registry, keys, base, now_ms=1000)

    def cut_short() -> None:
        with registry.within():
            release(registry, keys, base, now_ms=1001)
            assert versions(registry, base) == [version, version + 1]
            raise RuntimeError("cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        cut_short()
    with pytest.raises(ReleaseError, match="only a candidate"):
        release_candidate(registry, keys, version=version)
    assert versions(registry, base) == [version]
    head = registry.log.head(base.line_id)
    assert head
    assert open_head(head, keys.release_public).size == 1


def test_what_a_device_is_given_proves_itself(seven: Registry, keys: ServerKeys, base: Base) -> None:
    for version in range(1, 8):
        for from_size in range(8):
            proof = seven.log.proof(version, from_size=from_size)
            assert checked(proof, seven, keys, version=version).size == 7
            assert proof
            assert proof.from_size == from_size
    longer = seven.log.proof(7, from_size=8)
    assert longer
    assert (longer.from_size, longer.consistency) == (0, [])
    assert seven.log.proof(8) is None


def test_a_new_release_key_signs_a_head_of_its_own(seven: Registry, keys: ServerKeys, base: Base) -> None:
    new = signing.new_key()
    first = seven.log.head(base.line_id)
    seven.log.sign_heads(keys.release)
    assert seven.log.head(base.line_id) == first
    seven.log.sign_heads(new)
    head = seven.log.head(base.line_id)
    assert head
    assert open_head(head, signing.public_key(new)).size == 7
    for public in (keys.release_public, signing.public_key(new)):
        proof = seven.log.proof(7, key_id=signing.key_id(public))
        assert proof
        assert open_head(proof.head, public).size == 7
    assert seven.log.proof(7, key_id="another") is None
    (report,) = check_logs(seven.log._database, signing.public_key(new))
    assert (report.is_whole, report.heads, report.unchecked) == (True, 8, 14)


def test_no_second_head_is_signed_for_a_size(seven: Registry, keys: ServerKeys, base: Base) -> None:
    other = sign_head(TreeHead(line_id=base.line_id, size=7, root="00" * 32, at_ms=1), keys.release)
    sql = "UPDATE log_heads SET head = ? WHERE size = 7"
    seven.log._database.run(sql, [wire.encode(other)])
    with pytest.raises(ReleaseError, match="not the one that a head was signed for"):
        seven.log.sign_head(base.line_id, keys.release)


def test_a_hash_that_is_gone_stops_the_release_and_is_named(seven: Registry, keys: ServerKeys, base: Base) -> None:
    seven.log._database.run("DELETE FROM log_nodes WHERE level = 1 AND position = 2")
    with pytest.raises(StorageError, match="lacks hash 2 of level 1; run `clawloop-server log verify`"):
        release(seven, keys, base, now_ms=2000)
    assert seven.log.size(base.line_id) == 7
    assert seven.current(base.line_id) == seven.adapter(7)


Damage = Callable[[ServerDatabase], object]


def swap(database: ServerDatabase) -> None:
    """Two entries change places, and everything that is computed from them is made anew."""
    for sql in (
        "UPDATE log_entries SET position = 99 WHERE position = 2",
        "UPDATE log_entries SET position = 2 WHERE position = 4",
        "UPDATE log_entries SET position = 4 WHERE position = 99",
    ):
        database.run(sql)


def rebuild(database: ServerDatabase) -> None:
    """Make all hashes anew from the entries, as one who knows how would; heads cannot be."""
    rows = database.rows("SELECT line_id, version, manifest_sha256 FROM log_entries ORDER BY position")
    database.run("DELETE FROM log_nodes")
    nodes: dict[tuple[int, int], bytes] = {}
    for place, (_, version, digest) in enumerate(rows):
        for level, position, found in merkle.appended(place, entry_leaf(version, digest), lambda *at: nodes[at]):
            nodes[level, position] = found
    line_id = rows[0][0]
    database.run_each("INSERT INTO log_nodes VALUES (?, ?, ?, ?)", [(line_id, *at, h) for at, h in nodes.items()])


def swap_whole(database: ServerDatabase) -> None:
    swap(database)
    rebuild(database)


def drop_whole(database: ServerDatabase) -> None:
    database.run("DELETE FROM log_entries WHERE position = 3")
    database.run("DELETE FROM adapters WHERE version = 4")
    for place in range(4, 7):
        database.run("UPDATE log_entries SET position = ? WHERE position = ?", [place - 1, place])
    rebuild(database)


def cut_end(database: ServerDatabase) -> None:
    database.run("DELETE FROM log_entries WHERE position = 6")
    database.run("DELETE FROM log_heads WHERE size = 7")
    rebuild(database)


def other_manifest(database: ServerDatabase) -> None:
    """An adapter gets the manifest of another, and the log says so too."""
    database.run("UPDATE adapters SET manifest = (SELECT manifest FROM adapters WHERE version = 2) WHERE version = 5")
    row = database.row("SELECT manifest_sha256 FROM log_entries WHERE version = 2")
    database.run("UPDATE log_entries SET manifest_sha256 = ? WHERE version = 5", row or ())
    rebuild(database)


def other_body(database: ServerDatabase) -> None:
    row = database.row("SELECT manifest FROM adapters WHERE version = 3")
    assert row
    signed = wire.decode(row[0], SignedManifest)
    changed = type(signed)(signed.body.replace(b'"rank":8', b'"rank":9'), signed.key_id, signed.signature)
    database.run("UPDATE adapters SET manifest = ? WHERE version = 3", [wire.encode(changed)])


DAMAGES: list[tuple[Damage, str]] = [
    (lambda d: d.run("DELETE FROM log_entries WHERE position = 3"), "entry 3 was removed; adapter 4 was released"),
    (lambda d: d.run("DELETE FROM log_entries WHERE position = 6"), "entry 6 was removed; adapter 7 was released"),
    (lambda d: d.run("DELETE FROM adapters WHERE version = 4"), "entry 3 (adapter 4): its manifest was removed"),
    (lambda d: d.run("UPDATE log_entries SET version = 70 WHERE position = 6"), "(adapter 70): its manifest was rem"),
    (lambda d: d.run("UPDATE log_entries SET manifest_sha256 = 'x' WHERE version = 2"), "entry 1 (adapter 2) was ch"),
    (lambda d: d.run("UPDATE log_nodes SET hash = x'00' WHERE level = 0 AND position = 2"), "entry 2 (adapter 3) was"),
    (lambda d: d.run("UPDATE log_nodes SET hash = x'00' WHERE level = 2 AND position = 0"), "over entries 0 to 3"),
    (lambda d: d.run("DELETE FROM log_nodes WHERE level = 1 AND position = 2"), "over entries 4 to 5"),
    (lambda d: d.run("UPDATE log_entries SET position = 1 << 60 WHERE position = 6"), f"entry {1 << 60}, far beyond"),
    (lambda d: d.run("UPDATE log_heads SET size = 9 WHERE size = 7"), "the head signed at 9 entries was changed"),
    (swap, "entry 2 (adapter 5) was put elsewhere: it was entry 4; adapter 3 was released in its place"),
    (swap_whole, "the head signed at 3 entries has another root: entry 2 or one before it"),
    (drop_whole, "the head signed at 4 entries has another root: entry 3 or one before it"),
    (cut_end, "adapter 7 was released and is not in the log: its entry was removed"),
    (other_body, "entry 2 (adapter 3) was changed after it was released"),
    (other_manifest, "entry 4 (adapter 5) was changed: its manifest is of adapter 2"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_what_was_done_to_the_log_is_named(seven: Registry, keys: ServerKeys, damage: Damage, named: str) -> None:
    with seven.within() as database:
        damage(database)
    (report,) = check_logs(seven.log._database, keys.release_public)
    assert not report.is_whole
    assert named in "\n".join(report.troubles)


def test_a_head_that_another_key_signed_as_this_one_is_found(seven: Registry, keys: ServerKeys, base: Base) -> None:
    head = TreeHead(line_id=base.line_id, size=7, root=seven.log.root(base.line_id, 7).hex(), at_ms=1)
    forged = sign_head(head, signing.new_key())
    forged = type(forged)(forged.body, signing.key_id(keys.release_public), forged.signature)
    seven.log._database.run("UPDATE log_heads SET head = ? WHERE size = 7", [wire.encode(forged)])
    (report,) = check_logs(seven.log._database, keys.release_public)
    assert "the head signed at 7 entries was changed: the signature" in report.troubles[0]


def test_the_commands_show_the_log_and_say_when_it_is_broken(seven: Registry, home: Home, base: Base) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["--home", str(home.folder), "log", *arguments])
        return found.exit_code, found.output

    code, shown = run("show", "--json", "--limit", "2")
    (line,) = json.loads(shown)
    assert (code, line["size"], [entry["version"] for entry in line["entries"]]) == (0, 7, [7, 6])
    assert json.loads(line["head"])["root"] == line["root"] == seven.log.root(base.line_id, 7).hex()
    assert line["root"] in run("show")[1]
    code, shown = run("verify")
    assert code == 0
    assert f"line {base.line_id}: whole, 7 entries, root {line['root']}, 7 signed heads agree" in shown

    seven.log._database.run("DELETE FROM log_entries WHERE position = 3")
    code, shown = run("verify")
    assert code == 1
    assert "NOT WHOLE" in shown
    assert "entry 3 was removed; adapter 4 was released in its place" in shown
    code, shown = run("verify", "--json")
    assert code == 1
    assert '"troubles"' in shown


def test_a_server_without_releases_has_an_empty_log(vault: Vault, home: Home) -> None:
    for command in ("show", "verify"):
        found = CliRunner().invoke(app, ["--home", str(home.folder), "log", command])
        assert (found.exit_code, found.output.startswith("nothing was released yet")) == (0, True)


def test_what_was_released_before_there_was_a_log_comes_first_in_it(
    seven: Registry, home: Home, keys: ServerKeys, base: Base, vault: Vault
) -> None:
    root = seven.log.root(base.line_id, 7)
    vault.close()
    database = open_database(home.database, derive_key(keys.master, "clawloop server.db"))
    with transaction(database):
        for table in ("log_entries", "log_nodes", "log_heads"):
            database.execute(f"DROP TABLE {table}")
        database.execute("DELETE FROM _sqlite_migrations WHERE name = '_log'")
    migrate(database, "server", migrations=schema._MIGRATIONS)
    database.close()
    again = ServerDatabase.open(home.database, keys.master)
    registry = Registry(again, home.adapters)
    assert versions(registry, base) == [1, 2, 3, 4, 5, 6, 7]
    assert registry.log.root(base.line_id, 7) == root
    assert registry.log.proof(3) is None, "no head was signed yet"
    registry.log.sign_heads(keys.release)
    assert checked(registry.log.proof(3, from_size=2), registry, keys, version=3).size == 7
    (report,) = check_logs(again, keys.release_public)
    assert (report.is_whole, report.heads) == (True, 1)
    assert release(registry, keys, base, now_ms=5000) == 8
    assert versions(registry, base)[-1] == 8
    again.close()
