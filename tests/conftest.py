"""Every test runs on the CPU backend, whatever else is installed."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
