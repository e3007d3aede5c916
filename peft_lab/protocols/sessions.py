"""Sessions of an incremental protocol: orders of classes or domains, and their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_lab.errors import ConfigError

#: Order of the classes as the task names them; other orders are seeds.
NATURAL = "natural"


@dataclass(frozen=True)
class Session:
    """Session of a protocol.

    Attributes:
        groups: classes that are new in it, or domains, as their numbers.
    """

    groups: tuple[int, ...]


def order_of(count: int, name: str) -> list[int]:
    """Order of classes or domains by a seed, as numpy's legacy generator permutes them, or as they are named.

    Source: the seeds 1993, 1996 and 1997 of the code of SLCA (arXiv 2303.05118).

    Raises:
        ConfigError: neither a seed nor "natural".
    """
    if name == NATURAL:
        return list(range(count))
    if not name.isdecimal() or int(name) >= 2**32:
        raise ConfigError(f'orders: "{name}" must be {NATURAL} or a seed from 0 on, such as 1993.')
    import numpy as np  # here, because options of a run are checked without it

    return [int(place) for place in np.random.RandomState(int(name)).permutation(count)]


def sessions_of(order: Sequence[int], steps: int, base: int | None, what: str = "classes") -> list[Session]:
    """Split an order into sessions.

    All sessions are equal, and the last one has what is left (20 x 9 + 16 of 196 classes); where that would be fewer
    sessions, the sizes differ by one. With `base`, the first one has so many, and the others share the rest.

    Args:
        order: classes or domains in the order in which they come.
        steps: number of sessions, the first one included.
        base: number in the first session; None for as many as in the others.
        what: word in errors.

    Raises:
        ConfigError: there are fewer of them than sessions.
    """
    if steps < 2:
        raise ConfigError(f"steps must be at least 2, got {steps}: the first session is one of them.")
    if base is not None and not 1 <= base < len(order):
        raise ConfigError(f"base_classes must be from 1 to {len(order) - 1} of {len(order)} {what}, got {base}.")
    first = [] if base is None else [base]
    rest, parts = len(order) - sum(first), steps - len(first)
    if rest < parts:
        raise ConfigError(f"steps={steps} needs as many {what}, but {rest} are left for {parts} sessions; give fewer.")
    sizes, found, start = [*first, *_sizes(rest, parts)], [], 0
    for size in sizes:
        found.append(Session(tuple(order[start : start + size])))
        start += size
    return found


def _sizes(count: int, parts: int) -> list[int]:
    size = -(-count // parts)
    if size * (parts - 1) < count:
        return [size] * (parts - 1) + [count - size * (parts - 1)]
    size, larger = divmod(count, parts)
    return [size + 1] * larger + [size] * (parts - larger)
