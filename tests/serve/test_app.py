"""The addresses, asked with OpenAI's own client, and with what it would never send."""

import concurrent.futures
import json
import os
import re
import shutil
from dataclasses import replace
from enum import Enum
from typing import Literal

import numpy as np
import pytest
from peftfiles import link
from serving import QUESTION, serving

import minilora as ml
from minilora.data.fields import FieldTask
from minilora.data.labels import LabelTask
from minilora.data.passages import NO_WORD, TEMPLATE, Handbook, Passage
from minilora.generate.answers import generate_batch
from minilora.generate.as_trained import guide_of, without_passages
from minilora.generate.labels import label_logprobs, label_probabilities
from minilora.models.folder import save_folder
from minilora.models.with_adapters import load_with_adapters
from minilora.serve import engine as engine_module
from minilora.serve.app import App, read_page
from minilora.serve.protocol import ApiError

openai = pytest.importorskip("openai", reason="needs pip install '.[test-serve]'")


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(loaded):
    """What the model answers when it is asked without a server."""
    model, tokenizer = loaded

    def answer(choice, **settings):
        ml.set_adapter(model, choice)
        return ml.generate(model, tokenizer, QUESTION, **settings)

    yield answer
    ml.set_adapter(model, None)


def complete(client, model="legal", **fields):
    return client.chat.completions.create(model=model, messages=QUESTION, **fields)


# -- answers -----------------------------------------------------------------------------------------------------------

CHOICES = {
    "base": None,
    "legal": "legal",
    "support": "support",
    "legal=0.5 support=0.5": {"legal": 0.5, "support": 0.5},
}


def counts(usage):
    """The tokens of a request, whatever of them was known."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


@pytest.mark.parametrize("model", CHOICES)
def test_an_answer_whole_and_as_a_stream(client, expected, loaded, model):
    answer = complete(client, model, max_tokens=12)
    text = expected(CHOICES[model], max_new_tokens=12)
    assert (answer.object, answer.model, answer.choices[0].message.content) == ("chat.completion", model, text)
    prompt = len(loaded[1].encode_chat(QUESTION, answer_next=True))
    assert answer.usage.prompt_tokens == prompt and 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens
    chunks = list(complete(client, model, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == answer.choices[0].message.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text and len(chunks) > 4
    ends = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert ends == [None] * (len(chunks) - 2) + [answer.choices[0].finish_reason]
    assert chunks[-1].choices == [] and counts(chunks[-1].usage) == counts(answer.usage)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == prompt - 1  # asked for the second time
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id != answer.id


def test_an_answer_and_the_first_chunk_say_which_passage_was_looked_up(client, server, expected, monkeypatch):
    handbook = Handbook([Passage("birds/owl", "An owl says hello."), Passage("birds/heron", "A heron is silent.")], "x")
    plain = complete(client, max_tokens=8)
    monkeypatch.setattr(server.app, "handbook", handbook)
    answer = complete(client, max_tokens=8)
    assert answer.context == {"id": "birds/owl", "text": "An owl says hello."} and not hasattr(plain, "context")
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
    assert answer.choices[0].message.content != plain.choices[0].message.content
    first, *rest = complete(client, max_tokens=8, stream=True)
    assert first.context == answer.context and not any(hasattr(chunk, "context") for chunk in rest)
    monkeypatch.setattr(server.app, "handbook", Handbook([Passage("crow", "A crow caws.")], "x"))
    assert complete(client, max_tokens=8).context == {"id": "crow", "text": "A crow caws.", "note": NO_WORD}
    monkeypatch.setattr(server.engine.model.adapters["legal"], "data", {"name": "legal"})  # trained without passages
    assert complete(client, max_tokens=8).choices == plain.choices


def test_an_adapter_that_is_removed_before_its_answer_begins_is_not_found(client, server, monkeypatch):
    ask, others = server.engine.ask, {name: server.engine.versions[name] for name in ("base", "support")}
    monkeypatch.setattr(
        server.engine, "ask", lambda *given: monkeypatch.setattr(server.engine, "versions", others) or ask(*given)
    )
    with pytest.raises(openai.NotFoundError, match="'legal' does not exist") as caught:
        complete(client)
    assert caught.value.code == "model_not_found"  # its weights may be gone


def test_seed_temperature_top_p_and_stop_decide_the_answer(client, expected):
    settings = {"temperature": 1.5, "seed": 7, "top_p": 0.9}
    answer = complete(client, max_tokens=12, **settings).choices[0].message.content
    assert answer == expected("legal", max_new_tokens=12, **settings) != expected("legal", max_new_tokens=12)
    stop = answer[4:6]
    assert complete(client, stop=stop, **settings).choices[0].message.content == answer[: answer.find(stop)].rstrip()
    penalty = complete(client, max_tokens=12, extra_body={"repetition_penalty": 1.5}).choices[0].message.content
    assert (
        penalty == expected("legal", max_new_tokens=12, repetition_penalty=1.5) != expected("legal", max_new_tokens=12)
    )
    other = {complete(client, max_tokens=12, temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(other) > 1  # each with a seed of its own


def test_n_answers_are_those_of_n_seeds_whole_and_as_a_stream(client, server, expected, monkeypatch):
    settings = {"max_tokens": 12, "temperature": 1.5}
    whole = complete(client, n=3, seed=7, logprobs=True, **settings)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [expected("legal", max_new_tokens=12, temperature=1.5, seed=7 + i) for i in range(3)]
    alone = [complete(client, seed=7 + i, logprobs=True, **settings) for i in range(3)]
    assert [one.choices[0].finish_reason for one in alone] == [choice.finish_reason for choice in whole.choices]
    for one, choice in zip(alone, whole.choices, strict=True):
        told = [[token.token for token in each.logprobs.content] for each in (one.choices[0], choice)]
        assert told[0] == told[1]
    tokens = sum(one.usage.completion_tokens for one in alone)
    assert counts(whole.usage) == (alone[0].usage.prompt_tokens, tokens, alone[0].usage.prompt_tokens + tokens)
    *chunks, last = complete(client, n=3, seed=7, stream=True, stream_options={"include_usage": True}, **settings)
    of = [[chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i] for i in range(3)]
    assert ["".join(choice.delta.content or "" for choice in each) for each in of] == texts
    assert all(each[0].delta.role == "assistant" and each[-1].finish_reason for each in of)
    assert counts(last.usage) == counts(whole.usage)
    monkeypatch.setattr(server.engine, "waiting", 2 - server.engine.slots)
    assert len(complete(client, n=2, max_tokens=1).choices) == 2
    with pytest.raises(openai.BadRequestError, match="^.*n is 3: .* 2 answers at a time"):
        complete(client, n=3)


def test_the_end_of_the_limit_is_said_and_the_server_has_a_limit_of_its_own(client):
    answer = complete(client, "base", max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2
    assert complete(client, "base", temperature=2).usage.completion_tokens <= 16


def test_many_at_once_get_what_each_would_get_alone(client, expected):
    wanted = {model: expected(choice, max_new_tokens=12) for model, choice in CHOICES.items()}
    asked = [model for model in CHOICES for _ in range(6)]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda model: complete(client, model, max_tokens=12), asked))
    assert [answer.choices[0].message.content for answer in answers] == [wanted[model] for model in asked]
    assert len({answer.id for answer in answers}) == len(asked)


def continued(client, prompt, **fields):
    return client.completions.create(model="legal", prompt=prompt, **fields)


def test_a_text_is_continued_without_the_chat_template(client, loaded):
    model, tokenizer = loaded
    ml.set_adapter(model, "legal")
    text, ids = "A contract<|im_end|> is", []
    prompt = tokenizer.encode(tokenizer.plain(text))
    for _ in range(8):
        ids.append(int(model(np.array([prompt + ids])).data[0, -1].argmax()))
    ml.set_adapter(model, None)
    assert tokenizer.eos_id not in [*prompt, *ids]
    answer = continued(client, text, max_tokens=8)
    assert answer.choices[0].text == tokenizer.decode(ids).rstrip("\ufffd")  # with the white space around it
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 8
    chunks = list(continued(client, [text], max_tokens=8, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length" and counts(chunks[-1].usage) == counts(answer.usage)
    for settings in ({"prompt": ""}, {"prompt": ["a", "b"]}, {"prompt": "x" * 1100}, {"prompt": "a", "echo": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            continued(client, **settings)
        assert caught.value.param in settings


def test_a_continued_text_keeps_its_white_space_and_an_answer_does_not(client, server, monkeypatch):
    monkeypatch.setattr(server.engine.tokenizer, "decode", lambda ids: "  x \n" * len(ids))
    for tokens in (1, 3):
        assert continued(client, "a", max_tokens=tokens).choices[0].text == "  x \n" * tokens
        assert complete(client, max_tokens=tokens).choices[0].message.content == ("  x \n" * tokens).strip()
    assert continued(client, "a", stop=["x"]).choices[0].text == "  "


def test_an_adapter_is_asked_under_its_system_prompt_unless_the_request_has_one(client, server, loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(server.engine.model.adapters["legal"], "data", {"system": "Be brief."})
    for given, used in ((None, "Be brief."), ("Be long.", "Be long."), ("", "")):
        system = [] if given is None else [{"role": "system", "content": given}]
        asked = client.chat.completions.create(model="legal", messages=[*system, *QUESTION], max_tokens=8)
        ml.set_adapter(model, "legal")
        talk = [{"role": "system", "content": used}, *QUESTION]
        assert asked.choices[0].message.content == ml.generate(model, tokenizer, talk, max_new_tokens=8)
    ml.set_adapter(model, None)
    plain = complete(client, "base", max_tokens=8).usage.prompt_tokens
    assert plain == len(tokenizer.encode_chat(QUESTION, answer_next=True))


@pytest.fixture
def labels(server, monkeypatch):
    """The adapter legal was trained on labels: its task."""
    task = LabelTask.of(["bill", "billing", "parcel"])
    monkeypatch.setattr(server.engine.model.adapters["legal"], "data", task.entry() | {"system": "Be brief."})
    return task


def test_an_adapter_with_labels_answers_with_one_and_tells_probabilities(client, loaded, labels):
    model, tokenizer = loaded
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": labels.prompt("hello")}]
    ml.set_adapter(model, "legal")
    (p,) = label_probabilities(label_logprobs(model, tokenizer, [talk], labels.labels))
    ml.set_adapter(model, None)
    likeliest = [labels.labels[i] for i in np.argsort(-p)]
    said = complete(client, logprobs=True, top_logprobs=2, temperature=1.5, max_tokens=1).choices[0]
    assert said.message.content == likeliest[0] and said.finish_reason == "stop"
    (told,) = said.logprobs.content
    assert [one.token for one in told.top_logprobs] == likeliest[:2] and bytes(told.bytes).decode() == likeliest[0]
    assert [told.logprob, *(one.logprob for one in told.top_logprobs)] == pytest.approx(
        [np.log(x) for x in np.sort(p)[::-1][[0, 0, 1]]], rel=1e-3
    )
    every = complete(client, logprobs=True, top_logprobs=20).choices[0].logprobs.content[0].top_logprobs
    assert sum(np.exp(one.logprob) for one in every) == pytest.approx(1)
    plain = complete(client).choices[0]
    assert plain.message.content == likeliest[0] and plain.logprobs is None
    as_json = complete(client, response_format={"type": "json_object"}).choices[0].message.content
    assert json.loads(as_json) == {"label": likeliest[0], "probability": pytest.approx(p.max(), rel=1e-3)}
    chunks = list(complete(client, stream=True, logprobs=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == likeliest[0]
    assert [bool(chunk.choices[0].logprobs) for chunk in chunks] == [False, True, False]
    assert chunks[1].choices[0].logprobs.content[0].top_logprobs == [] and chunks[2].choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_models_for_each_token_whole_and_as_a_stream(client, loaded):
    model, tokenizer = loaded
    settings = dict(temperature=1.5, seed=3, max_tokens=12, logprobs=True)
    said = complete(client, "support", top_logprobs=4, **settings).choices[0]
    told = said.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace").strip() == said.message.content
    streams = ml.Streams(model, tokenizer)
    answer = streams.add(QUESTION, "support", 12, temperature=1.5, seed=3)
    while streams.busy:
        streams.step()
    prompt = tokenizer.encode_chat(QUESTION, answer_next=True)
    ml.set_adapter(model, "support")
    logits = model(np.array([prompt + answer.ids])).data[0, len(prompt) - 1 : -1].astype(np.float64)  # (T, V)
    ml.set_adapter(model, None)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert [one.logprob for one in told] == pytest.approx(expected[np.arange(answer.tokens), answer.ids], abs=1e-3)
    for one, row in zip(told, expected, strict=True):
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-3)
    chunks = [chunk.choices[0] for chunk in complete(client, "support", top_logprobs=4, stream=True, **settings)]
    parts = [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content]
    bare = complete(client, "support", **settings).choices[0].logprobs.content
    for other in (parts, bare):
        assert [one.bytes for one in other] == [one.bytes for one in told]
        assert [one.logprob for one in other] == pytest.approx([one.logprob for one in told], abs=1e-3)
    assert [len(one.top_logprobs) for one in (parts[0], bare[0])] == [4, 0]
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported here"):
        continued(client, "a", logprobs=1)


SCHEMA = {"type": "object", "properties": {"item": {"type": ["string", "null"]}, "kind": {"enum": ["new", "old"]}}}


def test_an_adapter_with_fields_answers_with_json_under_its_schema(client, server, loaded, monkeypatch):
    model, tokenizer = loaded
    task = replace(FieldTask.of(SCHEMA), copied=("item",))
    monkeypatch.setattr(server.engine.model.adapters["legal"], "data", task.entry() | {"system": "Be brief."})
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": task.prompt("hello")}]
    ml.set_adapter(model, "legal")
    (expected,) = generate_batch(model, tokenizer, [talk], 64, guides=[guide_of(task, tokenizer, "hello")])
    ml.set_adapter(model, None)
    assert json.loads(expected)["item"] in ("hello", None)
    same = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    for format in ({"type": "text"}, {"type": "json_object"}, same):
        said = complete(client, response_format=format, max_tokens=64).choices[0]
        assert said.message.content == expected and said.finish_reason == "stop"
    other = {"type": "object", "properties": {"z": {"enum": ["y"]}}}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": other}}
    assert complete(client, response_format=format).choices[0].message.content == '{"z":"y"}'
    monkeypatch.setattr("minilora.serve.engine.guide_of", None)  # it is refused before an automaton is built
    for limit, room in ((23, 23), (None, 16)):  # of the request, or of the server
        with pytest.raises(openai.BadRequestError, match=f"may need 24 tokens, one .*, and has {room}") as caught:
            complete(client, max_tokens=limit)
        assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("model", ["base", "support", "legal=0.5 support=0.5"])
def test_any_model_answers_under_the_schema_of_the_request(client, model):
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    said = complete(client, model, response_format=format, temperature=1.5, max_tokens=40).choices[0]
    values = json.loads(said.message.content)
    assert list(values) == ["item", "kind"] and values["kind"] in ("new", "old")


def test_json_that_was_cut_to_fit_its_schema_says_so(client):
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = complete(client, response_format=format, max_tokens=12).choices[0]
    assert isinstance(json.loads(said.message.content)["x"], str) and said.finish_reason == "length"


def test_without_a_temperature_all_answers_are_the_likeliest(client, expected):
    answers = {choice.message.content for choice in complete(client, n=3, max_tokens=12).choices}
    assert answers == {expected("legal", max_new_tokens=12, temperature=0)}


def test_a_class_of_pydantic_is_a_schema(client):
    pydantic = pytest.importorskip("pydantic")

    class Mood(Enum):
        GOOD, BAD = "good", "bad"

    class Found(pydantic.BaseModel):
        mood: Mood | None
        count: int | None = None
        form: Literal["note"]

    talk = [{"role": "user", "content": "hello"}]
    for seed in range(3):
        said = client.beta.chat.completions.parse(  # of every version
            model="base", messages=talk, response_format=Found, temperature=1.5, seed=seed, max_tokens=80
        )
        assert isinstance(said.choices[0].message.parsed, Found)


def test_labels_have_no_schema(client, labels):
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    with pytest.raises(openai.BadRequestError, match="is not for adapters that were trained on labels") as caught:
        complete(client, response_format=format)
    assert caught.value.param == "response_format"


def test_a_label_is_that_of_the_last_message(client, labels):
    def told(*messages):
        answer = client.chat.completions.create(model="legal", messages=list(messages), logprobs=True)
        return answer.choices[0].logprobs.content[0].logprob

    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "parcel"}]
    assert told(*before, *QUESTION) == told(*QUESTION) != told(before[0])
    assert told({"role": "system", "content": "Be long."}, *QUESTION) != told(*QUESTION)
    with pytest.raises(openai.BadRequestError, match="conversation is too long|has 1,?[0-9]+ tokens"):
        client.chat.completions.create(model="legal", messages=[{"role": "user", "content": "x" * 960}], max_tokens=1)


def test_a_label_or_fields_can_be_asked_for_after_any_conversation(client, server, loaded, labels, monkeypatch):
    before = [{"role": "user", "content": "x" * 999}, {"role": "assistant", "content": "y" * 999}]
    for task in (labels, FieldTask.of(SCHEMA)):
        monkeypatch.setattr(server.engine.model.adapters["legal"], "data", task.entry())
        alone = complete(client, max_tokens=64)
        after = client.chat.completions.create(model="legal", messages=[*before, *QUESTION], max_tokens=64)
        assert after.choices[0].message == alone.choices[0].message
        read = len(loaded[1].encode_chat(task.asked(QUESTION), answer_next=True))
        assert alone.usage.prompt_tokens == after.usage.prompt_tokens == read


@pytest.mark.parametrize("data", [LabelTask.of(["a", "b"]), FieldTask.of(SCHEMA)])
@pytest.mark.parametrize("role", ["assistant", "system", "developer"])
def test_what_answers_the_last_message_alone_refuses_one_that_is_not_the_users(client, server, monkeypatch, data, role):
    asked = dict(model="legal", messages=[*QUESTION, {"role": role, "content": "Be brief."}], max_tokens=64)
    monkeypatch.setattr(server.engine.model.adapters["legal"], "data", data.entry())
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's, .* got one of") as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == "messages"
    monkeypatch.setattr(server.engine.model.adapters["legal"], "data", {})
    assert client.chat.completions.create(**asked).usage.completion_tokens  # which reads the whole conversation


def test_a_label_needs_no_room_for_an_answer(client, server, loaded, labels, monkeypatch):
    alone = complete(client)
    assert complete(client, max_tokens=100_000).choices[0].message == alone.choices[0].message
    monkeypatch.setattr(server.engine, "context", alone.usage.prompt_tokens)
    for limit in (None, 1, 100_000):
        assert complete(client, max_tokens=limit).choices[0].message == alone.choices[0].message
    monkeypatch.setattr(server.engine, "context", alone.usage.prompt_tokens - 1)
    with pytest.raises(openai.BadRequestError, match=r"has \d+ tokens; at most \d+ fit|is too long; at most") as caught:
        complete(client, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_json_without_a_schema_is_for_labels_and_fields(client, labels):
    with pytest.raises(openai.BadRequestError, match="json_object.* is for adapters that were trained on la") as caught:
        complete(client, "support", response_format={"type": "json_object"})
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_parameter")
    assert complete(client, "support", logprobs=False, response_format={"type": "text"}, max_tokens=2).choices
    assert continued(client, "a", max_tokens=3).usage.completion_tokens > 0  # a text to continue has no label


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_conversation_longer_than_the_context(client):
    for content in ("x" * 1100, "x" * 900_000):
        with pytest.raises(openai.BadRequestError, match="at most 1,024 fit") as caught:
            client.chat.completions.create(model="legal", messages=[{"role": "user", "content": content}])
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="an answer of up to 1,020"):
        complete(client, max_tokens=1020)


@pytest.mark.parametrize("limit", [None, 1, 7])
def test_the_length_of_an_answer_is_to_blame_only_if_the_conversation_fits_without_it(client, loaded, limit):
    most = 1024 - len(loaded[1].encode_chat([{"role": "user", "content": ""}], answer_next=True))
    for letters, fits in ((most - 9, True), (most, True), (most + 1, False), (3000, False)):
        asked = dict(model="base", messages=[{"role": "user", "content": "x" * letters}])
        with pytest.raises(openai.BadRequestError, match=r"at most 1,024 fit") as caught:
            client.chat.completions.create(**asked, max_tokens=1024 if fits else limit)
        assert ("with an answer of up to" in str(caught.value)) == ("the conversation has" in str(caught.value)) == fits


def test_a_client_with_another_base_url_is_told_the_right_one(server):
    for base in ("", "/api", "/v1/v1"):
        told = [
            json.loads(server.send("POST", f"{base}{path}", {})[2])["error"]["message"]
            for path in ("/chat/completions", "/completions", "/models")
        ]
        assert all("need the base URL /v1" in line and base in line for line in told)


def test_an_answer_has_the_room_that_is_left(client, loaded):
    used = len(loaded[1].encode_chat([{"role": "user", "content": ""}], answer_next=True))
    talk = [{"role": "user", "content": "x" * (1024 - used - 3)}]
    assert client.chat.completions.create(model="base", messages=talk).usage.completion_tokens <= 3


def test_a_conversation_that_cannot_become_tokens(client, server, monkeypatch):
    def count(messages):
        raise ValueError("character '\\x00' is in no token of this model: remove it")

    monkeypatch.setattr(server.engine, "count", count)
    with pytest.raises(openai.BadRequestError, match="is in no token of this model") as caught:
        complete(client)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/../etc/passwd", 404), ("GET", "/v1/chat/completions", 405),
     ("PUT", "/adapters", 405), ("GET", "/v1/models/taxes", 404), ("DELETE", "/adapters/taxes", 404),
     ("DELETE", "/adapters/base", 400)],
)  # fmt: skip
def test_other_addresses_and_methods_have_an_answer_in_the_same_form(server, method, path, status):
    given, headers, body = server.send(method, path)
    assert given == status and json.loads(body)["error"]["type"] == "invalid_request_error"
    assert ("allow" in headers) == (status == 405)


def test_a_full_queue_is_said_with_the_time_to_come_again(shop, monkeypatch):
    with serving(shop, shop, slots=2, waiting=2) as served, served.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(served.engine.streams, "step", lambda: None)
            streams = [complete(client, stream=True, max_tokens=4) for _ in range(4)]
            with pytest.raises(openai.RateLimitError, match="2 answers wait") as caught:
                complete(client)
            assert int(caught.value.response.headers["retry-after"]) == 2  # two turns of two, at about a second each
            assert served.engine.state() == {"running": 2, "waiting": 2}
            assert caught.value.code == "rate_limit_exceeded"
        texts = ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams]
        assert {*texts} == {complete(client, max_tokens=4).choices[0].message.content}


def test_a_fault_of_the_server_tells_no_secrets(shop, monkeypatch):
    with serving(shop, shop) as served, served.client() as client:
        monkeypatch.setattr(served.engine, "count", lambda messages: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="something went wrong here") as caught:
            complete(client)
        assert "division" not in caught.value.response.text
        first = "POST '/v1/chat/completions' failed: ZeroDivisionError: division by zero"
        served.until_said(first)
        monkeypatch.undo()
        monkeypatch.setattr(served.engine.streams, "step", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="could not be computed"):
            complete(client)
        monkeypatch.setattr(served.engine.streams, "step", lambda: 1 / 0)  # the engine has new ones
        with pytest.raises(openai.APIError, match="could not be computed"):
            list(complete(client, stream=True))
        assert served.engine.state() == {"running": 0, "waiting": 0}
        monkeypatch.setattr(served.engine, "_named", lambda of: 1 / 0)  # after a step, while its tokens are handed on
        with pytest.raises(openai.InternalServerError, match="could not be computed"):
            complete(client, logprobs=True)
        served.until_said(first, *["1 answer could not be computed: division by zero"] * 3)
        assert complete(client, max_tokens=1).usage.completion_tokens == 1


# -- what is there -----------------------------------------------------------------------------------------------------


def test_the_page_asks_no_other_host_and_runs_nothing_else(server):
    page, policy = read_page()
    status, headers, body = server.send("GET", "/")
    assert (status, body) == (200, page) and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"] == policy and headers["x-frame-options"] == "DENY"
    assert (
        "default-src 'none'" in policy
        and "frame-ancestors 'none'" in policy
        and "unsafe" not in policy
        and "*" not in policy
    )
    assert not re.search(r"(?:src|href|action)=\"(?!data:)", page) and 'style="' not in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son[a-z]+=\"", page)


def test_models_are_listed_with_their_size(client, loaded):
    found = client.models.list()
    models = {entry.id: entry for entry in found}
    assert list(models) == ["base", "legal", "support"] and found.max_tokens == 16
    assert client.models.retrieve("legal") == models["legal"]
    assert models["legal"].size_bytes == sum(a.nbytes for a in ml.adapter_state(loaded[0], "legal").values())
    assert models["base"].size_bytes > models["legal"].size_bytes
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("taxes")


def test_health(server):
    status, _, body = server.send("GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok", "models": 3, "running": 0, "waiting": 0})


# -- adapters come and go ----------------------------------------------------------------------------------------------


@pytest.fixture
def place(shop, tmp_path):
    """A server with a base and one adapter, started in a folder that has the other one in runs/."""
    shutil.copytree(shop / "support", tmp_path / "here" / "runs" / "support")
    with serving(shop, tmp_path / "here", adapters=["legal"]) as served:
        served.folder = tmp_path / "here"
        yield served
        assert served.said == []


def add(served, name, folder):
    status, _, body = served.send("POST", "/adapters", {"name": name, "folder": str(folder)})
    return status, json.loads(body)


def test_an_adapter_is_added_asked_and_removed(place, expected):
    status, entry = add(place, "shop", "runs/support")
    assert (status, entry["id"], entry["object"]) == (201, "shop", "model")
    with place.client() as client:
        assert complete(client, "shop", max_tokens=8).choices[0].message.content == expected(
            "support", max_new_tokens=8
        )
        assert [model.id for model in client.models.list()] == ["base", "legal", "shop"]
        status, _, body = place.send("DELETE", "/adapters/shop")
        assert (status, json.loads(body)) == (200, {"id": "shop", "object": "model", "deleted": True})
        with pytest.raises(openai.NotFoundError):
            complete(client, "shop")
        answer = complete(client, "legal", max_tokens=8).choices[0].message.content
        assert answer == expected("legal", max_new_tokens=8)
    assert add(place, "shop", place.folder / "runs" / "support")[0] == 201  # a whole path, and the name is free again


@pytest.mark.parametrize("handbook", [None, Handbook([Passage("birds/owl", "An owl says hello.")], "x")])
@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"data": {"name": "x"}},
        {"data": {"name": "x", "context_template": TEMPLATE}},
    ],
    ids=str,
)
def test_an_adapter_that_is_added_has_the_notices_of_the_command_line(place, handbook, notes, monkeypatch, caplog):
    monkeypatch.setattr(place.app, "handbook", handbook)
    others = {"name": "x"} if handbook else {"context_template": TEMPLATE}  # a notice of its own, which is not repeated
    monkeypatch.setattr(place.engine.model.adapters["legal"], "data", others)
    file = place.folder / "runs" / "support" / "minilora.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | notes))
    caplog.set_level("INFO", "minilora")
    status, entry = add(place, "shop", "runs/support")
    said = caplog.messages[:]
    model, _ = load_with_adapters({"shop": file.parent}, place.engine.model.source)
    expected = without_passages(model, handbook)
    assert status == 201 and said == expected and entry["note"] == ("; ".join(expected) or None)
    assert json.loads(place.send("GET", "/v1/models/shop")[2])["note"] == entry["note"]
    assert bool(expected) == ("data" in notes and (set(notes["data"]) == {"name"}) == bool(handbook))


def test_an_adapter_named_as_on_the_hub_is_described_and_removed(place):
    place.engine.call(lambda: place.engine.add_adapter("org/shop", place.folder / "runs" / "support")).result(30)
    for method, path in (("GET", "/v1/models/org/shop"), ("DELETE", "/adapters/org/shop")):
        status, _, body = place.send(method, path)
        assert (status, json.loads(body)["id"]) == (200, "org/shop")


@pytest.mark.parametrize("name", ["", "a.b", "a=b", "a b", "../x", "x" * 65, 5, None])
def test_a_name_that_is_none(server, name):
    status, _, body = server.send("POST", "/adapters", {"name": name, "folder": "runs/support"})
    assert status == 400 and json.loads(body)["error"]["param"] == "name"


def test_an_adapter_of_another_base(place, loaded):
    config, tokenizer = loaded[0].config, loaded[1]
    other = ml.Llama(config, np.random.default_rng(9))
    save_folder(place.folder / "other", config, other.state_dict(), tokenizer)
    model, _ = ml.load(place.folder / "other")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4), name="x")
    ml.save_adapter(model, place.folder / "stranger", name="x")
    status, body = add(place, "stranger", "stranger")
    error = body["error"]
    hashes = [ml.sha256_of(ml.base_state(one)) for one in (model, place.engine.model)]
    assert status == 400 and error["param"] == "folder" and all(digest[:12] in error["message"] for digest in hashes)
    assert str(place.folder) not in error["message"] and list(place.engine.versions) == ["base", "legal"]


ONE_FIELD = {"type": "object", "properties": {"kind": {"enum": ["new", "old"]}}}
NOTES = [
    {"context_template": "x"}, {"labels": 5}, {"schema": ONE_FIELD, "template": "{text}", "copied": [["kind"]]},
]  # fmt: skip


@pytest.mark.parametrize("data", NOTES, ids=str)
def test_an_adapter_whose_notes_are_wrong_leaves_nothing_behind(place, data):
    file = place.folder / "runs" / "support" / "minilora.json"
    right = file.read_text()
    file.write_text(json.dumps(json.loads(right) | {"data": data}))
    assert add(place, "shop", "runs/support")[0] == 400
    assert list(place.engine.versions) == ["base", "legal"] and list(place.engine.model.adapters) == ["legal"]
    file.write_text(right)
    assert add(place, "shop", "runs/support")[0] == 201


def test_an_adapter_with_which_anything_goes_wrong_leaves_nothing_behind(place, monkeypatch):
    monkeypatch.setattr(engine_module, "without_passages", lambda *given: {}[0])
    with pytest.raises(KeyError):
        place.engine.call(lambda: place.engine.add_adapter("shop", place.folder / "runs" / "support")).result(10)
    assert list(place.engine.versions) == ["base", "legal"] and list(place.engine.model.adapters) == ["legal"]


ELSEWHERE = ["..", "../../etc", "/etc", "/", "runs/../../x", "link", "linked"]


@pytest.mark.parametrize("folder", [*ELSEWHERE, "~root", "runs/\0"])
def test_a_folder_that_lies_elsewhere(shop, tmp_path, folder):
    link(tmp_path / "link", shop / "support")
    shutil.copytree(shop / "support", tmp_path / "linked")
    weights = "adapter_model.safetensors"
    (tmp_path / "linked" / weights).unlink()
    (tmp_path / "linked" / weights).symlink_to(shop / "support" / weights)
    with pytest.raises(ApiError) as caught:
        App(None, tmp_path).below(folder)
    assert caught.value.param == "folder" and caught.value.status == (403 if folder in ELSEWHERE else 400)


def test_a_folder_without_an_adapter_or_with_a_broken_one(place):
    (place.folder / "empty").mkdir()
    file = place.folder / "runs" / "support" / "adapter_model.safetensors"
    os.truncate(file, 50)
    for folder in ("empty", "nowhere", "runs/support", "", 5, ".."):
        status, _, body = place.send("POST", "/adapters", {"name": "x", "folder": folder})
        assert status == (403 if folder == ".." else 400) and json.loads(body)["error"]["param"] == "folder"
    assert list(place.engine.versions) == ["base", "legal"]
