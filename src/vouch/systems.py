"""The 46 systems of the mission, and how far each has come."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from vouch.config import Config


@dataclass(frozen=True)
class System:
    """One published method: slug, name, arXiv ids, the room it belongs to, and what it is in one line."""

    slug: str
    name: str
    papers: tuple[str, ...]
    area: str
    summary: str


def _rows(text: str) -> tuple[System, ...]:
    systems = []
    for line in text.strip().splitlines():
        slug, name, papers, area, summary = (cell.strip() for cell in line.split("|"))
        systems.append(System(slug, name, tuple(papers.split()), area, summary))
    return tuple(systems)


SYSTEMS = _rows(
    """
    nais | NAIS | 1809.07053 | recommenders/collaborative | item similarities weighted by attention over the history
    apr | APR | 1808.03908 | recommenders/collaborative | pairwise ranking trained against the worst small change of its vectors
    cdl | CDL | 1604.01252 | recommenders/multimodal | people and pictures in one space, learned by comparing two pictures
    mgbert | MG-BERT | 2010.12284 | recommenders/multimodal | a graph transformer pre-trained on items with pictures and text
    idsf | IDSF | 2311.05956 | recommenders/multimodal | item ids as faint features of content and structure
    modest | MODEST | 2306.14179 | recommenders/multimodal | item weights that take apart what modalities share by accident
    ticoserec | TiCoSeRec | 2212.08262 | recommenders/sequential | contrastive sequences, augmented with an eye on time intervals
    actsr | AC-TSR | 2308.09419 | recommenders/sequential | attention corrected by space and by an adversary
    eclsr | ECL-SR | 2211.05290 | recommenders/sequential | contrastive learning that tells mild from strong augmentation
    difsr | DIF-SR | 2204.11046 | recommenders/sequential | side information that enters the attention, not the input
    gcl4sr | GCL4SR | 2205.14837 | recommenders/sequential | views of a global transition graph, contrasted
    remi | REMI | 2302.14532 | recommenders/sequential | several interests with hard negatives and even routing
    attenmixer | Atten-Mixer | 2206.12781 | recommenders/session | sessions read at several levels of intent, without a graph network
    sitn | SITN | 2302.14438 | recommenders/transfer | interests carried between domains by clusters
    sass | SASS | 2208.11457 | recommenders/transfer | scenarios with gates, trained in two stages
    llmrec | LLMRec | 2308.12241 | language | language models prompted and tuned for five recommendation tasks
    showcase | Personalized Showcases | 2207.00422 | language | pictures chosen for a person, with an explanation that fits them
    textattack | Text attack | 2402.14836 | audit | more exposure for an item by small changes of its text
    adatask | AdaTask | 2211.15055 | multitask | adaptive optimizers that keep accounts by task
    gradcraft | GradCraft | 2407.19682 | multitask | gradients of equal size, then free of conflicts
    adamerging | AdaMerging | 2310.02575 | merging | merging coefficients learned without labels, by entropy
    surgery | Representation Surgery | 2402.02705 | merging | small modules that undo the bias of a merged model
    meal | MEAL | 1812.02425 1908.08520 | distillation | an ensemble in one network, by adversarial losses block by block
    apistream | API stream distillation | 2309.00023 | distillation | one network from a stream of prediction services, without data
    dynafed | Dynafed | 2211.10878 | federated | pseudo data on the server from the path of the global model
    smartfl | SmartFL | 2211.05554 | federated | aggregation weights tuned on a few clean examples
    dvfsr | DV-FSR | 2409.07500 | audit | a targeted attack on federated sequence models, and a defence
    extraction | Model extraction | 2109.01165 | audit | a recommender stolen through its answers, then attacked
    inversion | Model inversion | 2306.13965 | audit | inputs reconstructed from outputs, with adversarial examples
    sampling | Privacy of sampling | 2007.12674 | audit | what stratified and cluster sampling do to a privacy budget
    denoise-compression | DenoiseCompression | 2207.10869 | content | image compression that leaves the noise out
    iicnet | IICNet | 2109.04242 | content | an invertible network that hides pictures in one and gives them back
    lavit | LaVIT | 2309.04669 | content | pictures as a variable number of discrete tokens
    victor | VICTOR | 2104.09411 | content | video and language pre-trained by contrast and proxy tasks
    crossmodal-mixer | Cross-modal mixer | 2308.13820 | content | a masked auto-encoder over mixed video and sound
    crosstimenet | CrossTimeNet | 2403.12372 | content | time series as tokens, pre-trained across domains
    selfdetox | Self-detoxification | 2203.03072 | language | a language model made less toxic by its own outputs
    emodialog | EACM | 2106.03044 | language | replies that read a feeling and express one
    recam | Option filling | 2105.12051 | language | abstract-meaning questions with each option filled in before it is judged
    rationale | DR rationalization | 2305.13599 | explain | a text chooser and a predictor that learn at different speeds
    lipschitz | 1-Lipschitz nets | 2206.06854 | explain | transport losses that give clean saliency and counterfactuals
    causal-paths | Causal path analysis | 2305.08950 | explain | interventions on hidden paths that give a task's causal graph
    dense-point | Joint dense-point segmentation | 2306.12155 | content | outlines as polygons, fed by a mask
    random-conv | Random convolutions | 2301.11360 | nn | frozen random filters, combined by what is learned
    dark-showers | CoDAE | 2306.12955 | anomaly | a conditional pair of auto-encoders for sparse pictures
    pcgan | pcGAN | 2306.10943 | generate | a generator that matches the distributions of chosen statistics
    """
)


def status_rows() -> list[dict[str, Any]]:
    """Every system as `{"slug", "name", "area", "papers", "summary", "status"}`; status `works` or `not yet`.

    A system works when its room has its module.
    """
    return [
        {
            "slug": system.slug,
            "name": system.name,
            "area": system.area,
            "papers": list(system.papers),
            "summary": system.summary,
            "status": "works" if module_of(system) else "not yet",
        }
        for system in SYSTEMS
    ]


def module_of(system: System) -> str | None:
    """The module of a system; None if there is none yet."""
    name = f"vouch.{system.area.replace('/', '.')}.{system.slug.replace('-', '_')}"
    try:
        return name if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:  # the room itself is not built yet
        return None


def settings_of(module: str) -> type[Config] | None:
    """The config that a module defines, if it has one."""
    found = vars(importlib.import_module(module)).values()
    configs = [each for each in found if isinstance(each, type) and issubclass(each, Config)]
    return next((each for each in configs if each.__module__ == module), None)


def baseline_rows() -> list[dict[str, Any]]:
    """The registered baselines, in the same form."""
    from vouch.registry import methods

    return [
        {
            "slug": slug,
            "name": kind.card.name,
            "area": kind.card.area,
            "papers": [kind.card.paper] if kind.card.paper else [],
            "summary": kind.card.summary,
            "status": "works",
        }
        for slug, kind in methods().items()
        if kind.card.baseline
    ]
