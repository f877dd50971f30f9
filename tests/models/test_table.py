import pytest

from models.bridge.known import EQUAL
from models.refused import REFUSED
from models.registry import families, find, status
from tests.models.hearing import MADE_BY
from tests.models.table import DOCUMENT, HEAD, columns, count, document, text_generation, tried
from tests.models.test_bert import ENCODERS, RERANKERS
from tests.models.tiny import TINY
from tests.models.tiny_vision import TINY as VISION


def test_the_documents_table_is_what_the_tests_check():
    assert DOCUMENT.read_text() == document(), "run python -m tests.models.table"


def test_every_variant_is_tried_in_every_way():
    """GGUF and an axis of experts are not for all of them."""
    ways = dict(zip(HEAD[4:], columns(), strict=True))
    for way in ("64 tokens", "model=4", "shared, preempted", "int8"):
        assert ways[way].keys() == TINY.keys(), way
    assert ways["expert=2,model=2"].keys() == {name for name, tiny in TINY.items() if tiny.expert_mesh}
    assert all(of.keys() <= TINY.keys() for of in ways.values())


def test_a_cell_says_what_pytest_would_run():
    @pytest.mark.parametrize(
        ("mesh", "names"), [("m", ["a", "b"]), pytest.param("m", ["c"], marks=pytest.mark.slow), ("n", ["d"])]
    )
    def some(mesh, names): ...

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["a", "b"])
    def slow(name): ...

    assert tried(some, "m") == {"a": False, "b": False, "c": True}
    assert tried(slow) == {"a": True, "b": True}
    cells = [count(names, tried(some, "m")) for names in (["a", "b"], ["a", "c", "e"], ["c"], ["e"])]
    assert cells == ["2 of 2", "2 of 3, 1 slow", "1 of 1 slow", "-"]


def test_every_family_is_tried():
    heard = {made.TINY[name].model for name, made in MADE_BY.items()}
    tried = {tiny.model for tiny in (*TINY.values(), *VISION.values())} | heard | set(ENCODERS) | set(RERANKERS)
    tried.add("WhisperForConditionalGeneration")  # tests/serving/service/speech
    # A decoder's classifier is it and a head: tests/models/test_decoder_classifier.py tries some of each kind.
    others = [family for family in families() if not family.name.endswith(": classifiers, rerankers and reward models")]
    untried = [family.name for family in others if not tried & set(family.architectures)]
    assert untried == []


def test_each_of_transformers_architectures_is_native_bridged_or_refused_in_a_sentence():
    """What transformers has new must be looked at: a family, its own code, or a reason."""
    native = {name for name in text_generation() if status(name) == "native"}
    assert {*text_generation()} - native == {*REFUSED} | EQUAL
    assert all(status(name) == "bridged" for name in EQUAL)
    assert len(native) > 40 and len(EQUAL) >= 60 and not EQUAL & {*REFUSED}
    assert all(status(name).startswith("refused: ") and len(status(name)) > 30 for name in REFUSED)
    with pytest.raises(ValueError, match=r"'InklingForCausalLM' is not supported: its attention adds to the scores"):
        find("InklingForCausalLM")
