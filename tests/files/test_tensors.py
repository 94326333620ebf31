"""Safetensors files: what is written comes back, and what does not fit is listed."""

import json

import numpy as np
import pytest
from modelfiles import as_dtype, write_safetensors

from minilora.files.disk import ModelFileError
from minilora.files.quant import Packed, quantize
from minilora.files.tensors import check_fit, each_tensor, read_tensors, write_tensors


def test_what_is_written_is_read_back_together_or_one_by_one(tmp_path, rng):
    path = tmp_path / "t.safetensors"
    tensors = {
        "a": rng.standard_normal((3, 4)),
        "b.c": np.float32([[1, 2], [3, 4]]).T,
        "d": np.zeros((0, 5), np.float16),
        "e": np.array(2.5),
    }
    write_tensors(path, tensors)
    for back in (read_tensors(path), dict(each_tensor(path))):
        assert back.keys() == tensors.keys()
        for name, w in tensors.items():
            assert (back[name].dtype, back[name].shape) == (w.dtype, w.shape)
            np.testing.assert_array_equal(back[name], w)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(header)["__metadata__"] == {"format": "pt"}  # what PEFT and transformers look for


def test_a_written_file_is_the_librarys_byte_for_byte(tmp_path, rng):
    library = pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install '.[test]'")
    tensors = {f"w.{i}": rng.standard_normal((i, 3)).astype(np.dtype(f"f{2 << i % 3}")) for i in (7, 1, 0, 5, 2, 3)}
    tensors |= {"scalar": np.float32(2), "Ġ": np.arange(3.0), "every other": np.ones((4, 4), np.float32)[:, ::2]}
    for i in range(9):  # headers of every length modulo 8
        chosen = {name + "x" * i: np.ascontiguousarray(w) for name, w in tensors.items()}
        write_tensors(tmp_path / "ours", chosen)
        library.save_file(chosen, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("with_bf16", [False, True])
def test_each_type_is_read_as_itself_and_bfloat16_as_float32_writable(dtype, with_bf16, tmp_path):
    w = np.float32([[0.5, -2], [1.5, 4]])
    tensors = {"w": as_dtype(w, dtype)} | ({"other": as_dtype(w, "BF16")} if with_bf16 else {})
    got = read_tensors(write_safetensors(tmp_path / "t.safetensors", tensors))["w"]
    assert got.dtype == {"F64": np.float64, "F16": np.float16}.get(dtype, np.float32) and got.flags.writeable
    np.testing.assert_array_equal(got, w)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def content(header, data=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


DAMAGED = {
    "empty": b"",
    "no length": b"\x01",
    "a header longer than the file": b"\xff" * 64,
    "an empty header": content(b""),
    "no JSON": content(b"{'w': 1}"),
    "no text": content(b"\xff\xfe"),
    "nested too deeply": content(b'{"w":' * 100_000),
    "a list": content([]),
    "an entry that is no object": content({"w": 3}),
    "a type that is no text": content({"w": entry(dtype=[])}),
    "no shape": content({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "a shape that is no list": content({"w": entry(shape=2)}),
    "a negative dimension": content({"w": entry(shape=(-1, -2))}),
    "a dimension that is no integer": content({"w": entry(shape=(2.0,))}),
    "a shape of other size": content({"w": entry(shape=(3,))}),
    "a shape of huge size": content({"w": entry(shape=(1 << 40, 1 << 40))}),
    "a shape of huge size that is empty": content({"w": entry(shape=(1 << 40, 0, 1 << 40), offsets=(0, 0))}, 0),
    "a shape of too many dimensions": content({"w": entry(shape=[1] * 100, offsets=(0, 4))}, 4),
    "one offset": content({"w": entry(offsets=(8,))}),
    "offsets that are texts": content({"w": entry(offsets=("0", "8"))}),
    "offsets in the wrong order": content({"w": entry(offsets=(8, 0))}),
    "offsets before the data": content({"w": entry(offsets=(-8, 0))}),
    "a hole": content({"w": entry(offsets=(4, 12))}, 12),
    "an overlap": content({"v": entry(), "w": entry(offsets=(4, 12))}, 12),
    "cut off": content({"w": entry()}, 7),
    "bytes after the end": content({"w": entry()}, 9),
    "line breaks": content({"w\nx": entry(offsets=(4, 12))}, 12),
}


@pytest.mark.parametrize("content", [None, *DAMAGED.values()], ids=["missing", *DAMAGED])
def test_a_file_that_is_missing_or_damaged_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "t.safetensors"
    if content is not None:
        path.write_bytes(content)
    for read in (read_tensors, lambda path: list(each_tensor(path))):
        words = "no such file" if content is None else "damaged safetensors file|cannot read tensors of type"
        with pytest.raises(ModelFileError, match=words) as caught:
            read(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_an_empty_tensor_may_lie_anywhere_between_others(tmp_path):
    (tmp_path / "t").write_bytes(content({"w": entry(), "first": entry(shape=(0, 3), offsets=(0, 0)),
                                          "last": entry(shape=(0,), offsets=(8, 8))}))  # fmt: skip
    assert {name: w.shape for name, w in read_tensors(tmp_path / "t").items()} == {
        "w": (2,),
        "first": (0, 3),
        "last": (0,),
    }


def test_types_that_are_not_floating_point_are_listed(tmp_path):
    tensors = {"a": ("I64", (1,), bytes(8)), "b": ("U8", (1,), bytes(1)), "c": as_dtype(np.float32([1]), "F32")}
    with pytest.raises(ModelFileError, match="cannot read tensors of type I64, U8; expected F32, F16 or BF16"):
        read_tensors(write_safetensors(tmp_path / "t.safetensors", tensors))


# -- does it fit? ------------------------------------------------------------------------------------------------------

SHAPES = {"a": (2, 3), "b": (4,)}


def complaint(given, expected=SHAPES):
    with pytest.raises(ModelFileError) as caught:
        check_fit(given, expected, "the file")
    return str(caught.value)


def test_tensors_that_fit_are_not_complained_about(rng):
    check_fit({"a": np.ones((2, 3)), "b": np.zeros(4, np.float16)}, SHAPES, "the file")
    check_fit({"w": Packed(quantize(rng.standard_normal((3, 64), np.float32), "Q4_1"), "Q4_1")}, {"w": (3, 64)}, "it")


def test_everything_that_does_not_fit_is_listed():
    given = {"a": np.ones((3, 2)), "c": np.ones(1)}
    assert complaint(given) == "the file: missing b; unexpected c; a has shape (3, 2), expected (2, 3)"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_named_once(dtype, rng):
    for values in ([np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]):
        b = np.ones(4, dtype)
        b[: len(values)] = values
        assert complaint({"a": np.ones((2, 3), dtype), "b": b}) == "the file: b holds NaN or infinity"
    check_fit({"b": np.full(4, 60000, dtype)}, {"b": (4,)}, "the file")  # in float16 the sum would be infinite
    w = Packed(quantize(rng.standard_normal((3, 64), np.float32), "Q8_0"), "Q8_0")
    w.raw[1, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert complaint({"w": w}, {"w": (3, 64)}) == "the file: w holds NaN or infinity"


@pytest.mark.parametrize(("count", "more"), [(6, ""), (7, " (and 1 more)"), (9, " (and 3 more)")])
def test_a_long_list_is_cut_off_and_says_how_much_is_left_out(count, more):
    message = complaint({}, {f"w{i}": (1,) for i in range(count)})
    assert message == "the file: " + "; ".join(f"missing w{i}" for i in range(6)) + more


def test_of_each_kind_of_misfit_some_are_named():
    """With one kind alone, six; a file with all names in another form has missing tensors and unexpected ones."""
    array, names = np.zeros(2, np.float32), [f"t{i}" for i in range(9)]
    for given, counts, rest in (
        ({}, (6, 0, 0), 3),
        ({f"x.{name}": array for name in names}, (3, 3, 0), 12),
        (dict.fromkeys(names, array[:1]), (0, 0, 6), 3),
        ({"t0": array[:1], "t1": array, "x": array}, (2, 1, 1), 5),
    ):
        with pytest.raises(ModelFileError) as caught:
            check_fit(given, dict.fromkeys(names, (2,)), "a file")
        text = str(caught.value)
        assert tuple(text.count(word) for word in ("missing", "unexpected", "has shape")) == counts
        assert text.startswith("a file: ") and text.endswith(f" (and {rest} more)")
    check_fit(dict.fromkeys(names, array), dict.fromkeys(names, (2,)), "a file")
