"""Layouts of a state, against brute-force indexing: those of today's families, and those of linear attention."""

from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_compressm.architectures.config_size import ConfigSize
from hf_compressm.architectures.state_layout import SizeAttribute, StateAxis, StateLayout, States, per_head, runs
from hf_compressm.errors import DimensionError

G, N, R = 3, 5, 2
KEPT = torch.tensor([[0, 4], [1, 2], [2, 3]])

# Each axis with the name of every entry along it, written down by hand: a state is (role, group, number).
LAYOUTS = {
    "mamba2_in_proj": (
        (7, *runs("B", G), *runs("C", G), 4),
        lambda n: (
            [("zx", i) for i in range(7)]
            + [("B", g, i) for g in range(G) for i in range(n)]
            + [("C", g, i) for g in range(G) for i in range(n)]
            + [("dt", i) for i in range(4)]
        ),
    ),
    "qwen3_next_in_proj_qkvz": (
        per_head(G, "q", "k", 6, 6),
        lambda n: [
            entry
            for h in range(G)
            for entry in [("q", h, i) for i in range(n)]
            + [("k", h, i) for i in range(n)]
            + [("v", h, 0, i) for i in range(6)]
            + [("z", h, 0, i) for i in range(6)]
        ],
    ),
    "delta_net_conv1d": (
        (*runs("q", G), *runs("k", G), 12),
        lambda n: [(role, g, i) for role in "qk" for g in range(G) for i in range(n)] + [("v", i) for i in range(12)],
    ),
    "olmo_q_proj": (runs("q", G), lambda n: [("q", g, i) for g in range(G) for i in range(n)]),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def is_state(entry: tuple) -> bool:
    return len(entry) == 3


@every_layout
@pytest.mark.parametrize("axis", [0, 1])
def test_a_cut_keeps_what_the_names_of_the_entries_say(name: str, axis: int) -> None:
    entries, named = LAYOUTS[name]
    along = StateAxis(name, axis, entries, others=(4,))
    before, after = named(N), named(R)
    assert along.length(N) == len(before) and along.shape(R)[axis] == len(after) and along.shape(R)[1 - axis] == 4
    # Entry i of a run after the cut is the i-th kept state of its group; what is no state stays.
    wanted = [before.index((*e[:2], int(KEPT[e[1], e[2]])) if is_state(e) else e) for e in after]
    found = along.kept(KEPT, N)
    assert found.tolist() == wanted
    tensor = torch.randn(along.shape(N))
    rows = tensor.movedim(axis, 0)[wanted].movedim(0, axis)
    assert torch.equal(along.take(tensor, found), rows)
    assert torch.equal(along.selection(KEPT, N).first(tensor), rows)


@every_layout
def test_one_row_of_states_is_kept_in_every_group(name: str) -> None:
    along = StateAxis(name, 0, LAYOUTS[name][0])
    assert torch.equal(along.kept(KEPT[0], N), along.kept(KEPT[:1].expand(G, -1), N))


@every_layout
@pytest.mark.parametrize("per_group", [False, True])
def test_a_matrix_for_each_role_acts_on_its_runs_alone(name: str, per_group: bool) -> None:
    entries, named = LAYOUTS[name]
    roles = {entry.role for entry in entries if isinstance(entry, States)}
    shape = (G, R, N) if per_group else (R, N)
    matrices = {role: torch.randn(shape, dtype=torch.float64) for role in roles}
    before, after = named(N), named(R)
    wanted = torch.zeros(len(after), len(before), dtype=torch.float64)
    for row, new in enumerate(after):
        for column, old in enumerate(before):
            if is_state(new) and is_state(old):
                block = matrices[new[0]][new[1]] if per_group else matrices[new[0]]
                wanted[row, column] = block[new[2], old[2]] if new[:2] == old[:2] else 0
            else:
                wanted[row, column] = float(new == old)
    assert torch.equal(StateAxis(name, 0, entries).matrix(matrices), wanted)


def test_batched_axes_keep_other_states_in_every_block() -> None:
    along = StateAxis("x_proj_weight", 1, (2, *runs("B"), *runs("C")), others=(G, 4), batched=True)
    tensor = torch.randn(along.shape(N))
    taken = along.take(tensor, along.kept(KEPT, N))
    maps = along.matrix({"B": torch.randn(G, R, N).double(), "C": torch.randn(G, R, N).double()})
    assert maps.shape == (G, 2 + 2 * R, 2 + 2 * N)
    for block in range(G):
        rows = [0, 1, *(2 + KEPT[block]), *(2 + N + KEPT[block])]
        assert torch.equal(taken[block], tensor[block, rows])
        assert torch.equal(maps[block, :2, :2], torch.eye(2).double()) and not maps[block, :2, 2:].any()
    torch.testing.assert_close(along.selection(KEPT, N).first(tensor), taken)


entries_of_any_kind = st.lists(
    st.one_of(st.integers(0, 5), st.builds(States, st.sampled_from("BC"), st.integers(0, 2))), min_size=1, max_size=8
).filter(lambda entries: any(isinstance(entry, States) for entry in entries))


@settings(max_examples=200, deadline=None)
@given(entries=entries_of_any_kind, size=st.integers(1, 9), data=st.data())
def test_sizes_and_cuts_of_any_layout(entries, size: int, data) -> None:
    """The shape tells the size; keeping all is the identity; two cuts in a row are one."""
    along = StateAxis("p", 1, tuple(entries), others=(2,))
    assert along.size_of(along.shape(size)) == size
    layout = StateLayout((along,))
    assert layout.size_in({"m.p": torch.empty(along.shape(size))}, "m.") == size
    assert along.kept(torch.arange(size), size).tolist() == list(range(along.length(size)))
    middle = data.draw(st.integers(1, size))
    last = data.draw(st.integers(1, middle))
    first = torch.stack([torch.randperm(size)[:middle] for _ in range(3)])
    second = torch.stack([torch.randperm(middle)[:last] for _ in range(3)])
    twice = along.kept(first, size)[along.kept(second, middle)]
    assert torch.equal(twice, along.kept(first.gather(1, second), size))


def test_a_size_is_told_by_whatever_part_of_a_state_dict_is_there() -> None:
    rows = (3, *runs("B", 2), *runs("C", 2))
    layout = StateLayout((StateAxis("a.weight", 0, rows, others=(4,)), StateAxis("b", 0, runs())))
    assert layout.size_in({"x.b": torch.empty(6)}, "x.") == 6
    assert layout.size_in({"a.weight": torch.empty(3 + 4 * 7, 4), "b": torch.empty(5)}) == 7
    assert layout.size_in({"other.b": torch.empty(6)}, "x.") is None
    assert layout.size_in({"a.weight": torch.empty(3 + 4 * 7 + 1, 4)}) is None, "no whole number of states"
    assert layout.size_in({"a.weight": torch.empty(3, 4)}) is None, "no states"
    assert layout.size_in({"a.weight": torch.empty(31)}) is None, "flattened"


class Mixer(nn.Module):
    """Separate projections, a convolution and multipliers, as linear attention has them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, G * size), nn.Linear(4, G * size, bias=False)
        self.conv1d = nn.Conv1d(2 * G * size + 6, 2 * G * size + 6, 2, groups=2 * G * size + 6)
        self.head_k_dim = size
        self.register_buffer("scales", torch.cat([torch.full((G * size,), 2.0), torch.arange(6.0)])[None])


def layout_of_mixer() -> StateLayout:
    channels = (*runs("q", G), *runs("k", G), 6)
    axes = (
        StateAxis("q_proj.weight", 0, runs("q", G), others=(4,)),
        StateAxis("q_proj.bias", 0, runs("q", G)),
        StateAxis("k_proj.weight", 0, runs("k", G), others=(4,)),
        StateAxis("conv1d.weight", 0, channels, others=(1, 2)),
        StateAxis("conv1d.bias", 0, channels),
    )
    counts = [SizeAttribute("conv1d", name, channels) for name in ("in_channels", "out_channels", "groups")]
    counts += [SizeAttribute(name, "out_features", runs("", G)) for name in ("q_proj", "k_proj")]
    scales = SizeAttribute("", "scales", (*runs("q", G), 6))
    return StateLayout(axes, (SizeAttribute("", "head_k_dim", runs()), scales, *counts))


def test_a_whole_layer_changes_its_size_like_one_that_is_built_so() -> None:
    mixer, small, layout = Mixer(N), Mixer(R), layout_of_mixer()
    names = {name for name, _ in mixer.named_parameters()}
    assert layout.parameters(mixer).keys() == names and layout.shapes(N)["conv1d.bias"] == (2 * G * N + 6,)
    state_dict = mixer.state_dict()
    for change in layout.selected(mixer, KEPT, N):
        [name] = [name for name, parameter in mixer.named_parameters() if parameter is change.old]
        assert change.new.shape == dict(small.named_parameters())[name].shape
    for change in layout.size_changes(mixer, R):
        change.write()
    for name in ("q_proj", "k_proj", "conv1d"):
        assert mixer.get_submodule(name).extra_repr() == small.get_submodule(name).extra_repr()
    assert mixer.head_k_dim == R and torch.equal(mixer.scales, small.scales)
    assert layout.size_in(state_dict) == N
    for change in layout.size_changes(mixer, N):
        change.write()
    assert torch.equal(mixer.scales, state_dict["scales"]), "a size may grow again"


@pytest.mark.parametrize(
    "entries, axis, others, batched, message",
    [
        ((3, 4), 0, (), False, "no run of states"),
        (runs(), 2, (4,), False, "from 0 to 1"),
        (runs(), 0, (4,), True, "from 1 to 1"),
    ],
)
def test_what_is_no_axis_is_refused(entries, axis, others, batched, message) -> None:
    with pytest.raises(DimensionError, match=message):
        StateAxis("p", axis, entries, others, batched)


def test_a_tensor_that_fits_no_size_is_refused() -> None:
    mixer = Mixer(N)
    mixer.scales = torch.ones(1, G * N + 6 + 1)
    with pytest.raises(DimensionError, match="scales has 22 entries"):
        layout_of_mixer().size_changes(mixer, R)


@settings(max_examples=300, deadline=None)
@given(
    heads=st.integers(1, 64),
    head_dim=st.integers(1, 512),
    size=st.integers(1, 512),
    rounding=st.sampled_from([int, round]),
)
def test_a_share_in_a_config_gives_exactly_the_size(heads: int, head_dim: int, size: int, rounding) -> None:
    """Code that reads such a field rounds down as often as not: a share a rounding too small would lose a state."""
    config = types.SimpleNamespace(hidden_size=heads * head_dim, num_heads=heads, qk_dim_factor=0.5)
    told = ConfigSize("qk_dim_factor", share_of="hidden_size", heads="num_heads")
    config.qk_dim_factor = told.value(config, size)
    assert rounding(config.hidden_size * config.qk_dim_factor) // heads == size == told.read(config)


def test_a_size_that_a_config_does_not_tell() -> None:
    config = types.SimpleNamespace(state_size=None, qk_dim_factor=None)
    assert ConfigSize("state_size").read(config) is None and ConfigSize("absent").read(config) is None
    assert ConfigSize("qk_dim_factor", share_of="hidden_size").read(config) is None
    assert ConfigSize("state_size").value(config, torch.tensor(4)) == 4
