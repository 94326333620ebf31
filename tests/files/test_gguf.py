"""GGUF containers: what is written is what the gguf library reads, names and layouts are llama.cpp's."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfiles import new_llama, permute, write_gguf

from minilora.files import gguf as files
from minilora.files.gguf import to_halves, to_pairs
from minilora.files.gguf_header import Field, read_header
from minilora.files.quant import quantize
from minilora.files.stored import values_of
from minilora.nn.families import FAMILIES

Q, K, V = (f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv")


# -- the two layouts of q and k ----------------------------------------------------------------------------------------


@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(0, 4))
@settings(max_examples=50)
def test_to_pairs_is_what_llama_cpp_does_and_to_halves_is_its_inverse(heads, half, width):
    shape = (heads * 2 * half, *[width] * (width > 0))  # a matrix or a bias
    w = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(to_pairs(w, heads), permute(w, heads))
    np.testing.assert_array_equal(to_halves(to_pairs(w, heads), heads), w)


def test_only_q_and_k_are_reordered_each_by_its_own_heads(rng):
    w, heads = rng.standard_normal((32, 3)), SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)
    for suffix in ("", ".weight"):
        np.testing.assert_array_equal(FAMILIES["llama"].to_llama_cpp(Q + suffix, w, heads), permute(w, 8))
        np.testing.assert_array_equal(FAMILIES["llama"].to_llama_cpp(K + suffix, w, heads), permute(w, 4))
        assert FAMILIES["llama"].to_llama_cpp(V + suffix, w, heads) is w
        assert FAMILIES["qwen2"].to_llama_cpp(Q + suffix, w, heads) is w
    assert FAMILIES["llama"].to_llama_cpp("q_proj.bias", w, heads) is w


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_fields_of_another_file_keep_their_types(tmp_path):
    scalars = [kind.value for kind in gguf.GGUFValueType if kind.name not in ("ARRAY", "STRING")]
    fields = {f"x.{kind}": Field(1, kind) for kind in scalars} | {
        "x.text": Field("a", 8),
        "x.texts": Field(["a"], 9, 8),
    }
    fields |= {f"x.{kind}s": Field([1, 0], 9, kind) for kind in scalars}
    files.write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama", **fields}, {})
    found = read_header(tmp_path / "a.gguf").fields
    assert {key: found[key] for key in fields} == fields


def test_metadata_have_the_types_that_were_promised_and_come_back(tmp_path):
    record = {"general.architecture": "llama", "x.text": "ä\n", "x.switch": True, "x.count": 3, "x.number": 0.5,
              "x.texts": ["a", ""], "x.counts": [1, -2]}  # fmt: skip
    files.write_gguf(tmp_path / "a.gguf", record, {})
    fields = read_header(tmp_path / "a.gguf").fields
    assert {key: field.value for key, field in fields.items()} == record
    kinds = gguf.GGUFValueType
    expected = {"x.text": kinds.STRING, "x.switch": kinds.BOOL, "x.count": kinds.UINT32, "x.number": kinds.FLOAT32}
    assert {key: fields[key].type for key in expected} == expected


def test_fields_of_another_file_are_read_as_the_library_reads_them_and_keep_their_types(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf", new_llama(), change={
            "x.floats": [0.5, -1.5], "x.switches": [True, False], "x.numbers": [-3, 2**30],
            "x.texts": ["", "ä", "x" * 300], "x.nested": [[1, 2], [3, 4]],
        },
    )  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint8("x.small", 7)
    writer.add_float64("x.fine", 0.1)
    writer.add_int64("x.large", -(2**40))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for old in (path, tmp_path / "b.gguf"):
        ours = read_header(old).fields
        expected = {k: field for k, field in gguf.GGUFReader(old).fields.items() if not k.startswith("GGUF.")}
        assert list(ours) == list(expected)
        for key, field in expected.items():
            value = [[1, 2], [3, 4]] if key == "x.nested" else field.contents()  # which the library flattens
            assert (ours[key].value, ours[key].type) == (value, field.types[0]), key
            assert ours[key].item_type == (field.types[-1] if len(field.types) > 1 else None), key
        source = {key: field for key, field in ours.items() if key.startswith("x.") and key != "x.nested"}
        copy = tmp_path / f"new-{old.name}"  # not one file twice: the reader keeps it mapped, which Windows minds
        files.write_gguf(copy, {"general.architecture": "llama"} | source, {})
        new = gguf.GGUFReader(copy).fields
        for key in source:
            assert (new[key].contents(), new[key].types) == (expected[key].contents(), expected[key].types)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_tensors_come_back_packed_and_unpacked_from_any_layout_of_the_array(kind, tmp_path, rng):
    w = rng.standard_normal((64, 6), np.float32).T  # (6, 64), not contiguous
    packed = quantize(w, kind)
    tensors = {"norm": (np.float32([1, 2, 3]), "F32"), "w": (packed, kind)}
    files.write_gguf(tmp_path / "a.gguf", {"general.architecture": "llama"}, tensors)
    norm, tensor = read_header(tmp_path / "a.gguf").tensors
    assert (tensor.kind, tensor.shape, tensor.nbytes) == (kind, (6, 64), packed.nbytes)
    np.testing.assert_array_equal(tensor.raw(), packed)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(values_of(tensor), expected)
    assert norm.raw().shape == (1, 12)
    np.testing.assert_array_equal(values_of(norm), [1, 2, 3])
