"""Who is asked, and told, by a launch in a test."""

from pipelines.launch.check import Check
from pipelines.launch.terminal import Terminal


class Person:
    """Who answers, and keeps what was said and asked."""

    def __init__(self, answer: bool = True) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.checks: list[Check] = []
        self.answer = answer

    @property
    def terminal(self) -> Terminal:
        def ask(question: str) -> bool:
            self.asked.append(question)
            return self.answer

        return Terminal(
            self.said.append, print, ask, self.checks.extend, lambda c: self.said.append(c.line)
        )

    @property
    def heard(self) -> str:
        return " / ".join(self.said)
