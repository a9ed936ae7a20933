"""A ClientApp, called as Flower calls it: one message, the node's context, one reply."""

import random
import sys
from collections.abc import Mapping
from functools import cache
from logging import ERROR

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.constant import ErrorCode
from flwr.supercore import log, object_ref

from fedcore.flower.app import App
from fedcore.flower.letters import Answer, Letter, answer_of, failed, message_of, overrides_of
from fedcore.flower.records import pack, unpack

# NumPy has no such type, so Flower's records have none; torch's own message does not say what to do.
BFLOAT16 = (
    "; Flower's records hold NumPy arrays, which have no bfloat16: make it of {name: tensor.float() "
    "for name, tensor in model.state_dict().items()}, which loses nothing; load_state_dict() casts it back"
)


def load(app: App) -> ClientApp:
    """Import the ClientApp of an app, as Flower does; raises LoadClientAppError with the reason."""
    try:
        found = object_ref.load_app(app.client, LoadClientAppError, app.folder)
    except LoadClientAppError:
        raise
    except (Exception, SystemExit) as error:
        raise LoadClientAppError(f"importing {app.client!r} raised {_said(error)}") from error
    if not isinstance(found, ClientApp):
        raise LoadClientAppError(
            f"{app.client!r} is a {type(found).__name__}, expected a flwr.clientapp.ClientApp"
        )
    return found


def answer(
    app: ClientApp,
    letter: Letter,
    node_config: Mapping[str, UserConfigValue],
    run_config: Mapping[str, UserConfigValue],
    state: bytes,
    seed: int | None,
) -> tuple[Answer, bytes]:
    """Give a letter to the app; return the answer and the node's new state.

    run_config: of the app, over which the letter's own is laid. state: the packed `context.state` of this
    node in this run, empty at first; where the app raises it stays what it was, and the answer is Flower's
    error. seed: for random, NumPy and torch; None leaves them as they are. Raises ProtocolError where letter
    or state are malformed.
    """
    message, config = message_of(letter), {**run_config, **overrides_of(letter)}
    kept = unpack(state) if state else RecordDict()
    context = Context(message.metadata.run_id, letter.node, dict(node_config), kept, config)
    if seed is not None:
        reseed(seed)
    try:
        reply = app(message, context)
        if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != letter.id:
            raise TypeError(
                f"the ClientApp returned {type(reply).__name__}, expected Message(content, reply_to=message)"
            )
        return answer_of(reply), pack(context.state) if context.state else b""
    except (Exception, SystemExit) as error:
        log(ERROR, "ClientApp raised an exception", exc_info=error)
        return failed(letter.id, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _said(error)), state


def reseed(seed: int) -> None:
    """Seed the global generators of random, NumPy and, where it is imported, torch.

    seed: 63 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        # torch.manual_seed also notes, with the stack of its caller, what a GPU that nobody uses would need.
        torch.default_generator.manual_seed(seed)
        if _has_gpu():
            torch.cuda.manual_seed_all(seed)


@cache
def _has_gpu() -> bool:
    """Return whether torch, which has been imported, can use a GPU; to ask the driver takes a while."""
    return bool(sys.modules["torch"].cuda.is_available())


def _said(error: BaseException) -> str:
    """Return an exception in Flower's form, and what to do where torch does not say it."""
    return f"{type(error)}:<'{error}'>" + (BFLOAT16 if "BFloat16" in str(error) else "")
