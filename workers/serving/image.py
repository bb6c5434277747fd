"""The Dockerfile of a bundle: its server, unprivileged, with what `requirements.txt` names and nothing else."""

from __future__ import annotations

import sys
from typing import Final

NAME: Final = "Dockerfile"

_TEXT = """\
# The server of this bundle:  docker build -t NAME . && docker run --rm -p 8000:8000 NAME
# An engine for a GPU needs a base image with its driver's libraries (--build-arg BASE=...), and `--gpus all` to run.
ARG BASE=python:__PYTHON__-slim-trixie
# hadolint ignore=DL3006
FROM ${BASE}
ENV PYTHONUNBUFFERED=1 \\
    PYTHONDONTWRITEBYTECODE=1 \\
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/engine
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
USER 10001:10001
EXPOSE 8000
# Alive, not ready: a large engine takes a while to load. Whether it takes requests, /v2/health/ready tells.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \\
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/live', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["python", "serve.py", "--host", "0.0.0.0", "--port", "8000"]
"""


def dockerfile() -> str:
    """For the Python that this worker runs on, which the requirements were measured with."""
    return _TEXT.replace("__PYTHON__", f"{sys.version_info.major}.{sys.version_info.minor}")
