"""Registries of named classes that users choose from and add to: strategies, tasks, importers.

A name is one of hpctrain's own, or of a package that is installed and declares it as an entry point
(https://packaging.python.org/en/latest/specifications/entry-points/). Without either,
``package.module:Class`` says where a class is.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from hpctrain.errors import Error, nearest


class Registry:
    """The classes of one kind, by name; none is imported before it is asked for.

    Args:
        kind: What they are, for people: ``"strategy"``.
        group: The group of entry points by which packages add theirs: ``"hpctrain.strategies"``.
        builtin: hpctrain's own: by name, ``"package.module:Class"``.

    Example:
        >>> modes = Registry("number", "example.numbers", {"ratio": "fractions:Fraction"})
        >>> modes.get("ratio")(1, 2)
        Fraction(1, 2)
        >>> modes.get("decimal:Decimal")("0.5")
        Decimal('0.5')
        >>> modes.make("ratio")
        Fraction(0, 1)
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)

    def names(self, *, builtin_alone: bool = False) -> list[str]:
        """Return the names there are, hpctrain's own first; nothing is imported for it.

        Args:
            builtin_alone: Without those of installed packages.
        """
        if builtin_alone:
            return list(self._builtin)
        found = {point.name for point in metadata.entry_points(group=self.group)}
        return [*self._builtin, *sorted(found - self._builtin.keys())]

    def place(self, name: str) -> str | None:
        """Return where the class of a name is, ``package.module:Class``; None: there is no such.

        Args:
            name: hpctrain's own, or an installed package's.
        """
        if name in self._builtin:
            return self._builtin[name]
        points = metadata.entry_points(group=self.group, name=name)
        return next((point.value for point in points), None)

    def get(self, name: str) -> Any:
        """Return the class of that name.

        Args:
            name: A name, or ``package.module:Class``.

        Raises:
            Error: There is none, or it cannot be imported.
        """
        place = self.place(name)
        if place is None and ":" in name:
            place = name
        if place is None:
            raise Error(
                f"there is no {self.kind} '{name}'.",
                hint=f"{nearest(name, self.names())} One of your own is package.module:Class.",
            )
        return self._import(name, place)

    def make(self, spec: str) -> Any:
        """Return an object of a class, with options: ``NAME`` or ``NAME,option=value,...``.

        Options are the fields of a dataclass; values are converted to the fields' types.

        Args:
            spec: A name, or ``package.module:Class``, and options.

        Raises:
            Error: There is no such class or option, or a value is not what the option takes.
        """
        name, *settings = spec.split(",")
        kind = self.get(name.strip())
        given: dict[str, str] = {}
        for setting in settings:
            option, equals, value = setting.partition("=")
            if not equals:
                raise Error(
                    f"{self.kind} '{spec}': '{setting}' is not option=value.",
                    hint=f"write {name},option=value.",
                )
            given[option.strip()] = value.strip()
        fields = (
            [field.name for field in dataclasses.fields(kind) if field.init]
            if (dataclasses.is_dataclass(kind))
            else []
        )
        for option in given:
            if option not in fields:
                hint = nearest(option, fields) if fields else "it has none."
                raise Error(f"{self.kind} '{name}' has no option '{option}'.", hint=hint)
        if not fields:
            return kind()
        return self._with_options(name, kind, given)

    def _with_options(self, name: str, kind: Any, given: dict[str, str]) -> Any:
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(kind).validate_python(given)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"])) or "options"
            value = "" if first["type"] == "missing" else f" = {first['input']!r}"
            raise Error(
                f"{self.kind} '{name}': {option}{value}: {first['msg']}.",
                hint=f"write {name},{option}=VALUE.",
            ) from error

    def _import(self, name: str, place: str) -> Any:
        module, _, attribute = place.partition(":")
        here = str(Path.cwd())
        if place == name and here not in sys.path:
            sys.path.insert(0, here)  # as `python -m` has it
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except ImportError as error:
            raise Error(
                f"{self.kind} '{name}' cannot be imported: {error}.",
                hint="is its package installed, and spelled as in `import package.module`?",
            ) from error
        except AttributeError as error:
            raise Error(
                f"{self.kind} '{name}': {error}.",
                hint=nearest(attribute, [n for n in vars(sys.modules[module]) if n[0] != "_"]),
            ) from error
        return found
