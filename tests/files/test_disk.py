"""Files and folders appear whole or not at all: also when the block fails, and when the process dies in the middle."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora.files.disk import ModelFileError, read_json, replacing, replacing_folder, write_json
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
def test_a_block_that_fails_changes_nothing_and_leaves_nothing(tmp_path, before, error):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert tree(tmp_path) == ({"a.txt": before} if before else {})


def test_a_block_that_writes_nothing_is_an_error_and_not_an_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass
    assert tree(tmp_path) == {}


def test_a_folder_that_is_not_there_is_named_and_not_the_file_that_would_be_written_aside(tmp_path):
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(FileNotFoundError, match="a.txt: there is no folder .*none$"), replacing(path):
        pass
    assert tree(tmp_path) == {}


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
def test_new_files_follow_the_umask_whatever_library_wrote_them(tmp_path, umask, mask, expected):
    umask(mask)
    assert {mode(path) for path in write_by_every_way(tmp_path)} == {expected}


@posix
def test_a_file_that_replaces_another_keeps_its_permissions(tmp_path, umask):
    umask(0o022)
    for path in write_by_every_way(tmp_path):
        path.chmod(0o600)
    assert {mode(path) for path in write_by_every_way(tmp_path)} == {0o600}


def test_bytes_are_on_the_disk_before_the_name_is_and_then_the_name(tmp_path, monkeypatch):
    calls, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_ino), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    write_json(tmp_path / "a.json", {})
    file, folder = (path.stat().st_ino for path in (tmp_path / "a.json", tmp_path))
    assert calls == [file, "rename"] + [folder] * (os.name == "posix")


# -- whole folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("old")
    (tmp_path / "run" / "b.txt").write_text("old")
    return tmp_path / "run"


OLD = {"run": None, "run/a.txt": "old", "run/b.txt": "old"}
NEW = {"run": None, "run/a.txt": "new", "run/sub": None, "run/sub/c.txt": "new"}


def fill(folder):
    (folder / "a.txt").write_text("new")
    (folder / "sub").mkdir()
    (folder / "sub" / "c.txt").write_text("new")


def test_a_folder_is_swapped_in_whole(folder, tmp_path):
    with replacing_folder(folder) as partial:
        assert tree(partial) == {}
        fill(partial)
        assert (folder / "a.txt").read_text() == "old"
    assert tree(tmp_path) == NEW  # and nothing of the old one


def test_a_new_folder_and_those_above_it_are_made(tmp_path):
    with replacing_folder(tmp_path / "runs" / "run") as partial:
        fill(partial)
    assert tree(tmp_path / "runs") == NEW


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


@pytest.mark.parametrize("at", [-1, 0])
def test_a_process_killed_while_it_writes_leaves_the_old_folder(folder, at):
    killed(folder, at)
    assert tree(folder) == {"a.txt": "old", "b.txt": "old"}


def test_a_process_killed_between_the_renames_leaves_a_folder_that_the_next_writer_puts_back(folder, tmp_path):
    killed(folder, 1)
    assert not folder.exists()
    (tmp_path / ".run.mine.old").mkdir()  # somebody's own
    with pytest.raises(OSError, match="too early"), replacing_folder(folder):
        assert tree(folder) == {"a.txt": "old", "b.txt": "old"}
        raise OSError("too early")
    assert tree(folder) == {"a.txt": "old", "b.txt": "old"}
    assert (tmp_path / ".run.mine.old").exists()


def test_what_an_earlier_killed_process_moved_aside_goes_when_its_successor_is_there(folder, tmp_path):
    killed(folder, 2)  # both renames are done, the old folder is not yet removed
    assert sorted(path.name.split(".")[-1] for path in tmp_path.iterdir()) == ["old", "run"]
    with replacing_folder(folder) as partial:
        fill(partial)
    assert tree(tmp_path) == NEW


def test_of_a_link_to_a_folder_the_folder_is_replaced(folder, tmp_path):
    link = tmp_path / "latest"
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    with replacing_folder(link) as partial:
        fill(partial)
    assert link.is_symlink() and tree(folder) == {
        name.removeprefix("run/"): v for name, v in NEW.items() if "/" in name
    }


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
            assert len(files) == 2 and {path.stat().st_ino for path in files} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "replace", check)
    with replacing_folder(folder) as partial:
        fill(partial)
    assert (folder / "a.txt").read_text() == "new"


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_what_is_written_as_json_is_read_back(tmp_path):
    record = {"b": [1, 2.5, None], "a": {"ä": "\u2028"}}
    write_json(tmp_path / "a.json", record)
    assert read_json(tmp_path / "a.json") == record
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "b"') and text.endswith("}\n")
    write_json(tmp_path / "a.json", record, indent=1, sort_keys=True)
    assert (tmp_path / "a.json").read_text(encoding="utf-8").startswith('{\n "a"')


def test_a_record_that_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert tree(tmp_path) == {"a.json": json.dumps({"old": 1}, indent=2) + "\n"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"{", "not readable as JSON"), (b"\xff", "not readable"), (b"[1]", "object, got list")],
)
def test_json_that_is_missing_broken_or_no_object_is_named_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=words) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(str(tmp_path / "a.json")) and "\n" not in str(caught.value)


def test_a_model_file_error_is_one_line_whatever_it_is_made_of():
    assert str(ModelFileError("a\nb\r\nc")) == "a b c"
