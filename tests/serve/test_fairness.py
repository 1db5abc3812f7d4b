"""Shares of processes and places: who has had least is served next."""

import asyncio

import pytest

from serve.fairness import FairSlots, Usage


def test_the_least_served_client_is_next_and_idle_time_earns_nothing():
    usage, served = Usage(), []
    for _ in range(6):
        client = min(("a", "b"), key=usage.__getitem__)
        usage.serve(client)
        usage.add(client, {"a": 2.0, "b": 1.0}[client])
        served.append(client)
    assert served == ["a", "b", "b", "a", "b", "b"]
    assert usage["new"] >= 2
    usage.serve("new")
    usage.add("new", 10)
    assert usage["new"] - usage["a"] <= 10
    usage.serve("new")
    assert usage._used == {}  # of those that count as served equally, nothing is kept


def test_slots_go_to_the_client_that_holds_fewest():
    async def run() -> list[str]:
        slots, may_end, begun = FairSlots(4, 3), asyncio.Event(), []

        async def call(client: str) -> None:
            async with slots.slot(client):
                begun.append(client)
                await may_end.wait()

        greedy = [asyncio.create_task(call("greedy")) for _ in range(50)]
        await asyncio.sleep(0)
        assert begun == ["greedy"] * 3  # the fourth slot is kept for others
        others = [asyncio.create_task(call(client)) for client in ("x", "x", "y")]
        await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(*greedy, *others)
        return begun

    begun = asyncio.run(run())
    assert begun[:7].count("greedy") < 7
    assert set(begun[:7]) == {"greedy", "x", "y"}
    assert len(begun) == 53


def test_clients_take_turns_at_a_single_slot():
    async def run() -> list[str]:
        slots, begun = FairSlots(1, 1), []

        async def call(client: str) -> None:
            async with slots.slot(client):
                begun.append(client)
                await asyncio.sleep(0)

        await asyncio.gather(*(call(client) for client in "aaaaaabbc"))
        return begun

    assert asyncio.run(run()) == list("abcabaaaa")


@pytest.mark.parametrize("turns", range(4))
def test_a_cancelled_call_gives_its_slot_back(turns):
    async def run() -> None:
        slots, may_end = FairSlots(1, 1), asyncio.Event()

        async def call() -> None:
            async with slots.slot("a"):
                await may_end.wait()

        first, second, third = (asyncio.create_task(call()) for _ in range(3))
        await asyncio.sleep(0)
        may_end.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        second.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(first, second, third, return_exceptions=True)
            async with slots.slot("a"):
                pass
        assert not slots._waiting
        assert not slots._held

    asyncio.run(run())
