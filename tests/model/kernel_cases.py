"""Cases of test_kernels.py, each run in a process of its own: in Triton's interpreter, or on a GPU.

TRITON_INTERPRET=1 python -m tests.model.kernel_cases forward_and_backward
"""

import sys

import pytest
import torch

from bench import step_kernels
from gpu_etl.load.batch import log_dense
from model.config import ConfigError
from model.dlrm import DLRM
from model.kernels import lookup_interaction, update
from model.kernels.unpack import unpack
from model.layers import embedding, fused_lookup as fused
from model.layers.embedding import Storage
from model.layers.optimizers import Optimizer
from model.selfcheck.kernels import (
    DEVICE,
    INTERPRETED,
    TIMES,
    forward_and_backward,
    rounding,
    staging,
    unpacking,
    updates,
)
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model.helpers import random_batches, small_config

CASES = {"forward_and_backward": forward_and_backward, "updates": updates, "rounding": rounding, "staging": staging}
if INTERPRETED:
    embedding.on_gpu = fused.on_gpu = lambda tensor: True
    embedding._pinned = lambda weight, owner: weight


def records() -> None:
    """unpack against the loaders' columns."""
    unpacking()
    batch = torch.randint(0, 2**31 - 1, (16 * min(TIMES, 4096), 40), dtype=torch.int32, device=DEVICE)
    torch.testing.assert_close(unpack(batch)[0], log_dense(batch[:, 1:14].float()), rtol=2.4e-7, atol=0)


def refusals() -> None:
    """Shapes and types that the kernels cannot do are errors that say what was expected."""
    weight, bottom = torch.zeros(9, 12, device=DEVICE), torch.zeros(2, 12, device=DEVICE)
    ids, ones = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE), torch.ones((), device=DEVICE)
    scalars = "sgd", 0.0, (0.9, 0.999), ones, ones, ones.long()
    with pytest.raises(ValueError, match="multiple of 8, up to 512; got 3 tables of dim 12"):
        lookup_interaction.forward(bottom, ids, weight, False)
    with pytest.raises(ValueError, match=r"expected a contiguous tensor \[B, 16\], got \(2, 12\)"):
        lookup_interaction.forward(bottom, ids, weight.new_zeros(9, 16), False)
    with pytest.raises(ValueError, match="of one dim, a multiple of 8 up to 512; got 12 and 12"):
        update.update(weight, {}, ids[:, 0], bottom, *scalars)
    for records in (ids, torch.zeros(2, 40, device=DEVICE), torch.zeros(40, 40, dtype=torch.int32, device=DEVICE).T):
        with pytest.raises(ValueError, match=r"expected contiguous int32 \[B, 40\]"):
            unpack(records)
    with pytest.raises(ConfigError, match="multiple of 8, up to 512, and up to 64 tables; got 12 and 2"), DEVICE:
        embedding.JointEmbedding((3, 4), 12, False, Optimizer(), Storage(placement="host"))


def benchmark() -> None:
    """What the benchmark times is what it says."""
    config = small_config(categorical_feature_sizes=(30,) * 26, bottom_mlp_sizes=(64,), embedding_dim=64)
    for rule, weights in (("sgd", "bfloat16"), ("rowwise_adagrad", "float32")):
        calls = step_kernels.calls(config, 3, "bfloat16", weights, rule, DEVICE)
        assert calls.keys() == step_kernels.costs(step_kernels.draw_shape(config, 3, 4, 2), rule).keys()
        found = {name: call() for name, call in calls.items()}
        assert found["forward"].shape == (3, 64 + 27 * 26 // 2 + 1) and found["backward"][1].shape == (3 * 26, 64)
        assert [len(part) for part in found["unpack"]] == [3, 3, 3]
        assert INTERPRETED or step_kernels.seconds_taken(calls["step"]) > 0


def trained(fusing: bool, batches, precision, optimizer, storage, **changes):
    """Weights and losses after some steps; fusing: with the kernels."""
    torch.manual_seed(3)
    settings = Optimizer(optimizer)
    with DEVICE:
        model = DLRM(small_config(**changes), fusing, settings, storage)
    trainer = Trainer(model, Schedule(0.05), precision, settings, fused=False)  # not the CPU's own step
    losses = [trainer.step(batch).item() for batch in batches]
    scores = trainer.logits(batches[0]).detach()
    return losses, model.embedding.weight.detach().float().to(DEVICE), scores


def steps() -> None:
    """Whole training steps with the kernels against torch's own gradients."""
    rows, count = (9, 2) if INTERPRETED else (4097, 8)
    batches = [type(b)(*(t.to(DEVICE) for t in b)) for b in random_batches(count, rows, seed=5)]
    cases = [
        (Precision(), "sgd", {}, 1e-4), (Precision(torch.bfloat16), "sgd", {"self_interaction": True}, 0.02),
        (Precision(torch.float16, 64.0), "rowwise_adagrad", {"hash_indices": True}, 0.02),
        (Precision(), "adam", {"interaction_op": "cat"}, 1e-4), (Precision(), "adagrad", {}, 1e-3),
        (Precision(), "sgd", {"embedding_dim": 12, "bottom_mlp_sizes": (12,)}, 1e-4),  # no kernels for that
        (Precision(), "sgd", {"interaction_op": "dcnv2", "dcn_num_layers": 1, "dcn_low_rank_dim": 3}, 1e-4),
    ]  # fmt: skip
    for precision, optimizer, changes, tolerance in cases:
        ours = trained(True, batches, precision, optimizer, Storage(), **changes)
        theirs = trained(False, batches, precision, optimizer, Storage(), **changes)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)
        assert trained(True, batches, precision, optimizer, Storage(), **changes)[0] == ours[0]
    for changes in ({}, {"interaction_op": "cat"}):
        here, host = (
            trained(True, batches, Precision(), "sgd", Storage(torch.bfloat16, placement=place), **changes)
            for place in ("device", "host")
        )
        assert here[0] == host[0] and all(map(torch.equal, here[1:], host[1:]))


if __name__ == "__main__":
    torch.manual_seed(0)
    (CASES | globals())[sys.argv[1]]()
    print("agrees")
