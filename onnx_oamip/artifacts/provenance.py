"""Where a model comes from, as an entry of its own metadata: what was pruned, to what, and by which version.

The entry ``onnx_oamip.provenance`` holds a JSON object:

=================  ==========================================================================================
``tool_version``   of this package
``source_sha256``  of the model file that was pruned
``plan_sha256``    of what stays, see ``planfile.digest``; of the places of the weights that are not zero, where
                   connections went
``parent``         the entry that the source had, where it was pruned before
=================  ==========================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx

from onnx_oamip.core.version import __version__

KEY = "onnx_oamip.provenance"


def sign(proto: onnx.ModelProto, source_sha256: str, plan_sha256: str) -> None:
    """Put the entry of a pruned model in place of that of its source, which it keeps as ``parent``."""
    entry: dict[str, Any] = {
        "tool_version": __version__,
        "source_sha256": source_sha256,
        "plan_sha256": plan_sha256,
    }
    parent = of(proto)
    if parent is not None:
        entry["parent"] = parent
    remove(proto)
    proto.metadata_props.add(key=KEY, value=json.dumps(entry, sort_keys=True))


def remove(proto: onnx.ModelProto) -> None:
    """Take the entry out of a model."""
    others = [p for p in proto.metadata_props if p.key != KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)


def of(proto: onnx.ModelProto) -> Mapping[str, Any] | None:
    """The entry of a model; None where it has none, or one that is no JSON object."""
    text = next((p.value for p in proto.metadata_props if p.key == KEY), None)
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
