"""The forward pass against NumPy, and the initial weights against their distribution."""

import json
import math

import numpy as np
import pytest
import torch

from model.config import FOLDER, ConfigError, ModelConfig, names, read_config
from model.dlrm import DLRM
from tests.model.helpers import SIZES, random_batches, small_config


def relu_mlp(x, layers, last_relu):
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        if last_relu or i + 1 < len(layers):
            x = np.maximum(x, 0)
    return x


def layers_of(module):
    linears = [layer for layer in module if hasattr(layer, "weight")]
    return [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in linears]


def expected_logits(model, batch):
    """Straight from the definition, one row at a time, in float64."""
    tables = [table.double().numpy() for table in model.embedding.tables()]
    config, logits = model.config, []
    for dense, ids in zip(batch.dense.double().numpy(), batch.sparse.numpy(), strict=True):
        bottom = relu_mlp(dense, layers_of(model.bottom), True)
        z = [bottom] + [table[i] for table, i in zip(tables, ids, strict=True)]
        if config.interaction_op == "dot":
            offset = 1 if config.self_interaction else 0
            dots = [z[i] @ z[j] for i in range(len(z)) for j in range(i + offset)]
            features = np.concatenate([bottom, dots, [0.0]])
        else:
            features = np.concatenate(z)
        logits.append(relu_mlp(features, layers_of(model.top), False)[0])
    return logits


@pytest.mark.parametrize(
    "changes", [{}, {"self_interaction": True}, {"interaction_op": "cat"}], ids=["dot", "self", "cat"]
)
@pytest.mark.parametrize("rows", [1, 9])
def test_forward_is_the_definition(changes, rows):
    model = DLRM(small_config(**changes))
    (batch,) = random_batches(1, rows)
    logits = model(batch.dense, batch.sparse)
    assert logits.shape == (rows,) and logits.dtype == torch.float32
    np.testing.assert_allclose(logits.detach().numpy(), expected_logits(model, batch), rtol=2e-5, atol=2e-6)


def test_hashed_indices_wrap_around():
    (batch,) = random_batches(1, 20)
    model = DLRM(small_config(hash_indices=True))
    beyond = batch.sparse + torch.tensor(SIZES) * 7
    assert torch.equal(model(batch.dense, beyond.int()), model(batch.dense, batch.sparse))


def test_initial_weights_have_their_distribution():
    torch.manual_seed(0)
    model = DLRM(small_config(bottom_mlp_sizes=(400, 8), categorical_feature_sizes=(10_000, 4)))
    first = model.bottom[0]
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / 413), rel=0.05)
    assert first.bias.std().item() == pytest.approx(math.sqrt(1 / 400), rel=0.15)
    for table in model.embedding.tables():
        bound = len(table) ** -0.5
        assert table.abs().max() <= bound
        assert table.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)


@pytest.mark.parametrize("name", names())
def test_shipped_configurations_read(name):
    config, path = read_config(name)
    assert path == FOLDER / f"{name}.json" and len(config.categorical_feature_sizes) == 26
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json())), "here") == config


def test_sums_of_rows_are_those_of_the_field():
    sums = {name: sum(read_config(name)[0].categorical_feature_sizes) for name in names()}
    assert sums["official_config"] == 4_057_300
    assert sums["mlperf_40m.limit"] == 187_767_399
    assert sums["mlperf_10m.limit"] == 53_566_692


def test_configurations_are_found_by_other_repositories_paths(tmp_path):
    assert read_config("dlrm/config/official_config.json")[1] == FOLDER / "official_config.json"
    mine = tmp_path / "official_config.json"
    mine.write_text(json.dumps(small_config().to_json()))
    assert read_config(str(mine)) == (small_config(), mine)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object of keys and values"),
        ('{"embedding_dimension": 3}', "embedding_dimension: no such key; did you mean embedding_dim"),
        ('{"embedding_dim": 8}', "missing"),
        (json.dumps(small_config().to_json() | {"embedding_dim": 9}), "expected embedding_dim, 9"),
        (json.dumps(small_config().to_json() | {"top_mlp_sizes": [4, 2]}), "expected 1, the logit"),
        (json.dumps(small_config().to_json() | {"interaction_op": "dots"}), "expected one of dot, cat"),
        (json.dumps(small_config().to_json() | {"categorical_feature_sizes": [0]}), "whole numbers from 1"),
        (json.dumps(small_config().to_json() | {"categorical_feature_sizes": [2**31]}), "to 2147483647"),
        (json.dumps(small_config().to_json() | {"categorical_feature_sizes": [3, True]}), "a valid integer, got True"),
        (json.dumps(small_config().to_json() | {"self_interaction": "false"}), "a valid boolean, got 'false'"),
        (json.dumps(small_config().to_json() | {"num_numerical_features": "13"}), "a valid integer, got '13'"),
        (json.dumps(small_config().to_json() | {"num_numerical_features": 13.0}), "a valid integer, got 13.0"),
        (json.dumps(small_config().to_json() | {"embedding_dim": 0}), "embedding_dim: expected 1 to"),
        (json.dumps(small_config().to_json())[:-1] + ', "embedding_dim": 4}', "'embedding_dim' is there twice"),
    ],
)
def test_bad_configurations(tmp_path, text, words):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config(str(path))


def test_unknown_configuration_names_the_known_ones():
    with pytest.raises(ConfigError, match="official_config"):
        read_config("dlrm/config/nothing.json")
