"""The bare peers: the least that somebody would write who needs just this endpoint. No authentication, no problem
documents, no request ids, no logs, no metrics, no checks of what comes in.

    python benchmarks/bare.py transfer --folder FOLDER --port PORT
    python benchmarks/bare.py polls --database-url URL --port PORT
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import MetaData, Table, create_engine, select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import FileResponse


def bare_app() -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


def transfer_app(folder: Path) -> FastAPI:
    """`POST /upload[?fsync=1]` into FOLDER/upload, and `GET /file` of FOLDER/file."""
    app = bare_app()

    @app.post("/upload")
    async def upload(request: Request, fsync: bool = False) -> dict[str, Any]:
        # Blocks the event loop, as simple handlers do: that is what is compared with.
        digest = hashlib.sha256()
        with (folder / "upload").open("wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                file.write(chunk)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        return {"sha256": digest.hexdigest(), "size_bytes": (folder / "upload").stat().st_size}

    @app.get("/file")
    async def download() -> FileResponse:
        return FileResponse(folder / "file")

    return app


def polls_app(database_url: str) -> FastAPI:
    """`GET /jobs/{id}`: the whole row, as the service shows it; `GET /jobs/{id}/status`: four short columns of it."""
    app = bare_app()
    engine = create_engine(database_url, pool_size=40)
    jobs = Table("jobs", MetaData(), autoload_with=engine)

    @app.get("/jobs/{job_id}")
    def job(job_id: str) -> dict[str, Any]:
        with Session(engine) as session:
            return dict(session.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one())

    @app.get("/jobs/{job_id}/status")
    def status(job_id: str) -> dict[str, Any]:
        columns = (jobs.c.id, jobs.c.status, jobs.c.stage, jobs.c.progress)
        with Session(engine) as session:
            return dict(session.execute(select(*columns).where(jobs.c.id == job_id)).mappings().one())

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("transfer", "polls"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--database-url")
    arguments = parser.parse_args()
    app = transfer_app(arguments.folder) if arguments.kind == "transfer" else polls_app(arguments.database_url)
    # The options of app/supervisor.py.
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=arguments.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
