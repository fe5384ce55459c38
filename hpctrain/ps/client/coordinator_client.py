"""A worker's questions to the coordinator, whichever server that is by now."""

from __future__ import annotations

import threading
from typing import Any

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link


class CoordinatorClient:
    """Asks, and asks again where the coordinator is lost.

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
        """Training begins: all have the results of what was asked before."""
        self._results.clear()

    def ask(self, question: messages.Ask, event: threading.Event) -> None:
        """Ask; the event is set when it is answered."""
        self._waiting[question.number] = (question, event)
        self._servers[min(self._servers)].send(question)

    def answered(self, answer: messages.Answer) -> None:
        """The coordinator has answered."""
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
        """The coordinator is lost: tell its successor what this worker knows, and ask it."""
        successor = self._servers[min(self._servers)]
        for number, (value, data) in self._results.items():
            successor.send(messages.Ask(0, "known", [number, value], data))
        for question, _ in self._waiting.values():
            successor.send(question)

    def fail(self) -> None:
        """There will be no answers: whoever waits is woken."""
        for _, event in self._waiting.values():
            event.set()
