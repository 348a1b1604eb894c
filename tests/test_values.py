"""Classes of values are what `dataclasses` makes of the same fields, but for what is said where they differ."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace
from inspect import signature
from typing import Any

import pytest

import xpuquant.conversion
from xpuquant.values import frozen


@frozen
class Ours:
    a: int
    b: tuple[int, ...] = (1, 2)
    c: list[int] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class Theirs:
    a: int
    b: tuple[int, ...] = (1, 2)
    c: list[int] = field(default_factory=list, compare=False)


@frozen(kw_only=True)
class Base:
    name: str
    said: str = "base"


@frozen(kw_only=True)
class Derived(Base):
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"{self.name} of {self.size}")


@frozen(slots=True)
class Slotted:
    a: int
    b: int = 2


@frozen(sealed=True)
class Sealed:
    a: int


@frozen(order=True)
class Ordered:
    a: int
    b: str = ""


@frozen
class Nothing:
    pass


@frozen
class OfItsOwn:
    """What a class defines itself stays."""

    a: int

    def __repr__(self) -> str:
        return "mine"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OfItsOwn)

    def __hash__(self) -> int:
        return 7


def test_objects_are_made_shown_and_compared_as_those_of_dataclasses() -> None:
    for arguments, named in [((1,), {}), ((1, (3,)), {"c": [4]}), ((), {"a": 5, "b": ()})]:
        ours, theirs = Ours(*arguments, **named), Theirs(*arguments, **named)  # type: ignore[arg-type]
        assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
        assert asdict(ours) == asdict(theirs) and hash(ours) == hash(theirs)
    assert Ours(1) == Ours(1, c=[9]) != Ours(2)
    assert Ours(1).c is not Ours(1).c
    assert Ours(1) != Theirs(1) and Ours(1).__eq__(Theirs(1)) is NotImplemented
    assert {Ours(1), Ours(1)} == {Ours(1)}
    assert [one.name for one in fields(Ours)] == ["a", "b", "c"]
    assert replace(Ours(1, c=[3]), a=2) == Ours(2)
    assert Nothing() == Nothing() and repr(Nothing()) == "Nothing()"


@pytest.mark.parametrize("arguments", [(), (1, 2, 3, 4)])
def test_arguments_that_do_not_fit(arguments: tuple[Any, ...]) -> None:
    for _ in range(2):  # the first object's, then every other's
        with pytest.raises(TypeError, match=r"Ours\.__init__\(\)"):
            Ours(*arguments)
        with pytest.raises(TypeError, match="unexpected keyword argument 'd'"):
            Ours(1, d=2)  # type: ignore[call-arg]


def test_a_derived_class_has_the_fields_of_its_base() -> None:
    made = Derived(name="x", size=3)
    assert repr(made) == "Derived(name='x', said='base', size=3)"
    assert made != Base(name="x") and made == replace(made, size=3)
    with pytest.raises(ValueError, match="x of -1"):
        replace(made, size=-1)
    with pytest.raises(TypeError, match="positional argument"):
        Derived("x", 3)  # type: ignore[call-arg, arg-type, misc]


def test_fields_are_there_before_an_object_is() -> None:
    """A process that is sent an object has never called the class."""

    @frozen
    class Above:
        a: int

    @frozen
    class Below(Above):
        b: list[int] = field(default_factory=list)

    sent, same = object.__new__(Below), object.__new__(Below)
    vars(sent).update(a=1, b=[])
    vars(same).update(a=1, b=[])
    assert sent == same and repr(sent).endswith("Below(a=1, b=[])")
    assert [one.name for one in fields(Below)] == ["a", "b"]
    assert Below(1) == sent and Below(1).b is not Below(1).b


def test_threads_may_make_the_first_objects() -> None:
    for _ in range(20):

        @frozen
        class Shared:
            a: int
            b: list[int] = field(default_factory=list)

        with ThreadPoolExecutor(8) as threads:
            made = list(threads.map(Shared, range(64)))
        assert made == [Shared(number) for number in range(64)]


def test_slots() -> None:
    made = Slotted(1)
    assert not hasattr(made, "__dict__") and (made.a, made.b) == (1, 2) and made == Slotted(1, 2)


@frozen(slots=True, sealed=True)
class SealedSlots:
    a: int
    b: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "made", [Ours(1), Derived(name="x", size=3), Slotted(1), Sealed(1), SealedSlots(1, (2,)), Nothing()]
)
def test_objects_are_copied_and_pickled(made: Any) -> None:
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), replace(made)):
        assert other == made and other is not made and repr(other) == repr(made) and type(other) is type(made)


def test_what_users_are_given_can_be_copied_and_pickled() -> None:
    """Every sealed class of the package, an object of each with whatever in its fields."""
    for module in pkgutil.walk_packages(xpuquant.conversion.__path__, "xpuquant.conversion."):
        importlib.import_module(module.name)
    sealed = [
        kind
        for name, module in sorted(sys.modules.items())
        if name.startswith("xpuquant.")
        for kind in vars(module).values()
        if isinstance(kind, type)
        and kind.__module__ == name
        and is_dataclass(kind)
        and kind.__setattr__ is not object.__setattr__
    ]
    assert len(sealed) > 30
    for kind in sealed:
        made: Any = object.__new__(kind)
        for one in fields(kind):
            object.__setattr__(made, one.name, one.name)
        for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert [getattr(other, one.name) for one in fields(kind)] == [one.name for one in fields(kind)], kind
        with pytest.raises(FrozenInstanceError):
            made.anything = 1


def test_what_users_are_given_shows_its_arguments_and_refuses_assignments() -> None:
    assert str(signature(Sealed)) == "(a: 'int') -> None"
    made = Sealed(1)
    with pytest.raises(FrozenInstanceError):
        made.a = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del made.a
    assert pickle.loads(pickle.dumps(made)) == made == Sealed(a=1)


def test_order_is_that_of_the_fields() -> None:
    assert sorted([Ordered(2), Ordered(1, "b"), Ordered(1, "a")]) == [Ordered(1, "a"), Ordered(1, "b"), Ordered(2)]


def test_methods_of_the_class_itself_stay() -> None:
    assert repr(OfItsOwn(1)) == "mine" and OfItsOwn(1) == OfItsOwn(2) and hash(OfItsOwn(1)) == 7
