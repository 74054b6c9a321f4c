"""Some hundred bad inputs, each refused in one line, or accepted and right (see tools/fuzz.py)."""

import pytest

from tests.tools.fuzz_cases import KINDS, make_material, try_case


@pytest.fixture(scope="module")
def material(digits, tmp_path_factory):
    return make_material(digits, tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_in_one_line_or_accepted_and_right(kind, material, tmp_path):
    outcomes = set()
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        outcomes.add(try_case(kind, number, tmp_path / str(number), material) == "accepted")
    assert False in outcomes
