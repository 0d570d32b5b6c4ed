"""Prediction services behind one boundary: pictures go out, probabilities come back, and every row is counted.

Nothing but probabilities crosses it: a service gets NumPy copies, so no gradient can flow through, and it may live
anywhere: a function in this process, or an address that speaks JSON or npy. Around each service stand the checks that
cost nothing (shape and range before a query is spent), the patience (attempts, backoff, rate limit) and the ledger,
which counts rows by API and phase and never lets an API have more of them than its budget.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.errors import ConfigError, StorageError, VouchError
from vouch.files import atomic_file

FLOOR = 1e-6
"""Probabilities below this are raised to it before logarithms are taken."""
LOOK = 32
"""Answers seen before a service is judged to give labels only."""
LONGEST_WAIT = 300.0
"""Seconds; no wait between two attempts is longer, whatever the service asks for."""

Service = Callable[[NDArray[np.float32]], Any]
"""Pictures `(B, C, H, W)` in [-1, 1] to probabilities `(B, K)`."""


class ApiError(VouchError):
    """A service does not answer, or not with probabilities."""


class NotServedError(Exception):
    """A request that a service did not take on, so that no query was spent. `wait`: seconds it asks for."""

    def __init__(self, reason: str, *, wait: float | None = None, again: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.again = wait, again


class Ledger:
    """How many rows each API was sent, by phase; with a path, kept in a file that only grows.

    A row is written down before it is sent and taken back only if the service did not take it on, so that neither a
    crash nor a service that fails makes queries disappear.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the ledger, or begin one.

        Raises:
            StorageError: the file is damaged.
        """
        self.path = path
        self._counts: dict[tuple[str, str], list[float]] = {}
        if path is not None and path.exists():
            try:
                text = path.read_text(encoding="utf-8")
                whole = text[: text.rfind("\n") + 1]
                for line in whole.splitlines():
                    row = json.loads(line)
                    self._count(row["api"], row["phase"], row["queries"], row["failed"], row["cost"])
                if whole != text:  # killed while it wrote a line down: that request was never sent
                    with atomic_file(path) as aside:
                        aside.write_text(whole, encoding="utf-8")
            except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
                raise StorageError(
                    f"the ledger is damaged: {error}",
                    where=str(path),
                    hint="mend it: what was spent stands nowhere else",
                ) from error

    def keep_in(self, path: Path) -> None:
        """Go on in a file: what it holds and what was counted here are added up.

        Raises:
            StorageError: the file is damaged or cannot be written.
        """
        if self.path is not None and self.path.resolve() == path.resolve():
            return
        here, self.path = self.rows, path
        self._counts = Ledger(path)._counts
        for row in here:
            self._write(**row)

    def at_least(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count what is missing here of rows that another ledger had.

        Raises:
            StorageError: the file cannot be written.
        """
        for row in rows:
            key = (row["api"], row["phase"])
            found = self._counts.get(key, [0, 0, 0.0])
            missing = [max(0, row[name] - at) for name, at in zip(("queries", "failed", "cost"), found, strict=True)]
            if missing[0] or missing[1]:
                self._write(*key, int(missing[0]), int(missing[1]), float(missing[2]))

    def _count(self, api: str, phase: str, queries: int, failed: int, cost: float) -> None:
        counts = self._counts.setdefault((api, phase), [0, 0, 0.0])
        for at, more in enumerate((queries, failed, cost)):
            counts[at] += more

    def add(self, api: Api, phase: str, queries: int, *, failed: int = 0) -> None:
        """Count rows sent; `failed` of them were not answered.

        Raises:
            StorageError: the file cannot be written.
        """
        self._write(api.name, phase, queries, failed, queries * api.cost)

    def _write(self, api: str, phase: str, queries: int, failed: int, cost: float) -> None:
        if self.path is not None:
            row = {"api": api, "phase": phase, "queries": queries, "failed": failed, "cost": cost}
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise StorageError(f"the ledger cannot be written: {error.strerror}", where=str(self.path)) from error
        self._count(api, phase, queries, failed, cost)

    def queries(self, api: str | None = None, phase: str | None = None) -> int:
        """Rows sent to one API or all, in one phase or all."""
        return int(sum(c[0] for (a, p), c in self._counts.items() if api in (None, a) and phase in (None, p)))

    def left(self, api: Api) -> int:
        """Rows that the API's budget still allows."""
        return sys.maxsize if api.budget is None else max(0, api.budget - self.queries(api.name))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row an API and phase: `{"api", "phase", "queries", "failed", "cost"}`."""
        return [
            {"api": api, "phase": phase, "queries": int(queries), "failed": int(failed), "cost": cost}
            for (api, phase), (queries, failed, cost) in self._counts.items()
            if queries
        ]

    @property
    def cost(self) -> float:
        """What all queries cost together, in the unit of the APIs' `cost`."""
        return float(sum(counts[2] for counts in self._counts.values()))


@dataclass(eq=False)
class Api:
    """One prediction service.

    Attributes:
        service: see `Service`; `vouch.distillation.httpservice.HttpService` for one behind an address.
        classes: what the answers' columns mean.
        shape: `(C, H, W)` of the pictures it takes.
        name: in the ledger, unique in a stream.
        budget: most rows it may ever be sent; None is no limit.
        cost: of one row, in any unit.
        attempts: tries of one request, the first included, before giving up.
        backoff: seconds before the second try; doubled for each one after.
        rate: most requests in a second; None is no limit.
        max_rows: most rows in one request.
    """

    service: Service
    classes: Sequence[str]
    shape: tuple[int, int, int]
    name: str
    budget: int | None = None
    cost: float = 0.0
    attempts: int = 5
    backoff: float = 1.0
    rate: float | None = None
    max_rows: int = 4096
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        """Check what was declared.

        Raises:
            ConfigError: fewer than two classes, a class twice, no shape, or a limit that cannot be.
        """
        self.classes, self.shape = tuple(str(name) for name in self.classes), tuple(self.shape)  # type: ignore[assignment]
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ConfigError(
                f"API {self.name!r} has the classes {list(self.classes)}", hint="it takes two different ones or more"
            )
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ConfigError(f"API {self.name!r} has the shape {self.shape}", hint="give (channels, height, width)")
        for name, low in (("budget", 1), ("attempts", 1), ("max_rows", 1), ("backoff", 0), ("cost", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} of API {self.name!r} is {value}; the least is {low}")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"rate of API {self.name!r} is {self.rate}; it must be above 0")
        self._next, self._seen, self._soft, self._warned = -math.inf, 0, False, False

    def ask(self, inputs: Tensor, phase: str, ledger: Ledger) -> Tensor:
        """Probabilities `(b, K)` for the first `b` rows of `inputs (B, C, H, W)`; `b < B` where the budget ends.

        They are at least about 1e-6 and sum to 1; where the service's did not, a warning says so once.

        Raises:
            ConfigError: pictures of another shape, not finite, or outside [-1, 1]; no query is spent.
            ApiError: the service does not answer after all attempts, refuses, or answers with anything but
                probabilities: labels, other shapes, numbers that are not finite.
        """
        if tuple(inputs.shape[1:]) != self.shape:
            raise ConfigError(
                f"API {self.name!r} takes pictures {self.shape}, not {tuple(inputs.shape[1:])}",
                hint="no query was spent; give generators and model the same shape",
            )
        if len(inputs) and not bool(inputs.detach().abs().max() <= 1 + 1e-6):  # also false where not a number
            raise ConfigError(f"pictures for API {self.name!r} are not within [-1, 1]", hint="no query was spent")
        rows, parts, done = inputs.detach().to("cpu", torch.float32), [], 0
        while done < len(rows) and ledger.left(self):
            parts.append(self._request(rows[done : done + self.max_rows], phase, ledger))
            done += len(parts[-1])
        answers = torch.cat(parts) if parts else torch.empty(0, len(self.classes))
        return answers.to(inputs.device)

    def _request(self, rows: Tensor, phase: str, ledger: Ledger) -> Tensor:
        """One request, tried until it is answered; cut to what the budget has left before each try."""
        reason, tried = "", 0
        for tried in range(1, self.attempts + 1):
            rows = rows[: ledger.left(self)]
            if not len(rows):
                reason += "; failed tries spent the budget"
                break
            self._pause()
            ledger.add(self, phase, len(rows))
            wait = min(self.backoff * 2 ** (tried - 1), LONGEST_WAIT)
            try:
                answer = self.service(rows.numpy().copy())
            except NotServedError as error:
                ledger.add(self, phase, -len(rows))
                reason = str(error)
                if not error.again:
                    break
                wait = wait if error.wait is None else min(max(wait, error.wait), LONGEST_WAIT)
            except Exception as error:  # whatever a user's function raises
                ledger.add(self, phase, 0, failed=len(rows))
                reason = f"{type(error).__name__}: {error}"
            else:
                return self._probabilities(answer, len(rows))
            if tried < self.attempts:
                self.sleep(wait)
        raise ApiError(
            f"API {self.name!r} does not answer: {reason}",
            where=f"phase {phase!r}, attempt {tried} of {self.attempts}",
            hint="see what the service needs, then go on with Run(path=..., resume=True)",
        )

    def _pause(self) -> None:
        """Wait until the rate limit allows the next request."""
        if self.rate is not None:
            now = self.clock()
            if now < self._next:
                self.sleep(self._next - now)
            self._next = max(now, self._next) + 1 / self.rate

    def _probabilities(self, answer: Any, n: int) -> Tensor:
        """Check, clip and renormalise one answer."""
        if isinstance(answer, Tensor):
            answer = answer.detach().cpu().numpy()
        try:
            found = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ApiError(f"API {self.name!r} answers with no numbers: {error}") from error
        labels_only = ApiError(
            f"API {self.name!r} gives labels only; what to learn from are probabilities",
            hint="ask for scores or probabilities of all classes, with as many digits as there are",
        )
        if found.shape == (n,):
            raise labels_only
        if found.shape != (n, len(self.classes)):
            raise ApiError(
                f"API {self.name!r} answers {n} pictures with {found.shape}, not {(n, len(self.classes))}",
                hint=f"its classes are {', '.join(self.classes)}",
            )
        wrong = ~(np.isfinite(found) & (found >= -1e-3)).all(1) | (found.sum(1) <= 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise ApiError(
                f"API {self.name!r} answers with numbers that are no probabilities: {found[row].tolist()}",
                where=f"row {row} of {n}",
                hint="put the softmax of logits inside the service",
            )
        if not self._soft:
            self._seen += n
            self._soft = not bool(np.isin(found, (0, 1)).all())
            if self._seen >= LOOK and not self._soft:
                raise labels_only
        total = found.sum(1, keepdims=True)
        if not self._warned and (found.min() < FLOOR or np.abs(total - 1).max() > 1e-3):
            self._warned = True
            warnings.warn(
                f"API {self.name!r}: probabilities below {FLOOR} or not summing to 1 were clipped and renormalised",
                stacklevel=4,
            )
        clipped = np.clip(found / total, FLOOR, None)
        return torch.from_numpy(clipped / clipped.sum(1, keepdims=True)).float()


def network_service(network: nn.Module) -> Service:
    """A torch classifier, pictures to logits, as a service in this process: for trying things out."""

    def answer(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        training, device = network.training, next((p.device for p in network.parameters()), torch.device("cpu"))
        network.eval()
        with torch.no_grad():
            found = network(torch.from_numpy(inputs).to(device)).softmax(1).cpu().numpy()
        network.train(training)
        return found

    return answer
