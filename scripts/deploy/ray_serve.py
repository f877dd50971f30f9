"""Engines and gateways under Ray Serve.

    pip install 'ray[serve]'
    serve run scripts.deploy.ray_serve:app model=Qwen/Qwen3-8B num_replicas=2 num_gpus=1
    serve run scripts.deploy.ray_serve:app model=Qwen/Qwen3-8B num_replicas=4 prefill_replicas=1 gateways=2 num_gpus=1

Arguments that are not named here become flags of the engines: `max_model_len=8192` is `--max-model-len 8192`;
`gateway_policy=cache` is the gateways' `--policy cache`. With gateways, HTTP requests go to those, and each engine gets what the
router gives it; with `prefill_replicas` these compute prompts for the others. Without, Ray spreads requests over the engines. Each
replica is a server process of its own; Ray decides where replicas run, restarts those that fail their health check, and with
`max_replicas` has as many engines as waiting requests and KV pages call for.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.deploy.server_process import ServerProcess

RAYS_OWN = (
    "num_replicas", "prefill_replicas", "gateways", "max_replicas", "waiting", "kv_usage", "num_gpus", "num_cpus",
    "max_ongoing_requests", "resources", "start_timeout_s",
)  # fmt: skip
"""Arguments that are not flags of a server."""
GATEWAYS = "gateway_"
"""What begins an argument that is a flag of the gateways."""
SHARED = ("model", "chat_template")
"""Flags of both: gateways read the model's tokenizer."""
DIRECTORY = "jaxserve-directory"
TELL_S, SILENT_S = 1.0, 10.0
"""How often an engine says that it is there, and after what silence it is not."""
GONE_S = 2.5
"""How long an engine that is to end goes on taking requests: gateways look every second who is there."""


class Directory:
    """Which engines there are: an actor that engines tell of themselves and gateways ask. Holds nothing that is not said again."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}

    def here(self, address: str, role: str) -> None:
        """An engine is ready."""
        self._seen[address] = role, time.monotonic()

    def gone(self, address: str) -> None:
        """It takes no more requests."""
        self._seen.pop(address, None)

    def engines(self) -> dict[str, str]:
        """Address of each, and its role."""
        now = time.monotonic()
        self._seen = {address: one for address, one in self._seen.items() if now - one[1] < SILENT_S}
        return {address: role for address, (role, _) in self._seen.items()}


def directory() -> Any:
    """A handle to the directory of the application that this replica is of, which whoever comes first starts."""
    import ray
    from ray import serve

    name = serve.get_replica_context().app_name
    options: dict[str, Any] = {"get_if_exists": True, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
    return ray.remote(Directory).options(name=f"{DIRECTORY}-{name}", namespace="serve", **options).remote()


class Engine(ServerProcess):
    """One engine; ready when its constructor returns, so that an update takes the next one away only then.

    Args:
        arguments: flags of the engine.
        role: prefill, decode or both; "" where it exchanges no pages.
        found: whether gateways are to find it.
        start_timeout_s, command: as in ServerProcess.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        role: str = "",
        found: bool = False,
        start_timeout_s: float = 3600.0,
        command: Sequence[str] = (sys.executable, "-m", "serving.launch"),
    ) -> None:
        given = dict(arguments) | {"no_progress": True}
        if role:
            given |= {"role": role}
            if role != "prefill":
                given.setdefault("kv_transfer_config", '{"peers": ["*"]}')  # the cluster's network is its operator's
        super().__init__(given, command, start_timeout_s, _own_address() if found else "127.0.0.1")
        self.wait_here()
        self._over = threading.Event()
        self._directory = directory() if found else None
        if self._directory is not None:
            self._tell(role)
            threading.Thread(target=self._keep_telling, args=(role,), daemon=True).start()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What its policy goes by: requests that wait, and the share of KV pages in use."""
        text = (await self._client.get("/metrics", timeout=5.0)).text
        found = {}
        for name, metric in (("waiting", "num_requests_waiting"), ("kv_usage", "kv_cache_usage_perc")):
            values = [float(value) for value in re.findall(rf"^jaxserve:{metric}(?:{{[^}}]*}})? (\S+)$", text, re.M)]
            found[name] = sum(values)
        return found

    def _tell(self, role: str) -> None:
        import ray

        assert self._directory is not None
        ray.get(self._directory.here.remote(self.grpc_address, role))

    def _keep_telling(self, role: str) -> None:
        while not self._over.wait(TELL_S):
            if self._process.poll() is None:
                with contextlib.suppress(Exception):  # Ray starts the directory again; so do we, in the next round
                    self._tell(role)

    def __del__(self) -> None:
        """Ray's word for "end": nobody is sent here any more, then the server drains."""
        if getattr(self, "_directory", None) is not None and not self._over.is_set():
            import ray

            self._over.set()
            with contextlib.suppress(Exception):
                ray.get(self._directory.gone.remote(self.grpc_address))  # pyright: ignore[reportOptionalMemberAccess]
            time.sleep(GONE_S)
        self.end()


class Gateway(ServerProcess):
    """One gateway over the engines of its application.

    Args:
        arguments: its flags.
        pools: the engines' deployments, which Ray deploys with it.
        start_timeout_s: how long to wait for the first engine.
        command: what starts a gateway.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        pools: Sequence[Any] = (),
        start_timeout_s: float = 3600.0,
        command: Sequence[str] = (sys.executable, "-m", "serving.gateway"),
    ) -> None:
        self._directory = directory()
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-gateway-"))
        self._over = threading.Event()
        self._look()
        files = {"target_file": self._folder / "engines", "prefill_target_file": self._folder / "prefill"}
        given = dict(arguments) | files | {"target_refresh": 1, "connect_timeout": 0}
        super().__init__(given, command, start_timeout_s)
        threading.Thread(target=self._keep_looking, daemon=True).start()
        self.wait_here()

    def _look(self) -> None:
        """Writes who is there now, where that has changed. What is written last is moved into place: it is never read in part."""
        import ray

        found = ray.get(self._directory.engines.remote())
        for name, roles in (("engines", ("", "decode", "both")), ("prefill", ("prefill",))):
            text = "".join(f"{address}\n" for address, role in sorted(found.items()) if role in roles)
            path = self._folder / name
            if not path.exists() or path.read_text() != text:
                new = self._folder / f"{name}.new"
                new.write_text(text)
                new.replace(path)

    def _keep_looking(self) -> None:
        while not self._over.wait(TELL_S):
            with contextlib.suppress(Exception):
                self._look()

    def __del__(self) -> None:
        self.end()
        self._over.set()


class Enough:
    """Ray's autoscaling policy of engines: as many as bring waiting requests and used pages to their targets, in the mean.

    Args:
        targets: of each of what `Engine.record_autoscaling_stats` tells.
    """

    def __init__(self, **targets: float) -> None:
        self._targets = targets

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        wanted = [
            context.current_num_replicas * (sum(of.values()) / len(of)) / target
            for name, target in self._targets.items()
            if (of := metrics.get(name))
        ]
        return (max(wanted) if wanted else context.target_num_replicas), {}


def _own_address() -> str:
    """This machine's, as the cluster knows it."""
    import ray

    return ray.util.get_node_ip_address()


def app(arguments: dict[str, Any]) -> Any:
    """The application that `serve run` builds from its name=value arguments."""
    from ray import serve

    given = {name: value for name, value in arguments.items() if name not in RAYS_OWN}
    ours = {name: value for name, value in given.items() if not name.startswith(GATEWAYS)}
    theirs = {name.removeprefix(GATEWAYS): value for name, value in given.items() if name.startswith(GATEWAYS)}
    theirs |= {name: given[name] for name in SHARED if name in given}
    start, gateways = float(arguments.get("start_timeout_s", 3600)), int(arguments.get("gateways", 0))
    helpers = int(arguments.get("prefill_replicas", 0))
    if helpers and not gateways:
        raise ValueError("prefill_replicas needs gateways: they decide which prompts these compute.")
    options = {"num_gpus": float(arguments.get("num_gpus", 0)), "num_cpus": float(arguments.get("num_cpus", 4))}
    if "resources" in arguments:  # e.g. {"TPU": 4}
        options["resources"] = arguments["resources"]
    common = {
        "max_ongoing_requests": int(arguments.get("max_ongoing_requests", 1024)), "graceful_shutdown_timeout_s": 90,
    }  # fmt: skip

    def engines(name: str, role: str, count: int) -> Any:
        size: dict[str, Any] = {"num_replicas": count}
        if "max_replicas" in arguments:
            targets = {"waiting": float(arguments.get("waiting", 4)), "kv_usage": float(arguments.get("kv_usage", 0.8))}
            policy = {"policy_function": f"{__name__}:Enough", "policy_kwargs": targets}
            most = int(arguments["max_replicas"])
            size = {"autoscaling_config": {"min_replicas": count, "max_replicas": most, "policy": policy}}
        deployment = serve.deployment(Engine, name=name, ray_actor_options=options, **size, **common)
        return deployment.bind(ours, role, gateways > 0, start)

    if not gateways:
        return engines("jaxserve", "", int(arguments.get("num_replicas", 1)))
    pools = [engines("jaxserve", "decode" if helpers else "", int(arguments.get("num_replicas", 1)))]
    if helpers:
        pools.append(engines("jaxserve-prefill", "prefill", helpers))
    deployment = serve.deployment(
        Gateway, name="jaxserve-gateway", num_replicas=gateways, ray_actor_options={"num_cpus": 1}, **common
    )
    return deployment.bind(theirs, pools, start)
