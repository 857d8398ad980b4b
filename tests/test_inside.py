"""What a model goes by: occlusion, what excites a filter, PredictionPlotter. And that looking changes nothing."""

import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import CLASSES
from keras import layers
from matplotlib.colors import LinearSegmentedColormap

from visual_callbacks import (
    AccLossPlotter,
    ConfusionMatrixPlotter,
    PredictionPlotter,
    occlusion_map,
    plot_images,
    plot_predictions,
    strongest_patches,
)


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def images(count=6, side=16):
    return np.random.default_rng(0).random((count, side, side, 3)).astype("float32")


def bright_corner():
    """A model that says "bee" if the upper right quarter of an image is bright, by logits; else "ant"."""
    weights = np.zeros((16, 16, 3, 1), "float32")
    weights[:8, 8:] = 0.05
    inputs = keras.Input((16, 16, 3))
    score = layers.Conv2D(1, 16, use_bias=False, name="corner")(inputs)
    logits = layers.Dense(3)(layers.Flatten()(score))
    model = keras.Model(inputs, logits)
    model.get_layer("corner").set_weights([weights])
    model.layers[-1].set_weights(
        [np.array([[-1.0, 1.0, 0.0]], "float32"), np.array([4.0, -4.0, -9.0], "float32")]
    )
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), run_eagerly=True)
    return model


@pytest.mark.stack
def test_the_evidence_lies_where_it_is():
    x = np.full((2, 16, 16, 3), 0.2, "float32")
    x[0, :8, 8:] = 1
    model = bright_corner()
    evidence = occlusion_map(model, x)
    assert evidence.shape == (2, 16, 16)
    assert evidence[0].argmax() in [
        row * 16 + column for row in range(8) for column in range(8, 16)
    ]
    assert evidence[0, :7, 9:].min() > 10 * np.abs(evidence[0, 8:, :8]).max()
    against = occlusion_map(model, x[:1], labels=[0], size=8)
    assert against.min() < -0.1  # what speaks for a bee speaks against an ant
    small = occlusion_map(model, x[:1], size=2, stride=2)
    assert small[0, :8, 8:].mean() > 0 and np.allclose(small[0, 8:], 0, atol=1e-6)


def test_each_of_several_devices_gets_as_many_images(monkeypatch):
    """What JAX asks for: here of seven devices, which no batch of ours happens to suit."""
    model, x = bright_corner(), images(3)
    expected = occlusion_map(model, x)
    mesh = SimpleNamespace(devices=np.zeros(7))
    distribution = SimpleNamespace(device_mesh=mesh)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: distribution)
    asked = []
    predict = model.predict

    def observed(given, batch_size, verbose):
        asked.extend([len(given), batch_size])
        return predict(given, batch_size=batch_size, verbose=verbose)

    model.predict = observed
    assert np.allclose(occlusion_map(model, x), expected, atol=1e-6)
    assert asked and all(number % 7 == 0 for number in asked)


@pytest.mark.parametrize("outputs", ["probability", "logit", "probabilities", "two"])
def test_all_kinds_of_outputs(outputs):
    inputs = keras.Input((8, 8, 3))
    x = layers.Flatten()(inputs)
    last = {
        "probability": layers.Dense(1, activation="sigmoid"),
        "logit": layers.Dense(1),
        "probabilities": layers.Dense(100, activation="softmax"),
        "two": layers.Dense(2),
    }[outputs]
    model = keras.Model(inputs, last(x))
    loss = keras.losses.BinaryCrossentropy(from_logits=outputs == "logit")
    model.compile(
        "sgd", loss if "prob" in outputs or outputs == "logit" else "mse", run_eagerly=True
    )
    evidence = occlusion_map(model, images(2, 8))
    assert (
        evidence.shape == (2, 8, 8) and np.abs(evidence).max() <= 1 and np.abs(evidence).max() > 0
    )
    names = [str(name) for name in range(100 if outputs == "probabilities" else 2)]
    plotter = PredictionPlotter(images(2, 8), [0, 1], names)
    plotter.set_model(model)
    plotter.on_train_begin()
    plotter.on_epoch_begin(0)
    plotter.on_epoch_end(0, {})
    (said,) = plotter._measured.epochs["predictions probabilities"].values()
    assert said.shape == (2, len(names)) and said.dtype == np.uint16
    assert np.allclose(said.sum(axis=1), 65535, atol=len(names))


# Strongest patches ----


def brightness(scale):
    """An uncompiled model whose one output is the image's mean, times a number."""
    image = keras.Input((16, 16, 1))
    mean = layers.GlobalAveragePooling2D()(image)
    return keras.Model(image, layers.Rescaling(scale)(mean))


def test_logits_are_told_from_probabilities_for_all_images_at_once():
    """One image alone could have probabilities; beside the other, its scores must be logits, too."""
    dim = np.zeros((16, 16, 1), "float32")
    dim[:4, :4] = 1
    bright = np.full((16, 16, 1), 3, "float32")
    both = np.stack([dim, bright])
    evidence = occlusion_map(brightness(2), both, [1, 1], size=4, stride=12)
    covered = dim.copy()
    covered[:4, :4] = both.mean()
    logits = 2 * dim.mean(), 2 * covered.mean()
    before, after = (1 / (1 + np.exp(-logit)) for logit in logits)
    assert np.isclose(evidence[0, 0, 0], before - after, atol=1e-5)


def test_a_square_that_moves_by_one_pixel_is_tried_in_every_place():
    """These are more copies than are predicted at once."""
    image = np.zeros((1, 16, 16, 1), "float32")
    image[0, 0, 0] = image[0, 15, 15] = 8
    evidence = occlusion_map(brightness(1), image, [1], size=3, stride=1)[0]
    grey = image.mean()
    fall = (8 - 9 * grey) / 256  # only one square covers each of these two pixels
    assert np.isclose(evidence[0, 0], fall) and np.isclose(evidence[15, 15], fall)
    assert evidence[8, 8] < 0  # there, the square makes the image brighter


def branched():
    """Convolutions with strides, padding, dilation and a branch: a field that no simple formula gives."""
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="first")(inputs)
    pooled = layers.MaxPooling2D(2, name="pooled")(x)
    side = layers.Conv2D(6, 3, padding="same", dilation_rate=2, name="wide")(pooled)
    x = layers.Add(name="sum")([pooled, side])
    x = layers.GlobalAveragePooling2D(name="whole")(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="answers")(x))


@pytest.mark.parametrize(
    "layer, size",
    [("first", 3), ("pooled", 4), ("wide", 12), ("sum", 12), ("whole", 16), ("answers", 16)],
)
def test_a_patch_is_as_large_as_what_the_layer_sees(layer, size):
    patches = strongest_patches(branched(), layer, images(20), channels=3, count=5)
    assert patches.shape == (3, 5, size, size, 3)


def test_a_patch_excites_its_channel_as_the_whole_image_does():
    """Cut out at the right place: the filter's value on the patch alone is the highest of all."""
    x = images(20)
    model = keras.Sequential(
        [keras.Input((16, 16, 3)), layers.Conv2D(6, 5, strides=2, name="first")]
    )
    patches = strongest_patches(model, model.layers[0], x, channels=[1, 4], count=20)
    kernel, bias = model.layers[0].get_weights()
    features = model.predict(x, verbose=0)
    for row, channel in enumerate((1, 4)):
        highest = np.sort(features[..., channel].reshape(20, -1).max(axis=1))[::-1]
        alone = (patches[row] * kernel[..., channel]).sum(axis=(1, 2, 3)) + bias[channel]
        assert np.allclose(alone, highest, atol=1e-5)


@pytest.mark.stack
def test_a_place_that_is_known_is_found():
    x = np.zeros((4, 16, 16, 3), "float32")
    for index, (row, column) in enumerate([(0, 0), (5, 9), (15, 15), (8, 3)]):
        x[index, row, column] = 1 + index
    inputs = keras.Input((16, 16, 3))
    spot = layers.Conv2D(1, 3, padding="same", use_bias=False, name="spot")
    model = keras.Sequential([inputs, spot])
    kernel = np.full((3, 3, 3, 1), 0.01, "float32")
    kernel[1, 1] = 1
    spot.set_weights([kernel])
    patches = strongest_patches(model, "spot", x, channels=[0], count=4)[0]
    assert patches.shape == (4, 3, 3, 3)
    assert [patch[1, 1, 0] for patch in patches] == [4, 3, 2, 1]
    assert patches.sum(axis=(1, 2, 3)).tolist() == [
        12,
        pytest.approx(9 + 15 * 3 / 256),
        6,
        pytest.approx(3 + 15 / 256),
    ]


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda m, x: strongest_patches(m, "no such layer", x), "layer"),
        (lambda m, x: strongest_patches(m, "first", x, channels=[6]), "channels"),
        (lambda m, x: strongest_patches(m, "first", x, channels=[]), "channels"),
        (lambda m, x: strongest_patches(m, "first", x, channels=0), "channels"),
        (lambda m, x: strongest_patches(m, "first", x, count=7), "count"),
        (lambda m, x: strongest_patches(m, "first", x[0]), "images"),
        (lambda m, x: occlusion_map(m, x[0]), "images"),
        (lambda m, x: occlusion_map(m, x[:0]), "images"),
        (lambda m, x: occlusion_map(m, x, labels=[3] * 6), "labels"),
        (lambda m, x: occlusion_map(m, x, size=17), "size"),
        (lambda m, x: occlusion_map(m, x, stride=0), "stride"),
        (lambda m, x: plot_predictions(x, np.ones((6, 2)), CLASSES), "probabilities"),
        (lambda m, x: plot_predictions(x, np.ones((6, 3)), CLASSES, [1] * 5), "labels"),
        (
            lambda m, x: plot_predictions(x, np.ones((6, 3)), CLASSES, evidence=np.ones((6, 4, 4))),
            "evidence",
        ),
        (lambda m, x: plot_predictions(x[0], np.ones((6, 3)), CLASSES), "images"),
        (lambda m, x: PredictionPlotter([], [], CLASSES), "images"),
        (lambda m, x: PredictionPlotter(x, [0, 1, 2, 0, 1, 3], CLASSES), "labels"),
        (lambda m, x: PredictionPlotter(x, [0, 1], CLASSES), "labels"),
        (lambda m, x: PredictionPlotter(images(13), [0] * 13, CLASSES), "images"),
        (lambda m, x: PredictionPlotter(x, [0] * 6, "ab"), "classes"),
        (lambda m, x: PredictionPlotter(x, [0] * 6, CLASSES, every=0), "every"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call(branched(), images())


# PredictionPlotter ----


def compiled(model=None):
    model = model or branched()
    model.compile(
        keras.optimizers.Adam(0.01),
        "categorical_crossentropy",
        run_eagerly=True,
        metrics=["accuracy"],
    )
    return model


def train(model, callbacks, epochs=2):
    labels = np.eye(3)[np.arange(6) % 3]
    return model.fit(
        images(),
        labels,
        2,
        epochs,
        verbose=0,
        callbacks=callbacks,
        validation_data=(images(), labels),
    )


@pytest.mark.stack
def test_it_shows_what_the_model_thinks(tmp_path):
    model = compiled()
    plotter = PredictionPlotter(images(), np.arange(6) % 3, CLASSES, title="Some")
    thought = []

    class Ask(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            thought.append(self.model.predict(images(), verbose=0))

    train(model, [Ask(), plotter])
    texts = [text.get_text() for text in plotter.figure.findobj() if hasattr(text, "get_text")]
    assert "Some · epoch 2" in texts and (tmp_path / "predictions.png").exists()
    for index, probabilities in enumerate(thought[-1]):
        best = probabilities.argmax()
        mark = "✓" if best == index % 3 else "✗"
        assert f"{mark} {CLASSES[index % 3]}" in texts
        assert any(
            text.endswith("%") and abs(int(text[:-1]) - 100 * probabilities[best]) <= 1
            for text in texts
        )


def test_of_two_classes_nearly_as_probable_the_right_one_is_marked_right(monkeypatch):
    nearly = np.tile([0.4, 0.4001, 0.1999], (6, 1)).astype("float32")
    monkeypatch.setattr(
        "visual_callbacks._probabilities", lambda model, images: nearly[: len(images)]
    )
    plotter = PredictionPlotter(images(), [1] * 6, CLASSES)
    train(compiled(), [plotter], epochs=1)
    texts = [text.get_text() for text in plotter.figure.findobj() if hasattr(text, "get_text")]
    assert texts.count(f"✓ {CLASSES[1]}") == 6


@pytest.mark.parametrize("side", [(12, 16), (16, 12)])
def test_images_of_another_size_are_refused_before_training(side):
    began = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: began.append(epoch))
    other = np.zeros((6, *side, 3), "float32")
    with pytest.raises(ValueError, match="images: expected the shape that the model takes"):
        train(compiled(), [note, PredictionPlotter(other, [0] * 6, CLASSES)])
    with pytest.raises(ValueError, match="classes: 2 names, but the model has 3 outputs"):
        train(compiled(), [note, PredictionPlotter(images(), [0] * 6, CLASSES[:2])])
    assert not began


def test_images_that_are_not_square_and_of_any_range():
    inputs = keras.Input((8, 20, 1))
    model = compiled(
        keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(inputs)))
    )
    x = np.random.default_rng(0).normal(size=(6, 8, 20, 1)) * 50
    plotter = PredictionPlotter(x, [0] * 6, CLASSES)
    model.fit(x, np.eye(3)[[0] * 6], 2, verbose=0, callbacks=[plotter])
    assert plotter.figure is not None and occlusion_map(model, x).shape == (6, 8, 20)


def random_model():
    """Everything that draws at random, and states that a prediction changes."""
    inputs = keras.Input((16, 16, 3), batch_size=None)
    x = layers.RandomFlip()(inputs)
    x = layers.RandomTranslation(0.1, 0.1)(x)
    x = layers.GaussianNoise(0.1)(layers.Conv2D(4, 3)(x))
    x = layers.Dropout(0.3)(layers.BatchNormalization()(x))
    x = layers.Flatten()(x)
    return compiled(keras.Model(inputs, layers.Dense(3, activation="softmax")(Counts()(x))))


class Counts(layers.Layer):
    """Counts how often it is called, in a variable that is a weight."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, x):
        self.calls.assign(self.calls + 1)
        return x


@pytest.mark.stack
def test_looking_changes_nothing():
    """With and without plotters, training ends with the same bytes: weights, optimizer, seeds, history, randomness."""
    ends = []
    for look in (False, True):
        keras.utils.set_random_seed(3)
        model = random_model()
        plotters = []
        if look:
            plotters = [
                AccLossPlotter(verbose=0),
                ConfusionMatrixPlotter(images(), np.arange(6) % 3, CLASSES),
                PredictionPlotter(images(), np.arange(6) % 3, CLASSES),
            ]
        history = train(model, plotters, epochs=3)
        variables = [*model.variables, *model.optimizer.variables]
        values = [
            np.asarray(keras.ops.convert_to_numpy(variable)).tobytes() for variable in variables
        ]
        ends.append((values, history.history, np.random.rand()))
    assert ends[0] == ends[1]


def test_what_goes_wrong_while_looking_costs_no_training(monkeypatch):
    model = compiled()
    monkeypatch.setattr(type(model), "predict", lambda *_, **__: 1 / 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(model, [PredictionPlotter(images(), [0] * 6, CLASSES)])
    said = [
        str(warning.message)
        for warning in caught
        if "PredictionPlotter cannot draw" in str(warning.message)
    ]
    assert len(said) == 1 and history.epoch == [0, 1]


def test_a_colormap_that_only_the_user_knows_is_drawn_with():
    mine = LinearSegmentedColormap.from_list("mine", ["white", "green"])
    plotter = ConfusionMatrixPlotter(images(), np.arange(6) % 3, CLASSES, cmap=mine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(compiled(), [plotter])
    assert not [warning for warning in caught if "cannot draw" in str(warning.message)]
    assert plotter.figure.axes[0].images[0].get_cmap().name == "mine"


def test_two_plotters_of_curves_in_one_training_do_not_stop_each_other(monkeypatch):
    said = []
    monkeypatch.setattr(AccLossPlotter, "_say_that_it_stopped", said.append)
    train(compiled(), [AccLossPlotter(verbose=0), AccLossPlotter(verbose=0)])
    assert not said


# A grid of images ----


def test_a_grid_has_its_images_in_order_with_their_texts():
    colours = np.arange(7 * 4 * 4 * 3).reshape(7, 4, 4, 3) / 400
    titles, rows = [f"image {i}" for i in range(7)], ["first", "second", "third"]
    figure = plot_images(colours, titles, rows, columns=3, title="all of $them")
    assert [ax.get_title() for ax in figure.axes] == titles
    for ax, image in zip(figure.axes, colours):
        np.testing.assert_allclose(ax.images[0].get_array(), image)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert texts == rows and figure.texts[0].get_text() == "all of $them"
    corners = [ax.get_position().bounds[:2] for ax in figure.axes]
    assert corners[0][1] == corners[2][1] > corners[3][1] > corners[6][1]  # three in a row
    assert corners[0][0] == corners[3][0] == corners[6][0] < corners[1][0] < corners[2][0]


def test_colours_of_any_range_are_shown():
    for colours in (np.array([0.0, 127.5, 255.0]), np.array([-2.0, 0.0, 2.0])):
        (ax,) = plot_images(colours.reshape(1, 1, 1, 3)).axes
        np.testing.assert_allclose(ax.images[0].get_array()[0, 0], [0, 0.5, 1])
    dark = np.full((1, 2, 2, 3), 10, np.uint8)
    dark[0, 0, 0] = 2
    (ax,) = plot_images(dark).axes
    np.testing.assert_array_equal(ax.images[0].get_array(), dark[0])


def test_texts_of_a_grid_can_be_numbers():
    figure = plot_images(np.zeros((4, 8, 8)), titles=np.arange(4), rows=[5, 6], columns=2)
    assert [ax.get_title() for ax in figure.axes] == ["0", "1", "2", "3"]
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["5", "6"]


def test_a_grid_of_maps_has_one_scale_if_limits_are_given():
    maps = [np.full((3, 3), -1.0), np.full((5, 5), 2.0)]
    figure = plot_images(maps, limits=(-2, 2), cmap="RdBu")
    first, second, scale = figure.axes
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-2, 2)
    assert scale.get_ylim() == (-2, 2)
    figure = plot_images(maps)
    assert len(figure.axes) == 2  # each map has its own scale, so none is shown
    assert figure.axes[1].images[0].get_clim() != (-2, 2)
    figure = plot_images(maps, columns=np.int64(2), limits=np.array([-2, 2]))
    assert figure.axes[1].images[0].get_clim() == (-2, 2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"images": []}, "images"),
        ({"images": np.zeros((2, 3))}, "images"),
        ({"images": np.zeros((2, 3, 3, 2))}, "images"),
        ({"images": np.zeros((2, 3, 3)), "titles": ["one"]}, "titles"),
        ({"images": np.zeros((2, 3, 3)), "rows": ["one", "two"]}, "rows"),
        ({"images": np.zeros((2, 3, 3)), "columns": 0}, "columns"),
    ],
)
def test_wrong_arguments_of_a_grid_are_named(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        plot_images(**arguments)
