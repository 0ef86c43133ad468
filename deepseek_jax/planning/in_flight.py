"""Collectives that the program has started and not yet awaited, and how far they are.

Those of one group of devices are under way at once and share its links evenly; each group has links of its own.
"""

from dataclasses import dataclass

from deepseek_jax.planning.collectives import Collective


@dataclass
class Transfer:
    """One of them. Seconds are those that it takes with the links to itself."""

    collective: Collective
    left: float
    hidden: float = 0.0
    """That passed under other work."""


class InFlight:
    """What is under way in one computation."""

    def __init__(self) -> None:
        self.started: dict[str, Transfer] = {}
        """By the names under which they are awaited."""

    def start(self, name: str, collective: Collective, seconds: float) -> None:
        """Send one on its way, which takes so long with the links to itself."""
        self.started[name] = Transfer(collective, seconds)

    def work(self, seconds: float) -> None:
        """Let time pass under other work."""
        self._pass(seconds, are_hidden=True)

    def wait(self, name: str) -> tuple[Transfer, float]:
        """Let time pass until one of them is through: that, and how long it was."""
        awaited, waited = self.started[name], 0.0
        while awaited.left > 0:
            sharing = self._sharing(awaited.collective.group)
            seconds = len(sharing) * min(each.left for each in sharing)
            self._pass(seconds, are_hidden=False)
            waited += seconds
        return self.started.pop(name), waited

    def _sharing(self, group: tuple[int, ...]) -> list[Transfer]:
        return [each for each in self.started.values() if each.collective.group == group and each.left > 0]

    def _pass(self, seconds: float, are_hidden: bool) -> None:
        for group in {each.collective.group for each in self.started.values()}:
            left = seconds
            while left > 0 and (sharing := self._sharing(group)):
                share = min(left / len(sharing), *(each.left for each in sharing))
                for each in sharing:
                    each.left = each.left - share if each.left > share else 0.0
                    each.hidden += share if are_hidden else 0.0
                left -= share * len(sharing)
