"""Matrix NMS and greedy mask NMS against the original functions."""

import pytest
import torch

from solo_d2.layers.nms import mask_nms, matrix_nms

pytestmark = pytest.mark.golden

# output name -> keyword arguments
VARIANTS = {
    "gauss2": {"kernel": "gaussian", "sigma": 2.0},
    "gauss05": {"kernel": "gaussian", "sigma": 0.5},
    "linear": {"kernel": "linear"},
}


@pytest.fixture(scope="module")
def golden(load_golden):
    return load_golden("matrix_nms")


@pytest.mark.parametrize("variant", VARIANTS)
def test_matrix_nms_gives_the_original_scores(golden, variant):
    assert golden.meta["cases"]
    for case in golden.meta["cases"]:
        scores = matrix_nms(
            golden.masks(f"{case}_masks", f"{case}_shape"),
            golden[f"{case}_labels"],
            golden[f"{case}_scores"],
            **VARIANTS[variant],
        )
        torch.testing.assert_close(
            scores,
            golden[f"{case}_out_{variant}"],
            atol=1e-6,
            rtol=0,
            equal_nan=True,
            msg=lambda text, case=case: f"case {case}: {text}",
        )


def test_greedy_mask_nms_keeps_what_the_original_keeps(golden):
    cases = [case for case in golden.meta["cases"] if f"{case}_hardnms_keep" in golden]
    assert cases
    for case in cases:
        keep = mask_nms(golden.masks(f"{case}_masks", f"{case}_shape"), golden[f"{case}_labels"])
        assert torch.equal(keep, golden[f"{case}_hardnms_keep"]), case
