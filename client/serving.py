"""A worker's end of its pipes: commands in and replies out, as JSON lines, whatever user code does meanwhile.

A reply is {"done": ...}, {"refused": reason}, {"unfit": reason} for an update that the run would not take, or
{"error": type, "message": text}. User code runs in such a process and nowhere else, so whatever it does, the
agent lives on. Its prints go to standard error, because standard output carries the replies.
"""

import json
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from fedcore.errors import FedcoreError, UpdateRefused

Message = dict[str, Any]
Commands = Mapping[str, Callable[..., Message]]


class Unfit(FedcoreError):
    """An update of this device's own that the round would refuse; what is wrong with it stays here."""


def answer(commands: Commands, message: Message) -> Message:
    """Return the reply to one message, {"do": name of the command, ...}, whatever user code raises."""
    try:
        return {"done": commands[message.pop("do")](**message)}
    except UpdateRefused as error:
        return {"refused": str(error)}
    except Unfit as error:
        return {"unfit": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def serve(commands: Commands, messages: IO[str], replies: IO[str]) -> None:
    """Answer messages, and end the group at once when they end, even amid training: the agent is gone."""
    waiting: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in messages:
            waiting.put(line)
        os.killpg(0, signal.SIGKILL)

    Thread(target=listen, daemon=True).start()
    while True:
        reply = answer(commands, json.loads(waiting.get()))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main(commands: Commands) -> None:
    """Keep the pipes for the protocol, whatever user code reads or prints, and serve."""
    os.setpgrp()  # so that Ctrl-C reaches the agent alone, and an end all that the task has started
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # whose end costs least where memory is out
    messages, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    serve(commands, messages, replies)
