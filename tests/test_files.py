"""`vtc.files`: nothing is left half-written under a final name."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import pytest

from vtc.errors import InputError
from vtc.files import check_writable, replacing, write_text

FULL = Path("/dev/full")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert left(tmp_path) == ["out.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), OSError(errno.ENOSPC, "disk is full")])
@pytest.mark.parametrize("before", [None, "old"])
def test_failure_leaves_everything_as_it_was(tmp_path: Path, error: BaseException, before: str | None) -> None:
    path = tmp_path / "out.txt"
    if before is not None:
        path.write_text(before)

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert left(tmp_path) == ([] if before is None else ["out.txt"])
    assert before is None or path.read_text() == before


def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real.txt").stat().st_mode) == 0o640
    (tmp_path / "new.txt").symlink_to("target.txt")
    write_text(tmp_path / "new.txt", "new")
    assert (tmp_path / "target.txt").read_text() == "new"


def test_a_new_file_has_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_pipes_are_written_directly() -> None:
    reader, writer = os.pipe()
    write_text(f"/dev/fd/{writer}", "text")
    os.close(writer)
    with open(reader) as file:
        assert file.read() == "text"
    write_text("/dev/null", "text")
    check_writable("/dev/null", "/dev/null")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "this is a folder"),
        ("gone/out.txt", r"the folder .*gone does not exist"),
        ("file/out.txt", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
        ("/proc/out.txt", "no file can be written"),
        ("/dev/full", "No space left on device"),
    ],
)
def test_what_cannot_be_written_is_found_beforehand(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    if name.startswith("/") and not Path(name).parent.is_dir():
        pytest.skip("this system has no such folder")
    for check in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(InputError, match=message):
            check(os.path.join(tmp_path, name))
    assert left(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_permissions_are_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "protected").touch(mode=0o400)
    for name, message in (("closed/out", "Permission denied"), ("protected", "write-protected")):
        with pytest.raises(InputError, match=message):
            check_writable(tmp_path / name)


def test_a_check_leaves_nothing_and_finds_one_name_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    check_writable(tmp_path / "out", tmp_path / "other")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'link'}: this file is to be written twice")):
        check_writable(tmp_path / "out", tmp_path / "link")
    assert left(tmp_path) == ["link"]
