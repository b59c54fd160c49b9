"""Whatever goes wrong, in whatever order: nothing is left behind, nothing is rented twice, no answer goes astray.

Each seed is a scenario of its own: limits of every form, faults, impatient clients, reloads. A seed that fails stands
in the name of the test, and `pytest tests/test_stress.py -k "[17]"` runs it again just so.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
from conftest import Answer, Gateway, Start, assert_nothing_is_left
from fake_vast import Behaviour, Fault, Form, Kind, Limit, identity_of

pytestmark = pytest.mark.looptime

SEEDS = range(60)
ASK = "PUT /api/v0/asks/{id}/"
FORMS: list[Form] = ["text", "text_threshold", "detail", "success_false", "json_retry_after"]
KINDS: list[Kind] = [
    "drop_before", "drop_after", "truncate", "slow", "slow_before", "status", "status_after", "refuse429", "big"
]  # fmt: skip
OURS = {"wait_too_long", "queue_full", "still_queued", "search_quota_exceeded"}


@dataclass
class Asked:
    """One request that got an answer."""

    key: str
    what: str
    answer: Answer


class Scenario:
    """What one seed makes happen."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.behaviour = Behaviour(
            form=chance.choice(FORMS),
            scope=chance.choice(["key", "key", "ip"]),
            ratelimit_headers=chance.random() < 0.3,
            ratelimit_layer=chance.choice(["route", "account"]),
            account=chance.choice([None, None, Limit(1.0, 5)]),
            limits=chance.choice([{}, {"*": Limit(1.7)}, {ASK: Limit(5.5, 1, chance.choice([0, 12]))}]),
            search_quota=chance.choice([None, None, 4]),
            seed=seed,
        )
        self.settings: dict[str, Any] = {
            "queue": {"max_wait": chance.choice([30, 200, 1800]), "max_waiting": chance.choice([3, 10_000])},
            "upstreams": {"max_connections": chance.choice([2, 100])},
        }
        self.faults = [self.fault() for _ in range(chance.randrange(6))]
        self.answered: list[Asked] = []

    def fault(self) -> Fault:
        chance = self.chance
        return Fault(
            kind=chance.choice(KINDS),
            times=chance.randrange(1, 5),
            probability=chance.random(),
            delay=chance.choice([0.1, 3, 30]),
            status=chance.choice([502, 503, 500, 404]),
            size=chance.choice([1000, 3_000_000]),
            retry_after=chance.choice([None, 1, 40]),
            reset=chance.random() < 0.5,
        )

    async def one(self, gateway: Gateway, number: int, offer: str) -> None:
        chance = self.chance
        await asyncio.sleep(chance.random() * chance.choice([0, 1, 30]))
        key, what = chance.choice("abc"), chance.randrange(6)
        method, path, body = [
            ("PUT", offer, {"client_id": "me"}),
            ("GET", "/api/v0/users/current", None),
            ("POST", "/api/v0/bundles/", {"limit": chance.randrange(1, 4)}),
            ("GET", "/api/v1/instances/", None),
            ("GET", f"/api/v0/instances/{chance.randrange(3)}/?owner=me", None),
            ("PUT", "/api/v0/instances/31000001/", {"label": str(number)}),
        ][what]
        headers = {"User-Agent": chance.choice(["vastai-cli/1.9.1", "Mozilla/5", "python-requests/2.32"])}
        if chance.random() < 0.2:
            headers["Cache-Control"] = chance.choice(["no-cache", "no-store", "max-age=0", "max-age=5"])
        patience = chance.choice([0, 0.01, 0.5, 2.02, 5, 20]) if chance.random() < 0.3 else None
        try:
            async with asyncio.timeout(patience):
                answer = await gateway(method, path, body, key=key, headers=headers)
        except (TimeoutError, aiohttp.ClientPayloadError):
            return  # it left, or an answer longer than may be held broke off
        self.answered.append(Asked(key, f"{method} {path}", answer))

    async def reloads(self, gateway: Gateway) -> None:
        chance = self.chance
        ceiling = gateway.app.settings.limits.global_
        for _ in range(chance.choice([0, 0, 3])):
            await asyncio.sleep(chance.random() * 20)
            changes: list[tuple[str, dict[str, Any]]] = [
                ("limits", {"scope": chance.choice(["auto", "key", "ip"])}),
                ("limits", {"scale": chance.choice([1.0, 1.5, 2.0])}),
                ("limits", {"global_": chance.choice([None, ceiling])}),
                ("upstreams", {"read_timeout": float(chance.randrange(20, 90))}),
                ("upstreams", {"max_connections": chance.choice([2, 50])}),
            ]
            section, values = chance.choice(changes)
            old: Any = gateway.app.settings
            changed: dict[str, Any] = {section: replace(getattr(old, section), **values)}
            gateway.app.reload(replace(old, **changed))


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_goes_wrong_nothing_is_left_and_nothing_is_done_twice(start: Start, seed: int) -> None:
    scenario = Scenario(seed)
    gateway: Gateway = await start(scenario.behaviour, **scenario.settings)
    gateway.fake.faults += scenario.faults
    offers = [gateway.offer(number) for number in range(60)]
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(20_000):
        count = scenario.chance.randrange(10, 60)
        asking = [scenario.one(gateway, number, offers[number]) for number in range(count)]
        await asyncio.gather(scenario.reloads(gateway), *asking)
        await gateway.app.pipeline.flights.finish()
    await asyncio.sleep(5)

    assert_nothing_is_left(gateway, tasks)
    sent = [call.target for call in gateway.fake.calls(ASK) if not call.refused and call.status != 429]
    assert len(sent) == len(set(sent))
    rented = [effect.target for effect in gateway.fake.effects if effect.kind == "rented"]
    assert len(rented) == len(set(rented))
    for asked in scenario.answered:
        told = asked.answer.json if asked.answer.body and b'"pad"' not in asked.answer.body[:20] else {}
        error = told.get("error") if isinstance(told, dict) else None
        assert error != "internal_error"
        assert asked.answer.status != 429 or error in OURS
        if asked.what.endswith("/users/current") and asked.answer.status == 200 and told:
            assert told["id"] == gateway.fake.world.account(identity_of(asked.key)).number
