"""Result files: rows of measurements with the environments that they were taken in, as JSON.

    {"schema": 1,
     "environments": {ID: environment.record(...) and the measured rates under "rates"},
     "rows": [{suite, model, size, batch, length, dtype, device, peer,    what was measured: the row's key
               environment, time, seconds,                                where, when (UTC), how long the case took
               status: "ok" | "failed" | "unavailable", reason,           the reason of what is not "ok"
               metrics: {...}}]}                                          of the suite; a missing one was not measured

A file is replaced as a whole after each row, so that a run which is stopped keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
KEY = ("suite", "model", "size", "batch", "length", "dtype", "device", "peer")
FIELDS = {*KEY, "environment", "time", "seconds", "status", "reason", "metrics"}
STATUSES = ("ok", "failed", "unavailable")

Row = dict[str, Any]


class ResultsError(Exception):
    """A result file can't be used."""


class SchemaError(ResultsError):
    """It is no result file, or of another version of the schema."""


class ConflictError(ResultsError):
    """Two files say different things about the same measurement."""


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row measures."""
    return tuple(row[name] for name in KEY)


def now() -> str:
    """The time for a row: UTC, to the microsecond, so that rows sort by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def metric(row: Row, name: str) -> Any:
    """A metric of a row, of a dotted name; None where it was not measured."""
    found: Any = row["metrics"]
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def headline(row: Row, names: Iterable[str]) -> tuple[str, float] | None:
    """The first of these metrics that was measured, as a number, after its name."""
    for name in names:
        value = metric(row, name)
        if value is not None:
            return name, value["median"] if isinstance(value, dict) else value
    return None


@dataclass
class Results:
    """Rows by key, and the environments that they name."""

    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_environment(self, record: dict[str, Any]) -> str:
        """Keep an environment; its ID."""
        text = json.dumps(record, sort_keys=True)
        identity = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.environments[identity] = record
        return identity

    def add(self, row: Row) -> None:
        """Keep a row. Of two with the same key the later stays.

        Raises:
            ConflictError: they have the same time and differ.
        """
        known = self.rows.get(key_of(row))
        if known is not None and known["time"] == row["time"] and known != row:
            what = ", ".join(f"{name}={row[name]}" for name in KEY)
            raise ConflictError(f"two different rows of {row['time']} for {what}")
        if known is None or known["time"] <= row["time"]:
            self.rows[key_of(row)] = row

    def merge(self, other: Results) -> None:
        """Take over all of `other`; see `add`."""
        self.environments |= other.environments
        for row in other.rows.values():
            self.add(row)

    def save(self, path: Path) -> None:
        """Write to `path`, in one step; environments that no row names any more are dropped."""
        rows = sorted(self.rows.values(), key=lambda row: tuple(map(str, key_of(row))))
        named = {row["environment"] for row in rows}
        kept = {name: self.environments[name] for name in sorted(self.environments) if name in named}
        text = json.dumps({"schema": SCHEMA, "environments": kept, "rows": rows}, indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load(path: Path) -> Results:
    """Read a result file.

    Raises:
        SchemaError: it is none of this version.
        ConflictError: two of its rows differ and have the same key and time.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path} can't be read as JSON: {error}") from None
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise SchemaError(f"{path} has the schema {version}, this version reads {SCHEMA}")
    found = Results(environments=data["environments"])
    for row in data["rows"]:
        if set(row) != FIELDS or row["status"] not in STATUSES or row["environment"] not in found.environments:
            raise SchemaError(f"{path} has a row with missing, unknown or dangling fields: {sorted(row)}")
        found.add(row)
    return found


def merged(paths: Iterable[Path]) -> Results:
    """The rows of several files; errors as `load` and `Results.add`."""
    found = Results()
    for path in paths:
        found.merge(load(path))
    return found
