"""Published files: the old one or the new one, never a part, and private where they should be."""

from pathlib import Path

import pytest

from clawloop_shared.errors import StorageError
from clawloop_shared.files import private_folder, publish, publish_secret, sha256, sha256_file


def test_a_published_file_replaces_the_old_one_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "note"
    publish(path, b"one")
    publish(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in tmp_path.iterdir()] == ["note"]
    assert sha256_file(path) == sha256(b"two")


def test_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    publish_secret(tmp_path / "token", b"secret")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert private_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_missing_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        publish(tmp_path / "none" / "note", b"one")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file_is_said_and_no_draft_is_left(tmp_path: Path) -> None:
    (tmp_path / "note").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        publish(tmp_path / "note", b"one")
    assert [each.name for each in tmp_path.iterdir()] == ["note"]
