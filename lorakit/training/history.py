"""What happened in a training: all steps, and one."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One step that is done, for `fit`'s `after_step`."""

    number: int  # of steps done, this one included
    loss: float  # nats a labelled token, before the step
    lr: float
    tokens: int  # in the batch, padding not counted
    seconds: float  # wall time


@dataclass
class History:
    """What happened, one entry a step."""

    loss: list[float] = field(default_factory=list)  # nats a labelled token
    lr: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # in the batch, padding not counted
    seconds: list[float] = field(default_factory=list)  # wall time; a fair share of it, if several runs share a loop
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of this process
    speed: dict[str, str] = field(default_factory=dict)  # each trick of `speed.accelerated`: used or not, and why
    validation: list[tuple[int, float]] = field(default_factory=list)  # steps done, nats a labelled token held out
    best: int | None = None  # steps done when the weights were those that were put back; None if none were

    def note(self, loss: float, lr: float, tokens: int, seconds: float, cpu_seconds: float) -> None:
        """Adds a step."""
        self.loss.append(loss)
        self.lr.append(lr)
        self.tokens.append(tokens)
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)

    def last(self) -> Step:
        """The last step, as one thing."""
        return Step(len(self.loss), self.loss[-1], self.lr[-1], self.tokens[-1], self.seconds[-1])

    def __str__(self) -> str:
        used = [name for name, words in self.speed.items() if words.startswith("used")]
        held_out = f", {self.validation[-1][1]:.3f} held out" if self.validation else ""
        return (
            f"{len(self.loss)} steps, {sum(self.tokens):,} tokens, loss {self.loss[0]:.3f} -> {self.loss[-1]:.3f}"
            f"{held_out}, {sum(self.seconds):.0f} s ({sum(self.cpu_seconds):.0f} CPU-seconds)"
            + (f", weights of step {self.best}" if self.best else "")
            + (f", with {', '.join(used)}" if used else "")
        )
