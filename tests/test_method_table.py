"""Every method has a config, a paper and its line in the README's table, which is made from the code."""

from __future__ import annotations

import pytest

from tests.method_table import README, TRAINED, configs, equal, methods, paper, table, written


def test_the_readme_has_the_table_of_the_code() -> None:
    assert written() == table(), "run python -m tests.method_table"


@pytest.mark.parametrize("name", methods())
def test_every_method_has_config_and_paper(name: str) -> None:
    assert configs(name), f"no file in configs/ names {name}"
    assert paper(methods()[name])


def test_what_is_compared_with_the_original() -> None:
    compared = ["TTM", "WTTM", "RLD", "CSKD", "OFAKD", "LogitMSE", "DeiT", "SimKDModule", "DOTModule", "KD"]
    assert all(equal(name).startswith("value and gradient") for name in compared)
    assert equal("BYOT") == equal("MutualModule") == "no reference values"
    for path in TRAINED.values():
        assert "def test_module_is_a_plain_loop(" in (README.parent / path).read_text()
