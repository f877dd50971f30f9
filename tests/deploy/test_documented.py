"""Commands that the documents and scripts show are taken by the parsers of what they start."""

import pathlib
import re
import shlex

import pytest

from scripts.deploy.ray_serve import GATEWAYS, RAYS_OWN
from scripts.deploy.server_process import flags
from serving.boot.flags.launch import parse
from serving.plan import __main__ as plan
from serving.plan import chips, facts
from sharding.mesh import parse_mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "scripts" / "deploy").glob("*.*"))]
STARTS = {  # how a line starts a server or a plan -> what comes before its arguments
    "launch": r"python -m serving\.launch",
    "image": r"docker run .*?\bjaxserve:(?:cpu|cuda|tpu)\b",
    "slurm": r"sbatch .*?scripts/deploy/slurm\.sh",
    "ray": r"serve run scripts\.deploy\.ray_serve:app",
    "plan": r"python -m serving\.plan",
}


def commands():
    """(kind, arguments) of every line of a block or comment that starts with one of these."""
    for path in FILES:
        for line in path.read_text().splitlines():
            for kind, start in STARTS.items():
                if found := re.match(rf"(?:#  |   )\s*{start}(?: (.*))?$", line):
                    yield pytest.param(
                        kind, shlex.split(found[1] or "", comments=True), id=f"{path.name}-{line.strip()}"
                    )


COMMANDS = list(commands())


def test_every_kind_is_shown():
    assert {command.values[0] for command in COMMANDS} == set(STARTS)


@pytest.mark.parametrize(("kind", "arguments"), COMMANDS)
def test_shown_commands_are_taken(kind, arguments):
    if kind == "plan":
        args = plan.build_parser().parse_args(arguments)
        assert args.model in ("MODEL", "config.json") or facts.read_config(args.model)
        for text in args.topology:
            chips.parse_target(text)
    else:
        if kind == "ray":
            given = dict(argument.split("=", 1) for argument in arguments)
            assert set(given) & set(RAYS_OWN)
            arguments = flags({k: v for k, v in given.items() if k not in RAYS_OWN and not k.startswith(GATEWAYS)})
        args, _ = parse(arguments)
    if args.mesh != "auto":
        parse_mesh(args.mesh)
