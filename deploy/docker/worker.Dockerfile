# A machine of the Ray cluster, head or worker. From the project's root:
#   docker build -f deploy/docker/worker.Dockerfile -t maestro-worker .
#   docker build -f deploy/docker/worker.Dockerfile -t maestro-worker-gpu --build-arg TORCH_INDEX= .
# TORCH_INDEX: where torch for CPUs alone is found; without it torch is PyPI's, which is built for CUDA and brings its libraries (5 GB).

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG PREFIX=/opt/maestro
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv "$PREFIX"
COPY constraints.txt ./
# a layer of its own: it is most of the image, and changes least
RUN "$PREFIX/bin/pip" install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY mae_core mae_core
COPY workers workers
COPY service service
RUN "$PREFIX/bin/pip" install -c constraints.txt ".[workers]"

FROM python:${PYTHON}
ARG PREFIX=/opt/maestro
# A name for the user: Ray and the states on disk lie in folders called by it.
RUN useradd --uid 10001 --user-group --no-log-init --create-home maestro
COPY --from=build ${PREFIX} ${PREFIX}
ENV PATH=${PREFIX}/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /home/maestro
CMD ["ray", "start", "--help"]
