"""What pyproject.toml cannot say: a wheel with the native library in it is for one platform (see ops/native/build.py)."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

NATIVE = any((Path(__file__).parent / "ops" / "native").glob("libjaxserve-*"))


class Wheel(bdist_wheel):
    """`py3-none-any`, or `py3-none-PLATFORM`: the library knows nothing of Python, so any Python 3 of that platform can use it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not NATIVE

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if NATIVE else (python, abi, platform)


setup(cmdclass={"bdist_wheel": Wheel})
