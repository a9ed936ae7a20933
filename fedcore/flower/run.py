"""A Flower app as a whole: its ServerApp in this process, its ClientApps wherever a carrier brings messages.

    simulate(app, nodes)              worker processes of this machine
    deploy(app, mail)                 devices, by a coordinator

Both come down to `serve`.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from logging import ERROR
from time import perf_counter
from typing import TYPE_CHECKING, Any

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore import log
from flwr.supercore.run import Run, RunNotRunningException

from fedcore import seeds
from fedcore.errors import FedcoreError, RunFailed, SpecError
from fedcore.flower import arrays
from fedcore.flower.app import App
from fedcore.flower.grid import Carrier, End, Fleet, Tally
from fedcore.flower.guards import FINITE, Limits
from fedcore.flower.hosting import reseed
from fedcore.flower.letters import node_id
from fedcore.interrupts import BOTH, handled

if TYPE_CHECKING:
    from fedcore.flower.mail import Mail

Notice = Callable[[Tally], None]


def silent(tally: Tally) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a ServerApp that has finished leaves, beside the files that it wrote itself.

    nodes, workers: of a simulation; None where devices took part. seconds: from the start of its import.
    """

    app: str
    run: str
    tally: Tally
    seconds: float
    nodes: int | None = None
    workers: int | None = None

    def summary(self) -> dict[str, Any]:
        """Return it as JSON shows it."""
        return {**asdict(self), "messages_per_second": self.tally.speed}


def simulate(
    app: App,
    nodes: int,
    *,
    seed: int = 0,
    workers: int = 0,
    limits: Limits = FINITE,
    notice: Notice = silent,
) -> Outcome:
    """Run an app with so many nodes in worker processes of this machine.

    seed: of the random numbers of both sides (random, NumPy, PyTorch), so that the same run gives the same
    result. workers: processes; 0: as many as are worth it. Raises RunFailed where the ServerApp raises, and
    TaskError where one of the app's sides cannot be imported.
    """
    from fedcore.flower.hosts import Hosts

    if nodes < 1:
        raise SpecError(f"--num-supernodes {nodes}: expected at least 1")
    run_id = seeds.integer(seed, app.name, "run")
    hosts = Hosts(app, nodes, seed=seed, workers=workers)
    started = perf_counter()
    tally = serve(app, hosts, run_id, seed=seed, limits=limits, notice=notice)
    return Outcome(app.name, str(run_id), tally, perf_counter() - started, nodes, hosts.workers)


def deploy(app: App, mail: "Mail", limits: Limits = FINITE, notice: Notice = silent) -> Outcome:
    """Run an app's ServerApp here with the devices of a coordinator, as a run that was opened there.

    Raises as `simulate` does, and RunFailed where the run was stopped from elsewhere.
    """
    started = perf_counter()
    tally = serve(app, mail, node_id(mail.run), limits=limits, overrides=app.overrides, notice=notice)
    return Outcome(app.name, mail.run, tally, perf_counter() - started)


def serve(
    app: App,
    carrier: Carrier,
    run_id: int,
    *,
    seed: int | None = None,
    limits: Limits = FINITE,
    overrides: Mapping[str, Any] | None = None,
    notice: Notice = silent,
) -> Tally:
    """Run an app's ServerApp in this thread, and close the carrier, whatever happens.

    seed: None leaves the random numbers alone. Raises RunFailed where the ServerApp raises, after logging its
    traceback, and where the run was stopped from elsewhere.
    """
    arrays.install()
    run = Run.create_empty(run_id)
    run.fab_id, run.override_config = app.name, dict(app.overrides)
    fleet = Fleet(carrier, run, limits, overrides, notice)
    state: End = "failed"
    detail = ""
    try:
        with interruptible(fleet):
            draw_from(seed)
            server = app.load_server()
            draw_from(seed)  # of what it has imported, too
            gc.freeze()  # Flower's strategies collect garbage, 50 ms of it, for every reply that they read
            server(fleet, Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(app.config)))
            if fleet.over:  # which only the app's own threads may have been told
                raise RunNotRunningException
        state = "finished"
    except (KeyboardInterrupt, RunNotRunningException) as error:
        state, detail = "stopped", "the ServerApp's process was interrupted"
        if isinstance(error, RunNotRunningException):
            raise RunFailed(f"the run of {app.name} was stopped") from error
        raise
    except SystemExit as error:
        detail = f"the ServerApp exited with {error.code}"
        if error.code:
            raise
        state = "finished"
    except FedcoreError as error:
        detail = str(error)
        raise
    except Exception as error:
        detail = f"the ServerApp raised {type(error).__name__}: {error}"
        log(ERROR, "ServerApp raised an exception", exc_info=error)
        raise RunFailed(detail) from error
    finally:
        gc.unfreeze()
        fleet.stop()  # for threads that it may have left
        carrier.close(state, detail)
    return fleet.tally


@contextmanager
def interruptible(fleet: Fleet) -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C, with all threads that wait for messages."""

    def interrupt(*_: object) -> None:
        fleet.stop()
        raise KeyboardInterrupt

    with handled(interrupt, *BOTH):
        yield


def draw_from(seed: int | None) -> None:
    """Seed the global random numbers, which Flower's sampling and most apps draw from."""
    if seed is not None:
        reseed(seeds.integer(seed, "server"))
