"""Plugins by name: "module:attribute" strings that are imported when they are first used.

`--help` and `status` list names without importing anything; what heavy libraries a plugin needs is its own affair.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Generic, TypeVar, cast

from shared.errors import SettingsError, UnknownPluginError

T = TypeVar("T")


class Registry(Generic[T]):
    """The plugins of one kind.

    Args:
        kind: the word people know, e.g. "trainer".
        protocol: the Protocol class T whose public members, and `__call__` where it has one, every plugin must have.
            Plugins may be classes that implement it as well as ready instances or functions.
        entries: name -> "package.module:attribute".
    """

    def __init__(self, kind: str, protocol: type, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self.entries = dict(entries)
        self._required = _public_members(protocol)

    @property
    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self.entries)

    def load(self, name: str) -> T:
        """Return the plugin registered as `name`, or the one at "package.module:attribute".

        Raises:
            UnknownPluginError: nobody registered `name`.
            SettingsError: it cannot be imported, is not there, or lacks something of the Protocol.
        """
        if name not in self.entries and ":" not in name:
            raise UnknownPluginError(self.kind, name, self.entries)
        target = self.entries.get(name, name)
        module_name, _, attribute_path = target.partition(":")
        if not module_name or not attribute_path:
            raise SettingsError(self.kind, name, "write it as package.module:attribute")
        plugin: object = self._import(name, module_name)
        for attribute in attribute_path.split("."):
            if not hasattr(plugin, attribute):
                raise SettingsError(self.kind, name, f"{module_name} has no {attribute_path}; correct the name")
            plugin = getattr(plugin, attribute)
        if missing := [member for member in self._required if not _has(plugin, member)]:
            raise SettingsError(
                self.kind, name, f"{target} lacks {', '.join(missing)}; add what a {self.kind} must have"
            )
        return cast("T", plugin)

    def _import(self, name: str, module_name: str) -> ModuleType:
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or str(error)
            if module_name == missing or module_name.startswith(f"{missing}."):
                remedy = f"there is no module {missing!r}; correct the name or put it on PYTHONPATH"
            elif "." in missing:
                remedy = f"{module_name} needs the module {missing!r}, which its package lacks; install one that has it"
            else:
                remedy = f"{module_name} needs the package {missing!r}; install it"
            raise SettingsError(self.kind, name, remedy) from error
        except (ImportError, SyntaxError) as error:
            raise SettingsError(self.kind, name, f"importing {module_name} fails ({error}); mend it first") from error


def _public_members(protocol: type) -> list[str]:
    """List what a Protocol class asks for, its parents included."""
    members: set[str] = set()
    for parent in protocol.__mro__:
        if getattr(parent, "_is_protocol", False) and parent.__module__ != "typing":
            members |= {*vars(parent), *vars(parent).get("__annotations__", {})}
    return sorted(member for member in members if member == "__call__" or not member.startswith("_"))


def _has(plugin: object, member: str) -> bool:
    if not isinstance(plugin, type):
        return hasattr(plugin, member)
    # Fields without a default, as dataclasses have them, are annotated on the class but set on its instances only.
    owners = [vars(parent) for parent in plugin.__mro__]
    return any(member in owner or member in owner.get("__annotations__", {}) for owner in owners)
