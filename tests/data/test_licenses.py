import pytest

from clipmini.data.licenses import LICENSES, check_license, strictest


@pytest.mark.parametrize(
    ("licenses", "expected"),
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
def test_strictest(licenses, expected):
    assert strictest(licenses) == expected
    assert strictest(licenses[::-1]) == expected


def test_a_stated_license_is_one_of_the_hubs():
    assert len(set(LICENSES)) == len(LICENSES)
    assert all(check_license(name.upper()) == name for name in LICENSES)
    assert {"llama3.1", "gemma", "openrail++", "unknown", "bigcode-openrail-m"} <= set(LICENSES)
    with pytest.raises(ValueError, match=r"license='apache2' is not allowed; the nearest is 'apache-2.0'"):
        check_license("apache2")
