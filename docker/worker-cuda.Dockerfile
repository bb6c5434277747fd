# syntax=docker/dockerfile:1
# A worker for NVIDIA GPUs: ONNX Runtime for CUDA, TensorRT and PyCUDA. Build from the root of the repository:
#   docker build -f docker/worker-cuda.Dockerfile -t anneal-worker-cuda .
# Run with the NVIDIA container toolkit: docker run --gpus all ... (docs/gpu.md)

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PyCUDA is compiled here: the headers of CUDA and a compiler stay in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/srv/anneal/requirements/constraints.txt \
    CUDA_ROOT=/usr/local/cuda \
    LIBRARY_PATH=/usr/local/cuda/lib64/stubs
WORKDIR /srv/anneal
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY requirements/constraints.txt requirements/
# TensorRT's libraries come from NVIDIA's package index: name it (or a mirror) with --build-arg NVIDIA_INDEX_URL=...
ARG NVIDIA_INDEX_URL=
COPY pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir app && touch app/__init__.py \
    && pip install ${NVIDIA_INDEX_URL:+--extra-index-url "$NVIDIA_INDEX_URL"} ".[gpu,tensorrt,otel]" nvidia-cublas \
    && pip uninstall --yes anneal
COPY app app
COPY workers workers
COPY docker/worker_health.py docker/
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --editable .

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libcurand-13-0 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 anneal \
    && useradd --uid 10001 --gid anneal --no-create-home --home-dir /var/lib/anneal --shell /usr/sbin/nologin anneal \
    && install --directory --owner=anneal --group=anneal --mode=0750 /var/lib/anneal /var/lib/anneal-locks
COPY --from=build /venv /venv
COPY --from=build /srv/anneal /srv/anneal
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ANNEAL_HOME=/var/lib/anneal \
    WORKER_LOCK_DIR=/var/lib/anneal-locks \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /srv/anneal
USER 10001:10001
# The locks are shared: workers of one machine use a GPU in turns. Mount one volume there in all of them.
VOLUME /var/lib/anneal
VOLUME /var/lib/anneal-locks
# Its heartbeat in the database, which goes on while a job runs in a child.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 \
    CMD ["python", "/srv/anneal/docker/worker_health.py"]
CMD ["python", "-m", "workers"]
