"""What needs a GPU: float16 with the compiled passes, masks drawn there, plans within a cap."""

from functools import partial

import pytest
import torch
from lora_models import gradients, lora_model, save_random
from torch.nn.functional import cross_entropy
from transformers import MistralConfig

from qlora_helpers.fast.dropout import masks_of
from qlora_helpers.fast.kernels import drop, keep_mask, mix
from qlora_helpers.fast.lora import fuse_lora
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.fast.plan import checkpoint_layers, plan_encoded
from qlora_helpers.scoring import label_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROWS = [[(7 * i + j) % 64 for j in range(3 + 5 * i)] for i in range(8)]
LENGTHS = list(map(len, ROWS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    choices = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    folder = tmp_path_factory.mktemp("model")
    return save_random(MistralConfig, folder, torch.float16, **choices)


def fused_model(checkpoint, dropout):
    model = fuse_lora(lora_model(checkpoint, dropout, torch.float16))
    use_packed_attention(model.get_base_model())
    return model


def alone(model) -> torch.Tensor:
    rows = [torch.tensor([row]).cuda() for row in ROWS]
    return torch.cat([model(row).logits[:, -1].float() for row in rows])


def packed(model) -> torch.Tensor:
    return label_logits(model, ROWS, list(range(64)))


def step(model, logits=packed, seed=0) -> dict[str, torch.Tensor]:
    """Scaled gradients, as under the Trainer's autocast."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cuda", torch.float16):
        loss = cross_entropy(logits(model), torch.arange(8).cuda())
    (loss * 1024).backward()
    return gradients(model)


def test_float16_gradients_are_those_of_pefts_own_layers_row_by_row(checkpoint):
    expected = step(lora_model(checkpoint, 0.0, torch.float16), alone)
    found = step(fused_model(checkpoint, 0.0))
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.02 * expected[name].norm(), name


def test_checkpointing_replays_the_masks(checkpoint):
    model = fused_model(checkpoint, 0.3)
    expected, other = step(model, seed=3), step(model, seed=4)
    checkpoint_layers(model, 2)
    found = step(model, seed=3)
    for name in expected:
        assert not torch.equal(other[name], expected[name])
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_mask_on_the_gpu_is_that_on_the_cpu(dtype):
    for tokens, width, rate in ((1024, 4096, 0.05), (37, 14336, 0.05), (1024, 256, 0.5)):
        keys = mix(torch.arange(tokens, dtype=torch.int32)) + (2**31 - 1)
        ones = torch.ones(tokens, width, device="cuda", dtype=dtype)
        expected = keep_mask(torch.empty(tokens, width, dtype=dtype), rate, keys)
        for found in (keep_mask(ones, rate, keys.cuda()), drop(ones, rate, keys.cuda())):
            assert found.dtype == dtype and torch.equal(found.cpu(), expected)


def test_no_cut_of_a_batch_changes_its_gradients_beyond_float16s_error(checkpoint):
    """As far as cuts move them without dropout, and not as far as other masks do."""

    def whole_step(dropout, cut, checkpointed, seed=3):
        """The loss of 8 rows, and all gradients as one vector."""
        model = fused_model(checkpoint, dropout)
        checkpoint_layers(model, checkpointed)
        total = 0.0
        for i in range(0, 8, cut):
            part = slice(i, i + cut)
            with masks_of([42, seed], range(8)[part], LENGTHS[part], model.device):
                logits = label_logits(model, ROWS[part], list(range(64)))
                loss = cross_entropy(logits, torch.arange(8).cuda()[part], reduction="sum") / 8
                (loss * 1024).backward()
            total += loss.item()
        return total, torch.cat([p.flatten() / 1024 for p in gradients(model).values()])

    def change(one, other):
        return abs(one[0] - other[0]), ((one[1] - other[1]).norm() / other[1].norm()).item()

    for dropout in (0.05, 0.5):
        whole, exact = whole_step(dropout, 8, 0), whole_step(0.0, 8, 0)
        moved = change(whole_step(dropout, 8, 0, seed=4), whole)
        for plan in ((4, 0), (2, 1), (1, 2), (8, 2)):
            error = change(whole_step(0.0, *plan), exact)
            found = change(whole_step(dropout, *plan), whole)
            assert found[0] <= 4 * error[0] + 2e-3 and found[1] <= 4 * error[1] + 2e-3
            assert found[1] < moved[1] / 5


def test_a_plan_fits_the_memory_it_is_given(checkpoint):
    """Caps at which nothing, a part, and all of the activations fit."""
    model = fused_model(checkpoint, 0.05)
    rows, logits = [[1] * (2000 - 10 * i) for i in range(16)], partial(label_logits, model)
    total, seen = torch.cuda.get_device_properties(0).total_memory, set()
    try:
        for gib in (8.0, 1.0, 0.6, 0.4):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
            plan = plan_encoded(model, rows, partial(logits, label_ids=[1, 2, 3, 4]), 16)
            assert plan.peak_gib <= 0.9 * gib
            longest = rows[: plan.micro_batch_size]
            checkpoint_layers(model, plan.checkpointed_layers(2, sum(map(len, longest))))
            logits(longest, [1, 2, 3, 4]).sum().backward()
            model.zero_grad(set_to_none=True)
            seen.add((plan.micro_batch_size, plan.kept_activations))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(seen) >= 3
