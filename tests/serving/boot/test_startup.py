"""What a start leaves for later."""

from __future__ import annotations

from typing import Any

from serving.boot.startup import warm_when_idle


class Grammars:
    """Counts how often a vocabulary is indexed."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def is_warm(self) -> bool:
        return self.count > 0

    def warm(self) -> None:
        self.count += 1


def test_a_vocabulary_is_indexed_when_nobody_waits() -> None:
    grammars: Any = Grammars()
    seen = iter((False, False, True))
    warm_when_idle(grammars, lambda: next(seen), pause_s=0.0)
    assert grammars.count == 1 and next(seen, None) is None, "not before, and once"


def test_what_a_request_has_indexed_is_not_indexed_again() -> None:
    grammars: Any = Grammars()

    def idle() -> bool:
        grammars.warm()  # by a request, meanwhile
        return False

    warm_when_idle(grammars, idle, pause_s=0.0)
    assert grammars.count == 1
