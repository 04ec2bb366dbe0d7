"""The HTTP API and the search page, as one FastAPI application in one process.

Images of clients who ask at the same time go through the network together. Looking up, thumbnails and the rest run
beside it.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cxr_retrieval.config import ServeSettings
from cxr_retrieval.corpus.decoding import RejectedImage
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.groups import ShardsAway
from cxr_retrieval.index.search import Query as Question
from cxr_retrieval.index.search import Retriever, UnknownImage
from cxr_retrieval.report.pages import render
from cxr_retrieval.serve import access
from cxr_retrieval.serve.live import LiveIndex
from cxr_retrieval.serve.looking import Looking
from cxr_retrieval.serve.metrics import Metrics
from cxr_retrieval.serve.schema import (
    Asked,
    AskedWhy,
    Found,
    IndexFacts,
    Problem,
    Ready,
    Reason,
    Search,
    Upload,
    sentence,
)
from cxr_retrieval.serve.uploads import UploadLimit

MB = 1 << 20
SLACK = 64 << 10  # of an upload's limit, for the form around the file
MOST_REQUESTS = 256  # under way at once; each may hold an upload
STALLED_SECONDS = 20.0  # without a byte of an upload: it gives its place back
SLOWEST_SECONDS = 300.0  # of an upload that drips
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem},
    404: {"model": Problem},
    408: {"model": Problem},
    413: {"model": Problem},
    422: {"model": Problem},
    503: {"model": Problem},
}
STATUS: dict[type[UserError], int] = {UnknownImage: 404, ShardsAway: 503}  # any other is 422
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # else any page could ask, by <img>, which images are here
    "Cache-Control": "no-store",  # what was asked and found stays out of a shared browser's disk
}
MULTIPART = "multipart/form-data"
NAMES = {"image", "without_patient"}  # of what is asked: no audit line has them


def create_app(live: LiveIndex, settings: ServeSettings) -> FastAPI:
    """The application that answers from a live index. Raises UserError as `access.token_for` does."""
    token = access.token_for(settings)
    limit = settings.upload_mb * MB
    app = FastAPI(
        title="cxr-retrieval",
        description="Similar chest X-rays and what they had. A research system, no medical device.",
        version="1",
        docs_url=None,  # FastAPI's pages of documentation fetch their scripts from elsewhere
        redoc_url=None,
    )
    too_large = f"the upload is larger than {settings.upload_mb} MB: reduce the image or raise serve.upload_mb"
    metrics = Metrics(live)
    under_way = 0
    looking = Looking()
    page = render("search.html.j2", title="Find similar chest X-rays", facts=[], script="search.js")
    times = {"stalled": STALLED_SECONDS, "slowest": SLOWEST_SECONDS}
    app.add_middleware(UploadLimit, limit=limit + SLACK, text=too_large, **times)
    if token is None:
        # Else a page from anywhere could be this machine's own by a name that it makes point here.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", settings.host])

    def refusal(request: Request) -> Response | None:
        """The answer to a request that is not let in."""
        if token is not None and request.url.path not in access.OPEN_PATHS:
            request.state.user = access.user_of(request, token)
            if request.state.user is None:
                challenge = {"WWW-Authenticate": 'Basic realm="cxr-retrieval"'}
                return JSONResponse({"detail": "the server's token is needed"}, 401, challenge)
        if under_way > MOST_REQUESTS and request.url.path not in access.OPEN_PATHS:
            # Not uvicorn's limit: it counts idle connections, turns probes away too, and says no sentence.
            text = f"{MOST_REQUESTS} requests are under way: ask again in a moment"
            return JSONResponse({"detail": text}, 503, {"Retry-After": "1"})
        return None

    @app.middleware("http")
    async def around(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        nonlocal under_way
        began, status = time.perf_counter(), 500  # what a bug is answered with, further out
        under_way += 1
        try:
            response = refusal(request) or await call_next(request)
            status = response.status_code
        finally:
            under_way -= 1
            metrics.answered(request, status, time.perf_counter() - began)
            access.audit(request, status)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"detail": sentence(list(error.errors()))}, 422)

    @app.exception_handler(RejectedImage)
    async def rejected(_: Request, error: RejectedImage) -> Response:
        return JSONResponse({"detail": f"the image cannot be searched with: {error.text}"}, 422)

    @app.exception_handler(UserError)
    async def mendable(_: Request, error: UserError) -> Response:
        status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 422)
        return JSONResponse({"detail": str(error)}, status)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    def retriever_for(request: Request, asked: BaseModel | None = None) -> Retriever:
        """The index that answers a request to its end; it and what is asked of it go into the audit line."""
        retriever = live.retriever
        request.state.version = retriever.version.version.id
        request.state.asked = {} if asked is None else asked.model_dump(exclude_defaults=True, exclude=NAMES)
        return retriever

    def question(retriever: Retriever, upload: Upload) -> Question:
        return looking.query(retriever, upload.image.file.read(), upload.box)

    def answer(request: Request, retriever: Retriever, query: Question, asked: Asked) -> Found:
        found = retriever.search(
            query,
            asked.k,
            asked.filters,
            skip=asked.skip,
            exclude_patient=asked.without_patient,
            exclude_own=not asked.own_patient,
            one_per_patient=asked.one_per_patient,
        )
        metrics.searched(found)
        request.state.hits = len(found.cases)
        return Found.of(retriever, query, found)

    def form_alone(request: Request) -> None:
        """A filter that is asked for in the address of an upload would be none."""
        if request.query_params:
            names = ", ".join(request.query_params)
            raise HTTPException(422, f"send these as fields of the form, beside the image, not in the address: {names}")

    in_form = [Depends(form_alone)]

    @app.post("/v1/search", responses=PROBLEMS, dependencies=in_form)
    def search(request: Request, form: Annotated[Search, Form(media_type=MULTIPART)]) -> Found:
        """The indexed images that are most like an uploaded one."""
        retriever = retriever_for(request, form)
        return answer(request, retriever, question(retriever, form), form)

    @app.get("/v1/images/{image_id:path}/similar", responses=PROBLEMS)
    def similar(request: Request, image_id: str, asked: Annotated[Asked, Query()]) -> Found:
        """The indexed images that are most like one of them."""
        retriever = retriever_for(request, asked)
        return answer(request, retriever, retriever.query_of(image_id), asked)

    @app.get("/v1/images/{image_id:path}/thumbnail", responses=PROBLEMS, response_class=Response)
    def thumbnail(request: Request, image_id: str) -> Response:
        """A reduced picture (JPEG) of an indexed image, as it was prepared."""
        retriever = retriever_for(request)
        data = retriever.thumbnail(retriever.case(image_id))
        return Response(data, media_type="image/jpeg")

    @app.post("/v1/images/{image_id:path}/why", responses=PROBLEMS, dependencies=in_form)
    def why(request: Request, image_id: str, form: Annotated[Upload, Form(media_type=MULTIPART)]) -> Reason:
        """Why an indexed image is near an uploaded one: the distance of every progressive step, and both crops."""
        retriever = retriever_for(request, form)
        query = question(retriever, form)
        return Reason.of(retriever, looking.why(retriever, query, retriever.case(image_id)))

    @app.get("/v1/images/{image_id:path}/why", responses=PROBLEMS)
    def why_indexed(request: Request, image_id: str, asked: Annotated[AskedWhy, Query()]) -> Reason:
        """Why an indexed image is near another one."""
        retriever = retriever_for(request)
        return Reason.of(retriever, looking.why(retriever, retriever.query_of(asked.query), retriever.case(image_id)))

    @app.get("/v1/index")
    def index() -> IndexFacts:
        """What is served, and what filters may name."""
        return IndexFacts.of(live, limit)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        """A version is open, its shards are held, and where the alias points and who was removed is being looked at."""
        found = live.retriever
        is_ready = live.watching and not found.holders.lost
        response.status_code = 200 if is_ready else 503
        return Ready(ready=is_ready, version=found.version.version.id, images=found.images, trouble=live.trouble)

    @app.get("/metrics", response_class=Response)
    async def measured() -> Response:
        """Figures for Prometheus."""
        return metrics.exposition()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def home() -> str:
        return page

    return app
