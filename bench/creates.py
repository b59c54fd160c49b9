"""N creates at once by the stock SDK, at the vendor's real interval, in real time; and a hundred equal searches.

    python bench/creates.py [--creates 20] [--true-interval 4.5] [--penalty 12] [--form json_retry_after]

The proxy runs with its shipped settings in front of the fake, each in a process of its own. Takes as long as the limit
takes: about 90 s for 20, 15 minutes for 200. With --true-interval 5.5 the documented 4.5 s is wrong, and the proxy has
to find out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fake_vast import Behaviour, FakeVast, Limit

ASK, SEARCH = "PUT /api/v0/asks/{id}/", "POST /api/v0/bundles/"
CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from vastai import VastAI

url, count, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def client():
    return VastAI(api_key="0123456789abcdef" * 4, server_url=url)

def create(offer):
    try:
        return bool(client().create_instance(id=offer, image="pytorch/pytorch", disk=10).get("new_contract"))
    except Exception as error:
        print(repr(error), file=sys.stderr)
        return False

def search(_):
    return len(client().search_offers(query="num_gpus>=1", limit=20))

if kind == "search":
    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(search, range(count)))
else:
    offers = json.loads(sys.argv[4])
    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(create, offers))
print(json.dumps(done))
"""


def run_client(url: str, count: int, kind: str, offers: list[Any]) -> list[Any]:
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLIENT, url, str(count), kind, json.dumps(offers)],
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        raise SystemExit(told.stderr)
    found: list[Any] = json.loads(told.stdout.splitlines()[-1])
    return found


async def measure(options: argparse.Namespace) -> None:
    behaviour = Behaviour(form=options.form, limits={ASK: Limit(options.true_interval, 1, options.penalty)})
    port = 18071
    with tempfile.TemporaryDirectory() as folder:
        async with FakeVast(behaviour) as fake:
            command = [sys.executable, "-m", "proxy", "serve", "--listen", f"127.0.0.1:{port}", "--upstream", fake.url]
            environment = os.environ | {"XDG_STATE_HOME": folder}
            proxy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
            try:
                await asyncio.sleep(2)
                url = f"http://127.0.0.1:{port}"
                await asyncio.to_thread(run_client, url, 100, "search", [])
                print(f"100 equal searches at once: {len(fake.calls(SEARCH))} upstream call(s)")
                began = time.monotonic()
                offers = [offer["id"] for offer in fake.offers][: options.creates]
                done = await asyncio.to_thread(run_client, url, options.creates, "create", offers)
                at = [call.at for call in fake.calls(ASK)]
                bound = (options.creates - 1) * options.true_interval
                effects = Counter(effect.target for effect in fake.effects if effect.kind == "rented")
                print(
                    f"{options.creates} creates at once: {sum(done)} succeeded, "
                    f"{sum(call.refused for call in fake.calls(ASK))} 429s upstream, "
                    f"{sum(count > 1 for count in effects.values())} made twice, "
                    f"first to last send {at[-1] - at[0]:.2f} s, physical limit {bound:.2f} s, "
                    f"ratio {(at[-1] - at[0]) / bound:.3f}; the client was done after {time.monotonic() - began:.1f} s"
                )
            finally:
                proxy.terminate()
                proxy.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--creates", type=int, default=20)
    parser.add_argument("--true-interval", type=float, default=4.5)
    parser.add_argument("--penalty", type=float, default=12)
    parser.add_argument("--form", default="json_retry_after")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
