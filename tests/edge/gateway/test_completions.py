"""Legacy completions through the real `openai` SDK: text and token ids in, text out, token-exact."""

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from .conftest import Serve, Served

PATH = "/v1/completions"
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


async def test_a_text_prompt_is_continued_and_kept_as_it_was_consumed(scripted: Serve) -> None:
    served = await scripted([" upon a time"])
    async with AsyncOpenAI(**served.sdk) as client:
        reply = await client.completions.create(model="clawloop", prompt="Once", max_tokens=50)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (" upon a time", "stop", None)
    kept = served.kept(reply.id)
    assert kept.step.prompt_ids == served.engine.tokenizer.encode("Once")
    assert kept.text == " upon a time<|im_end|>"
    assert kept.reply == {"role": "assistant", "content": " upon a time"}
    assert kept.kind == "main"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(kept.step.response_ids)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_token_ids_are_consumed_as_they_are(scripted: Serve, wrapped: bool) -> None:
    served = await scripted(["fine"])
    ids = [*served.engine.tokenizer.encode("How are you"), 2]
    body = {"prompt": [ids] if wrapped else ids, "return_token_ids": True}
    status, headers, reply = await served.post(PATH, body)
    assert status == 200, reply
    choice, step = reply["choices"][0], served.kept(reply["id"]).step
    assert choice["prompt_token_ids"] == step.prompt_ids == ids
    assert choice["token_ids"] == step.response_ids
    assert headers["x-clawloop-step"] == reply["id"]


async def test_a_list_of_one_text_is_that_text(scripted: Serve) -> None:
    served = await scripted(["b"])
    status, _, reply = await served.post(PATH, {"prompt": ["a"]})
    assert (status, reply["choices"][0]["text"]) == (200, "b")


async def test_sixteen_tokens_are_sampled_where_no_limit_is_named(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h i j k l m n o p q r s t u v w x y z"])
    _, _, reply = await served.post(PATH, {"prompt": "x"})
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 16


async def test_thoughts_and_calls_are_text(scripted: Serve) -> None:
    said = f"<think>\nhm\n</think>\n{CALL}"
    served = await scripted([said])
    _, _, reply = await served.post(PATH, {"prompt": "x", "max_tokens": 200})
    assert reply["choices"][0]["text"] == said


async def test_a_stream_brings_the_same_text_then_the_reason_and_the_usage(scripted: Serve) -> None:
    served = await scripted(["one two three"])
    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.completions.create(
            model="m", prompt="zero", max_tokens=50, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "one two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(served.kept(chunks[0].id).step.response_ids)


async def test_a_stream_brings_the_ids_and_the_prompts_once(scripted: Serve) -> None:
    served = await scripted(["one two"])
    body = {"prompt": "zero", "stream": True, "return_token_ids": True}
    auth = {"Authorization": f"Bearer {served.token}"}
    async with served.http.post(served.base_url + PATH, json=body, headers=auth) as reply:
        lines = [line for line in (await reply.text()).split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    prompts = [choice["prompt_token_ids"] for choice in choices if choice.get("prompt_token_ids")]
    assert prompts == [served.engine.tokenizer.encode("zero")]
    assert (
        served.engine.tokenizer.decode([token for c in choices for token in c.get("token_ids") or []])
        == "one two<|im_end|>"
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_the_legacy_shape_with_the_place_of_each_token(real: Served, stream: bool) -> None:
    async with AsyncOpenAI(**real.sdk) as client:
        reply: Any = await client.completions.create(
            model="m", prompt="The sun is", max_tokens=12, logprobs=3, seed=5, stream=stream
        )
        parts = [chunk.choices[0] async for chunk in reply] if stream else [reply.choices[0]]
    text = "".join(part.text for part in parts)
    shown = [part.logprobs for part in parts if part.logprobs]
    tokens = [token for one in shown for token in one.tokens]
    offsets = [offset for one in shown for offset in one.text_offset]
    top = [likeliest for one in shown for likeliest in one.top_logprobs]
    assert len(tokens) == len(offsets) == len(top) == sum(len(one.token_logprobs) for one in shown)
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        whole = "\ufffd" not in token and token != "<|im_end|>"
        assert not whole or text.startswith(token, offset), (token, offset)
    assert all(3 <= len(likeliest) <= 4 for likeliest in top)
    assert all(token in likeliest for token, likeliest in zip(tokens, top, strict=True))


async def test_several_choices_of_one_prompt_are_a_step_each(scripted: Serve) -> None:
    served = await scripted(["a", "b"])
    async with AsyncOpenAI(**served.sdk) as client:
        reply = await client.completions.create(model="m", prompt="x", n=2)
    assert {choice.text for choice in reply.choices} == {"a", "b"}
    assert served.kept(f"{reply.id}-1").step.prompt_ids == served.kept(reply.id).step.prompt_ids


async def test_a_sampled_completion_is_trainable(real: Served) -> None:
    status, headers, reply = await real.post(PATH, {"prompt": [5, 6, 7], "max_tokens": 4})
    assert status == 200, reply
    assert headers["x-clawloop-trainable"] == "yes"
    assert real.kept(reply["id"]).step.trainable


async def test_a_stop_string_ends_the_text(scripted: Serve) -> None:
    served = await scripted(["one. two. three."])
    async with AsyncOpenAI(**served.sdk) as client:
        reply = await client.completions.create(model="m", prompt="x", stop=[" two"], max_tokens=50)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("one.", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 70]}, "prompt"),
        ({"prompt": [10_000_000]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(scripted: Serve, fields: dict[str, Any], param: str) -> None:
    served = await scripted([])
    status, _, reply = await served.post(PATH, fields)
    assert status == 400, reply
    assert reply["error"]["param"] == param


async def test_a_prompt_over_the_context_is_refused_with_both_numbers(scripted: Serve) -> None:
    served = await scripted([])
    limit = served.engine.tokenizer.context_length
    async with AsyncOpenAI(**served.sdk, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=f"{limit + 1} tokens .* {limit} tokens"):
            await client.completions.create(model="m", prompt=[5] * (limit + 1))
