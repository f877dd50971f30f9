"""The committed stubs are what the .proto files say, and those keep buf's standard rules."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from proto.jaxserve.v1 import inference_pb2, sampling_pb2

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_stubs_are_up_to_date():
    pytest.importorskip("grpc_tools", reason="grpcio-tools is in the dependency group `test`")
    script = ROOT / "scripts" / "generate_protos.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_protos_are_lint_clean():
    buf = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf (PyPI: buf-bin) is not installed; it is in the dependency group `test`")
    for args in (["lint"], ["format", "--diff", "--exit-code"]):
        result = subprocess.run([buf, *args], cwd=ROOT / "proto", capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_sampling_scalar_tells_unset_from_zero():
    fields = sampling_pb2.SamplingParams.DESCRIPTOR.fields
    scalars = [f for f in fields if not f.is_repeated]
    assert len(scalars) >= 19
    assert [f.name for f in scalars if not f.has_presence] == []


def test_the_wire_has_every_sampling_parameter():
    import dataclasses

    from serving.engine.api.sampling_params import SamplingParams

    wire = {f.name for f in sampling_pb2.SamplingParams.DESCRIPTOR.fields}
    assert wire == {f.name for f in dataclasses.fields(SamplingParams)}


def test_finish_reasons_that_are_not_errors_are_on_the_wire():
    from serving.engine.api.types import FinishReason

    wire = {name.removeprefix("FINISH_REASON_") for name in inference_pb2.FinishReason.keys()}  # noqa: SIM118
    # TOOL_CALLS is the front end's: for the engine such a completion just stops.
    assert wire == {"UNSPECIFIED", "TOOL_CALLS"} | {r.name for r in FinishReason} - {"DEADLINE", "REFUSED", "ERROR"}
