from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedcore.crypto.secagg import Config
from fedcore.errors import SpecError
from fedcore.messages import Ref
from tests.crypto.secagg.conftest import CONFIG


@pytest.mark.parametrize(
    "change",
    [
        {"federation": "other"},
        {"ref": Ref("run", 3, 1, "train")},
        {"ref": Ref("run", 4, 0, "train")},
        {"ref": Ref("run", 3, 0, "evaluate")},
        {"ref": Ref("other", 3, 0, "train")},
        {"parameters": "0" * 64},
        {"spec": "0" * 64},
        {"asked": 15},
        {"smallest": 4},
        {"bits": 16},
        {"narrow": 51},
        {"wide": 4},
        {"corrupt": 0.1},
        {"lost": 0.2},
        {"rounds": 11},
    ],
)
def test_everything_is_in_the_digest(change: dict[str, Any]) -> None:
    assert replace(CONFIG, **change).digest != CONFIG.digest == replace(CONFIG).digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"smallest": 2}, "among 2 to 16 clients does not fit: expected at least 3 and at most 3000"),
        ({"asked": 3001}, "among 3 to 3001 clients does not fit"),
        ({"smallest": 17}, "among 17 to 16 clients does not fit"),
        ({"bits": 8}, "50 words of 8 bits, 3 of 64 and 10 rounds do not fit"),
        ({"narrow": -1}, "-1 words of 32 bits"),
        ({"wide": -1}, "-1 of 64"),
        ({"rounds": 0}, "0 rounds do not fit"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        replace(CONFIG, **change)


def test_words_of_another_kind_are_refused() -> None:
    narrow, wide = np.zeros(50, np.uint32), np.zeros(3, np.uint64)
    CONFIG.check_words(narrow, wide)
    for wrong in (narrow[1:], narrow.astype(np.uint16), narrow.reshape(5, 10)):
        with pytest.raises(ValueError, match=r"expected \[\(\(50,\), 'uint32'\), \(\(3,\), 'uint64'\)\]"):
            CONFIG.check_words(wrong, wide)
    with pytest.raises(ValueError, match="expected"):
        CONFIG.check_words(narrow, wide[1:])


def test_nothing_needs_narrow_words() -> None:
    config: Config = replace(CONFIG, narrow=0)
    config.check_words(np.zeros(0, np.uint32), np.zeros(3, np.uint64))
