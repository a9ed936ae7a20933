"""What privacy costs: `python -m fedcore.simulations.scenarios.private_mnist_utility [DIR] [--report]`.

Four specs of this folder, at three epsilons and without privacy. What DIR (runs/private_mnist if left out)
holds already is not run again; `--report` runs nothing. The tables are printed, and the picture is
DIR/utility.png. MNIST is found where `fedcore.data` looks for it.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean

from fedcore.simulations.grid import Grid, run_grid
from fedcore.simulations.grid_utility import Point, draw
from fedcore.simulations.scenarios import scenario
from fedcore.spec import RunSpec

SPECS = (
    "private_mnist_client_1000",
    "private_mnist_client_100",
    "private_mnist_example_100",
    "private_mnist_example_1000",
)
EPSILONS = (1.0, 3.0, 8.0, inf)  # infinite: the same run without clipping and noise
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Runs:
    """What the runs of one spec at one epsilon came to.

    accuracies: in percent, one a seed. noise: the noise multiplier, 0 without privacy. seconds: of training,
    the mean over runs.
    """

    accuracies: tuple[float, ...] = ()
    noise: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.accuracies:
            return "not run"
        return f"{fmean(self.accuracies):.1f} ({min(self.accuracies):.1f} to {max(self.accuracies):.1f})"


def grid(spec: RunSpec, epsilon: float, out: Path, *, run: bool) -> Grid:
    """Return the grid of a spec's seeds at one epsilon, run where that is asked for."""
    key, value = ("privacy.target_epsilon", epsilon) if epsilon < inf else ("privacy", {"level": "none"})
    axes, folder = {key: [value], "run.seed": SEEDS}, out / spec.run.name / f"epsilon-{epsilon:g}"
    return run_grid(spec, axes, folder) if run else Grid(spec, axes, folder)


def found(grid: Grid) -> Runs:
    """Return what the finished runs of a grid came to."""
    done = [
        (100 * outcome.final["accuracy"], outcome.seconds, grid.folder / cell.name / "result.json")
        for cell, outcome in zip(grid.cells, grid.outcomes, strict=True)
        if outcome.status == "finished" and outcome.final["accuracy"] is not None
    ]
    if not done:
        return Runs()
    accuracies, seconds, results = zip(*done, strict=True)
    claim = json.loads(results[-1].read_text(encoding="utf-8"))["privacy"]
    return Runs(accuracies, claim.get("noise_multiplier", 0.0), fmean(seconds))


def title(spec: RunSpec) -> str:
    """Return what a spec protects, such as `client level, 1,000 clients`."""
    return f"{spec.privacy.level} level, {spec.simulation.clients:,} clients"


def tables(lines: Mapping[str, Sequence[Runs]]) -> Iterator[str]:
    """Yield the lines of two tables in Markdown: accuracies, then noise and the seconds of a run."""
    names = [f"epsilon {epsilon:g}" if epsilon < inf else "no privacy" for epsilon in EPSILONS]
    yield f"| test accuracy in percent | {' | '.join(names)} |"
    yield "|" + "---|" * (1 + len(names))
    for name, runs in lines.items():
        yield f"| {name} | {' | '.join(map(str, runs))} |"
    yield from ("", f"| noise multiplier | {' | '.join(names[:-1])} | seconds of a run |")
    yield "|" + "---|" * (1 + len(names))
    for name, runs in lines.items():
        seconds = [each.seconds for each in runs if each.accuracies] or [0.0]
        noises = " | ".join(f"{each.noise:.2f}" for each in runs[:-1])
        yield f"| {name} | {noises} | {min(seconds):.0f} to {max(seconds):.0f} |"


def points(runs: Sequence[Runs]) -> list[Point]:
    """Return the mean accuracy at each epsilon at which there are runs."""
    found = zip(EPSILONS, runs, strict=True)
    return [(epsilon, fmean(each.accuracies)) for epsilon, each in found if each.accuracies]


def main(arguments: Sequence[str], specs: Sequence[RunSpec]) -> None:
    """Run what is left, unless it is only to be reported; print the tables and draw the picture."""
    folders = [Path(argument) for argument in arguments if argument != "--report"]
    out, run = folders[0] if folders else Path("runs/private_mnist"), "--report" not in arguments
    lines = {
        title(spec): [found(grid(spec, epsilon, out, run=run)) for epsilon in EPSILONS] for spec in specs
    }
    sys.stdout.write("\n".join([*tables(lines), ""]))
    if drawn := {name: points(runs) for name, runs in lines.items() if points(runs)}:
        draw(drawn, "test accuracy, %").savefig(out / "utility.png", dpi=120, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:], [RunSpec.load(scenario(name)) for name in SPECS])
