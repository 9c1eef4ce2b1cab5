# What verifier and speculator stand on: treecast with torch. Build context: the repository's root.
#   --target cpu --build-arg TORCH_INDEX=URL, an index of CPU builds of torch
#   --target cuda
ARG PYTHON=python:3.11.11-slim-bookworm

FROM ${PYTHON} AS build
ARG EXTRAS=engine,traces,grammar
# Empty: the index that pip knows, whose build of torch for Linux brings CUDA's libraries along.
ARG TORCH_INDEX=
WORKDIR /src
COPY constraints.txt .
RUN python -m venv /opt/treecast \
    && /opt/treecast/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url=$TORCH_INDEX} \
       -c constraints.txt torch
COPY . .
RUN /opt/treecast/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON} AS cpu
COPY --from=build /opt/treecast /opt/treecast
RUN install -d -o 10001 -g 10001 /models
ENV PATH=/opt/treecast/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TREECAST_HOME=/models
USER 10001:10001

FROM cpu AS cuda
USER 0
# Triton compiles its launchers with the system's C compiler when a kernel is first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_HOME=/tmp
USER 10001:10001
