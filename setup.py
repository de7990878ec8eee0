"""Everything is in pyproject.toml; the extension in csrc/ will be built from here."""

from setuptools import setup

setup()
