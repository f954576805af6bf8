"""Trie packing: nothing is lost, nothing is computed twice, and each token sees exactly its own past."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.trainer import packing
from clawloop_server.trainer.packing import PackedRow, pack
from clawloop_shared.rows import Sample

Session = Callable[..., list[Sample]]
sequences = st.lists(st.integers(0, 3), min_size=2, max_size=8)


def make(ids: list[int], *, trajectory: int = 0, trained: list[int] | None = None) -> Sample:
    at = trained if trained is not None else list(range(1, len(ids)))
    numbers = [float(i) for i in at]
    return Sample("step", trajectory, ids, at, [-n for n in numbers], numbers, weight=1.0 / (1 + trajectory))


def past(row: PackedRow, node: int) -> list[int]:
    """What a node sees, in the order of positions, itself last."""
    seen = row.sees_TT()[node].nonzero().squeeze(1)
    order = seen[row.positions_T[seen].argsort()]
    assert row.positions_T[order].tolist() == list(range(len(order)))
    return row.token_ids_T[order].tolist()


@given(st.lists(sequences, min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
def test_every_trained_token_is_predicted_once_and_from_exactly_what_came_before_it(
    many: list[list[int]], row_tokens: int, join_tokens: int, fill: bool, data: st.DataObject
) -> None:
    whose = data.draw(st.lists(st.integers(0, 3), min_size=len(many), max_size=len(many)))
    samples = [make(ids, trajectory=whose[i]) for i, ids in enumerate(many)]
    found: dict[int, list[tuple[list[int], int, float]]] = {}
    shared = data.draw(st.integers(0, 3))
    for row in pack(samples, row_tokens=row_tokens, join_tokens=join_tokens, fill=fill, min_shared=shared):
        at = 0
        for member, count in zip(row.members_S, row.counts_S, strict=True):
            for p in range(at, at + count):
                entry = (past(row, int(row.predictor_P[p])), int(row.target_P[p]), float(row.behaviour_P[p]))
                found.setdefault(member, []).append(entry)
                assert int(row.trajectory_U[row.unit_P[p]]) == samples[member].trajectory
            at += count
        assert at == len(row.target_P)
    wanted = {i: [(list(s.token_ids[:p]), s.token_ids[p], -float(p)) for p in s.trained] for i, s in enumerate(samples)}
    assert found == wanted


@given(st.lists(sequences, min_size=1, max_size=8))
def test_a_row_has_one_node_for_each_different_prefix(many: list[list[int]]) -> None:
    (row,) = pack([make(ids) for ids in many], row_tokens=10_000, fill=True)
    prefixes = {tuple(ids[: n + 1]) for ids in many for n in range(len(ids))}
    assert len(row.token_ids_T) == len(prefixes)


@given(st.lists(sequences, min_size=1, max_size=12), st.integers(4, 30))
def test_rows_keep_to_their_budget_and_trajectories_stay_whole_where_they_fit(
    many: list[list[int]], row_tokens: int
) -> None:
    samples = [make(ids, trajectory=i // 3) for i, ids in enumerate(many)]
    rows = pack(samples, row_tokens=row_tokens, fill=True)
    for row in rows:
        assert len(row.token_ids_T) <= row_tokens or len(row.members_S) == 1
    for trajectory in {s.trajectory for s in samples}:
        mine = [s for s in samples if s.trajectory == trajectory]
        alone = len(pack(mine, row_tokens=10_000, fill=True)[0].token_ids_T)
        homes = [row for row in rows if trajectory in row.trajectory_U.tolist()]
        assert len(homes) == 1 or alone > row_tokens
        members = [samples[member] for row in homes for member in row.members_S]
        assert sum(s.trajectory == trajectory for s in members) == len(mine)


@given(st.lists(sequences, min_size=1, max_size=20), st.integers(4, 30), st.integers(1, 8))
def test_filled_rows_leave_less_room_than_would_hold_another(
    many: list[list[int]], row_tokens: int, min_shared: int
) -> None:
    rows = pack(
        [make(ids, trajectory=i) for i, ids in enumerate(many)],
        row_tokens=row_tokens,
        fill=True,
        min_shared=min_shared,
    )
    sizes = sorted(len(row.token_ids_T) for row in rows)
    # Two rows that fit one would be one; sizes are at most what was planned, since roots of rows may share by chance.
    apart = pack([make(ids, trajectory=i) for i, ids in enumerate(many)], row_tokens=row_tokens, min_shared=min_shared)
    assert len(rows) <= len(apart)
    planned = sum(len(row.token_ids_T) for row in apart)
    assert len(rows) <= 2 * planned / row_tokens + 1
    assert sum(sizes) <= planned


def test_those_that_share_stay_together_where_rows_are_filled() -> None:
    system, samples = list(range(1000, 1040)), []
    for trajectory in range(8):
        own = list(range(100 * trajectory, 100 * trajectory + 20))
        samples.append(make((system if trajectory % 2 else []) + own, trajectory=trajectory))
    rows = pack(samples, row_tokens=130, fill=True)
    homes = [set(row.trajectory_U.tolist()) for row in rows]
    assert sorted(map(len, homes)) == [4, 4]
    assert {1, 3, 5, 7} in homes
    assert sorted(len(row.token_ids_T) for row in rows) == [80, 120]


def test_where_the_mask_is_dense_long_trajectories_stay_whole_but_do_not_join() -> None:
    system = list(range(1000, 1040))
    samples = [
        make(system + list(range(100 * t, 100 * t + 10 * turn)), trajectory=t) for t in range(3) for turn in range(1, 9)
    ]
    assert [len(r.token_ids_T) for r in pack(samples, row_tokens=1000, join_tokens=150)] == [120, 120, 120]
    assert [len(r.token_ids_T) for r in pack(samples, row_tokens=1000, join_tokens=200)] == [200, 120]


def test_a_session_of_two_thousand_calls_packs_without_looking_at_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, work = list[int](), packing._shared

    def counted(one: bytes, other: bytes) -> int:
        compared.append(1)
        return work(one, other)

    monkeypatch.setattr(packing, "_shared", counted)
    history, samples = [0] * 200, []
    for turn in range(2000):
        history = [*history, turn, turn + 1, turn + 2]
        if turn % 50 == 49:
            history = history[: len(history) // 2]
        samples.append(make(history, trained=[len(history) - 1]))
    (row,) = pack(samples, row_tokens=1 << 20)
    assert len(compared) == len(samples) - 1
    assert len(row.target_P) == 2000


def test_an_append_only_session_of_eight_turns_needs_five_times_fewer_tokens() -> None:
    counter = iter(range(10_000))
    history = [next(counter) for _ in range(256 + 32)]
    samples = []
    for _ in range(8):
        response = [next(counter) for _ in range(64)]
        samples.append(make(history + response, trained=list(range(len(history), len(history) + 64))))
        history = history + response + [next(counter) for _ in range(96)]
    (row,) = pack(samples, row_tokens=2048)
    # The last turn's 96 tokens of tool result are in no call.
    assert (sum(len(s.token_ids) for s in samples), len(row.token_ids_T)) == (7296, 1472)
    assert row.is_causal


def test_unrelated_sessions_share_a_row_only_where_that_is_asked_for() -> None:
    samples = [make([1, 2, 3, 4], trajectory=0), make([5, 6, 7, 8], trajectory=1)]
    assert [len(r.token_ids_T) for r in pack(samples, row_tokens=100, min_shared=2)] == [4, 4]
    (row,) = pack(samples, row_tokens=100, fill=True)
    assert row.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert not row.is_causal
    assert row.end_T.tolist() == [4] * 4 + [8] * 4


def test_a_fork_is_seen_by_neither_branch_of_the_other() -> None:
    (row,) = pack([make([1, 2, 3, 4]), make([1, 2, 5, 6])], row_tokens=100, min_shared=1)
    assert row.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.end_T.tolist() == [6, 6, 4, 4, 6, 6]
    sees = row.sees_TT()
    assert sees[3].tolist() == [True, True, True, True, False, False]
    assert sees[5].tolist() == [True, True, False, False, True, True]


def test_the_same_samples_pack_into_the_same_rows(session: Session) -> None:
    one, other = (pack(session(5), row_tokens=64) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert a.members_S == b.members_S
        assert torch.equal(a.token_ids_T, b.token_ids_T)
