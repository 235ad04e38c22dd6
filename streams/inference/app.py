"""The inference worker: the service over HTTP.

POST /v1/decide and /v1/replies answer after Kafka's acknowledgement; GET /v1/models shows what is served.
/docs describes all of it. It adds to the service what HTTP needs and nothing else: limits, errors, metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import structlog
import torch
from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute, APIRouter
from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from cortex_core.errors import InputError, UnavailableError
from streams.events import new_id
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
from streams.inference.service import NEEDS, Service
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
"""Bytes up to which a body is parsed on the event loop: in under 2 ms."""
_parser = ThreadPoolExecutor(1, thread_name_prefix="parse")
"""One at a time: what is parsed takes up to forty times the memory of its bytes."""


class HttpError(HTTPException):
    """An answer from 400 on that this layer gives by itself."""

    def __init__(
        self, status: int, type_: str, message: str, fields: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message)
        self.type = type_
        self.fields = dict(fields or {})


def error_response(error: Exception, request: Request) -> Response:
    """The answer to an error; what nobody foresaw becomes a 500 with an id that stands in the log."""
    headers: dict[str, str] = {}
    match error:
        case RequestValidationError():
            fields = describe_fields(error.errors(), error.body)
            status, type_, message = 422, RequestError.type, _joined(fields)
        case RequestError():
            status, type_, message, fields = error.status, error.type, str(error), error.fields
        case InputError():
            status, type_, message, fields = 422, RequestError.type, str(error), {}
        case UnavailableError():
            status, type_, message, fields = 503, "unavailable", str(error), {}
            headers["Retry-After"] = RETRY_AFTER_S
        case HttpError():
            status, type_, message, fields = error.status_code, error.type, str(error.detail), error.fields
        case HTTPException():  # unknown paths and methods
            status, type_, message, fields = error.status_code, "http", str(error.detail), {}
            headers |= error.headers or {}
        case _:
            error_id = new_id()
            log.error("unexpected error", error_id=error_id, path=request.url.path, exc_info=error)
            status, type_, fields = 500, "internal", {}
            message = f"an error that nobody foresaw; it stands in the log as {error_id}"
    if status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    body = {"error": {"type": type_, "message": message, "fields": fields}}
    return JSONResponse(body, status, headers)


def _joined(fields: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in fields.items())


class _Route(APIRoute):
    """Counts and times every request, limits bodies before they are read, and answers every error."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        body_type = self.body_field.field_info.annotation if self.body_field else None

        async def handle(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await handler(_JsonRequest(request.scope, request.receive, body_type))
            except Exception as error:
                response = error_response(error, request)
            REQUESTS.labels(self.path_format, response.status_code).inc()
            if self.path_format == "/v1/decide" and response.status_code == 200:
                DECIDE_S.observe(time.perf_counter() - started)
            return response

        return handle


class _JsonRequest(Request):
    def __init__(self, scope: Scope, receive: Receive, body_type: Any) -> None:
        super().__init__(scope, receive)
        self._body_type = body_type

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await self._limited()
        return self._body

    async def json(self) -> Any:
        """The body as the endpoint's model, which FastAPI then takes as it is."""
        body, wanted = await self.body(), self._body_type
        if len(body) <= SMALL_BODY:
            return _parsed(body, wanted)
        return await asyncio.get_running_loop().run_in_executor(_parser, _parsed, body, wanted)

    async def _limited(self) -> bytes:
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.method == "POST" and content_type != "application/json":
            raise HttpError(
                415,
                "unsupported_media_type",
                f"Content-Type is {content_type or 'not given'}, wanted application/json",
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
            f"the body has {size} bytes or more, at most {limit}: send embeddings as base64 float16, or "
            "fewer memories",
        )


def _parsed(body: bytes, wanted: type[BaseModel]) -> BaseModel:
    try:
        # NaN and Infinity pass here, so that the answer can say in which memory they stand.
        value = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise HttpError(400, "malformed_json", f"the body is no JSON: {error}") from error
    try:
        return wanted.model_validate(value)
    except ValidationError as error:
        fields = describe_fields(error.errors(include_url=False), value)
    raise HttpError(422, RequestError.type, _joined(fields), fields)


router = APIRouter(
    prefix="/v1",
    route_class=_Route,
    responses={code: {"model": ErrorResponse} for code in (400, 409, 413, 415, 422, 500, 503)},
)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _answer(body: BaseModel, status: int = 200) -> Response:
    # Validated when it was made; FastAPI would do so again.
    return Response(body.model_dump_json(), status, media_type="application/json")


@router.post("/decide", response_model=DecideResponse)
async def decide(body: DecideRequest, request: Request) -> Response:
    """Decides which memories, which strategy and how confident; answers once the interaction is in Kafka."""
    return _answer(await _service(request).decide(body))


@router.post("/replies", response_model=ReplyResponse, status_code=202)
async def replies(body: ReplyRequest, request: Request) -> Response:
    """Takes what the user said or did about an interaction; answers once it is in Kafka."""
    return _answer(await _service(request).reply(body), 202)


@router.get("/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """All models that have weights or are in memory, and the encoder that embeddings must come from."""
    return _answer(_service(request).models())


@router.get("/models/{model_id}", response_model=ModelDetail)
async def model(model_id: Annotated[ModelId, Path()], request: Request) -> Response:
    """One model and the versions that were applied here; version 0 where nothing was learned yet."""
    return _answer(_service(request).model(model_id))


def create_app(service: Service, worker: Worker) -> FastAPI:
    """The HTTP application around a service; the caller starts and stops both."""
    app = FastAPI(
        title="cortex-streams inference",
        version="1",
        description="Which memories, which strategy, how confident: decided by weights that replies change.",
    )
    app.state.service = service
    app.include_router(router)
    app.router.routes.extend(worker.routes())

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(error, request)

    app.add_exception_handler(HTTPException, on_error)  # unknown paths and methods
    return app


class _RefusedCollector(Collector):
    """Weights versions refused, as the follower counts them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily("cortex_weights_refused", "Weights versions refused", labels=["reason"])
        for reason, count in self._service.refused.items():
            family.add_metric([reason], count)
        return [family]


async def _serve(worker: Worker) -> None:
    def on_state(need: str, why: str | None) -> None:
        if why is None:
            worker.ready(need)
        else:
            worker.not_ready(need, why)

    torch.set_num_threads(worker.settings.torch_threads)
    service = Service(worker.settings, on_state)
    REGISTRY.register(_RefusedCollector(service))
    stopping = asyncio.create_task(worker.stopping.wait())
    try:
        async with worker.serving(create_app(service, worker)):
            starting = asyncio.create_task(service.start())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            await stopping
            starting.cancel()
        # Requests in flight are answered by now; nothing new comes in.
    finally:
        await service.stop()


def main(settings: Settings) -> None:
    """Runs an inference worker until SIGTERM; never returns."""
    run_worker("inference", settings if settings.kafka else settings.resolved(), _serve, dependencies=NEEDS)
