"""A task that the base model can't do and a short fine-tune can: a sentence in, one JSON object out.

Everything is a function of the seed. Train and held-out rows share no (person, item, city) triple.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

SYSTEM = "Extract the order as JSON."

FIRST = (
    "Ada", "Bruno", "Chen", "Dalia", "Emre", "Farah", "Goran", "Hana", "Igor", "Jamal",
    "Kofi", "Lena", "Mira", "Nadia", "Omar", "Priya", "Quinn", "Rosa", "Sven", "Tariq",
)  # fmt: skip
LAST = (
    "Abe", "Berg", "Costa", "Diaz", "Eriksen", "Fofana", "Gupta", "Haddad", "Ito",
    "Jansen", "Kovac", "Lopez", "Moreau", "Novak", "Okoye", "Park", "Rossi", "Silva",
)  # fmt: skip
ITEMS = (
    "copper kettle", "oak table", "desk lamp", "wool blanket", "garden chair", "steel shelf", "paper map",
    "glass jar", "road bike", "silk scarf", "clay pot", "wall clock", "canvas tent", "brass bell", "leather bag",
)  # fmt: skip
CITIES = (
    "Lisbon", "Oslo", "Porto", "Quito", "Tunis", "Riga", "Sofia", "Turin",
    "Dakar", "Malmo", "Cusco", "Delhi", "Hanoi", "Kyoto", "Lagos", "Minsk",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SENTENCES = (
    "On {day}, {who} ordered {n} {item}s at {price} euros each, to be sent to {city}.",
    "{who} wants {n} {item}s delivered to {city} by {day}; the price is {price} euros apiece.",
    "Please ship {n} {item}s to {city} for {who}. They cost {price} euros each and are due on {day}.",
    "For {price} euros each, {who} bought {n} {item}s, which must reach {city} on {day}.",
    "The {city} office called on {day}: {who} needs {n} {item}s, {price} euros a piece.",
    "We agreed on {price} euros per {item}. {who} takes {n} of them on {day}, in {city}.",
)


def row(rng: random.Random) -> dict[str, Any]:
    """One conversation: system, user (a sentence), assistant (the JSON)."""
    facts: dict[str, Any] = {
        "who": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        "item": rng.choice(ITEMS),
        "n": rng.randint(2, 98),
        "price": rng.randint(3, 96),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    answer = {"buyer": facts["who"], "item": facts["item"], "count": facts["n"], "price": facts["price"]}
    answer |= {"city": facts["city"], "day": facts["day"][:3].lower()}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": rng.choice(SENTENCES).format(**facts)},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def splits(train: int, held_out: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train rows, held-out rows), deterministic, disjoint in (buyer, item, city)."""
    rng = random.Random(seed)
    unique: dict[tuple[str, ...], dict[str, Any]] = {}
    for candidate in _forever(rng):
        unique.setdefault(_key(candidate), candidate)
        if len(unique) == train + held_out:
            break
    rows = list(unique.values())
    return rows[:train], rows[train:]


def _forever(rng: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        yield row(rng)


def _key(candidate: dict[str, Any]) -> tuple[str, ...]:
    answer = json.loads(candidate["messages"][-1]["content"])
    return answer["buyer"], answer["item"], answer["city"]
