"""An agent for black-box offline mode: one task from stdin, one tool loop, one answer on stdout.

Knows OpenAI's API at OPENAI_BASE_URL and nothing else: no clawloop, no training, no reward. Needs Python alone.
"""

import json
import os
import sys
from urllib.request import Request, urlopen

MAX_CALLS = 3
MAX_TOKENS = 48


def tools(contacts):
    """The directories of a task as OpenAI describes tools."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return [
        {"type": "function", "function": {"name": name, "description": f"Search {name}.", "parameters": city}}
        for name in contacts
    ]


def search(task, call):
    """What a directory says to a call of the model's."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError:
        arguments = None
    contact = task["contacts"].get(call["function"]["name"])
    if contact is None or arguments != {"city": task["city"]}:
        return '{"error": "not found"}'
    return json.dumps({"contact": contact})


def ask(messages, offered):
    """One call of the model: its message."""
    body = {
        "model": "default",
        "messages": messages,
        "tools": offered,
        "temperature": 1.0,
        "max_tokens": MAX_TOKENS,
    }
    if "CLAWLOOP_SEED" in os.environ:  # so that a rollout with --seed samples the same again
        body["seed"] = int(os.environ["CLAWLOOP_SEED"]) + len(messages)
    request = Request(
        os.environ["OPENAI_BASE_URL"].rstrip("/") + "/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    with urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]


def main():
    """Play one task."""
    task = json.load(sys.stdin)
    history, offered = list(task["messages"]), tools(task["contacts"])
    for _ in range(MAX_CALLS + 1):
        message = ask(history, offered)
        history.append(message)
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            history.append({"role": "tool", "tool_call_id": call["id"], "content": search(task, call)})
    print(history[-1].get("content"))


if __name__ == "__main__":
    main()
