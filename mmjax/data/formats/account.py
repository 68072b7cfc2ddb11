"""Accounts: what a reader found in its source, how much of it is used, and what it left out and why."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_NAMED = 1_000  # items of a reason that are kept by name; the others are only counted
SHOWN = 6  # reasons in a line


@dataclasses.dataclass
class Items:
    """Items with the same reason: how many, and the names of the first of them."""

    count: int = 0
    names: list[str] = dataclasses.field(default_factory=list)

    def add(self, names: Sequence[str], count: int | None = None) -> None:
        """count: number of the items; None for that of the names"""
        self.count += len(names) if count is None else count
        self.names += names[:MOST_NAMED - len(self.names)]


@dataclasses.dataclass
class Account:
    """The items of a source: `found` = `used` + those in `left`, by reason.

    unit:  what the items are, such as "rows"
    found: number of items that the reader came across
    used:  number of items that are records
    left:  items that are not used, by reason
    odd:   items that are used although they look wrong, or were read in another way than usual, by what is odd
    """

    unit: str
    found: int = 0
    used: int = 0
    left: dict[str, Items] = dataclasses.field(default_factory=dict)
    odd: dict[str, Items] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(records: Sequence[Any]) -> "Account":
        """Returns the account of a reader's records; all are used if the reader keeps none."""
        account = getattr(records, "account", None)
        return Account("records", len(records), len(records)) if account is None else account

    @property
    def unaccounted(self) -> int:
        """Number of items that are neither used nor left out, which is 0 unless a reader has a bug."""
        return self.found - self.used - sum(items.count for items in self.left.values())

    def leave(self, reason: str, *names: str, count: int | None = None) -> None:
        """Adds items that are not used. count: their number; None for that of the names"""
        self.left.setdefault(reason, Items()).add(names, count)

    def notice(self, what: str, *names: str, count: int | None = None) -> None:
        """Adds items that look odd. count: their number; None for that of the names"""
        self.odd.setdefault(what, Items()).add(names, count)

    def add(self, other: "Account") -> None:
        """Adds the items of another account."""
        self.found, self.used = self.found + other.found, self.used + other.used
        for mine, theirs in ((self.left, other.left), (self.odd, other.odd)):
            for reason, items in theirs.items():
                mine.setdefault(reason, Items()).add(items.names, items.count)

    def reject(self, reason: str, *names: str) -> None:
        """Leaves out items that were used so far."""
        self.used -= len(names)
        self.leave(reason, *names)

    def copy(self) -> "Account":
        """Returns a copy that can be changed without changing this one."""
        copied = Account(self.unit)
        copied.add(self)
        return copied

    def line(self, source: str) -> str:
        """Returns the account in one line."""
        left = sum(items.count for items in self.left.values())
        text = f"{source}: {self.found:,} {self.unit} found = {self.used:,} used + {left:,} left out"
        text += f" ({_counts(self.left)})" if self.left else ""
        if self.unaccounted:
            text += f" + {self.unaccounted:,} unaccounted for (a bug in mmjax, please report it)"
        return text + (f"; odd: {_counts(self.odd)}" if self.odd else "")

    def listing(self) -> Iterator[str]:
        """Yields a line for every item that is left out or odd."""
        for title, groups in (("left out", self.left), ("odd", self.odd)):
            for reason, items in groups.items():
                yield from (f"{title}, {reason}: {name}" for name in items.names)
                if not items.names or len(items.names) == MOST_NAMED < items.count:
                    yield f"{title}, {reason}: {items.count - len(items.names):,} more"


def printable(text: str) -> str:
    """Returns text that may quote untrusted data without its control characters."""
    return "".join(character if character.isprintable() else " " for character in text)


def _counts(groups: Mapping[str, Items]) -> str:
    parts = [f"{items.count:,} {reason}" for reason, items in groups.items()]
    return ", ".join(parts[:SHOWN]) + (f", and {len(parts) - SHOWN} more kinds" if len(parts) > SHOWN else "")
