"""The web page: what raters and the study's owner may ask for, and the headers every answer has.

A link's token stands in the address and is the only key: there are no cookies, so no other site can act for a rater.
Knows HTTP; voting is `ballots`, figures are `summary`.
"""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from qlora_core.errors import ConfigError
from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.ballots import BallotBox, BallotConflictError
from qlora_core.evaluation.vote.export import export_texts
from qlora_core.evaluation.vote.links import Grant, LinkError, LinkSigner, check_rater_name
from qlora_core.evaluation.vote.records import vote_records
from qlora_core.evaluation.vote.rendering import rendered
from qlora_core.evaluation.vote.state import Choice
from qlora_core.evaluation.vote.summary import summarise_study

MAX_BODY_BYTES = 16 * 1024
MAX_NOTE_CHARACTERS = 2000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Robots-Tag": "noindex, nofollow",
    "Cache-Control": "no-store",
}
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{16,64}$")]
TaskId = Annotated[str, Field(pattern=r"^[0-9a-f]{20}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    request_id: RequestId


class _Skip(_Body):
    task: TaskId


class _Vote(_Skip):
    choice: Choice
    note: str = Field(default="", max_length=MAX_NOTE_CHARACTERS)


class _Exclude(_Body):
    rater: str
    excluded: bool


class _Invite(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rater: str


def create_app(box: BallotBox, signer: LinkSigner, judge: Sequence[Verdict] = ()) -> FastAPI:
    """The page over an open study. `judge` are verdict rows to set beside the raters' on the results page."""
    app = FastAPI(title="vote", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    templates = Environment(
        loader=PackageLoader("qlora_core.evaluation.vote", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    _add_safety(app, templates)
    _add_rating(app, box, signer, templates)
    _add_results(app, box, signer, templates, judge)
    return app


def _add_safety(app: FastAPI, templates: Environment) -> None:
    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        chunked = "transfer-encoding" in request.headers
        if chunked or not length.isdigit() or int(length) > MAX_BODY_BYTES:
            response: Response = JSONResponse({"notice": "The request is too large."}, status_code=413)
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(LinkError)
    async def refuse_link(request: Request, error: Exception) -> Response:
        if request.method == "POST":
            return JSONResponse({"notice": str(error)}, status_code=403)
        return HTMLResponse(templates.get_template("message.html.jinja").render(message=str(error)), status_code=403)

    @app.exception_handler(ConfigError)
    async def refuse_name(request: Request, error: Exception) -> Response:
        return JSONResponse({"notice": str(error)}, status_code=422)


def _add_rating(app: FastAPI, box: BallotBox, signer: LinkSigner, templates: Environment) -> None:
    def answer(rater: str, act: Callable[[], None] | None = None) -> JSONResponse:
        """Do what was asked and show what the rater has in front of them now."""
        notice, status = None, 200
        try:
            if act is not None:
                act()
        except BallotConflictError as error:
            notice, status = str(error), 409
        return JSONResponse({**_shown(box, rater), "notice": notice}, status_code=status)

    @app.get("/r/{token}")
    def rating_page(token: str) -> HTMLResponse:
        grant = signer.read(token, "rate")
        return HTMLResponse(templates.get_template("rate.html.jinja").render(rater=grant.rater))

    @app.post("/r/{token}/next")
    def show(token: str) -> JSONResponse:
        return answer(signer.read(token, "rate").rater)

    @app.post("/r/{token}/vote")
    def vote(token: str, body: _Vote) -> JSONResponse:
        rater = signer.read(token, "rate").rater
        return answer(rater, lambda: box.vote(rater, body.request_id, body.task, body.choice, body.note.strip()))

    @app.post("/r/{token}/skip")
    def skip(token: str, body: _Skip) -> JSONResponse:
        rater = signer.read(token, "rate").rater
        return answer(rater, lambda: box.skip(rater, body.request_id, body.task))

    @app.post("/r/{token}/undo")
    def undo(token: str, body: _Body) -> JSONResponse:
        rater = signer.read(token, "rate").rater
        return answer(rater, lambda: box.undo(rater, body.request_id))


def _add_results(
    app: FastAPI, box: BallotBox, signer: LinkSigner, templates: Environment, judge: Sequence[Verdict]
) -> None:
    kept: dict[int, dict[str, Any]] = {}  # the summary of the newest event: intervals take a second

    @app.get("/results/{token}")
    def results(token: str) -> HTMLResponse:
        signer.read(token, "results")
        with box.state() as state:
            seq, records = state.seq, vote_records(state, box.pairs)
        if seq not in kept:
            summary = summarise_study(records, box.pairs, box.settings, judge)
            kept.clear()
            kept[seq] = summary
        page = templates.get_template("results.html.jinja")
        return HTMLResponse(page.render(**kept[seq], files=list(export_texts(records, box.pairs))))

    @app.get("/results/{token}/files/{name}")
    def download(token: str, name: str) -> Response:
        signer.read(token, "results")
        with box.state() as state:
            texts = export_texts(vote_records(state, box.pairs), box.pairs)
        if name not in texts:
            return JSONResponse({"notice": f"There is no {name!r}; there are {', '.join(texts)}."}, status_code=404)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(texts[name](), media_type="text/plain; charset=utf-8", headers=headers)

    @app.post("/results/{token}/exclude")
    def exclude(token: str, body: _Exclude) -> JSONResponse:
        signer.read(token, "results")
        box.set_excluded(check_rater_name(body.rater), body.excluded, body.request_id)
        return JSONResponse({"rater": body.rater, "excluded": body.excluded})

    @app.post("/results/{token}/invite")
    def invite(token: str, body: _Invite) -> JSONResponse:
        grant = signer.read(token, "results")
        rater = check_rater_name(body.rater)
        return JSONResponse({"path": f"r/{signer.sign(Grant('rate', rater, grant.expires_at))}"})


def _shown(box: BallotBox, rater: str) -> dict[str, Any]:
    """What a rater's browser gets: texts, an opaque task, progress. Nothing tells which model wrote what."""
    view = box.current(rater)
    shown: dict[str, Any] = {"task": None, **view.progress._asdict(), "can_undo": view.can_undo}
    if view.task is None:
        return shown
    pair = box.pairs[view.task.item]
    answers = {"a": pair.answer_a, "b": pair.answer_b}
    left = view.task.left
    right = left if view.task.occasion == "self" else ("b" if left == "a" else "a")
    return {
        **shown,
        "task": view.task.task,
        "prompt": rendered(pair.prompt),
        "left": rendered(answers[left]),
        "right": rendered(answers[right]),
    }
