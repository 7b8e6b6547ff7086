"""optuna-dashboard on this machine, and what a run shows in it.

The dashboard has no authentication and can delete studies, so it listens on loopback and answers only requests that a
browser on this machine was asked to make.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socketserver
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from autopeft.core.record import Record
from autopeft.errors import StoreError, UsageError
from autopeft.report.figures import figures
from autopeft.report.fronts import front_figure, front_table
from autopeft.report.rows import AllocationRow
from autopeft.report.tables import contender_table, spending_tables
from autopeft.report.verdict import verdict
from autopeft.store.paths import RunFolder

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    import optuna

__all__ = ["application", "publish", "serve"]

_log = logging.getLogger("autopeft.report")
_PORTS = 20
_MOST_JSON = 20_000
_REPORT_ATTRIBUTE = "autopeft:report"


def serve(
    target: str | Path, host: str = "127.0.0.1", port: int = 8080, announce: Callable[[str], None] | None = None
) -> None:
    """Serve the dashboard until Ctrl-C.

    Args:
        target: a run folder, or the URL of a storage.
        host: address to listen on. Whoever reaches it can change and delete studies.
        port: port; one of the next 19 when it is taken.
        announce: is given the lines that tell where the dashboard is; silent when None.

    Raises:
        UsageError: when the address cannot be listened on, or no port is free.
        StoreError: when there is no such run or storage.
    """
    server = _bind(host, port, _guarded(application(target), host))
    if announce is not None:
        announce(f"dashboard at http://{host}:{server.server_port} (Ctrl-C stops it)")
        if _is_loopback(host):
            announce(f"from another machine: ssh -L {server.server_port}:{host}:{server.server_port} THIS_MACHINE")
        else:
            announce("this address can be reached from outside, and anybody who does can delete the study")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()


def application(target: str | Path) -> WSGIApplication:
    """The dashboard of a run folder or of a storage URL as a WSGI application.

    Raises:
        StoreError: when there is no such run or storage.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    from autopeft.store.storage import default_url, open_storage

    artifacts = None
    if "://" in str(target):
        url = str(target)
    else:
        folder = RunFolder(Path(target)).require()
        if not folder.database.is_file():
            raise StoreError(
                f"the run {folder} keeps no study of its own ({folder.database.name} is missing); "
                "give the URL of the storage it was searched with"
            )
        url = default_url(folder.database)
        folder.artifacts.mkdir(exist_ok=True)
        with _quiet():
            artifacts = FileSystemArtifactStore(folder.artifacts)
    with _quiet():
        return cast("WSGIApplication", wsgi(open_storage(url, create=False), artifact_store=artifacts))


def publish(
    study: optuna.Study,
    record: Record,
    rows: Iterable[AllocationRow] = (),
    *,
    predicted: Mapping[int, float] | None = None,
    folder: RunFolder | None = None,
) -> tuple[str, ...]:
    """Put a note, the figures and the totals of a run into its study, as far as that works.

    A search never fails because of its dashboard: what goes wrong is logged and returned.

    Args:
        study: the study the trials are in.
        record: the run so far.
        rows: the best plan.
        predicted: number of a trial to the gain its plan was predicted to have.
        folder: the run folder; its `report.html` is linked from the note.

    Returns:
        What could not be published, in words; empty when everything was.
    """
    listed = tuple(rows)
    problems: list[str] = []

    def attempt(what: str, action: Callable[[], object]) -> None:
        try:
            with _quiet():
                action()
        except Exception as error:  # noqa: BLE001 - whatever a storage raises, the search goes on
            problems.append(f"{what}: {type(error).__name__}: {error}")
            _log.warning("the dashboard does not show the %s: %s", what, error)

    links: list[str] = []
    if folder is not None and folder.report_html.is_file():
        attempt("report", lambda: links.append(_upload_report(study, folder)))
    attempt("note", lambda: _save_note(study, _note(record, listed, links)))
    attempt("totals", lambda: _save_totals(study, record))
    shown: dict[str, Any] = {}
    attempt("figures", lambda: shown.update(figures(record, listed, predicted=predicted)))
    if front_table(record).rows:
        attempt("front", lambda: shown.update(front=front_figure(record)))
    for name, figure in shown.items():
        attempt(f"figure {name}", lambda name=name, figure=figure: _save_figure(study, name, figure))  # type: ignore[misc]
    return tuple(problems)


def _save_note(study: optuna.Study, text: str) -> None:
    from optuna_dashboard import save_note

    save_note(study, text)


def _save_figure(study: optuna.Study, name: str, figure: Any) -> None:
    from optuna_dashboard import save_plotly_graph_object

    size = len(figure.to_json())
    if size > _MOST_JSON:
        raise ValueError(f"{size:,} bytes of JSON, and the dashboard sends them on every poll; at most {_MOST_JSON:,}")
    save_plotly_graph_object(study, figure, graph_object_id=f"autopeft-{name}")


def _save_totals(study: optuna.Study, record: Record) -> None:
    totals = {
        "model": record.model.get("name"),
        "data": record.data.get("spec"),
        "budget": record.budget.get("text") or record.budget.get("limit"),
        "verdict": verdict(record).headline,
    }
    for key, value in totals.items():
        if value is not None and study.user_attrs.get(key) != value:
            study.set_user_attr(key, value)


def _note(record: Record, rows: tuple[AllocationRow, ...], links: list[str]) -> str:
    parts = [f"**{verdict(record).headline}**"]
    parts += [f"[The whole report]({link})" for link in links]
    if record.contenders:
        parts.append(contender_table(record).markdown())
    if (front := front_table(record)).rows:
        parts.append(front.markdown())
    parts += [f"```text\n{table.text()}\n```" for table in (spending_tables(rows)[:2] if rows else ())]
    return "\n\n".join(parts)


def _upload_report(study: optuna.Study, folder: RunFolder) -> str:
    """Store the page as an artifact, over the one of last time, and return the path of its link."""
    from optuna.artifacts import FileSystemArtifactStore, upload_artifact
    from optuna_dashboard.artifact import get_artifact_path

    folder.artifacts.mkdir(exist_ok=True)
    store = FileSystemArtifactStore(folder.artifacts)
    known = study.user_attrs.get(_REPORT_ATTRIBUTE)
    if known is None:
        known = upload_artifact(artifact_store=store, file_path=str(folder.report_html), study_or_trial=study)
        study.set_user_attr(_REPORT_ATTRIBUTE, known)
    else:
        with folder.report_html.open("rb") as page:
            store.write(known, page)
    return str(get_artifact_path(study, known))


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the warnings that the artifact store is experimental."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """One thread per request: a browser polls while another page loads."""

    daemon_threads = True

    def server_bind(self) -> None:
        """As in the standard library, without the reverse look-up of the host's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    """Says nothing on every poll."""

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _bind(host: str, port: int, app: WSGIApplication) -> _Server:
    problem: OSError | None = None
    for candidate in range(port, min(port + _PORTS, 65536)):
        try:
            server = _Server((host, candidate), _Handler)
        except OSError as error:
            problem = error
            continue
        server.set_app(app)
        return server
    raise UsageError(
        f"cannot listen on {host}, ports {port} to {port + _PORTS - 1}: {problem}. Choose another --host or --port"
    )


def _guarded(app: WSGIApplication, host: str) -> WSGIApplication:
    """On loopback, refuse requests that name another host or come from another site's page."""
    if not _is_loopback(host):
        return app

    def guard(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        named = str(environ.get("HTTP_HOST", ""))
        origin = environ.get("HTTP_ORIGIN")
        local = _is_loopback(urlsplit(f"//{named}").hostname or "")
        if local and (origin is None or urlsplit(str(origin)).netloc == named):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"This dashboard answers only to pages opened on the machine it runs on.\n"]

    return guard


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
