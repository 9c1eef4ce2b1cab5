"""How much memory is free: of a GPU, or of the host within what a container may use."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUP = Path("/proc/self/cgroup")


def free_bytes(device: str) -> int:
    """Bytes that may still be taken of a device's memory."""
    if device == "cpu":
        return free_host_bytes()
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def free_host_bytes(
    meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP
) -> int:
    """What the kernel can give without swapping, or the control group has left if that is less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_in_groups(cgroups, own)])


def _left_in_groups(cgroups: Path, own: Path) -> list[int]:
    """Of our control group and those above it, where they have limits (cgroup v2).

    Pages of files that nobody has touched lately are given back when they are wanted.
    """
    try:
        paths = [
            line.split(":", 2)[2] for line in own.read_text().splitlines() if line[:3] == "0::"
        ]
    except OSError:
        return []
    left = []
    for path in paths:
        folder = cgroups / path.lstrip("/")
        for group in (folder, *folder.parents):
            if cgroups not in (group, *group.parents):
                break
            left += _left(group)
    return left


def _left(group: Path) -> list[int]:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return []
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, int(limit) - used + int(stat.get("inactive_file", 0)))]
