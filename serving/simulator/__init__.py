"""The real scheduler under a virtual clock: traces, a cost model of a step in place of a device, and what came of it.

Imports `serving.engine`'s plain-Python half only: no jax, no model, no device. `scripts/simulate.py` is its command line.
"""
