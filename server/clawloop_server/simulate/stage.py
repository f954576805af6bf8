"""The server that is measured: a real one in a folder of its own, with a model line that nobody trains.

Its home is marked, and one without the mark is refused: made-up steps must never reach a server that learns.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType

import msgspec
import psutil
import tomli_w

from clawloop_server import bases
from clawloop_server import home as homes
from clawloop_server.bases import Base
from clawloop_server.config import load_config
from clawloop_server.errors import FleetError, HomeError
from clawloop_server.fleet.tls import ensure_tls
from clawloop_server.home import Home
from clawloop_server.hub.invitations import Invitations
from clawloop_server.hub.status import Running, read_running
from clawloop_server.release.keys import ServerKeys, create_keys
from clawloop_server.release.records import Candidate
from clawloop_server.release.registry import Registry
from clawloop_server.vault.store import Vault
from clawloop_shared import guard
from clawloop_shared.files import private_folder
from clawloop_shared.lora import CONFIG_FILE, LINEARS, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe

MARK = "simulation.json"
VOCABULARY = 4096
_START_S = 180.0
_GRACE_S = 20
_SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_PARTS = {
    "guard.py": "guards",
    "flower-superlink": "superlink",
    "flower-superexec": "superexec",
    "flwr-serverapp": "bridge",
    "trainer.process": "trainer",
}


class Part(msgspec.Struct, frozen=True):
    """What one kind of process of the server used: CPU seconds so far, resident MiB now."""

    cpu_s: float
    rss_mib: float


class Stage:
    """A server, made, started, watched and stopped."""

    def __init__(self, home: Home, *, keys: ServerKeys, base: Base, vault: Vault) -> None:
        self.home, self.keys, self.base, self.vault = home, keys, base, vault
        self._registry = Registry(vault.database, home.adapters)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: dict[int, tuple[str, float]] = {}
        self.running: Running | None = None

    @classmethod
    def make(cls, folder: Path, *, settings: dict[str, dict[str, object]]) -> Stage:
        """Make (or open again) the server of a simulation.

        Raises:
            HomeError: the folder holds a server that was not made here.
        """
        mark = folder / MARK
        if folder.exists() and any(folder.iterdir()) and not mark.exists():
            raise HomeError(f"{folder} is not the home of a simulation; name a new folder: it will get made-up steps")
        private_folder(folder)
        mark.write_text("{}\n")
        home = homes.create(folder)
        keys = create_keys(home)
        base = bases.import_base(home, _model(folder / "model"))
        ports = {"port": 0, "admin_port": 0}
        home.config.write_text(tomli_w.dumps({"hub": ports, **settings}))
        config = load_config(home.config)
        ensure_tls(home.keys, config.certificate_names)
        return cls(home, keys=keys, base=base, vault=Vault.open(home, keys.master, settings=config.reward))

    def start(self) -> Running:
        """Run `clawloop-server serve` and wait until it listens. It ends when this process does.

        Raises:
            FleetError: it does not come up.
        """
        (self.home.folder / "running.json").unlink(missing_ok=True)
        serve = [sys.executable, "-c", "from clawloop_server.cli import main; main(['serve'])"]
        with (self.home.logs / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(_GRACE_S), *serve],
                env={**os.environ, homes.VARIABLE: str(self.home.folder), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while (running := read_running(self.home)) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise FleetError(f"the server did not come up; see {log.name}")
            time.sleep(0.1)
        self.running = running
        return running

    def stop(self) -> None:
        """Stop the server and close its database."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait()
        self.vault.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def invite(self, count: int) -> list[str]:
        """So many invitation codes."""
        invitations = Invitations(self.vault.database)
        with self.vault.database.write():
            return [invitations.create() for _ in range(count)]

    def put_candidate(self, size_bytes: int, *, real: bool = False) -> int:
        """An adapter that passed, as a round would hand it over; the hub releases it at its next look. Its version.

        It is bytes of that size, or, if `real`, one that rounds can go on from, as small as the model is."""
        files = {CONFIG_FILE: b"{}", WEIGHTS_FILE: random.randbytes(size_bytes)}
        if real:
            from clawloop_server.simulate.learning import made_adapter

            files = made_adapter(self.base.shape)
        candidate = Candidate(
            round_id="simulated",
            line=self.base.line,
            files=files,
            rank=8,
            alpha=16.0,
            target_modules=list(LINEARS) if real else ["q_proj"],
            probe=Probe(ids=[1, 2], logprobs=[-0.5]),
            evaluation=Evaluation(suite="simulated", episodes=1, reward=1.0, reward_before=0.0, standard_error=0.0),
            lineage_root="",
        )
        with self._registry.within():
            return self._registry.record_candidate(candidate)

    def released_ms(self, version: int) -> int:
        """When it was released; 0: not yet."""
        return self._registry.adapter(version).released_ms or 0

    def parts(self) -> dict[str, Part]:
        """What the server's processes used so far, those included that have ended since they were first looked at."""
        used: dict[str, float] = defaultdict(float)
        resident: dict[str, float] = defaultdict(float)
        alive = set()
        for process in self._processes():
            with contextlib.suppress(psutil.Error), process.oneshot():
                name, spent = _name(process.cmdline()), process.cpu_times()
                alive.add(process.pid)
                self._ended[process.pid] = (name, spent.user + spent.system)
                resident[name] += process.memory_info().rss / (1 << 20)
        for name, cpu_s in self._ended.values():
            used[name] += cpu_s
        return {name: Part(used[name], resident[name]) for name in sorted(used)}

    def connections(self) -> int:
        """How many connections devices have to the server now."""
        if self.running is None:
            return 0
        count = 0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                found = process.net_connections("tcp")
                count += sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == self.running.port for c in found)
        return count

    def _processes(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        with contextlib.suppress(psutil.Error):
            return [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        return []


def _name(command: list[str]) -> str:
    line = " ".join(command)
    return next((name for mark, name in _PARTS.items() if mark in line), "hub")


def _model(folder: Path) -> Path:
    """A model folder of the smallest model that the trainer can load: it is loaded, and has nothing to learn from."""
    if folder.exists():
        return folder
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(folder)
    words = {"<end>": 0} | {f"word{number}": number for number in range(1, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
