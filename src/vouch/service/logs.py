"""One JSON object a line, on standard error. No user, item, address, query or body is ever in it."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType
from typing import Any

log = logging.getLogger("vouch.service")


class JsonLines(logging.Formatter):
    """A record and its `extra={"facts": {...}}` as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line. Of an exception only its kind and place: its text may hold what a visitor sent."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facts: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage() if record.name.startswith("vouch") else record.name,
            **getattr(record, "facts", {}),
        }
        if not record.name.startswith("vouch"):  # uvicorn's and others', which say nothing of visitors but addresses
            facts["message"] = str(record.msg) if isinstance(record.msg, str) else type(record.msg).__name__
            if record.name == "uvicorn.error" and record.levelno == logging.INFO:
                facts["message"] = record.getMessage()  # the life of the server itself: processes, its own address
        if record.exc_info and record.exc_info[0] is not None:
            facts["error"] = record.exc_info[0].__name__
            facts["frames"] = frames(record.exc_info[2])
        return json.dumps(facts)


def frames(trace: TracebackType | None, most: int = 12) -> list[str]:
    """Where an exception passed, innermost last."""
    found = traceback.extract_tb(trace)
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in found[-most:]]


def write_json_logs(level: int = logging.INFO) -> None:
    """Send the logs of the service and of its server to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("vouch.service", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.getLogger("uvicorn.error").handlers = []
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("alembic").setLevel(logging.WARNING)
