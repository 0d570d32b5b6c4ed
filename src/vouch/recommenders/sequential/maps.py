"""Looking into transformers: the attention weights of each layer for given histories."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vouch.data import Queries
from vouch.errors import ConfigError
from vouch.nn.transformer import Context
from vouch.recommenders.sequential.base import SequentialRecommender


@torch.no_grad()
def attention_maps(model: SequentialRecommender, queries: Queries) -> dict[str, list[Tensor]]:
    """Attention weights `(B, H, T, T)` of each layer by name, from query position to key position.

    `attention` is what the layer used. AC-TSR also leaves `origin`, before the adversarial calibrator, and `mask`, the
    attacker's. Histories are left-aligned; rows and columns after the end of one mean nothing.

    Raises:
        ConfigError: the model has no attention.
    """
    if not model.attends:
        raise ConfigError(f"{model.card.slug} has no attention to look at", hint="sasrec, bert4rec and actsr have")
    lengths = np.minimum(queries.lengths, model.reads)
    items, lengths = model.inputs(queries, np.arange(len(queries)), lengths)
    device = model.network.item.weight.device
    context = Context(watch=True)
    was_training = model.network.training
    model.network.eval()
    model.network(torch.from_numpy(items).to(device), torch.from_numpy(lengths).to(device), context)
    model.network.train(was_training)
    return context.notes
