"""The manifests of prefill and decode apart: roles, names and who may reach whom."""

from __future__ import annotations

import json

import kubernetes_validate
import yaml

from serving.boot.flags.launch import build_parser, engine_config
from serving.gateway.flags import parse, prefill_discovery_of
from serving.transfer.config import TransferConfig
from tests.deploy.test_gateways import objects as gateway_objects
from tests.deploy.test_manifests import KUBERNETES, base, container, documents

FOLDER = KUBERNETES / "disaggregated"


def rendered() -> dict[tuple[str, str], dict]:
    """Every object by (kind, name) with the overlay's JSON patches applied, as kustomize does."""
    kustomization = documents(FOLDER / "kustomization.yaml")[0]
    assert kustomization["resources"] == ["../base", "../gateway", "prefill.yaml"]
    found = json.loads(json.dumps({f"{kind}/{name}": one for (kind, name), one in base().items()}))
    for one in (*gateway_objects().values(), *documents(FOLDER / "prefill.yaml")):
        found[f"{one['kind']}/{one['metadata']['name']}"] = json.loads(json.dumps(one))
    for patch in kustomization["patches"]:
        target = found[f"{patch['target']['kind']}/{patch['target']['name']}"]
        for step in yaml.safe_load(patch["patch"]):
            *way, last = step["path"].strip("/").split("/")
            at = target
            for part in way:
                at = at[int(part)] if isinstance(at, list) else at[part]
            if last == "-":
                at.append(step["value"])
            else:
                assert last in at
                at[last] = step["value"]
    return {tuple(key.split("/")): one for key, one in found.items()}


def test_objects_are_kubernetes():
    for one in rendered().values():
        kubernetes_validate.validate(one, "1.32", strict=True)


def test_roles_and_names_agree():
    found = rendered()
    decode, prefill = found["Deployment", "jaxserve"], found["Deployment", "jaxserve-prefill"]
    roles = {}
    for name, one in (("decode", decode), ("prefill", prefill)):
        config = engine_config(build_parser().parse_args(container(one)["args"]))
        roles[name] = TransferConfig.of(config.role, config.kv_transfer_config)
    assert roles["decode"].takes and not roles["decode"].gives and roles["decode"].allows("10.1.2.3", 50051)
    assert roles["prefill"].gives and not roles["prefill"].takes
    args = parse(container(found["Deployment", "jaxserve-gateway"])["args"])
    assert prefill_discovery_of(args).changes
    (target,) = args.prefill_target
    service = found["Service", target.removeprefix("dns:///").split(":")[0]]
    labels = prefill["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == labels
    assert labels != decode["spec"]["template"]["metadata"]["labels"], (
        "the base's Services are the decoding engines' alone"
    )
    policies = [found["NetworkPolicy", name] for name in ("jaxserve", "jaxserve-gateway")]
    for policy in policies:
        to = [rule["to"] for rule in policy["spec"]["egress"] if "to" in rule]
        assert [{"podSelector": {"matchLabels": labels}}] in to
    (within,) = [rule for rule in found["NetworkPolicy", "jaxserve-prefill"]["spec"]["ingress"] if "from" in rule]
    assert {one["podSelector"]["matchLabels"]["app"] for one in within["from"]} == {"jaxserve", "jaxserve-gateway"}
