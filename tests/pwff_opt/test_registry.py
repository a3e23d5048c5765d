"""Registries: who is found, in which order, and which names are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pwff_opt.errors import PluginError
from pwff_opt.registry import RULES, Registry

_NUMBERS = itertools.count()


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Return the name of an empty package that can be imported, and its folder."""
    name = f"room_{next(_NUMBERS)}"  # modules stay imported, so no two tests share one
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return name, tmp_path / name


def put(registry: Registry[str], name: str, variant: str, module: str) -> None:
    """Add a variant as a module of this name would."""
    space = {"__name__": module, "registry": registry, "name": name, "variant": variant}
    exec("registry.add(name, variant)", space)


def test_variants_come_in_alphabetical_order_from_the_modules_of_the_room(
    room: tuple[str, Path],
) -> None:
    name, folder = room
    registry: Registry[str] = Registry("some.key", name)
    for module in ("zebra", "ant", "_helper"):
        (folder / f"{module}.py").write_text(f"MARK = {module!r}\n")
    put(registry, "zebra", "Z", f"{name}.zebra")
    put(registry, "ant", "A", f"{name}.ant")
    assert list(registry) == ["ant", "zebra"]
    assert (registry["zebra"], len(registry), "cat" in registry) == ("Z", 2, False)
    assert registry.get("cat") is None


def test_our_own_rules_are_found_once_each_and_have_no_digest() -> None:
    assert list(RULES) == sorted(RULES)
    assert len(RULES) == 11
    assert {RULES.source(name) for name in RULES} == {""}


@pytest.mark.parametrize("name", ["", "two words", "a/b", "a.b", "-", "a,b"])
def test_names_that_are_no_word_are_refused(name: str, room: tuple[str, Path]) -> None:
    registry: Registry[str] = Registry("some.key", room[0])
    with pytest.raises(
        PluginError, match=r"some\.key must be named by letters, digits, '-' and '_'"
    ):
        registry.add(name, "x")
    assert list(registry) == []


@pytest.mark.parametrize("name", ["median", "hetlora-norm", "a_b", "2d"])
def test_names_that_are_a_word_are_taken(name: str, room: tuple[str, Path]) -> None:
    registry: Registry[str] = Registry("some.key", room[0])
    assert registry.add(name, "x") == "x"
    assert list(registry) == [name]


def test_a_name_belongs_to_one_module(room: tuple[str, Path]) -> None:
    registry: Registry[str] = Registry("some.key", room[0])
    put(registry, "median", "first", "one_package")
    with pytest.raises(
        PluginError,
        match=r"some\.key 'median' must be added by one module; one_package has it, and "
        r"another_package adds another: rename one of them",
    ):
        put(registry, "median", "second", "another_package")
    assert registry["median"] == "first"
    put(registry, "median", "reloaded", "one_package")
    assert registry["median"] == "reloaded"
