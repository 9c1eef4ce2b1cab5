#!/usr/bin/env bash
# Build the images of one kind: build.sh cpu|cuda [REGISTRY/] [TAG]. From the repository's root.
# TORCH_INDEX names a package index whose torch is a CPU build: PyTorch's own "cpu" one, or a mirror.
set -euo pipefail
device=${1:?cpu or cuda} registry=${2:-} tag=${3:-$(sed -n 's/^appVersion: "\(.*\)"/\1/p' deploy/k8s/treecast/Chart.yaml)}
torch=
[ "$device" = cpu ] && torch=${TORCH_INDEX:?an index of CPU builds of torch, for the cpu images}
folder=deploy/images
docker build -f "$folder/router.Dockerfile" -t "${registry}treecast-router:$tag" .
docker build -f "$folder/engine.Dockerfile" --target "$device" --build-arg "TORCH_INDEX=$torch" \
  -t "treecast-engine:$device" .
for role in verifier speculator; do
  docker build -f "$folder/$role.Dockerfile" --build-arg "ENGINE=treecast-engine:$device" \
    -t "${registry}treecast-$role:$tag-$device" .
done
