"""The text of a card: what it tells, and what it does not let in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import hf_compressm
from hf_compressm import CompreSSMConfig
from hf_compressm.cards import Evaluation, Provenance, render_card, template_text
from hf_compressm.cards.escaping import code, escaped, python_string
from hf_compressm.compression import CheckRecord, LayerRecord


def layer(name: str = "layers.0", before: int = 8, after: int = 4, family: str = "mamba") -> LayerRecord:
    return LayerRecord(name, family, before, after, 3, [3.0, 1.0, 0.5, 0.1], 0.6, 0.13)


def cut(step: int | None = 10, before: int = 8, after: int = 4, **layer_settings) -> CheckRecord:
    layers = [layer(before=before, after=after, **layer_settings), layer("layers.1", before, after)]
    return CheckRecord("cut", "the spectra allow it", layers, step, 2.0, 2.01, 0.5, 100, 60)


def facts(*records: CheckRecord, **others) -> Provenance:
    model = {"model_class": "MambaForCausalLM", "model_type": "mamba", "name": "me/small"}
    settings = {"config": CompreSSMConfig(), **model, **others}
    return Provenance(records or (cut(),), **settings)


def test_it_tells_what_was_cut_when_and_how_to_load_it() -> None:
    card = render_card(facts(cut(10), cut(20, before=4, after=2)))
    assert "from 8 to 2 states" in card and "during training" in card
    rows = [line for line in card.splitlines() if line.startswith("| step")]
    assert [re.split(r"\s*\|\s*", row)[1:4] for row in rows] == [
        ["step 10", "cut", "8 -> 4"],
        ["step 20", "cut", "4 -> 2"],
    ]
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in card and "trust_remote_code" not in card
    assert "tolerance 0.01" in card and "2.0000 -> 2.0100" in card and "compressm_spectrum.png" in card
    assert "arxiv.org/abs/2510.02823" in card


def test_the_metadata_is_what_the_hub_reads() -> None:
    evaluations = [Evaluation("perplexity", 7.0, 7.1, "wikitext (test)", "Salesforce/wikitext")]
    card = ModelCard(
        render_card(
            facts(
                evaluations=evaluations,
                base_model="state-spaces/mamba-130m-hf",
                license="apache-2.0",
                datasets=["Salesforce/wikitext"],
            )
        )
    )
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["license"] == "apache-2.0"
    assert data["tags"] == ["compressm", "state-space-model", "mamba"]
    assert data["base_model"] == "state-spaces/mamba-130m-hf" and data["datasets"] == ["Salesforce/wikitext"]
    assert data["pipeline_tag"] == "text-generation"
    [result] = data["model-index"][0]["results"]
    # What was before is another model: the repository's metadata speak of the one that is in it.
    assert [(m["name"], m["value"]) for m in result["metrics"]] == [("perplexity", 7.1)]
    assert result["dataset"] == {"type": "Salesforce/wikitext", "name": "wikitext (test)"}


def test_a_cut_that_was_taken_back_does_not_count() -> None:
    back = CheckRecord("rolled_back", "the loss rose", [layer(before=4, after=8)], 12, 2.0, None, 0.1, 60, 100)
    provenance = facts(cut(10), back)
    assert provenance.cuts == [] and provenance.sizes() == {"layers.0": 8, "layers.1": 4}
    assert "rolled_back" in render_card(provenance) and "cut nothing: the loss rose" in render_card(provenance)


def test_an_error_bound_is_told_for_balanced_truncation_only() -> None:
    assert "error bound" not in render_card(facts())
    record = CheckRecord("cut", "", [layer(family="lru")], None, None, None, 0.1, 100, 60)
    assert "error bound" in render_card(facts(record))
    # A readout that was fitted to data is another one than the bound is for.
    fitted = CheckRecord("cut", "", [replace(layer(family="lru"), readout_fitted=True)], None, None, None, 0.1, 100, 60)
    assert "error bound" not in render_card(facts(fitted))
    # Measured Gramians promise nothing for other data.
    assert "error bound" not in render_card(facts(config=CompreSSMConfig(reductor="balanced")))


def test_weights_alone_have_other_limits_than_data() -> None:
    record = CheckRecord("cut", "", [layer(family="lru")], None, None, None, 0.1, 100, 60)
    assert "computed from the weights alone" in render_card(facts(record, calibration_data="book.txt"))
    assert "measured on book.txt" in render_card(facts(calibration_data="book.txt"))


def test_speed_and_code_of_its_own() -> None:
    card = render_card(facts(step_seconds=(0.4, 0.1), needs_code=True))
    assert "0.4000 s before the first cut, 0.1000 s after the last one (4.00x)" in card
    assert "trust_remote_code=True" in card


HOSTILE = [
    "x | y | z\n| new | row |",
    "<script>alert(1)</script>",
    "<!-- hf_compressm:end -->",
    "{{ 7 * 7 }}{% for x in y %}",
    "`code` **bold** [link](http://evil)",
    "---\nlicense: mit\n---",
    '"); import os; os.system("true") #',
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_elsewhere_stay_names(name: str) -> None:
    plain = render_card(facts(calibration_data="data", base_model="me/base"))
    provenance = facts(
        cut(name=name), calibration_data=name, base_model=name, datasets=[name], name=name, license=name,
        evaluations=[Evaluation("accuracy", 0.5, 0.5, name)],
    )  # fmt: skip
    card = render_card(provenance)
    assert "<script" not in re.sub("```.*?```|`[^`\n]*`", "", card, flags=re.DOTALL).split("---\n", 2)[2]
    assert "49" not in card
    assert card.count("<!-- hf_compressm:") == plain.count("<!-- hf_compressm:") == 2
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    [example] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(example, "example", "exec")
    assert len(re.findall(r"\n\| step", card)) == 1


def test_a_module_of_the_users_own_is_loaded_into() -> None:
    card = render_card(facts(model_class="Mine", model_type=None))
    assert 'load_cut_layers(model, "me/small")' in card and "is a `Mine`, built as for the training" in card


def test_escaping_keeps_ordinary_names_readable() -> None:
    assert escaped("mamba_130m-hf v2.0") == "mamba_130m-hf v2.0"
    assert code("backbone.layers.0.mixer") == "`backbone.layers.0.mixer`"
    assert python_string('a"b\\c') == '"a\\"b\\\\c"'


def test_a_classifier_of_measured_values_is_no_text_classifier() -> None:
    classifier = {"model_class": "LRUForSequenceClassification", "model_type": "lru"}
    assert "pipeline_tag: text-classification" in render_card(facts(**classifier))
    card = render_card(facts(**classifier, reads_tokens=False))
    assert "pipeline_tag" not in card and "AutoModelForSequenceClassification" in card


def test_many_layers_are_folded_away() -> None:
    record = CheckRecord("cut", "", [layer(f"layers.{i}") for i in range(24)], 1, 2.0, 2.0, 0.1, 100, 60)
    assert "<details>" in render_card(facts(record)) and "<details>" not in render_card(facts())


def test_the_repository_shows_the_template_that_is_installed() -> None:
    shown = Path(hf_compressm.__file__).parents[1] / "model_cards" / "template.md"
    assert shown.read_text(encoding="utf-8") == template_text()
