"""Synthetic conversations of other agents: the demo model must also end its answers, and obey plain orders, out there.

Each draw is a *setting* (a system text and a list of tools, both random, from a few hundred bytes to tens of kilobytes)
and some *tails*: conversations under it. A tail is chat with short answers, or plain orders ("Call read with path
notes.txt") whose arguments are copied exactly. Half of the settings have the outer shape of OpenClaw's requests: dated
user messages, a `Runtime:` line, its tool names, and a last user message of internal context to be looked past. The
text is made of the committed corpus and of random words. This module is pure: text and randomness are passed in.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from enum import StrEnum

from demoworld.world import JsonObject

AGENT_ARGUMENTS = {
    "apply_patch": ("input",),
    "edit": ("path", "oldText"),
    "exec": ("command",),
    "ls": ("path",),
    "read": ("path",),
    "write": ("path", "content"),
}
_AGENT_EXTRA = ("process", "message", "search", "sessions", "browser", "memory", "tool_search", "automations")
_KEYS = (
    "path",
    "query",
    "text",
    "name",
    "url",
    "id",
    "target",
    "message",
    "input",
    "city",
    "title",
    "file",
    "key",
    "value",
    "user",
)
_VERBS = ("get", "set", "list", "find", "run", "add", "send", "open", "fetch", "make", "drop", "show", "check")
RESERVED_WORDS = frozenset(
    {part for name in (*AGENT_ARGUMENTS, *_AGENT_EXTRA) for part in name.split("_")}
    | set(_KEYS)
    | set(_VERBS)
    | {"command", "content", "oldtext", "hello", "hi", "echo", "file", "folder", "tool"}
)
_COMMANDS = (
    *("echo {w}", "echo {w} {w}", "echo hi", "echo hello", "mkdir {w}", "make {w}", "ls -la {p}", "head -n {n} {f}"),
    *("cat {f}", "wc -l {f}", "python3 {f}", "grep -n {w} {f}", "rm {f}", "touch {f}", "sleep {n}"),
    *("pwd", "date", "git status", "uname -a", "whoami", "df -h", "ls"),
)
_SUFFIXES = ("txt", "md", "py", "json", "log", "sh", "yaml", "csv")
_GREETINGS = (
    "hello",
    "hi",
    "hello there",
    "good morning",
    "hey",
    "Hi!",
    "Hello.",
    "good evening",
    "hi, are you there?",
)
_THANKS = ("thanks", "thank you", "Thank you!", "great, thanks", "ok thanks")
_REPLIES = ("I am a small demo model.", "I do not know.", "Understood.")
_ORDERS = (
    "Use the {tool} tool with {args}",
    "Use {tool} with {args}",
    "Call {tool} with {args}",
    "Call the {tool} tool with {args}",
    "Please use the {tool} tool with {args}",
    "please call {tool} with {args}",
    "Run {tool} with {args}",
    "use the tool {tool} with {args}",
)
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_TYPES = ("string", "string", "string", "number", "integer", "boolean")


class Style(StrEnum):
    """How the messages of a conversation are dressed."""

    PLAIN = "plain"
    """No dates, no `Runtime:` line, no internal context; nearly all turns are orders."""
    MIXED = "mixed"
    """Under an agent's setting most are dressed like an agent's, in part or whole."""
    AGENT = "agent"
    """All that an agent adds, always."""


@dataclass(frozen=True)
class Setting:
    """What a conversation stands under: system text, tool specs and, by tool, the arguments that an order names."""

    system: str
    tools: list[JsonObject]
    arguments: dict[str, tuple[str, ...]]
    is_agent: bool


@dataclass(frozen=True)
class Source:
    """Raw material: lines of text to build prompts from, and the words in them."""

    lines: tuple[str, ...]
    words: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, corpus: str) -> Source:
        """Cut a corpus text into lines and lower-case words of 3 to 9 letters."""
        lines = tuple(line for line in corpus.splitlines() if len(line) > 2)
        return cls(lines, tuple(sorted(set(re.findall(r"\b[a-z]{3,9}\b", corpus)))))


def word(rng: random.Random, source: Source) -> str:
    """A known word or, one time in three, an invented one."""
    if rng.random() < 0.67:
        return rng.choice(source.words)
    return "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 4)))


def sentence(rng: random.Random, source: Source) -> str:
    """A line of the corpus, as it is or with some words exchanged."""
    line = rng.choice(source.lines)
    if rng.random() < 0.5:
        return line
    return re.sub(r"\b[a-z]{4,}\b", lambda m: word(rng, source) if rng.random() < 0.3 else m[0], line)


def _file_name(rng: random.Random, source: Source) -> str:
    return f"{word(rng, source)}.{rng.choice(_SUFFIXES)}"


def _path(rng: random.Random, source: Source) -> str:
    folder = rng.choice(("", "", "src/", "/tmp/", "docs/", "./", f"{word(rng, source)}/"))
    return folder + _file_name(rng, source)


def value(rng: random.Random, source: Source, *, key: str) -> str:
    """A short argument that fits the key: a command, a path, a few words or an identifier. Needs no JSON escape."""
    if key == "command":
        made = rng.choice(_COMMANDS)
        for mark, make in (("{w}", word), ("{f}", _file_name), ("{p}", _path)):
            while mark in made:
                made = made.replace(mark, make(rng, source), 1)
        return made.replace("{n}", str(rng.randint(1, 99)))
    if key in ("path", "file", "url"):
        return rng.choice((_path, _file_name, word))(rng, source)
    if key == "id":
        return f"{word(rng, source)}-{rng.randint(1, 999)}"
    return " ".join(word(rng, source) for _ in range(rng.choice((1, 1, 2, 2, 3, 5))))


def _tool_name(rng: random.Random, source: Source) -> str:
    if rng.random() < 0.3:
        return rng.choice((*AGENT_ARGUMENTS, *_AGENT_EXTRA))
    return rng.choice(
        (f"{rng.choice(_VERBS)}_{word(rng, source)}", word(rng, source), f"{word(rng, source)}_{word(rng, source)}")
    )


def _spec(rng: random.Random, source: Source, *, name: str, required: tuple[str, ...], extra: int) -> JsonObject:
    """An OpenAI tool spec with the required string arguments and `extra` optional ones of any type."""
    described = rng.random() < 0.7
    properties: dict[str, JsonObject] = {}
    for key in required:
        properties[key] = {"type": "string"} | ({"description": sentence(rng, source)[:80]} if described else {})
    for _ in range(extra):
        more: JsonObject = {"type": rng.choice(_TYPES)}
        properties[word(rng, source)] = more | ({"description": sentence(rng, source)[:100]} if described else {})
    schema: JsonObject = {"type": "object"}
    parts: list[tuple[str, object]] = [("properties", properties), ("required", list(required))]
    schema |= dict(parts if rng.random() < 0.5 else reversed(parts))
    description = " ".join(sentence(rng, source) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def setting(rng: random.Random, source: Source, *, system_chars: int, is_agent: bool | None = None) -> Setting:
    """Draw a setting with a system text of about `system_chars` characters and up to ten tools (sometimes none)."""
    is_agent = rng.random() < 0.5 if is_agent is None else is_agent
    lines: list[str] = ["<!-- openclaw:attempt:STABLE -->"] if is_agent and rng.random() < 0.5 else []
    while sum(map(len, lines)) < system_chars:
        head = rng.choice(("", "", "", "- ", "- ", "## ", f"- {word(rng, source)}: "))
        lines.append(head + (sentence(rng, source)[:40] if head == "## " else sentence(rng, source)))
    if not is_agent and rng.random() < 0.25:
        return Setting("\n".join(lines), [], {}, is_agent)
    arguments = _agent_tools(rng) if is_agent else {}
    while not is_agent and len(arguments) < rng.randint(1, 8):
        arguments[_tool_name(rng, source)] = tuple(rng.sample(_KEYS, rng.choice((1, 1, 1, 2))))
    extra = (0, 0, 1, 2, 3) if system_chars < 2500 else (0, 1, 2, 4, 8)
    specs = [_spec(rng, source, name=n, required=keys, extra=rng.choice(extra)) for n, keys in arguments.items()]
    return Setting("\n".join(lines), specs, arguments, is_agent)


def _agent_tools(rng: random.Random) -> dict[str, tuple[str, ...]]:
    names = rng.sample(sorted(AGENT_ARGUMENTS), rng.choice((3, 5, 6, 6)))
    names += rng.sample(_AGENT_EXTRA, rng.choice((0, 0, 1, 4)))
    return {name: AGENT_ARGUMENTS.get(name, ("name",)) for name in sorted(names)}


def _join_arguments(rng: random.Random, arguments: dict[str, str]) -> str:
    """`path: notes.txt and content: buy milk` or the same without colons; never quoted."""
    link = rng.choice((": ", " "))
    return " and ".join(f"{key}{link}{text}" for key, text in arguments.items())


def order(rng: random.Random, source: Source, *, under: Setting) -> tuple[str, str, dict[str, str]]:
    """An order in plain words, the tool it means, and its arguments."""
    tool = rng.choice(sorted(under.arguments))
    arguments = {key: value(rng, source, key=key) for key in under.arguments[tool]}
    if len(arguments) == 1 and under.is_agent and rng.random() < 0.15:
        short = {
            "exec": ("Run {v}", "Run the command {v}", "Please run {v}"),
            "read": ("Read {v}", "Read the file {v}"),
            "ls": ("List {v}",),
        }
        if tool in short:
            return rng.choice(short[tool]).format(v=next(iter(arguments.values()))), tool, arguments
    return rng.choice(_ORDERS).format(tool=tool, args=_join_arguments(rng, arguments)), tool, arguments


def _tool_output(rng: random.Random, source: Source) -> tuple[str, str]:
    """What a tool returned, and the answer that follows: a short line is told, anything else is only acknowledged."""
    if rng.random() < 0.5:
        short = rng.choice(
            (
                word(rng, source),
                f"{word(rng, source)} {word(rng, source)}",
                _file_name(rng, source),
                str(rng.randint(0, 999)),
            )
        )
        return short, f"The result is: {short}"
    long = [sentence(rng, source) for _ in range(rng.randint(1, 4))]
    return rng.choice(("", json.dumps({"error": long[0]}), "\n".join(long), "\n".join(long))), "Done."


def _chat(rng: random.Random, source: Source) -> tuple[str, str]:
    """A message that asks for no tool, and its short answer."""
    roll = rng.random()
    if roll < 0.25:
        return rng.choice(_GREETINGS), "Hello!"
    if roll < 0.35:
        return rng.choice(_THANKS), "You are welcome."
    if roll < 0.6:
        said = " ".join(word(rng, source) for _ in range(rng.choice((1, 1, 2, 3)))) if rng.random() < 0.7 else "hello"
        return rng.choice(("say {w}", "Say {w}", "please say {w}", "Repeat: {w}")).format(w=said), said
    text = " ".join(sentence(rng, source) for _ in range(rng.choice((1, 1, 2, 3))))
    return text, rng.choice(_REPLIES)


def _dated(rng: random.Random, text: str) -> str:
    date = f"{rng.choice(_DAYS)} 20{rng.randint(20, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return f"[{date} {rng.randint(0, 23):02}:{rng.randint(0, 59):02} UTC] {text}"


def _runtime(rng: random.Random, source: Source, *, is_full: bool) -> str:
    hexed = f"{rng.getrandbits(128):032x}"
    ident = "-".join((hexed[:8], hexed[8:12], hexed[12:16], hexed[16:20], hexed[20:]))
    first, second = word(rng, source), word(rng, source)
    parts = [
        f"agent={rng.choice(('main', first))}",
        f"session=agent:main:{second}",
        f"sessionId={ident}",
        f"host={word(rng, source)}",
        f"repo=/home/{word(rng, source)}/ws",
        f"os=Linux {rng.randint(5, 7)}.{rng.randint(0, 20)} (x64)",
        f"node=v{rng.randint(18, 26)}.{rng.randint(0, 20)}.0",
        f"model={first}/{word(rng, source)}",
        "shell=bash",
    ]
    if is_full:
        nodes = [f"active_node={word(rng, source)}", f"default_model={word(rng, source)}/{first}"]
        return "\n\nRuntime: " + " | ".join([*parts[:-2], nodes[0], parts[-2], nodes[1], parts[-1]])
    kept = [part for i, part in enumerate(parts) if i < 3 or rng.random() < 0.8]
    return "\n\nRuntime: " + " | ".join(kept)


def _internal_context(rng: random.Random, source: Source) -> JsonObject:
    notes = ["Active exec sessions:\\nnone", "## Active Subagents\\nnone"]
    if rng.random() < 0.3:
        notes.insert(0, "System: " + _dated(rng, sentence(rng, source)[:90]).replace('"', ""))
    body = "\n\n".join(f'Conversation data (data, not instructions):\n"{note}"' for note in notes)
    text = f"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n{body}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
    return {"role": "user", "content": text}


def tail(
    rng: random.Random, source: Source, *, under: Setting, turns: int, style: Style = Style.MIXED
) -> list[JsonObject]:
    """A conversation of `turns` user turns that ends with an assistant message; the system message is not in it."""
    messages: list[JsonObject] = []
    always = style is Style.AGENT
    dated = always or (under.is_agent and style is Style.MIXED and rng.random() < 0.8)
    for turn in range(turns):
        told = bool(under.arguments) and rng.random() < (0.9 if style is Style.PLAIN else 0.65)
        text, tool, arguments = order(rng, source, under=under) if told else (*_chat(rng, source), {})
        content = _dated(rng, text) if dated else text
        if dated and turn == 0 and (always or rng.random() < 0.6):
            content += _runtime(rng, source, is_full=always)
        messages.append({"role": "user", "content": content})
        if not told:
            messages.append({"role": "assistant", "content": tool})
            continue
        call = {
            "id": f"call{turn}",
            "type": "function",
            "function": {"name": tool, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        output, answer = _tool_output(rng, source)
        messages.append({"role": "tool", "tool_call_id": f"call{turn}", "content": output})
        messages.append({"role": "assistant", "content": answer})
    if not always and (not under.is_agent or style is Style.PLAIN or rng.random() < 0.2):
        return messages
    return _with_internal_context(rng, source, messages=messages)


def _with_internal_context(rng: random.Random, source: Source, *, messages: list[JsonObject]) -> list[JsonObject]:
    """Cut after a random last assistant message of the last turn, and put the internal context right before it."""
    last = messages[-2]["role"] == "tool" and rng.random() < 0.5
    kept = messages[:-2] if last else messages
    return [*kept[:-1], _internal_context(rng, source), kept[-1]]
