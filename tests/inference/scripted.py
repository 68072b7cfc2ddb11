"""A model whose answers are given."""

from collections.abc import Iterator
from typing import Any


class Scripted:
    """The model, but its answers are these pieces; an exception among them is raised."""

    def __init__(self, model: Any, *pieces: str | BaseException):
        self.model, self.pieces = model, pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def stream(self, sample: Any, **settings: Any) -> Iterator[str]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
