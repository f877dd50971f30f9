"""check_schemas.py: what it takes for valid, and a small run of it on the default model."""

from __future__ import annotations

import pytest
from check_schemas import check, problem

from serving import LLM
from tests.serving.text.schemas import schemas


def test_a_problem_is_told_and_formats_count():
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}
    assert problem(schema, '{"day": "2026-11-21"}') is None
    for wrong in ("", '{"day": ', "{}", '{"day": 3}', '{"day": "2026-13-01"}'):
        assert problem(schema, wrong)


@pytest.mark.real_model
def test_what_the_default_model_writes_under_a_schema_is_valid():
    with LLM(dtype="float32", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64, progress=False) as llm:
        tally = llm._loop.run(check(llm.service, schemas(10), each=1, max_tokens=40))
    assert tally.wrong == []
    assert tally.valid + tally.cut == 10 and tally.valid >= 3
