import pytest

from clipmini.training.licences import LICENCES, check_licence, strictest
from hub_schema import LICENCES as OF_THE_HUB


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["cc0-1.0", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "mit", "cc-by-4.0"], "cc-by-4.0"),
        (["cc-by-sa-4.0", "apache-2.0"], "cc-by-sa-4.0"),
        (["gpl-3.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "other"], "other"),
        (["other", "llama2"], "llama2"),  # what is not known here may forbid anything
        (["mit"], "mit"),
        (["mit", None], None),
        ([], None),
    ],
)
def test_strictest(licences, expected):
    assert strictest(licences) == expected
    assert strictest(licences[::-1]) == expected


def test_a_stated_licence_is_one_of_the_hubs():
    assert set(LICENCES) <= OF_THE_HUB
    assert check_licence("CC-BY-4.0") == "cc-by-4.0"
    with pytest.raises(ValueError, match=r"license='apache2' is not allowed; the nearest is 'apache-2.0'"):
        check_licence("apache2")
