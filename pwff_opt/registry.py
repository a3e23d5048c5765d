"""Registries: the variants that a name in a scenario can stand for, of this package and of plug-ins.

A variant states its own facts; nothing else lists it. A registry looks for variants in the modules of one
room of this package, and in the modules that installed packages name as entry points of the group
``pwff_opt.plugins``. Each such module adds what it has::

    from pwff_opt.registry import RULES

    RULES.add("median", Median())

A module of variants must import fast: what is heavy (torch, pandas) is imported where it is used.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pwff_opt.errors import PluginError

if TYPE_CHECKING:
    from types import ModuleType

GROUP = "pwff_opt.plugins"
T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """The variants of one kind, by name, in alphabetical order.

    Parameters
    ----------
    key : the key of a scenario, or the argument, that names a variant; for messages.
    room : the package whose modules add the variants that come with this package.
    """

    def __init__(self, key: str, room: str) -> None:
        self.key, self.room = key, room
        self._found: dict[str, T] = {}
        self._homes: dict[str, str] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def add(self, name: str, variant: T) -> T:
        """Add a variant under its name; return it.

        Raises
        ------
        PluginError
            If the name is taken by another module, or is not a word of letters, digits, ``-`` and ``_``.
        """
        home = inspect.currentframe().f_back.f_globals["__name__"]  # type: ignore[union-attr]
        if not name.replace("-", "").replace("_", "").isalnum():
            raise PluginError(
                f"{self.key} must be named by letters, digits, '-' and '_', got {name!r}"
            )
        if self._homes.get(name, home) != home:
            raise PluginError(
                f"{self.key} {name!r} must be added by one module; {self._homes[name]} has it, and {home} "
                "adds another: rename one of them"
            )
        self._found[name], self._homes[name] = variant, home
        return variant

    def source(self, name: str) -> str:
        """Return a digest of a plug-in's source, its module or its whole package; "" for our own."""
        self._load()
        home = self._homes[name]
        return "" if home.startswith(f"{__package__}.") else _digest(home)

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._found))

    def __len__(self) -> int:
        self._load()
        return len(self._found)

    def _load(self) -> None:
        """Import the modules that add variants, once."""
        if self._loaded:
            return
        with self._lock:
            if self._loaded:
                return
            room = import_module(self.room)
            for module in iter_modules(room.__path__):
                if not module.name.startswith("_"):
                    import_module(f"{self.room}.{module.name}")
            load_plugins()
            self._loaded = True


@cache
def load_plugins() -> tuple[ModuleType, ...]:
    """Import the modules of all plug-ins that are installed; return them.

    Raises
    ------
    PluginError
        If one cannot be imported; the message names it and the package it comes with.
    """
    loaded = []
    for entry in entry_points(group=GROUP):
        try:
            loaded.append(entry.load())
        except Exception as error:
            package = entry.dist.name if entry.dist else "?"
            raise PluginError(
                f"plug-in {entry.name!r} ({entry.value}, of the package {package}) cannot be imported: "
                f"{error!r}; mend it, or uninstall the package"
            ) from error
    return tuple(loaded)


@cache
def _digest(home: str) -> str:
    """Return a digest of the Python files of the top package, or of the module, that ``home`` is in."""
    top = sys.modules[home.partition(".")[0]]
    file = Path(str(top.__file__))
    files = sorted(file.parent.rglob("*.py")) if hasattr(top, "__path__") else [file]
    total = hashlib.sha256()
    for path in files:
        total.update(path.relative_to(file.parent).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


CHANNELS: Registry[Any] = Registry("radio.fading", "pwff_opt.channel.fading")
"""Small-scale fading of the radio channel."""
ACCESS: Registry[Any] = Registry("cell.access", "pwff_opt.planning.access")
"""How devices share the uplink band."""
RULES: Registry[Any] = Registry("aggregation.lora", "pwff_opt.federated.exchange.rules")
"""How the LoRA factors of many devices are merged."""
FAMILIES: Registry[Any] = Registry("config.model_type", "pwff_opt.families")
"""Families of language models."""
STAGES: Registry[Any] = Registry("training.stage", "pwff_opt.federated.stages")
"""What is learned."""
SEARCHES: Registry[Any] = Registry("search.method", "pwff_opt.search.methods")
"""How the next schedule to train is chosen."""
EXECUTORS: Registry[Any] = Registry("executor", "pwff_opt.executors")
"""Where trainings run."""
