"""Programs that hold the tokens themselves: what they sampled here and hand in is learned from, and nothing else is."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from clawloop_edge.pool.records import KeptStep
from clawloop_shared.errors import StorageError
from clawloop_shared.records import Channel, Step, check_step

from .conftest import Serve, Served
from .rollouts import assembled, begin, chat, post, steps_of

ASKED = [{"role": "user", "content": "hi"}]
PARAMS = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "logprobs": True, "max_tokens": 6}
PROMPT = [5, 6, 7, 8]


async def draw(served: Served, prompt: list[int] = PROMPT, **params: Any) -> dict[str, Any]:
    body = {"prompt_ids": prompt, "sampling_params": {**PARAMS, **params}}
    status, _, reply = await served.post("/generate", body)
    assert status == 200, reply
    assert set(reply) == {"token_ids", "log_probs", "stop_reason"}
    return dict(reply)


def payload(drawn: dict[str, Any], prompt: list[int] = PROMPT, **fields: Any) -> dict[str, Any]:
    """A step as the documented flow hands it in."""
    return {
        "prompt_ids": prompt,
        "response_ids": drawn["token_ids"],
        "rollout_log_probs": drawn["log_probs"],
        "trajectory_uid": "traj-1",
        "prompt_uid": "row-7",
        "step_index": 0,
        "policy_version": 0,
        "is_last": False,
        "metadata": {},
        "multi_modal_data": None,
        "routed_experts": None,
        **fields,
    }


async def submit(served: Served, *steps: dict[str, Any], channel: str = "train") -> tuple[int, Any]:
    status, _, reply = await served.post(f"/submit_steps?channel={channel}", {"steps": list(steps)})
    return status, reply


def only(served: Served, name: str = "traj-1") -> Step:
    (step,) = steps_of(served, name)
    return step


async def test_a_step_sampled_here_is_kept_with_its_own_logprobs_and_can_be_learned_from(real: Served) -> None:
    drawn = await draw(real)
    assert drawn["stop_reason"] in ("stop", "length")
    assert await submit(real, payload(drawn, reward=0.5, is_last=True), channel="val") == (200, {"accepted": 1})
    step = check_step(only(real))
    assert step.trainable
    assert (step.prompt_ids, step.response_ids) == (PROMPT, drawn["token_ids"])
    assert step.response_logprobs == drawn["log_probs"]
    scored = await real.engine.score(PROMPT, step.response_ids, version=0)
    assert step.response_logprobs == pytest.approx(scored, abs=1e-3)
    assert step.policy == real.engine.policy
    (trajectory,) = assembled(real, "traj-1")
    assert (trajectory.channel, trajectory.group_id, trajectory.reward) == (Channel.VAL, "row-7", 0.5)


async def test_the_same_step_again_is_one_step_also_beside_new_ones(real: Served) -> None:
    first, second = await draw(real), await draw(real)
    await submit(real, payload(first, reward=1.0))
    steps = [payload(second, step_index=1), payload(first, reward=1.0), payload(first, reward=1.0)]
    assert await submit(real, *steps) == (200, {"accepted": 3})
    kept = steps_of(real, "traj-1")
    assert [step.response_ids for step in kept] == [first["token_ids"], second["token_ids"]]
    assert all(step.trainable for step in kept)
    assert len(real.pool.signals(kept)) == 1


async def test_other_tokens_under_a_number_that_is_taken_are_refused_and_nothing_is_kept(real: Served) -> None:
    first = await draw(real)
    await submit(real, payload(first))
    other = {**first, "token_ids": [9, 9], "log_probs": None}
    status, reply = await submit(real, payload(first, trajectory_uid="traj-2"), payload(other))
    assert (status, reply["error"]["param"]) == (409, "steps[1].step_index")
    assert steps_of(real, "traj-2") == []
    twice = [payload(other, trajectory_uid="traj-3"), payload(first, trajectory_uid="traj-3")]
    assert (await submit(real, *twice))[0] == 409


async def test_a_response_that_was_cut_is_the_beginning_of_what_was_sampled(real: Served) -> None:
    drawn = await draw(real, seed=3)
    assert len(drawn["token_ids"]) > 3
    cut = {**drawn, "token_ids": drawn["token_ids"][:3], "log_probs": [*drawn["log_probs"][:2], None]}
    await submit(real, payload(cut))
    step = only(real)
    assert (step.trainable, step.finish_reason) == (True, "length")
    assert step.response_logprobs == drawn["log_probs"][:3]


@pytest.mark.parametrize("change", ["invented", "longer", "other prompt", "images", "used"])
async def test_what_was_not_sampled_here_is_kept_and_not_learned_from(real: Served, change: str) -> None:
    drawn = await draw(real)
    step = payload(drawn, rollout_log_probs=None)
    if change == "invented":
        step["response_ids"] = [11, 12, 13]
    elif change == "longer":
        step["response_ids"] = [*drawn["token_ids"], 11]
    elif change == "other prompt":
        step["prompt_ids"] = [*PROMPT, 9]
    elif change == "images":
        step["multi_modal_data"] = {"image": ["x"]}
    else:
        await submit(real, payload(drawn, trajectory_uid="traj-0"))
    assert await submit(real, step) == (200, {"accepted": 1})
    assert only(real).untrainable == ("images are not supported" if change == "images" else "not sampled here")
    assert real.pool.verify().ok


async def test_a_draw_proves_one_step_alone(real: Served) -> None:
    drawn = await draw(real)
    assert await submit(real, payload(drawn), payload(drawn, step_index=1)) == (200, {"accepted": 2})
    assert [step.untrainable for step in steps_of(real, "traj-1")] == ["", "not sampled here"]


async def test_other_logprobs_than_those_of_the_draw_are_refused(real: Served) -> None:
    drawn = await draw(real)
    wrong = [logprob - 0.01 for logprob in drawn["log_probs"]]
    status, reply = await submit(real, payload(drawn, rollout_log_probs=wrong))
    assert (status, reply["error"]["param"]) == (400, "steps[0].rollout_log_probs")


async def test_a_truncated_draw_is_not_learned_from(real: Served) -> None:
    await submit(real, payload(await draw(real, top_p=0.5)))
    assert only(real).untrainable == "truncating sampler"


async def test_draws_and_steps_survive_a_restart(real: Served, serve: Serve) -> None:
    drawn, base = await draw(real), (await begin(real))[1]
    later = await serve(real.engine)
    await submit(later, payload(drawn))
    assert only(later).trainable
    moved = base.replace(real.base_url, later.base_url)
    reply = await chat(moved.rsplit("/", 3)[0] + "/traj-1/row-7/v1", ASKED, extra_headers=_auth(later))
    assert reply.headers["x-clawloop-trajectory-step"] == "1"


async def test_a_trajectory_that_was_registered_keeps_its_channel_and_group(real: Served) -> None:
    name, base = await begin(real)
    registered = base.replace("/1/v1", "/row-1/v1")
    await post(f"{registered}/register_trajectory", {"channel": "val"})
    await submit(real, payload(await draw(real), trajectory_uid=name))
    step = only(real, name)
    assert (step.channel, step.group_id) == (Channel.VAL, "row-1")


async def test_generate_and_chat_need_no_session_of_each_other(scripted: Serve) -> None:
    served = await scripted(["one two"])
    drawn = await draw(served, max_tokens=50)
    assert served.engine.tokenizer.decode(drawn["token_ids"]) == "one two<|im_end|>"
    assert drawn["stop_reason"] == "stop"
    assert len(drawn["log_probs"]) == len(drawn["token_ids"])
    assert served.pool.step_ids() == []


async def test_nothing_to_submit_is_fine(scripted: Serve) -> None:
    served = await scripted([])
    assert await submit(served) == (200, {"accepted": 0})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_ids": []}, "steps[0].prompt_ids"),
        ({"response_ids": []}, "steps[0].response_ids"),
        ({"response_ids": [-1]}, "steps[0].response_ids"),
        ({"prompt_ids": [1 << 40]}, "steps[0].prompt_ids"),
        ({"prompt_ids": "x"}, "steps[0].prompt_ids"),
        ({"trajectory_uid": ""}, "steps[0].trajectory_uid"),
        ({"trajectory_uid": "x" * 201}, "steps[0].trajectory_uid"),
        ({"prompt_uid": "x" * 201}, "group"),
        ({"step_index": -1}, "steps[0].step_index"),
        ({"reward": 1.5}, "steps[0].reward"),
        ({"metadata": [1]}, "steps[0].metadata"),
        ({"rollout_log_probs": ["x"]}, "steps[0].rollout_log_probs"),
    ],
)
async def test_a_wrong_step_is_named(scripted: Serve, fields: dict[str, Any], param: str) -> None:
    served = await scripted([])
    drawn = {"token_ids": [1], "log_probs": None}
    status, reply = await submit(served, payload(drawn, **fields))
    assert status == 400, reply
    assert reply["error"]["param"].startswith(param)
    assert served.pool.step_ids() == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/submit_steps?channel=test", {"steps": []}),
        ("/submit_steps", {}),
        ("/submit_steps", []),
        ("/submit_steps", {"steps": [5]}),
        ("/generate", {}),
        ("/generate", {"prompt_ids": []}),
        ("/generate", {"prompt_ids": [10_000_000]}),
        ("/generate", {"prompt_ids": [-1]}),
        ("/generate", {"prompt_ids": [1], "image_data": ["x"]}),
        ("/generate", {"prompt_ids": [1], "sampling_params": {"repetition_penalty": 1.1}}),
        ("/generate", {"prompt_ids": [1], "sampling_params": {"stop": ["x"]}}),
        ("/generate", {"prompt_ids": [1] * 100_000}),
        ("/compute_reward", {"prompt_ids": [1]}),
    ],
)
async def test_wrong_requests_are_refused(scripted: Serve, path: str, body: Any) -> None:
    served = await scripted([])
    status, _, reply = await served.post(path, body)
    assert status == 400, reply


async def test_without_a_scorer_no_reward_is_computed(scripted: Serve) -> None:
    served = await scripted([])
    body = {"prompt_ids": [1], "response_ids": [2], "num_turns": 2, "extra_fields": {}, "dataset_fields": {}}
    status, _, reply = await served.post("/compute_reward", body)
    assert (status, reply["error"]["code"]) == (503, "no_scorer")


def _auth(served: Served) -> dict[str, str]:
    return {"Authorization": f"Bearer {served.token}"}


async def test_one_draw_proves_one_step_also_of_many_handed_in_at_once(real: Served) -> None:
    drawn, names = await draw(real), [f"traj-{number}" for number in range(6)]
    await asyncio.gather(*(submit(real, payload(drawn, trajectory_uid=name)) for name in names))
    assert sorted(only(real, name).untrainable for name in names) == ["", *["not sampled here"] * 5]


async def test_of_an_incognito_generate_nothing_is_kept(real: Served) -> None:
    body = {"prompt_ids": PROMPT, "sampling_params": PARAMS}
    status, _, drawn = await real.post("/generate", body, headers={"X-Clawloop-Incognito": "1"})
    assert status == 200
    with real.pool.read() as database:
        assert database.table("draws").count == 0
    await submit(real, payload(drawn))
    assert only(real).untrainable == "not sampled here"


async def test_a_draw_that_cannot_be_kept_is_given_all_the_same(real: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(operation: Callable[..., Any]) -> Future[Any]:
        failed: Future[Any] = Future()
        failed.set_exception(StorageError("the disk is full"))
        return failed

    monkeypatch.setattr(real.pool, "submit", full)
    assert (await draw(real))["token_ids"]


async def test_a_client_that_goes_away_while_its_step_is_kept_cannot_have_its_draw_twice(
    real: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping, keep_step = asyncio.Event(), real.pool.keep_step

    def noted(kept: KeptStep, *, index: dict[str, bytes]) -> Future[None]:
        keeping.set()
        return keep_step(kept, index=index)

    drawn = await draw(real)
    monkeypatch.setattr(real.pool, "keep_step", noted)
    first = asyncio.create_task(submit(real, payload(drawn, trajectory_uid="first")))
    await keeping.wait()
    first.cancel()
    await asyncio.wait((first,))
    await submit(real, payload(drawn, trajectory_uid="second"))
    assert [only(real, name).untrainable for name in ("first", "second")] == ["", "not sampled here"]
