"""The gateways' manifests say what a gateway understands, and find the engines of the base."""

from __future__ import annotations

import kubernetes_validate
import pytest

from serving.boot.flags.launch import GRPC_PORT, HTTP_PORT
from serving.gateway.flags import discovery_of, parse
from tests.deploy.test_manifests import KUBERNETES, base, container, documents

FOLDER = KUBERNETES / "gateway"


def objects() -> dict[str, dict]:
    """Each object by its kind."""
    names = documents(FOLDER / "kustomization.yaml")[0]["resources"]
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*names, "kustomization.yaml"}
    found = {}
    for name in names:
        for document in documents(FOLDER / name):
            found[document["kind"]] = document
    return found


@pytest.mark.parametrize("kind", ["Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"])
def test_objects_are_kubernetes(kind):
    kubernetes_validate.validate(objects()[kind], "1.32", strict=True)


def test_arguments_are_flags_and_the_target_is_the_engines_service():
    only = container(objects()["Deployment"])
    assert only["command"] == ["python", "-m", "serving.gateway"]
    args = parse(only["args"])
    assert args.drain_timeout < objects()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    (target,) = args.target
    host, port = target.removeprefix("dns:///").split(":")
    service = base()["Service", host]
    assert service["spec"]["clusterIP"] == "None" and discovery_of(args).changes
    assert int(port) in {one["port"] for one in service["spec"]["ports"]}
    assert (args.grpc_port, args.port) == (GRPC_PORT, HTTP_PORT)


def test_names_agree():
    found = objects()
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    only = container(found["Deployment"])
    assert {port["name"]: port["containerPort"] for port in only["ports"]} == {"grpc": GRPC_PORT, "http": HTTP_PORT}
    assert {mount["name"] for mount in only["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    engines = base()["Deployment", "jaxserve"]["spec"]["template"]["metadata"]["labels"]
    (to_engines,) = [rule for rule in found["NetworkPolicy"]["spec"]["egress"] if "to" in rule]
    assert to_engines["to"] == [{"podSelector": {"matchLabels": engines}}]
    assert labels != engines, "the engines' Services would balance to gateways"
