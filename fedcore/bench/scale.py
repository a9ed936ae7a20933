"""`fedcore bench scale`: clients a second over the size of the cohort, and where a round's time goes."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fedcore.bench.jobs import JobTask, job_of, spec_of
from fedcore.simulations.page import BLUE, INK, ORANGE, canvas, plain
from fedcore.simulations.run import Simulation

MOVES = ("copy", "cat", "index", "fill", "zero", "repeat", "clone", "empty", "pad", "add_", "sub_", "to")
PROFILED = 10**4  # clients in a round, over which the profiler takes gigabytes
ENGINES = {"vectorized": 10**6, "sequential": 10**4}  # the largest cohort of each, since patience ends too


def measure(cohorts: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Time rounds of digits-mlp-N in which everybody takes part; yield a line for each engine and size.

    A line says where the time goes, unless the cohort is so large that the profiler would need gigabytes.
    """
    for engine, most in ENGINES.items():
        for cohort in (size for size in cohorts if size <= most):
            name = f"digits-mlp-{cohort}"
            asked = spec_of(name, rounds + 2).with_(f"simulation.engine={engine}")
            simulation = Simulation(JobTask(job_of(name)), asked)
            rows = simulation.rounds(lambda _: None)
            next(rows)
            seconds = median(next(rows)["seconds"] for _ in range(rounds))
            yield {
                "bench": "scale",
                "engine": engine,
                "why": simulation.choice.reason,
                "cohort": cohort,
                "round_s": round(seconds, 5),
                "clients_per_s": round(cohort / seconds, 1),
                **(shares(simulation, rows) if cohort <= PROFILED else {}),
                "measured": time.strftime("%Y-%m-%d"),
            }
            simulation.close()


def shares(simulation: Simulation, rows: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Return how a round's time divides: kernels that compute, kernels that move data, and all else.

    All else is Python, NumPy's sums, and what the profiler itself costs.
    """
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        next(rows)
        wall = time.perf_counter() - started
    spent = {"movement": 0.0, "arithmetic": 0.0}
    for event in profiler.key_averages():
        moves = any(event.key.removeprefix("aten::").startswith(name) for name in MOVES)
        spent["movement" if moves else "arithmetic"] += event.self_cpu_time_total / 1e6
    rest = max(0.0, wall - sum(spent.values()))
    total = sum(spent.values()) + rest
    return {name: round(seconds / total, 3) for name, seconds in {**spent, "python": rest}.items()}


def plot(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the lines as a picture in SVG or PNG, as the file's name ends."""
    drawing = canvas(7.5, 4)
    axes = drawing.add_subplot()
    for engine, colour in zip(ENGINES, (BLUE, ORANGE), strict=True):
        mine = [line for line in lines if line["engine"] == engine]
        places = [line["cohort"] for line in mine]
        axes.plot(places, [line["clients_per_s"] for line in mine], "o-", color=colour, label=engine)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    plain(axes, "clients in a round", "clients a second")
    axes.legend(frameon=False, labelcolor=INK)
    drawing.savefig(file, dpi=150, facecolor="white")
