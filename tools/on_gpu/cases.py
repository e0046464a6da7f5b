"""Cases: what a part of the run consists of -> its cases, each with a name and what it finds out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Attributes:
        tiny: whether everything is small, so that the part itself can be tried on a CPU.
        tell: takes what a case has found so far, for when it does not come to its end.
    """

    tiny: bool = False
    tell: Callable[[Figures], None] = lambda _: None

    @property
    def device(self) -> torch.device:
        """The first GPU; where there is none, a CPU for what is tiny.

        Raises:
            RuntimeError: where there is none for what is not.
        """
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        if not self.tiny:
            raise RuntimeError("torch sees no GPU here; --tiny tries everything small on a CPU")
        return torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One thing to find out.

    Attributes:
        run: finds it out; raises where something is wrong, `Wrong` where there are figures all the same.
    """

    name: str
    run: Callable[[], Figures]


class Wrong(Exception):
    """Something is not as it should be, and these are the figures of it."""

    def __init__(self, message: str, **figures: Any) -> None:
        super().__init__(message)
        self.figures = figures
