# The service: API, dispatcher, migrations, and the command line. Neither torch nor Ray.
# From the project's root: docker build -f deploy/docker/service.Dockerfile -t maestro-service .

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG PREFIX=/opt/maestro
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv "$PREFIX"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mae_core mae_core
COPY workers workers
COPY service service
RUN "$PREFIX/bin/pip" install -c constraints.txt .

FROM python:${PYTHON}
ARG PREFIX=/opt/maestro
RUN useradd --uid 10001 --user-group --no-log-init --create-home maestro
COPY --from=build ${PREFIX} ${PREFIX}
ENV PATH=${PREFIX}/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /home/maestro
EXPOSE 8000
CMD ["python", "-m", "service.app"]
