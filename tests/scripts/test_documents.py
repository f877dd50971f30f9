"""CONTRIBUTING.md and docs/walk.md are true: every name in them exists, and a toy of each kind is added as they say."""

from __future__ import annotations

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from models import registry
from models.config import from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import Build
from models.parameters import parameters_of
from ops import paged_attention
from ops.paged_attention import xla
from ops.paged_attention.cases import Case, make_arguments
from serving.frontends.app import create_app
from tests.mock_engine import MockEngine, mock_service

REPO = pathlib.Path(__file__).resolve().parents[2]
WALK, CONTRIBUTING = REPO / "docs/walk.md", REPO / "CONTRIBUTING.md"
NAMED = re.compile(r"`([\w./-]+\.(?:py|md|toml|sh|proto|cc|h|js|html))(?:::([\w.]+))?`")


def names_in(path: pathlib.Path) -> set[str]:
    """What a Python file defines or imports at its top, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("document", [WALK, CONTRIBUTING], ids=lambda path: path.name)
def test_every_name_exists(document):
    named = NAMED.findall(document.read_text())
    assert len(named) > 10
    for file, name in named:
        assert (REPO / file).is_file(), f"{document.name} names {file}, which is not there"
        assert not name or name in names_in(REPO / file), f"{document.name} names {name} in {file}, which has none"


def section(title: str) -> str:
    """The text under a heading of CONTRIBUTING.md."""
    return re.split(r"^#+ ", CONTRIBUTING.read_text().split(f"### {title}\n")[1], flags=re.M)[0]


def test_a_request_field_touches_the_listed_files():
    """`min_p` is in these files and in no other; what sampling defaults of checkpoints say of it aside."""
    listed = {file for file, _ in NAMED.findall(section("A field of a request"))}
    folders = ("proto", "ops", "serving/engine", "serving/frontends")
    found = {
        path.relative_to(REPO).as_posix()
        for folder in folders
        for path in (REPO / folder).rglob("*")
        if path.suffix in {".py", ".proto", ".cc", ".h", ".html"} and "_pb2" not in path.name
        if re.search(r"\bmin_p\b", path.read_text(encoding="utf-8"))
    }
    assert found == listed - {"docs/openai_api.md", "scripts/generate_protos.py"}


def test_an_endpoint_is_a_router_over_the_service():
    service = mock_service(MockEngine())
    router = APIRouter()

    @router.post("/toy")
    async def toy() -> dict[str, int]:
        return {"limit": service.info.max_model_len}

    app = create_app(service, page=False)
    app.include_router(router)
    with TestClient(app, base_url="http://localhost") as client:
        assert client.post("/toy").json() == {"limit": 512}
        assert client.post("/tokenize", json={"prompt": "a b"}).status_code == 200
    for file, word in (("service/service.py", "tokenize"), ("frontends/grpc/handlers.py", "Tokenize")):
        assert f"async def {word}" in (REPO / "serving" / file).read_text()


def test_a_body_of_an_op_is_an_entry_of_its_table(monkeypatch):
    from tests.ops.paged_attention.against_reference import expected, fill, run

    called = []

    def toy(*args, **options):
        called.append(options["scale"])
        if options["window"] is not None:
            raise NotImplementedError("no windows here")
        return xla.attend(*args, **options)

    monkeypatch.setitem(paged_attention.BACKENDS, "toy", toy)
    case = Case(decode=(5, 17), chunks=((3, 16),))
    arguments = make_arguments(case, 1)
    out, kv = run("toy", arguments, fill(case, arguments, jnp.float32, "rows"))
    np.testing.assert_allclose(out, expected(arguments, kv), atol=1e-5)
    assert called
    with (
        pytest.raises(ValueError, match="there are native, pallas_tpu, pallas_gpu, xla, toy"),
        paged_attention.use_backend("no"),
    ):
        pass


def test_a_model_is_a_family(monkeypatch):
    """A configuration, a module over the shared layers, and an entry that the registry finds."""

    toy = Family("Toy", ("ToyForCausalLM",), from_hf, Decoder)
    monkeypatch.setattr(registry, "families", lambda: (toy,))
    found = registry.find("ToyForCausalLM")
    hf = {
        "architectures": ["ToyForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    }  # fmt: skip
    model = found.build(found.config(hf), Build(max_model_len=64))
    assert set(model.recipes()) == {path for path, _ in parameters_of(model)}
    assert jax.eval_shape(lambda: model.logits(jnp.zeros((1, 32), jnp.float32))).shape == (1, 64)
