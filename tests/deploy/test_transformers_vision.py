"""Vision networks of `transformers`, with two branches each."""

import pytest

from helpers.transformers_models import VISION, check


@pytest.mark.heavy
@pytest.mark.parametrize("case", VISION, ids=str)
def test_vision_networks_leave_early_as_the_naive_loop_does(case, tmp_path):
    check(case, tmp_path)
