"""The Helm chart, rendered by Helm itself: objects that Kubernetes takes, flags that servers take, names that agree."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from serving.access.__main__ import main as make_key
from serving.boot.flags import launch
from serving.boot.flags.launch import GRPC_PORT, HTTP_PORT
from serving.gateway.flags import parse, prefill_discovery_of
from serving.transfer.config import PEER_KEY_VARIABLE, TransferConfig
from tests.deploy.test_manifests import DEPLOY, KUBERNETES, documents

pytest.importorskip("helm_python", reason="Helm's library has no wheel for this machine")

CHART = DEPLOY / "helm" / "jaxserve"
EXAMPLES = ("", "apart", "multihost")
RENDER = """
import json, sys
import helm_python as helm
chart, values = json.load(sys.stdin)
try:
    with helm.Chart.load(chart) as loaded:
        print(json.dumps({"files": loaded.render(values, name="demo", namespace="prod"), "lint": helm.lint(chart)}, default=str))
except helm.HelmError as error:
    print(json.dumps({"error": str(error)}))
"""
"""In a process of its own: Helm is written in Go, whose runtime takes over signals."""


def render(values: dict) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", RENDER], input=json.dumps([str(CHART), values]), capture_output=True, text=True, check=True
    )  # fmt: skip
    return json.loads(done.stdout)


@functools.cache
def rendered(example: str) -> dict[tuple[str, str], dict]:
    """Every object by (kind, name)."""
    values = yaml.safe_load((CHART / "examples" / f"{example}.yaml").read_text()) if example else {}
    found = {}
    for name, text in render(values)["files"].items():
        if name.endswith(".yaml"):
            for one in yaml.safe_load_all(text):
                if one:
                    found[one["kind"], one["metadata"]["name"]] = one
    return found


def pods(objects: dict) -> dict[str, dict]:
    """Pod templates by what makes them."""
    found = {}
    for (kind, name), one in objects.items():
        if kind == "Deployment":
            found[name] = one["spec"]["template"]
        if kind == "LeaderWorkerSet":
            template = one["spec"]["leaderWorkerTemplate"]
            found[name], found[f"{name} worker"] = template["leaderTemplate"], template["workerTemplate"]
    return found


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    """A file of keys, as the Secret's is."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    make_key([str(path), "alice"])
    return path


def arguments(pod: dict, key_file) -> list[str]:
    """What its container is started with, but for the keys, which are elsewhere here."""
    return [str(key_file) if one == "/keys/keys" else one for one in container(pod)["args"]]


def container(pod: dict) -> dict:
    (only,) = pod["spec"]["containers"]
    return only


@pytest.mark.parametrize("example", EXAMPLES)
def test_objects_fit_kubernetes_schemas(example):
    objects = rendered(example)
    assert len(objects) >= 9
    for (kind, _), one in objects.items():
        if kind != "LeaderWorkerSet":
            kubernetes_validate.validate(one, "1.32", strict=True)
    for pod in pods(objects).values():
        whole = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(pod)}
        whole["metadata"]["name"] = "one"
        kubernetes_validate.validate(whole, "1.32", strict=True)
        spec, only = pod["spec"], container(pod)
        assert spec["automountServiceAccountToken"] is False and spec["securityContext"]["runAsNonRoot"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {mount["name"] for mount in only["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("example", EXAMPLES)
def test_arguments_are_flags_and_roles_are_those_of_the_pools(example, key_file):
    for name, pod in pods(rendered(example)).items():
        only, grace = container(pod), pod["spec"]["terminationGracePeriodSeconds"]
        if name == "demo-jaxserve-gateway":
            assert only["command"] == ["python", "-m", "serving.gateway"]
            args = parse(arguments(pod, key_file))
            assert (args.grpc_port, args.port) == (GRPC_PORT, HTTP_PORT)
        else:
            args, config = launch.parse(arguments(pod, key_file))
            roles = TransferConfig.of(config.role, config.kv_transfer_config)
            assert roles.role == ({"": "", "apart": "decode"}.get(example, "") if "main" in name else "prefill")
            assert roles.allows("10.1.2.3", GRPC_PORT) == roles.takes
        assert args.drain_timeout < grace, "the kubelet would kill before requests are drained"


@pytest.mark.parametrize("example", EXAMPLES)
def test_selectors_claims_and_targets_name_what_there_is(example, key_file):
    objects, of = rendered(example), pods(rendered(example))
    labels = {name: pod["metadata"]["labels"] for name, pod in of.items()}

    def chosen(selector: dict) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    for (kind, name), one in objects.items():
        spec = one.get("spec", {})
        if kind == "Service":
            assert chosen(spec["selector"]) == {name.removesuffix("-grpc")}, "a worker answers nobody"
        if kind == "NetworkPolicy":
            assert chosen(spec["podSelector"]["matchLabels"]) >= {name}
            for rule in (*spec["ingress"], *spec["egress"]):
                for peer in (*rule.get("from", ()), *rule.get("to", ())):
                    assert chosen(peer["podSelector"]["matchLabels"])
        if kind == "HorizontalPodAutoscaler":
            target = objects[spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]]
            assert target["apiVersion"] == spec["scaleTargetRef"]["apiVersion"] and "replicas" not in target["spec"]
    gateway = parse(arguments(of["demo-jaxserve-gateway"], key_file))
    assert prefill_discovery_of(gateway).changes is (example == "apart")
    for address in (*gateway.target, *gateway.prefill_target):
        service = objects["Service", address.removeprefix("dns:///").split(":")[0]]
        assert service["spec"]["clusterIP"] == "None"
    for pod in of.values():
        for volume in pod["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in objects


def test_keys_reach_whoever_asks_for_them():
    of = pods(rendered("apart"))
    for name, pod in of.items():
        only = container(pod)
        names = {one["name"] for one in only["env"]}
        assert (
            {"JAXSERVE_TARGET_API_KEY", "JAXSERVE_REDIS_URL"} if "gateway" in name else {PEER_KEY_VARIABLE}
        ) == names
        assert "--api-key-file" in only["args"]
        assert "/keys" in {mount["mountPath"] for mount in only["volumeMounts"]}


def test_a_group_is_one_program_on_every_host():
    group = rendered("multihost")["LeaderWorkerSet", "demo-jaxserve-main"]
    template = group["spec"]["leaderWorkerTemplate"]
    leader, worker = container(template["leaderTemplate"]), container(template["workerTemplate"])
    for name in ("image", "args", "resources", "volumeMounts", "securityContext"):
        assert leader[name] == worker[name], name
    assert template["size"] == 2 and template["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert "--coordinator" in leader["args"] and "readinessProbe" in leader and "readinessProbe" not in worker


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engines": {"main": {"role": "wrong"}}}, "role"),
        ({"engines": {"main": {"role": "both", "hosts": 2}}}, "exchange no pages"),
        ({"engines": {"main": {"role": "prefill"}}}, "nobody would decode"),
        ({"keys": {"secret": "a"}}, "keys.proxySecret"),
        ({"engines": {"main": {"replica": 2}}}, "replica"),
    ],
)
def test_what_cannot_work_is_refused_in_words(values, said):
    assert said in render(values)["error"]


def test_autoscalers_ask_for_metrics_that_the_adapter_gives():
    """Of the chart and of the Kubernetes overlay; read from series that a server exports."""
    from serving.metrics.catalog import BY_NAME

    adapter = yaml.safe_load((DEPLOY / "prometheus_adapter.yaml").read_text())["rules"]["custom"]
    given = {rule["name"]["as"] for rule in adapter}
    for rule in adapter:
        series = rule["seriesQuery"].split('"')[1]
        assert series in rule["metricsQuery"] and series in {
            f"jaxserve:{name.removeprefix('jaxserve:')}" for name in BY_NAME
        }
    overlay = documents(KUBERNETES / "fleet" / "autoscaling.yaml")
    scalers = [one for one in (*rendered("apart").values(), *rendered("multihost").values(), *overlay)
               if one["kind"] == "HorizontalPodAutoscaler"]  # fmt: skip
    asked = [
        metric["pods"]["metric"]["name"] for one in scalers for metric in one["spec"]["metrics"] if "pods" in metric
    ]
    assert len(scalers) == 6 and set(asked) == given
    for one in overlay:
        kubernetes_validate.validate(one, "1.32", strict=True)
