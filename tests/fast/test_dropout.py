"""Masks that belong to the rows: whose they are, how they scatter, what they do to gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_helpers.fast.dropout import RowDropout, masks_of, use_row_dropout
from qlora_helpers.fast.kernels import keep_mask, mix

LENGTHS = {3: 5, 0: 2, 7: 1, 12: 9, 13: 9}  # tokens by the row's number
ALIKE = dict.fromkeys(range(16), 32)


def masks(rows, step=5, number=2, width=24, lengths=LENGTHS, rate=0.3) -> dict[int, torch.Tensor]:
    """Each row's mask (tokens, width) in a packed batch of `rows`."""
    sizes = [lengths[row] for row in rows]
    with masks_of([42, step], rows, sizes, torch.device("cpu")):
        dropped = RowDropout(rate, number)(torch.ones(1, sum(sizes), width))[0]
    return dict(zip(rows, (dropped * (1 - rate)).split(sizes), strict=True))


def test_a_rows_mask_does_not_depend_on_the_batch_around_it():
    whole = masks([3, 0, 7, 12])
    torch.rand(3)
    for batch in ([12, 3], [0], [7], [7, 12, 0, 3]):
        for row, mask in masks(batch).items():
            assert torch.equal(mask, whole[row])


def test_another_step_layer_or_row_has_another_mask():
    mask = masks([12])[12]

    def changed(row=12, **choices):
        return (mask != masks([row], **choices)[row]).float().mean()

    assert min(changed(step=6), changed(number=3), changed(13)) > 0.3
    assert changed(rate=0.31) < 0.05


def scatter(drawn: torch.Tensor, rate: float) -> None:
    """Check masks (masks, elements): each keeps the right share, as a binomial one scatters, and no
    two are correlated more than chance explains. The draw is fixed: it passes always or never."""
    z = (1 - drawn - rate) / (rate * (1 - rate)) ** 0.5  # mean 0, variance 1
    shares = z.mean(1) * z.shape[1] ** 0.5  # in standard errors
    assert abs(z.mean().item()) < 4 / z.numel() ** 0.5
    assert shares.std().item() == pytest.approx(1, abs=4 / (2 * len(z)) ** 0.5)
    pairs = (z @ z.T / z.shape[1] ** 0.5)[tuple(torch.triu_indices(len(z), len(z), 1))]
    assert pairs.mean().abs() < 0.05 and pairs.std().item() == pytest.approx(1, abs=0.05)
    assert pairs.abs().max() < 8


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_masks_keep_the_right_share_and_are_independent(rate):
    def draw(width=768, **choices):
        drawn = masks(list(ALIKE), width=width, lengths=ALIKE, rate=rate, **choices)
        return torch.cat(list(drawn.values()))

    mask = draw()
    assert set(mask.round().unique().tolist()) == {0.0, 1.0}
    scatter(mask, rate)  # tokens of 16 rows, 32 places each
    scatter(mask.T, rate)  # columns
    for name in ("number", "step"):  # layers; steps
        scatter(torch.stack([draw(48, **{name: i}).flatten() for i in range(200)]), rate)


def test_a_mask_is_a_function_of_key_and_column_however_many_there_are():
    """The CPU draws in slices."""
    keys = mix(torch.arange(4003, dtype=torch.int32))
    mask = keep_mask(torch.empty(4003, 1001), 0.05, keys)
    assert torch.equal(mask[1500:1503, :77], keep_mask(torch.empty(3, 77), 0.05, keys[1500:1503]))
    assert mask.mean().item() == pytest.approx(0.95, abs=4 * (0.05 * 0.95 / mask.numel()) ** 0.5)
    wide = keep_mask(torch.empty(2, 2**16 + 1), 0.05, keys[:2])
    assert torch.equal(wide[:, :1001], mask[:2])


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("by_rows", [True, False])
def test_the_gradient_passes_where_a_value_was_kept(again, by_rows):
    layer, x = RowDropout(0.5, 4), torch.ones(1, 8, 40, requires_grad=True)

    def run(x):
        return layer(x * 3)

    def step():
        x.grad = None
        out = checkpoint(run, x, use_reentrant=False) if again else run(x)
        out.sum().backward()
        assert torch.equal(out, x.grad) and set(out.unique().tolist()) == {0.0, 6.0}
        return out.detach()

    if by_rows:
        with masks_of([1, 2], [0, 1], [3, 5], x.device):
            assert torch.equal(step(), step())
    else:
        assert not torch.equal(step(), step())
    layer.eval()
    assert torch.equal(run(x), x * 3)


def test_each_dropout_of_a_model_is_replaced_its_own_too():
    model = nn.Sequential(nn.Dropout(0.1), nn.ModuleDict({"default": nn.Dropout(0.2)})).eval()
    model.append(nn.Dropout(0.0))
    for _ in range(2):
        use_row_dropout(model)
        first, second = model[0], model[1]["default"]
        assert [type(layer) for layer in (first, second)] == [RowDropout, RowDropout]
        assert type(model[2]) is nn.Dropout
        assert (first.p, second.p) == (0.1, 0.2) and first.number != second.number
        assert not first.training and not second.training
