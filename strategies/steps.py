"""A step of a run without cohorts, as a round: of updates that have arrived, from models of several ages.

Simulations and coordinators call this with what their clients sent, and so does whoever replays a run from
the list of what entered which step: the same arrivals make the same bits, in whatever order they are given.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.strategies.modes import OnArrival, entering, step_plan
from fedcore.strategies.rounds import Round, receive
from fedcore.strategies.terms import Rows, Space, all_pass, in_memory


@dataclass(frozen=True)
class Arrival:
    """A client's update as it was sent, of one row, and the seconds that it took.

    staleness: how often the model has moved since the client received `start`.
    """

    client: str
    rows: Rows
    staleness: int
    start: Parameters
    seconds: float = 0.0


def passes(mode: OnArrival, plan: Plan, arrival: Arrival, now: Parameters) -> bool:
    """Tell whether an update would be folded into a step that starts from `now`."""
    return all_pass(plan, entering(mode, arrival.rows, arrival.staleness, arrival.start, now))


def step(
    mode: OnArrival,
    plan: Plan,
    arrivals: Iterable[Arrival],
    now: Parameters,
    space: Space = in_memory,
) -> Round:
    """Return the closed round of a step that starts from the model `now`.

    plan: of training, for the clients that have arrived; those whose update does not pass, once it is
    discounted, are refused. Arrivals are taken one at a time. space: as in `Round`; what is discounted
    has it, too.
    """
    round = Round(step_plan(mode, plan), space)
    for each in arrivals:
        rows = entering(mode, each.rows, each.staleness, each.start, now, space)
        (update,) = rows.updates()
        receive(round, each.client, update)
        round.seconds[each.client] = each.seconds
    round.close()
    return round
