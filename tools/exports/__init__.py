"""The same small classifier of handwritten digits, trained in several frameworks and exported to ONNX by each.

    python -m tools.exports                     every framework that is installed
    python -m tools.exports pytorch jax         these
    python -m tools.exports --table             prune every export by the same command, and write docs/guide/exports.md

``pip install -e '.[cpu,exports]'`` brings all of them, gigabytes. One after the other in environments of their own does
as well: a run keeps the files, and the lines of ``made.json``, that it does not make anew. Each needs little:

| name | exports | needs |
| --- | --- | --- |
| `pytorch` | `pytorch-torchscript`, `pytorch-dynamo` | `pip install torch onnxscript` |
| `keras` | `keras-export`, `keras-tflite`, `tensorflow-tf2onnx` | `pip install tensorflow tf2onnx` |
| `scikit-learn` | `sklearn-float`, `sklearn-double` | `pip install scikit-learn skl2onnx` |
| `jax` | `flax-jax2onnx` | `pip install jax flax optax jax2onnx` |
| `paddle` | `paddle-paddle2onnx` | `pip install paddlepaddle paddle2onnx onnx-graphsurgeon sympy` |

The data, ``digits.npz``, are there; where they are not they are made anew, which needs scikit-learn. Only ``--table``
needs onnx-oamip itself.

The network, where the framework has convolutions: a 3x3 convolution 16 wide, batch normalisation, ReLU, a 2x2 max pool;
a convolution 24 wide, ReLU, batch normalisation, the pool; then a dense layer of 40, ReLU, and one of 10. scikit-learn
has a scaler and dense layers of 48, 32 and 10. Names, layouts, opsets and forms are as the exporters write them; only
stack traces and notes on nodes, which hold paths of the machine, are taken out.
"""
