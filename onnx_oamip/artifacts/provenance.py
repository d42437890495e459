"""Provenance of a model, as an entry of its own metadata: the source, the plan, and the version that pruned it.

The entry ``onnx_oamip.provenance`` holds a JSON object:

=================  ==========================================================================================
``tool_version``   version of this package
``source_sha256``  digest of the model file that was pruned
``plan_sha256``    digest of the kept units, see ``plan_files.digest``; of the positions of nonzero weights if
                   connections were pruned
``parent``         the entry of the source, if that was pruned before
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
    """Add the entry of a pruned model. An entry of its source becomes ``parent``.

    Args:
        proto: Pruned model, changed in place.
        source_sha256: Digest of the model file that was pruned.
        plan_sha256: Digest of the kept units or connections.
    """
    entry: dict[str, Any] = {
        "tool_version": __version__,
        "source_sha256": source_sha256,
        "plan_sha256": plan_sha256,
    }
    parent = read(proto)
    if parent is not None:
        entry["parent"] = parent
    remove(proto)
    proto.metadata_props.add(key=KEY, value=json.dumps(entry, sort_keys=True))


def remove(proto: onnx.ModelProto) -> None:
    """Remove the entry of a model.

    Args:
        proto: Model, changed in place.
    """
    others = [prop for prop in proto.metadata_props if prop.key != KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)


def size(proto: onnx.ModelProto) -> int:
    """Bytes that the entry of a model takes in its file.

    Args:
        proto: Any model.

    Returns:
        The size, 0 without an entry.
    """
    entries = [prop for prop in proto.metadata_props if prop.key == KEY]
    return onnx.ModelProto(metadata_props=entries).ByteSize()


def read(proto: onnx.ModelProto) -> Mapping[str, Any] | None:
    """Read the entry of a model.

    Args:
        proto: Model to read.

    Returns:
        The entry, or None if there is none or it is no JSON object.
    """
    texts = [prop.value for prop in proto.metadata_props if prop.key == KEY]
    if not texts:
        return None
    try:
        entry = json.loads(texts[0])
    except (ValueError, RecursionError):
        return None
    if isinstance(entry, dict):
        return entry
    return None
