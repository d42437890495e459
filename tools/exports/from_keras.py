"""Keras on TensorFlow: Keras' own export, tf2onnx by TensorFlow Lite, and tf2onnx's translation without its optimisers.

Keras keeps the channels last. tf2onnx puts a Transpose before and after every operator that ONNX defines with channels
first; its optimisers remove most of them again.
"""

from __future__ import annotations

from pathlib import Path

import keras
import onnx
import tensorflow as tf
import tf2onnx
from keras import layers

from . import digits

PACKAGES = ("keras", "tensorflow", "tf2onnx")
MADE_BY = {
    "keras-export": 'model.export(format="onnx")',
    "keras-tflite": "tf2onnx.convert.from_tflite",
    "tensorflow-tf2onnx": "tf2onnx.tfonnx.process_tf_graph",
}


def write(folder: Path) -> None:
    """Train one network and export it in three ways."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(24, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(40, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    network.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    network.fit(*digits.training(folder, 8, 8, 1), batch_size=64, epochs=20, verbose=0)

    network.export(folder / "keras-export.onnx", format="onnx", verbose=False)

    lite = folder / "network.tflite"
    try:
        lite.write_bytes(tf.lite.TFLiteConverter.from_keras_model(network).convert())
        tf2onnx.convert.from_tflite(str(lite), output_path=str(folder / "keras-tflite.onnx"))
    finally:
        lite.unlink(missing_ok=True)

    function = tf.function(lambda image: network(image, training=False))
    concrete = function.get_concrete_function(
        tf.TensorSpec((None, 8, 8, 1), tf.float32, name="image")
    )
    ends = [concrete.inputs[0].name], [concrete.outputs[0].name]
    frozen = tf2onnx.tf_loader.from_function(concrete, *ends)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen, name="")
        plain = tf2onnx.tfonnx.process_tf_graph(
            graph, input_names=ends[0], output_names=ends[1], opset=18
        )
    onnx.save(plain.make_model("plain"), folder / "tensorflow-tf2onnx.onnx")
