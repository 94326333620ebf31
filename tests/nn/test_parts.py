"""Samples, packing, padding and micro-batches: no token and no label is lost, whatever the samples are."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora.engine.attention import Packing
from minilora.nn import step
from minilora.nn.parts import (
    GOOD,
    LEAST,
    Batch,
    Pair,
    Sample,
    begin_alike,
    collate,
    common_prefix,
    distinct_length,
    divided_samples,
    micro_batches,
    pack,
    packed_length,
)
from minilora.nn.step import loss_without_grad, losses_without_grad, training_step


@st.composite
def samples(draw, longest=12):
    """One to six samples that begin alike. Of each some tokens are scored, the first never, the last always."""
    prefix = draw(st.lists(st.integers(0, 9), max_size=5))
    found = []
    for _ in range(draw(st.integers(1, 6))):
        ids = (*prefix, *draw(st.lists(st.integers(0, 9), min_size=2, max_size=longest)))
        scored = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 2, max_size=len(ids) - 2)), True]
        found.append(Sample(ids, tuple(token if flag else -100 for token, flag in zip(ids, scored, strict=True))))
    return found


def sequences(batch):
    """(ids, labels) of each sequence in a batch, with the prefix of a packed one, whose labels count in none."""
    ids, labels, packing = batch.input_ids, batch.labels, batch.packing
    if packing is None:
        return [(tuple(row), tuple(own)) for row, own in zip(ids.tolist(), labels.tolist(), strict=True)]
    start, hidden = ids[0, : packing.prefix].tolist(), [-100] * packing.prefix
    spans = [slice(*span) for span in packing.own_spans()]
    return [((*start, *ids[0, own].tolist()), (*hidden, *labels[0, own].tolist())) for own in spans]


def every(samples):
    return sorted((sample.ids, sample.labels) for sample in samples)


@given(samples())
@settings(max_examples=40)
def test_a_packed_row_holds_each_sample_and_their_common_prefix_once(found):
    row, shared = pack(found), common_prefix(found)
    assert row.packing.prefix == shared and sorted(sequences(row)) == every(found)
    assert packed_length(found) == row.input_ids.size == row.packing.ends[-1]
    assert row.scored == sum(sample.scored for sample in found)
    first_scored = min(next(i for i, label in enumerate(sample.labels) if label != -100) for sample in found)
    alike = [len({sample.ids[: i + 1] for sample in found}) == 1 for i in range(first_scored)]
    assert shared == (0 if len(found) == 1 else sum(alike[: first_scored - 1]))


@given(samples(longest=200), st.sampled_from([1, 2, 3, 8]))
@example([Sample((i, *[i] * length), (-100, *[i] * length)) for i, length in enumerate((200, 2, 200, 2))], 2)
@settings(max_examples=25)
def test_micro_batches_of_samples_and_of_their_packed_row_hold_each_of_them_once(found, threads):
    row = pack(found)
    for batches in (micro_batches(found, threads), micro_batches(row, threads)):
        assert sorted(each for batch in batches for each in sequences(batch)) == every(found)
        assert sum(batch.scored for batch in batches) == row.scored
    assert len(micro_batches(found, threads)) == len(batches) == len(divided_samples(found, threads))
    assert sorted(i for part in divided_samples(found, threads) for i in part) == list(range(len(found)))
    assert len(batches) == 1 or row.input_ids.size >= LEAST * len(batches)
    lengths = sorted(len(sample.ids) - row.packing.prefix for sample in found)
    own = [batch.input_ids.size - batch.packing.prefix for batch in batches]
    assert max(own) - min(own) <= lengths[-1]  # about equal: they differ by at most one sequence


def test_samples_in_which_nothing_is_scored_share_all_but_their_last_token():
    one, other = (Sample(ids, [-100] * 4) for ids in ((5, 6, 7, 8), (5, 6, 7, 9)))
    assert common_prefix([one, other]) == common_prefix([one, one]) == 3
    assert common_prefix([one, Sample((5,), (-100,))]) == common_prefix([one, Sample((), ())]) == 0


BEGINNINGS = st.tuples(st.integers(1, 2), st.integers(LEAST, LEAST + 2))  # a document, and its unscored tokens


@given(st.lists(BEGINNINGS, min_size=2, max_size=6), st.booleans())
def test_those_begin_alike_that_have_more_in_common_than_all(begins, pairs):
    """Of pairs, with both answers."""
    made = [Sample((*[doc] * (LEAST + 2), i), (*[-100] * count, *[doc] * (LEAST + 2 - count), i))
            for i, (doc, count) in enumerate(begins)]  # fmt: skip
    found = [Pair(*both) for both in zip(made[::2], made[1::2], strict=False)] if pairs else made
    enough, groups = common_prefix(found) + LEAST, begin_alike(found)
    assert sorted(i for group in groups for i in group) == list(range(len(found)))
    for i, j in combinations(range(len(found)), 2):
        together = any({i, j} <= set(group) for group in groups)
        assert together == (common_prefix([found[i], found[j]]) >= enough)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(LEAST - 1, LEAST + 1), st.integers(1, 3))
@settings(max_examples=25)
def test_samples_that_begin_with_the_same_document_are_one_micro_batch_and_it_is_computed_once(
    documents, more, threads
):
    system, asked = (7,) * 5, range(100, 109)
    found = [  # a token more than is unscored of every document, so that the common beginning has `more` tokens
        Sample((*system, *[document] * more, i, i, i), (*[-100] * (len(system) + more + 1), i, i))
        for document, i in zip(documents, asked, strict=False)
    ]
    together = more >= LEAST and len(set(documents)) > 1
    alike = {tuple(i for i, other in enumerate(documents) if other == document) for document in documents}
    in_order = divided_samples(found, threads)
    assert all(part == sorted(part) for part in in_order)
    parts = [set(part) for part in in_order]
    assert sorted(i for part in parts for i in part) == list(range(len(found)))
    if together:
        assert all(set(group) in parts for group in alike if len(group) > 1)
    batches = micro_batches(found, threads)
    assert sorted(each for batch in batches for each in sequences(batch)) == every(found)
    for part, batch in zip(parts, batches, strict=True):
        assert batch.input_ids.size == packed_length([found[i] for i in part])


def test_tokens_of_a_common_beginning_are_counted_once():
    def begun(document, length):
        own = [9] * length
        return Sample((1, 2, *[document] * 100, 3, *own), (*[-100] * 103, *own))

    several, alone = [begun(3, 5), begun(4, 6), begun(3, 7)], begun(4, 6)
    assert distinct_length(several) == (102 + 6 + 8) + 109  # an unscored token is left before the scored ones
    assert distinct_length(several[::2]) == 102 + 6 + 8 and distinct_length([alone]) == 109
    assert distinct_length([alone, begun(3, 7)]) == 109 + 110 - 2
    assert distinct_length([alone, begun(5, 7), *several[::2]]) == (102 + 6 + 8) + (109 + 110 - 2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [4, 40])
def test_a_micro_batch_of_one_document_is_no_larger_for_a_large_batch(threads, count):
    asked = [(document, i) for document in (1, 2) for i in range(count)]
    found = [Sample((*[doc] * 150, *[3 + i] * 50), (*[-100] * 160, *[3 + i] * 40)) for doc, i in asked]
    batches = micro_batches(found, threads)
    assert sorted(each for batch in batches for each in sequences(batch)) == every(found)
    assert len(batches) == 2 * round(50 * count / GOOD) and max(each.input_ids.size for each in batches) < 2 * GOOD
    assert all(len({*batch.input_ids[0, :150].tolist()}) == 1 for batch in batches)


@pytest.mark.parametrize(("threads", "expected"), [(1, 2), (2, 2), (4, 4)])
def test_a_long_common_beginning_makes_no_more_micro_batches(threads, expected):
    """Each computes it: one of a thousand tokens would be computed again and again."""
    found = [Sample((*[1] * 1000, *[2 + i] * 60), (*[-100] * 1001, *[2 + i] * 59)) for i in range(8)]
    for batches in (micro_batches(found, threads), micro_batches(pack(found), threads)):
        assert [each.packing.prefix for each in batches] == [1000] * expected
        assert sorted(each for batch in batches for each in sequences(batch)) == every(found)
    alike = [Sample((document, *one.ids), (-100, *one.labels)) for document in (1, 2) for one in found]
    assert len(micro_batches(alike, threads)) == 4  # of each document two


def test_a_common_beginning_counts_where_a_micro_batch_must_not_be_too_small():
    for length, expected in ((LEAST, 2), (LEAST - 1, 1)):  # of the beginning; half of LEAST are of each sample alone
        found = [Sample((*[1] * length, *[2 + i] * (LEAST // 2)), (*[-100] * (length + 1), *[2 + i] * (LEAST // 2 - 1)))
                 for i in range(2)]  # fmt: skip
        assert [len(micro_batches(each, 2)) for each in (found, pack(found))] == [expected] * 2


@given(st.integers(1, 9), st.integers(2, 80), st.sampled_from([1, 2, 3, 16]), st.data())
@settings(max_examples=40)
def test_micro_batches_of_rows_hold_every_row_whole_and_leave_out_what_is_not_scored(rows, length, threads, data):
    ids = np.arange(rows * length).reshape(rows, length)
    scored = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    labels = np.where(np.array(scored)[:, None], ids, -100)
    batch = Batch(ids, labels)
    batches = micro_batches(batch, threads)
    assert sum(part.scored for part in batches) == batch.scored
    if any(scored):
        assert all(part.scored for part in batches)
        found = [row for part in batches for row in sequences(part)]
        assert found == [row for row in sequences(batch) if row in found]
        assert {row for row, flag in zip(sequences(batch), scored, strict=True) if flag} <= set(found)
    else:
        assert len(batches) == 1  # whose loss is then a ValueError


def test_labels_of_a_prefix_are_scored_once():
    ids = np.arange(400)[None]
    labels = np.where(np.isin(ids, (10, 150, 300)), -100, ids)
    batches = micro_batches(Batch(ids, labels, Packing(10, (150, 300, 400))), threads=2)
    scored = sorted(token for part in batches for token in part.labels[part.labels != -100].tolist())
    assert len(batches) == 2 and scored == [*range(1, 10), *range(11, 150), *range(151, 300), *range(301, 400)]


@given(samples() | st.just([]), st.integers(0, 9))
@settings(max_examples=25)
def test_a_padded_batch_holds_each_sample_and_scores_no_padding(found, pad):
    input_ids, labels = collate(found, pad)
    assert input_ids.shape == labels.shape == (len(found), max([len(sample.ids) for sample in found], default=0))
    for sample, row, own in zip(found, input_ids.tolist(), labels.tolist(), strict=True):
        n = len(sample.ids)
        assert (tuple(row[:n]), tuple(own[:n])) == (sample.ids, sample.labels)
        assert set(row[n:]) <= {pad} and set(own[n:]) <= {-100}


def test_samples_whose_labels_are_all_of_their_ids_have_the_loss_of_their_rows(tiny_model):
    found = [Sample(ids, ids) for ids in ((5, 6, 7, 8), (5, 6, 9), (8, 9, 1, 2, 3))]  # the first tokens score as well
    assert [sample.scored for sample in found] == [3, 2, 4]
    assert loss_without_grad(tiny_model, found) == pytest.approx(tiny_model.loss(*collate(found)).item(), rel=1e-6)


def test_a_sample_in_which_nothing_is_scored_changes_no_loss(tiny_model):
    found = [Sample((5, 6, 7, 8), (-100, -100, 7, 8)), Sample((5, 6, 9), (-100, -100, 9))]
    more = [*found, Sample((5, 6), (-100, -100)), Sample((), ())]
    assert loss_without_grad(tiny_model, more) == pytest.approx(loss_without_grad(tiny_model, found), rel=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_micro_batch_of_samples_in_which_nothing_is_scored_is_left_out(threads, monkeypatch):
    scored, not_scored = Sample(range(100), range(100)), Sample(range(100), [-100] * 100)
    found = micro_batches([scored, not_scored, not_scored], threads)
    assert all(part.scored for part in found) and sum(part.scored for part in found) == 99
    assert len(micro_batches([not_scored, not_scored], threads)) == 1


def test_fit_names_a_sample_in_which_nothing_is_scored(tiny_model):
    tiny_model.requires_grad_()
    scored, not_scored = Sample((5, 6), (-100, 6)), Sample((5, 6), (-100, -100))
    for wrong in (not_scored, Sample((5, 6), (-100, 6), others=(scored, not_scored))):
        with pytest.raises(ValueError, match="sample 1 has no token that is scored: every label is -100"):
            ml.fit(tiny_model, [scored, wrong], steps=1)


def test_a_sample_prints_in_one_line_and_its_wordings_take_turns():
    sample = Sample(tuple(range(500)), (-100,) * 400 + (1,) * 100)
    assert repr(sample) == "Sample(500 tokens, 100 scored)"
    both = Sample(sample.ids, sample.labels, (sample, sample))
    assert repr(both) == "Sample(500 tokens, 100 scored, 2 others)"
    assert [both.in_turn(turn) for turn in range(4)] == [both, sample, sample, both]


def test_lists_and_arrays_make_the_same_sample_as_tuples():
    expected = Sample((1, 2, 3), (-100, 2, 3))
    for kind in (list, np.array, lambda items: tuple(np.array(items))):
        made = Sample(kind([1, 2, 3]), kind([1, 2, 3]))
        assert made == expected and hash(made) == hash(expected) and type(made.ids[0]) is int
    with pytest.raises(ValueError, match="3 ids and 2 labels"):
        Sample((1, 2, 3), (-100, 2))


@pytest.mark.parametrize("values", [(1, 2.0, 3), (1, 2, "3"), (1, 2, None), (1, 2, [3])], ids=str)
@pytest.mark.parametrize("kind", [tuple, list, lambda values: np.array(values, object)])
@pytest.mark.parametrize("name", ["ids", "labels"])
def test_a_sample_of_anything_but_integers_is_refused(values, kind, name):
    with pytest.raises(ValueError, match=f"^{name} must be integers, got ") as caught:
        Sample(**{"ids": (1, 2, 3), "labels": (-100, 2, 3), name: kind(values)})
    assert repr(values[-1]) in str(caught.value)


def test_samples_that_can_be_read_once_and_those_among_pairs_are_refused(tiny_model):
    with pytest.raises(TypeError, match="expected a list of samples, got a generator"):
        ml.fit(tiny_model, (Sample((1, 2), (-100, 2)) for _ in range(9)), steps=1)
    one = Sample((1, 2), (-100, 2))
    with pytest.raises(TypeError, match="samples alone or pairs alone"):
        ml.mean_loss(tiny_model, [one, ml.Pair(one, one)])
    with pytest.raises(TypeError, match="expected samples, got a Pair"):
        ml.collate([ml.Pair(one, one)])  # one row of both answers would train the rejected one


NO_SAMPLES = [ml.Record("q", "a"), {"question": "q", "answer": "a"}, "text", (1, 2, 3), np.arange(3), None]


@pytest.mark.parametrize("wrong", NO_SAMPLES, ids=lambda wrong: type(wrong).__name__)
def test_what_is_no_sample_is_refused_where_samples_are_taken_and_told_how_to_make_one(tiny_model, wrong):
    optimizer = ml.SGD(tiny_model.trainable_parameters(), lr=0.1)
    good = Sample((1, 2, 3), (-100, 2, 3))
    of_the_model = [partial(f, tiny_model) for f in (partial(ml.fit, steps=1), ml.mean_loss, losses_without_grad)]
    for call in (*of_the_model, partial(training_step, tiny_model, optimizer), ml.collate, pack, packed_length):
        for given_samples in ([wrong], [good, wrong]):
            kind = type(wrong).__name__
            with pytest.raises(TypeError, match=rf"^expected samples, got a {kind}: call encode_records\(records, "):
                call(given_samples)


def test_losses_of_samples_alone_are_in_their_order(tiny_model, monkeypatch):
    found = [Sample(tuple(range(n)), (-100, *range(1, n))) for n in (7, 60, 12, 55, 50, 30, 41)]
    expected = [loss_without_grad(tiny_model, [sample]) for sample in found]
    for threads in (1, 3):
        monkeypatch.setattr(step, "cores", lambda threads=threads: threads)
        assert losses_without_grad(tiny_model, found) == pytest.approx(expected, rel=1e-4)
    assert len(divided_samples(found, 3)) == 3
