"""The inference worker: HTTP endpoints of the service, with limits, error responses and metrics.

POST /v1/decide and /v1/replies answer after Kafka has acknowledged the event; GET /v1/models lists the
models. /docs describes the API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import structlog
import torch
from fastapi import Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute, APIRouter
from fastapi.security import HTTPBearer
from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive
from starlette.types import Scope as AsgiScope

from cortex_core.errors import ConfigError, InputError, UnavailableError
from streams.api_keys import Scope, require_keys
from streams.events import new_id
from streams.http_server import error_body
from streams.inference.admission import Admission, Caller, HttpError
from streams.inference.api import (
    DecideRequest,
    DecideResponse,
    ErrorResponse,
    ModelDetail,
    ModelId,
    ModelList,
    ReplyRequest,
    ReplyResponse,
    RequestError,
    describe_fields,
)
from streams.inference.service import DEPENDENCIES, Service
from streams.settings import Settings
from streams.worker import Worker, run_worker

log = structlog.get_logger(__name__)

REQUESTS = Counter("cortex_http_requests_total", "Requests answered", ["endpoint", "status"])
DECIDE_S = Histogram(
    "cortex_decide_seconds",
    "A decision over HTTP, from the request to its acknowledged answer",
    buckets=(0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.064, 0.128, 0.256, 0.5, 1.0, 2.5, 5.0),
)
RETRY_AFTER_S = "1"
SMALL_BODY = 50_000
"""Maximum size in bytes of a body that is parsed on the event loop, in less than 2 ms."""
_parser = ThreadPoolExecutor(1, thread_name_prefix="parse")
"""A single thread, because a parsed body takes up to forty times the memory of its bytes."""


def error_response(error: Exception, request: Request) -> Response:
    """The response for an error; an unexpected error gives a 500 with the id of its log entry."""
    headers: dict[str, str] = {}
    match error:
        case RequestValidationError():
            fields = describe_fields(error.errors(), error.body)
            status, type_, message = 422, RequestError.type, _joined(fields)
        case RequestError():
            status, type_, message, fields = error.status, error.type, str(error), error.fields
        case InputError():
            status, type_, message, fields = 422, RequestError.type, str(error), {}
        case UnavailableError() | ConfigError():  # the process ends, and another may serve
            status, type_, message, fields = 503, "unavailable", str(error), {}
            headers["Retry-After"] = RETRY_AFTER_S
        case HttpError():
            status, type_, message, fields = error.status_code, error.type, str(error.detail), error.fields
            headers |= error.headers or {}
        case HTTPException():  # unknown paths and methods
            status, type_, message, fields = error.status_code, "http", str(error.detail), {}
            headers |= error.headers or {}
        case ClientDisconnect():  # while it sent the body; nobody reads this
            status, type_, message, fields = 400, "disconnected", "the client closed the connection", {}
        case _:
            error_id = new_id()
            log.error("unexpected error", error_id=error_id, path=request.url.path, exc_info=error)
            status, type_, fields = 500, "internal", {}
            message = f"internal error; see log entry {error_id}"
    return JSONResponse(error_body(type_, message, fields), status, headers)


def _joined(fields: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in fields.items())


SCOPES: dict[str, Scope] = {"/v1/decide": "decide", "/v1/replies": "reply"}
"""Path → scope that a key needs; others need `operate`."""


class _Route(APIRoute):
    """Admits, counts and times requests, limits the size of bodies, and converts errors into responses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        body_type = self.body_field.field_info.annotation if self.body_field else None
        scope = SCOPES.get(self.path_format, "operate")

        async def handle(request: Request) -> Response:
            started = time.perf_counter()
            admission: Admission = request.app.state.admission
            try:
                with admission.admit(request, scope) as request.state.caller:
                    response = await handler(_JsonRequest(request.scope, request.receive, body_type))
            except Exception as error:
                response = error_response(error, request)
            REQUESTS.labels(self.path_format, response.status_code).inc()
            if self.path_format == "/v1/decide" and response.status_code == 200:
                DECIDE_S.observe(time.perf_counter() - started)
            return response

        return handle


class _JsonRequest(Request):
    def __init__(self, scope: AsgiScope, receive: Receive, body_type: Any) -> None:
        super().__init__(scope, receive)
        self._body_type = body_type

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await self._limited()
        return self._body

    async def json(self) -> Any:
        """The body as an instance of the endpoint's model, which FastAPI does not validate again."""
        body, body_type = await self.body(), self._body_type
        if len(body) <= SMALL_BODY:
            return _parsed(body, body_type)
        return await asyncio.get_running_loop().run_in_executor(_parser, _parsed, body, body_type)

    async def _limited(self) -> bytes:
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.method == "POST" and content_type != "application/json":
            raise HttpError(
                415,
                "unsupported_media_type",
                f"Content-Type is {content_type or 'missing'}, expected application/json",
            )
        limit = self.app.state.service.settings.max_body_bytes
        declared = self.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large(int(declared), limit)
        parts, size = [], 0
        async for part in self.stream():
            size += len(part)
            if size > limit:
                raise self._too_large(size, limit)
            parts.append(part)
        return b"".join(parts)

    @staticmethod
    def _too_large(size: int, limit: int) -> HttpError:
        return HttpError(
            413,
            "too_large",
            f"the body has {size} bytes or more, expected at most {limit}: send embeddings as base64 "
            "float16, or fewer memories",
        )


def _parsed(body: bytes, body_type: type[BaseModel]) -> BaseModel:
    try:
        # NaN and Infinity are accepted here, so that the error response can name the memory that has them.
        value = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise HttpError(400, "malformed_json", f"the body is not valid JSON: {error}") from error
    try:
        return body_type.model_validate(value)
    except ValidationError as error:
        fields = describe_fields(error.errors(include_url=False), value)
    raise HttpError(422, RequestError.type, _joined(fields), fields)


router = APIRouter(
    prefix="/v1",
    route_class=_Route,
    # Only describes the key in /docs: it is checked before the body is read, which dependencies are not.
    dependencies=[Depends(HTTPBearer(auto_error=False, description="Required if CORTEX_API_KEYS is set."))],
    responses={
        code: {"model": ErrorResponse}
        for code in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503)
    },
)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _answer(body: BaseModel, status: int = 200) -> Response:
    # Already validated; FastAPI would validate it again.
    return Response(body.model_dump_json(), status, media_type="application/json")


@router.post("/decide", response_model=DecideResponse)
async def decide(body: DecideRequest, request: Request) -> Response:
    """Selects memories and a strategy, predicts the confidence; answers once the interaction is in Kafka."""
    _caller(request).check_model(body.model_id)
    return _answer(await _service(request).decide(body))


@router.post("/replies", response_model=ReplyResponse, status_code=202)
async def replies(body: ReplyRequest, request: Request) -> Response:
    """Accepts a user's reaction to an interaction; answers once it is in Kafka."""
    return _answer(await _service(request).reply(body), 202)


@router.get("/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """All models that have weights or are in memory, and the encoder required for embeddings."""
    found, caller = _service(request).models(), _caller(request)
    found.models = [model for model in found.models if caller.may_use(model.model_id)]
    return _answer(found)


@router.get("/models/{model_id}", response_model=ModelDetail)
async def model(model_id: Annotated[ModelId, Path()], request: Request) -> Response:
    """One model and the versions applied by this worker; version 0 for untrained weights."""
    _caller(request).check_model(model_id)
    return _answer(_service(request).model(model_id))


def create_app(service: Service, worker: Worker) -> FastAPI:
    """The HTTP application of a service; the caller starts and stops both."""
    app = FastAPI(
        title="cortex-streams inference",
        version="1",
        description="Selects memories and a strategy, and predicts confidence; trained on users' replies.",
    )
    app.state.service = service
    app.state.admission = Admission(service.settings)
    app.include_router(router)
    worker.notes["refused_models"] = service.refused_models
    worker.notes["strategies_changed"] = service.strategies_changed
    app.router.routes.extend(worker.routes())

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(error, request)

    app.add_exception_handler(HTTPException, on_error)  # unknown paths and methods
    return app


class _RefusedCollector(Collector):
    """Metric of the weights versions that the follower has rejected."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily("cortex_weights_refused", "Weights versions rejected", labels=["reason"])
        for reason, count in self._service.refused.items():
            family.add_metric([reason], count)
        return [family]


async def _serve(worker: Worker) -> None:
    torch.set_num_threads(worker.settings.torch_threads)
    service = Service(worker.settings, worker.report)
    worker.activity = service.activity
    REGISTRY.register(_RefusedCollector(service))
    stopping = asyncio.create_task(worker.stopping.wait())
    try:
        async with worker.serving(create_app(service, worker)):
            starting = asyncio.create_task(service.start())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            refused = asyncio.create_task(service.until_refused())
            await asyncio.wait({stopping, refused}, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                refused.result()
            if not worker.missing:  # a worker that was not ready gets no requests
                await worker.drain()
            refused.cancel()
            starting.cancel()
        # All requests have been answered, and no new ones are accepted.
    finally:
        await service.stop()


def main(settings: Settings) -> None:
    """Runs an inference worker until SIGTERM; never returns.

    Raises:
        ConfigError: it would be open to a network.
    """
    require_keys(settings)
    run_worker(
        "inference", settings if settings.kafka else settings.resolved(), _serve, dependencies=DEPENDENCIES
    )
