"""A process that offers arrays of pages from its device: `python -m tests.serving.transfer.offering FORMS`.

It says where on its first line, then answers each line of its input: `offer VALUE LEASE_S` with the offer's number, `pulled
NUMBER` and `waiting` with how many wait, `memory` with the bytes that it has in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from serving.engine.api.peers.transfers import Offer


class Offering:
    """The process, as its parent sees it.

    Args:
        forms: (shape, dtype) of each array's row.
    """

    def __init__(self, forms):
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.transfer.offering", json.dumps(forms)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self.address = self.popen.stdout.readline().strip()

    def ask(self, line):
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        return int(self.popen.stdout.readline())

    def offer(self, value=1, lease_s=60.0):
        return Offer(self.address, self.ask(f"offer {value} {lease_s}"), 0, 1)

    def close(self):
        self.popen.kill()
        self.popen.wait()
        self.popen.stdin.close()
        self.popen.stdout.close()


def _main():
    import jax
    import numpy as np

    from serving.engine.device.stores.page_store import PARCEL
    from serving.transfer.device_link import DeviceLink
    from serving.transfer.forms import Form

    forms = [Form(tuple(shape), np.dtype(dtype)) for shape, dtype in json.loads(sys.argv[1])]
    link = DeviceLink(forms, jax.devices()[0], "127.0.0.1", 60.0)
    print(link.address, flush=True)
    for line in sys.stdin:
        what, *value = line.split()
        if what == "offer":
            link._lease_s = float(value[1])
            content = [np.full((PARCEL, *one.shape), int(value[0]), one.dtype) for one in forms]
            found = link.offer([jax.device_put(one, jax.devices()[0]) for one in content]).number
        elif what in ("pulled", "waiting"):
            if value:
                link.pulled(int(value[0]))
            found = link.waiting
        else:
            with open("/proc/self/statm") as file:
                found = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        print(found, flush=True)


if __name__ == "__main__":
    _main()
