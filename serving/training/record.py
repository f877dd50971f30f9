"""What a run tells on its way: lines on the terminal, `metrics.csv`, and `loss.svg`."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "steps_per_s", "tokens_per_s", "eval_loss", "eval_accuracy")

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 720, 360, 56, 36, 14


@dataclasses.dataclass(frozen=True)
class Line:
    """What is known at a step; None where it was not looked at.

    Attributes:
        step: steps made.
        loss: mean over the targets since the last line.
        grad_norm: of the newest step, before the clip.
        steps_per_s, tokens_per_s: since the last line, without evaluations and checkpoints.
        eval_loss, eval_accuracy: on the evaluation data; the share of targets that were the likeliest token.
    """

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    steps_per_s: float | None = None
    tokens_per_s: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None

    def __str__(self) -> str:
        shown = [
            ("loss {:.4f}", self.loss),
            ("lr {:.2e}", self.learning_rate),
            ("|g| {:.3f}", self.grad_norm),
            ("{:.2f} steps/s", self.steps_per_s),
            ("{:.0f} tokens/s", self.tokens_per_s),
            ("eval loss {:.4f}", self.eval_loss),
            ("eval accuracy {:.1%}", self.eval_accuracy),
        ]
        return "  ".join(form.format(value) for form, value in shown if value is not None)


class Record:
    """Adds lines to a folder's files.

    Args:
        steps: of the whole run.
        from_step: what an earlier run wrote up to here is kept, what it wrote behind is not.
        tell: what shows a line to people.
    """

    def __init__(self, folder: Path, steps: int, from_step: int = 0, tell: Callable[[str], None] = print):
        self._folder, self._steps, self._tell = folder, steps, tell
        self.lines = [line for line in read(folder / "metrics.csv") if line.step <= from_step] if from_step else []
        with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(_cells(line) for line in self.lines)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        with (self._folder / "metrics.csv").open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_cells(line))
        (self._folder / "loss.svg").write_text(plot(self.lines), encoding="utf-8")
        self._tell(f"step {line.step}/{self._steps}  {line}")


def read(path: Path) -> list[Line]:
    """The lines of a `metrics.csv`; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Line(int(row["step"]), **{name: float(row[name]) if row.get(name) else None for name in COLUMNS[1:]})
        for row in rows
    ]


def _cells(line: Line) -> list[str]:
    return ["" if (value := getattr(line, name)) is None else f"{value:.6g}" for name in COLUMNS]


def plot(lines: Sequence[Line]) -> str:
    """The losses by step as an SVG."""
    series = {
        "training": [(line.step, line.loss) for line in lines if line.loss is not None],
        "evaluation": [(line.step, line.eval_loss) for line in lines if line.eval_loss is not None],
    }
    points = [point for part in series.values() for point in part if math.isfinite(point[1])]
    right, top = max((x for x, _ in points), default=1), max((y for _, y in points), default=1.0)
    top = _tick(top / 4 or 1.0) * 4

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / max(1, right) * (_WIDTH - _LEFT - _MARGIN)
        return across, _HEIGHT - _BOTTOM - min(y, top) / top * (_HEIGHT - _BOTTOM - _MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for index in range(5):
        x, y = place(0, top * index / 4)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="{_WIDTH - _MARGIN}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{top * index / 4:.3g}</text>')
    parts.append(f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 12}" text-anchor="end">step {right}</text>')
    for (name, part), colour in zip(series.items(), ("#1f5fa8", "#c2571a"), strict=True):
        drawn = [place(x, y) for x, y in part if math.isfinite(y)]
        if not drawn:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in drawn]
        height = _MARGIN + 14 + 16 * list(series).index(name)
        parts.append(
            f'<text x="{_WIDTH - _MARGIN - 4}" y="{height}" text-anchor="end" fill="{colour}">{name} loss</text>'
        )
    return "\n".join([*parts, "</svg>"])


def _tick(step: float) -> float:
    """The next larger of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= step * (1 - 1e-9))
