"""The application: routes, limits, errors, metrics, health; and what runs beside the requests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

import vouch
from vouch.errors import VouchError
from vouch.service import api, pages
from vouch.service.config import ServiceConfig
from vouch.service.contract import Answers
from vouch.service.logs import log, write_json_logs
from vouch.service.metrics import Metrics
from vouch.service.middleware import Front
from vouch.service.problems import RETRY, add_handlers, problem
from vouch.service.security import Gate, Keys, RateLimit
from vouch.service.serving import Serving
from vouch.service.storage import Store, Unavailable


def create_app(config: ServiceConfig, open_engine: Callable[[Path], Answers] | None = None) -> FastAPI:
    """The service of a run, as an ASGI application.

    Args:
        open_engine: opens a run folder; `Engine.open` with the configured index by default.
    """
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = await run_in_threadpool(Store.open, config.database_url, wait_seconds=config.database_seconds)
        try:
            opener = open_engine or _opener(config)
            serving = await run_in_threadpool(Serving, config, store, metrics, opener)
        except BaseException:
            store.close()
            raise
        keys = Keys(store) if config.needs_keys else None
        limit = RateLimit(config.requests_per_second, config.burst)
        app.state.store, app.state.serving, app.state.config = store, serving, config
        app.state.gate = Gate(keys, limit, lambda reason: metrics.refused.labels(reason).inc())
        watching = asyncio.create_task(_watch(serving, config.poll_seconds))
        facts = {"model": serving.served.model.fingerprint, "version": vouch.__version__, "process": os.getpid()}
        log.info("started", extra={"facts": facts})
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            await run_in_threadpool(serving.close)
            await run_in_threadpool(store.close)
            log.info("stopped")

    app = FastAPI(
        title="Vouch",
        summary="Recommendations you can vouch for.",
        version=vouch.__version__,
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        separate_input_output_schemas=False,
    )
    add_handlers(app, pages.problem_page)
    app.include_router(api.router)
    app.include_router(pages.router())
    _add_probes(app, metrics)
    app.add_middleware(Front, config=config, metrics=metrics)
    return app


def from_environment() -> FastAPI:
    """The application for a worker process, with the settings of `VOUCH_SERVICE_*`."""
    import importlib

    import torch

    importlib.import_module("vouch.service.engine")
    config = ServiceConfig.from_environment()
    write_json_logs()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    app = create_app(config)
    # What is there now stays. If the garbage collector looked through all of it, as often as it does by default, every
    # request would wait for a fifth of a second now and then.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    return app


def _opener(config: ServiceConfig) -> Callable[[Path], Answers]:
    from vouch.service.engine import Engine

    return lambda path: Engine.open(path, index=config.index)


async def _watch(serving: Serving, seconds: float) -> None:
    """Follow, in all workers, what was changed through one of them."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await run_in_threadpool(serving.follow)
            await run_in_threadpool(serving.refresh_catalog)
        except Unavailable:
            serving.metrics.database.set(0)
        except VouchError:
            log.exception("cannot follow changes")
        except Exception:  # whatever it is, the next look may do better
            log.exception("cannot follow changes")
        else:
            serving.metrics.database.set(1)


def _add_probes(app: FastAPI, metrics: Metrics) -> None:
    """Health, readiness and metrics: without a key, for the machinery around the service."""

    @app.get("/healthz", tags=["probes"])
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["probes"], responses={503: {"model": api.schemas.ErrorAnswer}})
    async def ready(request: Request) -> Any:
        """Model and database are at hand."""
        state = request.app.state
        try:
            await asyncio.wait_for(run_in_threadpool(state.store.ping), 2.0)
        except (Unavailable, TimeoutError) as error:
            what = error.what if isinstance(error, Unavailable) else "the database does not answer"
            return problem(503, what, "database", getattr(error, "hint", None), RETRY)
        return JSONResponse({"status": "ok", "model": state.serving.served.model.model_dump()})

    @app.get("/metrics", tags=["probes"], response_class=Response)
    async def numbers(request: Request) -> Response:
        """Numbers for Prometheus."""
        metrics.waiting.set(request.app.state.serving.waiting)
        return Response(metrics.text(), media_type=metrics.content_type)
