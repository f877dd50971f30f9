"""`--role` and `--kv-transfer-config`: which side of a transfer an engine takes, and with whom."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from typing import Any

from serving.access import ClientTls

ROLES = ("prefill", "decode", "both")
KV_ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
"""vLLM's words for them."""

TAKEN = (
    "kv_connector",
    "engine_id",
    "kv_buffer_device",
    "kv_buffer_size",
    "kv_load_failure_policy",
    "kv_connector_extra_config",
)
"""Fields of vLLM's that are taken and not looked at: there is one way to send pages here, and what does not come is computed."""

ANYBODY = "*"

TRANSPORTS = ("grpc", "auto", "device")
"""How pages come: over gRPC, or from device to device where both sides can. "auto" takes a GPU or a TPU for that, "device" a CPU
too."""

PEER_KEY_VARIABLE = "JAXSERVE_PEER_API_KEY"
"""The key that an engine sends to its peers, of role proxy there; in the environment alone."""


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """Who exchanges pages with whom.

    Attributes:
        role: "prefill" gives pages, "decode" takes them, "both" does both; "" exchanges nothing.
        peers: hosts, host:port, networks (10.0.0.0/8) or "*": where pages may be fetched from. An engine believes what its peers
            send, so they must be engines of the same operator.
        lease_s: how long pages are kept for whoever is to fetch them.
        timeout_s: how long a request waits for its pages at most, before it computes what has not come.
        stall_s: how long nothing at all may come.
        max_parallel: transfers to this engine at once; more wait.
        transport: one of TRANSPORTS.
        host: what others reach this engine by; "" is --host, or this machine's address where that stands for all.
        tls: whether peers are reached over TLS.
        ssl_ca_certs, ssl_certfile, ssl_keyfile: files for that, as of a gateway's --target-ssl flags.
    Raises:
        ValueError: naming the field.
    """

    role: str = ""
    peers: tuple[str, ...] = ("localhost", "127.0.0.0/8", "::1")
    lease_s: float = 30.0
    timeout_s: float = 60.0
    stall_s: float = 5.0
    max_parallel: int = 16
    transport: str = "grpc"
    host: str = ""
    tls: bool = False
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        for name in ("lease_s", "timeout_s", "stall_s"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise ValueError(f"kv_transfer_config: {name} must be a number of seconds above 0, got {value!r}.")
        if isinstance(self.max_parallel, bool) or not isinstance(self.max_parallel, int) or self.max_parallel < 1:
            raise ValueError(
                f"kv_transfer_config: max_parallel must be a whole number of at least 1, got {self.max_parallel!r}."
            )
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"kv_transfer_config: transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}."
            )
        if self.transport == "device" and (self.tls or self.ssl_ca_certs or self.ssl_certfile or self.ssl_keyfile):
            raise ValueError(
                "kv_transfer_config: what goes from device to device is not encrypted: leave transport or tls out."
            )
        for name in ("host", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"kv_transfer_config: {name} must be a text, got {getattr(self, name)!r}.")
        for peer in self.peers:
            if "/" in peer:
                try:
                    ipaddress.ip_network(peer, strict=False)
                except ValueError:
                    raise ValueError(f"kv_transfer_config: peers has {peer!r}, which is no network.") from None

    @classmethod
    def of(cls, role: str | None, text: str | None) -> TransferConfig:
        """From the settings.

        Raises:
            ValueError: a field that there is not, a value that it does not take, or two roles.
        """
        given: Any = {} if text is None else json.loads(text)
        kv_role = given.pop("kv_role", None)
        if kv_role is not None and kv_role not in KV_ROLES:
            raise ValueError(f"kv_transfer_config: kv_role must be one of {', '.join(KV_ROLES)}, got {kv_role!r}.")
        told = KV_ROLES.get(kv_role) if kv_role is not None else None
        if role is not None and told is not None and role != told:
            raise ValueError(f"role is {role}, and kv_transfer_config says {kv_role}: give one.")
        known = [field.name for field in dataclasses.fields(cls) if field.name != "role"]
        extra = given.pop("kv_connector_extra_config", None)
        fields = {**(extra if isinstance(extra, dict) else {}), **given}
        fields = {name: value for name, value in fields.items() if name not in TAKEN}
        for name in fields:
            if name not in known and not (isinstance(extra, dict) and name in extra):
                raise ValueError(f"kv_transfer_config has no field {name!r}; it takes kv_role, {', '.join(known)}.")
        fields = {name: value for name, value in fields.items() if name in known}
        if "peers" in fields:
            peers = fields["peers"]
            peers = peers.split(",") if isinstance(peers, str) else peers
            if not isinstance(peers, list) or not all(isinstance(one, str) and one.strip() for one in peers):
                raise ValueError(f"kv_transfer_config: peers must be a list of hosts or networks, got {peers!r}.")
            fields["peers"] = tuple(one.strip() for one in peers)
        role = role or told or ("" if text is None else "both")
        return cls(role=role, **fields)

    @property
    def client_tls(self) -> ClientTls | None:
        """How peers are reached; None without TLS."""
        tls = ClientTls(self.ssl_ca_certs, self.ssl_keyfile, self.ssl_certfile)
        return tls if self.tls or tls != ClientTls() else None

    @property
    def gives(self) -> bool:
        """Whether others may fetch pages here."""
        return self.role in ("prefill", "both")

    @property
    def takes(self) -> bool:
        """Whether it fetches pages from others."""
        return self.role in ("decode", "both")

    def allows(self, host: str, port: int) -> bool:
        """Whether an address is a peer's."""
        bare = host.strip("[]")
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            address = None
        for peer in self.peers:
            if peer in (ANYBODY, bare, f"{bare}:{port}", f"[{bare}]:{port}"):
                return True
            if "/" in peer and address is not None and address in ipaddress.ip_network(peer, strict=False):
                return True
        return False
