"""The options of a run as the command line shows them: in groups, each with a title and a text per option."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from fastp2p.config import RunConfig
from fastp2p.models import registry
from fastp2p.models.base import Model

# The options that all models share, by title; a model's own follow --model, under the model's name.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "data": (
        "data", "direction", "input_nc", "output_nc", "load_size", "crop_size", "flip", "batch_size", "skip_bad",
        "stream",
    ),
    "schedule": ("n_epochs", "n_epochs_decay", "max_steps", "max_minutes", "lr", "beta1", "beta2", "seed"),
    "device and precision": ("device", "precision", "engine", "kernels"),
    "output": ("out", "log_steps", "panel_steps", "val_epochs", "save_minutes"),
}  # fmt: skip

Command = TypeVar("Command", bound="RunOptions")


class Group:
    """The values of one group of options: its fields."""


@dataclass(frozen=True)
class RunOptions:
    """A command that takes a run's options: `with_groups` gives it a field for each group of them."""

    @property
    def given(self) -> dict[str, Any]:
        """The values of all groups, by option."""
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {name: value for group in groups if isinstance(group, Group) for name, value in vars(group).items()}

    @functools.cached_property
    def config(self) -> RunConfig:
        """The configuration that the options make.

        Raises:
            InputError: when they do not fit together, or a value is out of its range.
        """
        given = self.given
        return registry.find(given["model"]).config(**given)


def with_groups(
    command: type[Command], model: Model[Any], *, names: Collection[str] | None = None, config: RunConfig | None = None
) -> type[Command]:
    """A command with a model's options in groups, each a field that tyro shows in a box of its own.

    Args:
        command: the class that has the command's other options.
        model: whose options these are.
        names: which of them the command takes; None: all.
        config: gives the defaults, as a resumed run's does; None: the class's own.
    """
    kind = model.config
    fields = {field.name: field for field in dataclasses.fields(kind) if names is None or field.name in names}
    shared = {name for group in GROUPS.values() for name in group}
    hints, told = get_type_hints(kind), texts(kind)
    groups: list[tuple[str, Any, Any]] = []
    for title, members in GROUPS.items():
        own = tuple(name for name in fields if name not in shared) if title == "model" else ()
        options = [
            (
                name,
                Annotated[hints[name], tyro.conf.arg(help=told[name])],
                dataclasses.field(default=fields[name].default if config is None else getattr(config, name)),
            )
            for name in members + own
            if name in fields
        ]
        if options:
            group = dataclasses.make_dataclass(title.title().replace(" ", ""), options, bases=(Group,), frozen=True)
            described = own and not str(kind.__doc__).startswith(f"{kind.__name__}(")  # as dataclass writes by itself
            group.__doc__ = kind.__doc__ if described else None
            shown = Annotated[group, tyro.conf.arg(name=model.name if own else title)]  # type: ignore[valid-type]
            groups.append((title.replace(" ", "_"), shown, dataclasses.field(default=group())))
    grouped = dataclasses.make_dataclass(command.__name__, groups, bases=(command,), frozen=True)
    grouped.__doc__ = command.__doc__
    return grouped


def texts(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass and of its bases, by the field's name, on one line."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
