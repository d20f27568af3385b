"""The compiled passes on a GPU: kernels for a T4, one compilation for all lengths, and a way back."""

import re

import pytest
import torch
from test_lora_cuda import checkpoint, gradients, lora_model  # noqa: F401 (checkpoint is a fixture)
from transformers import AutoModelForCausalLM, MistralConfig

from qlora_helpers.fast import kernels
from qlora_helpers.fast.lora import fuse_lora
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.model import use_expandable_segments
from qlora_helpers.scoring import label_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTHS = [[5], [9], [3, 8, 13], [40, 2], [7, 7, 7], [64] * 4]


@pytest.fixture
def model(checkpoint):  # noqa: F811
    model = fuse_lora(lora_model(checkpoint, 0.05))
    use_packed_attention(model.get_base_model())
    torch._dynamo.reset()
    return model


def score(model, lengths: list[int]) -> torch.Tensor:
    rows = [[(7 * i + j) % 64 for j in range(length)] for i, length in enumerate(lengths)]
    with torch.no_grad():
        return label_logits(model.eval(), rows, list(range(64)))


def test_every_kernel_of_training_and_scoring_compiles_for_a_t4(model, monkeypatch):
    """An H100 emits no code for capability 7.5: each kernel's source is compiled again for it."""
    import triton
    from triton.backends.compiler import GPUTarget

    compile_kernel, seen = triton.compile, []

    def recorded(source, target=None, options=None, **kwargs):
        seen.append((source, options))
        return compile_kernel(source, target=target, options=options, **kwargs)

    monkeypatch.setattr(triton, "compile", recorded)
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        gradients(model.train())
        score(model, [5, 9])
    names = {source.name for source, _ in seen}
    print(f"{len(names)} kernels: {sorted(names)}")
    assert len(names) >= 7
    for source, options in seen:
        ptx = compile_kernel(source, target=GPUTarget("cuda", 75, 32), options=options).asm["ptx"]
        assert re.search(r"\.target sm_75\b", ptx), source.name


def test_scoring_compiles_once_for_all_lengths(tmp_path):
    """A model of another size than the others' here, so that nothing of it is compiled yet."""
    config = MistralConfig(
        vocab_size=64,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    model = fuse_lora(lora_model(tmp_path, 0.05))
    use_packed_attention(model.get_base_model())
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = set()
    for lengths in LENGTHS:
        score(model, lengths)
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1 and graphs != {0}  # all are of the first batch


def test_a_compiler_that_fails_costs_one_line_and_no_result(model, monkeypatch, capsys):
    import triton

    expected = score(model, [5, 9, 30]), gradients(model.train(), seed=3)

    def raising(*args, **kwargs):
        raise RuntimeError("no Triton for this card")

    monkeypatch.setattr(kernels, "_failure", None)
    monkeypatch.setattr(triton, "compile", raising)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        found = score(model, [5, 9, 30]), gradients(model.train(), seed=3)
    torch._dynamo.reset()
    assert capsys.readouterr().out.count("The fused kernels cannot be compiled here") == 1
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.05)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() < 0.02 * gradient.norm(), name


def test_a_fresh_adapter_changes_no_answer(checkpoint):  # noqa: F811
    """B is zero: switched off or on, the same code gives the same bits."""
    model = lora_model(checkpoint, 0.05)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    fuse_lora(model)
    use_packed_attention(model.get_base_model())
    for lengths in LENGTHS:
        on = score(model, lengths)
        with model.disable_adapter():
            assert torch.equal(score(model, lengths), on), lengths


def test_the_allocator_grows_its_segments(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    use_expandable_segments()
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"] is True
