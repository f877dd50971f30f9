"""Deployment files say what the server understands: flags, ports, paths, volumes, and each other's names."""

import json
import pathlib
import re
import subprocess

import pytest
import yaml

from serving.boot.flags.launch import GRPC_PORT, HTTP_PORT, build_parser, parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "cuda", "tpu")


def documents(path: pathlib.Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def base() -> dict[tuple[str, str], dict]:
    """Every object of the base by (kind, name)."""
    objects = {}
    for name in documents(KUBERNETES / "base" / "kustomization.yaml")[0]["resources"]:
        for document in documents(KUBERNETES / "base" / name):
            objects[document["kind"], document["metadata"]["name"]] = document
    return objects


def patched(overlay: str) -> dict:
    """The Deployment with an overlay's JSON patches (RFC 6902: add and replace) applied, as kustomize does."""
    deployment = json.loads(json.dumps(base()["Deployment", "jaxserve"]))
    for patch in documents(KUBERNETES / overlay / "kustomization.yaml")[0]["patches"]:
        assert patch["target"] == {"kind": "Deployment", "name": "jaxserve"}
        for step in yaml.safe_load(patch["patch"]):
            *way, last = step["path"].strip("/").split("/")
            at = deployment
            for part in way:
                at = at[int(part)] if isinstance(at, list) else at[part]
            assert step["op"] == "add" or last in at, f"{overlay}: nothing to replace at {step['path']}"
            at[last] = step["value"]
    return deployment


def container(deployment: dict) -> dict:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_arguments_are_flags_of_the_server(overlay):
    args, _ = parse(container(patched(overlay))["args"])
    grace = patched(overlay)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert args.drain_timeout < grace, "the kubelet would kill before requests are drained"


def test_ports_probes_and_volumes_agree():
    objects = base()
    deployment = objects["Deployment", "jaxserve"]
    pod, only = deployment["spec"]["template"], container(deployment)
    assert {port["name"]: port["containerPort"] for port in only["ports"]} == {"grpc": GRPC_PORT, "http": HTTP_PORT}
    assert only["livenessProbe"]["httpGet"]["path"] == "/health"
    for probe in ("startupProbe", "readinessProbe"):
        assert only[probe]["httpGet"] == {"path": "/ready", "port": "http"}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(HTTP_PORT)
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    for (kind, _), document in objects.items():
        if kind == "Service":
            assert document["spec"]["selector"] == labels
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= {"grpc", "http"}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    claims = {
        name: v["persistentVolumeClaim"]["claimName"] for name, v in volumes.items() if "persistentVolumeClaim" in v
    }
    assert all(("PersistentVolumeClaim", claim) in objects for claim in claims.values())
    assert {mount["name"] for mount in only["volumeMounts"]} == set(volumes)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_requests_do_not_exceed_limits(overlay):
    resources = container(patched(overlay))["resources"]
    for name, limit in resources["limits"].items():
        assert resources["requests"].get(name, limit) == limit
    special = {"cpu": None, "cuda": "nvidia.com/gpu", "tpu": "google.com/tpu"}[overlay]
    if special:
        args = build_parser().parse_args(container(patched(overlay))["args"])
        sizes = [int(size) for size in re.findall(r"=(\d+)", args.mesh)]
        assert sizes[0] * sizes[1] == int(resources["limits"][special])


def test_image_copies_what_is_installed_and_starts_the_server():
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    copied = [
        part for line in lines if line.startswith("COPY ") and "--from" not in line for part in line.split()[1:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    packages = {"proto", "ops", "sharding", "models", "serving"}
    assert packages <= set(copied)
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT ")]
    assert entry[:3] == ["python", "-m", "serving.launch"]
    build_parser().parse_args(entry[3:])
    (ports,) = [line.split()[1:] for line in lines if line.startswith("EXPOSE ")]
    assert set(map(int, ports)) == {GRPC_PORT, HTTP_PORT}
    text = "\n".join(lines).replace("\\\n", " ")
    (check,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", text, re.M)
    assert f"127.0.0.1:{HTTP_PORT}/health" in json.loads(check)[-1]
    compile(json.loads(check)[2], "healthcheck", "exec")
    extras = re.findall(r"EXTRAS=(\w+)", (DEPLOY / "Dockerfile").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert extras and all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)


def test_slurm_script_is_bash_and_its_flags_exist():
    script = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().replace("\\\n", " ").splitlines()
    line = next(line for line in lines if line.startswith("exec srun"))
    flags = line.split("scripts/serve.sh ")[1].removesuffix(' "$@"').split()
    build_parser().parse_args(flags)
