"""The methods by their names: those of this package, of the user, and of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ..core.values import parse_mapping
from .base import GradientMethod, SelectionMethod
from .options import GradientOptions, MethodOptions


ENTRY_POINTS = "diffora_trainer.methods"
"""The entry-point group in which another package names its methods."""

_METHODS: dict[str, type[SelectionMethod]] = {}
_Method = TypeVar("_Method", bound=type[SelectionMethod])


def register_method(name: str) -> Callable[[_Method], _Method]:
    """
    Let a method be chosen by `DiffoRAConfig(method=name)`, in the trainers and wherever else a configuration is read.

    ```python
    @register_method("fisher")
    class Fisher(ScoreMethod):
        def score(self, context):
            return context.mean_over_batches(lambda gradient: gradient.square().sum())
    ```

    Another package does so when it is asked for its method, if it names the class in the entry-point group
    `diffora_trainer.methods`.

    Args:
        name (`str`): the name. A method that was registered under it before is replaced.

    Raises:
        TypeError: if what is decorated is not a subclass of [`~diffora_trainer.methods.base.SelectionMethod`], or its
            `Options` do not derive from [`~diffora_trainer.methods.options.MethodOptions`].
    """

    def register(method: _Method) -> _Method:
        if not isinstance(method, type) or not issubclass(method, SelectionMethod):
            raise TypeError(
                f"`@register_method({name!r})` decorates {method!r}, which is not a subclass of `SelectionMethod`. "
                "Please derive a class from `ScoreMethod` or `GradientMethod`."
            )
        options = GradientOptions if issubclass(method, GradientMethod) else MethodOptions
        if not issubclass(method.Options, options):
            raise TypeError(
                f"`{method.__name__}.Options` is {method.Options.__name__}, which lacks what every such method is "
                f"asked for. Please derive it from `{options.__module__}.{options.__name__}`."
            )
        method.name = name
        _METHODS[name] = method
        return method

    return register


def unregister_method(name: str) -> None:
    """Forget a method."""
    _METHODS.pop(name, None)


def method_names() -> list[str]:
    """Names of all methods that can be chosen."""
    return sorted({*_METHODS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def get_method(name: str) -> type[SelectionMethod]:
    """
    A method by its name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _METHODS:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            register_method(name)(entry.load())
    if name not in _METHODS:
        raise ValueError(f"You passed `method={name!r}`; it must be one of {method_names()}.")
    return _METHODS[name]


def parse_options(method: type[SelectionMethod], options: dict[str, Any] | str | None) -> Any:
    """
    The options of a method from what a user wrote.

    Args:
        method (`type[SelectionMethod]`): the method.
        options (`dict` or `str`, *optional*): the user's options, or their JSON; the others keep their defaults.

    Raises:
        ValueError: if the method has no such option, or a value is out of its range.
        TypeError: if a value is of the wrong type.
    """
    given = parse_mapping("method_options", options)
    known = [field.name for field in fields(method.Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"You passed `{unknown[0]}` with `method={method.name!r}`, which does not read it. Its options are "
            f"{known}. Please leave it out, or use another method."
        )
    return method.Options(**given)
