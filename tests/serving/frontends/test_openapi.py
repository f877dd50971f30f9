"""Schemathesis over our own API document: whatever it sends, no 5xx and no reply that breaks the document."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from serving.frontends.app import create_app
from tests.mock_engine import EmbeddingEngine, mock_service

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
positive_data_acceptance = schemathesis.checks.positive_data_acceptance
not_a_server_error = schemathesis.checks.not_a_server_error


class _NoGrammars:
    """Refuses every grammar, as a server without a compiler would, but as the client's fault: a 501 is a failure here."""

    def compile(self, grammar: object) -> None:
        raise ValueError("no grammar is good enough")


app = create_app(mock_service(EmbeddingEngine(reply="ok"), grammar_compiler=_NoGrammars()))  # type: ignore[arg-type]
schema = schemathesis.openapi.from_asgi("/openapi.json", app)
# /metrics is text; streams are events. Both have tests of their own.
schema = schema.exclude(path="/metrics")


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_the_server(case):
    if isinstance(case.body, dict) and case.body.get("stream") is True:
        case.body["stream"] = False
    # A request may fit the document and still be wrong (min_tokens over max_tokens, a prompt over the context).
    reply = case.call_and_validate(excluded_checks=[positive_data_acceptance, not_a_server_error])
    assert reply.status_code < 500 or reply.status_code == 501, reply.text  # what this model cannot do
