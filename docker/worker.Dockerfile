# syntax=docker/dockerfile:1
# A CPU worker: ONNX Runtime and OpenVINO, and torch for `.pt2` sources. Build from the root of the repository:
#   docker build -f docker/worker.Dockerfile -t anneal-worker .

FROM python:3.11-slim-trixie AS build
# The registry's Linux wheel of torch may bring several GB of CUDA, which a CPU worker has no use for: name an index of
# CPU wheels (PyTorch's own, or a mirror) with --build-arg TORCH_INDEX_URL=...
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/srv/anneal/requirements/constraints.txt
WORKDIR /srv/anneal
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY requirements/constraints.txt requirements/
# The largest layer first and by itself. Which version, the constraints say.
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
# With `tensorrt-rtx` among them it builds for NVIDIA GPUs that other workers have (docs/gpu.md; NVIDIA's own licence).
ARG EXTRAS=cpu,openvino,torch,otel
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir app && touch app/__init__.py \
    && pip install ".[$EXTRAS]" \
    && pip uninstall --yes anneal
COPY app app
COPY workers workers
COPY docker/worker_health.py docker/
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --editable .

FROM python:3.11-slim-trixie
# Torch Inductor compiles engines with it, also where they are loaded.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 anneal \
    && useradd --uid 10001 --gid anneal --no-create-home --home-dir /var/lib/anneal --shell /usr/sbin/nologin anneal \
    && install --directory --owner=anneal --group=anneal --mode=0750 /var/lib/anneal /var/lib/anneal-locks
COPY --from=build /venv /venv
COPY --from=build /srv/anneal /srv/anneal
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ANNEAL_HOME=/var/lib/anneal
WORKDIR /srv/anneal
USER 10001:10001
VOLUME /var/lib/anneal
# Its heartbeat in the database, which goes on while a job runs in a child.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 \
    CMD ["python", "/srv/anneal/docker/worker_health.py"]
CMD ["python", "-m", "workers"]
