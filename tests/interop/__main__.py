"""``python -m tests.interop``: stock virsh and libvirt-python against our daemons, on real QEMU.

Every verb; every version of libvirt's migration, with every message of it broken in three ways on either connection;
and libvirt's Python binding with its event loop.  The last line sums it up; FAILED says which rule was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import anyio

import ferryman
from tests.daemons import daemons, virsh
from tests.interop import faults, verbs
from tests.qemu import NAME, laid_out

_PROTOCOLS = ("v1", "v2", "v3", "params")


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def _peer_to_peer() -> None:
    with laid_out() as field, daemons(field) as (a, b):
        uris = a.uri(field.roots[0]), b.uri(field.roots[1])
        path = field.directory / "definition.xml"
        path.write_text(field.definition)
        virsh(uris[0], "create", str(path))
        field.wait_ticks(20)
        virsh(uris[0], "migrate", "--live", "--p2p", NAME, uris[1])
        field.the_runner()
        virsh(uris[1], "destroy", NAME)
        field.assert_unbroken(crossings=1)


async def _own_client(uris: tuple[str, str], definition: str) -> None:
    async with ferryman.connect(uris[0]) as a, ferryman.connect(uris[1]) as b:
        domain = await a.create(definition)
        await domain.migrate(b)
        await (await b.lookup_by_name(NAME)).destroy()


def _clients() -> list[str]:
    """Clients that drive two daemons."""
    found = ["virsh"]
    for name in ("libvirt-python", "ferryman"):
        with laid_out() as field, daemons(field) as (a, b):
            uris = a.uri(field.roots[0]), b.uri(field.roots[1])
            if name == "ferryman":
                anyio.run(_own_client, uris, field.definition)
            elif wrong := verbs.run_libvirt_python(field, uris):
                _say(f"libvirt-python: {wrong}")
                continue
            found.append(name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description=__doc__)
    parser.add_argument("--sample", type=int, help="broken messages of each version; default: every one")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the sample")
    parser.add_argument("--write", action="store_true", help="run the verbs alone, and write their page")
    arguments = parser.parse_args(argv)
    print("verbs of virsh", flush=True)
    outcomes = verbs.run_verbs(_say)
    wrong_verbs, total = [each.verb for each in outcomes if not each.good], len(outcomes)
    if arguments.write:
        verbs.PAGE.write_text(verbs.page(outcomes))
        return 0
    migrations, broken = [], 0
    try:
        for protocol in _PROTOCOLS:
            print(f"migration {protocol}, seed {arguments.seed}", flush=True)
            broken += faults.run(protocol, arguments.sample, arguments.seed, _say)
            migrations.append(protocol)
        _peer_to_peer()
        migrations.append("p2p")
        wrong = ""
    except (faults.Wrong, AssertionError) as error:
        wrong = str(error)
    clients = _clients()
    good = not wrong and not wrong_verbs and len(clients) == 3
    details = {"broken_messages": broken, "wrong": wrong, "wrong_verbs": wrong_verbs}
    passed = total - len(wrong_verbs)
    print(
        f"interop: {'ok' if good else 'FAILED'} verbs={passed}/{total} migrations={','.join(migrations)}"
        f" clients={','.join(clients)} {json.dumps(details)}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
