"""Programs that `serving.plan --save` compiled before there was a server, and starting from them without compiling.

A bundle is a folder: `bundle.json` says what the programs were compiled for, `programs/` holds them, serialized. Loading one
runs its code: use only bundles that you made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax

from serving.engine.api.config import EngineConfig
from serving.engine.api.settings import settings_of
from serving.engine.device.programs.compiling import DeviceSet, ProgramCache
from serving.engine.device.programs.fingerprint import PROGRAM_SETTINGS
from serving.engine.requests.sizes import Sizes

MANIFEST = "bundle.json"
FIXED = tuple(name for name, known in settings_of(EngineConfig).items() if known.bundled)
"""Settings that a bundle decides: they are in the programs."""

NOT_HELD = tuple(name for name in PROGRAM_SETTINGS if name not in FIXED)
"""Settings that call for programs which bundles do not hold."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a bundle's programs were compiled for.

    Attributes:
        folder: where it is.
        settings: a value for each name of FIXED.
        sizes: of the engine, as a dictionary.
        model: digest of the model's configuration.
        target: platform, kind and number of the devices.
        jax: its version.
        programs: their names.
    """

    folder: pathlib.Path
    settings: dict[str, Any]
    sizes: dict[str, Any]
    model: str
    target: DeviceSet
    jax: str
    programs: tuple[str, ...]

    @classmethod
    def read(cls, folder: str | pathlib.Path) -> Bundle:
        """Opens a bundle.

        Raises:
            ValueError: there is none, or it was made by another version of JAX.
        """
        folder = pathlib.Path(folder)
        try:
            text = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            bundle = cls(
                folder, text["settings"], text["sizes"], text["model"], DeviceSet(*text["target"]), text["jax"],
                tuple(text["programs"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"--compiled {folder}: no bundle of programs ({type(e).__name__}: {e}). Make one: python -m serving.plan --save."
            ) from e
        if bundle.jax != jax.__version__:
            raise ValueError(
                f"--compiled {folder}: the programs were compiled by JAX {bundle.jax}, this is {jax.__version__}. Make the "
                "bundle again with python -m serving.plan --save."
            )
        return bundle

    def write(self) -> None:
        """Writes the manifest; the programs are written by `cache`."""
        text = dataclasses.asdict(self)
        del text["folder"]
        text["target"] = list(dataclasses.astuple(self.target))
        (self.folder / MANIFEST).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    def apply(self, config: EngineConfig) -> EngineConfig:
        """The configuration with what the bundle decides.

        Raises:
            ValueError: a setting was given another value.
        """
        defaults = EngineConfig()
        for name in FIXED:
            given = getattr(config, name)
            if given not in (getattr(defaults, name), self.settings[name]):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is {given}, but the programs in {self.folder} were compiled for {self.settings[name]}. Leave "
                    f"{flag} out, or make another bundle."
                )
        for name in NOT_HELD:
            given = getattr(config, name)
            if given != getattr(defaults, name) and (name, given) != ("num_scheduler_steps", 1):
                raise ValueError(
                    f"--{name.replace('_', '-')} needs programs that bundles do not hold. Leave it or --compiled out."
                )
        return dataclasses.replace(config, **self.settings)

    def check(self, model_config: Any, sizes: Sizes) -> None:
        """Raises ValueError when the programs belong to another model or other sizes."""
        if digest(model_config) != self.model:
            raise ValueError(f"--compiled {self.folder}: its programs were compiled for another model.")
        for name, value in dataclasses.asdict(sizes).items():
            made_for = self.sizes.get(name)
            if made_for != value:
                raise ValueError(
                    f"--compiled {self.folder}: its programs were compiled for {name} {made_for}, the server has {value}."
                )

    def cache(self) -> ProgramCache:
        """Where the programs are written when a bundle is made."""
        return ProgramCache(self.folder / "programs", self.model, self.target)

    def sealed(self) -> ProgramCache:
        """Where they are read: one that is missing is an error, not something to compile."""
        return _Sealed(self.folder / "programs", self.model, here())


class _Sealed(ProgramCache):
    def load(self, name: str) -> Any:
        found = super().load(name)
        if found is None:
            raise ValueError(
                f"--compiled: the bundle has no program {name!r} for this machine and this version of the code. Make it "
                "again with python -m serving.plan --save, for the devices that the server runs on."
            )
        return found

    def store(self, name: str, compiled: Any) -> None:
        raise AssertionError("a bundle is not written to by a server")


def here() -> DeviceSet:
    """The devices of this process."""
    first = jax.devices()[0]
    return DeviceSet(first.platform, first.device_kind, len(jax.devices()))


def digest(model_config: Any) -> str:
    """Of a model's configuration."""
    return hashlib.sha256(repr(model_config).encode()).hexdigest()
