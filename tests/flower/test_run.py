"""A ServerApp as a whole: what it is given, how it may end, and what is told of it."""

import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException

from fedcore.errors import RunFailed, SpecError, TaskError
from fedcore.flower.app import App
from fedcore.flower.run import serve, simulate
from tests.flower.desk import Desk

CONFIG = {"rounds": 3, "lr": 0.5}
Main = Callable[[Grid, Context], None]


def serving(monkeypatch: pytest.MonkeyPatch, main: Main, desk: Desk, **options: Any) -> tuple[Any, App]:
    """Run a ServerApp of that main function over a carrier."""
    server = ServerApp()
    server.main()(main)
    app = App(Path("nowhere"), "lab/digits", "server:app", "client:app", CONFIG, {"lr": 0.5})
    monkeypatch.setattr(App, "load_server", lambda self: server)
    return serve(app, desk, 77, **options), app


def test_a_server_app_gets_what_flower_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def main(grid: Grid, context: Context) -> None:
        seen.extend([context, grid.run])
        replies = grid.send_and_receive(
            [
                Message(RecordDict({"c": ConfigRecord({"x": 1})}), node, "query")
                for node in grid.get_node_ids()
            ]
        )
        seen.extend(replies)

    desk = Desk()
    tally, _ = serving(monkeypatch, main, desk)
    context, run, *replies = seen
    assert (context.run_id, context.node_id, context.node_config) == (77, SUPERLINK_NODE_ID, {})
    assert (context.run_config, len(context.state)) == (CONFIG, 0)
    assert (run.run_id, run.fab_id, run.override_config) == (77, "lab/digits", {"lr": 0.5})
    assert len(replies) == 3 and (tally.sent, tally.answered) == (3, 3)
    assert desk.closed == [("finished", "")]


def test_a_server_app_that_raises_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def main(grid: Grid, context: Context) -> None:
        raise ZeroDivisionError("no round")

    desk = Desk()
    with pytest.raises(RunFailed, match="the ServerApp raised ZeroDivisionError: no round"):
        serving(monkeypatch, main, desk)
    assert desk.closed == [("failed", "the ServerApp raised ZeroDivisionError: no round")]
    assert "Traceback" in (logging.Formatter().format(caplog.records[-1]))


def test_a_server_app_may_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([None, 0, 3])

    def main(grid: Grid, context: Context) -> None:
        raise SystemExit(next(codes))

    desk = Desk()
    serving(monkeypatch, main, desk)
    serving(monkeypatch, main, desk)
    with pytest.raises(SystemExit) as caught:
        serving(monkeypatch, main, desk)
    assert caught.value.code == 3
    assert [closed[0] for closed in desk.closed] == ["finished", "finished", "failed"]


def test_a_run_that_is_stopped_from_elsewhere_is_no_error_of_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    def over(seconds: float) -> list[Any]:
        raise RunNotRunningException

    def main(grid: Grid, context: Context) -> None:
        try:
            grid.send_and_receive([Message(RecordDict(), 10, "query")])
        except Exception as error:  # which many apps do
            raise AssertionError from error

    def in_a_thread(grid: Grid, context: Context) -> None:
        with ThreadPoolExecutor() as pool:  # as ServerApps of the older kind do, for which it is a failure
            pool.submit(main, grid, context).exception()

    desk = Desk()
    monkeypatch.setattr(desk, "receive", over)
    for each in (main, in_a_thread):
        with pytest.raises(RunFailed, match="the run of lab/digits was stopped"):
            serving(monkeypatch, each, desk)
    assert [closed[0] for closed in desk.closed] == ["stopped", "stopped"]


def test_threads_that_a_server_app_leaves_wait_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Future[Any]] = []

    def main(grid: Grid, context: Context) -> None:
        pool = ThreadPoolExecutor()
        left.append(pool.submit(grid.send_and_receive, [Message(RecordDict(), 10, "query")]))
        pool.shutdown(wait=False)

    serving(monkeypatch, main, Desk(lambda message: None))
    assert isinstance(left[0].exception(timeout=2), RunNotRunningException)


def test_ctrl_c_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(grid: Grid, context: Context) -> None:
        raise KeyboardInterrupt

    desk = Desk()
    with pytest.raises(KeyboardInterrupt):
        serving(monkeypatch, main, desk)
    assert desk.closed[0][0] == "stopped"


def test_what_is_wrong_with_the_app_comes_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    desk = Desk()
    (tmp_path / "server_of_test_run.py").write_text("app = 1\n")
    with pytest.raises(TaskError, match="is a int"):
        serve(App(tmp_path, "lab/digits", "server_of_test_run:app", "client:app"), desk, 77)
    assert desk.closed[0][0] == "failed"


def test_a_seed_fixes_what_the_server_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []

    def main(grid: Grid, context: Context) -> None:
        drawn.append((*random.sample(list(grid.get_node_ids()), 2), random.random(), np.random.rand()))

    for seed in (1, 1, 2, None, None):
        serving(monkeypatch, main, Desk(), seed=seed)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


def test_a_server_app_of_the_older_kind_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With server_fn, a strategy of flwr.server, and a thread for each client."""
    from flwr.common import FitRes, Status, ndarrays_to_parameters
    from flwr.common.typing import Code
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    fitted: list[int] = []

    def fit(message: Message) -> Message:
        ins = compat.recorddict_to_fitins(message.content, keep_input=False)
        fitted.append(message.metadata.dst_node_id)
        res = FitRes(Status(Code.OK, ""), ins.parameters, 1, {})
        return Message(compat.fitres_to_recorddict(res, keep_input=False), reply_to=message)

    def components(context: Context) -> ServerAppComponents:
        start = ndarrays_to_parameters([np.ones(3)])
        strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=start)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    server = ServerApp(server_fn=components)
    monkeypatch.setattr(App, "load_server", lambda self: server)
    desk = Desk(fit)
    began = time.monotonic()
    tally = serve(App(Path("nowhere"), "lab/digits", "server:app", "client:app"), desk, 77)
    assert sorted(fitted) == [10, 10, 20, 20, 30, 30] and tally.answered == 6
    assert time.monotonic() - began < 2  # nobody sleeps between two looks


def test_a_federation_of_nobody_is_refused() -> None:
    with pytest.raises(SpecError, match="--num-supernodes 0: expected at least 1"):
        simulate(App(Path("nowhere"), "lab/digits", "server:app", "client:app"), 0)
