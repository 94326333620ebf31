"""What a request may say, and what is answered to one that may not."""

import json
import math

import pytest

from minilora.data.formats import text_of
from minilora.serve.protocol import _ONLY, ApiError, Piece, Reply, Version, event, read_json_object, read_request

NAMES = ["base", "legal", "support"]
HELLO = [{"role": "user", "content": "hello"}]


def understood(**fields):
    return read_request({"model": "legal", "messages": HELLO} | fields, NAMES)


def refused(**fields):
    with pytest.raises(ApiError) as caught:
        understood(**fields)
    return caught.value


def test_a_request_with_everything():
    request = understood(
        temperature=0.5, top_p=0.9, max_tokens=7, stop=["a", "b"], seed=3, stream=True, user="me",
        stream_options={"include_usage": True}, n=1, tools=[], response_format={"type": "text"},
    )  # fmt: skip
    assert (request.model, request.choice, request.messages) == ("legal", "legal", HELLO)
    assert (request.temperature, request.top_p, request.limit, request.seed) == (0.5, 0.9, 7, 3)
    assert (request.stop, request.stream, request.usage, request.usage_always) == (("a", "b"), True, True, False)


def test_what_is_not_said_has_defaults_and_null_is_not_saying_it():
    for request in (understood(), understood(temperature=None, stop=None, seed=None, max_tokens=None, stream=None)):
        assert (request.temperature, request.top_p, request.limit, request.stop) == (0.0, 1.0, None, ())
        assert not request.stream and not request.usage


def test_what_some_values_mean():
    assert understood().seed != understood().seed  # none given: each its own
    assert understood(seed=-1).seed == 2**64 - 1
    assert understood(max_tokens=3, max_completion_tokens=5).limit == 5  # the newer name goes first
    assert 0 < understood(top_p=0).top_p < 1e-6  # takes the likeliest
    assert understood(top_logprobs=0).top_logprobs is None and understood(logprobs=True).top_logprobs == 0


def test_roles_and_parts():
    request = understood(
        messages=[
            {"role": "developer", "content": "be\r\nbrief"},  # as in an e-mail; trained on as below
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
    )
    assert request.messages == [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("model", "choice"),
    [("base", None), ("legal", "legal"), ("legal=0.7 support=0.3", {"legal": 0.7, "support": 0.3}),
     ("legal=0.7,support=-1", {"legal": 0.7, "support": -1.0})],
)  # fmt: skip
def test_who_answers(model, choice):
    assert understood(model=model).choice == choice


def with_schema(schema):
    """The field that asks for an answer under this schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hello"}, "messages", "must be a list"),
        ({"messages": [5]}, "messages[0]", "an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "one of system, developer, user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got a number"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}, {"type": "image_url"}]}]},
            "messages[0].content",
            "type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0].content", "the question is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "half a character"),
        ({"model": 5}, "model", "must be a text"),
        ({"model": ""}, "model", "got an empty one"),
        ({"model": "\udfff"}, "model", "half a character"),
        ({"model": "legal=x"}, "model", "expected NAME=FACTOR"),
        ({"model": "legal=1 legal=2"}, "model", "each name once"),
        ({"model": "=" * 99_999}, "model", "===="),
        ({"temperature": "hot"}, "temperature", "a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature", "got 2.1"),
        ({"temperature": float("nan")}, "temperature", "from 0 to 2"),
        ({"temperature": True}, "temperature", "from 0 to 2"),
        ({"top_p": 1.5}, "top_p", "from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "a number from 0.1 to 2"),
        ({"max_tokens": 0}, "max_tokens", "a whole number from 1 on"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "a whole number"),
        ({"seed": 0.5}, "seed", "must be a whole number, got"),
        ({"stop": ""}, "stop", "each of 1 to 200"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": [1]}, "stop", "must be a text"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "means nothing without stream"),
        ({"stream": True, "stream_options": []}, "stream_options", "must be an object"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
        ({"n": 17}, "n", "n must be a whole number from 1 to 16, got 17"),
        ({"n": "2"}, "n", "n must be a whole number from 1 to 16, got '2'"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "means nothing without"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs", '"logprobs": true'),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "a whole number from 0 to 20"),
        ({"response_format": {"type": "json_schema"}}, "response_format", '"json_schema": {"schema": {...}}}'),
        (with_schema({"$ref": "x"}), "response_format", "response_format: '$ref' is not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "that of an object"),
        (with_schema({"properties": {"a": "x" * 65_536}}), "response_format", "a schema of at most 65,536 characters"),
        (
            with_schema({"properties": {f"{i}": {"type": "string", "pattern": "^[ -~]{999}$"} for i in range(40)}}),
            "response_format",
            "response_format: the schema is too large",
        ),
        ({"temprature": 0.5}, "temprature", "did you mean temperature?"),
        ({"x" * 99_999: 1}, "x" * 77 + "...", "unknown field 'xxx"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, *HELLO]},
            "messages[0].tool_calls",
            "messages[0].tool_calls is not supported here",
        ),
    ],
)
def test_what_means_nothing_is_refused_with_the_name_of_the_field(fields, param, said):
    error = refused(**fields)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert said in str(error)
    assert len(error.body()["error"]["message"]) <= 1000


CHANGES = {  # a value of each field that changes OpenAI's answers, and not ours
    "tools": [{}], "tool_choice": "required", "functions": [{}], "function_call": {"name": "f"},
    "logit_bias": {"5": 1}, "frequency_penalty": 0.5, "presence_penalty": 0.5, "modalities": ["text", "audio"],
    "audio": {}, "prediction": {}, "web_search_options": {}, "reasoning_effort": "low", "verbosity": "low",
    "best_of": 2, "echo": True, "suffix": "x",
}  # fmt: skip


def test_a_field_that_would_change_the_answer_is_refused():
    assert CHANGES.keys() == _ONLY.keys()
    for name, value in CHANGES.items():
        error = refused(**{name: value})
        assert (error.code, error.param) == ("unsupported_parameter", name) and f"{name} is not supported" in str(error)
    with pytest.raises(ApiError, match="logprobs is not supported"):  # whose form is another one there
        read_request({"model": "base", "prompt": "x", "logprobs": True}, NAMES, chat=False)


def test_a_client_may_send_back_a_whole_message_of_ours():
    ours = Reply(understood(), 9).whole([Piece("hi", 1, "stop")])["choices"][0]["message"]
    ours |= {"tool_calls": None, "function_call": None, "audio": None, "annotations": []}  # as its own client has it
    assert understood(messages=[*HELLO, ours, *HELLO]).messages[1] == {"role": "assistant", "content": "hi"}


def test_a_model_must_be_named():
    with pytest.raises(ApiError, match="model is missing: one of base, legal, support"):
        read_request({"messages": HELLO}, NAMES)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [(None, "got nothing"), (5, "got a number"), ([5], "got a number"), ([], "got 0"), ([1, 2], "got 2")],
)
def test_what_is_continued_is_one_text(prompt, said):
    with pytest.raises(ApiError, match=f"^prompt must be .*, {said}") as caught:
        read_request({"model": "base", "prompt": prompt}, NAMES, chat=False)
    assert caught.value.param == "prompt"
    with pytest.raises(ApiError, match=r"unknown field 'promt' \(did you mean prompt\?\)"):
        read_request({"model": "base", "promt": prompt or "x"}, NAMES, chat=False)


def test_a_text_to_continue_is_read_as_messages_and_data_are():
    for text in ("a\r\nb\r\n", "a\n\rb", "\r"):
        (message,) = understood(messages=[{"role": "user", "content": f"x{text}"}]).messages
        fields = {"model": "base", "prompt": f"x{text}"}
        assert read_request(fields, NAMES, chat=False).messages == message["content"] == text_of(fields, "prompt")


@pytest.mark.parametrize(("model", "hint"), [("legel", "did you mean legal"), ("x", "there is: base"), ("x" * 999, "")])
def test_a_model_that_is_not_there_is_not_found(model, hint):
    error = refused(model=model)
    assert (error.status, error.code) == (404, "model_not_found")
    assert hint in str(error) and len(str(error)) < 200


def test_the_base_is_no_part_of_a_mix():
    for model in ("legal=1 base=1", "legal=1 taxes=1"):
        error = refused(model=model)
        assert error.status == 404 and "(there is: legal, support)" in str(error)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"model": "legal"', "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "got a list"),
        (b'"hello"', "got a text"),
        (b"null", "got nothing"),
    ],
)
def test_a_body_that_is_no_json_object(body, said):
    with pytest.raises(ApiError, match=said) as caught:
        read_json_object(body)
    assert caught.value.status == 400


def test_an_error_is_one_line_in_openais_form():
    body = ApiError(400, "one\ntwo", "seed", "code").body()
    assert body == {"error": {"message": "one two", "type": "invalid_request_error", "param": "seed", "code": "code"}}
    assert ApiError(429, "").kind == "rate_limit_error" and ApiError(500, "").kind == "server_error"


def test_chunks_of_one_answer_belong_together_and_count_as_asked():
    reply = Reply(understood(stream=True, stream_options={"include_usage": True}), 9)
    chunks = [*reply.begin(), *reply.chunks(Piece("a", 1)), *reply.chunks(Piece("", 2, "stop", cached=7))]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert [chunk["usage"] for chunk in chunks[:3]] == [None] * 3 and chunks[3]["choices"] == []
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    assert chunks[3]["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 7}}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:3]] == [None, None, "stop"]
    assert not {"usage", "seconds"} & Reply(understood(stream=True), 9).begin()[0].keys()
    always = Reply(understood(stream=True, stream_options={"continuous_usage_stats": True}), 9)
    (chunk,) = always.chunks(Piece("a", 4, seconds=1.23456))
    assert chunk["usage"]["completion_tokens"] == 4 and chunk["seconds"] == 1.2346  # the clock of who computed it


def test_a_token_that_is_impossible_has_a_probability_that_json_can_hold():
    (chunk,) = Reply(understood(stream=True, logprobs=True, top_logprobs=1), 9).chunks(
        Piece("a", 1, logprobs=[((b"a", -math.inf), [(b"b", 0.0)])])
    )
    told = json.loads(json.dumps(chunk, allow_nan=False))["choices"][0]["logprobs"]["content"][0]
    assert told["logprob"] == -9999.0 and told["top_logprobs"][0]["logprob"] == 0.0


def test_an_event_is_one_line_of_ascii():
    line = event({"text": "ä\n\n"})
    assert line.isascii() and line.endswith(b"\n\n") and line.count(b"\n") == 2
    assert json.loads(line.removeprefix(b"data: ")) == {"text": "ä\n\n"} and event("[DONE]") == b"data: [DONE]\n\n"


def test_a_model_has_what_clients_read_and_its_size():
    entry = Version("legal", 10, "Be brief.", created=5).entry()
    openai = {"id": "legal", "object": "model", "created": 5, "owned_by": "minilora"}
    assert entry == openai | {"size_bytes": 10, "system": "Be brief.", "note": None, "labels": None, "schema": None}
    assert Version("routing", 10, labels=("a", "b")).entry()["labels"] == ("a", "b")
