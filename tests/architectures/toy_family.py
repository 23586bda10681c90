"""All that a new family takes: its row, where its state lies, and what its recurrence is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hf_compressm.architectures as families
from hf_compressm.architectures import SizeAttribute, StateAxis, StateLayout
from hf_compressm.models.compressed import ScanCall, StockFamily, register_stock_family


@families.register
class ToyLayer(families.MixableLayer):
    """A layer of memories, seen as one system a head; its slots are the states."""

    family = "toy"
    stock = register_stock_family(family, StockFamily(
        "ToyMixer", "tests.architectures.toy_model", "ToyConfig", "slots", "scan",
        size_name="slots", groups_name="num_heads", scans=(ScanCall("remember", write="write", read="read"),),
    ))  # fmt: skip
    cut_projections = {"address": nn.Linear}

    @property
    def stock_layout(self) -> StateLayout:
        """The rows of `address`: in each head first what writes, then what reads."""
        rows, width = families.per_head(self.module.num_heads, "write", "read"), self.module.address.in_features
        axes = (StateAxis("address.weight", 0, rows, others=(width,)), StateAxis("address.bias", 0, rows))
        return StateLayout(axes, (self.size_attribute, SizeAttribute("address", "out_features", rows)))


@dataclass(frozen=True)
class ToyInputs(families.SteppedScanInputs):
    """The arguments of the recurrence, as long as no memory comes from before."""

    u: Tensor
    forget: Tensor
    B: Tensor
    C: Tensor
    part: None = None

    def states(self) -> list[Tensor]:
        """The memories after each step."""
        found = [torch.zeros(())]
        for value, forget, write in zip(*(tensor.unbind(1) for tensor in (self.u, self.forget, self.B))):
            found.append(forget[..., None, None] * found[-1] + value[..., None] * write[..., None, :])
        return found[1:]

    def read(self, states: Tensor) -> Tensor:
        """What is read of the memories."""
        return torch.einsum("blhdn,blhn->blhd", states, self.C)


families.register_scan(
    ToyLayer.stock.modeling,
    {"remember": families.watched(lambda value, forget, write, read: ToyInputs(value, forget, write, read))},
)
