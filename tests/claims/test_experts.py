from __future__ import annotations

import pytest
import torch

from vouch.claims.experts import PICTURES, Experts, experts, read_collections
from vouch.errors import ConfigError


@pytest.fixture(scope="module")
def made() -> Experts:
    return experts(PICTURES["smoke"], 0, "smoke")


def test_experts_learn_their_tasks_from_the_base(made: Experts) -> None:
    base, own = made.accuracy(made.base), made.expert_accuracy()
    assert sum(own) > sum(base) and all(value > 0.85 for value in own)
    for task, state in enumerate(made.states):
        assert made.accuracy(state)[task] == own[task]
        assert all(not torch.equal(state[name], made.base[name]) for name in state if name.endswith("weight"))
        far = sum((state[name] - made.base[name]).square().sum() for name in state)
        assert far < 0.5 * sum(tensor.square().sum() for tensor in made.base.values())


def test_the_parts_share_no_picture(made: Experts) -> None:
    for task in range(len(made.tasks)):
        parts = [getattr(made, name)[task][0] for name in ("train", "valid", "adapt", "test")]
        together = torch.cat([x.flatten(1) for x in parts])
        assert len(together) == 600 == len(together.unique(dim=0))
        seen = made.base_train[task][0]
        assert torch.equal(seen, parts[0][: len(seen)]) and len(seen) == len(parts[0]) // 5
        # the training part of the collection gave train and valid, its test part the others
        images = read_collections(PICTURES["smoke"]).images[task]
        test = (images.test.tensor(grey=True) * 2 - 1).flatten(1)
        assert torch.equal(torch.cat(parts[2:]).flatten(1).unique(dim=0), test.unique(dim=0))


def test_the_model_is_the_encoder_under_each_head(made: Experts) -> None:
    network = made.model(made.states[1])
    x = made.test[2][0]
    assert torch.equal(network(x, 2), made.heads[2](made.encoder(made.states[1])(x)))
    assert torch.equal(made.encoder()(x), made.encoder(made.base)(x))
    assert not any(parameter.requires_grad for head in made.heads for parameter in head.parameters())
    network.encoder.first.weight.data.zero_()  # fresh: the states stay as they are
    assert made.states[1]["first.weight"].any()


def test_a_seed_gives_the_same_again_and_another_seed_another(made: Experts) -> None:
    again, other = experts(PICTURES["smoke"], 0, "smoke"), experts(PICTURES["smoke"], 1, "smoke")
    for first, second, third in zip(made.states, again.states, other.states, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["last.weight"], third["last.weight"])
    assert not torch.equal(made.test[0][0], other.test[0][0])


def test_the_fingerprint_is_that_of_all_collections() -> None:
    first, other = read_collections("drawn,drawn-1"), read_collections("drawn,drawn-2")
    assert first.fingerprint != other.fingerprint and first.fingerprint == read_collections("drawn,drawn-1").fingerprint
    assert first.name == "drawn 0 + drawn 1"


@pytest.mark.parametrize("source", ["drawn", "drawn,drawn", ""])
def test_one_task_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="two tasks or more"):
        read_collections(source)


@pytest.mark.real
def test_the_real_collections_are_of_the_stated_sizes(real_data) -> None:
    for name in PICTURES["desk"].split(","):
        real_data(name)
    images = read_collections(PICTURES["desk"]).images
    assert [each.n_train for each in images] == [5_000, 2_943, 7_291, 4_000]
    assert [len(each) - each.n_train for each in images] == [5_000, 1_500, 2_007, 2_000]
    assert all(len(set(each.label[each.n_train :].tolist())) == 10 for each in images)
    assert images[3].label[:4_000].max() == 9  # ten classes in the first part as well
