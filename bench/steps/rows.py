"""What is known of the ways of one model, as rows of a result file and as a table."""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.files import Row, quantiles, write_results
from bench.steps.ways import Batches
from fastjepa.config import Settings
from fastjepa.plan import Plan

PARITY_STEPS = 20
# Of a loss in bfloat16, over the first steps of training: sums in another order, rounded to 8 bits of mantissa.
PARITY_BOUND = 0.02


@dataclass
class Figures:
    """What is known of one way: a reason why there is nothing, or times in ms and losses by step.

    `peak_bytes`: its weights, moments and activations, without the batches that were prepared.
    """

    skipped: str = ""
    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    how: list[str] = field(default_factory=list)
    peak_bytes: float = 0.0
    graphs: int = 0
    graphs_while_timed: int = 0


@dataclass
class Bench:
    """One model: its ways, what they are fed, and what has been found so far. `seconds`: what it may take."""

    path: Path
    header: dict[str, Any]
    settings: dict[str, Settings]
    plans: dict[str, Plan]
    batches: Batches
    device: torch.device
    steps: int
    seconds: float
    began: float = field(default_factory=time.perf_counter)
    found: dict[str, Figures] = field(default_factory=dict)
    order: str = ""

    def late(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        return time.perf_counter() - self.began > share * self.seconds

    def write(self, *, complete: bool) -> None:
        """The result file as it stands."""
        write_results(self.path, {**self.header, "order": self.order}, self.rows(), complete=complete)

    def rows(self) -> list[Row]:
        """A row a way, in the order in which they were asked for."""
        return [self.row(name, figures) for name, figures in self.found.items() if figures.skipped or figures.ms]

    def row(self, name: str, figures: Figures) -> Row:
        """Clips/s and what stands behind it."""
        way = name.removesuffix(", again")
        row: Row = {"name": f"step {name}", "parameters": {"model": self.header["model"], "way": way}}
        if figures.skipped:
            return {**row, "skipped": figures.skipped}
        ms, batch = figures.ms, self.plans[way].batch_size
        p20, median, p80 = quantiles(ms)
        rate, part = 1e3 * batch / median, max(len(ms) // 10, 1)
        peak, reference = self.header["peak_flops"], self.found.get("reference")
        more: Row = {}
        if reference is not None and reference.ms:
            more["times_reference"] = statistics.median(reference.ms) / median
        first = self.found.get(way)
        if name != way and first is not None and first.ms:
            more["times_first"] = statistics.median(first.ms) / median
        return {
            **row,
            "value": rate,
            "unit": "clips/s",
            "p20": 1e3 * batch / p80,
            "p80": 1e3 * batch / p20,
            "min": 1e3 * batch / max(ms),
            "max": 1e3 * batch / min(ms),
            "ms": median,
            "n": len(ms),
            "drift": statistics.median(ms[-part:]) / statistics.median(ms[:part]),
            "mfu": None if peak is None else rate * self.plans[way].flop_per_clip / peak,
            "peak_memory_gb": figures.peak_bytes / 1e9 if self.device.type == "cuda" else None,
            "loss_first": figures.losses[0],
            "loss_last": figures.losses[-1],
            "parity": self.parity(name),
            "graphs": figures.graphs,
            "graphs_while_timed": figures.graphs_while_timed,
            "how": figures.how,
            **more,
        }

    def parity(self, name: str) -> dict[str, Any]:
        """The largest relative difference of a loss from that of another way, over the first steps of both."""
        ran = [one for one, figures in self.found.items() if figures.ms]
        other = "reference" if "reference" in ran else ran[0]
        pairs = list(zip(self.found[name].losses, self.found[other].losses))[:PARITY_STEPS]
        largest = max(abs(mine / theirs - 1) for mine, theirs in pairs)
        within = largest <= PARITY_BOUND
        return {"with": other, "steps": len(pairs), "largest": largest, "bound": PARITY_BOUND, "within": within}

    def agree(self) -> bool:
        """Whether the losses of all ways that ran are within the bound."""
        return all(row["parity"]["within"] for row in self.rows() if "parity" in row)

    def table(self) -> str:
        """All rows for a person, and below them what ran."""
        lines = [
            f"{self.header['model']}, {self.header['batch']} clips, {self.header['device']}: {self.order}; losses "
            f"within {PARITY_BOUND:.0%} of each other over {PARITY_STEPS} steps",
            f"{'way':<20}{'clips/s':>9}{'p20':>9}{'p80':>9}{'ms':>9}{'x ref.':>8}{'MFU':>8}{'peak GB':>9}"
            f"{'loss':>9}{'last':>9}{'differ':>9}",
        ]
        for row in self.rows():
            name = row["name"].removeprefix("step ")
            if "skipped" in row:
                lines.append(f"{name:<20}{'-':>9}  {row['skipped']}")
                continue
            mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
            memory = "-" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f}"
            ratio = f"{row['times_reference']:.2f}" if "times_reference" in row else "-"
            apart = f"{row['parity']['largest']:.1e}" + ("" if row["parity"]["within"] else " TOO FAR")
            lines.append(
                f"{name:<20}{row['value']:>9.4g}{row['p20']:>9.4g}{row['p80']:>9.4g}{row['ms']:>9.4g}{ratio:>8}"
                f"{mfu:>8}{memory:>9}{row['loss_first']:>9.4f}{row['loss_last']:>9.4f}{apart:>9}"
            )
        for name, figures in self.found.items():
            lines += [f"{name}: {line}" for line in figures.how]
        return "\n".join(lines)
