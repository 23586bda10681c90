"""The loss of a check is the Trainer's; what says nothing or is not reached costs no cut."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MambaModel, Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress
from hf_compressm.errors import ConfigurationError

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
HALF = {"strategy": "fixed", "keep_ratio": 0.5}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = MambaModel(MambaConfig(**SIZES)), nn.Linear(16, 3)

    def forward(self, input_ids, labels=None):
        return {"logits": self.head(self.body(input_ids=input_ids).last_hidden_state.mean(1))}


class OwnLoss(Trainer):
    fails_at = ()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training and self.state.global_step in self.fails_at:
            raise KeyError("mine")
        return F.cross_entropy(model(inputs["input_ids"])["logits"], inputs.pop("labels"))


def trained(kind, folder, fails_at=(), **settings):
    rows = [{"input_ids": torch.randint(1, 24, (12,)), "labels": torch.tensor(i % 3)} for i in range(16)]
    args = TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True
    )
    callback = CompreSSMCallback(CompreSSMConfig(**HALF, window=(0, 3)))
    trainer = kind(model=Classifier(), args=args, train_dataset=rows, callbacks=[callback], **settings)
    trainer.fails_at = fails_at
    trainer.train()
    return trainer, callback


def test_compute_loss_of_a_subclass_is_taken(tmp_path):
    trainer, callback = trained(OwnLoss, tmp_path)
    assert [record.outcome for record in callback.records] == ["cut"]
    assert trainer.model.body.config.state_size == 4


def test_a_failing_check_is_tried_again_at_the_next_step(tmp_path):
    trainer, callback = trained(OwnLoss, tmp_path, fails_at=(3,))
    assert [(record.outcome, record.step) for record in callback.records] == [("skipped", 3), ("cut", 4)]
    assert "mine" in callback.records[0].reason


def test_a_loss_that_cannot_be_taken_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigurationError, match="loss of a calibration batch"):
        trained(OwnLoss, tmp_path, fails_at=(0,))


def test_excluded_layers_keep_their_state():
    model = nn.Module()
    model.a, model.b = MambaForCausalLM(MambaConfig(**SIZES)), MambaForCausalLM(MambaConfig(**SIZES))
    model.forward = lambda input_ids: sum(part(input_ids, labels=input_ids).loss for part in (model.a, model.b))
    batch = {"input_ids": torch.randint(1, 24, (4, 12))}
    assert compress(model, [batch], CompreSSMConfig(**HALF, exclude_layers=r"b\..*")).outcome == "cut"
    assert (model.a.config.state_size, model.b.config.state_size) == (4, 8)
    with pytest.raises(ConfigurationError, match="names no layer"):
        compress(model, [batch], CompreSSMConfig(**HALF, target_layers=["nothing"]))
