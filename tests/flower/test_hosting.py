import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode

from fedcore.errors import ProtocolError
from fedcore.flower.app import App
from fedcore.flower.hosting import answer, load, reseed
from fedcore.flower.letters import Letter, letter_of, reply_of
from fedcore.flower.records import pack, unpack

Ask = Callable[..., tuple[Message, bytes]]
CONFIG = RecordDict({"config": ConfigRecord({"server-round": 3})})


def sent(kind: str = "train", content: RecordDict = CONFIG) -> Message:
    return make_message(Metadata(5, "m-1", 1, 77, "", "3", 1700000000.0, 3600.0, kind), content=content)


def ask(
    app: ClientApp, message: Message | None = None, state: bytes = b"", seed: int | None = None
) -> tuple[Message, bytes]:
    message = message or sent()
    letter = letter_of(message, pack(message.content), {"lr": 0.5})
    said, state = answer(
        app, letter, {"partition-id": 2, "num-partitions": 9}, {"lr": 0.1, "n": 1}, state, seed
    )
    return reply_of(said, message.metadata), state


def measured(message: Message, **metrics: float) -> Message:
    return Message(RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=message)


def test_the_app_sees_flowers_context_and_the_letters_run_config_over_its_own() -> None:
    app, seen = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append((message, context))
        return measured(message, x=1.5)

    reply, _ = ask(app)
    ((message, context),) = seen
    assert (context.run_id, context.node_id) == (5, 77)
    assert context.node_config == {"partition-id": 2, "num-partitions": 9}
    assert context.run_config == {"lr": 0.5, "n": 1} and len(context.state) == 0
    assert message.metadata == sent().metadata and message.content == CONFIG
    assert reply.content["metrics"]["x"] == 1.5 and reply.metadata.src_node_id == 77


def test_what_a_node_keeps_comes_back_with_its_next_message() -> None:
    app = ClientApp()

    @app.query("count")
    def count(message: Message, context: Context) -> Message:
        before = context.state.metric_records.get("kept", MetricRecord({"n": 0}))["n"]
        assert isinstance(before, int)
        context.state["kept"] = MetricRecord({"n": before + 1})
        return measured(message, before=before)

    state = b""
    for expected in range(3):
        reply, state = ask(app, sent("query.count"), state)
        assert reply.content["metrics"]["before"] == expected
    assert unpack(state)["kept"]["n"] == 3


def test_mods_and_lifespan_wrap_the_function() -> None:
    heard: list[object] = []

    def mod(message: Message, context: Context, call: ClientAppCallable) -> Message:
        heard.append("mod")
        message.content.config_records["config"]["server-round"] = 4  # in place: of this node's copy
        return call(message, context)

    app = ClientApp(mods=[mod])

    @app.lifespan()
    def lifespan(_: Context) -> Iterator[None]:
        heard.append("in")
        yield
        heard.append("out")

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        heard.append(message.content["config"]["server-round"])
        return measured(message)

    message = sent("evaluate")
    ask(app, message)
    assert heard == ["in", "mod", 4, "out"] and message.content["config"]["server-round"] == 3


def test_what_the_app_raises_is_flowers_error_and_the_state_stays() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state["half"] = MetricRecord({"n": 1})
        raise ZeroDivisionError("division by zero")

    reply, state = ask(app, state=pack(CONFIG))
    expected = "<class 'ZeroDivisionError'>:<'division by zero'>"
    assert reply.error == Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, expected) and state == pack(CONFIG)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        raise SystemExit(3)

    assert ask(app, sent("evaluate"))[0].error.reason == "<class 'SystemExit'>:<'3'>"
    reply, _ = ask(app, sent("query"))
    assert reply.error.reason == "<class 'ValueError'>:<'No query function registered with name 'default''>"


@pytest.mark.parametrize("wrong", [None, CONFIG, sent()])
def test_what_is_no_reply_is_an_error(wrong: object) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        return wrong  # type: ignore[return-value] # as an app may

    reply, _ = ask(app)
    assert "expected Message(content, reply_to=message)" in str(reply.error.reason)


def test_bfloat16_is_refused_with_what_to_do() -> None:
    app, model = ClientApp(), {"w": torch.tensor([1.5, 3.0e38, 1e-40], dtype=torch.bfloat16)}

    @app.train()
    def train(message: Message, _: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord(model)}), reply_to=message)

    reply, _ = ask(app)
    assert "unsupported ScalarType BFloat16" in str(reply.error.reason)
    assert "tensor.float() for name, tensor in" in str(reply.error.reason)
    # And what it says to do loses nothing.
    sent_instead = ArrayRecord({name: tensor.float() for name, tensor in model.items()})
    back = unpack(pack(RecordDict({"a": sent_instead}))).array_records["a"].to_torch_state_dict()
    assert torch.equal(back["w"].bfloat16(), model["w"])


def test_a_seed_decides_what_the_global_generators_give_and_none_leaves_them() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        return measured(message, a=random.random(), b=np.random.rand(), c=float(torch.rand(())))

    def drawn(seed: int | None) -> list[object]:
        return list(ask(app, seed=seed)[0].content["metrics"].values())

    assert drawn(2**63 - 1) == drawn(2**63 - 1) != drawn(1)
    reseed(8)
    assert drawn(None) != drawn(None)


def test_a_malformed_letter_is_not_given_to_the_app() -> None:
    with pytest.raises(ProtocolError):
        answer(ClientApp(), Letter("m", 2, b"{}", b""), {}, {}, b"", None)
    good = letter_of(sent(), pack(CONFIG))
    with pytest.raises(ProtocolError):
        answer(ClientApp(), good, {}, {}, b"no state", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", "importing 'side_0:app' raised <class 'ModuleNotFoundError'>"),
        ("other = 1", "Unable to load attribute app from module side_1"),
        ("app = 3", "'side_2:app' is a int, expected a flwr.clientapp.ClientApp"),
        ("1 / 0", "importing 'side_3:app' raised <class 'ZeroDivisionError'>:<'division by zero'>"),
    ],
)
def test_an_app_that_cannot_be_loaded_says_why(
    text: str, reason: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    name = reason.partition("side_")[2][0]
    (tmp_path / f"side_{name}.py").write_text(text)
    with pytest.raises(LoadClientAppError) as caught:
        load(App(tmp_path, "a/b", "", f"side_{name}:app"))
    assert reason in str(caught.value)
