"""Make the ONNX files in this folder from networks of Keras, as users of TensorFlow do.

pip install tensorflow-cpu==2.21.0 tf2onnx==1.17.0 "numpy<2.3"
python tests/onnx_import/keras/make.py  # in a virtual environment of its own: a minute
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from keras import layers


def images():
    """Convolutions with and without padding, a residual block, and a head, on images with the channels last."""
    x = first = layers.Input((28, 28, 1))
    x = layers.Rescaling(2.0, offset=-1)(x)
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = before = layers.MaxPooling2D()(x)
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x))
    x = layers.ReLU()(layers.Add()([x, before]))
    x = layers.DepthwiseConv2D(3, strides=2, padding="same")(x)
    x = layers.Activation("swish")(layers.Conv2D(12, 1)(x))
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(first, layers.Dense(10)(x))


def text():
    """An embedding, a convolution, attention, and a layer that Keras computes on samples and positions as one."""
    x = first = layers.Input((12,), dtype="int32")
    x = layers.Conv1D(16, 3, padding="same", activation="relu")(layers.Embedding(50, 16)(x))
    x = layers.LayerNormalization()(layers.Add()([x, layers.MultiHeadAttention(2, 8)(x, x)]))
    x = layers.GlobalMaxPooling1D()(layers.Dense(12, activation="silu")(x))
    return keras.Model(first, layers.Dense(4)(x))


def series():
    """Recurrent layers in both directions."""
    x = first = layers.Input((9, 6))
    x = layers.Dense(8, activation="relu")(layers.LSTM(8, return_sequences=True)(x))
    x = layers.LSTM(5)(layers.Bidirectional(layers.LSTM(8, return_sequences=True))(x))
    return keras.Model(first, layers.Dense(3)(x))


def main():
    for n, make in enumerate((images, text, series)):
        keras.utils.set_random_seed(n)
        model = make()
        for weight in model.weights:
            if "moving" in weight.path:  # running statistics, which are 0 and 1 in a new network
                weight.assign(np.random.default_rng(n).random(weight.shape) + 0.5)
        with tempfile.TemporaryDirectory() as folder:
            model.export(folder, verbose=False)
            output = Path(__file__).with_name(f"{make.__name__}.onnx")
            command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", folder, "--opset", "15"]
            subprocess.run([*command, "--output", str(output)], check=True)


if __name__ == "__main__":
    main()
