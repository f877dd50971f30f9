from models.registry import families
from tests.models.table import DOCUMENT, document
from tests.models.test_bert import ENCODERS, RERANKERS
from tests.models.tiny import TINY


def test_the_documents_table_is_what_the_tests_check():
    assert DOCUMENT.read_text() == document(), "run python -m tests.models.table"


def test_every_family_is_tried():
    tried = {tiny.model for tiny in TINY.values()} | set(ENCODERS) | set(RERANKERS)
    untried = [family.name for family in families() if not tried & set(family.architectures)]
    assert untried == []
