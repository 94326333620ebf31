"""A language model, by the example of Llama: logits, loss, packing, what is refused, how it is made and printed."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from smallmodels import SMALL, in_float64

from minilora.engine.attention import Packing
from minilora.files.disk import ModelFileError
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.nn.families import check_claims
from minilora.nn.llama import Llama
from minilora.nn.step import loss_and_grad


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def plain_loss(logits, labels):
    """The mean of -log p(label t + 1 | tokens up to t), from whole logits, one token at a time."""
    log_p, (rows, length) = log_softmax(logits), labels.shape
    scored = [(b, t) for b in range(rows) for t in range(length - 1) if labels[b, t + 1] != -100]
    return -np.mean([log_p[b, t, labels[b, t + 1]] for b, t in scored])


# -- what the model computes -------------------------------------------------------------------------------------------


def test_logits_have_one_row_per_token_and_last_gives_the_last(model, ids):
    logits = model(ids).data
    assert logits.shape == (2, 7, 11)
    np.testing.assert_allclose(model(ids, last=True).data, logits[:, -1:], rtol=1e-12)
    np.testing.assert_array_equal(model(ids.tolist()).data, logits)


def test_a_model_in_float32_stays_in_float32(tiny_model):
    ids = np.array([[1, 2, 3]])
    loss = tiny_model.loss(ids, ids)
    loss.backward()
    assert {a.dtype for a in (tiny_model(ids), loss, *(p.grad for _, p in tiny_model.named_parameters()))} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_equals_the_loss_from_whole_logits(rng, ids, tied):
    model = in_float64(Llama(replace(SMALL, tie_word_embeddings=tied), rng))
    labels = np.where(rng.random(ids.shape) < 0.5, -100, ids)
    for target in (ids, labels):
        assert model.loss(ids, target).item() == pytest.approx(plain_loss(model(ids).data, target), rel=1e-12)


def test_nothing_precedes_the_first_token_so_its_label_alone_is_no_loss(model, ids):
    labels = np.full_like(ids, -100)
    labels[:, 0] = 1
    for array in (ids, labels):
        array.setflags(write=False)
    model.loss(ids, ids).backward()  # which changes neither
    with pytest.raises(ValueError, match="no token is scored"):
        model.loss(ids, labels)


# -- what is refused ---------------------------------------------------------------------------------------------------

BAD_IDS = {
    "one row without a batch": (np.arange(3), r"integers of shape \(B, T\), got int64 of shape \(3,\)"),
    "rows of several lengths": ([[1], [2, 3]], r"input_ids must have rows of one length: pad them, as collate does"),
    "three axes": (np.zeros((1, 2, 3), int), r"of shape \(1, 2, 3\)"),
    "floats": (np.zeros((1, 3)), "got float64"),
    "truth values": (np.zeros((1, 3), bool), "got bool"),
    "a flat list": ([1, 2, 3], r"of shape \(3,\)"),
    "too long": (np.zeros((1, 17), int), "17 tokens are more than the 16"),
    "negative": (np.array([[0, -1, 3]]), r"must lie in 0\.\.10, got -1\.\.3"),
    "outside the vocabulary": ([[0, 11, 3]], r"must lie in 0\.\.10, got 0\.\.11"),
    "without a token": (np.zeros((1, 0), int), r"of shape \(1, 0\)"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_the_model_cannot_read_are_refused(model, bad, message):
    for call in (lambda: model(bad), lambda: model.loss(bad, np.zeros((1, 3), int))):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("bad", [-1, -101, 11, 0.5])  # PyTorch's users may ignore -1, which is a row of the head here
def test_labels_that_are_no_tokens_are_refused(model, bad):
    for loss in (model.loss, partial(loss_and_grad, model)):
        with pytest.raises(ValueError, match=r"labels must (lie in 0\.\.10, or be -100|be integers)"):
            loss(np.zeros((1, 3), int), np.array([[0, -100, bad]]))
        with pytest.raises(ValueError, match="no token is scored"):
            loss(np.zeros((1, 3), int), np.full((1, 3), -100))


def test_unsigned_ids_as_in_a_memory_map_are_ids(model):
    ids = np.array([[3, 1, 4, 1]])
    assert model.loss(ids.astype(np.uint16), ids.astype(np.uint16)).item() == model.loss(ids, ids).item()


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (6,), (1, 6), (6, 1), (2, 3, 1), (1, 2, 3)])
def test_labels_of_another_shape_are_refused_also_those_of_as_many_tokens(model, shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.*\(2, 3\)"):
        model.loss(np.zeros((2, 3), int), np.zeros(shape, int))


@pytest.mark.parametrize(("packing", "starts"), [(Packing(0, (3, 3, 8)), [3]), (Packing(2, (5, 8)), [2, 5])], ids=str)
def test_the_first_token_of_a_packed_sequence_is_predicted_by_no_other_sequence(model, packing, starts):
    ids = np.arange(8)[None] % 5
    labels = ids.copy()
    labels[0, starts] = -100
    for compute in (model.loss, partial(loss_and_grad, model)):
        assert np.isfinite(compute(ids, labels, packing).item())
        for start in starts:
            wrong = np.where(np.arange(8) == start, ids, labels)
            with pytest.raises(ValueError, match=rf"begins at {start} has a label .* make it -100"):
                compute(ids, wrong, packing)


def test_a_packing_describes_its_row_and_its_longest_sequence_must_fit(model):
    for ids in (np.zeros((1, 7), int), np.zeros((2, 8), int)):
        with pytest.raises(ValueError, match=r"a packing of 8 tokens does not describe input_ids of shape"):
            model.loss(ids, ids, Packing(2, (5, 8)))
    for longest in (16, 17):
        packing = Packing(4, (longest, longest + 12))  # sequences of `longest` tokens and of 16, in a longer row
        ids = np.zeros((1, longest + 12), int)
        labels = np.full_like(ids, -100)
        labels[:, 5] = 0
        if longest == 16:
            assert np.isfinite(model.loss(ids, labels, packing).item())
        else:
            with pytest.raises(ValueError, match="17 tokens are more than the 16 the model can see"):
                model.loss(ids, labels, packing)


# -- made and printed --------------------------------------------------------------------------------------------------


def test_a_model_is_random_unless_it_is_asked_for_an_empty_one():
    def first(model):
        return model.model.layers[0].self_attn.q_proj.weight.data

    assert first(Llama(SMALL)).std() == pytest.approx(0.02, rel=0.5)
    np.testing.assert_array_equal(first(Llama(SMALL)), first(Llama(SMALL, seed=0)))
    np.testing.assert_array_equal(first(Llama(SMALL, 3)), first(Llama(SMALL, np.random.default_rng(3))))
    assert (first(Llama(SMALL, 3)) != first(Llama(SMALL, 4))).any()
    empty = Llama.empty(SMALL)
    assert {name: w.shape for name, w in empty.state_dict().items()} == {
        name: w.shape for name, w in Llama(SMALL).state_dict().items()
    }
    assert not first(empty).any()


def test_a_model_prints_as_a_tree_that_shows_shapes_and_adapters():
    model = Llama(replace(SMALL, num_hidden_layers=3))
    assert "(layers.0 to 2): 3 x Block(" in repr(model)
    assert repr(model.model.norm) == "RMSNorm(weight (8,))"
    add_adapter(model, LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"], layers_to_transform=[1]), "legal")
    tree = repr(model)
    assert "(embed_tokens): Embedding(weight (11, 8) frozen)" in tree
    assert "(adapters.legal): LoraWeights(lora_A (2, 8), lora_B (4, 2), scale 4)" in tree
    assert all(f"(layers.{i}): Block(" in tree for i in range(3))  # the second differs from its neighbours


def test_a_config_that_contradicts_the_tensors_of_its_file_is_refused():
    shapes = {name: w.shape for name, w in Llama(SMALL).state_dict().items()}
    check_claims(SMALL, shapes)
    wrong = [({"num_hidden_layers": len(shapes) + 1}, "layers claimed"), ({"vocab_size": 12}, "embed_tokens"),
             ({"head_dim": 6}, "q_proj"), ({"num_key_value_heads": 2}, "k_proj"),
             ({"intermediate_size": 7}, "gate_proj")]  # fmt: skip
    for change, message in wrong:
        with pytest.raises(ModelFileError, match=message):
            check_claims(replace(SMALL, **change), shapes)
    with pytest.raises(ModelFileError, match="missing model.embed_tokens.weight"):
        check_claims(SMALL, {name: shape for name, shape in shapes.items() if "embed" not in name})
