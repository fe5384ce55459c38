"""What a model consists of, as a table."""

from __future__ import annotations

from torch import nn

from hpctrain.tasks.callbacks.base import Callback, Run


class Summary(Callback):
    """Says how large the model is, and writes ``model.txt`` of the run folder: a line a module."""

    def on_start(self, run: Run) -> None:
        """Write the table of the model's modules to ``model.txt`` in the run folder.

        Args:
            run: The run.
        """
        lines = table(run.model)
        (run.folder / "model.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        run.say(f"model: {lines[-1]}")


def table(model: nn.Module) -> list[str]:
    """Return a line a module that has parameters or children, and one of totals.

    Args:
        model: To be summed up.

    Example:
        >>> for line in table(nn.Sequential(nn.Linear(2, 3), nn.ReLU())):
        ...     print(line)
        Sequential  9 parameters
          0: Linear  9 parameters
          1: ReLU  0 parameters
        9 parameters, 9 of them trained, in 2 tensors of 36 bytes
    """
    lines = []
    for name, module in model.named_modules():
        depth = name.count(".") + 1 if name else 0
        called = f"{name.rpartition('.')[2]}: " if name else ""
        own = sum(_count(parameter) for parameter in module.parameters())
        lines.append(f"{'  ' * depth}{called}{type(module).__name__}  {own:,} parameters")
    parameters = [p for p in model.parameters() if not nn.parameter.is_lazy(p)]
    total = sum(map(_count, parameters))
    trained = sum(_count(p) for p in parameters if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in parameters)
    lines.append(
        f"{total:,} parameters, {trained:,} of them trained, in {len(parameters)} tensors of "
        f"{size:,} bytes"
    )
    return lines


def _count(parameter: nn.Parameter) -> int:
    return 0 if nn.parameter.is_lazy(parameter) else parameter.numel()
