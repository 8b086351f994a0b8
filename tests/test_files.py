"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from kglmatch.errors import KGLMatchError, OutputError
from kglmatch.files import atomic_folder, atomic_output, check_output, make_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_moves_the_file_on_success(tmp_path):
    target = tmp_path / "a.b.npz"
    with atomic_output(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".npz" and temporary != target
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.b.npz"]


def test_replaces_what_was_there_and_accepts_a_string(tmp_path):
    target = tmp_path / "noextension"
    target.write_bytes(b"old")
    with atomic_output(str(target)) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, failure):
    target = tmp_path / "a.txt"
    target.write_bytes(b"old")
    with pytest.raises(type(failure)), atomic_output(target) as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_missing_folder(tmp_path):
    with pytest.raises(OutputError, match="not exist") as caught, atomic_output(tmp_path / "no" / "a"):
        pytest.fail("the body must not run")
    assert isinstance(caught.value, KGLMatchError) and "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_folder_whose_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError), atomic_output(tmp_path / "file" / "a.txt"):
        pytest.fail("the body must not run")


def test_target_is_a_folder(tmp_path):
    with pytest.raises(OutputError, match="is a folder"), atomic_output(tmp_path):
        pytest.fail("the body must not run")


@pytest.mark.skipif(os.name == "nt", reason="needs a device file")
def test_device_files_are_not_replaced():
    with pytest.raises(OutputError, match="not a plain file"), atomic_output(os.devnull):
        pytest.fail("the body must not run")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write"), atomic_output(folder / "a.txt"):
        pytest.fail("the body must not run")


def test_full_disk_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"a\.txt"), atomic_output(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_errors_about_other_files_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_output(tmp_path / "a.txt"):
        (tmp_path / "missing-input").read_bytes()
    assert names(tmp_path) == []


def test_name_too_long_for_the_file_system(tmp_path):
    with pytest.raises(OutputError), atomic_output(tmp_path / ("a" * 300 + ".txt")) as temporary:
        temporary.write_bytes(b"x")
    assert names(tmp_path) == []


def test_symbolic_link_is_written_through(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_bytes(b"old")
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")
    with atomic_output(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_new_files_get_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    with atomic_output(tmp_path / "ours") as temporary:
        temporary.write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_check_output_leaves_nothing_and_keeps_the_old_file(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old")
    check_output(old)
    check_output(tmp_path / "new.txt")
    assert names(tmp_path) == ["old.txt"] and old.read_text() == "old"
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "no" / "new.txt")


@pytest.mark.parametrize("empty_folder_there", [False, True])
def test_atomic_folder_appears_whole(tmp_path, empty_folder_there):
    target = tmp_path / "model"
    if empty_folder_there:
        target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not (target / "a.txt").exists()
    assert names(tmp_path) == ["model"] and names(target) == ["a.txt"]


def test_atomic_folder_goes_if_the_body_raises(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "a.txt").write_text("a")
        raise RuntimeError
    assert names(tmp_path) == []
    with pytest.raises(OutputError, match="space"), atomic_folder(tmp_path / "model") as temporary:
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary / "a.txt"))
    assert names(tmp_path) == []


def test_atomic_folder_never_replaces_what_is_there(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    with pytest.raises(OutputError, match="not empty"), atomic_folder(full):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match="it is a file"), atomic_folder(full / "kept.txt"):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match="does not exist"), atomic_folder(tmp_path / "no" / "model"):
        pytest.fail("the body must not run")
    assert names(full) == ["kept.txt"] and names(tmp_path) == ["full"]


def test_make_folder(tmp_path):
    folder = make_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and make_folder(folder) == folder
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="it is a file"):
        make_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot make"):
        make_folder(tmp_path / "file" / "b")
