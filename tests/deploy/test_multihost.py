"""Every object in scripts/deploy against Kubernetes' own schemas; groups of hosts against what the server understands."""

import copy
import json
import pathlib
import re

import kubernetes_validate
import pytest
import yaml

from serving.access.__main__ import main as make_key
from serving.access.keys import read_file
from serving.boot.flags.launch import GRPC_PORT, HTTP_PORT, build_parser, parse
from serving.plan import chips
from sharding.mesh import parse_mesh

KUBERNETES = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "deploy" / "kubernetes"
VERSION = "1.32"  # the newest whose clusters are still served by every large cloud's default channel
SINGLE, GROUPS = ("cpu", "cuda", "tpu", "keys"), ("multihost-cuda", "multihost-tpu")


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def built(overlay):
    """(kind, name) -> object: a kustomization's resources with its JSON patches (RFC 6902: add, replace) applied."""
    folder = KUBERNETES / overlay
    (kustomization,) = documents(folder / "kustomization.yaml")
    objects = {}
    for resource in kustomization["resources"]:
        if resource.startswith("../"):
            objects |= built(resource.removeprefix("../"))
        else:
            objects |= {(d["kind"], d["metadata"]["name"]): d for d in documents(folder / resource)}
    for patch in kustomization.get("patches", []):
        target = objects[patch["target"]["kind"], patch["target"]["name"]]
        for step in yaml.safe_load(patch["patch"]):
            *way, last = step["path"].strip("/").split("/")
            at = target
            for part in way:
                at = at[int(part)] if isinstance(at, list) else at[part]
            assert step["op"] == "add" or last in at, f"{overlay}: nothing to replace at {step['path']}"
            if last == "-":
                at.append(copy.deepcopy(step["value"]))
            else:
                at[last] = copy.deepcopy(step["value"])
    return objects


def templates(group):
    """(leader's, worker's) pod template."""
    template = group["spec"]["leaderWorkerTemplate"]
    return template["leaderTemplate"], template["workerTemplate"]


def only_container(template):
    (only,) = template["spec"]["containers"]
    return only


@pytest.mark.parametrize("overlay", SINGLE + GROUPS)
def test_objects_fit_kubernetes_schemas(overlay):
    objects = built(overlay)
    assert len(objects) >= 4
    for (kind, _), document in objects.items():
        if kind != "LeaderWorkerSet":
            kubernetes_validate.validate(document, VERSION, strict=True)
            continue
        for template in templates(document):  # a custom resource: what is Kubernetes' own in it
            pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
            pod["metadata"]["name"] = "one"
            kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("overlay", SINGLE + GROUPS)
def test_pods_may_do_no_more_than_they_need(overlay):
    """The restricted profile of Kubernetes' pod security standards, and a root that nobody writes to."""
    objects = built(overlay)
    if overlay in SINGLE:
        pods = [objects["Deployment", "jaxserve"]["spec"]["template"]]
    else:
        pods = list(templates(objects["LeaderWorkerSet", "jaxserve"]))
    for template in pods:
        spec, only = template["spec"], only_container(template)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        own = only["securityContext"]
        assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        written = {mount["mountPath"] for mount in only["volumeMounts"] if not mount.get("readOnly")}
        assert {"/cache", "/tmp"} <= written and not any(path.startswith("/opt") for path in written)
    labels = pods[0]["metadata"]["labels"]
    budget, policy = objects["PodDisruptionBudget", "jaxserve"], objects["NetworkPolicy", "jaxserve"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert budget["spec"]["maxUnavailable"] == 1
    assert all(
        policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items() for pod in pods
    )
    ports = {port["name"] for port in only_container(pods[0])["ports"]}
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [{port["port"] for port in rule["ports"]} for rule in open_to_all] == [ports]
    assert ("from" in str(policy["spec"]["ingress"])) == (overlay in GROUPS)


def test_the_schemas_notice_mistakes():
    document = copy.deepcopy(built("cpu")["Deployment", "jaxserve"])
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_keys_are_read_from_the_secret(tmp_path):
    template = built("keys")["Deployment", "jaxserve"]["spec"]["template"]
    only = only_container(template)
    args = build_parser().parse_args(only["args"])
    mounts = {mount["mountPath"]: mount["name"] for mount in only["volumeMounts"]}
    assert len(only["volumeMounts"]) == len(template["spec"]["volumes"]) == 3, "the cache is still there"
    folder, _, name = args.api_key_file.rpartition("/")
    (secret,) = [volume["secret"] for volume in template["spec"]["volumes"] if volume["name"] == mounts[folder]]
    text = (KUBERNETES / "keys" / "kustomization.yaml").read_text()
    assert f"create secret generic {secret['secretName']} --from-file={name}\n" in text
    assert secret["defaultMode"] == 0o440 and template["spec"]["securityContext"]["fsGroup"] == 10001
    made = re.findall(r"python -m serving\.access (.*)", text)
    for command in made:
        file, *rest = command.split()
        assert file == name and make_key([str(tmp_path / file), *rest]) == 0
    assert len(read_file(tmp_path / name)) == len(made) == 3


# The fields of leaderworkerset.x-k8s.io/v1 that are used here, from the API's reference (https://lws.sigs.k8s.io).
GROUP_FIELDS = {"replicas", "rolloutStrategy", "leaderWorkerTemplate", "startupPolicy", "networkConfig"}
TEMPLATE_FIELDS = {"size", "restartPolicy", "leaderTemplate", "workerTemplate", "subGroupPolicy"}


@pytest.mark.parametrize("overlay", GROUPS)
def test_groups_have_the_fields_of_their_api(overlay):
    group = built(overlay)["LeaderWorkerSet", "jaxserve"]
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(group["spec"]) <= GROUP_FIELDS
    template = group["spec"]["leaderWorkerTemplate"]
    assert set(template) <= TEMPLATE_FIELDS and template["size"] >= 2
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"  # what is left of a broken group answers nobody
    rollout = group["spec"]["rolloutStrategy"]
    assert rollout["type"] == "RollingUpdate" and rollout["rollingUpdateConfiguration"]["maxSurge"] == 0


@pytest.mark.parametrize("overlay", GROUPS)
def test_leader_and_workers_run_the_same_program(overlay):
    leader, worker = templates(built(overlay)["LeaderWorkerSet", "jaxserve"])
    for name in ("image", "args", "resources", "volumeMounts", "securityContext"):
        assert only_container(leader)[name] == only_container(worker)[name], name
    for name in ("volumes", "terminationGracePeriodSeconds", "securityContext"):
        assert leader["spec"][name] == worker["spec"][name], name
    assert leader["spec"].get("nodeSelector") == worker["spec"].get("nodeSelector")


@pytest.mark.parametrize("overlay", GROUPS)
def test_meshes_use_every_accelerator_of_the_group(overlay):
    group = built(overlay)["LeaderWorkerSet", "jaxserve"]
    leader, _ = templates(group)
    args, config = parse(only_container(leader)["args"])
    assert config.coordinator == "auto", "the processes have to find each other"
    assert args.drain_timeout < leader["spec"]["terminationGracePeriodSeconds"]
    wanted = 1
    for size in parse_mesh(args.mesh).values():
        wanted *= size
    limits = only_container(leader)["resources"]["limits"]
    a_host = int(limits["google.com/tpu" if "tpu" in overlay else "nvidia.com/gpu"])
    assert wanted == a_host * group["spec"]["leaderWorkerTemplate"]["size"]
    if "tpu" in overlay:
        topology = leader["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert chips.parse_target(f"v5e:{topology}").num_devices == wanted


@pytest.mark.parametrize("overlay", GROUPS)
def test_only_leaders_are_asked(overlay):
    objects = built(overlay)
    leader, worker = templates(objects["LeaderWorkerSet", "jaxserve"])
    labels, others = leader["metadata"]["labels"], worker["metadata"]["labels"]
    services = [document for (kind, _), document in objects.items() if kind == "Service"]
    assert len(services) == 2 and any(service["spec"].get("clusterIP") == "None" for service in services)
    for service in services:
        selector = service["spec"]["selector"]
        assert selector.items() <= labels.items() and not selector.items() <= others.items()
        ports = {port["name"]: port["containerPort"] for port in only_container(leader)["ports"]}
        assert ports == {"grpc": GRPC_PORT, "http": HTTP_PORT}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)
    assert "readinessProbe" in only_container(leader) and "readinessProbe" not in only_container(worker)
    claims = {
        v["persistentVolumeClaim"]["claimName"] for v in leader["spec"]["volumes"] if "persistentVolumeClaim" in v
    }
    assert all(("PersistentVolumeClaim", claim) in objects for claim in claims)


def test_commands_in_comments_are_real():
    """`python -m serving.plan ...` in a comment names models and topologies that the planner knows."""
    from serving.plan import facts
    from serving.plan.__main__ import build_parser as plan_parser

    found = []
    for path in KUBERNETES.rglob("kustomization.yaml"):
        found += re.findall(r"`python -m serving\.plan ([^`]*)`", path.read_text())
    assert len(found) >= 3
    for command in found:
        args = plan_parser().parse_args(command.split())
        facts.read_config(args.model)
        for text in args.topology:
            chips.parse_target(text)
        json.dumps(vars(args))
