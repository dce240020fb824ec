"""Named things that can be extended: from one file here, or from somebody else's package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from softdefend.core.errors import SettingError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name, such as label rules or attacks.

    A package of somebody else adds to it with an entry point of the group ``softdefend.KIND``, whose name is
    the thing's name and whose value is its import path:

        [project.entry-points."softdefend.attacks"]
        my-attack = "my_package.my_attack:MyAttack"

    Entry points are read at the first question. One that cannot be imported is refused when it is asked for,
    not before: a broken package of others does not stop what does not use it.

    Args:
        kind: the name of the kind in messages and entry points, such as ``attacks``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._foreign: dict[str, Callable[[], T]] | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate what is to be known as ``name``.

        Raises:
            ValueError: another thing has that name.
        """

        def add(item: T) -> T:
            if self._items.setdefault(name, item) is not item:
                raise ValueError(f"{self.kind}: {name!r} is registered twice")
            return item

        return add

    def unregister(self, name: str) -> None:
        """Forget a name; for tests."""
        self._items.pop(name, None)

    def names(self) -> list[str]:
        """All names, sorted; those of other packages included."""
        return sorted({*self._items, *self._others()})

    def items(self) -> Iterator[tuple[str, T]]:
        """Names and things in the order of :meth:`names`."""
        return ((name, self[name]) for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._others()

    def __getitem__(self, name: str) -> T:
        """The thing of a name.

        Raises:
            SettingError: an unknown name, or a package of others that cannot be imported.
        """
        if name in self._items:
            return self._items[name]
        if name not in self._others():
            known = self.names()
            raise SettingError(self.kind, repr(name), ", ".join(known) + did_you_mean(name, known))
        try:
            return self.register(name)(self._others()[name]())
        except Exception as error:  # importing somebody else's package fails in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SettingError(self.kind, f"{name!r} ({reason})", "a package that can be imported") from error

    def _others(self) -> dict[str, Callable[[], T]]:
        if self._foreign is None:
            found = entry_points(group=f"softdefend.{self.kind}")
            self._foreign = {point.name: point.load for point in found if point.name not in self._items}
        return self._foreign
