"""What is wrong with an answer, whatever was asked: errors are held against docs/spec/server.md, everything else against the types of the
official SDKs and the order that `bodies` reads streams in."""
import json

import anthropic.types, openai.types, openai.types.chat, openai.types.responses
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from pydantic import TypeAdapter, ValidationError

import bodies

WHOLE = {"chat": openai.types.chat.ChatCompletion, "completions": openai.types.Completion, "responses": openai.types.responses.Response,
         "messages": anthropic.types.Message}
EVENTS = {"chat": openai.types.chat.ChatCompletionChunk, "completions": openai.types.Completion,
          "responses": openai.types.responses.ResponseStreamEvent, "messages": anthropic.types.RawMessageStreamEvent}
COUNTS = {"/v1/messages/count_tokens": anthropic.types.MessageTokensCount, "/v1/responses/input_tokens": InputTokenCountResponse}
WHOLE, EVENTS, COUNTS = ({name: TypeAdapter(kind) for name, kind in kinds.items()} for kinds in (WHOLE, EVENTS, COUNTS))
APIS = {path: api for api, path in bodies.PLACES.items()}


def error_fault(path, body):
    """What is wrong with the body of a 400."""
    try:
        whole = json.loads(body)
        error = whole["error"]
        assert isinstance(error["message"], str) and error["message"], "no message"
        assert error["type"] == "invalid_request_error", "another type"
        expected, around = {"message", "type"}, {"error"}
        if path.startswith("/v1/messages"):
            around |= {"type"}
            assert whole["type"] == "error", "another outer type"
        else:
            expected |= {"param", "code"}
            assert all(error[name] is None or error[name] and isinstance(error[name], str) for name in ("param", "code")), "no name and no null"
        # A prompt that is too long is told with its length.
        lengths = error.keys() & {"n_prompt_tokens", "n_ctx"}
        assert set(whole) == around and error.keys() - lengths == expected and len(lengths) in (0, 2), "other keys"
        assert all(type(error[name]) is int for name in lengths), "a length that is no number"
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as fault:
        return f"{type(fault).__name__} {fault}: {body[:300]!r}"
    return None


def answer_fault(path, kind, body):
    """What is wrong with the body of a 200 of the content type `kind`."""
    try:
        if path in COUNTS:
            assert kind == "application/json", f"content type {kind}"
            COUNTS[path].validate_json(body)
            return None
        api, is_stream = APIS[path], kind == "text/event-stream"
        assert is_stream or kind == "application/json", f"content type {kind}"
        bodies.read_any(api, is_stream, body)
        if not is_stream:
            WHOLE[api].validate_json(body)
            return None
        for name, event in bodies.frames(body):
            if name != "ping" and event is not None:
                EVENTS[api].validate_python(filled(event) if api == "completions" else event)
    except (ValidationError, bodies.WrongBody, AssertionError) as fault:
        return f"{type(fault).__name__} {fault}: {body[:300]!r}"
    return None


def filled(event):
    """A part of a text completion with a reason to have ended: the SDK has one type for parts and wholes, which does not know of null."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event["choices"]]
    return event | {"choices": choices}
