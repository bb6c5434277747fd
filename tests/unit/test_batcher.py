"""The batcher on real processes: every request gets its own rows, once, whatever the interleaving, whatever fails."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.factories.serving import DIES, FAILS, REFUSES, WAITS, Ask, bundle, drawn, outcome, play
from workers.serving.batcher import Batcher, Failed, InvalidRequest, Rejected, Settings, SettingsError, TimedOut
from workers.serving.instances import Region
from workers.serving.rows import Rows

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[tuple[Batcher, Run]]:
    """Two instances for all interleavings; and what runs a coroutine beside them."""
    loop = asyncio.new_event_loop()
    batcher = Batcher(
        folder, Settings(instances=2, max_batch=8, max_delay_ms=1, preferred_batches=(4,), queue_limit=64)
    )
    loop.run_until_complete(batcher.start())
    yield batcher, loop.run_until_complete
    loop.run_until_complete(batcher.stop())
    loop.close()


@asynccontextmanager
async def served(folder: Path, **how: Any) -> AsyncIterator[Batcher]:
    batcher = Batcher(folder, Settings(**{"max_batch": 8, **how}))
    await batcher.start()
    try:
        yield batcher
    finally:
        await batcher.stop(grace_s=2.0)


ASKS = st.builds(
    Ask,
    number=st.integers(1, 1 << 40),
    rows=st.integers(0, 10),
    width=st.sampled_from([1, 4, 5]),
    kind=st.sampled_from([0, 0, 0, 0, FAILS, REFUSES]),
    deadline_s=st.sampled_from([None, None, 5.0, 0.001]),
    leaves_after_s=st.sampled_from([None, None, None, 0.0005, 0.002]),
    caller=st.sampled_from("ab"),
)
PAUSES = st.sampled_from([None, None, None, 0.0, 0.001])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(ASKS.filter(lambda a: a.rows or not a.kind), PAUSES), min_size=1, max_size=80))
def test_every_request_gets_its_own_rows_once(
    running: tuple[Batcher, Run], asks: list[tuple[Ask, float | None]]
) -> None:
    batcher, run = running

    async def all_of_them() -> list[str]:
        tasks = []
        for ask, pause in asks:
            tasks.append(asyncio.create_task(outcome(batcher, ask)))
            if pause is not None:
                await asyncio.sleep(pause)
        return await asyncio.gather(*tasks)

    before = sum(batcher.stats.ended.values())
    assert len(run(all_of_them())) == len(asks)
    assert sum(batcher.stats.ended.values()) - before == len(asks)
    assert batcher.waiting == 0


def test_thousands_of_requests_with_failures_and_deaths(folder: Path) -> None:
    """The short form of benchmarks/batcher.py."""

    async def main() -> None:
        async with served(folder, instances=2, queue_limit=64, max_delay_ms=0.5) as batcher:
            ended = await play(batcher, 1, 4000, 100, deaths=0.002)
            assert sum(ended.values()) == sum(batcher.stats.ended.values()) == 4000
            assert {
                "ok",
                "timed_out",
                "left",
                "rejected",
                "refused",
                "inference_failed",
                "instance_died",
            } == ended.keys()
            assert ended["ok"] > 400  # deadlines are short: on a busy machine most are late
            assert batcher.stats.restarts >= 2 * ended["instance_died"]
            assert max(batcher.stats.batches) <= 8
            assert (batcher.waiting, batcher.in_flight) == (0, 0)

    asyncio.run(main())


def test_requests_share_batches_and_a_bad_one_spoils_none(folder: Path) -> None:
    async def main() -> None:
        async with served(folder) as batcher:
            asks = [Ask(i, kind={3: FAILS, 5: REFUSES}.get(i, 0)) for i in range(1, 9)]
            ended = await asyncio.gather(*(outcome(batcher, ask) for ask in asks))
            assert ended == ["ok", "ok", "inference_failed", "ok", "refused", "ok", "ok", "ok"]
            assert batcher.stats.batches == {8: 1, 1: 8}
            assert batcher.stats.retried == 8

    asyncio.run(main())


def test_an_instance_that_dies_is_started_again_and_takes_nobody_with_it(folder: Path) -> None:
    async def main() -> None:
        async with served(folder) as batcher:
            asks = [Ask(i, kind=DIES if i == 2 else 0) for i in range(1, 5)]
            assert await asyncio.gather(*(outcome(batcher, a) for a in asks)) == ["ok", "instance_died", "ok", "ok"]
            assert batcher.stats.restarts == 2
            slow = asyncio.create_task(outcome(batcher, Ask(9, kind=WAITS)))
            await asyncio.sleep(0.1)
            (instance,) = batcher._instances
            assert instance.pid is not None
            os.kill(instance.pid, signal.SIGKILL)  # by the kernel, say
            assert await slow == "ok", "it is tried once more"
            assert batcher.ready

    asyncio.run(main())


def test_a_hung_instance_is_ended(folder: Path) -> None:
    async def main() -> None:
        async with served(folder, call_limit_s=0.15) as batcher:
            with pytest.raises(Failed) as caught:
                await batcher.submit(Ask(1, kind=WAITS).feeds())
            assert caught.value.code == "instance_died"
            assert "did not answer within 0.15 s" in caught.value.detail
            assert await outcome(batcher, Ask(2)) == "ok"

    asyncio.run(main())


def test_a_call_has_its_limit_from_its_own_begin(folder: Path) -> None:
    """One timer watches many calls: that an earlier one set it ends no later one."""

    async def main() -> None:
        async with served(folder, call_limit_s=0.5) as batcher:
            assert await outcome(batcher, Ask(1)) == "ok"
            await asyncio.sleep(0.4)
            assert await outcome(batcher, Ask(2, kind=WAITS)) == "ok"
            await asyncio.sleep(0.6)
            assert await outcome(batcher, Ask(3)) == "ok"
            assert batcher.stats.restarts == 0

    asyncio.run(main())


def test_what_lies_in_shared_memory_is_told_anew_when_its_form_changes() -> None:
    memory = mmap.mmap(-1, 1 << 16)
    ours, theirs = Region(memory, 4096, 1 << 15), Region(memory, 4096, 1 << 15)
    for width in (3, 3, 4, 3):
        length, (array,) = ours.place([("x", "int64", (1, width))])
        array[...] = width
        found = theirs.read(length)
        assert found["x"].tolist() == [[width] * width]
        found.clear()  # whoever runs the engine may do with it what they like
    ours.write_text({"code": "inference_failed"})
    length, (array,) = ours.place([("x", "int64", (1, 3))])
    assert list(theirs.read(length)) == ["x"], "the text lay over the form of the arrays"
    with pytest.raises(InvalidRequest, match="do not fit"):
        ours.place([("x", "int64", (1, 1 << 20))])
    assert list(theirs.read(ours.place([("x", "int64", (1, 3))])[0])) == ["x"]
    del array, found
    ours.forget()
    theirs.forget()
    memory.close()


def test_deadlines_and_callers_that_leave(folder: Path) -> None:
    async def main() -> None:
        async with served(folder, max_batch=1) as batcher:
            busy = asyncio.create_task(outcome(batcher, Ask(1, kind=WAITS)))
            await asyncio.sleep(0.05)
            late = asyncio.create_task(outcome(batcher, Ask(2, deadline_s=0.02)))
            gone = asyncio.create_task(outcome(batcher, Ask(3, leaves_after_s=0.02)))
            waits = asyncio.create_task(outcome(batcher, Ask(4, deadline_s=10.0)))
            assert (await late, await gone) == ("timed_out", "left")
            assert not busy.done(), "told at the deadline, not when its turn comes"
            assert batcher.waiting == 1
            assert (await busy, await waits) == ("ok", "ok")
            assert sum(batcher.stats.batches.values()) == 2, "what nobody waits for is not computed"
            with pytest.raises(TimedOut):
                await batcher.submit(Ask(5).feeds(), deadline_s=0.0)
            assert batcher.stats.ended == {"ok": 2, "deadline_exceeded": 2, "cancelled": 1}

    asyncio.run(main())


def test_a_full_queue_says_when_to_come_again(folder: Path) -> None:
    async def main() -> None:
        async with served(folder, max_batch=1, queue_limit=2) as batcher:
            await outcome(batcher, Ask(1))
            tasks = [asyncio.create_task(outcome(batcher, Ask(i, kind=WAITS))) for i in range(2, 6)]
            await asyncio.sleep(0)  # all have asked
            with pytest.raises(Rejected) as caught:
                await batcher.submit(Ask(9).feeds())
            assert caught.value.code == "queue_full"
            assert 0.05 <= caught.value.retry_after_s <= 30
            assert sorted(await asyncio.gather(*tasks)) == ["ok", "ok", "ok", "rejected"]

    asyncio.run(main())


def test_what_the_model_does_not_take_is_told_at_once(folder: Path) -> None:
    async def main() -> None:
        async with served(folder) as batcher:
            x = np.zeros((1, 4), np.int64)
            for feeds, words in (
                ({}, "lacks x"),
                ({"x": x, "z": x}, "has z"),
                ({"x": x.astype(np.float32)}, "is float32, the model's is int64"),
                ({"x": x[0]}, "has the shape"),
            ):
                with pytest.raises(InvalidRequest, match=words):
                    await batcher.submit(feeds)
            swapped = x.astype(">i8") + 5
            assert ((await batcher.submit({"x": swapped}))["y"] == 11).all(), (
                "another order of bytes is the same number"
            )
            assert batcher.stats.ended == {"invalid_request": 4, "ok": 1}

    asyncio.run(main())


def test_stop_answers_what_was_taken_and_takes_no_more(folder: Path) -> None:
    async def main() -> None:
        batcher = Batcher(folder, Settings(max_batch=1))
        await batcher.start()
        tasks = [asyncio.create_task(outcome(batcher, Ask(i, kind=WAITS))) for i in (1, 2)]
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(batcher.stop(grace_s=5.0))
        await asyncio.sleep(0.01)
        with pytest.raises(Rejected, match="stops"):
            await batcher.submit(Ask(3).feeds())
        assert not batcher.ready
        await stopping
        assert await asyncio.gather(*tasks) == ["ok", "ok"]
        hasty = Batcher(folder, Settings(max_batch=1))
        await hasty.start()
        tasks = [asyncio.create_task(outcome(hasty, Ask(i, kind=WAITS))) for i in (1, 2)]
        await asyncio.sleep(0.05)
        await hasty.stop(grace_s=0.0)
        assert await asyncio.gather(*tasks) == ["rejected", "rejected"]

    asyncio.run(main())


def test_an_engine_that_does_not_start_is_told(tmp_path: Path) -> None:
    broken = bundle(tmp_path, "def load():\n    raise OSError('no such library')\n")

    async def main() -> None:
        with pytest.raises(Failed, match="no such library") as caught:
            await Batcher(broken).start()
        assert caught.value.code == "start_failed"

    asyncio.run(main())


def test_outputs_without_a_row_for_each_are_not_shared(tmp_path: Path) -> None:
    """A mean over the batch: settings that call it batched are wrong, and nobody gets another's numbers."""
    mean = "def load():\n    return ['x'], lambda feeds: {'y': feeds['x'] * 1, 'mean': feeds['x'].mean()}\n"
    crossing = bundle(tmp_path, mean)

    async def main() -> None:
        async with served(crossing) as batcher:
            found = await asyncio.gather(*(batcher.submit(Ask(i).feeds()) for i in range(1, 7)))
            assert [int(o["mean"]) for o in found] == [8 * i for i in range(1, 7)]
            assert batcher.one_by_one
            assert "mean" in batcher.one_by_one

    asyncio.run(main())


def test_instances_have_their_threads_and_cores(tmp_path: Path) -> None:
    told = (
        "import os\nimport numpy as np\n\n\ndef load(threads=None):\n"
        "    def run(feeds):\n        found = [threads, len(os.sched_getaffinity(0))]\n"
        "        return {'told': np.array(found)}\n    return ['x'], run\n"
    )
    folder, cores = bundle(tmp_path, told), len(os.sched_getaffinity(0))

    async def main() -> None:
        async with served(folder, instances=2, threads=1, max_batch=1) as batcher:
            assert (await batcher.submit(Ask(1).feeds()))["told"].tolist() == [1, 1 if cores > 1 else cores]
        async with served(folder, instances=1, threads=3, max_batch=1) as batcher:
            assert (await batcher.submit(Ask(1).feeds()))["told"].tolist() == [3, cores]

    asyncio.run(main())


def test_sizes_are_filled_up_and_cut_back(folder: Path) -> None:
    """Requests of other widths share a batch, and none sees the zeros of another."""
    padded = Settings(max_batch=8, pad={"x": {1: (4, 8)}}, cut={"y": {1: ("x", 1)}})

    async def main() -> None:
        async with Batcher(folder, padded) as batcher:
            widths = (1, 3, 4, 5, 8, 8, 11)
            found = await asyncio.gather(*(batcher.submit(Ask(i, width=w).feeds()) for i, w in enumerate(widths)))
            for i, (outputs, width) in enumerate(zip(found, widths, strict=True)):
                assert outputs["y"].tolist() == [[16 * i + 1] * width]
            assert [int(o["width"][0]) for o in found] == [4, 4, 4, 8, 8, 8, 11], "what the engine saw"
            assert batcher.stats.batches == {3: 2, 1: 1}

    asyncio.run(main())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=9), st.booleans())
def test_rows_go_in_and_come_out(sizes: list[tuple[int, int]], pad: bool) -> None:
    """Batches of any rows and, filled up, of any widths; beside an input that is the same for all."""
    how = Settings(
        max_batch=64,
        batch_axis={"scale": None},
        pad={"x": {1: (9,)}} if pad else {},
        cut={"y": {1: ("x", 1)}} if pad else {},
    )
    rows = Rows(["x", "scale"], how)
    rng = np.random.default_rng(0)
    scale = np.float32(3)
    widths = [w if pad else sizes[0][1] for _, w in sizes]
    asked = [rng.normal(size=(n, w)).astype(np.float32) for (n, _), w in zip(sizes, widths, strict=True)]
    plans = [rows.plan({"scale": scale, "x": x}) for x in asked]
    assert len({p.key for p in plans}) == 1
    views = [np.full(shape, np.nan, dtype) for _, dtype, shape in rows.specs(plans)]
    rows.fill(views, plans)
    answers = rows.split({"y": views[0] * views[1]}, plans)
    for x, answer in zip(asked, answers, strict=True):
        np.testing.assert_array_equal(answer["y"], x * scale)
    other = rows.plan({"scale": np.float32(4), "x": asked[0]})
    assert other.key != plans[0].key, "another number for all of them is another batch"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"instances": 1.5}, "instances is 1.5"),
        ({"max_delay_ms": -1}, "max_delay_ms"),
        ({"preferred_batches": [9], "max_batch": 8}, "preferred_batches is 9"),
        ({"batch_axis": {"x": 1}}, "served one by one"),
        ({"pad": {"x": {"0": [4]}}, "cut": {}}, "pad of x: axis is 0"),
        ({"pad": {"x": {"1": [8, 4]}}, "cut": {}}, "growing"),
        ({"pad": {"x": {"1": [4]}}}, "pad needs cut"),
        ({"cut": {"y": {"1": ["x", 1]}}}, "not padded"),
        ({"batches": 3}, "batches: there is no such setting"),
        ({"pad": 3, "cut": {}}, "not as it should be"),
    ],
)
def test_settings_that_cannot_be(value: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Settings.from_json(value)


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    wanted = Settings(
        instances=2, threads=3, max_batch=8, preferred_batches=(4,), pad={"x": {1: (4, 8)}}, cut={"y": {1: ("x", 1)}}
    )
    (tmp_path / "serving.json").write_text(json.dumps(wanted.to_json()))
    assert Settings.of_folder(tmp_path) == wanted


def test_what_is_drawn_is_mixed() -> None:
    rng = random.Random(0)
    asks = [drawn(rng, i, deaths=0.01) for i in range(2000)]
    assert {a.kind for a in asks} == {0, FAILS, REFUSES, DIES}
