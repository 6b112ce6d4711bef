"""Tables of judgements: what is written is what is read, and every share follows from it."""

import json

import pytest

from diffusers_sae.errors import InputError
from diffusers_sae.evaluation.rows import Rows, pooled


def test_shares_follow_from_rows():
    rows = Rows([0, 1, 2, 7], {"ua": [True, False, None, None], "ira": [None, None, True, True]})
    assert (rows.share("ua").hits, rows.share("ua").judgements) == (1, 2)
    assert rows.share("ira").value == 1.0
    figures = rows.figures()
    assert figures["ua"]["value"] == 0.5 and figures["rows"] == {"images": "0-2,7", "ua": "10--", "ira": "--11"}


@pytest.mark.parametrize("images", [[], [5], [0, 1, 2], [3, 1, 2, 4, 9], list(range(224)), [2, 2, 3]])
def test_rows_are_read_as_they_were_written(images):
    column = [(None, True, False)[i % 3] for i in range(len(images))]
    again = Rows.from_dict(json.loads(json.dumps(Rows(images, {"seen": column}).as_dict())))
    assert list(again.images) == images and again.columns["seen"] == column


def test_pooled_rows_count_an_image_once():
    each = [Rows([0, 1], {"kept": [True, False]}), Rows([1, 2], {"kept": [True, None]})]
    share = pooled(each, "kept")
    assert (share.hits, share.judgements, share.images) == (2, 3, 2)


def test_a_column_of_another_length_is_refused():
    with pytest.raises(InputError, match="'seen' has 1 judgements of 2 images"):
        Rows([0, 1], {"seen": [True]})
