"""What is checked about a stream and its APIs before a query is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vouch.distillation.apis import Api
from vouch.distillation.similarity import evaluating
from vouch.errors import ConfigError, did_you_mean
from vouch.training import Run, seeded

if TYPE_CHECKING:
    from vouch.distillation.apistream import APIStream


def feature_width(features: nn.Module, shape: tuple[int, int, int]) -> int:
    """`D` of a network that gives `(B, D)` for pictures `(B, *shape)`.

    Raises:
        ConfigError: it does not take such pictures, or gives something else.
    """
    device = next((p.device for p in features.parameters()), torch.device("cpu"))
    try:
        with evaluating(features), torch.no_grad():
            found = features(torch.zeros(2, *shape, device=device))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"features do not take pictures {shape}: {error}") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"features give {got} for 2 pictures", hint="end with a flat layer: (B, D)")
    return int(found.shape[1])


def still_to_learn(
    stream: APIStream,
    apis: Sequence[Api],
    raw: Mapping[str, Tensor],
    tests: Mapping[str, tuple[Tensor, Tensor]],
    run: Run,
) -> list[Api]:
    """The APIs not learned yet, once all that is said about them is found right.

    Raises:
        ConfigError: something else than APIs, names or classes taken, shapes that differ, labels or pictures out of
            range, a budget too small for one round.
    """
    for api in apis:
        if not isinstance(api, Api):
            raise ConfigError(
                f"a {type(api).__name__} is no Api", hint="wrap it: Api(service, classes, shape, name), see there"
            )
    names = [api.name for api in apis]
    if len(set(names)) < len(names):
        raise ConfigError(f"two APIs have one name: {names}")
    for what, given in (("raw", raw), ("tests", tests)):
        for name in given:
            if name not in (*names, *stream.apis):
                raise ConfigError(f"{what} is for an API {name!r}", hint=did_you_mean(name, [*names, *stream.apis]))
    todo = [api for api in apis if api.name not in stream.apis]
    running = None if stream.task is None else stream.task.name
    if running is not None and (not run.resume or not todo or todo[0].name != running):
        raise ConfigError(f"API {running!r} was left unfinished", hint="give it first, with Run(resume=True)")
    sizes = {name: len(group) for name, group in zip(stream.apis, stream.head.groups, strict=False)}
    for name, (inputs, labels) in tests.items():
        check_test(name, inputs, labels, stream.shape, (sizes | {api.name: len(api.classes) for api in todo})[name])
    known = set(stream.head.classes)
    for api in todo:
        if api.shape != stream.shape:
            raise ConfigError(f"API {api.name!r} takes pictures {api.shape}, the model {stream.shape}")
        if api.name == running:  # its classes and budget were checked when it was begun
            group = stream.head.groups[-1]
            if (begun := [stream.head.classes[stream.head.owner[at]] for at in group]) != stream.names(api):
                raise ConfigError(f"API {api.name!r} has the classes {stream.names(api)}; it was begun with {begun}")
            continue
        _check_classes(stream, api, known)
        _check_cost(stream, api, raw.get(api.name))
        known |= set(stream.names(api))
    if todo and stream.config.queries == "generators":
        with torch.no_grad(), seeded(run.seed):
            made = tuple(stream.make_generators()[0](torch.zeros(2, stream.config.latent)).shape[1:])
        if made != stream.shape:
            raise ConfigError(f"the generator makes pictures {made}, the model takes {stream.shape}")
    return todo


def check_test(name: str, inputs: Tensor, labels: Tensor, shape: tuple[int, int, int], classes: int) -> None:
    """Refuse test pictures of another shape, and labels that are not numbers of an API's classes.

    Raises:
        ConfigError: they are.
    """
    if tuple(inputs.shape[1:]) != shape or not len(inputs) or tuple(labels.shape) != (len(inputs),):
        raise ConfigError(
            f"the test of API {name!r} has inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)}",
            hint=f"give (n, {', '.join(map(str, shape))}) and (n,)",
        )
    low, high = int(labels.min()), int(labels.max())
    if labels.is_floating_point():
        raise ConfigError(f"the test of API {name!r} has labels of {labels.dtype}", hint="give int64: labels.long()")
    if low < 0 or high >= classes:
        raise ConfigError(
            f"the test of API {name!r} has labels {low} to {high}; it has {classes} classes",
            hint="count them as the API does, from 0",
        )


def _check_classes(stream: APIStream, api: Api, known: set[str]) -> None:
    called, given = stream.names(api), stream.mapping.get(api.name, {})
    for name in given:
        if name not in api.classes:
            raise ConfigError(f"API {api.name!r} has no class {name!r}", hint=did_you_mean(name, api.classes))
    unclear = [n for c, n in zip(api.classes, called, strict=True) if n in known and c not in given]
    unclear += [name for name in called if called.count(name) > 1]
    if unclear:
        raise ConfigError(
            f"class {unclear[0]!r} of API {api.name!r} is taken already",
            hint="say in mapping={api: {its name: name here}} whether it is the same class or another one",
        )


def _check_cost(stream: APIStream, api: Api, raw: Tensor | None) -> None:
    if raw is not None:
        if tuple(raw.shape[1:]) != stream.shape or not len(raw):
            raise ConfigError(f"raw inputs of API {api.name!r} are {tuple(raw.shape)}, not (n, *{stream.shape})")
        if not bool(raw.abs().max() <= 1):  # also false where not a number
            raise ConfigError(f"raw inputs of API {api.name!r} are not within [-1, 1]", hint="scale them: 2 x - 1")
    elif stream.config.queries == "raw":
        raise ConfigError(f"queries is 'raw', and there are no raw inputs for API {api.name!r}")
    need, left = stream.round_cost(raw) + (0 if raw is None else len(raw)), stream.ledger.left(api)
    if left < need:
        raise ConfigError(
            f"the budget of API {api.name!r} has {left} rows left; one round takes {need}",
            hint="a larger budget, or a smaller batch_size, model_steps or directions",
        )
