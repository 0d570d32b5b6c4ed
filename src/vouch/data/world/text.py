"""Words of the world: titles from attributes, reviews from attributes, taste and rating."""

from __future__ import annotations

import numpy as np

from vouch.data.world.items import BRANDS, CATEGORIES, COLOURS, MATERIALS, Items

ADJECTIVES = ("Quiet", "Little", "Everyday", "Sunday", "Coastal", "Modern", "Classic", "Rustic", "Slow", "Bright",
              "Soft", "Bold", "Folded", "Hidden", "Open", "Early")  # fmt: skip
ASPECTS = ("colour", "price", "brand", "material", "size", "delivery")
"""What reviews talk about. The first four are attributes of the item."""
PRAISE = ("lovely", "better than I hoped", "exactly right", "a small joy")
COMPLAINT = ("disappointing", "not what I expected", "a let-down", "poor")
MIDDLING = ("fine", "as expected", "acceptable", "all right")


def colour_names() -> list[str]:
    """The names of the colours, by code."""
    return list(COLOURS)


def title(items: Items, code: int) -> str:
    """An item's title, e.g. `Quiet Birkholm mug, stoneware, teal`."""
    category = int(items.category[code])
    adjective = ADJECTIVES[(code * 7 + code // len(ADJECTIVES)) % len(ADJECTIVES)]
    brand = BRANDS[int(items.domain[code])][int(items.brand[code])]
    colour = colour_names()[int(items.colour[code])]
    return f"{adjective} {brand} {CATEGORIES[category]}, {MATERIALS[category]}, {colour} No. {code % 97 + 1}"


def review_aspects(code: int, user: int, row: int, count: int = 2) -> list[str]:
    """The aspects that a review of an event speaks of: a user keeps returning to the same one."""
    favourite = user % 4
    random = np.random.default_rng([code, user, row])
    others = [name for name in ASPECTS if name != ASPECTS[favourite]]
    return [ASPECTS[favourite], *random.choice(others, size=count - 1, replace=False).tolist()]


def review(items: Items, code: int, user: int, row: int, rating: float) -> str:
    """A short review that agrees with the item's attributes and the rating; the same for the same event."""
    random = np.random.default_rng([code, user, row, 1])
    words = PRAISE if rating >= 4 else COMPLAINT if rating <= 2 else MIDDLING
    category = int(items.category[code])
    says = {
        "colour": f"the {colour_names()[int(items.colour[code])]} colour",
        "price": f"the price of {float(items.price[code]):.0f}",
        "brand": f"the work of {BRANDS[int(items.domain[code])][int(items.brand[code])]}",
        "material": f"the {MATERIALS[category]}",
        "size": f"the size of the {CATEGORIES[category]}",
        "delivery": "the delivery",
    }
    parts = [f"{says[aspect]} is {random.choice(words)}" for aspect in review_aspects(code, user, row)]
    return f"{parts[0][0].upper()}{parts[0][1:]}, and {parts[1]}."
