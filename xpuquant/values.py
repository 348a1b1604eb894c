"""Classes of values: `frozen` is `dataclasses.dataclass(frozen=True)` at a fifth of its price.

A frozen dataclass has half a dozen methods compiled for it when its module is imported: 0.6 to 0.8 ms. A conversion has
a hundred such classes, and waited 60 ms more for its first byte, for methods of which it calls few. Here the classes
share the methods, and each has but `__init__` of its own, compiled for its first object.

Fields, defaults, `field`, `__post_init__`, `fields`, `replace` and `asdict` are those of `dataclasses`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields, make_dataclass
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, dataclass_transform, overload

T = TypeVar("T")


@overload
def frozen(kind: type[T], /) -> type[T]: ...


@overload
def frozen(
    *, kw_only: bool = False, slots: bool = False, order: bool = False, sealed: bool = False
) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(
    kind: type[T] | None = None,
    /,
    *,
    kw_only: bool = False,
    slots: bool = False,
    order: bool = False,
    sealed: bool = False,
) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class one of values, which are equal, and hash, by their class and their compared fields.

    That nothing is assigned to a field is for the type checker to see: it costs an object nothing.

    Args:
        kw_only: fields are given by name.
        slots: objects have these fields and no dictionary: of what there are millions of.
        order: values sort, as the tuples of their fields do.
        sealed: an assignment raises `FrozenInstanceError`, and `__init__` is there at once, for `help` to show: of what
            users are given.
    """

    def made(kind: type[T]) -> type[T]:
        has_hash = "__hash__" in vars(kind)
        done: Any = dataclass(init=False, repr=False, eq=False, kw_only=kw_only, slots=slots)(kind)
        shared: dict[str, Any] = {"__repr__": _shown, "__eq__": _is_equal}
        shared |= {"__lt__": _is_less} if order else {}
        shared |= {"__setattr__": _refuse, "__delattr__": _refuse} if sealed else {}
        # What copies or unpickles an object without a dictionary would assign to its fields.
        shared |= {"__getstate__": _values, "__setstate__": _put_back} if sealed and slots else {}
        for name, method in shared.items():
            if name not in vars(kind):
                setattr(done, name, method)
        if not has_hash:
            done.__hash__ = _hashed
        done.__compared__ = _reader([one.name for one in fields(done) if one.compare])
        if "__init__" not in vars(kind):
            done.__init__ = _compiled(done) if sealed else _first(done)
        return done  # type: ignore[no-any-return]

    return made if kind is None else made(kind)


def _reader(names: Sequence[str]) -> Callable[[Any], tuple[object, ...]]:
    """What makes a tuple of these fields of an object. `attrgetter` does from two on: objects are keys of caches."""
    return attrgetter(*names) if len(names) > 1 else lambda one: tuple([getattr(one, name) for name in names])


def _is_equal(self: Any, other: Any) -> bool:
    read = type(self).__compared__
    return read(self) == read(other) if other.__class__ is self.__class__ else NotImplemented


def _is_less(self: Any, other: Any) -> bool:
    read = type(self).__compared__
    return read(self) < read(other) if other.__class__ is self.__class__ else NotImplemented


def _hashed(self: Any) -> int:
    return hash(type(self).__compared__(self))


def _shown(self: Any) -> str:
    given = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr)
    return f"{type(self).__qualname__}({given})"


def _values(self: Any) -> list[object]:
    return [getattr(self, one.name) for one in fields(self)]


def _put_back(self: Any, values: Sequence[object]) -> None:
    for one, value in zip(fields(self), values, strict=True):
        object.__setattr__(self, one.name, value)


def _refuse(self: Any, name: str, *given: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _first(kind: Any) -> Callable[..., None]:
    """What a class has for `__init__` until its first object: it compiles the real one, and hands over to it."""

    def compile_and_set(self: Any, /, *given: object, **named: object) -> None:
        kind.__init__ = _compiled(kind)
        kind.__init__(self, *given, **named)

    return compile_and_set


def _compiled(kind: Any) -> Callable[..., None]:
    """`__init__` of a class, as `dataclasses` compiles it: sets each field, then calls `__post_init__`."""
    given = [(one.name, one.type, _again(one)) for one in fields(kind)]
    namespace = {"__post_init__": kind.__post_init__} if hasattr(kind, "__post_init__") else {}
    is_sealed = kind.__setattr__ is not object.__setattr__
    twin: Any = make_dataclass(kind.__name__, given, namespace=namespace, repr=False, eq=False, frozen=is_sealed)
    made: Callable[..., None] = twin.__init__
    made.__qualname__ = f"{kind.__qualname__}.__init__"
    return made


def _again(one: Field[Any]) -> Any:
    """A field for another class."""
    if one.default_factory is not MISSING:
        return field(default_factory=one.default_factory, kw_only=one.kw_only is True)
    return field(default=one.default, kw_only=one.kw_only is True)
