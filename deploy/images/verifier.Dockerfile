# The verifier on an engine image; see engine.Dockerfile.
ARG ENGINE=treecast-engine:cpu

FROM ${ENGINE}
EXPOSE 7071 9090
ENTRYPOINT ["python", "-m", "treecast.services.verifier"]
