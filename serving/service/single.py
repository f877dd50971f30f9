"""What a service of one model is to front ends that may be given several: see `serving.service.served`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from serving.engine.api.client import EngineClient
from serving.service.adapters import Adapters


class Single:
    """`Served` of one model: what a `TextService` inherits."""

    client: EngineClient
    model_id: str
    adapters: Adapters

    @property
    def first(self) -> Self:
        """Itself."""
        return self

    @property
    def services(self) -> Sequence[Self]:
        """Itself."""
        return (self,)

    def of(self, model: str | None, tenant: str | None = None) -> Self:
        """Itself: it says what it does not know when it is asked."""
        return self

    def visible(self) -> Sequence[Self]:
        """Itself."""
        return (self,)

    def listed(self) -> list[str]:
        """The model under the name that answers carry, then the adapters that the caller of the running task may use. Aliases
        answer too, and are not listed: front ends would show doubles."""
        return [self.model_id, *(info.name for info in self.adapters.visible())]

    @property
    def waits_for(self) -> Callable[[], str | None] | None:
        """Tells what a request for this model waits for now; None where its model never goes."""
        residence = self.client.residence
        return None if residence is None else lambda: residence.progress
