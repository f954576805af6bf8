"""A rule for `--scorer rule:judge`: was the right directory asked, once, and its contact named, and nobody else?"""

import json
import re


def judge(case):
    """1 if all of it is so, else -1; None (no opinion) where the task does not say what is right."""
    task = case["metadata"]
    contacts, answer = task.get("contacts"), task.get("answer")
    if not contacts or not answer:
        return None
    right = _named(contacts, answer)
    calls = [(call["function"]["name"], _arguments(call)) for call in case["tool_calls"]]
    called = calls == [(name, {"city": task["city"]}) for name in right]
    good = called and _named(contacts, case["text"]) == right
    evidence = "one call, the right one" if called else f"{len(calls)} calls, or not the right one"
    return {"value": 1.0 if good else -1.0, "evidence": evidence}


def _named(contacts, text):
    """The directories whose contact a text names."""
    words = set(re.findall(r"\w+", text))
    return [name for name, contact in contacts.items() if contact in words]


def _arguments(call):
    try:
        return json.loads(call["function"]["arguments"])
    except ValueError:
        return None
