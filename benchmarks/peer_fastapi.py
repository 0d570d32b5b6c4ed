"""What one would write first: a FastAPI endpoint that asks the model for each request by itself.

Needs no environment of its own; `RUN` in the environment names the run folder:

    RUN=... uvicorn peer_fastapi:app
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from vouch import Query
from vouch.recommenders.runs import open_run

run = open_run(os.environ["RUN"])
app = FastAPI()


class Request(BaseModel):
    """As the service takes it."""

    history: list[str]
    k: int = 10


@app.post("/v1/recommend")
def recommend(request: Request) -> dict[str, Any]:
    """The best items for a history."""
    ranking = run.model.recommend([Query(history=request.history)], request.k)
    items = run.model.items.ids(ranking.item[0])
    return {
        "recommendations": [
            {"item": str(item), "score": float(score)} for item, score in zip(items, ranking.score[0], strict=True)
        ]
    }


@app.get("/healthz")
def health() -> dict[str, str]:
    """It answers."""
    return {"status": "ok"}
