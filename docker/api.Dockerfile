# syntax=docker/dockerfile:1
# The API: the base install, what sends spans and what reads an identity provider's tokens; no array, ML or GPU library. Build from the root of the repository:
#   docker build -f docker/api.Dockerfile -t anneal-api .

FROM python:3.11-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/srv/anneal/requirements/constraints.txt
WORKDIR /srv/anneal
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
# The dependencies alone first: this layer stays as long as they do, whatever changes in the code.
COPY requirements/constraints.txt requirements/
COPY pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir app && touch app/__init__.py \
    && pip install ".[oidc,otel]" \
    && pip uninstall --yes anneal
COPY alembic.ini ./
COPY migrations migrations
COPY app app
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --editable .

FROM python:3.11-slim-trixie
RUN groupadd --gid 10001 anneal \
    && useradd --uid 10001 --gid anneal --no-create-home --home-dir /var/lib/anneal --shell /usr/sbin/nologin anneal \
    && install --directory --owner=anneal --group=anneal --mode=0750 /var/lib/anneal
COPY --from=build /venv /venv
COPY --from=build /srv/anneal /srv/anneal
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ANNEAL_HOME=/var/lib/anneal \
    ANNEAL_HOST=0.0.0.0 \
    ANNEAL_PORT=8000
WORKDIR /srv/anneal
USER 10001:10001
VOLUME /var/lib/anneal
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['ANNEAL_PORT']}/healthz\", timeout=4)"]
CMD ["python", "-m", "app", "api"]
