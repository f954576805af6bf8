import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared import merkle
from clawloop_shared.errors import ProofInvalid

# The reference leaves, roots and proofs of the certificate-transparency project (merkletree/tree_test_vectors).
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


class Tree:
    """A list with the hashes of its complete subtrees, which counts how often one is read."""

    def __init__(self, entries: Sequence[bytes] = ()) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.size = self.reads = 0
        for entry in entries:
            self.append(entry)

    def append(self, entry: bytes) -> None:
        for level, position, found in merkle.appended(self.size, merkle.leaf_hash(entry), self.read):
            assert (level, position) not in self.nodes, "a complete subtree never changes"
            self.nodes[level, position] = found
        self.size += 1

    def read(self, level: int, position: int) -> bytes:
        self.reads += 1
        return self.nodes[level, position]

    def root(self, size: int | None = None) -> bytes:
        return merkle.root(self.size if size is None else size, self.read)


# The definitions of RFC 9162 section 2.1, word for word.


def naive_root(entries: Sequence[bytes]) -> bytes:
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = below(len(entries))
    return hashlib.sha256(b"\x01" + naive_root(entries[:k]) + naive_root(entries[k:])).digest()


def naive_path(m: int, entries: Sequence[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = below(len(entries))
    if m < k:
        return [*naive_path(m, entries[:k]), naive_root(entries[k:])]
    return [*naive_path(m - k, entries[k:]), naive_root(entries[:k])]


def naive_subproof(m: int, entries: Sequence[bytes], *, known: bool) -> list[bytes]:
    if m == len(entries):
        return [] if known else [naive_root(entries)]
    k = below(len(entries))
    if m <= k:
        return [*naive_subproof(m, entries[:k], known=known), naive_root(entries[k:])]
    return [*naive_subproof(m - k, entries[k:], known=False), naive_root(entries[:k])]


def below(size: int) -> int:
    k = 1
    while k * 2 < size:
        k *= 2
    return k


def entries_of(size: int) -> list[bytes]:
    return [b"entry %d" % number for number in range(size)]


def test_the_reference_leaves_have_the_reference_roots() -> None:
    assert merkle.root(0, Tree().read).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    tree = Tree(LEAVES)
    assert [tree.root(size).hex() for size in range(1, 9)] == ROOTS


def test_the_reference_proofs_come_out() -> None:
    tree = Tree(LEAVES)
    assert [part.hex() for part in merkle.inclusion_proof(0, 8, tree.read)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    assert [part.hex() for part in merkle.consistency_proof(6, 8, tree.read)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=70), st.data())
def test_roots_and_proofs_are_those_of_the_rfc_and_verify(entries: list[bytes], data: st.DataObject) -> None:
    tree, size = Tree(entries), data.draw(st.integers(1, len(entries)))
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size))
    assert tree.root(size) == naive_root(entries[:size])
    path = merkle.inclusion_proof(index, size, tree.read)
    assert path == naive_path(index, entries[:size])
    leaf = merkle.leaf_hash(entries[index])
    merkle.check_inclusion(leaf, index, size=size, proof=path, root=tree.root(size))
    proof = merkle.consistency_proof(old, size, tree.read)
    assert proof == (naive_subproof(old, entries[:size], known=True) if old else [])
    merkle.check_consistency(old, tree.root(old), new_size=size, new_root=tree.root(size), proof=proof)


def wrong(proof: list[bytes]) -> list[list[bytes]]:
    """Every kind of damage: cut at either end, something too much, in another order, a bit that is another."""
    other = hashlib.sha256(b"other").digest()
    found = [[*proof, other], [other, *proof], [*proof, *proof[-1:], *proof[-1:]]]
    if proof:
        found += [proof[:-1], proof[1:], [proof[0][:-1], *proof[1:]], [proof[0] + b"\0", *proof[1:]]]
        found += [[*proof[:n], bytes([part[0] ^ 1]) + part[1:], *proof[n + 1 :]] for n, part in enumerate(proof)]
    if len(proof) > 1:
        found += [proof[::-1], [proof[1], proof[0], *proof[2:]]]
    return [one for one in found if one != proof]


@pytest.mark.parametrize("size", range(1, 18))
def test_a_wrong_inclusion_proof_is_refused(size: int) -> None:
    tree = Tree(entries_of(size))

    def refused(index: int, proof: list[bytes], *, leaf: bytes, size: int, root: bytes) -> None:
        with pytest.raises(ProofInvalid):
            merkle.check_inclusion(leaf, index, size=size, proof=proof, root=root)

    for index in range(size):
        proof, leaf = merkle.inclusion_proof(index, size, tree.read), merkle.leaf_hash(b"entry %d" % index)
        for one in wrong(proof):
            refused(index, one, leaf=leaf, size=size, root=tree.root())
        for other in {-1, size, *range(size)} - {index}:
            refused(other, proof, leaf=leaf, size=size, root=tree.root())
        refused(index, proof, leaf=merkle.leaf_hash(b"another"), size=size, root=tree.root())
        refused(index, proof, leaf=leaf, size=size, root=merkle.EMPTY_ROOT)
        refused(index, proof, leaf=leaf, size=merkle.MAX_SIZE, root=tree.root())


def test_an_entry_is_not_shown_in_a_log_of_another_size() -> None:
    tree = Tree(entries_of(20))
    for index in range(13):
        proof, leaf = merkle.inclusion_proof(index, 13, tree.read), merkle.leaf_hash(b"entry %d" % index)
        for size in set(range(21)) - {13}:
            with pytest.raises(ProofInvalid):
                merkle.check_inclusion(leaf, index, size=size, proof=proof, root=tree.root(size))


@pytest.mark.parametrize("new", range(1, 18))
def test_a_wrong_consistency_proof_is_refused(new: int) -> None:
    tree, fork = Tree(entries_of(new)), Tree([b"fork", *entries_of(new)[1:]])

    def refused(old: int, old_root: bytes, *, new_size: int, new_root: bytes, proof: list[bytes]) -> None:
        with pytest.raises(ProofInvalid):
            merkle.check_consistency(old, old_root, new_size=new_size, new_root=new_root, proof=proof)

    for old in range(new + 1):
        proof, old_root = merkle.consistency_proof(old, new, tree.read), tree.root(old)
        for one in wrong(proof):
            refused(old, old_root, new_size=new, new_root=tree.root(), proof=one)
        refused(old, merkle.leaf_hash(b"?"), new_size=new, new_root=tree.root(), proof=proof)
        if old:
            refused(old, old_root, new_size=new, new_root=fork.root(), proof=proof)
            forked = merkle.consistency_proof(old, new, fork.read)
            refused(old, old_root, new_size=new, new_root=fork.root(), proof=forked)
        for other in set(range(new + 1)) - {old}:
            refused(other, old_root, new_size=new, new_root=tree.root(), proof=proof)
    refused(new, tree.root(), new_size=new - 1, new_root=tree.root(new - 1), proof=[])
    refused(new, tree.root(), new_size=merkle.MAX_SIZE, new_root=tree.root(), proof=[])


def test_what_cannot_be_proved_is_not() -> None:
    tree = Tree(entries_of(3))
    for index, size in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ProofInvalid, match="no entry"):
            merkle.inclusion_proof(index, size, tree.read)
    for old, new in ((4, 3), (-1, 3)):
        with pytest.raises(ProofInvalid, match="cannot go on"):
            merkle.consistency_proof(old, new, tree.read)


def test_a_proof_of_many_entries_takes_few_reads() -> None:
    size = 10_007
    tree = Tree(entries_of(size))
    most = 2 * size.bit_length()
    for index in (0, 1, 4096, 8191, 8192, 10_000, size - 1):
        tree.reads = 0
        assert len(merkle.inclusion_proof(index, size, tree.read)) <= size.bit_length()
        assert tree.reads <= most
        tree.reads = 0
        assert len(merkle.consistency_proof(index, size, tree.read)) <= size.bit_length() + 1
        assert tree.reads <= most
