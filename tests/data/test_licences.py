import pytest

from clipmini.data.licences import LICENCES, check_licence, strictest


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["cc0-1.0", "apache-2.0"], "apache-2.0"),
        (["apache-2.0", "mit", "cc-by-4.0"], "cc-by-4.0"),
        (["cc-by-sa-4.0", "apache-2.0"], "cc-by-sa-4.0"),
        (["gpl-3.0", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-4.0", "other"], "other"),
        (["other", "llama2"], None),  # nobody can say which of them forbids more
        (["llama2", "mit"], None),
        (["llama2", "llama2"], "llama2"),
        (["my-own", "mit"], None),
        (["unknown", "mit"], None),
        (["unknown"], None),
        (["mit"], "mit"),
        (["mit", None], None),
        ([], None),
    ],
)
def test_strictest(licences, expected):
    assert strictest(licences) == expected
    assert strictest(licences[::-1]) == expected


def test_a_stated_licence_is_one_of_the_hubs():
    assert len(set(LICENCES)) == len(LICENCES)
    assert all(check_licence(name.upper()) == name for name in LICENCES)
    assert {"llama3.1", "gemma", "openrail++", "unknown", "bigcode-openrail-m"} <= set(LICENCES)
    with pytest.raises(ValueError, match=r"license='apache2' is not allowed; the nearest is 'apache-2.0'"):
        check_licence("apache2")
