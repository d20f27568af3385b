"""The Triton kernels on a GPU: their values, code for a T4, one compilation for all lengths, and
a way back."""

import re
from collections import defaultdict

import pytest
import torch
from lora_models import lora_model
from test_lora_cuda import checkpoint, fused_model, step  # noqa: F401 (checkpoint is a fixture)

from qlora_helpers.fast import kernels
from qlora_helpers.fast.lora import fuse_lora
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.model import use_expandable_segments
from qlora_helpers.scoring import label_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
if torch.cuda.is_available():
    from qlora_helpers.fast import triton_kernels
LENGTHS = [[5], [9], [3, 8, 13], [40, 2], [7, 7, 7], [64] * 4]


@pytest.fixture
def model(checkpoint):  # noqa: F811
    return fused_model(checkpoint, 0.05)


def score(model, lengths: list[int]) -> torch.Tensor:
    rows = [[(7 * i + j) % 64 for j in range(length)] for i, length in enumerate(lengths)]
    with torch.no_grad():
        return label_logits(model.eval(), rows, list(range(64)))


def compiled_kernels() -> list:
    """Every variant of every Triton kernel that this process has compiled."""
    functions = [one for one in vars(triton_kernels).values() if hasattr(one, "device_caches")]
    caches = [cache for one in functions for cache in one.device_caches.values()]
    return [kernel for cache in caches for kernel in cache[0].values()]


def test_every_kernel_of_training_and_scoring_compiles_for_a_t4(model):
    """An H100 emits no code for capability 7.5: each kernel's source is compiled again for it."""
    import triton
    from triton.backends.compiler import GPUTarget

    step(model.train())
    score(model, [5, 9])
    kernels_used = compiled_kernels()
    names = {kernel.name for kernel in kernels_used}
    expected = {"_drop", "_drop_backward", "_swiglu", "_swiglu_backward", "_heads"}
    assert names == expected | {"_heads_backward"}
    for kernel in kernels_used:
        ptx = triton.compile(kernel.src, target=GPUTarget("cuda", 75, 32)).asm["ptx"]
        assert re.search(r"\.target sm_75\b", ptx), kernel.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5])
def test_each_kernel_gives_what_the_plain_function_gives(rate, dtype):
    """The plain functions run in float64 on the same numbers."""
    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.manual_seed(0)
    keys = torch.randint(-(2**31), 2**31 - 1, (7,), dtype=torch.int32).cuda() if rate else None

    def compare(name, tensors, *rest):
        function = getattr(kernels, name)
        plain = function.__wrapped__(*(x.double() for x in tensors), *rest)
        compiled = function(*(x.clone() for x in tensors), *rest)
        if torch.is_tensor(plain):
            plain, compiled = (plain,), (compiled,)
        for one, other in zip(plain, compiled, strict=True):
            torch.testing.assert_close(other.double(), one, **rounding)
            assert other.dtype == dtype
            assert name != "drop" or torch.equal(one == 0, other == 0)  # the same mask

    for width in (24, 1536, 2500):
        grad, low, gate, up = torch.randn(4, 7, width, device="cuda").to(dtype)
        compare("drop", [gate], rate, keys)
        compare("drop_backward", [grad, low, gate], rate, keys)
        compare("swiglu", [gate, up], rate, keys)
        compare("swiglu_backward", [grad, low, gate, up], rate, keys)
    place = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 0]).cuda()
    real = torch.tensor([0, 1, 2, 4, 5, 6, 7]).cuda()
    for size, groups, key_heads in ((64, 3, 3), (128, 4, 2), (96, 1, 2)):
        cos, sin = torch.randn(2, 7, size // 2, device="cuda").repeat(1, 1, 2).to(dtype)
        qkv = torch.randn(7, (groups + 2) * key_heads * size, device="cuda").to(dtype)
        compare("heads", [qkv, cos, sin], place, size, groups)
        three = torch.randn(3, 9, groups * key_heads, size, device="cuda").to(dtype)
        compare("heads_backward", [*three, cos, sin], real, groups)


def test_no_length_of_a_batch_compiles_a_kernel_again(model):
    for lengths in LENGTHS[:2]:
        score(model, lengths)
    before = len(compiled_kernels())
    for lengths in LENGTHS:
        score(model, lengths)
    assert len(compiled_kernels()) == before > 0


def test_a_compiler_that_fails_costs_one_line_and_no_result(model, monkeypatch, capsys):
    from triton.runtime.jit import JITFunction

    expected = score(model, [5, 9, 30]), step(model.train(), seed=3)

    def raising(*args, **kwargs):
        raise RuntimeError("no Triton for this card")

    monkeypatch.setattr(kernels, "_failure", None)
    monkeypatch.setattr(JITFunction, "_do_compile", raising)
    for function in vars(triton_kernels).values():
        if isinstance(function, JITFunction):
            fresh = defaultdict(function.create_binder)
            monkeypatch.setattr(function, "device_caches", fresh)
    found = score(model, [5, 9, 30]), step(model.train(), seed=3)
    assert capsys.readouterr().out.count("The Triton kernels could not be compiled") == 1
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.05)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() < 0.02 * gradient.norm(), name


def test_a_fresh_adapter_changes_no_answer(checkpoint):  # noqa: F811
    """B is zero: switched off or on, the same code gives the same bits."""
    model = lora_model(checkpoint, 0.05, torch.float16)
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
