"""What `/openapi.json` says of each route: summary, body, reply, headers. The replies' schemas name what a client may
rely on, and tests hold them against real replies.
"""

from typing import Any

import msgspec

from clawloop_edge.gateway.body import Json
from clawloop_edge.gateway.chat_request import ChatBody, Message, Tool
from clawloop_edge.gateway.completions import CompletionBody
from clawloop_edge.gateway.curation import CurateBody
from clawloop_edge.gateway.errors import Shape
from clawloop_edge.gateway.feedback import FeedbackBody
from clawloop_edge.gateway.messages_request import CountBody, MessagesBody
from clawloop_edge.gateway.openapi import Doc, Docs, Part
from clawloop_edge.gateway.responses_input import FunctionCall, FunctionOutput, InputMessage, ReasoningItem
from clawloop_edge.gateway.responses_request import FunctionTool, ResponsesBody
from clawloop_edge.gateway.reward import RewardBody
from clawloop_edge.gateway.trajectories import CompleteBody, RegisterBody
from clawloop_edge.gateway.whitebox import GenerateBody, StepPayload, SubmitBody
from clawloop_edge.pool.curation import TAG_PATTERN

_TEXT: Json = {"type": "string"}
_NAME: Json = {"type": "string", "minLength": 1}
_COUNT: Json = {"type": "integer", "minimum": 0}
_BOOL: Json = {"type": "boolean"}
_ANY: Json = {}


def _object(**properties: Any) -> Json:
    """An object that has these, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*values: Any) -> Json:
    return {"enum": list(values)}


_PRINTABLE = {"type": "string", "pattern": r"^[\x21-\x7e]([\x20-\x7e]{0,198}[\x21-\x7e])?$"}
_HEADERS: dict[str, Json] = {
    "X-Clawloop-Session": _PRINTABLE,
    "X-Clawloop-Channel": _one_of("train", "val"),
    "X-Clawloop-Incognito": _one_of("0", "1", "false", "true"),
    "traceparent": _TEXT,
    "session_id": _TEXT,
    "x-session-affinity": _TEXT,
}
_RETRY_KEY: Json = {"Idempotency-Key": {"type": "string", "pattern": r"^[\x20-\x7e]{1,200}$"}}
_RETRIED = {**_HEADERS, **_RETRY_KEY}
_CALL_STATUSES = (404, 500, 503)
_CALL: dict[str, Any] = {"streams": True, "headers": _RETRIED, "statuses": _CALL_STATUSES}

_FINISH = _one_of("stop", "length", "tool_calls")
_TOOL_CALL = _object(id=_NAME, type=_one_of("function"), function=_object(name=_NAME, arguments=_TEXT))
_ENTRY = _object(token=_TEXT, logprob={"type": "number"}, top_logprobs=_list(_ANY))
_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_CHAT_MESSAGE = _object(role=_one_of("assistant"), content=_or_null(_TEXT), refusal={"type": "null"})
_CHAT_MESSAGE["properties"] |= {"reasoning_content": _TEXT, "tool_calls": _list(_TOOL_CALL)}
_CHAT = _object(
    id=_NAME,
    object=_one_of("chat.completion"),
    created=_COUNT,
    model=_NAME,
    choices=_list(
        _object(
            index=_COUNT,
            message=_CHAT_MESSAGE,
            logprobs=_or_null(_object(content=_list(_ENTRY))),
            finish_reason=_FINISH,
        )
    ),
    usage=_USAGE,
)
_COMPLETION = _object(
    id=_NAME,
    object=_one_of("text_completion"),
    created=_COUNT,
    model=_NAME,
    choices=_list(
        _object(
            index=_COUNT,
            text=_TEXT,
            logprobs=_or_null(
                _object(
                    tokens=_list(_TEXT),
                    token_logprobs=_list({"type": "number"}),
                    top_logprobs=_ANY,
                    text_offset=_list(_COUNT),
                )
            ),
            finish_reason=_one_of("stop", "length"),
        )
    ),
    usage=_USAGE,
)
_OUTPUT = {
    "anyOf": [
        _object(
            id=_NAME,
            type=_one_of("message"),
            status=_one_of("completed", "incomplete"),
            role=_one_of("assistant"),
            content=_list(_object(type=_one_of("output_text"), text=_TEXT, annotations=_list(_ANY))),
        ),
        _object(id=_NAME, type=_one_of("reasoning"), summary=_list(_ANY), content=_list(_object(text=_TEXT))),
        _object(id=_NAME, type=_one_of("function_call"), call_id=_NAME, name=_NAME, arguments=_TEXT),
    ]
}
_RESPONSE = _object(
    id=_NAME,
    object=_one_of("response"),
    created_at=_COUNT,
    model=_NAME,
    status=_one_of("completed", "incomplete"),
    error={"type": "null"},
    incomplete_details=_or_null(_object(reason=_one_of("max_output_tokens"))),
    output=_list(_OUTPUT),
    parallel_tool_calls=_BOOL,
    tool_choice=_ANY,
    tools=_list({"type": "object"}),
    usage=_object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
)
_BLOCK = {
    "anyOf": [
        _object(type=_one_of("text"), text=_TEXT),
        _object(type=_one_of("thinking"), thinking=_TEXT, signature=_NAME),
        _object(type=_one_of("tool_use"), id=_NAME, name=_NAME, input={"type": "object"}),
    ]
}
_ANTHROPIC_MESSAGE = _object(
    id=_NAME,
    type=_one_of("message"),
    role=_one_of("assistant"),
    model=_NAME,
    content=_list(_BLOCK),
    stop_reason=_one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
    stop_sequence=_or_null(_TEXT),
    usage=_object(
        input_tokens=_COUNT,
        output_tokens=_COUNT,
        cache_creation_input_tokens=_COUNT,
        cache_read_input_tokens=_COUNT,
    ),
)
_MODEL = _object(id=_NAME, object=_one_of("model"), created=_COUNT, owned_by=_NAME)
_READY = _object(status=_NAME, in_flight=_COUNT, versions=_list(_COUNT), detail=_TEXT)
_OK = _object(status=_one_of("ok"))
_IDS = _list(_COUNT)

_NO_CALLS = _one_of(None, [])
_CONTENT = {"type": ["string", "array"]}


def _message_rules(*tool_fields: str) -> Json:
    """Which fields a message needs and may have, by its role."""
    asked = {"content": _CONTENT, "tool_calls": _NO_CALLS}
    tool = {**asked, "role": _one_of("tool"), **{name: _TEXT for name in tool_fields}}
    return {
        "anyOf": [
            {"properties": {"role": _one_of("assistant")}},
            {
                "properties": {**asked, "role": _one_of("system", "developer", "user")},
                "required": ["content"],
            },
            {"properties": tool, "required": ["content", *tool_fields]},
        ]
    }


_SCHEMA = _object(schema={"type": "object"})


def _format_rules(needed: Json) -> Json:
    """A format that asks for a schema needs to have it; `needed` is what has it."""
    return {"anyOf": [_one_of(None), {"properties": {"type": _one_of("text", "json_object")}}, needed]}


_NAMED_TOOL = _object(type=_one_of("function"), name=_TEXT)
_ALLOWED_TOOLS = _object(
    type=_one_of("allowed_tools"),
    mode=_one_of("auto", "required"),
    tools={**_list(_NAMED_TOOL), "minItems": 1},
)
_RESPONSES_RULES: Json = {
    "properties": {
        "input": {"type": ["string", "array"], "minItems": 1},
        "text": {"properties": {"format": _format_rules(_SCHEMA)}},
        "tool_choice": {"anyOf": [{"type": ["string", "null"]}, _NAMED_TOOL, _ALLOWED_TOOLS]},
    },
    "required": ["input"],
}
_STEP_RULES: Json = {
    "properties": {"trajectory_uid": {"minLength": 1, "maxLength": 200}, "prompt_uid": {"maxLength": 200}},
    "required": ["trajectory_uid"],
}
_TARGETS = ("step_id", "trace_id", "session_id", "trajectory_id")


def _one_target(names: tuple[str, ...]) -> Json:
    """Exactly one of these fields is text."""
    return {"oneOf": [{"properties": {name: _TEXT}, "required": [name]} for name in names]}


_TAG: Json = {"type": "string", "pattern": TAG_PATTERN}
_REWARD: Json = {"type": "number", "minimum": -1, "maximum": 1}
_TIME: Json = {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}
_PAGED: dict[str, Json] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "before": {"type": "integer", "minimum": 1, "maximum": 2**62 - 1},
}
_PICKED: dict[str, Json] = {
    "session_id": {"type": "string", "minLength": 1, "maxLength": 200},
    "app": {"type": "string", "maxLength": 200},
    "channel": _one_of("train", "val"),
    "since_ms": _TIME,
    "until_ms": _TIME,
    "tag": _TAG,
    "quality_min": {"type": "integer", "minimum": 0, "maximum": 5},
    "trainable": _one_of("yes", "no"),
    "signal": _one_of("yes", "no"),
    "source": {"type": "string", "maxLength": 64},
    "reward_min": _REWARD,
    "reward_max": _REWARD,
    **_PAGED,
}
_SEEN = _object(
    step_id=_NAME,
    session_id=_NAME,
    run_id=_TEXT,
    trainable=_BOOL,
    untrainable=_TEXT,
    channel=_one_of("train", "val"),
    at_ms=_COUNT,
    curation=_object(trainable=_or_null(_BOOL), quality=_or_null(_COUNT), tags=_list(_TEXT), note=_TEXT),
    reward=_or_null(_object(value=_REWARD, weight={"type": "number"})),
    signals=_list(_object(signal_id=_NAME, source=_TEXT, value=_REWARD)),
)
_REVIEWED = {**_SEEN, "properties": {**_SEEN["properties"], "why": _list(_NAME), "question": _TEXT, "answer": _TEXT}}
# A word says something, beside what it is said of.
_SAYS: Json = {
    "anyOf": [
        {"properties": {"trainable": _BOOL}, "required": ["trainable"]},
        {"properties": {"quality": {"type": "integer"}}, "required": ["quality"]},
        {"properties": {"note": _TEXT}, "required": ["note"]},
        {"properties": {"tags": {"minItems": 1}}, "required": ["tags"]},
        {"properties": {"untags": {"minItems": 1}}, "required": ["untags"]},
    ]
}


def _chat(summary: str, *tool_fields: str, **more: Any) -> Doc:
    return Doc(
        summary=summary,
        body=ChatBody,
        parts={"messages": Part((Message,), _message_rules(*tool_fields)), "tools": Part((Tool,))},
        rules={"allOf": [{"properties": {"response_format": _format_rules(_object(json_schema=_SCHEMA))}}]},
        reply=_CHAT,
        **_CALL,
        **more,
    )


_CALLS = {
    "chat/completions": _chat("OpenAI's chat completions", "tool_call_id"),
    "completions": Doc(
        summary="OpenAI's legacy completions: text or token ids, continued",
        body=CompletionBody,
        reply=_COMPLETION,
        **_CALL,
    ),
    "messages": Doc(
        summary="Anthropic's messages",
        body=MessagesBody,
        reply=_ANTHROPIC_MESSAGE,
        **_CALL,
        shape=Shape.ANTHROPIC,
    ),
    "responses": Doc(
        summary="OpenAI's Responses; nothing is kept to be fetched",
        body=ResponsesBody,
        parts={
            "input": Part((InputMessage, FunctionCall, FunctionOutput, ReasoningItem)),
            "tools": Part((FunctionTool,)),
        },
        rules={"allOf": [_RESPONSES_RULES]},
        reply=_RESPONSE,
        **_CALL,
    ),
}
_KEYED: dict[str, Any] = {"keyed": True, "shape": Shape.CLAW_R1}
_DONE = _object(status=_one_of("ok"), steps=_COUNT, reward=_or_null({"type": "number"}), channel=_NAME)
_REGISTER: dict[str, Any] = {"body": RegisterBody, "reply": _OK, "statuses": (404, 409), **_KEYED}
_COMPLETE: dict[str, Any] = {
    "body": CompleteBody,
    "optional_body": True,
    "reply": _DONE,
    "statuses": (404,),
    **_KEYED,
}
_T = "/{trajectory}/{group}"
_STATUS = _object(
    level=_NAME,
    level_reason=_TEXT,
    model_line=_TEXT,
    adapter_version=_COUNT,
    adapter_log=_TEXT,
    engine_alive=_BOOL,
    calls_in_flight=_COUNT,
    versions_loaded=_list(_COUNT),
    sessions=_COUNT,
    steps=_COUNT,
    encryption=_TEXT,
    trainable=_COUNT,
    signals=_COUNT,
    scorers={"type": "object", "additionalProperties": {"type": "object"}},
    refused_by_pool=_COUNT,
    keeps_nothing=_TEXT,
    not_kept=_COUNT,
    learning={"type": "object", "additionalProperties": True},
    outbox_waiting=_COUNT,
    outbox_unacknowledged=_COUNT,
    left_out={"type": "object", "additionalProperties": _COUNT},
    deletions_waiting=_COUNT,
    redaction=_TEXT,
    sent_items=_COUNT,
    sent_bytes=_COUNT,
    server=_TEXT,
    server_state=_TEXT,
    server_detail=_TEXT,
    goodbyes_waiting=_COUNT,
    rewards=_object(
        sources={"type": "object", "additionalProperties": _ANY}, agreement=_list(_ANY), warnings=_list(_TEXT)
    ),
)


def _on_trajectory(name: str, doc: Doc) -> Doc:
    """An API's call on a trajectory's URL."""
    if name == "chat/completions":
        doc = _chat(doc.summary)  # a tool message need not say which call it answers
    summary = f"{doc.summary}, as a step of a trajectory"
    shape = Shape.ANTHROPIC if doc.shape is Shape.ANTHROPIC else Shape.CLAW_R1
    return msgspec.structs.replace(doc, summary=summary, keyed=True, shape=shape)


_HEALTH = Doc(summary="whether the process is up", reply=_OK, open=True)
_READINESS = Doc(summary="whether calls are answered", reply=_READY, statuses=(503,), open=True)
DOCS: Docs = {
    **{("POST", f"/v1/{name}"): doc for name, doc in _CALLS.items()},
    ("POST", "/v1/messages/count_tokens"): Doc(
        summary="how many tokens the prompt of a call to Anthropic's messages has",
        body=CountBody,
        reply=_object(input_tokens=_COUNT),
        headers=_HEADERS,
        statuses=_CALL_STATUSES,
        shape=Shape.ANTHROPIC,
    ),
    ("POST", "/v1/feedback"): Doc(
        summary="judge a step, a run, a session or a trajectory",
        body=FeedbackBody,
        headers=_RETRY_KEY,
        rules={"allOf": [_one_target(_TARGETS)]},
        reply=_object(signal_id=_NAME, target=_NAME, target_id=_NAME, value={"type": "number"}, stored=_one_of(True)),
        statuses=(404, 503),
    ),
    ("GET", "/v1/steps"): Doc(
        summary="steps that are kept, latest first: what is known of them, and what their owner said",
        query=_PICKED,
        reply=_object(steps=_list(_SEEN), next=_or_null(_COUNT)),
        statuses=(400, 503),
    ),
    ("GET", "/v1/review"): Doc(
        summary="what most needs a person's word, latest first, and why",
        query=_PAGED,
        reply=_object(steps=_list(_REVIEWED), next=_or_null(_COUNT)),
        statuses=(400, 503),
    ),
    ("POST", "/v1/curate"): Doc(
        summary="say of a step, a run or a session whether it may be learned from, how good it is, tags and a note",
        body=CurateBody,
        rules={"allOf": [_one_target(_TARGETS[:3]), _SAYS]},
        reply=_object(curation_ids=_list(_NAME), target=_NAME, target_id=_NAME, stored=_one_of(True)),
        statuses=(404, 503),
    ),
    ("GET", "/v1/models"): Doc(
        summary="the current policy, and each adapter version that is loaded",
        reply=_object(object=_one_of("list"), data=_list(_MODEL)),
    ),
    ("GET", "/v1/models/{name}"): Doc(summary="one of them", reply=_MODEL, statuses=(404,)),
    ("GET", "/v1/status"): Doc(summary="how the edge is, in numbers", reply=_STATUS),
    ("GET", "/healthz"): _HEALTH,
    ("GET", "/readyz"): _READINESS,
    ("GET", "/health"): _HEALTH,
    ("GET", "/ready"): _READINESS,
    ("GET", "/metrics"): Doc(
        summary="counts and times, as Prometheus reads them", reply=_TEXT, content_type="text/plain"
    ),
    ("GET", "/openapi.json"): Doc(summary="this document", reply=_object(openapi=_NAME, info=_ANY, paths=_ANY)),
    ("POST", "/init_trajectory"): Doc(
        summary="begin a trajectory; its id is the key of its URLs",
        reply=_object(trajectory_uid=_NAME, base_url=_NAME),
        statuses=(408, 413, 415, 503),
    ),
    ("POST", "/register_trajectory"): Doc(
        summary="say the channel and facts of a trajectory, as early clients do",
        rules={"required": ["trajectory_uid"], "properties": {"trajectory_uid": _NAME}},
        **_REGISTER,
    ),
    ("POST", "/complete_trajectory/{trajectory}"): Doc(summary="end a trajectory, as early clients do", **_COMPLETE),
    ("POST", f"{_T}/v1/register_trajectory"): Doc(
        summary="say the channel, the group and the facts of a trajectory", optional_body=True, **_REGISTER
    ),
    ("POST", f"{_T}/v1/complete_trajectory"): Doc(summary="end a trajectory, with its reward", **_COMPLETE),
    **{("POST", f"{_T}/v1/{name}"): _on_trajectory(name, doc) for name, doc in _CALLS.items()},
    ("POST", f"{_T}/{{alias}}"): None,
    ("POST", "/generate"): Doc(
        summary="sampled ids for a prompt of ids",
        body=GenerateBody,
        reply=_object(token_ids=_IDS, log_probs=_list({"type": "number"}), stop_reason=_NAME),
        statuses=_CALL_STATUSES,
    ),
    ("POST", "/submit_steps"): Doc(
        summary="hand in steps that a program made itself",
        body=SubmitBody,
        parts={"steps": Part((StepPayload,), _STEP_RULES)},
        query={"channel": _one_of("train", "val")},
        reply=_object(accepted=_COUNT),
        statuses=(409, 503),
    ),
    ("POST", "/compute_reward"): Doc(
        summary="judge a response; nothing is kept",
        body=RewardBody,
        reply=_object(
            reward_score=_or_null({"type": "number", "minimum": -1, "maximum": 1}), reward_extra_info={"type": "object"}
        ),
        statuses=(422, 503),
    ),
}
