"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from kglmatch.errors import KGLMatchError, OutputError
from kglmatch.files import (
    STALE_SECONDS,
    atomic_folder,
    atomic_output,
    atomic_outputs,
    check_output,
    clear_stale,
    make_folder,
)


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


# --- several outputs ------------------------------------------------------------------------------


def test_several_outputs_appear_together(tmp_path):
    old, new, folder = tmp_path / "old.txt", tmp_path / "new.txt", tmp_path / "graphs"
    old.write_text("old")
    folder.mkdir()
    with atomic_outputs():
        for path in (old, new):
            with atomic_output(path) as temporary:
                temporary.write_text("new")
        with atomic_folder(folder) as temporary:
            (temporary / "a.txt").write_text("a")
        assert old.read_text() == "old" and not new.exists() and names(folder) == []
    assert old.read_text() == new.read_text() == "new" and names(folder) == ["a.txt"]
    assert names(tmp_path) == ["graphs", "new.txt", "old.txt"]
    with atomic_output(new) as temporary:  # the group has ended
        temporary.write_text("alone")
    assert new.read_text() == "alone"


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt()])
def test_several_outputs_or_none(tmp_path, failure):
    old = tmp_path / "old.txt"
    old.write_text("old")
    with pytest.raises(type(failure)), atomic_outputs():
        for path in (old, tmp_path / "new.txt"):
            with atomic_output(path) as temporary:
                temporary.write_text("new")
        with atomic_folder(tmp_path / "graphs") as temporary:
            (temporary / "a.txt").write_text("a")
        with atomic_output(tmp_path / "third.txt"):
            raise failure
    assert names(tmp_path) == ["old.txt"] and old.read_text() == "old"


@pytest.mark.parametrize("links", [True, False])
def test_a_rename_that_fails_undoes_those_before_it(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    old, new, last = tmp_path / "old.txt", tmp_path / "new.txt", tmp_path / "last.txt"
    old.write_text("old")
    with pytest.raises(OutputError, match=r"cannot write .*last\.txt"), atomic_outputs():
        for path in (old, new, last):
            with atomic_output(path) as temporary:
                temporary.write_text("new")
        last.mkdir()  # by somebody else, meanwhile
    assert names(tmp_path) == ["last.txt", "old.txt"] and old.read_text() == "old"


def test_a_group_within_a_group_waits_for_the_outer_one(tmp_path):
    with atomic_outputs():
        with atomic_outputs(), atomic_output(tmp_path / "a.txt") as temporary:
            temporary.write_text("a")
        with pytest.raises(RuntimeError), atomic_outputs():
            with atomic_output(tmp_path / "b.txt") as temporary:
                temporary.write_text("b")
            raise RuntimeError
        assert not (tmp_path / "a.txt").exists()
    assert names(tmp_path) == ["a.txt"]


def test_no_output_at_all():
    with atomic_outputs():
        pass


# --- what killed processes leave ------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from kglmatch.files import atomic_folder, atomic_output, atomic_outputs
folder = Path(sys.argv[1])
with atomic_outputs(), atomic_output(folder / "a.npz") as file, atomic_folder(folder / "b") as inner:
    file.write_bytes(b"half")
    (inner / "c.txt").write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing a file and a folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    yield process
    process.kill()
    process.communicate()


def write_once(folder):
    """What the next run does."""
    code = "import sys; from kglmatch.files import atomic_output\nwith atomic_output(sys.argv[1]): pass"
    subprocess.run([sys.executable, "-c", code, folder / "next.txt"], check=True)


posix_only = pytest.mark.skipif(os.name != "posix", reason="asks for a process by signal 0")


@posix_only
@pytest.mark.parametrize("reaped", [True, False])
def test_the_next_run_clears_what_a_killed_one_left(tmp_path, writer, reaped):
    others = [".tmp-mine", ".tmp-0123456789abcdef", "kept.txt"]
    for name in others:
        (tmp_path / name).write_text("")
    writer.send_signal(signal.SIGKILL)
    if reaped:
        writer.wait()
    else:
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
    assert len(names(tmp_path)) == len(others) + 2
    write_once(tmp_path)
    assert names(tmp_path) == sorted([*others, "next.txt"])


@posix_only
def test_a_living_writer_is_left_alone(tmp_path, writer):
    before = names(tmp_path)
    assert len(before) == 2 and all(name.startswith(".tmp-") for name in before)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))  # however old
    write_once(tmp_path)
    assert names(tmp_path) == [*before, "next.txt"]


def test_temporaries_of_other_machines_are_cleared_by_age(tmp_path):
    fresh, old = tmp_path / ".tmp-00000000-1-0a0a0a0a.npz", tmp_path / ".tmp-00000000-1-0b0b0b0b.tar.gz"
    worked_in, abandoned = tmp_path / ".tmp-00000000-1-0c0c0c0c", tmp_path / ".tmp-00000000-1-0d0d0d0d"
    for folder in (worked_in, abandoned):
        folder.mkdir()
        (folder / "a.txt").write_text("a")
    for path in (fresh, old):
        path.write_text("")
    then = time.time() - STALE_SECONDS - 60
    for path in (old, worked_in, abandoned / "a.txt", abandoned):
        os.utime(path, (then, then))
    clear_stale(tmp_path, again=True)
    assert names(tmp_path) == [fresh.name, worked_in.name]


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    with atomic_output(tmp_path / "a.txt"):
        pass
    monkeypatch.setattr(os, "scandir", lambda _: pytest.fail("looked through again"))
    with atomic_output(tmp_path / "b.txt"):
        pass
    assert names(tmp_path) == ["a.txt", "b.txt"]
