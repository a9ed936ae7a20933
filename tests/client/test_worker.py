"""The training process, as a process: what it computes, and how it ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedcore.client.kept import load_kept, save_kept
from fedcore.client.process import WorkerProcess, WorkFailed
from fedcore.client.training import Kept, trainer_for
from fedcore.client.worker import Job, read, write
from fedcore.crypto import hpke
from fedcore.data import save_split
from fedcore.errors import UpdateRefused
from fedcore.layout import Entry, Layout
from fedcore.messages import Ref, Update
from fedcore.privacy.distributed import decode
from fedcore.simulations.answers import ClientStates
from fedcore.simulations.borrowed import threads
from fedcore.simulations.population import Population
from fedcore.simulations.sequential import Sequential
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.rounds import evaluate_plan, train_plan
from fedcore.strategies.terms import check
from fedcore.strategies.words import encoded
from fedcore.tasks import Digits
from fedcore.wire import sealing

pytestmark = pytest.mark.slow  # worker processes and models, half a minute together

Federation = Any  # of conftest, which importlib mode cannot import
COMMAND = [sys.executable, "-P", "-m", "fedcore.client.worker"]

NORMED = """
from torch import nn

import fedcore


class Normed(fedcore.Task):
    def model(self):
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
"""


def order(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a piece of work for Moody."""
    (folder / "parameters").write_bytes(np.ones(4, "<f4").tobytes())
    fields = {
        "task": "Moody",
        "digest": "",
        "spec": RunSpec().model_dump_json(),
        "layout": Layout((Entry("w", (4,), "float32", "shared"),)).digest,
        "ref": ["run", 1, 0, "train"],
        "client": "client-000000",
        "options": {},
        "evaluator": False,
        "parameters": str(folder / "parameters"),
        "kept": str(folder / "kept"),
        "keep": str(folder / "keep"),
        "out": str(folder / "out"),
        "clip": 0.0,
        "cohort": 2,
        "encryption": "tls",
        "public": "",
        "bound": "",
    }
    return {**fields, **changes}


def ask(worker: WorkerProcess, **message: Any) -> dict[str, Any]:
    """Describe, work and stop; the digest is filled in."""

    async def run() -> dict[str, Any]:
        try:
            digest = (await worker.describe())[message["task"]]
            return await worker.work(30.0, **{**message, "digest": message["digest"] or digest})
        finally:
            await worker.stop()

    return asyncio.run(run())


def moody(federation: Federation) -> WorkerProcess:
    return WorkerProcess(federation.agent_folder(), {"Moody": "moody:Moody"})


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_it_trains_as_the_simulation_does(tmp_path: Path, strategy: str) -> None:
    spec = RunSpec().with_(
        "run.seed=5", "client.epochs=2", "simulation.clients=3", "run.task=fedcore.tasks:Digits"
    )
    spec = spec.with_(f"strategy={strategy}")
    population, states = Population(Digits(), spec), ClientStates()
    trainer, names = trainer_for(population.task, spec), tuple(population.names)
    composed, layout, rng = from_table(spec.strategy), trainer.layout, np.random.default_rng(0)
    extra = {
        name: 0.01 * rng.standard_normal(layout.shared_size).astype(np.float32)
        for name in composed.algorithm.receives
    }
    parameters, name = replace(trainer.parameters(), extra=extra), names[1]
    states.commit({name: {key: -vector for key, vector in extra.items()}})
    plan = train_plan(composed, spec, layout, Ref("run", 2, 0, "train"), names, 3)
    answers: dict[str, tuple[Update, Kept]] = {}
    with threads(1):
        for part in Sequential(population, trainer, states).answer(plan, parameters):
            answers |= zip(part.clients, zip(part.rows.updates(), part.kept, strict=True), strict=True)
    update, kept = answers[name]

    blob = [*parameters.vectors().values(), *extra.values()]
    (tmp_path / "blob").write_bytes(b"".join(vector.tobytes() for vector in blob))
    save_kept(tmp_path / "kept", states[name])
    save_split(tmp_path / "data.npz", population.split(name))
    done = ask(
        WorkerProcess(tmp_path, {"Digits": "fedcore.tasks:Digits"}),
        **order(tmp_path, task="Digits", layout=layout.digest, client=name, ref=["run", 2, 0, "train"])
        | {"spec": spec.model_dump_json(exclude={"simulation"}), "options": {"path": "data.npz"}}
        | {"parameters": str(tmp_path / "blob")},
    )
    assert (tmp_path / "out").read_bytes() == b"".join(vector.tobytes() for vector in update.vectors.values())
    assert done["scalars"] == update.scalars
    assert done["vectors"] == [[key, len(vector)] for key, vector in update.vectors.items()]
    found = load_kept(tmp_path / "keep")
    assert {key: v.tobytes() for key, v in kept.items()} == {key: v.tobytes() for key, v in found.items()}
    assert set(kept) == set(composed.algorithm.keeps)


def asked(federation: Federation, kind: str, **changes: Any) -> tuple[dict[str, Any], bytes]:
    """Have Moody work, and return the head and the payload."""
    work = {"ref": ["run", 5, 0, kind], "evaluator": kind != "train", **changes}
    done = ask(moody(federation), **order(federation.folder, **work))
    return done, (federation.folder / "out").read_bytes()


@pytest.mark.parametrize("kind", ["root", "evaluate"])
def test_a_sealed_update_opens_to_what_would_have_been_sent(federation: Federation, kind: str) -> None:
    key, bound = hpke.new_key(), b"this attempt"
    public = hpke.public_bytes(key)
    plain, payload = asked(federation, kind)
    head, sealed = asked(federation, kind, encryption="sealed", public=public.hex(), bound=bound.hex())
    assert (head["vectors"], head["scalars"]) == ([], {})
    size = len(payload) + 8 * len(plain["scalars"])
    assert len(sealed) == head["size"] == size + sealing.HEAD + sealing.TAG
    numbers = np.array(
        [plain["scalars"][name] for name in sorted(plain["scalars"], key=order_of(kind).index)]
    )
    whole = np.frombuffer(sealed, np.uint8)
    assert sealing.Sealed(key, whole, bound).read(0, size) == numbers.tobytes() + payload
    with pytest.raises(UpdateRefused):
        sealing.Sealed(key, whole, b"another attempt")


def order_of(kind: str) -> list[str]:
    """Return the scalars of Moody's plans, in their order."""
    return ["loss", "accuracy", "count"] if kind == "evaluate" else ["weight", "loss", "count"]


@pytest.mark.parametrize("sets", [(), ("encryption.encoding=q32", "limits.norm=9.0")])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_words_are_those_of_the_coordinators_plan(
    federation: Federation, kind: Any, sets: tuple[str, ...]
) -> None:
    """Who is in the cohort changes nothing; how many are changes the words."""
    spec = RunSpec().with_("encryption.updates=secagg", "encryption.encoding=exact", *sets)
    layout, ref = Layout((Entry("w", (4,), "float32", "shared"),)), Ref("run", 5, 0, kind)
    plain, payload = asked(federation, kind)
    vectors = {"delta": np.frombuffer(payload, "<f4")} if payload else {}
    for cohort in (5, 9):
        clients = tuple(f"clinic-{i}" for i in range(cohort))
        plan = evaluate_plan(spec, ref, clients, ("loss", "accuracy"))
        if kind == "train":
            plan = train_plan(from_table(spec.strategy), spec, layout, ref, clients, 20)
        message = {"spec": spec.model_dump_json(), "encryption": "secagg", "cohort": cohort}
        head, words = asked(federation, kind, **message)
        file = BytesIO()
        encoded(plan, Update(vectors, plain["scalars"])).write(file)
        assert words == file.getvalue() and head["size"] == plan.payload
        assert head["words"] == [8 * plan.word.itemsize, plan.narrow, plan.wide]
        assert plan.narrow == (4 if sets and kind == "train" else 0)
        assert (head["vectors"], head["scalars"]) == ([], {})


@pytest.mark.parametrize("encryption", ["sealed", "secagg"])
def test_what_is_wrong_with_an_update_stays_on_the_device(federation: Federation, encryption: str) -> None:
    with pytest.raises(WorkFailed, match=r"delta has a coordinate that is not finite") as refused:
        asked(federation, "train", ref=["run", 106, 0, "train"], encryption=encryption)
    assert "delta" not in refused.value.public


def test_a_cohort_larger_than_the_run_asks_is_refused(federation: Federation) -> None:
    with pytest.raises(UpdateRefused, match="is said to have 11 clients; the run asks 10 at most"):
        asked(federation, "train", encryption="secagg", cohort=11)


def test_what_is_kept_goes_beside_the_update_and_an_evaluation_changes_nothing(
    federation: Federation,
) -> None:
    keep, kept = federation.folder / "keep", federation.folder / "kept"
    ask(moody(federation), **order(federation.folder, ref=["run", 5, 0, "train"]))
    assert load_kept(keep)["rounds"] == 5 and keep.stat().st_mode & 0o777 == 0o600
    keep.rename(kept)
    ask(moody(federation), **order(federation.folder, ref=["run", 6, 0, "train"]))
    assert load_kept(keep)["rounds"] == 11
    keep.unlink()
    evaluation = order(federation.folder, ref=["run", 6, 0, "evaluate"], evaluator=True)
    ask(moody(federation), **evaluation)
    assert not keep.exists() and federation.lines("kept.txt")[-1] == "evaluate:5"


def test_the_trusted_update_is_trained_on_the_root_data_and_keeps_nothing(federation: Federation) -> None:
    done = ask(moody(federation), **order(federation.folder, ref=["run", 5, 0, "root"], evaluator=True))
    assert done["scalars"]["weight"] == 2.0 and not (federation.folder / "keep").exists()


def test_an_evaluator_without_root_data_says_so(federation: Federation) -> None:
    worker = moody(federation)
    file = federation.folder / "agent" / "moody.py"
    file.write_text(file.read_text().replace("def root", "def no_root"))
    with pytest.raises(UpdateRefused, match=r"Moody.root\(\) returned nothing"):
        ask(worker, **order(federation.folder, ref=["run", 1, 0, "root"], evaluator=True))


def test_a_strategy_that_is_not_installed_here_is_refused(federation: Federation) -> None:
    spec = RunSpec.parse({"strategy": {"algorithm": "fedbest"}})
    with pytest.raises(UpdateRefused, match=r"'fedbest' is not known.* install it on this device too"):
        ask(moody(federation), **order(federation.folder, spec=spec.model_dump_json()))
    assert federation.lines("trained.txt") == []


def test_files_that_have_changed_since_the_agent_announced_them_do_not_run(federation: Federation) -> None:
    with pytest.raises(UpdateRefused, match="the files of Moody have changed"):
        ask(moody(federation), **order(federation.folder, digest="0" * 64))
    assert federation.lines("trained.txt") == []


def test_parameters_of_another_size_are_refused(federation: Federation) -> None:
    message = order(federation.folder)
    Path(message["parameters"]).write_bytes(bytes(12))
    with pytest.raises(UpdateRefused, match="12 bytes, the layout needs 16"):
        ask(moody(federation), **message)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"Moody": "moody:Mody"}, r"tasks.Moody: .* did you mean 'Moody'\?"),
        ({"Sunny": "moody:Moody"}, "tasks.Sunny: 'moody:Moody' is named 'Moody'; expected Moody = "),
        ({"Moody": "nowhere:Moody"}, "tasks.Moody: .*no module 'nowhere'"),
    ],
)
def test_a_task_that_cannot_be_had_is_named(
    federation: Federation, tasks: dict[str, str], message: str
) -> None:
    worker = WorkerProcess(federation.agent_folder(), tasks)
    with pytest.raises(WorkFailed, match=f"importing what agent.toml allows raised TaskError: {message}"):
        asyncio.run(worker.describe())
    assert worker.process is None


@contextmanager
def raw(federation: Federation) -> Iterator["subprocess.Popen[str]"]:
    """Run a worker on plain pipes, in the middle of a training step that takes a minute."""
    folder, pipe = federation.agent_folder(), subprocess.PIPE
    with subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=folder) as process:
        try:
            assert process.stdin and process.stdout and process.stderr
            describe = {"do": "describe", "folder": str(folder), "tasks": {"Moody": "moody:Moody"}}
            process.stdin.write(json.dumps(describe) + "\n")
            process.stdin.flush()
            digest = json.loads(process.stdout.readline())["done"]["Moody"]
            work = order(federation.folder, digest=digest, ref=["run", 103, 0, "train"])
            process.stdin.write(json.dumps({"do": "work", **work}) + "\n")
            process.stdin.flush()
            assert process.stderr.readline() == "a task may print\n"  # and not on the replies' way
            yield process
        finally:
            process.kill()


def test_it_ends_at_once_when_the_agent_is_gone(federation: Federation) -> None:
    with raw(federation) as process:
        assert process.stdin
        process.stdin.close()
        assert process.wait(timeout=5) == -signal.SIGKILL


def test_it_leads_a_group_so_that_ctrl_c_is_the_agents_business(federation: Federation) -> None:
    with raw(federation) as process:
        assert os.getpgid(process.pid) == process.pid
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"


@pytest.mark.parametrize("number", [pytest.param(107, marks=pytest.mark.slow), 108])
def test_over_its_memory_limit_it_ends_with_its_children(federation: Federation, number: int) -> None:
    """Four children hold 240 MB between them, none of which is beyond the limit alone."""
    worker = WorkerProcess(federation.agent_folder(), {"Moody": "moody:Moody"}, "200MiB")
    with pytest.raises(WorkFailed, match="went over its memory limit of 200MiB") as failed:
        ask(worker, **order(federation.folder, ref=["run", number, 0, "train"]))
    assert failed.value.public == str(failed.value)
    holders = [Path("/proc", holder) for holder in federation.lines("holders.txt")]
    assert len(holders) == (1 if number == 107 else 4)
    asyncio.run(federation.until(lambda: not any(holder.exists() for holder in holders)))


@given(
    st.sampled_from(["float32", "float64"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.data(),
)
def test_an_update_is_written_as_its_numbers_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, lengths: list[int], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("spool") / "update"
    layout = Layout((Entry("w", (sum(lengths),), dtype, "shared"),))
    vectors = {f"v{i}": data.draw(arrays.arrays(dtype, length)) for i, length in enumerate(lengths)}
    written = write(vectors.values(), path)
    assert written["size"] == path.stat().st_size == sum(lengths) * np.dtype(dtype).itemsize
    everything = np.concatenate(list(vectors.values()))
    assert written["sha256"] == sha256(everything.tobytes()).hexdigest()
    assert read(path, layout).shared.tobytes() == everything.tobytes()


def test_what_is_broadcast_is_read_from_behind_the_model(tmp_path: Path) -> None:
    layout = Layout((Entry("w", (2,), "float32", "shared"), Entry("b", (1,), "float32", "buffer")))
    (tmp_path / "blob").write_bytes(np.arange(7, dtype="<f4").tobytes())
    parameters = read(tmp_path / "blob", layout, ("first", "second"))
    assert (parameters.shared.tolist(), parameters.buffers.tolist()) == ([0, 1], [2])
    assert {key: v.tolist() for key, v in parameters.extra.items()} == {"first": [3, 4], "second": [5, 6]}
    with pytest.raises(UpdateRefused, match="28 bytes, the layout needs 20"):
        read(tmp_path / "blob", layout, ("first",))


def test_the_same_work_asked_for_twice_has_other_noise(tmp_path: Path) -> None:
    """Equal noise would cancel in the difference of two updates, made from parameters that differ."""
    table = {"level": "example", "noise_multiplier": 1.0, "sampling_rate": 0.1}
    spec = RunSpec.parse({"run": {"task": "fedcore.tasks:Digits"}, "client": {"steps": 2}, "privacy": table})
    save_split(
        tmp_path / "data.npz", Population(Digits(), spec.with_("simulation.clients=9")).split("client-000000")
    )
    job = Job(Digits(), spec, "client-000000", {"path": str(tmp_path / "data.npz")}, False)
    ref, parameters = Ref("run", 1, 0, "train"), job.trainer.parameters()
    with threads(1):
        sent = [job.work(ref, parameters, {}, 0.0)[0].vectors["delta"] for _ in range(2)]
    noise = np.subtract(*sent)
    assert np.std(noise) > 0.5 * np.std(sent[0]), "as of two independent draws"


def test_a_part_of_the_noise_is_in_words_of_the_coordinators_plan(tmp_path: Path) -> None:
    """Two shares of one update: as the plan asks, of other noise, and both of the clipped update."""
    table = {"level": "distributed", "noise_multiplier": 0.002, "clip_norm": 0.1}
    spec = RunSpec.parse({"run": {"task": "fedcore.tasks:Digits"}, "privacy": table})
    population = Population(Digits(), spec.with_("simulation.clients=9"))
    save_split(tmp_path / "data.npz", population.split("client-000000"))
    job = Job(Digits(), spec, "client-000000", {"path": str(tmp_path / "data.npz")}, False)
    ref, parameters = Ref("run", 1, 0, "train"), job.trainer.parameters()
    plan = train_plan(job.strategy, spec, job.trainer.layout, ref, tuple("abcdefgh"), 20)
    with threads(1):
        shares = [job.work(ref, parameters, {}, 0.0)[0] for _ in range(2)]
    decoded = []
    for share in shares:
        check(plan, share)
        assert plan.distributed and not share.scalars
        vector = np.empty(plan.distributed.dimension)
        decoded.append(decode(encoded(plan, share).narrow, plan.distributed, vector))
    one, other = decoded
    assert not np.array_equal(one, other)
    assert [np.linalg.norm(vector) for vector in decoded] == pytest.approx([0.1, 0.1], rel=0.05)
    assert np.linalg.norm(one - other) < 0.02


def test_a_model_that_cannot_be_private_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    table = {"level": "example", "noise_multiplier": 1.0, "sampling_rate": 0.1}
    spec = RunSpec.parse({"privacy": table}).model_dump_json(exclude={"simulation"})
    with pytest.raises(UpdateRefused, match=r"use nn\.GroupNorm"):
        ask(WorkerProcess(tmp_path, {"Normed": "normed:Normed"}), **order(tmp_path, task="Normed", spec=spec))
