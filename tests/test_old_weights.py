"""What Keras 3 makes of the HDF5 files of Keras 2: the table in docs/keras2_weights.md.

The files are built here from their layout, which was compared with what Keras 2.2.2, 2.2.4, TensorFlow 2.3.4 (which
calls its Keras 2.4.0) and TensorFlow 2.15.1 had written.
"""

import base64
import json
import marshal
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from visual_callbacks import ResumableCheckpoint

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`"),
    pytest.mark.filterwarnings("ignore:The structure of `inputs`"),
    pytest.mark.filterwarnings("ignore:Argument `decay`"),
]
WHOLE, WEIGHTS = "model.h5", "only_weights.h5"
# Keras 2.2.2 is the last whose Sequential models are a plain list of layers; "2.2.4 Model" is a functional model.
VERSIONS = ["2.2.2", "2.2.4", "2.2.4 Model", "2.4.0", "2.15.0"]
OPENED = ["2.2.4 Model", "2.4.0", "2.15.0"]
# The byte code of `lambda t: t * 2`, as Keras wrote it on Python 3.7, 3.8, and this one.
LAMBDAS = {
    "2.2.4 Model": "4wEAAAAAAAAAAQAAAAIAAABDAAAAcwgAAAB8AGQBFABTACkCTukCAAAAqQApAdoBdHICAAAAcgIA\n"
    "AAD6CHdyaXRlLnB52gg8bGFtYmRhPhUAAADzAAAAAA==\n",
    "2.4.0": "4wEAAAAAAAAAAAAAAAEAAAACAAAAQwAAAHMIAAAAfABkARQAUwCpAk7pAgAAAKkAqQHaAXRyAwAA\n"
    "AHIDAAAA+gh3cml0ZS5wedoIPGxhbWJkYT4VAAAA8wAAAAA=\n",
    "2.15.0": base64.encodebytes(marshal.dumps((lambda t: t * 2).__code__)).decode(),
}
NAMES = {
    "Conv2D": "conv2d",
    "BatchNormalization": "batch_normalization",
    "MaxPooling2D": "max_pooling2d",
}
NAMES |= {
    kind: kind.replace("Conv2D", "_conv2d").lower()
    for kind in ("DepthwiseConv2D", "SeparableConv2D")
}
NAMES["Conv2DTranspose"] = "conv2d_transpose"
SHAPES = {
    "Conv2D": {"kernel": (3, 3, 3, 4), "bias": (4,)},
    "BatchNormalization": {
        "gamma": (4,),
        "beta": (4,),
        "moving_mean": (4,),
        "moving_variance": (4,),
    },
    "Dense": {"kernel": (36, 3), "bias": (3,)},
    "DepthwiseConv2D": {"depthwise_kernel": (1, 1, 4, 1), "bias": (4,)},
    "SeparableConv2D": {
        "depthwise_kernel": (1, 1, 4, 1),
        "pointwise_kernel": (1, 1, 4, 4),
        "bias": (4,),
    },
    "Conv2DTranspose": {"kernel": (1, 1, 4, 4), "bias": (4,)},
}
RNG = np.random.default_rng(0)
VALUES = {
    kind: {name: RNG.uniform(-0.7, 0.7, of).astype("f4") for name, of in SHAPES[kind].items()}
    for kind in SHAPES
}
VALUES["BatchNormalization"]["moving_variance"] += 1
IMAGES = RNG.random((5, 8, 8, 3), "f4")
LABELS = np.eye(3, dtype="f4")[[0, 1, 2, 0, 1]]
# Layers that some networks have in their middle: the layer, and what it does, in NumPy.
MIDDLES = {
    None: (None, lambda x: x),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(1), lambda x, d, b: x * d[0, 0, :, 0] + b),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(4, 1),
        lambda x, d, p, b: x * d[0, 0, :, 0] @ p[0, 0] + b,
    ),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 1), lambda x, k, b: x @ k[0, 0].T + b),
    "Lambda": (lambda: layers.Lambda(lambda t: t * 2), lambda x: x * 2),
}
GROUPED = ["DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"]


def network(middle=None):
    """A learner's first network, as one would write it today."""
    stack = [
        keras.Input((8, 8, 3)),
        layers.Conv2D(4, 3),
        layers.BatchNormalization(),
        layers.Activation("relu"),
    ]
    stack += [MIDDLES[middle][0]()] if middle else []
    stack += [
        layers.MaxPooling2D(),
        layers.Dropout(0.3),
        layers.Flatten(),
        layers.Dense(3, activation="softmax"),
    ]
    return keras.Sequential(stack)


def expected(middle=None, turned=False):
    """What a network with VALUES answers to IMAGES, by NumPy; if asked, with its first filters turned by 180°."""
    conv, norm, dense, other = (
        VALUES.get(kind, {}).values() for kind in ("Conv2D", "BatchNormalization", "Dense", middle)
    )
    (kernel, bias), (gamma, beta, mean, variance), (matrix, offset) = conv, norm, dense
    windows = np.lib.stride_tricks.sliding_window_view(IMAGES, (3, 3), axis=(1, 2))
    x = np.einsum("nhwcij,ijcf->nhwf", windows, kernel[::-1, ::-1] if turned else kernel) + bias
    x = MIDDLES[middle][1](
        np.maximum((x - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0), *other
    )
    x = np.exp(x.reshape(5, 3, 2, 3, 2, 4).max((2, 4)).reshape(5, 36) @ matrix + offset)
    return x / x.sum(1, keepdims=True)


def agrees(model, *case, **options):
    """Whether a model answers as the weights in the file demand."""
    return np.allclose(
        keras.ops.convert_to_numpy(model(IMAGES)), expected(*case, **options), atol=1e-5
    )


def config(version, middle):
    """The configuration of the network as that version wrote it."""
    old, shape = version.startswith("2.2"), {"batch_input_shape": [None, 8, 8, 3]}

    def initializer(kind):
        if old and kind == "GlorotUniform":
            scaling = {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None}
            return {"class_name": "VarianceScaling", "config": scaling}
        written = {"class_name": kind, "config": {"seed": None} if kind == "GlorotUniform" else {}}
        return (
            {"module": "keras.initializers", **written, "registered_name": None}
            if version == "2.15.0"
            else written
        )

    def trained(**kinds):
        parts = {name + "_initializer": initializer(kind) for name, kind in kinds.items()}
        return parts | {
            f"{name}_{part}": None for name in kinds for part in ("regularizer", "constraint")
        }

    def dense(activation, *kernels):
        made = trained(**dict.fromkeys(kernels, "GlorotUniform"), bias="Zeros")
        return {"activation": activation, "use_bias": True, "activity_regularizer": None, **made}

    def conv(size, *kernels):
        area = {
            "kernel_size": [size, size],
            "strides": [1, 1],
            "padding": "valid",
            "dilation_rate": [1, 1],
        }
        return (
            area
            | {"data_format": "channels_last"}
            | ({} if old else {"groups": 1})
            | dense("linear", *kernels)
        )

    norm = trained(gamma="Ones", beta="Zeros") | {
        "momentum": 0.99,
        "epsilon": 0.001,
        "center": True,
        "scale": True,
    }
    norm |= {
        "moving_mean_initializer": initializer("Zeros"),
        "moving_variance_initializer": initializer("Ones"),
    }
    depthwise = {"depth_multiplier": 1}
    separable = ["depthwise", "pointwise"] if old else ["kernel", "depthwise", "pointwise"]
    function = {
        "function": [LAMBDAS.get(version), None, None],
        "function_type": "lambda",
        "arguments": {},
    }
    function |= {"output_shape": None, "output_shape_type": "raw"}
    middles = {
        "DepthwiseConv2D": conv(1, "depthwise") | depthwise,
        "SeparableConv2D": conv(1, *separable) | depthwise | {"filters": 4},
        "Conv2DTranspose": conv(1, "kernel") | {"filters": 4, "output_padding": None},
        "Lambda": function | ({} if old else {"module": "__main__", "output_shape_module": None}),
    }
    first = {} if version == "2.2.4 Model" else shape
    stack = [
        ("Conv2D", {"filters": 4, **conv(3, "kernel"), **first}),
        ("BatchNormalization", norm | {"axis": -1 if old else [3]}),
        ("Activation", {"activation": "relu"}),
        *([(middle, middles[middle])] if middle else []),
        (
            "MaxPooling2D",
            {
                "pool_size": [2, 2],
                "strides": [2, 2],
                "padding": "valid",
                "data_format": "channels_last",
            },
        ),
        ("Dropout", {"rate": 0.3, "noise_shape": None, "seed": None}),
        ("Flatten", {"data_format": "channels_last"}),
        ("Dense", {"units": 3, **dense("softmax", "kernel")}),
    ]
    number, dtype = ("_1", {}) if old else ("", {"dtype": "float32"})
    written = [
        {
            "class_name": kind,
            "config": {"name": NAMES.get(kind, kind.lower()) + number, "trainable": True}
            | of
            | dtype,
        }
        for kind, of in stack
    ]
    if old:
        written[0]["config"]["dtype"] = "float32"
    name = "input_1" if old else "conv2d_input"
    beginning = {
        "class_name": "InputLayer",
        "config": shape | {"dtype": "float32", "sparse": False, "name": name},
    }
    if version == "2.2.2":
        return {"class_name": "Sequential", "config": written}
    if version == "2.2.4":
        return {"class_name": "Sequential", "config": {"name": "sequential_1", "layers": written}}
    if not old:
        beginning["config"]["ragged"] = False
        return {
            "class_name": "Sequential",
            "config": {"name": "sequential", "layers": [beginning, *written]},
        }
    del written[0]["config"]["dtype"]
    nodes = [{"name": layer["config"]["name"], **layer} for layer in (beginning, *written)]
    for before, layer in zip([None, *nodes], nodes):
        layer["inbound_nodes"] = [[[before["name"], 0, 0, {}]]] if before else []
    ends = {"input_layers": [["input_1", 0, 0]], "output_layers": [["dense_1", 0, 0]]}
    return {"class_name": "Model", "config": {"name": "model_1", "layers": nodes, **ends}}


def training_config(version, loss="categorical_crossentropy"):
    """What that version wrote about how the network was compiled."""
    written = {"loss": loss, "metrics": ["accuracy"], "loss_weights": None}
    sgd = {"momentum": 0.9, "nesterov": True}
    if version.startswith("2.2"):
        optimizer = {"class_name": "SGD", "config": {"lr": 0.05, "decay": 0.0, **sgd}}
        return {**written, "sample_weight_mode": None, "optimizer_config": optimizer}
    optimizer = {"class_name": "SGD", "config": {"name": "SGD", "learning_rate": 0.05, **sgd}}
    if version == "2.4.0":
        optimizer["config"]["decay"] = 0.0
    else:
        accuracy = {"name": "accuracy", "dtype": "float32", "fn": "categorical_accuracy"}
        written["metrics"] = [[{"class_name": "MeanMetricWrapper", "config": accuracy}]]
        optimizer["class_name"] = "Custom>SGD"
        unset = (
            "weight_decay",
            "clipnorm",
            "global_clipnorm",
            "clipvalue",
            "ema_overwrite_frequency",
        )
        optimizer["config"] |= dict.fromkeys(unset) | {"use_ema": False, "ema_momentum": 0.99}
        optimizer["config"] |= {"jit_compile": False, "is_legacy_optimizer": False}
    return {**written, "weighted_metrics": None, "optimizer_config": optimizer}


def write(version, middle=None, loss="categorical_crossentropy", backend="tensorflow"):
    """Writes WHOLE, as that version's `model.save` did, and WEIGHTS, as its `model.save_weights` did."""
    text, listed = (str, list) if version == "2.15.0" else (str.encode, np.array)
    about = {"keras_version": text(version.split()[0]), "backend": text(backend)}
    written = config(version, middle)
    stack = written["config"] if version == "2.2.2" else written["config"]["layers"]
    if version != "2.2.4 Model":  # Sequential models do not count their input among their layers
        stack = [layer for layer in stack if layer["class_name"] != "InputLayer"]
    with h5py.File(WHOLE, "w") as whole, h5py.File(WEIGHTS, "w") as weights:
        whole.attrs.update(about, model_config=text(json.dumps(written)))
        whole.attrs["training_config"] = text(json.dumps(training_config(version, loss)))
        for group in (whole.create_group("model_weights"), weights):
            group.attrs.update(
                about, layer_names=listed([text(layer["config"]["name"]) for layer in stack])
            )
            for layer in stack:
                name, values = layer["config"]["name"], VALUES.get(layer["class_name"], {})
                values = {f"{name}/{part}:0": value for part, value in values.items()}
                group.create_group(name).attrs["weight_names"] = listed(
                    [text(part) for part in values]
                )
                for part, value in values.items():
                    group[name][part] = value
            if version == "2.15.0":
                group.create_group("top_level_model_weights").attrs["weight_names"] = []


# Weights ----


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("version", VERSIONS)
def test_load_weights_into_a_matching_network(version, middle):
    write(version, middle)
    for path in (WHOLE, WEIGHTS):
        model = network(middle)
        assert not agrees(model, middle)
        model.load_weights(path)
        assert agrees(model, middle), path


def test_filters_that_keras_2_trained_on_theano_must_be_turned():
    write("2.2.4", backend="theano")
    model = network()
    model.load_weights(WEIGHTS)
    # Theano turns filters by 180°; Keras 3 says nothing.
    assert not agrees(model, turned=True)
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel[::-1, ::-1].copy(), bias])
    assert agrees(model, turned=True)


def test_a_name_that_ends_in_dot_weights_h5_means_another_format():
    write("2.2.4")
    Path(WEIGHTS).rename("my.weights.h5")
    model = network()
    with pytest.raises(
        ValueError, match="expected 2 variables, but received 0 variables during loading"
    ):
        model.load_weights("my.weights.h5")
    Path("my.weights.h5").rename("my_weights.h5")
    model.load_weights("my_weights.h5")
    assert agrees(model)


def test_the_checkpoint_refuses_such_a_file_and_leaves_it():
    write("2.4.0")
    Path("run").mkdir()
    kept = Path(WHOLE).rename("run/saved_model.hdf5")
    before = kept.read_bytes()
    model = network()
    model.compile("sgd", "categorical_crossentropy")
    with pytest.raises(
        ValueError,
        match="(?s)nothing was changed.*saved_model.hdf5: its checksum is missing or wrong",
    ):
        ResumableCheckpoint("run").restore(model)
    assert (
        kept.read_bytes() == before and list(Path("run").iterdir()) == [kept] and not agrees(model)
    )


# Whole models ----


@pytest.mark.parametrize(
    "version, middle",
    [*((version, None) for version in OPENED), *(("2.2.4 Model", middle) for middle in GROUPED)],
)
def test_load_model_without_compiling(version, middle):
    write(version, middle)
    assert agrees(keras.models.load_model(WHOLE, compile=False), middle)


REFUSED = [
    ("2.2.2", None, TypeError, "pop expected at most 1 argument, got 2"),
    ("2.2.4", None, ValueError, "Kernel shape must have the same length as input"),
    *(
        (
            version,
            middle,
            TypeError,
            f"Unrecognized keyword arguments passed to {middle}: {{'groups': 1",
        )
        for version in ("2.4.0", "2.15.0")
        for middle in GROUPED
    ),
    *(
        (version, "Lambda", ValueError, "Requested the deserialization of a `Lambda` layer")
        for version in OPENED
    ),
]


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("version, middle, error, message", REFUSED)
def test_load_model_refuses_the_architecture(version, middle, error, message, compile):
    write(version, middle)
    with pytest.raises(error, match=message):
        keras.models.load_model(WHOLE, compile=compile)


def test_a_lambda_needs_trust_and_the_python_that_wrote_it():
    for version in OPENED:
        write(version, "Lambda")
        if version == "2.15.0":
            assert agrees(keras.models.load_model(WHOLE, compile=False, safe_mode=False), "Lambda")
        else:
            with pytest.raises(
                (ValueError, EOFError), match="bad marshal data|EOF read where object expected"
            ):
                keras.models.load_model(WHOLE, compile=False, safe_mode=False)


CROSSENTROPY = {
    "reduction": "auto",
    "name": "categorical_crossentropy",
    "from_logits": False,
    "label_smoothing": 0.1,
}
UNCOMPILED = [
    (
        "2.2.4 Model",
        "categorical_crossentropy",
        ValueError,
        r"Argument\(s\) not recognized: {'lr': 0.05}",
    ),
    (
        "2.4.0",
        CROSSENTROPY,
        ValueError,
        "Invalid value for argument `reduction`.*Received: reduction=auto",
    ),
    (
        "2.15.0",
        CROSSENTROPY | {"axis": -1, "fn": "c"},
        TypeError,
        "got an unexpected keyword argument 'fn'",
    ),
    *(
        (version, "mse", ValueError, "Could not deserialize 'keras.metrics.mse'")
        for version in ("2.4.0", "2.15.0")
    ),
    *(
        (version, loss, TypeError, "string indices must be integers")
        for version in ("2.4.0", "2.15.0")
        for loss in (
            "cosine_proximity",
            "my_loss",
        )  # one that Keras has dropped, and one of the user's own
    ),
]


@pytest.mark.parametrize("version, loss, error, message", UNCOMPILED)
def test_load_model_refuses_how_the_model_was_compiled(version, loss, error, message):
    write(
        version,
        loss={"class_name": "CategoricalCrossentropy", "config": loss}
        if isinstance(loss, dict)
        else loss,
    )
    with pytest.raises(error, match=message):
        keras.models.load_model(WHOLE)
    model = network()
    model.load_weights(WHOLE)
    assert agrees(model) and agrees(keras.models.load_model(WHOLE, compile=False))


def test_a_loss_of_ones_own_can_be_passed():
    write("2.4.0", loss="my_loss")
    model = keras.models.load_model(
        WHOLE, custom_objects={"my_loss": keras.losses.mean_squared_error}
    )
    assert model.loss is keras.losses.mean_squared_error and agrees(model)


def test_compiled_by_tensorflow_2_3_it_is_usable():
    write("2.4.0")
    with pytest.warns(UserWarning, match="`decay` is no longer supported"):
        model = keras.models.load_model(WHOLE)
    assert agrees(model) and float(model.optimizer.learning_rate) == pytest.approx(0.05)
    assert (
        model.optimizer.momentum == 0.9
        and np.isfinite(model.evaluate(IMAGES, LABELS, verbose=0)).all()
    )


def test_compiled_by_tensorflow_2_15_it_must_be_compiled_again():
    write("2.15.0")
    model = keras.models.load_model(WHOLE)
    assert agrees(model)
    # The optimizer has Keras's default settings instead of the saved ones, without a word.
    assert (
        float(model.optimizer.learning_rate) == pytest.approx(0.01)
        and model.optimizer.momentum == 0
    )
    with pytest.raises(
        (TypeError, ValueError), match="'str' object is not callable|to be metric objects"
    ):
        model.evaluate(IMAGES, LABELS, verbose=0)
    model.compile(keras.optimizers.SGD(0.05), "categorical_crossentropy", metrics=["accuracy"])
    loss, accuracy = model.evaluate(IMAGES, LABELS, verbose=0)
    assert loss == pytest.approx(-np.log(expected()[LABELS == 1]).mean(), abs=1e-5)
    assert accuracy == pytest.approx((expected().argmax(1) == LABELS.argmax(1)).mean())


def test_keras_3_writes_batch_shape_and_opens_both_spellings():
    write("2.4.0")
    model = network()
    model.load_weights(WHOLE)
    model.save("new.h5")
    with h5py.File("new.h5") as new, h5py.File(WHOLE) as old:
        spelled = [str(file.attrs["model_config"]) for file in (new, old)]
    assert ['"batch_shape"' in text for text in spelled] == [True, False]
    assert ['"batch_input_shape"' in text for text in spelled] == [False, True]
    for path in ("new.h5", WHOLE):
        again = network()
        again.load_weights(path)
        assert agrees(again) and agrees(keras.models.load_model(path, compile=False))
