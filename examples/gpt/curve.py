"""The losses of a run: kept while it goes, then written as a table and as a picture. Computes none of them."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")  # a file, not a window
from matplotlib import pyplot as plt


@dataclass
class Curve:
    """Losses in nats a token: `train[i]` of step i + 1 on process 0, `validation[step]` of all processes."""

    train: list[Tensor] = field(default_factory=list)  # on the device: reading one would wait for it
    validation: dict[int, float] = field(default_factory=dict)

    def train_values(self) -> list[float]:
        """The training losses as numbers."""
        values: list[float] = torch.stack(self.train).float().tolist() if self.train else []
        return values

    def write_table(self, path: Path) -> None:
        """Write step, train_loss and validation_loss; the last is empty where it was not measured."""
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("step", "train_loss", "validation_loss"))
            for step, loss in enumerate(self.train_values(), start=1):
                table.writerow((step, f"{loss:.6f}", self.validation.get(step, "")))

    def draw(self, path: Path, *, title: str, tokens_per_step: int) -> None:
        """Draw both losses over the number of tokens seen."""
        train = self.train_values()
        figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
        millions = [step * tokens_per_step / 1e6 for step in range(1, len(train) + 1)]
        axes.plot(millions, train, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(
            millions,
            smooth(train, window=max(1, len(train) // 20)),
            color="tab:blue",
            label="training (process 0, smoothed)",
        )
        seen = [step * tokens_per_step / 1e6 for step in self.validation]
        axes.plot(seen, list(self.validation.values()), "o-", color="tab:orange", label="validation")
        axes.set(title=title, xlabel="million tokens", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def smooth(values: list[float], *, window: int) -> list[float]:
    """The mean over the last `window` values at each place."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = (max(0, end - window) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
