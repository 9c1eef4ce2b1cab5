"""Lint the protos, and check that they still speak with the last release.

    python protos/compatibility.py             lint, and compare with released.binpb
    python protos/compatibility.py release     make today's protos the last release

Works offline: protoc builds the image (it finds the imports in installed packages) and buf, from
the package buf-bin, compares images.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import google.rpc.status_pb2
import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
RELEASED = HERE / "released.binpb"
CONFIG = HERE / "buf.yaml"
PACKAGE = "treecast"


def build_image(path: Path, *flags: str) -> None:
    """Write a FileDescriptorSet of all protos and their imports."""
    google_apis = Path(google.rpc.status_pb2.__file__).parents[2]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    includes = [f"-I{folder}" for folder in (HERE, google_apis, well_known)]
    files = sorted(str(file) for file in (HERE / PACKAGE).rglob("*.proto"))
    out = f"--descriptor_set_out={path}"
    if protoc.main(["protoc", *includes, "--include_imports", *flags, out, *files]):
        raise SystemExit("protoc failed")


def buf(command: str, image: Path, *flags: str) -> int:
    """Run one of buf's checks on our own files of an image; returns its exit code."""
    tool = Path(sys.executable).with_name("buf")
    ours = ["--path", PACKAGE, "--config", str(CONFIG)]
    return subprocess.run([tool, command, str(image), *ours, *flags], check=False).returncode


def check() -> int:
    """Exit code 0 when style and wire compatibility hold; buf prints what does not."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        build_image(image, "--include_source_info")
        against = ["--against", str(RELEASED), "--against-config", str(CONFIG)]
        codes = [buf("lint", image), buf("breaking", image, *against)]
    return max(codes)


if __name__ == "__main__":
    if sys.argv[1:] == ["release"]:
        build_image(RELEASED)
    elif sys.argv[1:]:
        raise SystemExit(__doc__)
    else:
        raise SystemExit(check())
