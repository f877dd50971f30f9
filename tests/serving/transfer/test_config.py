"""--role and --kv-transfer-config."""

from __future__ import annotations

import pytest

from serving.transfer.config import TransferConfig
from serving.transfer.digests import chain, content_digest
from serving.transfer.identity import weights_digest


@pytest.mark.parametrize(
    ("role", "text", "expected"),
    [
        (None, None, ""),
        ("prefill", None, "prefill"),
        (None, '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}', "both"),
        (None, '{"kv_role": "kv_consumer", "kv_connector_extra_config": {"backends": ["UCX"]}}', "decode"),
        ("decode", '{"lease_s": 5, "peers": "10.0.0.0/8, *"}', "decode"),
        (None, '{"kv_load_failure_policy": "recompute"}', "both"),
    ],
)
def test_roles(role, text, expected):
    assert TransferConfig.of(role, text).role == expected


@pytest.mark.parametrize(
    ("role", "text", "match"),
    [
        ("decode", '{"kv_role": "kv_producer"}', "give one"),
        (None, '{"kv_role": "consumer"}', "kv_consumer"),
        (None, '{"leases": 3}', "no field 'leases'"),
        (None, '{"lease_s": 0}', "lease_s must be a number"),
        (None, '{"peers": ["10.0.0.0/99"]}', "no network"),
        (None, '{"peers": [3]}', "list of hosts"),
        (None, '{"max_parallel": 0}', "max_parallel"),
        (None, '{"transport": "nixl"}', "one of grpc, auto, device"),
        (None, '{"transport": "device", "tls": true}', "not encrypted"),
    ],
)
def test_what_is_refused(role, text, match):
    with pytest.raises(ValueError, match=match):
        TransferConfig.of(role, text)


@pytest.mark.parametrize(
    ("peers", "host", "allowed"),
    [
        (None, "127.0.0.1", True),
        (None, "::1", True),
        (None, "localhost", True),
        (None, "10.0.0.3", False),
        (None, "example.com", False),
        (("10.0.0.0/8",), "10.2.3.4", True),
        (("10.0.0.0/8",), "localhost", False),
        (("engine-0:50051",), "engine-0", True),
        (("engine-0:50052",), "engine-0", False),
        (("*",), "anything", True),
    ],
)
def test_peers(peers, host, allowed):
    config = TransferConfig("both") if peers is None else TransferConfig("both", peers)
    assert config.allows(host, 50051) is allowed


def test_a_page_is_known_by_all_that_decides_it():
    links = chain(b"model", range(64), 16, None, None)
    assert len(links) == 4
    for other in (
        chain(b"other", range(64), 16, None, None),
        chain(b"model", range(1, 65), 16, None, None),
        chain(b"model", range(64), 16, "adapter", None),
        chain(b"model", range(64), 16, None, "salt"),
    ):
        assert not set(links) & set(other)
    assert chain(b"model", [*range(48), *range(16)], 16, None, None)[:3] == links[:3]
    digest = content_digest(links[1], 1, b"content")
    assert digest not in (content_digest(links[2], 1, b"content"), content_digest(links[1], 2, b"content"))
    assert digest != content_digest(links[1], 1, b"Content")


def test_weights_are_told_apart(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(5_000_000))
    known = weights_digest(folder)
    (folder / "README.md").write_text("words")
    assert weights_digest(folder) == known
    raw = bytearray(5_000_000)
    raw[1_000_000:1_100_000] = b"\1" * 100_000
    (folder / "model.safetensors").write_bytes(raw)
    assert weights_digest(folder) != known
