"""README's results section, made from the saved studies: numbers there are never typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from .studies import ROOT, table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TEXT = {
    "budgets": "**Accuracy at a budget.** Default settings, 512 unlabelled calibration images, no fine-tuning; "
    "accuracy in percent on 2,000 test images (one of them is 0.05 points).",
    "speed": "**Latency and cost.** Ratios measured side by side in one run. The share of the ideal speed-up is MACs "
    "kept over latency kept; pruning is counted in plain ONNX Runtime passes over the same calibration data.",
    "ablation": "**What each part is worth.** Accuracy at half the MACs by order of removal, allocation of widths and "
    "refit (the last three columns), widths not aligned.",
    "connections": "**Connections.** Single connections pruned by NNrelief without retraining: how many times fewer, "
    "and the accuracy in percent. The paper's more than 50 times (VGG, CIFAR-10) come with "
    "retraining after every round.",
    "importance": "**Which units go.** Accuracy in percent with the same share of units kept in every group, by "
    "importance and refit.",
    "decoupled": "**What `oamip` costs.** Decoupled scoring; a program has one variable a unit and one more.",
    "programs": "**The published program.** LeNet-300-100 on ten images to a gap of 1 %, against the same program "
    "written in CVXPY for Clarabel.",
    "storage": "**Packed files.** Size in percent of each version's bytes; codebooks chosen on 1,000 test images to "
    "lose at most half a point there, accuracies on 1,000 others. Unpacked weights are dense again.",
    "estimators": "**Dependence between layers.** Seconds, whether true edges are found, and memory.",
    "coverage": "**Architectures.** Share of the parameters kept (percent) when every group is halved, on small "
    "networks with random weights exported by PyTorch both ways.",
    "coupling": "**Coupling.** Seconds to find what goes together, on graphs of the onnx package.",
    "large": "**Large models.** `inspect` on a transformer with random weights, 250 million parameters of 4 bytes.",
}

SHOWN = {"coverage": ("network", "exporter", "kept %", "onnxsim %", "Torch-Pruning %", "cut = masked")}
"""Columns of a study that README shows, where that is not all."""


def section(results: Path) -> str:
    """The Markdown between the markers, from whatever studies are there."""
    parts = []
    for study, text in TEXT.items():
        file = results / f"{study}.json"
        if file.exists():
            record = json.loads(file.read_text())
            seen = ", ".join(f"{k} {v}" for k, v in record["environment"].items())
            again = f"`python -m tools.bench {study}`, seed {record['seed']}; {seen}."
            parts.append(f"{text}\n\n{table(record['rows'], SHOWN.get(study, record['columns']))}\n\n{again}")
    return "\n\n".join(parts)


def write(results: Path) -> None:
    """Replace the section in README."""
    file = ROOT / "README.md"
    head, _, rest = file.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    file.write_text(f"{head}{BEGIN}\n{section(results)}\n{END}{tail}")
