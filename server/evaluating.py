"""The test of a run's new model, on clients or on the operator's own data."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedcore.messages import Ref
from fedcore.privacy.levels import OFF
from fedcore.server.attempts import play
from fedcore.strategies.rounds import evaluate_plan, metrics

if TYPE_CHECKING:
    from fedcore.server.driver import Driver

log = logging.getLogger("fedcore.server")


async def evaluate(driver: "Driver", number: int) -> None:
    """Test the new model where the spec says."""
    spec, ref = driver.run.spec, Ref(driver.run.id, number, 0, "evaluate")
    ready: Sequence[str]
    if journal := await driver.resumed(number, "evaluate"):
        clients, ready = journal.opening.cohort, journal.opening.ready
    elif spec.evaluation.where == "holdout":
        ready = await driver.gathering.evaluator()
        clients = tuple(ready)
    else:
        ready, _ = await driver.gather(apart=driver.workers.at_work if driver.workers else ())
        clients = driver.cohort(ref, ready, {})
    secret = driver.gathering.offers and spec.evaluation.where == "clients"
    if not clients and not secret:  # a secret cohort may be empty, and nobody may know
        log.warning("no evaluator is connected; this round is not evaluated", extra={"ref": ref})
        return
    (live,) = await play(driver, ready, (evaluate_plan(spec, ref, clients, driver.run.metrics), journal))
    driver.tell(lambda _: True)
    if live.lacks:
        log.warning("this round is not evaluated", extra={"ref": ref, "reason": live.lacks})
    else:
        privacy = OFF if spec.evaluation.where == "holdout" else driver.strategy.privacy
        means = metrics(live.round, privacy, driver.entropy())
        await driver.coordinator.write(driver.coordinator.store.add_metrics, driver.run.id, number, means)
        driver.committed[-1].row.update(means)
    await driver.tidy(live)
