"""What is wrong with an answer, whatever was asked: errors are held against docs/spec/server.md, everything else against the types of the
official SDKs and the order that `bodies` reads streams in."""
import json, sys
from typing import get_args

import anthropic.types, openai.types, openai.types.chat, openai.types.responses
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from pydantic import TypeAdapter, ValidationError

import bodies


def by_type(union):
    """The members of one of the SDKs' unions by the value of their field `type`."""
    members = get_args(get_args(union)[0])
    return {name: TypeAdapter(member) for member in members for name in get_args(member.model_fields["type"].annotation)}


WHOLE = {"chat": TypeAdapter(openai.types.chat.ChatCompletion), "completions": TypeAdapter(openai.types.Completion),
         "responses": TypeAdapter(openai.types.responses.Response), "messages": TypeAdapter(anthropic.types.Message)}
CHUNK = TypeAdapter(openai.types.chat.ChatCompletionChunk)
EVENTS = {"responses": by_type(openai.types.responses.ResponseStreamEvent), "messages": by_type(anthropic.types.RawMessageStreamEvent)}
COUNTS = {"/v1/messages/count_tokens": TypeAdapter(anthropic.types.MessageTokensCount),
          "/v1/responses/input_tokens": TypeAdapter(InputTokenCountResponse)}
# Schemas are repeated as they came, with numbers of thousands of digits.
sys.set_int_max_str_digits(0)
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
            COUNTS[path].validate_python(json.loads(body))
            return None
        api, is_stream = APIS[path], kind == "text/event-stream"
        assert is_stream or kind == "application/json", f"content type {kind}"
        bodies.read_any(api, is_stream, body)
        if not is_stream:
            WHOLE[api].validate_python(json.loads(body))
            return None
        for name, event in bodies.frames(body):
            if name != "ping" and event is not None:
                check_event(api, name, event)
    except ValidationError as fault:
        first = fault.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{fault.error_count()} faults by {fault.title}, the first at {place}: {first['msg']}: {body[:300]!r}"
    except (bodies.WrongBody, ValueError, AssertionError) as fault:
        return f"{type(fault).__name__} {fault}: {body[:300]!r}"
    return None


def check_event(api, name, event):
    if api == "chat":
        CHUNK.validate_python(event)
    elif api == "completions":
        WHOLE[api].validate_python(filled(event))
    else:
        assert event.get("type") == name and name in EVENTS[api], f"the event {name} of the type {event.get('type')}"
        EVENTS[api][name].validate_python(event)


def filled(event):
    """A part of a text completion with a reason to have ended: the SDK has one type for parts and wholes, which does not know of null."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event["choices"]]
    return event | {"choices": choices}
