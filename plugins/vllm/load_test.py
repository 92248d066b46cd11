"""Loads a server with clients, each of which has a secret, and counts what goes wrong.

    sparsek serve OUT -- --max-num-seqs 64          # in another terminal
    python plugins/vllm/load_test.py --clients 64 --seconds 120 --pid PID-OF-THE-SERVER
    python plugins/vllm/load_test.py --pid PID --dense-url URL --dense-pid PID-OF-ANOTHER

Every client first asks alone, one after the other: that is its reply. Then all ask at once, again
and again; some leave in the middle of a stream. A reply that is not the client's own is mixed.
vLLM's own memory grows for a while, so a dense model's server may get the same load afterwards, to
be compared. Needs the package openai. Prints one JSON document; exits 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from openai import APIStatusError, DefaultHttpxClient, OpenAI

_NAMES = ("Riverton", "Ashford", "Millbrook", "Fairview", "Oakdale", "Stanton", "Marlow", "Hadley")
_WORDS = ("walnut", "copper", "lantern", "saddle", "barley", "anchor", "velvet", "cinder")
# vLLM closes what was idle for five seconds, after which OpenAI's client would forget it, too: a
# request that is sent just then is lost.
_LIMITS = httpx.Limits(max_connections=1000, keepalive_expiry=2)
_FILLER = "The road went on between the fields, and nobody spoke for a long while. "


class Client:
    """One client: a text with a secret of its own, and a question about it."""

    def __init__(self, number: int, words: int):
        draw = random.Random(number)
        self.secret = f"{draw.choice(_WORDS)}{number}"
        name = draw.choice(_NAMES)
        sentences = max(2, words // 14)
        place = draw.randrange(sentences)
        text = [_FILLER] * sentences
        text[place] = f"The password for {name} is {self.secret}. "
        question = f"What is the password for {name}?"
        self.messages = [{"role": "user", "content": "".join(text) + question}]
        self.wanted = ""


def reply(api: OpenAI, model: str, client: Client, tokens: int) -> str:
    done = api.chat.completions.create(
        model=model, messages=client.messages, max_tokens=tokens, temperature=0
    )
    return done.choices[0].message.content


def leave(api: OpenAI, model: str, client: Client, tokens: int) -> None:
    """Go away after the first piece of a stream."""
    stream = api.chat.completions.create(
        model=model, messages=client.messages, max_tokens=tokens, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()


def malformed(api: OpenAI, model: str) -> dict[str, int]:
    """Status of each request that no server may accept; one of 500 and more is a failure."""
    url = f"{str(api.base_url).rstrip('/')}/chat/completions"
    message = {"role": "user", "content": "hello"}
    good = {"model": model, "messages": [message], "max_tokens": 2}
    huge = {**good, "messages": [{**message, "content": "word " * 200_000}]}
    bodies = {
        "malformed JSON": b'{"model": ',
        "huge prompt": json.dumps(huge).encode(),
        "unknown model": json.dumps({**good, "model": "nobody"}).encode(),
        "negative max_tokens": json.dumps({**good, "max_tokens": -1}).encode(),
        "no messages": json.dumps({"model": model}).encode(),
    }
    return {name: status(url, body) for name, body in bodies.items()}


def status(url: str, body: bytes) -> int:
    """The code of the answer to a body as it is."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(asked, timeout=120).status
    except urllib.error.HTTPError as error:
        return error.code


def resident(pid: int | None) -> int:
    """Bytes of a process and all below it; 0 without one."""
    if pid is None:
        return 0
    total, todo = 0, [pid]
    while todo:
        at = todo.pop()
        try:
            pages = int(Path(f"/proc/{at}/statm").read_text().split()[1])
            children = Path(f"/proc/{at}/task/{at}/children").read_text().split()
        except OSError:
            continue
        total += 4096 * pages
        todo += [int(child) for child in children]
    return total


def memory(held: list[tuple[float, int]], answered: int) -> dict[str, float]:
    """Of (seconds, bytes) while all asked: the least and the most, in MiB, and how it grew.

    The slope is of a straight line through the second half, when every part has been used.

    Args:
        answered: replies in all this time.
    """
    late = held[len(held) // 2 :]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 1 else 0.0
    seconds = held[-1][0] - held[0][0]
    sizes = [size / 2**20 for _, size in held]
    return {
        "least": min(sizes),
        "most": max(sizes),
        "growth_per_minute": 60 * slope / 2**20,
        "growth_per_1000_replies": 1000 * slope * seconds / max(1, answered) / 2**20,
    }


def under_load(
    args: argparse.Namespace, url: str, name: str | None, pid: int | None
) -> dict[str, Any]:
    """What happens to one server.

    Args:
        url: with /v1. name: of its model, or None for the first that it lists.
        pid: of its process, or None where nobody looks at its memory.
    """
    web = DefaultHttpxClient(limits=_LIMITS, timeout=300)
    api = OpenAI(base_url=url, api_key="none", http_client=web, timeout=300, max_retries=0)
    model = name or api.models.list().data[0].id
    clients = [Client(number, args.words) for number in range(args.clients)]
    for client in clients:
        client.wanted = reply(api, model, client, args.tokens)
    counts: Counter[str] = Counter(told=sum(c.secret in c.wanted for c in clients))
    end = time.monotonic() + args.seconds
    lock = threading.Lock()

    def work(client: Client) -> None:
        turn = random.Random(client.secret)
        while time.monotonic() < end:
            kind = "left" if turn.random() < 0.1 else "answered"
            try:
                if kind == "left":
                    leave(api, model, client, args.tokens)
                elif reply(api, model, client, args.tokens) != client.wanted:
                    kind = "mixed"
            except APIStatusError as error:
                kind = f"status {error.status_code}"
            except Exception as error:
                kind = type(error).__name__
            with lock:
                counts[kind] += 1

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    held = []
    for thread in threads:
        while thread.is_alive():
            held.append((time.monotonic(), resident(pid)))
            thread.join(timeout=2)
    statuses = malformed(api, model)
    clean = all(400 <= status < 500 for status in statuses.values())
    still = reply(api, model, clients[0], args.tokens) == clients[0].wanted
    wrong = sum(n for kind, n in counts.items() if kind not in ("answered", "left", "told"))
    return {
        "ok": wrong == 0 and clean and still and counts["answered"] > 0,
        "requests": dict(counts),
        "distinct_replies": len({client.wanted for client in clients}),
        "malformed": statuses,
        "memory": memory(held, counts["answered"]),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The server's load, and then, where one is named, that of a dense model's."""
    found = under_load(args, args.url, args.model, args.pid)
    if args.dense_url:
        found["dense"] = under_load(args, args.dense_url, None, args.dense_pid)
        found["ok"] = found["ok"] and found["dense"]["ok"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--words", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--dense-url", help="of a second server, to compare memory with")
    parser.add_argument("--dense-pid", type=int)
    found = run(parser.parse_args())
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
