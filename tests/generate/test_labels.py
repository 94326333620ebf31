"""Labels as answers: their log-likelihoods are those of whole sequences, whatever is shared, cached or in the batch."""

from copy import deepcopy

import numpy as np
import pytest
from hearing import counts_of
from modelfiles import new_tokenizer

import minilora as ml
from minilora.data.labels import LabelTask
from minilora.engine.fused import NOT_SCORED
from minilora.generate import labels as scoring
from minilora.generate.as_trained import task_of_adapters as label_task
from minilora.generate.labels import label_logprobs, label_probabilities, ranked_labels
from minilora.nn import cache

LABELS = ["bill", "billing", "a label of several words", "x"]
ASK = [{"role": "user", "content": "Which label fits the message?\n\nMessage: where is it"}]
TALKS = [
    ASK,
    [{"role": "user", "content": "Which label fits the message?\n\nMessage: hello, and much more of it"}],
    [*ASK, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and this"}],
    [{"role": "system", "content": "Be brief."}, *ASK],
]


def brute_force(model, tokenizer, talk, label):
    """The whole sequence, one at a time: the log-probabilities of the last answer and its end token, added up."""
    record = ml.Record("x", (*talk, {"role": "assistant", "content": label}))
    sample = ml.encode_record(record, tokenizer)
    logits = model(np.array([sample.ids])).data[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    end = max(i for i, token in enumerate(sample.labels) if token != NOT_SCORED)
    total, at = 0.0, end
    while sample.labels[at] != NOT_SCORED:
        total += logprobs[at - 1, sample.ids[at]]
        at -= 1
    assert end - at >= 2  # the end token as well
    return total


@pytest.mark.parametrize(
    ("talks", "at_once", "threads"),
    [(TALKS, 2, 2), (TALKS[:2], 3, 3), (TALKS[:1], 16, 2), (TALKS[2:3], 1, 1), (TALKS[:3] * 2, 1, 1), (TALKS, 16, 2)],
)
def test_log_likelihoods_are_those_of_the_whole_sequences(talker, tokenizer, monkeypatch, talks, at_once, threads):
    monkeypatch.setattr(scoring, "cores", lambda: threads)
    monkeypatch.setattr(scoring, "RECORDS", at_once)
    monkeypatch.setattr(scoring, "LABELS", at_once)
    with counts_of("record") as heard:
        found = label_logprobs(talker, tokenizer, talks, LABELS)
    expected = [[brute_force(talker, tokenizer, talk, label) for label in LABELS] for talk in talks]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert sum(heard) == len(talks)
    assert len({round(x, 2) for x in found[:3].ravel()}) == found[:3].size


def test_where_the_end_of_the_prompt_merges_with_some_labels_only_the_labels_count(talker):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}"
    template += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    merging = new_tokenizer(digits=False, merges=["Ġ b"], template=template)
    for labels in (LABELS, LABELS[:2]):  # of which the first two begin alike
        expected = [[brute_force(talker, merging, talk, label) for label in labels] for talk in TALKS[:2]]
        np.testing.assert_allclose(label_logprobs(talker, merging, TALKS[:2], labels), expected, rtol=1e-4)


def test_a_model_that_is_very_sure_has_finite_log_likelihoods(talker, tokenizer):
    sure = deepcopy(talker)
    sure.model.norm.weight.data *= 100
    assert sure(np.array([[1, 2, 3]])).data.max() > 100  # exp of it has no float32
    expected = [[brute_force(sure, tokenizer, talk, label) for label in LABELS] for talk in TALKS]
    np.testing.assert_allclose(label_logprobs(sure, tokenizer, TALKS, LABELS), expected, rtol=1e-4)


def test_a_model_that_predicts_nan_has_no_label(talker, tokenizer):
    broken = deepcopy(talker)
    broken.model.norm.weight.data[0] = np.nan
    broken.data = {"labels": LABELS, "template": "{text}"}
    for ask in (
        lambda: ranked_labels(broken, tokenizer, LabelTask.of(LABELS), ASK, None),
        lambda: ml.predict(broken, tokenizer, ["hello", "hi"]),
    ):
        with pytest.raises(ValueError, match="predicts NaN or infinity instead of probabilities: look at its weights"):
            ask()


def test_some_padding_may_be_longer_than_the_shared_beginning_and_some_shorter(talker, tokenizer):
    talks = [[{"role": "user", "content": "Message: " + "x" * n}] for n in (200, 185, 165, 1)]
    expected = [[brute_force(talker, tokenizer, talk, label) for label in LABELS] for talk in talks]
    np.testing.assert_allclose(label_logprobs(talker, tokenizer, talks, LABELS), expected, rtol=1e-4)


def test_all_threads_together_keep_within_the_memory(talker, tokenizer, monkeypatch):
    talks = [[{"role": "user", "content": letter * 60}] for letter in "abcdefgh"]
    rows, new_cache = [], talker.new_cache
    of_one_row = sum(array.nbytes for array in new_cache(1, 128)._arrays())
    monkeypatch.setattr(scoring, "cores", lambda: 2)
    monkeypatch.setattr(talker, "new_cache", lambda count, *room: rows.append(count) or new_cache(count, *room))
    monkeypatch.setattr(cache, "BYTES_AT_ONCE", 4 * of_one_row)
    label_logprobs(talker, tokenizer, talks, LABELS)
    most = max(rows)
    rows.clear()
    monkeypatch.setattr(scoring, "cores", lambda: 1)
    label_logprobs(talker, tokenizer, talks, LABELS)
    assert 2 * most <= max(rows) < len(talks)


def test_the_bar_is_there_before_the_labels_of_many_conversations_are_encoded(talker, tokenizer, monkeypatch, capsys):
    shown, encode = [], scoring.encode_records
    monkeypatch.setattr(
        scoring, "encode_records", lambda *given: shown.append(capsys.readouterr().err) or encode(*given)
    )
    ml.show_progress()
    try:
        for talks in (TALKS, TALKS[:1]):
            label_logprobs(talker, tokenizer, talks, LABELS)
    finally:
        ml.show_progress(False)
    assert "0/4" in shown[0] and "/1" not in shown[len(TALKS)]


def test_what_two_conversations_begin_with_is_computed_once_and_held_once(talker, tokenizer, monkeypatch):
    talks = [[{"role": "user", "content": "x" * 40 + letter}] for letter in "ab"]
    sizes, forward = [], type(talker).forward
    monkeypatch.setattr(
        type(talker), "forward", lambda self, ids, *a, **k: sizes.append(ids.shape) or forward(self, ids, *a, **k)
    )
    label_logprobs(talker, tokenizer, talks, LABELS)
    assert sizes[0][0] == 1 and sizes[0][1] > 40 and sizes[1][0] == 2 and sizes[1][1] < 40


def test_few_conversations_are_divided_among_the_cores(talker, tokenizer, monkeypatch):
    rows, forward = [], type(talker).forward
    monkeypatch.setattr(scoring, "cores", lambda: 2)
    monkeypatch.setattr(
        type(talker), "forward", lambda self, ids, *a, **k: rows.append(len(ids)) or forward(self, ids, *a, **k)
    )
    label_logprobs(talker, tokenizer, TALKS[:3], LABELS[:1])
    assert sorted(rows) == [1, 1, 1, 2, 2]  # the beginning of all; of one and of two, the prompts and the label


def test_little_memory_gives_the_same(talker, tokenizer, monkeypatch):
    usual = label_logprobs(talker, tokenizer, TALKS, LABELS)
    monkeypatch.setattr(cache, "BYTES_AT_ONCE", 1)
    np.testing.assert_allclose(label_logprobs(talker, tokenizer, TALKS, LABELS), usual, rtol=1e-4)


def test_probabilities_add_up_to_1_and_are_softmax_of_the_sums(talker, tokenizer):
    logprobs = label_logprobs(talker, tokenizer, TALKS, LABELS)
    p = label_probabilities(logprobs)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_allclose(np.log(p[:, :1] / p), logprobs[:, :1] - logprobs)
    assert label_probabilities(np.array([[-2000.0, -2001.0]])) == pytest.approx(
        np.array([[1, np.exp(-1)]]) / (1 + np.exp(-1))
    )


def test_labels_are_ranked_by_their_probability_after_the_prompt_of_the_task_and_the_system_prompt_alone(loaded):
    model, tokenizer = loaded
    task, talk = LabelTask.of(LABELS), [*TALKS[3], *TALKS[2][1:]]
    asked = [TALKS[3][0], {"role": "user", "content": task.prompt("and this")}]
    (p,) = label_probabilities(label_logprobs(model, tokenizer, [asked], task.labels, True, "legal"))
    assert task.asked(talk) == asked
    labels, found = zip(*ranked_labels(model, tokenizer, task, asked, "legal"), strict=True)
    assert labels == tuple(task.labels[i] for i in np.argsort(-p))
    np.testing.assert_allclose(found, -np.sort(-p), rtol=1e-6)


def test_a_mixed_batch_computes_with_the_adapter_that_is_named(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(
        scoring, "cores", lambda: 2
    )  # but a mixed batch cannot be divided: its rows are set for all of it
    monkeypatch.setattr(scoring, "RECORDS", 1)
    found = {}
    for choice in (None, "legal", {"legal": 0.5, "support": 0.5}):
        ml.set_adapter(model, choice)
        active = label_logprobs(model, tokenizer, TALKS, LABELS)
        ml.set_adapter(model, "support")
        named = label_logprobs(model, tokenizer, TALKS, LABELS, mixed=True, choice=choice)
        np.testing.assert_allclose(named, active, rtol=1e-3)
        found[str(choice)] = named
    ml.set_adapter(model, None)
    assert all(not np.allclose(found["None"], other) for name, other in found.items() if name != "None")


def test_a_message_that_is_too_long_is_refused(talker, tokenizer):
    record = ml.Record("x", (*ASK, {"role": "assistant", "content": max(LABELS, key=len)}))
    scored = [i for i, label in enumerate(ml.encode_record(record, tokenizer).labels) if label != NOT_SCORED]
    room = 1024 - (scored[-1] + 1)  # a token per letter
    fitting, long = ([{"role": "user", "content": ASK[0]["content"] + "x" * n}] for n in (room, room + 1))
    assert np.isfinite(label_logprobs(talker, tokenizer, [fitting], LABELS)).all()
    with pytest.raises(ValueError, match="a message with its label has 1025 tokens, the model can see 1024: shorten"):
        label_logprobs(talker, tokenizer, [ASK, long], LABELS)


def test_a_choice_has_a_task_if_all_of_its_adapters_were_trained_on_the_same_labels(loaded):
    model, _ = loaded
    one, other = LabelTask.of(["a", "b"]), LabelTask.of(["a", "c"])
    adapters = [model.adapters[name] for name in ("legal", "support")]
    both, before = {"legal": 0.5, "support": 0.5}, [adapter.data for adapter in adapters]
    try:
        assert label_task(model, None) is label_task(model, "legal") is label_task(model, both) is None
        adapters[0].data = one.entry()
        assert label_task(model, "legal") == one and label_task(model, both) is None
        adapters[1].data = other.entry()
        assert label_task(model, both) is None
        adapters[1].data = one.entry()
        assert label_task(model, both) == one
    finally:
        for adapter, data in zip(adapters, before, strict=True):
            adapter.data = data
