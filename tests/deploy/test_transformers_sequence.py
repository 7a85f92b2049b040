"""Text, audio, video and time series networks of `transformers`, with two branches each."""

import pytest

from helpers.transformers_models import SEQUENCES, check


@pytest.mark.heavy
@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_sequence_networks_leave_early_as_the_naive_loop_does(case, tmp_path):
    check(case, tmp_path)
