import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.prune import l1_unstructured

from tests.precision.matrices import awkward
from tracelens.precision.pruning import prune


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_the_smallest_are_gone_and_the_others_untouched(out, width, sparsity, seed):
    matrix = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    pruned = prune(matrix, sparsity)
    gone = pruned == 0
    assert gone.sum() == round(sparsity * matrix.numel())
    assert torch.equal(pruned[~gone], matrix[~gone])
    if gone.any() and not gone.all():
        assert matrix[gone].abs().max() <= matrix[~gone].abs().min()
    assert torch.equal(prune(pruned, sparsity), pruned)


def test_of_equals_the_first_go():
    matrix = torch.tensor([[1.0, -1.0, 2.0], [1.0, 0.5, -1.0]])
    assert prune(matrix, 0.5).tolist() == [[0.0, 0.0, 2.0], [1.0, 0.0, -1.0]]


def test_torch_prunes_the_same():
    matrix = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.1, 0.333, 0.5, 0.9):
        layer = torch.nn.Linear(60, 50)
        layer.weight.data = matrix.clone()
        l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(prune(matrix, sparsity), layer.weight)


def test_zeros_count_and_the_dtype_is_kept():
    matrix = awkward(6, 128)
    half_zero = (matrix == 0).float().mean().item()
    assert half_zero > 0.4
    assert torch.equal(prune(matrix, 0.3), matrix)
    for dtype in (torch.float64, torch.bfloat16):
        pruned = prune(matrix.to(dtype), 0.8)
        assert pruned.dtype is dtype
        assert (pruned == 0).sum() == round(0.8 * matrix.numel())
