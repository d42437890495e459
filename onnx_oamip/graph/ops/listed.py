"""Lists of lengths, as a constant or joined from pieces of which some are constants: those a cut can change."""

from __future__ import annotations

from onnx_oamip.graph.ops.handles import Cuts, Labels


def elements(tensor: str, graph: Labels | Cuts) -> list[int | None] | None:
    """Read the numbers of a list that are known before the model runs.

    Args:
        tensor: Name of the list.
        graph: Constants and producers.

    Returns:
        The numbers, None for those read at run time; None for a list that is computed as a whole.
    """
    value = graph.constant(tensor)
    if value is not None:
        return [int(number) for number in value.reshape(-1)]
    maker = graph.producer(tensor)
    if maker is None or maker.op != "Concat" or maker.domain:
        return None
    result: list[int | None] = []
    for name in maker.inputs:
        piece = graph.constant(name)
        shape = graph.shape(name)
        if shape is None or len(shape) != 1:
            return None
        result += [None] * shape[0] if piece is None else [int(number) for number in piece]
    return result
