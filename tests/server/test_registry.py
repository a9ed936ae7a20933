"""Who is there, who is free, and who is told."""

import asyncio

from fedcore.messages import Hello, Outcome, Pause, Ref, Verdict
from fedcore.server.registry import Registry, Session, Signal

DIGEST, OUTCOME = "0" * 64, Outcome(Ref("run", 1, 0, "train"), Verdict("late"))


def session(client: str, evaluator: bool = False, **tasks: str) -> Session:
    return Session(client, Hello(tasks or {"Digits": DIGEST}, evaluator))


def test_only_clients_with_the_same_task_and_all_labels_are_eligible_in_the_order_of_names() -> None:
    registry = Registry()
    for one in (
        session("c"),
        session("a"),
        session("b", Digits="1" * 64),
        session("d", Others=DIGEST),
        session("e", evaluator=True),
    ):
        registry.join(one)
    registry.join(Session("f", Hello({"Digits": DIGEST}, labels={"site": "eu", "kind": "phone"})))
    assert registry.eligible("Digits", DIGEST, {}) == ["a", "c", "f"]
    assert registry.eligible("Digits", DIGEST, {}, evaluator=True) == ["e"]
    assert registry.eligible("Digits", DIGEST, {"site": "eu"}) == ["f"]
    assert registry.eligible("Digits", DIGEST, {"site": "eu", "kind": "tablet"}) == []


def test_a_client_is_free_for_whoever_it_works_for_until_its_lease_ends() -> None:
    registry = Registry()
    registry.lease("run", ("a", "b"))
    assert registry.free("other", ["c", "b", "a"]) == ["c"]
    assert registry.free("run", ["c", "b", "a"]) == ["c", "b", "a"]
    registry.release("run", ["a"])
    registry.release("other")
    assert registry.free("other", ["a", "b"]) == ["a"]
    registry.release("run")
    assert registry.free("other", ["a", "b"]) == ["a", "b"]


def test_what_a_run_claims_is_kept_from_those_behind_it() -> None:
    registry = Registry()
    with registry.turn("first"), registry.turn("second"):
        registry.claim("first", ["a"])
        registry.claim("second", ["b"])
        assert registry.free("first", ["a", "b", "c"]) == ["a", "b", "c"]
        assert registry.free("second", ["a", "b", "c"]) == ["b", "c"]
        assert registry.free("elsewhere", ["a", "b", "c"]) == ["c"]
    assert registry.free("second", ["a"]) == ["a"] and not registry.queue


def test_a_lease_outlives_the_connection() -> None:
    registry = Registry()
    first = session("a")
    registry.join(first)
    registry.lease("run", ("a",))
    assert registry.leave(first)
    registry.join(session("a"))
    assert registry.free("other", ["a"]) == []


def test_a_newer_session_takes_the_place_of_an_older_one() -> None:
    registry = Registry()
    older, newer = session("a"), session("a")
    registry.join(older)
    registry.join(newer)
    assert older.outbox.get_nowait() is None
    assert not registry.leave(older)
    assert registry.send("a", OUTCOME) and newer.outbox.get_nowait() == OUTCOME
    assert registry.leave(newer)
    assert not registry.send("a", OUTCOME)


def test_whoever_waits_hears_of_every_change() -> None:
    async def run() -> None:
        registry = Registry()
        before = registry.changed.next
        one = session("a")
        registry.queue["run"] = ["a"]
        for change in (
            lambda: registry.join(one),
            lambda: registry.release("run"),
            lambda: registry.claim("run", ["b"]),
            lambda: registry.leave(one),
        ):
            change()
            assert before.is_set() and not registry.changed.next.is_set()
            before = registry.changed.next

    asyncio.run(run())


def test_a_signal_is_not_missed_between_looking_and_waiting() -> None:
    async def run() -> None:
        signal = Signal()
        before = signal.next
        signal.send()
        await asyncio.wait_for(before.wait(), 1)
        waiting = asyncio.create_task(signal.next.wait())
        await asyncio.sleep(0)
        signal.send()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(run())


def test_all_sessions_can_be_ended_each_with_a_time_to_come_back() -> None:
    registry = Registry()
    sessions = [session("a"), session("b")]
    for one in sessions:
        registry.join(one)
    registry.dismiss()
    pauses = [one.outbox.get_nowait() for one in sessions]
    assert all(isinstance(pause, Pause) for pause in pauses) and pauses[0] != pauses[1]
    assert [one.outbox.get_nowait() for one in sessions] == [None, None]
