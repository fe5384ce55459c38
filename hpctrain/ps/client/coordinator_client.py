"""A worker's questions to the coordinator, whichever server that is by now."""

from __future__ import annotations

import threading
from typing import Any

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link


class CoordinatorClient:
    """Asks the coordinator, and asks its successor again after a failover.

    Args:
        servers: Links with the servers that are left.

    Attributes:
        answers: By number of the question, until they are taken.
    """

    def __init__(self, servers: dict[int, Link]) -> None:
        self.answers: dict[int, messages.Answer] = {}
        self._servers = servers
        self._waiting: dict[int, tuple[messages.Ask, threading.Event]] = {}
        # Results of collectives that others may not have yet, for the coordinator's successor.
        self._results: dict[str, tuple[Any, bytes]] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is waited for."""
        return bool(self._waiting)

    def open(self) -> None:
        """Forget results of collectives from before training: all workers have them."""
        self._results.clear()

    def ask(self, question: messages.Ask, event: threading.Event) -> None:
        """Send a question; the event is set when it is answered.

        Args:
            question: What is asked.
            event: Set when the answer is in ``answers``.
        """
        self._waiting[question.number] = (question, event)
        self._servers[min(self._servers)].send(question)

    def answered(self, answer: messages.Answer) -> None:
        """Take in the coordinator's answer, and wake whoever waits for it."""
        if waiting := self._waiting.pop(answer.number, None):
            question, event = waiting
            self.answers[answer.number] = answer
            self._keep_result(question, answer)
            event.set()

    def _keep_result(self, question: messages.Ask, answer: messages.Answer) -> None:
        if question.what == "reduce":
            self._results = {question.value[0]: (answer.value, answer.data)}  # all had those before
        elif question.what == "broadcast":
            self._results[question.value[0]] = (answer.value, answer.data or question.data)

    def ask_again(self) -> None:
        """Ask the successor of a lost coordinator, and tell it what this worker knows."""
        successor = self._servers[min(self._servers)]
        for number, (value, data) in self._results.items():
            successor.send(messages.Ask(0, "known", [number, value], data))
        for question, _ in self._waiting.values():
            successor.send(question)

    def fail(self) -> None:
        """Wake whoever waits: there will be no answers."""
        for _, event in self._waiting.values():
            event.set()
