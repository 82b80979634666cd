"""A worker that answers what clients send, of which any number can run: they share an agent's inbox.

    python inbox_worker.py <name> [--agent AGENT]

Start some with different names, and kill one in the middle of an answer: after IDLE_SECS another goes on where it
stopped. The proxy needs INBOX=true, the worker REDIS_URL. A worker does one thing at a time.
"""

import argparse
import json
import os
import time

import redis as redis_py

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
GROUP = "answers"
# A worker that has not said for so long that it still works on an entry is dead.
IDLE_SECS = float(os.environ.get("IDLE_SECS", "5"))
WORD_DELAY_SECS = 0.05

redis = redis_py.Redis.from_url(REDIS_URL, decode_responses=True)


def answer(question: str) -> list[str]:
    """Stands in for a language model, which would be asked again with what has been said already."""
    return f"You said {question} and this is what any of us has to say about it, word by word.".split()


def still_mine(inbox: str, name: str, entry: str) -> None:
    redis.xclaim(inbox, GROUP, name, 0, [entry], justid=True)


def stream(inbox: str, name: str, entry: str, fields: dict[str, str]) -> None:
    """Streams an answer from where a worker before us stopped, and no further when all clients have gone."""
    session = fields["session"]
    channel, done, vacant = f"session:{session}:down", f"answer:{entry}", f"vacant:{session}"
    words = answer(fields["data"])
    for at in range(int(redis.get(done) or 0), len(words)):
        if redis.exists(vacant):
            print(f"{name}: {session} is vacant, stopped", flush=True)
            return
        # Two workers may answer two questions of one session at once: `answer` says which words belong together.
        text = json.dumps({"type": "word", "answer": entry, "at": at, "text": words[at]})
        # The nonce keeps a word from being sent twice when its sender died before it could note it down.
        redis.fcall("wsproxy_send", 1, channel, text, f"{entry}/{at}")
        redis.set(done, at + 1, ex=3600)
        still_mine(inbox, name, entry)
        time.sleep(WORD_DELAY_SECS)
    redis.fcall("wsproxy_send", 1, channel, json.dumps({"type": "end", "answer": entry}), f"{entry}/end")
    print(f"{name}: {session} answered", flush=True)


def handle(inbox: str, name: str, entry: str, fields: dict[str, str]) -> None:
    match fields["type"]:
        case "message":
            stream(inbox, name, entry, fields)
        case "connected":
            redis.delete(f"vacant:{fields['session']}")
        case "vacated":
            redis.set(f"vacant:{fields['session']}", 1, ex=3600)
    redis.xack(inbox, GROUP, entry)


def next_entries(inbox: str, name: str) -> list[tuple[str, dict[str, str]]]:
    """What a dead worker left, else what is new."""
    _, left, _ = redis.xautoclaim(inbox, GROUP, name, int(IDLE_SECS * 1000), count=1)
    if left:
        print(f"{name}: goes on with {left[0][0]}", flush=True)
        return left
    streams = redis.xreadgroup(GROUP, name, {inbox: ">"}, count=1, block=1000)
    return streams[0][1] if streams else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--agent", default="agent")
    options = parser.parse_args()
    inbox = f"agent:{options.agent}:inbox"
    try:
        # From the first entry on, also of those from before any worker was started.
        redis.xgroup_create(inbox, GROUP, id="0", mkstream=True)
    except redis_py.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise
    print(f"{options.name}: ready", flush=True)
    while True:
        try:
            for entry, fields in next_entries(inbox, options.name):
                handle(inbox, options.name, entry, fields)
        except redis_py.ConnectionError as error:
            print(f"Redis: {error}", flush=True)
            time.sleep(1)


if __name__ == "__main__":
    main()
