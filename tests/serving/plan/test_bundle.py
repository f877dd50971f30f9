"""`serving.plan --save` and starting from what it kept: on CPU, end to end, with a compiler that refuses to work."""

import json
import os
import subprocess
import sys

import jax
import pytest

from serving.boot.flags.launch import build_parser, engine_config
from serving.engine.api.config import EngineConfig
from serving.engine.device.programs.bundle import FIXED, Bundle, digest
from serving.engine.device.programs.compiling import DeviceSet, ProgramCache
from serving.engine.requests.sizes import Sizes
from tests.tiny_checkpoint import write_tiny_checkpoint

PLAN = (
    "--topology", "cpu:1", "--mesh", "data=1,model=1", "--max-num-seqs", "2", "--max-num-batched-tokens", "32",
    "--max-model-len", "64", "--context", "16", "--prompt", "16",
)  # fmt: skip


def run(*command):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=400, check=False, env=env
    )


@pytest.fixture(scope="module", params=["none", "int8"])
def saved(request, tmp_path_factory):
    """(model, bundle, how its weights are kept)."""
    folder = tmp_path_factory.mktemp("bundle")
    model = write_tiny_checkpoint(folder / "model")
    done = run(
        "serving.plan", "--model", str(model), *PLAN, "--quantization", request.param, "--save", str(folder / "kept")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FITS" in done.stdout and "programs kept" in done.stderr
    return model, folder / "kept", request.param


def test_an_engine_starts_without_compiling_and_generates_the_same(saved, tmp_path):
    model, kept, quantization = saved
    done = run("tests.serving.plan.bundle_run", str(model), str(kept))
    assert done.returncode == 0, done.stderr[-3000:]
    from tests.serving.plan.bundle_run import generate

    plain = EngineConfig(
        model=str(model), dtype="float32", quantization=quantization, max_num_seqs=2, max_num_batched_tokens=32,
        max_model_len=64, progress=False, compile_cache=str(tmp_path),
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == generate(plain)


def test_the_manifest_says_what_it_was_made_for(saved):
    _, kept, quantization = saved
    bundle = Bundle.read(kept)
    assert set(bundle.settings) == set(FIXED) and bundle.settings["quantization"] == quantization
    assert bundle.target.platform == "cpu" and bundle.jax == jax.__version__
    assert len(bundle.programs) == len(list((kept / "programs").iterdir()))
    assert (kept / "programs").stat().st_mode & 0o077 == 0, "loading a program runs it: nobody else may write there"


def test_flags_that_a_bundle_decides_are_refused(saved):
    _, kept, _ = saved
    bundle = Bundle.read(kept)
    assert bundle.apply(EngineConfig()).max_num_seqs == 2
    assert bundle.apply(EngineConfig(max_num_seqs=2, seed=7)).seed == 7
    with pytest.raises(ValueError, match=r"--max-num-seqs is 4, .* compiled for 2"):
        bundle.apply(EngineConfig(max_num_seqs=4))
    with pytest.raises(ValueError, match="--num-scheduler-steps needs programs that bundles do not hold"):
        bundle.apply(EngineConfig(num_scheduler_steps=4))


def test_another_model_or_other_sizes_are_refused(saved):
    _, kept, _ = saved
    bundle = Bundle.read(kept)
    with pytest.raises(ValueError, match="compiled for another model"):
        bundle.check("another", Sizes(**bundle.sizes))
    same = Bundle(kept, bundle.settings, bundle.sizes, digest("it"), bundle.target, bundle.jax, bundle.programs)
    same.check("it", Sizes(**bundle.sizes))
    with pytest.raises(ValueError, match="num_pages"):
        same.check("it", Sizes(**(bundle.sizes | {"num_pages": 3})))


def test_a_program_that_is_missing_is_an_error_and_not_compiled(saved):
    _, kept, _ = saved
    with pytest.raises(ValueError, match=r"no program 'forward x' .* serving\.plan --save"):
        Bundle.read(kept).sealed().load("forward x")


def test_no_bundle_and_one_of_another_jax_are_explained(tmp_path):
    with pytest.raises(ValueError, match="no bundle of programs"):
        Bundle.read(tmp_path)
    settings = dict.fromkeys(FIXED)
    Bundle(tmp_path, settings, {}, "", DeviceSet("cpu", "cpu", 1), "0.0.1", ()).write()
    with pytest.raises(ValueError, match=r"compiled by JAX 0\.0\.1"):
        Bundle.read(tmp_path)


def test_programs_for_other_devices_have_other_names(tmp_path):
    here = ProgramCache(tmp_path, "x")
    there = ProgramCache(tmp_path, "x", DeviceSet("gpu", "NVIDIA H200", 1))
    assert here._path("forward") != there._path("forward")


def test_the_server_has_the_flag():
    assert engine_config(build_parser().parse_args(["--compiled", "somewhere"])).compiled == "somewhere"
