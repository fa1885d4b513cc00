"""Names of tensors, with and without the wrappers that state dicts remember."""

from __future__ import annotations

from collections.abc import Iterable

_WRAPPERS = frozenset({"module", "_orig_mod"})


def clean_name(name: str) -> str:
    """A name without the segments that compiled and data-parallel wrappers add, wherever they stand.

    Example:
        >>> clean_name("module._orig_mod.body.module.fc.weight")
        'body.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class NameIndex:
    """Finds a model's tensor under the name that a wrapped, or an unwrapped, copy of the model gives it.

    A model may itself have a part called `module` (averaged models do): an exact match comes first.

    Example:
        >>> NameIndex(["module.fc.weight"]).find("fc.weight")
        'module.fc.weight'
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._known = set(self.names)
        self._cleaned: dict[str, str | None] = {}
        for name in self.names:
            key = clean_name(name)
            # None marks a name that two tensors would answer to.
            self._cleaned[key] = name if key not in self._cleaned else None

    def find(self, name: str) -> str | None:
        """The model's own name, or None where no tensor, or more than one, answers."""
        return name if name in self._known else self._cleaned.get(clean_name(name))

    def under(self, prefix: str) -> list[str]:
        """The names that are the prefix, or lie below it."""
        exact = [name for name in self.names if _below(name, prefix)]
        return exact or [name for name in self.names if _below(clean_name(name), clean_name(prefix))]


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
