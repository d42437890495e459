"""``python -m onnx_oamip``: the same as the command ``onnx-oamip``."""

import sys

from onnx_oamip.cli import main

if __name__ == "__main__":
    sys.exit(main())
