"""Records as cells of tables: means with spreads over seeds, and sentences that count what a table shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .data import TITLES
from .protocol import NETWORKS, Protocol

Record = dict[str, Any]
Records = dict[str, Record]
NONE = "-"


def mean(values: Iterable[float | None], digits: int = 2) -> str:
    """``mean ± sd`` (of the sample) of what is there; says of how many where some are not."""
    every = list(values)
    there = [v for v in every if v is not None]
    if not there:
        return NONE
    text = f"{np.mean(there):.{digits}f}"
    if len(there) > 1:
        text += f" ± {np.std(there, ddof=1):.{digits}f}"
    return text if len(there) == len(every) else f"{text} ({len(there)} of {len(every)})"


def span(values: Iterable[float | None], digits: int = 1) -> str:
    """Smallest to largest; ``open`` stands for a value that is not there."""
    every = list(values)
    there = [v for v in every if v is not None]
    parts = [] if not there else [f"{min(there):.{digits}f}"]
    if there and f"{max(there):.{digits}f}" != parts[0]:
        parts.append(f"{max(there):.{digits}f}")
    text = " to ".join(parts)
    if len(there) == len(every):
        return text
    return f"{text}, open" if text else "open"


def percent(gap: float | None) -> float | None:
    """A relative gap in percent."""
    return None if gap is None else 100 * gap


def pairs(protocol: Protocol, apart: bool = False) -> list[tuple[str, str]]:
    """(network, data set) in the order of the tables."""
    networks = protocol.networks_apart if apart else protocol.networks
    return [(n, d) for d in protocol.data for n in networks]


def of(records: Records, network: str, name: str) -> list[Record]:
    """The records of one network and data set, by seed."""
    start = f"{network}-{name}-seed"
    found = [
        (int(key.removeprefix(start)), record)
        for key, record in records.items()
        if key.startswith(start)
    ]
    return [record for _, record in sorted(found, key=lambda item: item[0])]


def label(network: str, name: str) -> dict[str, str]:
    """The two first cells of a row."""
    return {"data": TITLES[name], "network": NETWORKS[network].title}


def values(records: Sequence[Record], *path: str) -> list[float | None]:
    """One number of every record; None where it has none."""
    found: list[float | None] = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        found.append(value)
    return found


def average(records: Sequence[Record], *path: str) -> float | None:
    """Mean of what is there."""
    there = [v for v in values(records, *path) if v is not None]
    return float(np.mean(there)) if there else None


def losses(records: Records, protocol: Protocol, method: str, treatment: str) -> list[float | None]:
    """Points lost against the unpruned network, mean over seeds, per row of the main tables."""
    found: list[float | None] = []
    for network, name in pairs(protocol):
        rows = of(records, network, name)
        lost = [
            r["reference"] - r["accuracy"][method][treatment]
            for r in rows
            if method in r["accuracy"]
        ]
        found.append(float(np.mean(lost)) if lost else None)
    return found


def wins(
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    better: Callable[[float, float], bool],
) -> str:
    """``k of n`` rows in which both are there and ours is better."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return f"{sum(better(a, b) for a, b in both)} of {len(both)}"


def closed(runs: Sequence[Record]) -> list[Record]:
    """Those whose program was solved to its gap: others may hold nothing but the unpruned network."""
    return [r for r in runs if r["program"]["proven"]]
