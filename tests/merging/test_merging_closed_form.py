"""Fisher merging and RegMean: against brute force and least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.merging.arithmetic import average
from vouch.merging.fisher import fisher, fisher_information
from vouch.merging.regmean import gram_matrices, regmean


class Net(nn.Module):
    """Two linear layers with a norm between; an encoder or, with its last layer, a classifier."""

    def __init__(self, seed: int = 0, out: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.norm, self.two = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.norm(self.one(x))))


def models(n: int = 3) -> list[Net]:
    return [Net(seed) for seed in range(n)]


def same(left, right, atol: float = 1e-6) -> None:
    for name in right:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0)


def test_information_is_the_expected_square_of_the_gradient() -> None:
    """Input by input and class by class, as the formula has it."""
    net, head = Net(0), nn.Linear(4, 3)
    x = torch.randn(7, 5)
    wanted = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in x:
        log_p = head(net(row[None])).log_softmax(1)[0]
        for c in range(3):
            gradients = torch.autograd.grad(log_p[c], list(net.parameters()), retain_graph=True)
            for sum_, gradient in zip(wanted.values(), gradients, strict=True):
                sum_ += log_p[c].exp().detach() * gradient**2 / len(x)
    for at_once in (1, 2, 64):
        found = fisher_information(net, x, head, classes_at_once=at_once)
        same(found, wanted)
    same(fisher_information(net, [x[:3], x[3:]], head), wanted)
    same(fisher_information(nn.Sequential(net, head), x), {f"0.{name}": value for name, value in wanted.items()})
    few = fisher_information(net, x, head, limit=2)
    same(few, fisher_information(net, x[:2], head))
    assert all(parameter.grad is None for parameter in (*net.parameters(), *head.parameters()))


def test_fisher_is_the_weighted_mean_of_each_entry() -> None:
    nets = models()
    information = [{name: torch.rand_like(p) for name, p in net.named_parameters()} for net in nets]
    found = fisher(nets, information, normalise=False, floor=0.0)
    states = [net.state_dict() for net in nets]
    for name in states[0]:
        f = torch.stack([each[name] for each in information])
        theta = torch.stack([state[name] for state in states])
        torch.testing.assert_close(found[name], (f * theta).sum(0) / f.sum(0))
    lengths = [sum(value.square().sum() for value in each.values()).sqrt() for each in information]
    share = [{n: v / length for n, v in each.items()} for each, length in zip(information, lengths, strict=True)]
    same(fisher(nets, information, floor=0.0), fisher(nets, share, normalise=False, floor=0.0))
    larger = [{name: 100 * value for name, value in information[0].items()}, *information[1:]]
    same(fisher(nets, larger), fisher(nets, information))  # no model dominates by its scale


def test_fisher_in_its_limits() -> None:
    nets = models()
    equal = [{name: torch.ones_like(p) for name, p in nets[0].named_parameters()}] * 3
    same(fisher(nets, equal), average(nets))
    zero = [{name: torch.zeros_like(p) for name, p in nets[0].named_parameters()}] * 3
    same(fisher(nets, zero), average(nets))
    information = [{name: torch.rand_like(p) for name, p in net.named_parameters()} for net in nets]
    same(fisher([nets[0]] * 3, information), nets[0].state_dict())
    only = [equal[0], *zero[1:]]
    same(fisher(nets, only, floor=0.0), nets[0].state_dict())
    swapped = fisher(nets[::-1], information[::-1])
    same(swapped, fisher(nets, information))
    with pytest.raises(DataError, match=r"'one.weight'.*'model 1'"):
        fisher(nets, [information[0], {**information[1], "one.weight": torch.ones(2)}, information[2]])
    raised = [  # the floor is a share of a model's own length
        {n: x.clamp(min=0.1 * torch.cat([v.flatten() for v in each.values()]).norm()) for n, x in each.items()}
        for each in information
    ]
    floored = fisher(nets, information, normalise=False, floor=0.1)
    same(floored, fisher(nets, raised, normalise=False, floor=0.0))
    assert not torch.allclose(floored["one.weight"], fisher(nets, information, normalise=False)["one.weight"])
    with pytest.raises(DataError, match="negative or not finite"):
        fisher(nets, [information[0], {**information[1], "two.bias": -torch.ones(4)}, information[2]])
    with pytest.raises(ConfigError, match="2 information for 3 models"):
        fisher(nets, information[:2])


def test_regmean_is_the_least_squares_solution() -> None:
    """Stacking the inputs of all models, with what each model answers as targets."""
    g = np.random.default_rng(0)
    inputs = [g.normal(size=(40, 5)) @ g.normal(size=(5, 5)) for _ in range(3)]
    layers = [nn.Linear(5, 4) for _ in range(3)]
    grams = [{"weight": torch.from_numpy(x.T @ x / len(x))} for x in inputs]
    found = regmean(layers, grams, shrink=1.0)
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    answers = np.concatenate([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    solution, *_ = np.linalg.lstsq(np.concatenate(inputs), answers, rcond=None)
    np.testing.assert_allclose(found["weight"].numpy(), solution.T, atol=1e-5)
    same({"bias": found["bias"]}, {"bias": torch.stack([layer.bias for layer in layers]).mean(0).detach()})
    # the gradient of sum_k ||X_k W^T - X_k W_k^T||^2 is zero, relative to its parts
    doubles = [layer.double() for layer in layers]
    merged = regmean(doubles, grams, shrink=1.0)["weight"].numpy()
    parts = [(merged - w.detach().numpy()) @ gram["weight"].numpy() for w, gram in
             zip((layer.weight for layer in doubles), grams, strict=True)]  # fmt: skip
    assert np.abs(sum(parts)).max() < 1e-6 * max(np.abs(part).max() for part in parts)


def test_regmean_shrinks_what_is_off_the_diagonal() -> None:
    g = torch.Generator().manual_seed(0)
    layers = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    grams = [x.T @ x for x in (torch.randn(9, 3, generator=g) for _ in range(2))]
    shrunk = [0.6 * gram + 0.4 * torch.diag(gram.diag()) for gram in grams]
    left = sum(shrunk)
    right = sum(gram @ layer.weight.T for gram, layer in zip(shrunk, layers, strict=True))
    found = regmean(layers, [{"weight": gram} for gram in grams], shrink=0.6)["weight"]
    torch.testing.assert_close(found, torch.linalg.solve(left, right).T.detach())
    diagonal = regmean(layers, [{"weight": gram} for gram in grams], shrink=0.0)["weight"]
    d = torch.stack([gram.diag() for gram in grams])
    theta = torch.stack([layer.weight.detach() for layer in layers])
    torch.testing.assert_close(diagonal, (d[:, None] * theta).sum(0) / d.sum(0))


def test_regmean_in_its_limits() -> None:
    nets = models()
    x = torch.randn(64, 5)
    grams = [gram_matrices(net, x + k) for k, net in enumerate(nets)]
    same(regmean(nets, [grams[0]] * 3), average(nets), atol=1e-5)
    same(regmean([nets[0]] * 3, grams), nets[0].state_dict(), atol=1e-5)
    same(regmean(nets[::-1], grams[::-1]), regmean(nets, grams), atol=1e-5)
    without = [{"two.weight": each["two.weight"]} for each in grams]
    torch.testing.assert_close(regmean(nets, without)["one.weight"], average(nets)["one.weight"])
    # inputs that are always 0, as the margins of pictures, leave the mean
    dead = x.clone()
    dead[:, 2] = 0
    found = regmean(nets, [gram_matrices(net, dead) for net in nets])["one.weight"]
    mean = average(nets)["one.weight"]
    torch.testing.assert_close(found[:, 2], mean[:, 2], atol=1e-3, rtol=0)
    for shrink in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="shrink"):
            regmean(nets, grams, shrink=shrink)
    with pytest.raises(DataError, match=r"'one.weight'.*'model 0'"):
        regmean(nets, [{**grams[0], "one.weight": torch.eye(4)}, *grams[1:]])


def test_gram_matrices_are_of_the_inputs_of_each_layer() -> None:
    net, x = Net(), torch.randn(50, 5)
    net.train()
    found = gram_matrices(net, x, batch_size=7)
    assert net.training and set(found) == {"one.weight", "two.weight"}
    with torch.no_grad():
        hidden = torch.tanh(net.norm(net.one(x)))
    torch.testing.assert_close(found["one.weight"], x.T @ x / 50)
    torch.testing.assert_close(found["two.weight"], hidden.T @ hidden / 50)
    tokens = torch.randn(6, 4, 5)  # every position counts
    layer = nn.Sequential(nn.Linear(5, 2))
    torch.testing.assert_close(
        gram_matrices(layer, tokens)["0.weight"], tokens.flatten(0, 1).T @ tokens.flatten(0, 1) / 24
    )
    with pytest.raises(ConfigError, match=r"no nn\.Linear"):
        gram_matrices(nn.Sequential(nn.Conv1d(1, 1, 1)), torch.randn(2, 1, 3))
    with pytest.raises(DataError, match="no inputs of task 'east'"):
        gram_matrices(net, [], task="east")
    for look in (gram_matrices, fisher_information):
        for bad in (torch.randn(4, 3), torch.ones(4, 5, dtype=torch.long), torch.tensor(1.0), torch.randn(4)):
            with pytest.raises((ConfigError, DataError), match=r"task 'west'|not features"):
                look(net, bad, task="west")
    with pytest.raises(DataError, match=r"'one.weight' of model 'model 1' has values that are not finite"):
        regmean(models(2), [found, {**found, "one.weight": torch.full((5, 5), torch.nan)}])
