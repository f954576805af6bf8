"""Writes tasks.jsonl: questions of the demo's world, with the directories that an agent may search.

PYTHONPATH=scripts python examples/blackbox_agent/make_tasks.py > examples/blackbox_agent/tasks.jsonl
"""

import json
import random

from demoworld import world

TASKS = 24


def line(task):
    """One task: who asks what, what each directory would say of that city, and the right answer."""
    contacts = {name: world.contacts()[name, task.city] for name in world.TOOLS}
    right = next(
        contact
        for name, contact in contacts.items()
        if world.reward(task.kind, task.city, calls=[(name, {"city": task.city})], answer=contact)
    )
    return {
        "id": f"{task.kind}-{task.city}-{task.phrasing}",
        "messages": task.messages(),
        "city": task.city,
        "contacts": contacts,
        "answer": f"Ask {right}.",
    }


def main():
    """Print them."""
    for task in random.Random(0).sample(world.tasks("train"), TASKS):
        print(json.dumps(line(task)))


if __name__ == "__main__":
    main()
