"""Packed batches and fuse_lora against rows run one by one through PEFT's own layers: values, gradients, dropout, PEFT's switches."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MistralConfig

from qlora_helpers.fast.dropout import masks_of, use_row_dropout
from qlora_helpers.fast.groups import Group
from qlora_helpers.fast.lora import _linear, fuse_lora
from qlora_helpers.fast.packing import pack, use_packed_attention

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [[5, 3, 9, 40, 7, 11], [8, 2], [33, 21, 6, 6], [50]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[LlamaConfig, MistralConfig], ids=["llama", "mistral"])
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    config = request.param(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def lora_model(
    checkpoint, dropout=0.0, dtype=torch.float32, nf4=True, targets=ALL_LINEAR, **choices
) -> PeftModel:
    """A model with LoRA in training mode. A and B are random, neither zero: with B at zero half of the gradients would be."""
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=quantized if nf4 else None
    )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(1)
    model = get_peft_model(
        base,
        LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets, **choices),
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def logits(model, rows=ROWS) -> torch.Tensor:
    """(rows, vocabulary), at each row's last token, of `rows` as a packed batch."""
    base = model.get_base_model()
    use_packed_attention(base)
    packed = pack(rows, base.device)
    return base.lm_head(
        base.base_model(**packed, use_cache=False).last_hidden_state[0, packed["ends"]]
    )


def logits_one_by_one(model) -> torch.Tensor:
    """The same by the library alone: each row a batch of its own."""
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    return torch.cat([base(torch.tensor([row], device=base.device)).logits[:, -1] for row in ROWS])


def loss_and_gradients(
    model, seed=0, logits=logits
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = cross_entropy(logits(model).float(), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys() and len(found) == 28
    for name in expected:
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(
            found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "linear"])
def test_a_packed_batch_gives_the_values_and_gradients_of_its_rows(checkpoint, nf4):
    model = lora_model(checkpoint, nf4=nf4)
    expected = loss_and_gradients(model, logits=logits_one_by_one)
    for found in (loss_and_gradients(model), loss_and_gradients(fuse_lora(model))):
        torch.testing.assert_close(found[0], expected[0])
        assert_same(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_half_precision_keeps_float32_gradients_no_further_off_than_pefts(checkpoint):
    def error(model, exact):
        found = loss_and_gradients(model)[1]
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        return sum((found[name] - exact[name]).square().sum() for name in exact).sqrt()

    exact = loss_and_gradients(lora_model(checkpoint))[1]
    low, fused_low = (
        lora_model(checkpoint, dtype=torch.bfloat16),
        fuse_lora(lora_model(checkpoint, dtype=torch.bfloat16)),
    )
    assert error(fused_low, exact) < 1.2 * error(low, exact)


def test_gradients_with_dropout_are_those_of_pefts_own_layers(checkpoint):
    """Both paths draw the same masks."""
    model = fuse_lora(lora_model(checkpoint, 0.3))
    with masks_of([5, 1], range(len(ROWS)), list(map(len, ROWS)), model.device):
        found = loss_and_gradients(model)
        for module in model.modules():
            module.__dict__.pop("forward", None)
        expected = loss_and_gradients(model)
    torch.testing.assert_close(found[0], expected[0])
    assert_same(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_an_adapter_newer_than_the_fused_layers_has_its_dropout(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    later = LoraConfig(r=4, lora_dropout=0.5, target_modules=ALL_LINEAR, init_lora_weights=False)
    model.add_adapter("later", later)
    model.set_adapter("later")
    for _ in range(2):
        assert loss_and_gradients(model, seed=1)[0] != loss_and_gradients(model, seed=2)[0]
        fuse_lora(model)


def test_checkpointing_replays_the_masks(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    expected = loss_and_gradients(model, seed=3)
    other = loss_and_gradients(model, seed=4)
    assert not torch.equal(other[0], expected[0])
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = loss_and_gradients(model, seed=3)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert_same(found[1], expected[1], rtol=0, atol=0)


def test_dropout_is_unbiased(checkpoint):
    model = lora_model(checkpoint, 0.2)
    use_row_dropout(model)
    attention = model.get_base_model().model.layers[0].self_attn
    group, draws = Group([attention.q_proj, attention.k_proj, attention.v_proj]), 4000
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = _linear(group, group.adapter(), x.expand(draws, 64).contiguous())
        attention.eval()
        expected = _linear(group, group.adapter(), x[None])
    error = (found.mean(0) - expected[0]) / (found.std(0) / draws**0.5)  # in standard errors
    assert (
        found.std(0).min() > 1e-3 and error.abs().max() < 5.5 and error.square().mean().sqrt() < 1.5
    )


def test_eval_has_no_dropout_and_an_evaluation_leaves_the_gradients_right(checkpoint):
    model = fuse_lora(lora_model(checkpoint, 0.3))
    before = loss_and_gradients(model, seed=2)
    model.eval()
    with torch.inference_mode():
        first, second = logits(model), logits(model)
    plain = lora_model(checkpoint, 0.3).eval()
    assert torch.equal(first, second)
    torch.testing.assert_close(first.clone(), logits(plain).detach(), rtol=1e-4, atol=1e-4)
    after = loss_and_gradients(model.train(), seed=2)
    assert_same(after[1], before[1], rtol=0, atol=0)


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "linear"])
def test_a_large_batch_without_gradients_adds_the_adapter_to_a_copy_of_the_weights(
    checkpoint, nf4, monkeypatch
):
    expected = logits_one_by_one(lora_model(checkpoint, nf4=nf4).eval()).detach().repeat(16, 1)
    model, added = fuse_lora(lora_model(checkpoint, nf4=nf4)).eval(), []
    monkeypatch.setattr(
        Group,
        "tuned",
        lambda group, adapter, tuned=Group.tuned: (
            added.append(group.sizes) or tuned(group, adapter)
        ),
    )
    with torch.no_grad():
        first, second = logits(model, ROWS * 16), logits(model, ROWS * 16)
    # each time: four groups of the first layer, two of the last, whose MLP has but a token of each row
    assert added == [[64, 32, 32], [64], [192, 192], [64], [64, 32, 32], [64]] * 2
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


def test_a_disabled_adapter_is_exactly_the_base_model(checkpoint):
    model = lora_model(checkpoint).eval()
    with torch.no_grad():
        with model.disable_adapter():
            base = logits(model)
        adapted = logits(model)
        fuse_lora(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - base).abs().max() > 0.1


def test_a_fresh_adapter_changes_no_bit_of_an_answer(checkpoint):
    """B is zero, and the model takes the same code with the adapter switched off and on, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = lora_model(checkpoint, dtype=dtype).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(weight)
        fuse_lora(model)
        for rows in (ROWS, ROWS[:1], ROWS * 16):
            with torch.no_grad():
                on = logits(model, rows)
                with model.disable_adapter():
                    assert torch.equal(logits(model, rows), on)


def test_a_layer_whose_adapter_alone_is_off_runs_pefts_own_path(checkpoint):
    """The halves of an MLP are then in different states, which no fused product knows."""
    model = lora_model(checkpoint).eval()
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.down_proj.enable_adapters(False)
    expected = logits(model).detach()
    torch.testing.assert_close(logits(fuse_lora(model)).detach(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_switched_off_adapter(checkpoint):
    model = lora_model(checkpoint).eval()
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mlp = model.get_base_model().model.layers[0].mlp
    with model.disable_adapter():
        [expected] = torch.autograd.grad(mlp(x).square().sum(), x)
        fuse_lora(model)
        [found] = torch.autograd.grad(mlp(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_is_unchanged_and_loads_into_a_fused_model(checkpoint, tmp_path):
    model = lora_model(checkpoint)
    names = [name for name, _ in model.named_parameters()]
    fuse_lora(model).save_pretrained(tmp_path)
    assert [name for name, _ in model.named_parameters()] == names
    base = lora_model(checkpoint).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    plain = logits(loaded)
    torch.testing.assert_close(logits(fuse_lora(loaded)), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.eval()), plain, rtol=1e-4, atol=1e-4)


def test_merged_layers_run_pefts_own_path(checkpoint):
    model = fuse_lora(lora_model(checkpoint, nf4=False)).eval()
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)


def test_what_is_not_a_packed_batch_runs_pefts_own_path(checkpoint):
    model = lora_model(checkpoint).eval()
    row, x = (
        torch.tensor([ROWS[0]]),
        torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)),
    )
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.endswith("_proj") and x.shape[-1] == layer.in_features
    }
    assert len(layers) == 12
    expected, alone = model(row).logits, {name: layer(x) for name, layer in layers.items()}
    fuse_lora(model)
    torch.testing.assert_close(model(row).logits, expected, rtol=1e-4, atol=1e-4)
    for name, layer in layers.items():
        torch.testing.assert_close(layer(x), alone[name], rtol=1e-4, atol=1e-5)


def test_it_saves_the_inputs_and_rank_8_products_alone(checkpoint):
    saved = {}
    for kind, model in (
        ("plain", lora_model(checkpoint, 0.1)),
        ("fused", fuse_lora(lora_model(checkpoint, 0.1))),
    ):
        mlp = model.get_base_model().model.layers[0].mlp
        parameters = {p.data_ptr() for p in model.parameters()}
        sizes = {}

        def pack(t, sizes=sizes, parameters=parameters):
            if t.data_ptr() not in parameters:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = mlp(torch.ones(1, 1024, 64, requires_grad=True))
        saved[kind] = sum(sizes.values()) / 1024 / 4
        del out
    weights = 2 * 16 * (64 + 2 * 192) / 1024  # A and B in the input's dtype
    assert saved["fused"] < 64 + 2 * 192 + 16 + 8 + weights + 8
    assert saved["plain"] > 2 * saved["fused"]


def test_other_layers_are_left_alone(checkpoint):
    model = lora_model(checkpoint, targets=["q_proj", "v_proj", "down_proj"])
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
    torch.testing.assert_close(logits(fuse_lora(model)), expected, rtol=1e-4, atol=1e-4)
