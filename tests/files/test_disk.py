"""Files and folders appear whole or not at all: also when the block fails, and when the process dies in the middle."""

import errno
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.files import disk
from minilora.files.disk import (
    ModelFileError,
    entries,
    locked,
    read_json,
    replacing,
    replacing_folder,
    write_bytes,
    write_json,
)
from minilora.files.gguf import write_gguf
from minilora.files.tensors import write_tensors

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and the umask are POSIX's")


def tree(folder):
    """Everything in a folder, hidden entries too: contents by relative name."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """A function that sets the umask until the end of the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# -- one file ----------------------------------------------------------------------------------------------------------


def test_a_file_is_there_at_the_end_of_the_block_and_not_before(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert tree(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_or_writes_nothing_changes_nothing_and_leaves_nothing(tmp_path, before, error):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert tree(tmp_path) == ({"a.txt": before} if before else {})
    missing = tmp_path / "none" / "a.txt"
    with pytest.raises(FileNotFoundError, match="a.txt: there is no folder .*none$"), replacing(missing):
        pass


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert tree(tmp_path) == {"a.txt": "first"}  # the one that ended last


def write_by_every_way(folder):
    write_json(folder / "a.json", {})
    write_tensors(folder / "a.safetensors", {"w": np.zeros(3, np.float32)})
    write_gguf(folder / "a.gguf", {"general.architecture": "llama"}, {"w": (np.zeros(3, np.float32), "F32")})
    return list(folder.iterdir())


@posix
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_follow_the_umask_and_others_keep_their_permissions_whatever_library_wrote_them(
    tmp_path, umask, mask, expected
):
    umask(mask)
    assert {mode(path) for path in write_by_every_way(tmp_path)} == {expected}
    for path in tmp_path.iterdir():
        path.chmod(0o640 if expected == 0o600 else 0o600)
    assert {mode(path) for path in write_by_every_way(tmp_path)} == {0o640 if expected == 0o600 else 0o600}


def test_bytes_are_on_the_disk_before_the_name_is_and_then_the_name(tmp_path, monkeypatch):
    calls, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_ino), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    write_json(tmp_path / "a.json", {})
    file, folder = (path.stat().st_ino for path in (tmp_path / "a.json", tmp_path))
    assert calls == [file, "rename"] + [folder] * (os.name == "posix")


def test_where_folders_cannot_be_opened_as_on_windows_files_and_folders_are_written_too(tmp_path, monkeypatch):
    def on_windows(path, *arguments):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.open(path, *arguments)

    monkeypatch.setattr(disk, "os", SimpleNamespace(**vars(os) | {"name": "nt", "open": on_windows}))
    write_json(tmp_path / "a.json", {})
    swap(tmp_path / "run")
    assert tree(tmp_path) == {"a.json": "{}\n", "run": None, "run/a.txt": "new"}


# -- whole folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("old")
    (tmp_path / "run" / "b.txt").write_text("old")
    return tmp_path / "run"


OLD = {"run": None, "run/a.txt": "old", "run/b.txt": "old"}
NEW = {"run": None, "run/a.txt": "new", "run/sub": None, "run/sub/c.txt": "new"}
WITHIN = {name.removeprefix("run/"): v for name, v in NEW.items() if "/" in name}


def fill(folder):
    (folder / "a.txt").write_text("new")
    (folder / "sub").mkdir()
    (folder / "sub" / "c.txt").write_text("new")


def test_a_folder_is_swapped_in_whole_and_a_new_one_is_made_with_those_above_it(folder, tmp_path):
    with replacing_folder(folder) as partial:
        assert tree(partial) == {}
        fill(partial)
        assert (folder / "a.txt").read_text() == "old"
    assert tree(tmp_path) == NEW  # and nothing of the old one
    with replacing_folder(tmp_path / "new" / "run") as partial:
        fill(partial)
    assert tree(tmp_path / "new") == NEW


def test_what_a_folder_holds_is_in_one_order_on_every_system_without_files_of_file_managers(tmp_path, monkeypatch):
    for name in ("b", "C", "a", ".DS_Store", "Thumbs.db", "desktop.ini", ".own"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(type(tmp_path), "__lt__", lambda a, b: a.name.lower() < b.name.lower())  # as on Windows
    assert [path.name for path in entries(tmp_path)] == [".own", "C", "a", "b"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_folder_and_nothing_else(folder, tmp_path, error):
    with pytest.raises(error), replacing_folder(folder) as partial:
        fill(partial)
        raise error
    assert tree(tmp_path) == OLD


def test_a_swap_that_fails_brings_the_old_folder_back(folder, tmp_path, monkeypatch):
    rename = os.replace

    def fails_once(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError("in use")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(PermissionError), replacing_folder(folder) as partial:
        fill(partial)
    assert tree(tmp_path) == OLD


KILLED = """
import os, shutil, sys
from pathlib import Path
from minilora.files.disk import replacing, replacing_folder

target, at = Path(sys.argv[1]), int(sys.argv[2])
rename, renamed = os.replace, 0

def replace(source, target):
    global renamed
    if renamed == at:
        os._exit(9)  # no cleaning up, as when the system kills it
    renamed += 1
    rename(source, target)

os.replace = replace
shutil.rmtree = lambda *_, **__: os._exit(9)
if target.suffix:
    with replacing(target) as partial:
        partial.write_text("new")
        if at < 0: os._exit(9)
with replacing_folder(target) as partial:
    (partial / "a.txt").write_text("new")
    if at < 0: os._exit(9)
os._exit(9)
"""


def killed(target, at):
    """Run a writer that dies in its block (-1), before its first rename (0), its second (1), or the clearing up (2)."""
    done = subprocess.run([sys.executable, "-c", KILLED, target, str(at)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize("at", [-1, 0])
def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path, at):
    (tmp_path / "a.txt").write_text("old")
    killed(tmp_path / "a.txt", at)
    assert (tmp_path / "a.txt").read_text() == "old"


@posix
@pytest.mark.parametrize("name", [pytest.param("a.txt", marks=pytest.mark.long), "run"])
def test_what_a_killed_process_was_writing_is_removed_by_the_next_writer_and_that_of_a_running_one_is_not(
    tmp_path, name, monkeypatch
):
    killed(tmp_path / name, -1)
    killed(tmp_path / f"x{name}", -1)  # another file's
    assert entries(tmp_path) == []  # what is half written is no part of a folder
    left = list(tmp_path.glob(f".{name}.*"))
    assert len(left) == 1 and len(list(tmp_path.iterdir())) == 2
    write, ours = replacing_folder if name == "run" else replacing, disk._PROCESS

    def fill_in(partial):
        partial.mkdir(exist_ok=True) if name == "run" else partial.write_text("new")

    monkeypatch.setattr(disk, "_PROCESS", f"{os.getppid()}-01234567")  # as another process, which runs
    with write(tmp_path / name) as first:
        fill_in(first)
        assert not left[0].exists()
        monkeypatch.setattr(disk, "_PROCESS", ours)
        with write(tmp_path / name) as second:
            fill_in(second)
            disk.remove_unfinished(tmp_path / name)
            assert first.exists() and second.exists()
    assert len(list(tmp_path.glob(f".{name}.*"))) == 0 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.long
@posix
@pytest.mark.parametrize("refused", ["iterdir", "unlink"])
def test_what_a_killed_process_of_another_user_left_stops_no_writer(tmp_path, monkeypatch, refused):
    killed(tmp_path / "a.txt", -1)
    theirs, real = [tmp_path, *tmp_path.iterdir()], getattr(Path, refused)

    def refuse(path, **known):
        if path in theirs:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        return real(path, **known)

    monkeypatch.setattr(Path, refused, refuse)
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


@posix
def test_a_process_that_has_the_number_of_a_killed_one_removes_what_that_one_left(tmp_path):
    (tmp_path / f".a.01234567.{os.getpid()}-01234567-{disk._MACHINE}.partial").touch()
    write_bytes(tmp_path / "a", b"")
    assert tree(tmp_path) == {"a": ""}


@posix
@pytest.mark.parametrize("hours, stays", [(-30, True), (0, True), (23, True), (25, False)])
def test_what_another_machine_that_shares_the_disk_writes_stays_for_a_day(tmp_path, monkeypatch, hours, stays):
    """No process here has its number; and its clock may be another one."""
    with monkeypatch.context() as there:
        there.setattr(disk, "_MACHINE", "01234567")
        there.setattr(disk, "_PROCESS", f"{2**22 + 1}-01234567")
        with replacing(tmp_path / "a") as theirs:
            theirs.write_text("theirs")
            when = time.time() - hours * 3600
            os.utime(theirs, (when, when))
            there.undo()
            write_bytes(tmp_path / "a", b"ours")
            assert theirs.exists() is stays
            theirs.touch()
    assert tree(tmp_path) == {"a": "theirs" if stays else ""}


@posix
def test_machines_and_containers_are_told_apart(monkeypatch):
    here, real = disk._machine(), os.stat
    assert here == disk._MACHINE and here == disk._machine()
    with monkeypatch.context() as patch:
        patch.setattr(os, "uname", lambda: os.uname_result(("Linux", "another", "", "", "")))
        assert disk._machine() != here
    if os.path.exists("/proc/self/ns/pid"):
        monkeypatch.setattr(os, "stat", lambda path, **known: real("/" if "ns/pid" in str(path) else path, **known))
        assert disk._machine() != here


NAMES = ["run", "run+1", "run.x", "run (1)[2]", "r*n"] if os.name == "posix" else ["run", "run+1", "run.x"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arrived", [False, True])
def test_what_a_killed_process_moved_aside_is_put_back_or_removed_and_nobody_elses(tmp_path, name, arrived):
    """It died between the renames, or after both. What another folder's writer moved aside stays where it is."""
    (tmp_path / f".{name}.0123abcd.old").mkdir()
    (tmp_path / f".{name}.0123abcd.old" / "a.txt").write_text("old")
    foreign = [f".{name.replace('.', '-')}-.0123abcd.old", f".{name[:-1]}.0123abcd.old", f".{name}.mine.old",
               f".{name}.0123abcde.old", f"x{name}.0123abcd.old", f".{name.replace('.', 'y')}y.0123abcd.old",
               f".{name.replace('.', 'y').replace('+', '')}.0123abcd.old"]  # fmt: skip
    foreign = {other for other in foreign if other != f".{name}.0123abcd.old"}
    for other in foreign:
        (tmp_path / other).mkdir()
    if arrived:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("new")
    with pytest.raises(OSError, match="too early"), replacing_folder(tmp_path / name):
        raise OSError("too early")
    assert tree(tmp_path / name) == {"a.txt": "new" if arrived else "old"}
    assert {path.name for path in tmp_path.iterdir()} == {name, *foreign}


@pytest.mark.long
def test_a_process_killed_at_any_moment_leaves_a_folder_that_the_next_writer_finds_whole(folder, tmp_path):
    for at in (0, 1):  # before and between the renames
        killed(folder, at)
        with pytest.raises(OSError, match="too early"), replacing_folder(folder):
            assert tree(folder) == {"a.txt": "old", "b.txt": "old"}
            raise OSError("too early")
    killed(folder, 2)  # both renames are done, the old folder is not yet removed
    with replacing_folder(folder) as partial:
        fill(partial)
    assert tree(folder) == WITHIN
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".old")] == []


def test_a_link_to_a_file_is_replaced_and_the_file_that_others_may_read_is_not(tmp_path):
    (tmp_path / "blob").write_text("shared")
    link = tmp_path / "model.safetensors"
    try:
        link.symlink_to("blob")
    except OSError:
        pytest.skip("this system makes no links")
    with replacing(link) as partial:
        partial.write_text("new")
    assert tree(tmp_path) == {"blob": "shared", "model.safetensors": "new"} and not link.is_symlink()


@posix
def test_a_link_in_the_place_of_a_lock_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock", "x"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_of_a_link_to_a_folder_the_folder_is_replaced(folder, tmp_path):
    link = tmp_path / "latest"
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    with replacing_folder(link) as partial:
        fill(partial)
    assert link.is_symlink() and tree(folder) == WITHIN


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(NotADirectoryError, match="choose a folder"), replacing_folder(tmp_path / "a.txt"):
        raise AssertionError("never reached")
    assert tree(tmp_path) == {"a.txt": "old"}


def test_every_file_of_a_folder_is_on_the_disk_before_the_folder_is_swapped_in(folder, monkeypatch):
    synced, sync, rename = set(), os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), sync(fd)))

    def check(source, target):
        files = [path for path in Path(source).rglob("*") if path.is_file()]
        if str(source).endswith(".partial"):
            folders = [Path(source), Path(source, "sub")] if os.name == "posix" else []
            assert len(files) == 2 and {path.stat().st_ino for path in (*files, *folders)} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "replace", check)
    with replacing_folder(folder) as partial:
        fill(partial)
    assert (folder / "a.txt").read_text() == "new"


# -- a full disk, and other errors of the system -----------------------------------------------------------------------


def many(folder):
    """A function for each way in which the package writes a file of more than 4,000 bytes to the folder."""
    w = np.zeros(1000, np.float32)

    def by_hand(partial):
        (partial / "a.txt").write_bytes(bytes(4000))

    def in_a_folder(write):
        with replacing_folder(folder / "run") as partial:
            write(partial)

    return {
        "json": lambda: write_json(folder / "a.json", {"x": "y" * 4000}),
        "safetensors": lambda: write_tensors(folder / "a.safetensors", {"w": w}),
        "gguf": lambda: write_gguf(folder / "a.gguf", {"general.architecture": "llama"}, {"w": (w, "F32")}),
        "a file in a new folder": lambda: in_a_folder(
            lambda partial: write_tensors(partial / "a.safetensors", {"w": w})
        ),
        "by hand in a new folder": lambda: in_a_folder(by_hand),
    }


WAYS = list(many(Path()))
NEEDED = r"(4,\d\d\d bytes are needed, )?[\d,]+ bytes are free; nothing unfinished is left$"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("1000 requested and 60 written"),  # NumPy's
    ],
    ids=str,
)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, way, error):
    many(tmp_path)[way]()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(fd):
        raise error

    monkeypatch.setattr(os, "fsync", full)  # where data that did not fit may show up, too
    with pytest.raises(OSError, match=rf": the disk is full: {NEEDED}") as caught:
        many(tmp_path)[way]()
    assert str(caught.value).startswith(str(tmp_path)) and "partial" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
def test_any_other_error_of_the_system_names_the_path_that_was_asked_for(tmp_path, monkeypatch, call, code):
    def refused(*arguments, **_):
        names = [os.fspath(x) for x in arguments if isinstance(x, (str, Path))]
        raise OSError(code, os.strerror(code), *(names[:1] if len(names) < 2 else [names[0], None, names[1]]))

    monkeypatch.setattr(os, call, refused)
    for path, write in ((tmp_path / "a.json", lambda path: write_json(path, {})), (tmp_path / "run", swap)):
        if call in ("open", "mkdir") and (call == "mkdir") != (path.name == "run"):
            continue
        with pytest.raises(OSError) as caught:
            write(path)
        assert caught.value.errno == code and not re.search("partial|None", str(caught.value))
        assert caught.value.filename in ([None] if call == "fsync" else [str(path), str(tmp_path), str(path / "a.txt")])


def swap(path):
    with replacing_folder(path) as partial:
        (partial / "a.txt").write_text("new")


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_what_is_written_as_json_is_read_back_and_what_is_no_json_leaves_the_old_file(tmp_path):
    record = {"b": [1, 2.5, None], "a": {"ä": "\u2028"}}
    write_json(tmp_path / "a.json", record)
    assert read_json(tmp_path / "a.json") == record
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "b"') and text.endswith("}\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert tree(tmp_path) == {"a.json": text}
    write_json(tmp_path / "a.json", record, indent=1, sort_keys=True)
    assert (tmp_path / "a.json").read_text(encoding="utf-8").startswith('{\n "a"')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"{", "not readable as JSON"),
        (b"\xff", "not readable"),
        (b"[1]", "object, got list"),
        (b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_json_that_is_missing_broken_or_no_object_is_named_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=words) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(str(tmp_path / "a.json")) and "\n" not in str(caught.value)


@posix
def test_a_link_to_a_device_is_not_read_as_json(tmp_path):
    (tmp_path / "a.json").symlink_to("/dev/null")  # as well as to /dev/zero, which has no end
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(ModelFileError, match=f"^{re.escape(str(path))}: .*a folder, a pipe or a device"):
            read_json(path)


def test_a_model_file_error_is_one_line_whatever_it_is_made_of():
    assert str(ModelFileError("a\nb\r\nc")) == "a b c"
