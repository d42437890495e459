"""The ``checkpoint`` command."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_oamip.cli.options import (
    MODEL,
    check_paths,
    json_option,
    quiet_option,
)
from onnx_oamip.cli.terminal import show


@click.command()
@click.option(
    "--keep-map",
    type=MODEL,
    required=True,
    metavar="K.safetensors",
    help="The file that prune --keep-map wrote.",
)
@click.option(
    "--state-dict",
    type=MODEL,
    required=True,
    metavar="S.safetensors",
    help="Weights of the network that the model was exported from, as safetensors.torch.save_file writes them.",
)
@click.option(
    "-o",
    "--output",
    type=MODEL,
    required=True,
    metavar="T.safetensors",
    help="Where the cut weights go.",
)
@json_option
@quiet_option
def checkpoint(
    *,
    keep_map: Path,
    state_dict: Path,
    output: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Cut a PyTorch state dict as a model was pruned, for fine-tuning.

    Weights are matched by name or by content, cut and not refitted. The network that takes them must be built with the
    widths shown.
    """
    from onnx_oamip.artifacts import keep_maps as checkpoints
    from onnx_oamip.artifacts.output import check_output
    from onnx_oamip.reporting import documents

    check_paths(output, {"--keep-map": keep_map, "--state-dict": state_dict})
    check_output(state_dict, output)
    result = checkpoints.cut(keep_map, state_dict, output)
    if as_json or not quiet:
        show(documents.checkpoint(result), as_json)
