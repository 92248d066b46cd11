"""What `sparsek serve` will start: the server's command line, and what a request costs."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError
from sparsek_cli.families.varying_positions import varying
from sparsek_cli.hub import Checkpoint
from sparsek_cli.loading import (
    check_tokenizer,
    closing_tokens,
    leave_open,
    load_config,
    load_tokenizer,
    say_untied,
)
from sparsek_cli.loading.positions import CHANGED, stretch
from sparsek_cli.output.parts import check_parts
from sparsek_cli.serving import address
from sparsek_cli.serving.cost import Cost, cost, served_dtype
from sparsek_cli.serving.engines import TRANSFORMERS, VLLM, choose
from sparsek_cli.serving.flags import LENGTH, OVERRIDES, Flags
from sparsek_cli.serving.room import Room, room, served_bytes
from sparsek_cli.serving.stretched import YARN


@dataclass(frozen=True)
class ServePlan:
    """One server, not yet started.

    Attributes:
        engine: `vllm` or `transformers`. why: why it is this one.
        model: what clients write as `model`. url: what they take as base URL.
        host, port: where it listens.
        dtype: of weights and cache.
        yarn: how many times its own length the model reads, or None: once.
        closing: what the server puts behind every text that it is to complete; mostly empty.
        cost: a request's cache, whatever the request's length.
        memory: what keeps the server's memory from growing; empty where nothing is changed.
        room: memory of caches that the server is told to take; None where it is not told.
        command: to be run in place of this process.
    """

    engine: str
    why: str
    model: str
    url: str
    host: str
    port: int
    dtype: str
    yarn: float | None
    closing: tuple[str, ...]
    cost: Cost
    memory: str
    room: Room | None
    command: tuple[str, ...]

    def text(self) -> str:
        rows = [f"url      {self.url}"]
        if address.listens_everywhere(self.host):
            rows.append("listens  on every address of this machine: others reach it too")
        rows += [
            f"model    {self.model}",
            f"server   {self.engine} ({self.why})",
            f"cache    {self.cost.text()} ({self.dtype})",
        ]
        if self.yarn:
            rows.append(f"context  {self.yarn:g} times the model's own (YaRN)")
        if self.closing:
            rows.append(
                f"prompts  of /v1/completions get {' '.join(self.closing)} behind them: set "
                '"add_eos_token": false in tokenizer_config.json'
            )
        if self.room:
            rows.append(f"room     {self.room.text()}")
        if self.memory:
            rows.append(f"memory   {self.memory}")
        if self.engine == TRANSFORMERS:
            rows.append("limit    one request at a time: others wait")
        return "\n".join(rows)

    def data(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "why": self.why,
            "model": self.model,
            "url": self.url,
            "host": self.host,
            "dtype": self.dtype,
            "yarn": self.yarn,
            "closing_tokens": list(self.closing),
            "ranks": self.cost.ranks,
            "request_bytes": self.cost.request_bytes,
            "requests_per_gib": self.cost.requests_per_gib,
            "bytes_unknown": self.cost.unknown,
            "memory": self.memory or None,
            "cache_room_bytes": self.room and self.room.bytes,
            "cache_room_requests": self.room and self.room.requests,
            "command": list(self.command),
        }


def plan(
    checkpoint: Checkpoint,
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    yarn: float | None = None,
    flags: Sequence[str] = (),
) -> ServePlan:
    """Chooses the server and writes its command line; starts nothing.

    Args:
        engine: `auto`, `vllm` or `transformers`.
        dtype: of weights and cache, or None for the checkpoint's.
        yarn: how many times its own length the model is to read; see loading/positions.py.
        flags: handed on to the server as they are.

    Raises:
        UsageError: a dense model, no server, or a flag that says what one of ours says or that
            the server would refuse, or of which it would heed one alone; positions that cannot be
            stretched.
        SparsekError: no tokenizer that loads and fits, or one that closes every text in a way that
            transformers' server cannot leave out; or scorers that are damaged.
    """
    fields = checkpoint.config()
    if not is_converted(fields):
        raise UsageError(
            f"{checkpoint.name} is dense: its cache grows with every token",
            hint=f"convert it first: sparsek convert {quote(checkpoint.operand)}",
        )
    given = Flags(flags)
    # What the server would say later, and not in one line.
    tokenizer = load_tokenizer(checkpoint)
    check_tokenizer(tokenizer, fields["vocab_size"], checkpoint.name)
    check_parts(checkpoint.path)
    name, why = choose(fields, engine)
    if name == TRANSFORMERS:
        leave_open(tokenizer, checkpoint.name)  # as the server will
    closing = closing_tokens(tokenizer)
    config = load_config(checkpoint.path, checkpoint.name)
    say_untied(checkpoint.path, checkpoint.name, config)
    kept = served_dtype(config, checkpoint.path, dtype)
    model, command = _command(name, checkpoint)
    if yarn is not None:
        stretch(config, yarn)
        command += _stretched(name, config, yarn, given)
    command += ["--host", host, "--port", str(port), "--dtype", kept]
    memory, price, place = _memory(name), cost(config, name, kept, given), None
    if name == VLLM:
        command += _own_length(config, given)
        weights = served_bytes(read_shards(checkpoint.path), kept)
        place = room(price, given, weights, os.environ)
        command += place.flags if place else ()
    return ServePlan(
        engine=name,
        why=why,
        model=model,
        url=address.url(host, port, encrypted=given.encrypted),
        host=host,
        port=port,
        dtype=kept,
        yarn=yarn,
        closing=tuple(closing),
        cost=price,
        memory=memory,
        room=place,
        command=(sys.executable, *command, *given.words),
    )


def _memory(engine: str) -> str:
    """What the plugin will say to the server's allocator, by this process's environment."""
    if engine == TRANSFORMERS:
        return ""
    try:
        allocator = importlib.import_module("sparsek_vllm.allocator")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the plugin sparsek-vllm is older than this sparsek: it has no {error.name}",
            hint="update it to this version (docs/guides/serving.md; in a checkout: pip install "
            "--no-deps -e plugins/vllm), or give --engine transformers",
        ) from error
    return allocator.choice(os.environ)[1]


def _command(engine: str, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """The name that clients give the model, and Python's arguments."""
    path, name = str(checkpoint.path), checkpoint.name
    if engine == TRANSFORMERS:
        # It knows the model by the words it was started with: short ones, where they lead there.
        model = name if Path(name).resolve() == checkpoint.path.resolve() else path
        _check_model(model, checkpoint)
        server = ["-m", "sparsek_cli.serving.transformers_server", "serve"]
        return model, [*server, model]
    return name, ["-m", "sparsek_vllm", "--model", path, "--served-model-name", name]


def _stretched(engine: str, config: Any, factor: float, flags: Flags) -> list[str]:
    """What tells a server that positions are stretched, as they are in `config`."""
    if engine == TRANSFORMERS:
        return [YARN, str(factor)]
    if place := flags.place_of(OVERRIDES):
        beside = "" if place == OVERRIDES else f" in {place}"
        raise UsageError(
            f"--yarn changes the model's config, and so does {OVERRIDES}{beside}: vLLM heeds one "
            "of them",
            hint=f"leave {OVERRIDES} out, or --yarn, and put rope_parameters in there",
        )
    changed = {key: getattr(config, key) for key in CHANGED if hasattr(config, key)}
    return [OVERRIDES, json.dumps(changed)]


def _own_length(config: Any, flags: Flags) -> list[str]:
    """vLLM's own choice is another where positions vary: longrope's original length, for one."""
    varies = varying(getattr(config, "rope_parameters", None))
    if not varies or flags.place_of(LENGTH) or flags.place_of(OVERRIDES):
        return []
    return [LENGTH, str(config.max_position_embeddings)]


def _check_model(model: str, checkpoint: Checkpoint) -> None:
    """Raises UsageError where transformers' server would take a part of a path for something else.

    What follows an @ is a revision to it, and what follows a colon a GGUF file.
    """
    for mark, what in (("@", "a revision"), (":", "a GGUF file")):
        if mark in model and (mark == "@" or model.lower().endswith(".gguf")):
            place, name = checkpoint.path.parent, checkpoint.name
            raise UsageError(
                f"transformers' server takes what follows {mark} in '{model}' for {what}",
                hint=f"rename the folder '{name}'"
                if mark in name
                else f"run it where the model lies: cd {quote(str(place))}, and name {quote(name)}",
            )


def start(plan: ServePlan) -> None:
    """Becomes the server: signals reach it directly, and nothing is left when it ends.

    What it says goes to stderr: stdout holds the result alone, and ends with it.
    """
    sys.stdout.flush()
    os.dup2(sys.__stderr__.fileno(), sys.__stdout__.fileno())
    os.execv(plan.command[0], plan.command)
