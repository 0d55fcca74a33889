"""How much memory a device has left for this process. Knows no models.

On Linux a container's limit counts where it is tighter than the machine; other systems do not say what is available.
"""

from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def available_memory_bytes(device: str, *, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that can still be allocated on a device ("cpu", "cuda", "cuda:1"); None where the system does not say.

    On a GPU: what the driver has free, and what torch holds in reserve for this process. On the CPU: the least of
    MemAvailable and the room under each memory limit of the process's control groups, versions 1 and 2; file cache that
    the kernel can drop counts as available in all of them.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rooms = [_machine_room(proc / "meminfo"), *_group_rooms(proc / "self/cgroup", cgroups)]
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def _machine_room(meminfo: Path) -> int | None:
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_rooms(membership: Path, cgroups: Path) -> list[int | None]:
    """The room in the process's groups and all above them; in a container the root stands for the process's own."""
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            if controllers:
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                names = ("memory.max", "memory.current", "inactive_file")
            rooms.append(_room(folder, *names))
    return rooms


def _room(folder: Path, limit_name: str, usage_name: str, droppable_name: str) -> int | None:
    limit, usage, statistics = (folder / name for name in (limit_name, usage_name, "memory.stat"))
    if not limit.is_file() or not usage.is_file():
        return None
    text = limit.read_text(encoding="utf-8").strip()
    if text == "max":
        return None
    lines = statistics.read_text(encoding="utf-8").splitlines() if statistics.is_file() else []
    droppable = next((int(line.split()[1]) for line in lines if line.split()[0] == droppable_name), 0)
    return max(0, int(text) - int(usage.read_text(encoding="utf-8")) + droppable)
