"""How long a collective takes over the links of a mesh, by the bytes that it must move: a bound that ignores latency."""

from jax.sharding import Mesh

from deepseek_jax.planning.collectives import Collective
from deepseek_jax.planning.machines import LINK_SHARE, Machine


class Links:
    """The links of one mesh.

    Args:
        mesh: of devices that may be described only.
        machine: one of them.
        per_host: devices that `machine.link_bandwidth` joins, on GPUs.
    """

    def __init__(self, mesh: Mesh, machine: Machine, per_host: int = 8):
        self._mesh, self._machine, self._per_host = mesh, machine, per_host

    def seconds(self, collective: Collective) -> float:
        """Of one execution."""
        if collective.devices == 1:
            return 0.0
        group = [self._mesh.devices.flat[number] for number in collective.group]
        if self._machine.platform == "tpu":
            return self._on_torus(collective, group) / LINK_SHARE
        hosts = len({device.id // self._per_host for device in group})
        rate = self._machine.link_bandwidth if hosts == 1 else self._machine.network_bandwidth
        share = (len(group) - len(group) // hosts) / (len(group) - 1) if hosts > 1 and "all-to-all" in collective.kind else 1
        return collective.sent * share / rate / LINK_SHARE

    def _on_torus(self, collective: Collective, group: list) -> float:
        """Rings along each side that the group spans, all at once, in both directions where the ends are joined."""
        sides = [len({device.coords[dim] for device in group}) for dim in range(len(group[0].coords))]
        long = [side for side in sides if side > 1]
        if not long:  # the two halves of one chip
            return collective.sent / self._machine.memory_bandwidth
        wraps = self._machine.wraps_from
        rings = sum(2 if side >= wraps and side % wraps == 0 else 1 for side in long)
        rate = self._machine.link_bandwidth
        if "all-to-all" in collective.kind:
            # Half of every device's rows cross the middle of the longest side: two links of a joined ring, or one.
            side = max(long)
            joined = side >= wraps and side % wraps == 0
            return collective.bytes * side / (8 if joined else 4) / rate
        if collective.kind == "collective-permute":
            return collective.sent / rate
        return collective.sent / (rings * rate)
