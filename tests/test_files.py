"""One way to write a file: whole or not at all, as anybody's file, with nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from processes import PATH
from sapwood import files


def test_an_error_in_the_midst_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.in_one_step(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_permissions_of_any_file_and_the_umask_is_never_touched(tmp_path, monkeypatch, mask):
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("other threads would write under this umask"))
            files.write_in_one_step(tmp_path / "ours", b"")
        (tmp_path / "any").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_killed_write_leaves_the_old_file_and_what_it_left_is_removed_in_time(tmp_path):
    path = tmp_path / "masks.safetensors"
    files.write_in_one_step(path, b"old")
    script = (
        "import os, sys; from pathlib import Path; from sapwood import files\n"
        "with files.in_one_step(Path(sys.argv[1])) as file:\n"
        "    file.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], env={**os.environ, "PYTHONPATH": PATH})
    assert ended.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    (remnant,) = tmp_path.glob(files.REMNANTS)
    files.write_in_one_step(path, b"new")  # it may be another process's, which is writing just now
    assert remnant.exists()
    long_ago = time.time() - 2 * files.FORGOTTEN
    os.utime(remnant, (long_ago, long_ago))
    files.write_in_one_step(path, b"newer")
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"newer"


def test_a_link_planted_in_a_shared_folder_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "known")
    (tmp_path / ".a.known.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "a", "theirs")
    assert victim.read_text() == "mine"


def test_devices_and_folders_are_not_replaced_and_errors_name_the_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere" / "a"):
        with pytest.raises(OSError) as caught:
            files.write_in_one_step(path, b"")
        assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_full_disk_that_a_library_hides_is_found(tmp_path):
    with pytest.raises(OSError) as caught, files.in_one_step(tmp_path / "a"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904  # as torch.save does
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert not os.listdir(tmp_path)


def test_json_is_sealed(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1, 2.5, None], "b": "ü"})
    assert files.read_json(path) == {"a": [1, 2.5, None], "b": "ü"}
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="checksum"):
        files.read_json(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": ', b"NaN"])
def test_no_file_raises_anything_but_a_value_error(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        files.read_json(path)
    if content:  # no rows are legal
        with pytest.raises(ValueError):
            files.read_rows(path)


def test_checksum_sees_structure_types_and_every_bit():
    value = {"a": torch.tensor(1.0), "b": (1, [2.5, None]), "c": torch.zeros(2, 3, dtype=torch.bfloat16)}
    others = [
        {**value, "a": torch.tensor(1.0, dtype=torch.float64)},
        {**value, "a": torch.tensor([1.0])},
        {**value, "b": (1, [2.5], None)},
        {**value, "b": (1, [2.5, 0])},
        {**value, "c": torch.zeros(3, 2, dtype=torch.bfloat16)},
        {**value, "c": -torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"x" if key == "a" else key: inner for key, inner in value.items()},
    ]
    assert len({files.checksum(each) for each in [value, *others]}) == len(others) + 1
    assert files.checksum({**value, "b": [1, (2.5, None)]}) == files.checksum(value)
