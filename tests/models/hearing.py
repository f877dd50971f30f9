"""All families that hear in chats, by name, and which module makes their tiny models."""

from __future__ import annotations

from types import ModuleType

from tests.models import tiny_audio, tiny_conformers, tiny_granite

MADE_BY: dict[str, ModuleType] = {
    name: made for made in (tiny_audio, tiny_conformers, tiny_granite) for name in made.TINY
}
