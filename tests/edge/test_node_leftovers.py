"""What a killed edge left in its home is gone when the next one has started."""

import os
import time
from pathlib import Path

from clawloop_edge.node import leftovers

OLD, YOUNG = f"{'0' * 64}.part", f"{'1' * 64}.part"


def test_a_key_in_plain_and_what_was_fetched_and_abandoned_go(tmp_path: Path) -> None:
    leftovers.clear(tmp_path)
    assert list(tmp_path.iterdir()) == [], "a home without them stays as it is"
    node, fetched = tmp_path / leftovers.NODE, tmp_path / leftovers.FETCHED
    node.mkdir()
    fetched.mkdir()
    (node / leftovers.KEY_FILE).write_bytes(b"a private key")
    (node / "ca.pem").write_bytes(b"the certificate of the server")
    for name in (OLD, YOUNG):
        (fetched / name).write_bytes(b"half of an adapter")
    before_s = time.time() - leftovers.ABANDONED_S - 60
    os.utime(fetched / OLD, (before_s, before_s))
    leftovers.clear(tmp_path)
    assert [path.name for path in node.iterdir()] == ["ca.pem"]
    assert [path.name for path in fetched.iterdir()] == [YOUNG]
