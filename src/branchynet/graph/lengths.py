"""Lengths of inputs that stay free, besides the batch size."""

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Length:
    """A length that stays free.

    Attributes:
        name: the name of the length; dimensions of one name have one size.
        at: the dimensions that it is the size of: names of inputs, and dimensions, where 0 is the batch.
        example: its size in the example.
        least: the smallest size.
        most: the largest size; None if there is no limit.
        step: the sizes are `least`, ``least + step`` and so on.
    """

    name: str
    at: tuple[tuple[str, int], ...]
    example: int
    least: int
    most: int | None
    step: int = 1

    def __post_init__(self) -> None:
        if self.step < 1 or self.least < 1 or not self.at or any(axis < 1 for _, axis in self.at):
            raise InputError(f"{self.name!r} must have sizes and dimensions of at least 1; got {self.least}, {self.at}")

    def fits(self, size: int) -> bool:
        """Whether a size is allowed."""
        beyond = self.most is not None and size > self.most
        return size >= self.least and not beyond and (size - self.least) % self.step == 0

    def other(self) -> int:
        """Return an allowed size that is not the example's, about half of it if possible."""
        steps = (self.example - self.least) // self.step
        return self.example - self.step * ((steps + 1) // 2) if steps else self.example + self.step

    def __str__(self) -> str:
        first = f"{self.least}, {self.least + self.step}, ..." if self.step > 1 else f"{self.least}"
        return f"{first} {'or more' if self.most is None else f'to {self.most}'}"
