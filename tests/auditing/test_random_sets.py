import torch

from tracelens.auditing.random_sets import matched_members, mean_of_members
from tracelens.auditing.verdict import two_sided_rank


def test_matched_sets_draw_from_the_nearest_of_the_site():
    n_ref = torch.tensor([10.0, 11, 1000, 12, 10], dtype=torch.float64)
    phi = torch.tensor([0.1, 0.5, 0.9, 0.7, 0.3], dtype=torch.float64)
    site = torch.tensor([0, 0, 0, 0, 1])
    safety = torch.tensor([True, False, False, False, False])
    options = {"n_sets": 50, "neighbours": 2}
    drawn = mean_of_members(phi, matched_members(n_ref, site, safety, ~safety, **options))
    assert set(drawn.tolist()) == {0.5, 0.7}
    own = mean_of_members(phi, matched_members(n_ref, site, safety, ~safety, with_own=True, **options))
    assert set(own.tolist()) == {0.1, 0.5, 0.7}
    elsewhere = matched_members(n_ref, site, torch.tensor([False] * 4 + [True]), safety, n_sets=50)
    assert elsewhere.numel() == 0
    assert two_sided_rank(0.5, mean_of_members(phi, elsewhere)) == 1


def test_means_leave_out_what_has_no_number():
    values = torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64)
    assert mean_of_members(values, [torch.tensor([0, 1, 2]), torch.tensor([2])]).tolist() == [2, 3]
    assert len(mean_of_members(values, [])) == 0
