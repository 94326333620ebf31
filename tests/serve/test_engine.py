"""The thread that owns the model: one batch for all, places that become free, adapters that come and go."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest
from serving import QUESTION, serving

import minilora as ml
from minilora.generate.as_trained import system_of
from minilora.models.with_adapters import load_with_adapters
from minilora.serve.engine import Engine
from minilora.serve.protocol import ApiError, Request


@pytest.fixture
def engine(shop, tmp_path):
    """An engine, with its server, of the test's own; two answers run at a time, three may wait."""
    with serving(shop, shop, slots=2, waiting=3) as served:
        yield served.engine
        assert served.said == []


def start(engine, adapter="legal", max_new_tokens=64, wait=True, **settings):
    """An answer under way: its request, its pieces so far, and a future of the last one."""
    ask, pieces, last = Request(QUESTION, adapter, max_new_tokens, **settings), [], Future()

    def tell(piece):
        pieces.append(piece)
        if piece.finished or piece.error:
            last.set_result(piece)

    begun = engine.call(lambda: engine.ask(ask, tell))
    if wait:
        begun.result(30)
    return ask, pieces, last


def alone(shop, adapter, tokens):
    model, tokenizer = ml.load(shop / "base")
    if adapter:
        ml.load_adapter(model, shop / adapter, adapter)
    return ml.generate(model, tokenizer, QUESTION, max_new_tokens=tokens)


def test_answers_of_several_are_computed_in_one_batch_and_are_as_if_alone(shop, engine, monkeypatch):
    sizes = []
    compute = engine.streams._compute
    monkeypatch.setattr(
        engine.streams, "_compute", lambda answers, *rest: (sizes.append(len(answers)), compute(answers, *rest))[1]
    )
    hold = threading.Event()
    engine.call(hold.wait)
    both = [start(engine, adapter, 12, wait=False) for adapter in ("legal", None)]
    hold.set()
    for (_, pieces, last), adapter in zip(both, ("legal", None), strict=True):
        last.result(30)
        assert "".join(piece.text for piece in pieces) == alone(shop, adapter, 12)
    assert 2 in sizes and len(sizes) <= 13


def test_an_error_in_one_answer_is_told_to_it_alone(shop):
    with serving(shop, shop) as served:
        hold = threading.Event()
        served.engine.call(hold.wait)
        (_, _, last), (bad, pieces, failed) = (start(served.engine, None, 6, wait=False) for _ in range(2))
        served.engine.call(lambda: setattr(served.engine.jobs[bad].answer, "take", lambda token: 1 / 0))
        hold.set()
        assert failed.result(30).error == "the answer could not be computed" and pieces == [failed.result()]
        assert last.result(30).tokens == 6 and last.result().error is None
        served.until_said("1 answer could not be computed: division by zero")
        assert served.engine.call(served.engine.state).result(30) == {"running": 0, "waiting": 0}


def test_one_that_is_cancelled_frees_its_place_for_one_that_waits(engine):
    first, second = (start(engine, max_new_tokens=900, temperature=2.0) for _ in range(2))
    third = start(engine, max_new_tokens=2)
    engine.call(lambda: engine.cancel(first[0])).result(30)
    assert third[2].result(30).finished in ("stop", "length")
    engine.call(lambda: engine.cancel(second[0])).result(30)
    assert engine.state() == {"running": 0, "waiting": 0}
    engine.call(lambda: engine.cancel(second[0])).result(30)  # gone already: nothing happens


def test_a_call_that_nobody_waits_for_any_longer_is_not_made(engine):
    hold, made = threading.Event(), []
    engine.call(hold.wait)
    future = engine.call(lambda: made.append(1))
    assert future.cancel()
    hold.set()
    engine.call(lambda: None).result(30)
    assert made == []


def test_an_adapter_that_leaves_answers_to_the_end(shop, engine):
    before = {path: array.copy() for path, array in engine.model.state_dict().items() if ".adapters." not in path}
    running = start(engine, "legal", max_new_tokens=60)
    engine.call(lambda: engine.remove_adapter("legal")).result(30)
    assert list(engine.versions) == ["base", "support"]
    with pytest.raises(ApiError):
        start(engine, "legal")
    running[2].result(30)
    engine.call(lambda: None).result(30)
    assert list(engine.model.adapters) == ["support"] and not engine.leaving
    assert "".join(piece.text for piece in running[1]) == alone(shop, "legal", 60)
    engine.call(lambda: engine.remove_adapter("support")).result(30)  # the last one: plain layers are back
    after = engine.model.state_dict()
    assert all(np.array_equal(after[path], array) for path, array in before.items())
    engine.call(lambda: engine.add_adapter("law", shop / "legal")).result(30)
    assert list(engine.versions) == ["base", "law"]


def test_another_adapter_of_the_same_name_knows_nothing_of_the_first(shop, engine):
    for folder in ("legal", "support"):
        for _ in range(2):
            _, pieces, last = start(engine, "legal", 12)
            last.result(30)
            assert "".join(piece.text for piece in pieces) == alone(shop, folder, 12)
        assert pieces[-1].cached > 0
        engine.call(lambda: engine.remove_adapter("legal")).result(30)
        engine.call(lambda: engine.add_adapter("legal", shop / "support")).result(30)


def test_an_adapter_that_still_answers_keeps_its_name(shop, engine, monkeypatch):
    monkeypatch.setattr(engine.streams, "step", lambda: None)
    ask, _, _ = start(engine, {"legal": 0.5, "support": 0.5})
    engine.call(lambda: engine.remove_adapter("legal")).result(30)
    with pytest.raises(ApiError, match="leaving"):
        engine.call(lambda: engine.add_adapter("legal", shop / "legal")).result(30)
    assert "legal" in engine.model.adapters
    engine.call(lambda: engine.cancel(ask)).result(30)
    assert "legal" not in engine.model.adapters
    engine.call(lambda: engine.add_adapter("legal", shop / "legal")).result(30)


def test_names_that_are_taken_or_not_there(shop, engine):
    for name in ("legal", "base"):
        with pytest.raises(ApiError, match="taken"):
            engine.call(lambda name=name: engine.add_adapter(name, shop / "legal")).result(30)
    for name, status in (("taxes", 404), ("base", 400)):
        with pytest.raises(ApiError, match=name) as caught:
            engine.call(lambda name=name: engine.remove_adapter(name)).result(30)
        assert caught.value.status == status


@pytest.mark.parametrize("fields", [{}, {"labels": ["a", "b"], "template": "{text}"}])
def test_each_is_listed_with_what_it_is_asked_under_and_answers(shop, fields):
    model, tokenizer = load_with_adapters({"legal": shop / "legal"}, shop / "base")
    for prompts in ((None, None), ("Be brief.", "Be kind."), ("Be brief.", None)):
        model.data, model.adapters["legal"].data = ({"system": prompt, **fields} for prompt in prompts)
        listed = [version.entry() for version in Engine(model, tokenizer).versions.values()]
        assert tuple(one["system"] for one in listed) == prompts
        assert prompts == (system_of(model, None), system_of(model, "legal"))
        assert all(one["labels"] == (("a", "b") if fields else None) for one in listed)


def test_tokens_are_counted_and_what_is_far_too_long_is_not_even_read(engine, monkeypatch):
    assert engine.count(Request(QUESTION)) == len(engine.tokenizer.encode_chat(QUESTION, answer_next=True))
    monkeypatch.setattr(engine.tokenizer, "begun", lambda ids: [7, *ids])
    assert engine.count(Request("ab")) == 3
    monkeypatch.setattr(engine.tokenizer, "encode", None)
    assert engine.count(Request([{"role": "user", "content": "x" * 1_000_000}])) > engine.context


def test_the_context_is_the_models_at_most(shop):
    model, tokenizer = ml.load(shop / "base")
    assert [Engine(model, tokenizer, context=n).context for n in (None, 10, 5000)] == [1024, 10, 1024]
