"""What the coordinator may learn of a site's error, and how it words it."""

import pytest

from colora.common.errors import ColoraError, DataError, RefusedError, reason_in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RefusedError("train.steps", "at most 10", 40), "the site refused the request (train.steps); "),
        (
            RefusedError("allow.max_epsilon", "at most 8", 9),
            "the round would spend more than the privacy budget of the site (allow.max_epsilon); ",
        ),
        (DataError("row 7", "a label", "secret"), "the site has an error in its data; "),
    ],
)
def test_a_public_text_becomes_a_sentence_without_values(error: ColoraError, words: str) -> None:
    assert reason_in_words(error.public(), "bob") == words + "the log of the site has the details"


@pytest.mark.parametrize("reason", ["no reply within 5 s", "MemoryError", "RefusedError: /home/bob rows"])
def test_other_reasons_stay_as_they_are(reason: str) -> None:
    assert reason_in_words(f"site bob: {reason}", "bob") == reason
