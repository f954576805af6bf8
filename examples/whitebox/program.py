"""White-box offline mode: a program that holds the tokens itself. It renders its prompts by the model's own tokenizer,
has them continued by the policy that the edge serves, hands in its steps, and completes each trajectory with a reward.

    python program.py MODEL_FOLDER TASKS.jsonl --n 4

A response goes into the next prompt by its ids, never by its text: so each step is a continuation of the one before.
"""

import argparse
import json
import re

from transformers import AutoTokenizer

from clawloop_edge import Client

MAX_CALLS = 3
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.S)


class Program:
    """Plays tasks through one edge, with one tokenizer."""

    def __init__(self, edge, folder):
        self.edge, self.tokenizer = edge, AutoTokenizer.from_pretrained(folder)

    def render(self, messages, tools, *, asks):
        """Messages as text; with `asks`, the model's turn is open at its end."""
        return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=asks, tokenize=False)

    def ids(self, text):
        """A rendered text as ids; it has its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def play(self, task, *, group_size):
        """One trajectory: its reward."""
        trajectory = self.edge.trajectory(group=f"white-{task['id']}", group_size=group_size, metadata=task)
        history, tools = list(task["messages"]), tools_of(task["contacts"])
        prompt, steps, calls = self.ids(self.render(history, tools, asks=True)), [], []
        while True:
            drawn = self.edge.generate(prompt, max_tokens=48, temperature=1.0)
            steps.append(trajectory.step(prompt, drawn, index=len(steps)))
            text = self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True)
            wanted = read_calls(text)
            if not wanted or len(calls) >= MAX_CALLS or drawn.stop_reason != "stop":
                break
            calls += wanted
            said = {"role": "assistant", "content": text}
            results = [{"role": "tool", "content": search(task, *call)} for call in wanted]
            prompt = prompt + drawn.token_ids + self.between(history, said, results, tools)
            history += [said, *results]
        self.edge.submit_steps(steps)
        last = steps[-1]
        judged = self.edge.compute_reward(last.prompt_ids, last.response_ids, dataset_fields=task)
        trajectory.complete(reward=judged.reward)
        return judged.reward

    def between(self, history, said, results, tools):
        """The ids from the end of an answer to the begin of the next one."""
        before = self.render([*history, said], tools, asks=False).rstrip("\n")
        after = self.render([*history, said, *results], tools, asks=True)
        return self.ids(after.removeprefix(before))


def tools_of(contacts):
    """The directories of a task as tools."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return [
        {"type": "function", "function": {"name": name, "description": f"Search {name}.", "parameters": city}}
        for name in contacts
    ]


def read_calls(text):
    """(name, arguments) of each call in a text."""
    found = []
    for body in CALL.findall(text):
        try:
            call = json.loads(body)
            found.append((call["name"], call["arguments"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def search(task, name, arguments):
    """What a directory says."""
    contact = task["contacts"].get(name) if arguments == {"city": task["city"]} else None
    return json.dumps({"contact": contact} if contact else {"error": "not found"})


def main():
    """Every task, so many times."""
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("tasks")
    options.add_argument("--n", type=int, default=4)
    options.add_argument("--first", type=int, default=None, help="only so many of the tasks")
    chosen = options.parse_args()
    with open(chosen.tasks) as file:
        tasks = [json.loads(line) for line in file][: chosen.first]
    with Client() as edge:
        program = Program(edge, chosen.model)
        rewards = [program.play(task, group_size=chosen.n) for task in tasks for _ in range(chosen.n)]
    print(f"{len(rewards)} trajectories, mean reward {sum(rewards) / len(rewards):.3f}")


if __name__ == "__main__":
    main()
