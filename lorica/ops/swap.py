"""Gives a module another forward by changing its class, in place, and undoes it. Knows no kernel and no model.

The module stays the same object: parameters, buffers, hooks, names and references to it are untouched, `isinstance`
still finds the original class, and the class keeps its name, by which units are found. Other modules of that class in
the process do not change.

[Note: classes made at run time] A class that exists only in this process cannot be pickled by name: `Swapped` pickles
the original class and the recipe instead, from which the class is made again, also by `deepcopy`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

Forward = Callable[..., Any]


class Recipe(NamedTuple):
    """What makes the new forward of a class: make(class, library, **options)."""

    make: Callable[..., Forward]
    op: str
    library: str
    options: tuple[tuple[str, Any], ...] = ()


class Swapped:
    """Mixed into every class made here."""

    lorica_original: type[nn.Module]
    lorica_recipe: Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As usual, but for the class; see [Note: classes made at run time]."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, arguments, *rest = reduced
        if len(arguments) != 1:
            raise TypeError(
                f"{type(self).__name__}: expected a module that is pickled by its attributes, got one with arguments "
                "of its own. Fix: lorica.ops.undo(model) before pickling."
            )
        return (_blank, (self.lorica_original, self.lorica_recipe), *rest)

    def _get_name(self) -> str:
        """The name in `print(model)`."""
        recipe = self.lorica_recipe
        return f"{type(self).__name__}[{recipe.library} {recipe.op}]"


def swap(module: nn.Module, recipe: Recipe) -> None:
    """Give `module` the forward that `recipe` makes for its class."""
    original: Any = type(module)
    module.__class__ = _class_of(original, recipe)


def swap_back(module: nn.Module) -> None:
    """Give `module` its own class again."""
    own: Any = module.lorica_original
    module.__class__ = own


@cache
def _class_of(original: Any, recipe: Recipe) -> Any:
    """One class for all modules of one class with one recipe: blocks that were alike stay alike."""
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "lorica_original": original,
        "lorica_recipe": recipe,
        "forward": recipe.make(original, recipe.library, **dict(recipe.options)),
    }
    return type(original.__name__, (Swapped, original), members)


def _blank(original: Any, recipe: Recipe) -> Any:
    """An object of a swapped class without attributes, for `pickle` and `deepcopy` to fill."""
    made = _class_of(original, recipe)
    return made.__new__(made)
