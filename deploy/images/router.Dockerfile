# The router, the SDK and the command line: no torch. Build context: the repository's root.
ARG PYTHON=python:3.11.11-slim-bookworm

FROM ${PYTHON} AS build
ARG EXTRAS=http,traces
WORKDIR /src
COPY . .
RUN python -m venv /opt/treecast \
    && /opt/treecast/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON}
COPY --from=build /opt/treecast /opt/treecast
ENV PATH=/opt/treecast/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 7070 8080 9090
ENTRYPOINT ["python", "-m", "treecast.services.router"]
