"""The header of a GGUF file: every damaged one is refused in one line."""

import re

import gguf
import numpy as np
import pytest

from minilora.files import gguf as files
from minilora.files.disk import ModelFileError
from minilora.files.gguf_header import read_header
from minilora.files.stored import values_of


def write(path, tensors, metadata=None, endianess=gguf.GGUFEndian.LITTLE, alignment=None):
    """A file of the library: float32 tensors by name."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, w in tensors.items():
        writer.add_tensor(name, w)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def refused(path, words):
    with pytest.raises(ModelFileError, match=words) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


TWO = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([7, 8])}


def test_a_part_of_a_split_model_is_refused_with_the_way_to_join_it(tmp_path):
    for count, words in ((1, None), (2, "a part of a split model: join the parts"), ("two", "a part of a split model")):
        path = write(tmp_path / "a.gguf", TWO, {"split.no": 0, "split.count": count})
        if words is None:
            assert len(read_header(path).tensors) == 2
        else:
            refused(path, words)


def test_a_file_that_is_missing_or_another_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.gguf"
    others = [b"", b"G", b"GGU", b"GGML" + bytes(100), b"PK\x03\x04", bytes(64)]
    for content, words in [(None, "no such model file"), *((other, "not a GGUF file") for other in others)]:
        if content is not None:
            path.write_bytes(content)
            words = f"{words} \\(it starts with {re.escape(repr(content[:4]))}\\)"
        refused(path, words)


def test_a_file_of_another_byte_order_is_refused(tmp_path):
    refused(
        write(tmp_path / "a.gguf", TWO, endianess=gguf.GGUFEndian.BIG), "big-endian GGUF file; expected a little-end"
    )


def test_a_file_cut_off_at_any_byte_of_its_header_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    record = {"general.architecture": "llama", "x.counts": [1, 2], "x.count": 3, "x.text": "d", "x.texts": ["ab", "c"]}
    for tensors in ({"w": (np.zeros((2, 3), np.float32), "F32")}, {}):
        files.write_gguf(path, record, tensors)
        content = path.read_bytes()
        last = int(read_header(path).tensors[0].offset) if tensors else content.index(b"ab") + 11
        ends = range(4, last, 3) if tensors else range(last - 19, last)
        for end in [*ends, *([len(content) - 32] if tensors else [])]:  # the data are padded to 32 bytes
            path.write_bytes(content[:end])
            with pytest.raises(ModelFileError, match=r"a\.gguf: cut off or damaged GGUF file"):
                read_header(path)


def test_tensors_begin_where_the_alignment_says_and_another_place_is_refused(tmp_path):
    for alignment in (None, 8, 1024):
        for tensor in read_header(write(tmp_path / "a.gguf", TWO, alignment=alignment)).tensors:
            np.testing.assert_array_equal(values_of(tensor), TWO[tensor.name])
            assert tensor.offset % (alignment or 32) == 0
    for wrong in (0, 3, "32"):
        refused(write(tmp_path / "a.gguf", TWO, {"general.alignment": wrong}), "general.alignment is .* a power of 2")


def test_a_version_a_type_a_shape_a_place_and_a_name_are_checked(tmp_path):
    path = write(tmp_path / "a.gguf", TWO)
    content = path.read_bytes()
    a = content.index(b"\1\0\0\0\0\0\0\0a") + 9  # behind the name: dimensions, 3 and 2, type, offset
    dimensions, first, kind, offset = a, a + 4, a + 20, a + 24
    key = content.index(b"general.architecture") + len("general.architecture")
    spoil = [
        (4, 1, "GGUF version 1; minilora reads versions 2 and 3"),
        (4, 4, "GGUF version 4"),
        (kind, 4, "tensor a is of the unknown type 4: .* such as Q4_K_M"),
        (kind, 255, "tensor a is of the unknown type 255"),
        (kind, 2, "rows of 3 values, which are not whole blocks of Q4_0"),
        (dimensions, 0, "'a' has 0 dimensions"),
        (dimensions, 5, "'a' has 5 dimensions"),
        (first, 0, "is not inside the file"),
        (first, 200, "is not inside the file"),
        (offset, 16, "is not inside the file"),
        (offset, 96, "is not inside the file"),
        (key, 77, "a value of the unknown type 77"),
        (a - 1, ord("b"), "two tensors are called 'b'"),
    ]
    for at, byte, words in spoil:
        path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
        refused(path, words)
    path.write_bytes(content)
    assert [tensor.shape for tensor in read_header(path).tensors] == [(2, 3), (2,)]


def test_a_key_that_occurs_twice_and_arrays_without_end_are_refused(tmp_path):
    head = b"".join([b"GGUF", *(n.to_bytes(size, "little") for n, size in ((3, 4), (0, 8), (2, 8)))])
    entry = b"\1\0\0\0\0\0\0\0k" + (4).to_bytes(4, "little")
    (tmp_path / "a.gguf").write_bytes(head + 2 * (entry + bytes(4)))
    refused(tmp_path / "a.gguf", "'k' occurs twice")
    deep = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    (tmp_path / "a.gguf").write_bytes(head + entry[:-4] + (9).to_bytes(4, "little") + 5000 * deep)
    refused(tmp_path / "a.gguf", "cut off or damaged GGUF file")
