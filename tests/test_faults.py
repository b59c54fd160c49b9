"""A thousand ways in which a write can go wrong: what was asked for once is done at most once, and what was told is so.

Each seed is a scenario: an upstream that loses answers before and after it acted, refuses, is slow, or away; clients
that try again as the CLI does, or as people's scripts do; a proxy that is restarted, or dies. The fake counts every
effect. A seed that fails stands in the name of the test, and `pytest tests/test_faults.py -k "[17]"` runs just that.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from conftest import Answer, Gateway, Start
from fake_vast import Behaviour, Fault, Form, Kind, Limit, identity_of

pytestmark = pytest.mark.looptime

SEEDS = range(int(os.environ.get("VAST_TEST_SCENARIOS", "1000")))
FORMS: list[Form] = ["text", "text_threshold", "detail", "success_false", "json_retry_after"]
KINDS: list[Kind] = ["drop_before", "drop_after", "truncate", "slow", "slow_before", "status", "status_after"]
AGAIN = (429, 502, 503, 504)
"""Statuses on which the stock client tries again (vastai 1.9.1)."""


@dataclass
class Job:
    """One write that somebody wants done once."""

    marker: str
    key: str
    method: str
    path: str
    body: dict[str, Any]
    told: list[Answer] = field(default_factory=list)
    """The last answer it got, if any."""


def is_done(answer: Answer) -> bool:
    return answer.status == 200 and answer.json.get("success") is True


class Scenario:
    """What one seed makes happen."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.behaviour = Behaviour(
            form=chance.choice(FORMS),
            limits=chance.choice([{}, {"*": Limit(1.7)}, {"*": Limit(5.5, 1, 3)}]),
            account=chance.choice([None, None, Limit(1.0, 5)]),
            seed=seed,
        )
        self.settings: dict[str, Any] = {
            "upstreams": {"read_timeout": chance.choice([20, 120]), "max_connections": chance.choice([1, 100])},
            "drain": {"timeout": chance.choice([1, 30])},
        }
        self.faults = [self.fault() for _ in range(chance.randrange(2, 8))]

    def fault(self) -> Fault:
        chance = self.chance
        if chance.random() < 0.2:
            return Fault(kind="refuse429", times=chance.randrange(1, 4), retry_after=chance.choice([None, 1, 40]))
        return Fault(
            kind=chance.choice(KINDS),
            times=chance.randrange(1, 4),
            probability=chance.random(),
            delay=chance.choice([0, 0, 0.1, 3, 30, 30, 200]),
            status=chance.choice([502, 503, 504]),
            reset=chance.random() < 0.5,
        )

    def jobs(self, gateway: Gateway) -> list[Job]:
        chance = self.chance
        jobs = []
        for number in range(chance.randrange(2, 8)):
            marker = f"job-{number}"
            body: dict[str, Any] = {"client_id": "me", "image": "pytorch/pytorch", "disk": 20, "label": marker}
            # An offer can be taken only once, so what is sent twice shows best where the server finds another.
            path = chance.choice([*["/api/v0/launch_instance/"] * 3, gateway.offer(number)])
            jobs.append(Job(marker, chance.choice("ab"), "PUT", path, body))
        return jobs

    async def client(self, gateway: Gateway, job: Job) -> None:
        """Somebody who wants the job done, and tries again like one of four kinds of clients."""
        chance = self.chance
        await asyncio.sleep(chance.random() * chance.choice([0, 5, 60]))
        kind = chance.choice(["cli", "bulk", "script", "script", "script", "keyed", "gone"])
        match kind:
            case "cli":
                await self.cli(gateway, job)
            case "bulk":
                for _ in range(6):
                    await self.cli(gateway, job)
                    if (job.told and job.told[-1].status == 200) or (job.told and job.told[-1].status not in AGAIN):
                        break
            case "script" | "keyed":
                headers = {"User-Agent": "script/1"}
                if kind == "keyed":
                    headers["Idempotency-Key"] = f'"{job.marker}"'
                patience = chance.choice([0.5, 2, 5, 20, 40])
                for _ in range(chance.randrange(1, 8)):
                    answer = await self.ask(gateway, job, patience, headers)
                    if answer is not None and answer.status not in AGAIN:
                        break
                    await asyncio.sleep(chance.choice([0, 0.1, 1, 10]))
            case _:
                await self.ask(gateway, job, chance.choice([0.01, 1, 10]), {})

    async def cli(self, gateway: Gateway, job: Job) -> None:
        """Three attempts, as vastai 1.9.1 makes them: 120 s between bytes, Retry-After up to 60 s."""
        for attempt in range(3):
            answer = await self.ask(gateway, job, None, {})
            pause = 0.15 * 1.5**attempt
            if answer is not None:
                if answer.status not in AGAIN:
                    return
                after = float(answer.headers.get("Retry-After", pause))
                if after > 60:
                    return
                pause = max(pause, after)
            await asyncio.sleep(pause)

    async def ask(self, gateway: Gateway, job: Job, patience: float | None, headers: dict[str, str]) -> Answer | None:
        timeout = aiohttp.ClientTimeout(total=patience, sock_read=120, sock_connect=120)
        job.told.clear()
        try:
            async with asyncio.timeout(patience):
                answer = await gateway(job.method, job.path, job.body, key=job.key, headers=headers, timeout=timeout)
        except (TimeoutError, aiohttp.ClientError):
            return None
        job.told.append(answer)
        return answer

    async def restarts(self, gateway: Gateway) -> None:
        chance = self.chance
        for _ in range(chance.choice([0, 0, 1, 1, 2])):
            await asyncio.sleep(chance.random() * chance.choice([3, 30, 120]))
            await gateway.restart(crash=chance.random() < 0.5, pause=chance.choice([0, 0.1, 2]))


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_was_asked_for_once_is_done_at_most_once_and_what_was_told_is_so(start: Start, seed: int) -> None:
    scenario = Scenario(seed)
    gateway: Gateway = await start(scenario.behaviour, **scenario.settings)
    gateway.fake.faults += scenario.faults
    gateway.session.connector._force_close = True  # type: ignore[union-attr]
    jobs = scenario.jobs(gateway)
    async with asyncio.timeout(20_000):
        await asyncio.gather(scenario.restarts(gateway), *(scenario.client(gateway, job) for job in jobs))
        await gateway.app.pipeline.flights.finish()
    await asyncio.sleep(250)  # what the fake was still about to do

    for job in jobs:
        rented = [effect for effect in gateway.fake.effects if effect.kind == "rented" and _label(effect) == job.marker]
        assert len(rented) <= 1, (seed, job)
        for answer in job.told:
            assert answer.json.get("error") != "internal_error", (seed, job)
            if is_done(answer):
                assert len(rented) == 1, (seed, job)
                assert rented[0].identity == identity_of(job.key), (seed, job)
                mine = gateway.fake.world.account(identity_of(job.key)).instances
                assert mine[answer.json["new_contract"]]["label"] == job.marker, (seed, job)


def _label(effect: Any) -> str:
    return str(json.loads(effect.call.body)["label"])
