"""Hatchling build hook: generates `treecast.v1` from the protos, so that it is never committed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs protoc for the wheel and for the editable install alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))


def generate(root: Path) -> None:
    """Write messages, stubs and types of `protos/treecast/v1` to `src/treecast/v1`."""
    import google.rpc.status_pb2
    import grpc_tools
    from grpc_tools import protoc

    # protoc looks for the typing plugins on PATH; they are installed beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    google_apis = Path(google.rpc.status_pb2.__file__).parents[2]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    protos = root / "protos"
    out = root / "src"
    files = sorted(str(path) for path in (protos / "treecast" / "v1").glob("*.proto"))
    status = protoc.main(
        ["protoc", f"-I{protos}", f"-I{google_apis}", f"-I{well_known}"]
        + [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        + files
    )
    if status:
        raise RuntimeError(f"protoc failed with status {status}")
    (out / "treecast" / "v1" / "__init__.py").write_text('"""Generated from protos/."""\n')


if __name__ == "__main__":
    generate(Path(__file__).resolve().parents[1])
