"""Random operators in a form that gives the same numbers in every run and in every session.

A session draws new numbers in every run. Two models that are compared, such as a pruned one and its original, would
differ by their draws, and a loss would measure noise. In sessions that compare, the draws are therefore a fixed
function of the name of the tensor and of the position in it. Written models keep their own operators.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from onnx_oamip.graph import subgraphs
from onnx_oamip.graph.ops import domains, kinds
from onnx_oamip.graph.ops.draws import can_be_written_out, written_out


def draws(proto: ModelProto) -> list[NodeProto]:
    """Find the nodes of a model that draw random numbers.

    Args:
        proto: Any model.

    Returns:
        The nodes, of the graph and of the subgraphs within it.
    """
    return [n for n in subgraphs.nodes(proto.graph) if n.op_type.startswith(kinds.RANDOM)]


def remarks(proto: ModelProto) -> list[str]:
    """Describe the random numbers of a model.

    Args:
        proto: Any model.

    Returns:
        Notes for reports; empty if nothing is drawn.
    """
    opset = domains.opset(proto)
    found = draws(proto)
    fixed = sorted({node.op_type for node in found if can_be_written_out(node, opset)})
    free = sorted({node.op_type for node in found if not can_be_written_out(node, opset)})
    notes = []
    if fixed:
        notes.append(
            f"the model draws random numbers ({', '.join(fixed)}): it is calibrated and compared with the same numbers "
            "in every run, and other draws may lose more or less"
        )
    if free:
        notes.append(
            f"the model draws random numbers ({', '.join(free)}) anew in every run: what is measured includes their "
            "noise"
        )
    return notes


def repeatable(proto: ModelProto) -> ModelProto:
    """Replace draws of uniform, normal and Bernoulli numbers by fixed numbers of the same distribution.

    Args:
        proto: Any model.

    Returns:
        A model whose runs all draw the same; the same object if nothing is drawn, or if its opset lacks
        the operators.
    """
    opset = domains.opset(proto)
    if not any(can_be_written_out(node, opset) for node in draws(proto)):
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    taken = subgraphs.names(result.graph)

    def unused(name: str) -> str:
        found = subgraphs.unused_name(name, taken)
        taken.add(found)
        return found

    for graph in subgraphs.graphs(result.graph):
        nodes: list[NodeProto] = []
        for node in graph.node:
            if can_be_written_out(node, opset):
                nodes += written_out(node, unused)
            else:
                nodes.append(node)
        subgraphs.set_nodes(graph, nodes)
    return result
