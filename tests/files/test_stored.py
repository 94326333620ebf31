"""Tensors in files: read and transposed, in each type."""

import numpy as np
import pytest
from modelfiles import as_dtype, write_safetensors

from minilora.files.stored import is_quantised, values_of
from minilora.files.tensors import stored_tensors


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_a_tensor_and_its_transpose_have_their_values(tmp_path, rng, kind):
    w = rng.integers(-8, 8, (3, 5)).astype(np.float32)  # exact in each type
    path = write_safetensors(tmp_path / "t.safetensors", {"a": as_dtype(w[0, :3], kind), "w": as_dtype(w, kind)})
    tensor = stored_tensors(path)["w"]
    for stored, expected in ((tensor, w), (tensor.T, w.T), (tensor.T.T, w)):
        assert stored.shape == expected.shape and not is_quantised(stored)
        np.testing.assert_array_equal(values_of(stored), expected)
        assert values_of(stored).dtype == np.float32
        np.testing.assert_array_equal(stored.array(), expected)
        assert stored.raw().shape == (len(expected), tensor.nbytes // len(expected))
