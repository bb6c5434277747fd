"""The client's helpers for libraries that the service does not need: each is run with the real library, and what it
makes is computed by ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.integrations.environments import REPOSITORY, environment

SKLEARN = """
import numpy as np, pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from anneal_client import ConversionFailed
from anneal_client.exporting import from_sklearn
import onnxruntime as ort

rng = np.random.default_rng(0)
X = rng.normal(size=(200, 5)).astype(np.float32)
y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0)
pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
made = from_sklearn(pipeline, X[:20], name="risk")
assert made.path.name == "risk.onnx" and made.difference < 1e-3, made
session = ort.InferenceSession(str(made.path))
assert [i.name for i in session.get_inputs()] == ["X"]
assert [o.name for o in session.get_outputs()] == ["label", "probabilities"]
assert session.run(None, {"X": X[:7]})[1].shape == (7, 3)
from_sklearn(RandomForestClassifier(10, random_state=0).fit(X, y), X[:20])
from_sklearn(LinearRegression().fit(X, X[:, 0]), X[:20])
from_sklearn(make_pipeline(StandardScaler()).fit(X), X[:20])
text = from_sklearn(LogisticRegression().fit(X, np.where(y > 0, "yes", "no")), X[:20])
assert text.difference is not None
frame = pd.DataFrame({"age": X[:, 0], "city": np.where(y > 0, "Ulm", "Bonn")})
columns = ColumnTransformer([("a", StandardScaler(), ["age"]), ("c", OneHotEncoder(), ["city"])])
mixed = from_sklearn(make_pipeline(columns, LogisticRegression()).fit(frame, y), frame[:20])
assert [i.name for i in ort.InferenceSession(str(mixed.path)).get_inputs()] == ["age", "city"]

class Own(LinearRegression):
    pass

try:
    from_sklearn(Own().fit(X, X[:, 0]), X[:2])
except ConversionFailed as refused:
    assert "Own" in refused.detail, refused
else:
    raise AssertionError
"""

XGBOOST = """
import numpy as np, xgboost
from anneal_client.exporting import from_xgboost

rng = np.random.default_rng(0)
X = rng.normal(size=(300, 6)).astype(np.float32)
y = (X[:, 0] + X[:, 1] > 0).astype(int)
classifier, regressor = xgboost.XGBClassifier(n_estimators=8), xgboost.XGBRegressor(n_estimators=8)
for model, target in ((classifier, y), (classifier, y + (X[:, 2] > 0)), (regressor, X[:, 0] * 2)):
    made = from_xgboost(model.fit(X, target), X[:50])
    assert made.difference < 1e-3, made
"""

HUGGINGFACE = """
import json, sys
from pathlib import Path
import torch, transformers
import onnxruntime as ort
from anneal_client import ConversionFailed
from anneal_client.exporting import from_huggingface

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=64, max_position_embeddings=64, num_labels=3)
bert = transformers.BertForSequenceClassification(config).eval()
bert.save_pretrained(folder / "bert")
vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrst", *("##" + c for c in "abcdefghij")]
(folder / "vocab.txt").write_text("\\n".join(vocabulary))
transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
made = from_huggingface(folder / "bert")
assert made.path.name == "bert.onnx" and made.difference < 1e-3, made
session = ort.InferenceSession(str(made.path))
assert {i.name: i.shape for i in session.get_inputs()}["input_ids"] == ["batch", "sequence"], session.get_inputs()
assert {i.name for i in session.get_inputs()} >= {"input_ids", "attention_mask"}
assert [o.name for o in session.get_outputs()] == ["logits"]
feeds = {i.name: torch.ones(5, 9, dtype=torch.int64) for i in session.get_inputs()}
with torch.no_grad():
    wanted = bert(**feeds).logits
(found,) = session.run(None, {n: t.numpy() for n, t in feeds.items()})
assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)

vit = transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=32, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, num_labels=4)).eval()
pictures = from_huggingface(vit, format="pt2")
assert pictures.path.suffix == ".pt2" and pictures.difference < 1e-3

config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)
gpt = transformers.GPT2LMHeadModel(config)
gpt.save_pretrained(folder / "gpt")
text = from_huggingface(folder / "gpt")
assert text.difference < 1e-3, text
try:
    from_huggingface("bert-base-uncased")
except ConversionFailed as refused:
    assert refused.code == "no_huggingface_folder"
else:
    raise AssertionError
"""

TABLES = """
import sys
from pathlib import Path
import datasets, numpy as np, pandas as pd
from PIL import Image
from anneal_client import ConversionFailed
from anneal_client.data import from_dataset, from_pandas, from_pictures

def read(made):
    return dict(np.load(made.path))

frame = pd.DataFrame({"age": [1, 2, 3], "income": [1.5, 2.5, None], "city": ["a", "b", "a"], "bought": [0, 1, 0]})
one = read(from_pandas(frame[["age", "income", "bought"]], labels="bought"))
assert one["X"].shape == (3, 2) and one["X"].dtype == np.float32 and one["labels"].tolist() == [0, 1, 0]
two = read(from_pandas(frame, {"a": "age", "both": ["age", "income"]}))
assert two["a"].shape == (3, 1) and two["both"].shape == (3, 2)
for columns, words in ((None, "city"), (["ago"], "no column 'ago'")):
    try:
        from_pandas(frame, columns)
    except ConversionFailed as refused:
        assert words in refused.detail, refused
    else:
        raise AssertionError

rows = datasets.Dataset.from_dict({"ids": [[1, 2], [3, 4, 5], [6]], "label": [0, 1, 0]})
padded = read(from_dataset(rows, {"input_ids": "ids"}, labels="label", pad={"input_ids": 0}))
assert padded["input_ids"].tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
stream = rows.to_iterable_dataset()
longer = read(from_dataset(stream, ["n"], transform=lambda b: {"n": [[len(i)] for i in b["ids"]]}))
assert longer["n"].tolist() == [[2], [3], [1]]
seen = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), (c, 0, 0)) for c in (1, 2)]})
assert read(from_dataset(seen, {"x": "image"}))["x"].shape == (2, 4, 4, 3)

folder = Path(sys.argv[1])
for number in range(6):
    kind = folder / "pictures" / ("cat", "dog")[number % 2]
    kind.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + number, 20), (number * 10, 0, 255)).save(kind / f"{number}.png")
made = from_pictures(folder / "pictures", "image", (8, 8), mean=[0.5] * 3, std=[0.5] * 3, max_samples=4)
arrays = read(made)
assert made.path.name == "pictures.npz"
assert arrays["image"].shape == (4, 3, 8, 8) and arrays["labels"].tolist() == [0, 1, 0, 1]
assert np.allclose(arrays["image"][1, :, 0, 0], [(10 / 255 - 0.5) / 0.5, -1, 1], atol=1e-5)
plain = read(from_pictures(folder / "pictures" / "dog", "image", (8, 8), layout="NHWC", mode="L", scale=1.0))
assert plain["image"].shape == (3, 8, 8, 1) and "labels" not in plain
free = from_pictures(folder / "pictures" / "dog", "image", transform=lambda picture: np.asarray(picture, np.uint8))
assert free.samples == 3 and free.path.is_dir(), "a shard for each size"
(folder / "pictures" / "cat" / "broken.png").write_bytes(b"no picture")
try:
    from_pictures(folder / "pictures", "image", (8, 8))
except ConversionFailed as refused:
    assert "broken.png" in refused.detail
else:
    raise AssertionError
"""


TENSORFLOW = """
import sys
import numpy as np, tensorflow as tf
import onnxruntime as ort
from anneal_client import ConversionFailed
from anneal_client.exporting import from_tensorflow

def named(made):
    session = ort.InferenceSession(str(made.path))
    return [[(v.name, v.shape) for v in values] for values in (session.get_inputs(), session.get_outputs())]

layers = tf.keras.layers
x = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
net = [tf.keras.Input((16, 16, 3), name="x"), layers.Conv2D(4, 3, activation="relu"), layers.BatchNormalization()]
one = from_tensorflow(tf.keras.Sequential([*net, layers.GlobalAveragePooling2D(), layers.Dense(3)], name="net"), x)
assert one.path.name == "net.onnx" and one.difference < 1e-3, one
assert named(one) == [[("x", ["batch", 16, 16, 3])], [("output", ["batch", 3])]], named(one)

a, b = tf.keras.Input((4,), name="a"), tf.keras.Input((4,), name="b")
both = layers.Concatenate()([a, b])
two = tf.keras.Model([a, b], {"z": layers.Dense(2)(both), "m": layers.Dense(1, activation="tanh")(both)})
rows = {"a": x[:, 0, 0, :1].repeat(4, 1), "b": x[:, 1, 1, 1:2].repeat(4, 1)}
made = from_tensorflow(two, rows)
assert [n for n, _ in named(made)[0]] == ["a", "b"] and {n for n, _ in named(made)[1]} == {"z", "m"}, named(made)
assert made.difference < 1e-3

class Saved(tf.Module):
    def __init__(self):
        self.w = tf.Variable(np.eye(8, 2, dtype=np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None, 8], tf.float32, name="x")])
    def __call__(self, x):
        return {"y": tf.nn.softmax(x @ self.w)}

saved = Saved()
tf.saved_model.save(saved, sys.argv[1] + "/saved", signatures={"serving_default": saved.__call__})
again = from_tensorflow(sys.argv[1] + "/saved", x.reshape(-1, 8))
assert again.difference < 1e-3 and named(again)[1] == [("y", ["batch", 2])], again
wide = np.zeros((2, 9), np.float32)
for model, example, code in ((two, {"a": rows["a"]}, "wrong_inputs"), (saved, wide, "export_failed")):
    try:
        from_tensorflow(model, example)
    except ConversionFailed as refused:
        assert refused.code == code, refused
    else:
        raise AssertionError(code)
"""


@pytest.mark.parametrize("script", [SKLEARN, XGBOOST, HUGGINGFACE, TABLES], ids=["sklearn", "xgboost", "hf", "tables"])
def test_made_with_the_real_library(script: str, tmp_path: Path) -> None:
    base = sysconfig.get_paths()["purelib"]  # torch, onnx and scikit-learn are those of the service's tests
    (locked,) = environment("client-conversions").glob("lib/python3*/site-packages")
    run(sys.executable, script, tmp_path, [base, str(locked)])


def test_made_of_keras_and_tensorflow(tmp_path: Path) -> None:
    """In an environment of its own: TensorFlow's protobuf is not everybody's."""
    run(str(environment("client-tensorflow") / "bin" / "python"), TENSORFLOW, tmp_path, [])


def run(python: str, script: str, tmp_path: Path, libraries: list[str]) -> None:
    path = os.pathsep.join([str(REPOSITORY / "clients" / "python"), *libraries])
    environ = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [python, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
