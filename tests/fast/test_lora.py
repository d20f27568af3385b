"""Packed batches and `fuse_lora` against rows run one by one through PEFT's own layers."""

import copy

import pytest
import torch
from lora_models import gradients, lora_config, lora_model, save_random
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, MistralConfig

from qlora_helpers.fast.dropout import masks_of
from qlora_helpers.fast.groups import Adapter
from qlora_helpers.fast.lora import fuse_lora
from qlora_helpers.fast.packing import pack, use_packed_attention

ROWS = [[5, 3, 9, 40, 7, 11], [8, 2], [33, 21, 6, 6], [50]]
EITHER = pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "linear"])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=[LlamaConfig, MistralConfig], ids=["llama", "mistral"])
def checkpoint(request, tmp_path_factory):
    choices = {"hidden_size": 64, "intermediate_size": 192, "initializer_range": 0.2}
    return save_random(request.param, tmp_path_factory.mktemp("model"), **choices)


@pytest.fixture(autouse=True)
def no_torchao(monkeypatch):
    """For Colab's old torchao, which 01 says how to remove, PEFT refuses plain linear layers."""
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)


def logits(model, rows=ROWS) -> torch.Tensor:
    """(rows, vocabulary), at each row's last token, of `rows` as a packed batch."""
    base = model.get_base_model()
    use_packed_attention(base)
    packed = pack(rows, base.device)
    hidden = base.base_model(**packed, use_cache=False).last_hidden_state[0]
    return base.lm_head(hidden[packed["ends"]])


def logits_one_by_one(model) -> torch.Tensor:
    """The same by the library alone: each row a batch of its own."""
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    return torch.cat([base(torch.tensor([row], device=base.device)).logits[:, -1] for row in ROWS])


def loss_and_gradients(model, seed=0, logits=logits) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = cross_entropy(logits(model), torch.tensor([1, 2, 3, 4], device=model.device))
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def assert_same(found, expected, rtol=0.0, atol=0.0):
    assert found.keys() == expected.keys() and len(found) == 29
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


@EITHER
def test_a_packed_batch_gives_the_values_and_gradients_of_its_rows(checkpoint, nf4):
    model = lora_model(checkpoint, nf4=nf4)
    expected = loss_and_gradients(model, logits=logits_one_by_one)
    for found in (loss_and_gradients(model), loss_and_gradients(fuse_lora(model))):
        assert_same(found, expected, rtol=1e-3, atol=1e-5)


def test_in_float64_nothing_but_rounding_differs(checkpoint):
    model = lora_model(checkpoint, dtype=torch.float64, nf4=False)
    alone = logits_one_by_one(model).detach()
    expected = loss_and_gradients(model)
    fuse_lora(model)
    torch.testing.assert_close(logits(model).detach(), alone, rtol=1e-12, atol=1e-12)
    # The gradients of A and B are rounded to float32.
    assert_same(loss_and_gradients(model), expected, rtol=1e-6, atol=1e-9)


def test_half_precision_keeps_float32_gradients_no_further_off_than_pefts(checkpoint):
    exact = loss_and_gradients(lora_model(checkpoint))
    low = loss_and_gradients(lora_model(checkpoint, dtype=torch.bfloat16))
    fused = loss_and_gradients(fuse_lora(lora_model(checkpoint, dtype=torch.bfloat16)))
    del exact["loss"], fused["loss"]
    assert {gradient.dtype for gradient in fused.values()} == {torch.float32}

    def error(found):
        return sum((found[name] - exact[name]).square().sum() for name in exact).sqrt()

    assert error(fused) < 1.2 * error(low)


def test_gradients_with_dropout_are_those_of_pefts_own_layers(checkpoint):
    """Both paths draw the same masks."""
    model = fuse_lora(lora_model(checkpoint, 0.3))
    with masks_of([5, 1], range(len(ROWS)), list(map(len, ROWS)), model.device):
        found = loss_and_gradients(model)
        for module in model.modules():
            module.__dict__.pop("forward", None)
        expected = loss_and_gradients(model)
    assert_same(found, expected, rtol=1e-3, atol=1e-5)


def test_an_adapter_newer_than_the_fused_layers_has_its_dropout(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    model.add_adapter("later", lora_config(r=4, lora_dropout=0.5, init_lora_weights=False))
    model.set_adapter("later")
    for _ in range(2):
        first, second = (loss_and_gradients(model, seed)["loss"] for seed in (1, 2))
        assert first != second
        fuse_lora(model)


def test_checkpointing_replays_the_masks(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    expected = loss_and_gradients(model, seed=3)
    assert loss_and_gradients(model, seed=4)["loss"] != expected["loss"]
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(model, seed=3), expected)


def test_eval_has_no_dropout_and_an_evaluation_leaves_the_gradients_right(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    before = loss_and_gradients(model, seed=2)
    with torch.inference_mode():
        first, second = logits(model.eval()), logits(model)
    assert torch.equal(first, second)
    plain = lora_model(checkpoint, 0.3).eval()
    torch.testing.assert_close(first.clone(), logits(plain).detach(), **CLOSE)
    assert_same(loss_and_gradients(model.train(), seed=2), before)


@EITHER
def test_a_large_batch_without_gradients_adds_the_adapter_to_the_weights(
    checkpoint, nf4, monkeypatch
):
    expected = logits_one_by_one(lora_model(checkpoint, nf4=nf4).eval()).detach().repeat(16, 1)
    model, added, tuned = fuse_lora(lora_model(checkpoint, nf4=nf4)).eval(), [], Adapter.tuned

    def counted(adapter):
        added.append(adapter.group.sizes)
        return tuned(adapter)

    monkeypatch.setattr(Adapter, "tuned", counted)
    with torch.no_grad():
        first, second = logits(model, ROWS * 16), logits(model, ROWS * 16)
    # Four groups of the first layer, two of the last, whose MLP has but a token of each row.
    assert added == [[64, 32, 32], [64], [192, 192], [64], [64, 32, 32], [64]] * 2
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, **CLOSE)


def test_a_disabled_adapter_is_exactly_the_base_model(checkpoint):
    model = lora_model(checkpoint).eval()
    with torch.no_grad():
        with model.disable_adapter():
            base = logits(model)
        adapted = logits(model)
        fuse_lora(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        torch.testing.assert_close(logits(model), adapted, **CLOSE)
    assert (adapted - base).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_adapter_changes_no_bit_of_an_answer(checkpoint, dtype):
    """B is zero, and the model takes the same code with the adapter switched off and on."""
    model = fuse_lora(lora_model(checkpoint, dtype=dtype)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    for rows in (ROWS, ROWS[:1], ROWS * 16):
        with torch.no_grad():
            on = logits(model, rows)
            with model.disable_adapter():
                assert torch.equal(logits(model, rows), on)


def test_a_layer_may_have_its_adapter_off_alone(checkpoint):
    model = lora_model(checkpoint).eval()
    model.get_base_model().model.layers[0].mlp.down_proj.enable_adapters(False)
    expected = logits(model).detach()
    torch.testing.assert_close(logits(fuse_lora(model)).detach(), expected, **CLOSE)


def test_gradients_flow_through_a_switched_off_adapter(checkpoint):
    model = lora_model(checkpoint).eval()
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mlp = model.get_base_model().model.layers[0].mlp
    with model.disable_adapter():
        [expected] = torch.autograd.grad(mlp(x).square().sum(), x)
        fuse_lora(model)
        [found] = torch.autograd.grad(mlp(x).square().sum(), x)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_merged_layers_run_pefts_own_path(checkpoint):
    model = fuse_lora(lora_model(checkpoint, nf4=False)).eval()
    with torch.no_grad():
        adapted = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)


def test_what_is_not_a_packed_batch_runs_pefts_own_path(checkpoint):
    model, row = lora_model(checkpoint).eval(), torch.tensor([ROWS[0]])
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    named = dict(model.named_modules())
    layers = [named[name] for name in named if name.endswith(("q_proj", "v_proj", "up_proj"))]
    expected, alone = model(row).logits, [layer(x) for layer in layers]
    fuse_lora(model)
    torch.testing.assert_close(model(row).logits, expected, **CLOSE)
    torch.testing.assert_close([layer(x) for layer in layers], alone, **CLOSE)


def test_it_saves_the_inputs_and_rank_8_products_alone(checkpoint):
    def saved(model) -> float:
        """Numbers that one MLP keeps for backward, a token."""
        mlp = model.get_base_model().model.layers[0].mlp
        parameters, sizes = {p.data_ptr() for p in model.parameters()}, {}

        def note(t):
            if t.data_ptr() not in parameters:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = mlp(torch.ones(1, 1024, 64, requires_grad=True))
        assert out.requires_grad
        return sum(sizes.values()) / 1024 / 4

    weights = 2 * 16 * (64 + 2 * 192) / 1024  # A and B in the input's dtype
    fused = saved(fuse_lora(lora_model(checkpoint, 0.1)))
    assert fused < 64 + 2 * 192 + 16 + 8 + weights + 8
    assert saved(lora_model(checkpoint, 0.1)) > 2 * fused


def test_other_layers_are_left_alone(checkpoint):
    model = lora_model(checkpoint, target_modules=["q_proj", "v_proj", "down_proj"])
    expected = logits(model)
    assert torch.equal(logits(fuse_lora(model)), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    assert logits(copy.deepcopy(model)).shape == expected.shape


@pytest.mark.parametrize(
    "choices",
    [
        {"alpha_pattern": {"k_proj": 3, "up_proj": 5}},
        {"rank_pattern": {"v_proj": 4}},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=lambda choices: next(iter(choices)),
)
def test_what_is_not_one_plain_lora_gives_pefts_values(checkpoint, choices):
    model = lora_model(checkpoint, **choices).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(weight)
    expected = logits(model)
    torch.testing.assert_close(logits(fuse_lora(model)), expected, **CLOSE)
