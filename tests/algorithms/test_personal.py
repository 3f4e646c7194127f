"""Personal parameters stay at their node: every rule goes on there as with W = 1, and nothing of them travels or is measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_algorithm_oracles import complete, ring
from torch import nn
from torch.nn import functional as F

import p2pfl
from networks import Network, finish, plan_of
from p2pfl.algorithms import ALGORITHMS, COMPRESSORS, Choco, PartlyShared
from p2pfl.errors import ConfigError
from p2pfl.launcher import up
from p2pfl.params import Layout, frozen_of
from p2pfl.tasks import TASKS, Site, Task
from p2pfl.training import build_model
from rows import context, one_round
from rows import tables as tables_of

TOLERANCE = 1e-12


def three_layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 1)).double()


LAYOUT = Layout.of(three_layers(), personal=["1.*", "3.bias"])
SHARED, SHARED_PLACES = LAYOUT.part(personal=False)
OWN, OWN_PLACES = LAYOUT.part(personal=True)


def taken(x_NP, places):
    return torch.cat([x_NP[..., place] for place in places], dim=-1)


def rule_and_graph(name):
    rule = ALGORITHMS[name]()
    if "tree" in rule.requires:
        return rule, p2pfl.topology.weighted(p2pfl.topology.make("path", 6), "metropolis")
    if "column stochastic" in rule.requires:
        return rule, p2pfl.topology.weighted(p2pfl.topology.make("ring", 6), "push-sum")
    return rule, complete(6) if "complete" in rule.requires else ring(6)


def run(rule, graph, x_NP, gradient, layout):
    """Five rounds of training, then two that only mix."""

    def of(number):
        steps = 2 if number < 5 else 0
        return replace(context(graph, number, local_steps=steps), layout=layout)

    state = rule.init(x_NP, of(0))
    for number in range(7):
        state = one_round(rule, graph, state, of(number), gradient if number < 5 else None)
    return rule.estimate(state)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_both_parts_go_as_if_they_were_alone(name):
    """With a loss of separate terms the shared part is the rule's own run, and the personal one its run with W = 1."""
    rule, graph = rule_and_graph(name)
    torch.manual_seed(1)
    x_NP, slope_NP, centre_NP = (draw(6, LAYOUT.size, dtype=torch.float64) for draw in (torch.randn, torch.rand, torch.randn))

    def gradient_of(places=None):
        slope, centre = (slope_NP, centre_NP) if places is None else (taken(slope_NP, places), taken(centre_NP, places))
        return lambda x, *_: slope * (x - centre)

    found_NP = run(PartlyShared(rule, LAYOUT), graph, x_NP, gradient_of(), LAYOUT)
    shared_NS = run(rule, graph, taken(x_NP, SHARED_PLACES), gradient_of(SHARED_PLACES), SHARED)
    tables_of.cache_clear()
    nobody = graph.with_weights(0.0)  # W = 1: messages come and count for nothing
    by_itself = ALGORITHMS["dpsgd"]() if name in ("relaysgd", "powergossip") else rule  # of the others' messages, or of matrices only
    own_NL = run(by_itself, nobody, taken(x_NP, OWN_PLACES), gradient_of(OWN_PLACES), OWN)

    torch.testing.assert_close(taken(found_NP, SHARED_PLACES), shared_NS, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(taken(found_NP, OWN_PLACES), own_NL, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_only_shared_coordinates_are_sent(name):
    rule, graph = rule_and_graph(name)
    x_NP = torch.randn(6, LAYOUT.size).double()
    rules = (PartlyShared(rule, LAYOUT), x_NP, LAYOUT), (rule, taken(x_NP, SHARED_PLACES), SHARED)
    sent = []
    for one, start, layout in rules:
        ctx = replace(context(graph, 0), layout=layout)
        sent.append(one.outgoing(one.init(start, ctx), 0, ctx))

    assert sent[0].keys() == sent[1].keys()
    for channel, message in sent[1].items():
        assert torch.equal(sent[0][channel], message)


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_compressors_see_shared_coordinates_only(name):
    rule, graph = Choco(compressor=COMPRESSORS[name]()), ring(6)
    ctx, x_NP = context(graph, 0), torch.randn(6, LAYOUT.size).double()
    partly, whole = PartlyShared(rule, LAYOUT), taken(x_NP, SHARED_PLACES)
    sent = partly.outgoing(partly.init(x_NP, replace(ctx, layout=LAYOUT)), 0, replace(ctx, layout=LAYOUT))
    expected = rule.outgoing(rule.init(whole, replace(ctx, layout=SHARED)), 0, replace(ctx, layout=SHARED))

    for channel, message in expected.items():
        assert torch.equal(sent[channel], message)


def test_personal_tensors_are_in_layout_and_digest():
    layout = Layout.of(three_layers(), personal=["1.*"])

    assert layout.personal == ("1.weight", "1.bias")
    assert layout.shared_bytes == layout.size_bytes - 4 * 8
    assert layout.digest != Layout.of(three_layers()).digest
    assert [row["name"] for row in layout.table() if not row["travels"]] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("patterns", "fault"),
    [
        (["head.*"], r"personal: 'head\.\*' matches no parameter; the trained parameters are 0\.weight, 0\.bias, 1\.weight"),
        (["2.*"], r"personal: '2\.\*' matches only frozen parameters, which never travel; the trained parameters are 0\.weight"),
        (["*"], r"personal: \['\*'\] matches every trained parameter, so that nothing would travel; the trained parameters are"),
    ],
)
def test_patterns_that_name_nothing_or_everything_are_refused(patterns, fault):
    model = three_layers()
    model[2].requires_grad_(False)

    with pytest.raises(ValueError, match=fault):
        Layout.of(model, personal=patterns)


# ---- runs


class Adapted(nn.Module):
    """A linear layer that stays, with a low-rank one beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Encoder(nn.Module):
    """A small transformer over six tokens, frozen but for its adapters and the classifier behind it."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(12, width), nn.Parameter(torch.randn(6, width) / 4)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.requires_grad_(False)
        self.query_key_value, self.wide = Adapted(self.query_key_value), Adapted(self.wide)
        self.classifier = nn.Linear(width, 1)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places
        batch, length, width = x.shape
        q, k, v = self.query_key_value(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        x = x + self.narrow(F.gelu(self.wide(self.norms[1](x))))
        return self.classifier(x.mean(dim=1))


def sites_of(make):
    draw = torch.Generator().manual_seed(0)
    sites = []
    for name in ("basel", "bern", "geneva", "zurich"):
        x, y = make(draw)
        sites.append(Site(name=name, train=(x[8:], y[8:]), test=(x[:8], y[:8])))
    return sites


def tokens(draw):
    x = torch.randint(0, 12, (24, 6), generator=draw)
    return x, (x.float().mean(dim=1, keepdim=True) > 5.5).float()


def numbers(draw):
    x = torch.randn(24, 3, generator=draw)
    return x, (x.sum(dim=1, keepdim=True) > 0).float()


def error(outputs, targets):
    return float(((outputs > 0) != (targets > 0)).double().mean())


def task_of(name, model, make):
    return Task(name=name, model=model, loss=F.binary_cross_entropy_with_logits, metrics={"error": error}, sites=sites_of(make))


@p2pfl.task
def encoder_task():
    return task_of("encoder", Encoder, tokens)


def layers_task():
    return task_of("three-layers", lambda: three_layers().float(), numbers)


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "encoder", encoder_task)
    monkeypatch.setitem(TASKS, "three-layers", layers_task)


def experiment_of(task, **changes):
    base = {"task": {"name": task}, "topology": {"name": "ring"}, "rounds": 4, "stop": None, "baselines": [], "save_models_every": 1}
    return {**base, "algorithm": {"local_steps": 2, "batch_size": 4}, "optimizer": {"lr": 0.05}, **changes}


def stacked(models):
    return torch.stack([models[name] for name in sorted(models)])


BOTH_WAYS = {
    "bn-and-head": ("three-layers", {"personal": ["1.*", "3.*"]}),
    "tracking": ("three-layers", {"personal": ["3.*"], "algorithm": {"name": "gradient-tracking", "local_steps": 1, "batch_size": 4}}),
    "choco": ("three-layers", {"personal": ["1.*"], "algorithm": {"name": "choco", "batch_size": 4}, "compressor": {"name": "top-k"}}),
    "push-sum": ("three-layers", {"personal": ["1.*"], "weights": "push-sum", "algorithm": {"name": "push-sum", "batch_size": 4}}),
    "stopping": ("three-layers", {"personal": ["3.*"], "stop": {"relative_consensus": 0.05, "settle": 60}}),
    "adapters": ("encoder", {}),
    "adapters-and-personal-head": ("encoder", {"personal": ["classifier.*"]}),
}


@pytest.mark.no_cover
@pytest.mark.parametrize("case", BOTH_WAYS)
def test_daemons_equal_the_simulator(case, tmp_path):
    task, changes = BOTH_WAYS[case]
    experiment = experiment_of(task, **changes)
    simulated = p2pfl.simulate(experiment, out=tmp_path / "simulator")

    async def main():
        async with Network(plan_of(**experiment), tmp_path) as network:
            network.start()

            assert set(await network.ended()) == {simulated.summary["stop_reason"]}
            rounds = simulated.summary["rounds"]
            assert {network.summary(name)["rounds"] for name in network.plan.names} == {rounds}
            for number in range(rounds):
                expected = stacked(simulated.models_after(number))
                assert float((network.models(number) - expected).norm() / expected.norm()) < 1e-6
            assert sum(network.summary(name)["bytes_sent"] for name in network.plan.names) == simulated.summary["bytes_sent"]

    finish(main())


def test_a_stop_is_certified_by_what_is_shared(tmp_path):
    """Heads that drift apart keep nobody from agreeing."""
    changes = {"personal": ["3.*"], "stop": {"relative_consensus": 1e-3, "settle": 100}}
    run = p2pfl.simulate(experiment_of("three-layers", **changes), out=tmp_path / "run")
    layout = Layout.of(three_layers(), personal=["3.*"])
    x_NP = stacked(run.models)
    shared_NS = layout.shared_of(x_NP)

    assert run.summary["stop_reason"] == "converged"
    assert run.summary["relative_consensus"] < 1e-3
    assert float((x_NP - x_NP.mean(dim=0)).norm(dim=1).max()) > 1e-2
    expected = float((shared_NS - shared_NS.mean(dim=0)).norm(dim=1).square().mean().sqrt())
    assert run.summary["consensus_distance"] == pytest.approx(expected, rel=1e-5)


def test_there_is_no_mean_model_and_everybody_says_why(tmp_path):
    run = p2pfl.simulate(experiment_of("three-layers", personal=["1.*", "3.*"]), out=tmp_path / "runs" / "run")

    assert run.summary["mean_model"] is None
    assert run.summary["mean_model_reason"] == "4 tensors are personal (1.weight, ...): no node has a mean of them"
    assert run.experiment.personal == ("1.*", "3.*")
    model = p2pfl.load(run, "bern")
    assert torch.equal(model[3].weight.reshape(-1), Layout.of(three_layers()).views(run.models["bern"])["3.weight"].reshape(-1))


def test_a_pattern_of_an_experiment_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"personal: 'head' matches no parameter; the trained parameters are 0\.weight"):
        p2pfl.simulate(experiment_of("three-layers", personal=["head"]), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="personal"):
        p2pfl.simulate(experiment_of("three-layers", personal="head"), out=tmp_path / "run")


def test_an_experiment_without_personal_is_written_as_before(tmp_path):
    run = p2pfl.simulate(experiment_of("three-layers", rounds=1), out=tmp_path / "run")

    assert "personal" not in run.experiment.as_dict()


@pytest.mark.parametrize("personal", [[], ["classifier.*"]], ids=["all-adapters", "head-stays"])
def test_of_a_frozen_encoder_only_adapters_travel(personal, tmp_path):
    run = p2pfl.simulate(experiment_of("encoder", personal=personal), out=tmp_path / "run")
    start, end = build_model(encoder_task(), torch.float32, 0), p2pfl.load(run, "bern")
    names = [name for name, p in start.named_parameters() if p.requires_grad and not (personal and name.startswith("classifier"))]
    num_travelling = sum(dict(start.named_parameters())[name].numel() for name in names)
    num_updates = 4 * 4 * 2  # rounds, nodes, neighbours

    assert run.summary["bytes_sent"] / num_updates <= 4 * num_travelling + 2048
    assert sum(p.numel() for p in start.parameters()) > 5 * num_travelling
    before, after = frozen_of(start), frozen_of(end)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [name for name, p in end.named_parameters() if p.requires_grad and not torch.equal(p, dict(start.named_parameters())[name])]
    assert len(moved) == len([p for p in start.parameters() if p.requires_grad])


@pytest.mark.slow
def test_processes_leave_an_encoder_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where a task of one's own is looked for
    name = "test_personal:encoder_task"
    run = up({**experiment_of("encoder"), "task": {"name": name}}, out=tmp_path / "up", allow_tasks=[name])
    simulated = p2pfl.simulate(experiment_of("encoder"), out=tmp_path / "simulator")

    assert run.summary["bytes_sent"] == simulated.summary["bytes_sent"]
    assert float((stacked(run.models) - stacked(simulated.models)).norm() / stacked(simulated.models).norm()) < 1e-6
    start, end = build_model(encoder_task(), torch.float32, 0), p2pfl.load(run, "bern", allow_tasks=[name])
    assert all(torch.equal(value, frozen_of(end)[name]) for name, value in frozen_of(start).items())


@pytest.mark.no_cover
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_goes_on_from_its_checkpoint(resumed, tmp_path, monkeypatch):
    """What a rule keeps of personal coordinates is in the checkpoint."""
    experiment = experiment_of("three-layers", personal=["3.*"], algorithm={"name": "exact-diffusion", "batch_size": 4}, rounds=6)
    whole = p2pfl.simulate(experiment, out=tmp_path / "whole")
    if resumed:
        monkeypatch.setattr("p2pfl.simulator.engine._CHECKPOINT_S", 0.0)

        class Interrupted(Exception):
            pass

        def progress(round, most, row):
            if round == 3:
                raise Interrupted

        with pytest.raises(Interrupted):
            p2pfl.simulate(experiment, out=tmp_path / "run", progress=progress)
        again = p2pfl.simulate(experiment, resume=tmp_path / "run")
    else:
        again = p2pfl.simulate(experiment, out=tmp_path / "run")

    assert torch.equal(stacked(again.models), stacked(whole.models))
