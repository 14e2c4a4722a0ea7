"""A method of one object that others cover for a while, and uncover in any order. Contents: Covered."""

from __future__ import annotations

from typing import Any

# (object, attribute) -> its own value (None: that of its class) and those that cover it, the last one in effect
_COVERS: dict[tuple[int, str], tuple[Any, list[Covered]]] = {}


class Covered:
    """`method` is the attribute `name` of `owner` until `remove` is called; with the last one its own is back."""

    def __init__(self, owner: Any, name: str, method: Any) -> None:
        self._owner, self._name, self._method = owner, name, method
        _, covers = _COVERS.setdefault((id(owner), name), (vars(owner).get(name), []))
        covers.append(self)
        setattr(owner, name, method)

    def remove(self) -> None:
        own, covers = _COVERS.get((id(self._owner), self._name), (None, []))
        if self not in covers:
            return
        covers.remove(self)
        if covers:
            setattr(self._owner, self._name, covers[-1]._method)
            return
        del _COVERS[id(self._owner), self._name]
        if own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, own)
