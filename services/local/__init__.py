"""The whole mesh on one machine, each service in a process of its own."""

from .mesh import LocalMesh
from .process import MeshError, ServiceProcess
from .settings import MeshSettings

__all__ = ["LocalMesh", "MeshError", "MeshSettings", "ServiceProcess"]
