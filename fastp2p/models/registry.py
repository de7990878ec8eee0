"""The models that there are: the folders of fastp2p/models that hold a model.py, and those of $FASTP2P_MODELS."""

import importlib
import importlib.util
import os
import pkgutil
from typing import Any

import fastp2p.models
from fastp2p.errors import InputError
from fastp2p.models.base import Model

VARIABLE = "FASTP2P_MODELS"  # folders with models beside the package's own, separated as in PATH


def names() -> list[str]:
    """Each model's name, which is its folder's."""
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if folder not in fastp2p.models.__path__:
            fastp2p.models.__path__.append(folder)
            importlib.invalidate_caches()
    found = pkgutil.iter_modules(fastp2p.models.__path__)
    return sorted(module.name for module in found if module.ispkg and _holds_a_model(module.name))


def _holds_a_model(name: str) -> bool:
    return importlib.util.find_spec(f"fastp2p.models.{name}.model") is not None


def find(name: str) -> Model[Any]:
    """The model of a name. Raises InputError where there is none."""
    known = names()
    if name not in known:
        raise InputError(f"model: got {name!r:.60}, expected one of {', '.join(known)}")
    model: Model[Any] = importlib.import_module(f"fastp2p.models.{name}.model").MODEL
    return model
