"""`fedcore bench simulate JOB`: an engine beside the plain loop, round by round in turn.

Machines drift, so the two alternate in one process, on the same cohorts and from the same parameters, and
what counts is the median of the ratios of neighbouring rounds.
"""

import resource
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from fedcore.bench.jobs import JobTask, job_of, spec_of
from fedcore.bench.serial import PlainLoop
from fedcore.simulations.borrowed import threads
from fedcore.simulations.run import Simulation


def measure(
    name: str, rounds: int | None, engine: str, workers: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a job in the plain loop and in an engine, in turn; return the line to print.

    workers: as [simulation] workers. overrides: of the job's spec; the plain loop heeds the device alone.
    """
    job = job_of(name)
    rounds = rounds or job.rounds
    with threads(1):
        asked = (f"simulation.engine={engine}", f"simulation.workers={workers}")
        simulation = Simulation(JobTask(job), spec_of(name, rounds).with_(*asked, *overrides))
        initial = simulation.layout.unflatten(simulation.state.parameters.shared, "shared")
        start = [torch.from_numpy(tensor.copy()) for tensor in initial.values()]
        device = simulation.spec.client.device
        plain = PlainLoop(job, start, device)
        ours, theirs, rows = [], [], simulation.rounds(lambda _: None)
        for number in range(1, rounds + 1):
            theirs.append(plain.round(cohort_of(simulation, number)))
            row = next(rows)
            ours.append(row["seconds"])
        simulation.close()
    warm = median(ours[1:])
    return {
        "bench": "simulate",
        "job": name,
        "engine": simulation.engine.name,
        "why": simulation.choice.reason,
        "rounds": rounds,
        "device": device,
        "torch": torch.__version__,
        "warm_round_s": round(warm, 5),
        "clients_per_s": round(job.cohort / warm, 1),
        "plain_loop_round_s": round(median(theirs[1:]), 5),
        "ratio_to_plain_loop": round(median(b / a for a, b in zip(ours[1:], theirs[1:], strict=True)), 3),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "accuracy": round(row["accuracy"], 4),
        "plain_loop_accuracy": round(plain.accuracy(), 4),
        "measured": time.strftime("%Y-%m-%d"),
    }


def cohort_of(simulation: Simulation, number: int) -> list[int]:
    """Return the clients that a simulation will draw in a round."""
    return [simulation.population.index[name] for name in simulation.cohort(number, "train")]
