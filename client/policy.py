"""What a device's owner lets happen on it, judged before anything is fetched or trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time

from fedcore.client.config import STRENGTHS, Config, Encryption
from fedcore.client.pace import Pace
from fedcore.crypto.identity import Clock, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import UpdateRefused, nearest
from fedcore.messages import Assignment
from fedcore.privacy.account import Claim
from fedcore.privacy.claims import schedule, trust_of
from fedcore.privacy.levels import ClientLevel, DistributedLevel, Off
from fedcore.spec import RunSpec


@dataclass(frozen=True)
class Policy:
    """The rules of agent.toml; `digests` are those of the code that is installed, by task or by app.

    Every method raises UpdateRefused that names the rule and its line in agent.toml.
    """

    config: Config
    digests: Mapping[str, str]
    clock: Clock = utc_now

    @property
    def pace(self) -> Pace:
        """How often training has begun of late."""
        return Pace(self.config.state / "starts.json")

    def known(self, kind: str, name: str, digest: str, *table: str) -> None:
        """Refuse a task or an app that a table does not allow, or of which another version is installed."""
        place = self.config.place
        if name not in self.digests:
            raise UpdateRefused(
                f"{place(*table)}: {kind} {name!r} is not allowed{nearest(name, self.digests)}"
            )
        if digest != self.digests[name]:
            raise UpdateRefused(
                f"{place(*table, name)}: the run's code is {digest[:12]}..., installed is "
                f"{self.digests[name][:12]}...; install the same version on both sides"
            )

    def judge(self, assignment: Assignment) -> None:
        """Refuse work that is not allowed at any time."""
        place, terms = self.config.place, self.config.settings.policy
        spec = assignment.spec
        self.known("task", assignment.task, assignment.digest, "tasks")
        if assignment.cohort < terms.smallest_cohort:
            raise UpdateRefused(
                f"{place('policy', 'smallest_cohort')}: {assignment.cohort} clients take part, "
                f"expected at least {terms.smallest_cohort}"
            )
        encryption = encryption_of(spec)
        if STRENGTHS.index(encryption) < STRENGTHS.index(terms.encryption):
            raise UpdateRefused(
                f"{place('policy', 'encryption')}: updates would travel under {encryption!r}, "
                f"expected at least {terms.encryption!r}"
            )
        if isinstance(spec.privacy, DistributedLevel) and encryption != "secagg":
            raise UpdateRefused(
                f"{place('policy', 'encryption')}: this device would make a part of the noise only, for an "
                f"update that travels under {encryption!r} and is seen by itself; expected 'secagg'"
            )
        if encryption == "secagg" and spec.cohort.fewest < terms.smallest_cohort:
            raise UpdateRefused(
                f"{place('policy', 'smallest_cohort')}: a sum may be over {spec.cohort.fewest} clients, "
                f"expected at least {terms.smallest_cohort}"
            )
        if encryption == "secagg" and spec.encryption.corrupt < terms.corrupt:
            raise UpdateRefused(
                f"{place('policy', 'corrupt')}: the run holds while {spec.encryption.corrupt:g} of its "
                f"clients collude, expected at least {terms.corrupt:g}"
            )
        if terms.largest_weight and spec.limits.weight > terms.largest_weight:
            raise UpdateRefused(
                f"{place('policy', 'largest_weight')}: a client may count for {spec.limits.weight:g} "
                f"examples, expected at most {terms.largest_weight:g}"
            )

    def keep_hours(self) -> None:
        """Refuse to begin anything outside the hours."""
        hours, now = self.config.settings.policy.hours, self.clock().astimezone()
        if hours and not within(hours, now.time()):
            raise UpdateRefused(
                f"{self.config.place('policy', 'hours')}: it is {now:%H:%M} here, work begins within {hours}"
            )

    def admit(self, assignment: Assignment) -> None:
        """Refuse to begin work now: outside the hours, or too soon after other training."""
        self.keep_hours()
        place, terms, now = self.config.place, self.config.settings.policy, self.clock()
        most = terms.rounds_per_day
        if most and trains(assignment) and (starts := self.pace.starts(now)) >= most:
            raise UpdateRefused(
                f"{place('policy', 'rounds_per_day')}: training has begun {starts} times in 24 hours, "
                f"expected at most {most}"
            )

    def begin(self, assignment: Assignment) -> None:
        """Note that training begins, and refuse as `admit` does."""
        self.admit(assignment)
        if self.config.settings.policy.rounds_per_day and trains(assignment):
            self.pace.note(self.clock())

    def claim(self, assignment: Assignment, name: Name) -> Claim | None:
        """Return what the work would do to the data set, None where no ledger is kept.

        Refuses what has no place in a ledger, however much budget is left. name: of this device. Raises
        SpecError for a spec whose noise multiplier is not resolved yet.
        """
        place, terms = self.config.place, self.config.settings.ledger
        if not terms.path:
            return None
        ref, spec, privacy = assignment.ref, assignment.spec, assignment.spec.privacy
        if isinstance(privacy, Off):
            level = "example" if terms.unit == "example" else "local"
            raise UpdateRefused(
                f"{place('ledger')}: the run has no differential privacy, which these data need; "
                f'add a [privacy] with level = "{level}"'
            )
        if trust_of(privacy) == "trusted" and not terms.accept_trusted:
            raise UpdateRefused(
                f"{place('ledger', 'accept_trusted')}: the noise of level {privacy.level!r} is the "
                "coordinator's, which this device cannot check"
            )
        if ref.kind == "root" or (ref.kind == "evaluate" and not privacy.metric_noise):
            raise UpdateRefused(
                f"{place('ledger')}: {ref.kind} would send numbers without noise; metrics need "
                "privacy.metric_noise, and trusted data an evaluator"
            )
        if ref.round > spec.run.rounds:
            raise UpdateRefused(
                f"{place('ledger')}: round {ref.round} of a run of {spec.run.rounds} rounds is in no schedule"
            )
        fixed = not (isinstance(privacy, ClientLevel) and privacy.adaptive)
        if fixed and assignment.clip not in (0.0, privacy.clip_norm):
            raise UpdateRefused(
                f"{place('ledger')}: the round's clip norm is {assignment.clip:g}, but the run's is "
                f"{privacy.clip_norm:g} in all rounds"
            )
        cost = schedule(spec)
        assert cost
        if ref.kind == "offer" and not cost.at_once:
            raise UpdateRefused(
                f"{place('ledger')}: level {privacy.level!r} is paid for round by round, not by an offer"
            )
        piece = cost.train if ref.kind == "train" else cost.evaluate
        return Claim(
            run=f"{name.federation}/{ref.run}",
            ref=str(ref),
            by=str(name),
            unit=cost.unit,
            trust=cost.trust,
            history=cost.whole if cost.at_once else piece,
            whole=cost.whole,
            once=cost.at_once,
        )


def encryption_of(spec: RunSpec) -> Encryption:
    """Return how the updates of a run travel; raises UpdateRefused where it leaves that open."""
    if spec.encryption.updates == "auto":
        raise UpdateRefused(
            'encryption.updates = "auto" does not say how updates travel; `fedcore run submit` resolves it'
        )
    return spec.encryption.updates


def within(hours: str, now: time) -> bool:
    """Return whether a time of day is in HH:MM-HH:MM, its end excluded; it may go past midnight."""
    first, last = map(time.fromisoformat, hours.split("-"))
    return first <= now < last if first < last else now >= first or now < last


def trains(assignment: Assignment) -> bool:
    """Return whether an assignment is for training rather than a test."""
    return assignment.ref.kind != "evaluate"
