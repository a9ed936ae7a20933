"""The operator's client and commands against a real coordinator, when all is well and when it is not."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, RunFailed, SpecError
from fedcore.loopback import free_port
from fedcore.messages import Blob, Submission
from fedcore.model_files import load_model
from fedcore.operator import Operator
from fedcore.run_cli import app, line
from fedcore.spec import RunSpec
from fedcore.wire.v1.coordinator_pb2 import ListRequest, TaskName
from fedcore.wire.v1.relay_pb2 import AppHeader
from tests.server.conftest import (
    DIGEST,
    LAYOUT,
    METRICS,
    STRATEGY,
    TASK,
    Federation,
    Running,
    initial,
    reference,
    same,
    spec_of,
)


def submission(spec: RunSpec) -> Submission:
    parameters = initial(LAYOUT)
    return Submission(spec, TASK, DIGEST, LAYOUT, METRICS, Blob(parameters.digest, LAYOUT.nbytes))


def folder_of(identity: Identity, folder: Path, port: int) -> Path:
    """Write the folder of an operator."""
    identity.save(folder / "identity")
    (folder / "operator.toml").write_text(tomli_w.dumps({"coordinator": f"127.0.0.1:{port}"}))
    return folder


def served(
    running: Running,
    folder: Path,
    action: Callable[[Path], None],
    agents: int = 3,
    role: Role = "operator",
) -> None:
    """Run `action` with an operator's folder in a thread, while a coordinator and its agents run."""

    async def run() -> None:
        async with running() as federation:
            await federation.agents(agents)
            await asyncio.to_thread(
                action, folder_of(federation.identity(role, "alice"), folder, federation.port)
            )

    asyncio.run(run())


def test_an_operator_submits_watches_and_downloads(running: Running, tmp_path: Path) -> None:
    spec = spec_of(rounds=3)
    state, rows = reference(spec, LAYOUT, ["client-0", "client-1", "client-2"])

    def action(folder: Path) -> None:
        with Operator.connect(folder) as operator:
            run = operator.submit(submission(spec), initial(LAYOUT)).run
            seen = list(operator.watch(run))
            told = [json.loads(row) for info in seen for row in info.metrics]
            assert [{k: v for k, v in row.items() if k != "seconds"} for row in told] == rows
            assert seen[-1].state == "finished"
            layout, parameters = operator.parameters(run)
            assert layout == LAYOUT
            assert same(parameters.shared, state.parameters.shared)
            assert same(parameters.buffers, state.parameters.buffers)
            assert operator.show("test").run == run  # the name, while only one has it
            other = operator.submit(submission(spec), initial(LAYOUT)).run
            assert [info.run for info in operator.list()] == [other, run]
            assert operator.stop(other).state in ("stopped", "finished")
        with pytest.raises(SpecError, match="2 runs have the name 'test'; `fedcore run list`"):
            with Operator.connect(folder) as operator:
                operator.show("test")

    served(running, tmp_path / "alice", action)


def test_an_operator_goes_on_with_a_renewed_certificate(
    running: Running,
    tmp_path: Path,
    identity: Callable[[Role, str], Identity],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def action(folder: Path) -> None:
        with Operator.connect(folder) as operator:
            before = operator.stub
            assert operator.renew() == 43200.0
            assert operator.stub is before  # it is not due
            monkeypatch.setattr("fedcore.operator.renewed_if_due", lambda *_: identity("operator", "bob"))
            operator.renew()
            assert operator.stub is not before
            assert operator.list() == []
            assert list(before.List(ListRequest()).runs) == []  # what is in progress comes to its end

    served(running, tmp_path / "alice", action, agents=0)


def test_a_run_of_an_app_is_shown_without_rounds(running: Running, tmp_path: Path) -> None:
    def action(folder: Path) -> None:
        def said(*arguments: str) -> str:
            result = CliRunner().invoke(app, [*arguments, "--dir", str(folder)], catch_exceptions=False)
            return result.output

        with Operator.connect(folder) as operator:
            header = AppHeader(app=TaskName(name="lab/tiny", digest=DIGEST), name="tiny")
            run = operator.post.Open(header).run
            away = "agents that host it: 0; its ServerApp is not connected (if it has died: fedcore run stop)"
            assert said("show", "tiny") == f"{run}  lab/tiny  running  {away}\n"
            assert "/" not in said("list").replace("lab/tiny", "")
            assert said("stop", run) == f"{run} stopped\n"
            assert said("watch", run) == "by an operator\nstopped\n"

    served(running, tmp_path / "alice", action, agents=0)


def test_a_watcher_sees_every_round_once_and_complete(running: Running, tmp_path: Path) -> None:
    """A round is told when its evaluation is in, however the watcher and the rounds interleave."""

    def action(folder: Path) -> None:
        with Operator.connect(folder) as operator:
            run = operator.submit(submission(spec_of(rounds=12)), initial(LAYOUT)).run
            rows = [json.loads(row) for info in operator.watch(run) for row in info.metrics]
        assert [row["round"] for row in rows] == list(range(1, 13))
        assert all("loss" in row and "accuracy" in row for row in rows)

    served(running, tmp_path / "alice", action)


UNFIT = {
    "strategy": ({"strategy": {"name": "fedagv"}}, "did you mean 'fedavg'"),
    "part": ({"strategy": {**STRATEGY, "optimizer": {"name": "sgd", "lr": -1.0}}}, "lr > 0"),
    "limits": ({"limits": {"weight": 2.0**40, "update": 2.0**40}}, "lower [limits] weight or update"),
    "unresolved": ({"encryption": {"updates": "auto"}}, "hand the run in by `fedcore run submit`"),
    "encryption": (
        {"strategy": "krum", "cohort": {"minimum": 3}, "encryption": {"updates": "secagg"}},
        "looks at single updates",
    ),
    "masked cohort": ({"cohort": {"size": 3001}, "encryption": {"updates": "secagg"}}, "at most 3000"),
}


@pytest.mark.parametrize(("tables", "said"), UNFIT.values(), ids=UNFIT)
def test_a_run_that_cannot_work_is_refused_at_once(
    running: Running, tmp_path: Path, tables: dict[str, Any], said: str
) -> None:
    def action(folder: Path) -> None:
        with pytest.raises(SpecError) as error, Operator.connect(folder) as operator:
            operator.submit(submission(spec_of(**tables)), initial(LAYOUT))
        assert said in str(error.value)
        with Operator.connect(folder) as operator:
            assert operator.list() == []

    served(running, tmp_path / "alice", action, agents=0)


def test_initial_parameters_that_do_not_fit_are_refused_and_leave_nothing(
    running: Running, tmp_path: Path
) -> None:
    def action(folder: Path) -> None:
        wrong = submission(spec_of())
        sizes = Submission(wrong.spec, TASK, DIGEST, LAYOUT, METRICS, Blob(wrong.parameters.sha256, 8))
        altered = Submission(wrong.spec, TASK, DIGEST, LAYOUT, METRICS, Blob("0" * 64, LAYOUT.nbytes))
        for message, said in ((sizes, "have 8 bytes, the layout needs 188"), (altered, "expected 188 bytes")):
            with pytest.raises(SpecError, match=said), Operator.connect(folder) as operator:
                operator.submit(message, initial(LAYOUT))
        assert list((tmp_path / "coordinator" / "blobs").iterdir()) == []

    served(running, tmp_path / "alice", action, agents=0)


def test_what_goes_wrong_is_said_with_the_next_step(running: Running, tmp_path: Path) -> None:
    def action(folder: Path) -> None:
        for call in (Operator.show, Operator.stop, Operator.parameters, lambda o, r: list(o.watch(r))):
            with pytest.raises(SpecError, match="no run has the name 'x'; `fedcore run list`"):
                with Operator.connect(folder) as operator:
                    call(operator, "x")

    served(running, tmp_path / "alice", action, agents=0)


def test_a_client_is_told_that_it_is_no_operator(running: Running, tmp_path: Path) -> None:
    def action(folder: Path) -> None:
        with pytest.raises(AuthenticationError, match=r"client/alice is no operator; .*fedcore run enroll"):
            with Operator.connect(folder) as operator:
                operator.list()

    served(running, tmp_path / "client", action, agents=0, role="client")


def test_a_coordinator_that_does_not_run_is_named(
    identity: Callable[[Role, str], Identity], tmp_path: Path
) -> None:
    port = free_port()
    folder = folder_of(identity("operator", "alice"), tmp_path / "alice", port)
    with pytest.raises(FedcoreError, match=f"127.0.0.1:{port} cannot be reached; is it running"):
        with Operator.connect(folder) as operator:
            operator.list()


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedcore run enroll"), Operator.connect(tmp_path):
        pass
    (tmp_path / "operator.toml").write_text("coordinator = 7")
    with (
        pytest.raises(SpecError, match="expected HOST:PORT"),
        Operator.connect(tmp_path),
    ):
        pass


# --- the commands


def test_the_commands_of_a_run(running: Running, tmp_path: Path) -> None:
    def action(folder: Path) -> None:
        def fedcore(*arguments: str) -> str:
            result = CliRunner().invoke(app, [*arguments, "--dir", str(folder)], catch_exceptions=False)
            assert result.exit_code == 0, result.output
            return result.stdout

        with Operator.connect(folder) as operator:
            run = operator.submit(submission(spec_of(rounds=2)), initial(LAYOUT)).run
        watched = fedcore("watch", run).splitlines()
        assert watched[0].startswith("round 1/2  3 updates") and "accuracy" in watched[0]
        assert watched[-1].startswith("finished after 2 rounds, model ")
        digest = watched[-1].split()[-1]
        assert [json.loads(line)["round"] for line in fedcore("watch", run, "--json").splitlines()] == [1, 2]
        assert digest in fedcore("show", run)
        shown = json.loads(fedcore("show", run, "--json"))
        assert (shown["model_sha256"], shown["round"], len(shown["metrics"])) == (digest, 2, 2)
        assert json.loads(fedcore("list", "--json"))[0]["run"] == run
        assert run in fedcore("list") and "2/2" in fedcore("list")
        out = tmp_path / "model.safetensors"
        assert digest in fedcore("download", run, "--out", str(out))
        assert load_model(out)[1].digest == digest
        assert fedcore("stop", run) == f"{run} finished after 2 rounds\n"

    served(running, tmp_path / "alice", action)


def test_a_run_is_submitted_from_its_file(running: Running, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "echo_of_operator.py").write_text("from fedcore.bench.echo import Echo\n\ntask = Echo(5)\n")
    (home / "run.toml").write_text(
        '[run]\nname = "echo"\ntask = "echo_of_operator:task"\n[cohort]\nsize = 2\n'
    )

    def action(folder: Path) -> None:
        arguments = ["submit", str(home / "run.toml"), "--set", "run.rounds=1", "--dir", str(folder)]
        said = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert "updates: sealed: the coordinator alone reads every update; not secagg" in said.stderr
        assert "because a round may close with 2 clients, expected at least 5" in said.stderr
        result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
        told = json.loads(result.stdout)
        assert (told["name"], told["task"], told["rounds"]) == ("echo", "Echo", 1)
        CliRunner().invoke(app, ["stop", told["run"], "--dir", str(folder)], catch_exceptions=False)
        with pytest.raises(RunFailed), Operator.connect(folder) as operator:
            from fedcore.run_cli import show_progress

            info = operator.show(told["run"])
            info.state = "failed"
            show_progress([info], as_json=False)

    served(running, tmp_path / "alice", action, agents=0)


def test_a_skipped_round_is_shown_as_one() -> None:
    row = {"round": 3, "skipped": 1, "folded": 0, "refused": 2, "seconds": 1.25}
    assert line(row, 9) == "round 3/9  skipped, the model stays as it is  1.25 s"


def test_runs_are_listed_with_their_whole_id_however_narrow_the_terminal(
    running: Running, tmp_path: Path
) -> None:
    async def run() -> None:
        async with running() as federation:
            assert isinstance(federation, Federation)
            long = "a-run-with-a-rather-long-name-of-a-person"
            name = await federation.submit(spec_of(run={"name": long, "rounds": 1}))
            folder = folder_of(federation.identity("operator", "alice"), tmp_path / "alice", federation.port)
            arguments = ["list", "--dir", str(folder)]
            result = await asyncio.to_thread(lambda: CliRunner().invoke(app, arguments))
            assert name in result.stdout

    asyncio.run(run())
