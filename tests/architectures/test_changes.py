"""The form of a state."""

from __future__ import annotations

import json

from hf_compressm.architectures import StateForm, find_layers
from tests.cases import tiny_mamba


def test_the_form_of_a_state_is_a_pair_everywhere() -> None:
    form = find_layers(tiny_mamba())[0].form
    assert isinstance(form, StateForm) and form == (8, 8) and not form.is_mixed
    assert StateForm(3, 8).is_mixed and json.dumps({"a": StateForm(3, 8)}) == '{"a": [3, 8]}'
