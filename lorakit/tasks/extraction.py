"""The extraction task: a message and the names of fields in, one JSON object out; exact match of what it holds.

Fields: customer, item, quantity, city
Ada Brandt wants 3 lamps sent to Lisbon.      ->      {"customer": "Ada Brandt", "item": "lamps", "quantity": 3, ...}

It is small beside the SQL task and unlike it: a second skill for the same base. Messages come in kinds, each with
fields and phrasings of its own. Names, places, things and phrasings of the test splits do not occur in training, and
one split has kinds that training never shows.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit._numbers import check_integer
from lorakit._suggest import check_name
from lorakit.tasks.facts import FIRST_NAMES, LAST_NAMES
from lorakit.tasks.sql.questions import CHATML
from lorakit.tasks.task import ChatItem, Task, paired, shuffled

LARGEST = {"train": 4000, "phrasings": 480, "kinds": 4000}  # messages a split; there are more that differ
SPLITS = tuple(LARGEST)
CITIES = """
lisbon oslo denver kyoto nairobi leeds porto austin hanoi bergen quito dublin turin malmo perth lyon cairo boston ghent
dakar basel tampa osaka lima riga split bonn york adelaide bristol chicago delhi florence glasgow hamburg istanbul
jakarta kingston london madrid naples ottawa prague rome seville tunis utrecht venice warsaw zurich
"""
ADJECTIVES = (
    "blue oak steel silk small red heavy cheap paper green long glass white copper used round soft grey tall new"
)
NOUNS = """
lamps chairs mugs bicycles blankets notebooks pots shelves keyboards candles tents mirrors scarves boards umbrellas
violins fans bags tables knives carpets bottles hammers pillows clocks ladders baskets spoons jackets helmets
"""
DEVICES = """
dishwasher laptop printer tablet router radio projector scanner camera heater boiler oven kettle mixer telephone
speaker drill mower piano engine freezer doorbell toaster elevator monitor bicycle alarm lamp fridge gate
"""
INGREDIENTS = "lentil apple fish beef mushroom lemon onion pepper tomato spinach bean carrot pear cheese honey"
DISHES = (
    "soup rice pie tacos stew salad risotto cake dumplings pasta curry omelette lasagne pancakes noodles chili beans"
)
DAYS = "Monday Tuesday Thursday Saturday Sunday Wednesday Friday"
# A value is one word of each of a pool's lists. Of each list two thirds are for training, the rest for the tests.
POOLS = {
    "person": (FIRST_NAMES, LAST_NAMES),
    "city": (CITIES.split(),),
    "thing": (ADJECTIVES.split(), NOUNS.split()),
    "day": (DAYS.split(),),
    "device": (DEVICES.split(),),
    "dish": (INGREDIENTS.split(), DISHES.split()),
}
PROPER = ("person", "city")  # written with capitals
# kind: the fields with their pools, or the lowest and highest whole number; phrasings, the last two for the tests
KINDS: dict[str, tuple[dict[str, str | tuple[int, int]], str]] = {
    "order": (
        {"customer": "person", "item": "thing", "quantity": (2, 60), "city": "city"},
        "{customer} wants {quantity} {item} sent to {city}.|Please ship {quantity} {item} to {customer} in {city}.|"
        "{quantity} {item} for {customer}, delivery in {city}.|To {city}: {item}, {quantity} pieces, for {customer}.|"
        "{customer} from {city} has just bought {quantity} {item}.|"
        "We owe {customer} {quantity} {item}; post to {city}.",
    ),
    "repair": (
        {"owner": "person", "device": "device", "day": "day"},
        "{owner} has a broken {device} and is at home on {day}.|On {day}, fix the {device} of {owner}.|"
        "The {device} does not start, says {owner}. {day} would suit.|{owner}: {device} leaks, come on {day}.|"
        "Could someone see to the {device} at the house of {owner} this {day}?|Visit on {day}: {owner}, {device}.",
    ),
    "room": (
        {"guest": "person", "nights": (2, 14), "day": "day", "price": (40, 300)},
        "{guest} arrives on {day} and stays {nights} nights at {price} euros.|"
        "Room from {day} for {guest}: {nights} nights, {price} a night.|"
        "At {price} euros {guest} takes the room for {nights} nights from {day}.|"
        "{nights} nights for {guest}, first night {day}, price {price}.|"
        "Expect {guest} this {day}; {nights} nights were agreed at {price}.|"
        "For {price} a night we keep {guest} a bed on {day} and {nights} nights in all.",
    ),
    "trip": (
        {"traveller": "person", "origin": "city", "destination": "city", "day": "day"},
        "{traveller} flies from {origin} to {destination} on {day}.|"
        "On {day} {traveller} leaves {origin} for {destination}.|"
        "To {destination} on {day}, from {origin}: a seat for {traveller}.|"
        "{day}, {origin} to {destination}, {traveller}.|"
        "{traveller} must be in {destination} by {day} and starts in {origin}.|"
        "Out of {origin}, into {destination}: {traveller} travels this {day}.",
    ),
    "dinner": (
        {"dish": "dish", "guests": (2, 12), "host": "person"},
        "{host} cooks {dish} for {guests} people.|{guests} guests at the table of {host}, who makes {dish}.|"
        "{dish}, enough for {guests}, made by {host}.|With {guests} friends {host} shares {dish}.|"
        "There will be {dish} when {host} has {guests} guests.|For {guests} people, {host} prepares {dish}.",
    ),
    "invoice": (
        {"supplier": "person", "amount": (20, 900), "item": "thing"},
        "{supplier} asks {amount} euros for the {item}.|Pay {supplier} {amount} for {item}.|"
        "The {item} cost {amount}, to be paid to {supplier}.|{amount} euros are due to {supplier}: {item}.|"
        "We received {item} from {supplier} and a bill of {amount}.|{supplier} sent a bill: {item}, {amount} euros.",
    ),
    "lesson": (
        {"teacher": "person", "pupils": (2, 30), "city": "city", "day": "day"},
        "{teacher} teaches {pupils} pupils in {city} on {day}.|On {day} {pupils} pupils meet {teacher} in {city}.|"
        "{city}, {day}: {teacher} and {pupils} pupils.|A class of {pupils} in {city} has {teacher} on {day}.|"
        "This {day} the {pupils} pupils of {teacher} meet in {city}.|{teacher} expects {pupils} pupils, {day}, {city}.",
    ),
    "rental": (
        {"tenant": "person", "device": "device", "days": (2, 28), "deposit": (10, 200)},
        "{tenant} rents the {device} for {days} days and leaves {deposit} euros.|"
        "{days} days with our {device}: {tenant}, deposit {deposit}.|"
        "The {device} goes to {tenant} for {days} days against {deposit} euros.|"
        "Deposit {deposit}, {device}, {days} days, {tenant}.|"
        "Our {device} is lent to {tenant}, who paid {deposit} and keeps it {days} days.|"
        "For {days} days {tenant} has the {device}; {deposit} euros were left with us.",
    ),
}
NEW_KINDS = ("lesson", "rental")  # never in training


@dataclass(frozen=True)
class Message(ChatItem):
    """One item: the message and what it says, by field."""

    chat = CHATML
    kind: str
    text: str
    fields: dict[str, str | int]

    @property
    def answer(self) -> str:
        """The fields as JSON, in the order in which they are asked for."""
        return json.dumps(self.fields)

    @property
    def asked(self) -> str:
        """The user's turn: the names of the fields and the message."""
        return f"Fields: {', '.join(self.fields)}\n{self.text}"


def messages(split: str, n: int | None = None, seed: int = 0) -> list[Message]:
    """Draws n different messages of a split, the kinds in turn.

    Args:
        split: "train"; "phrasings", known kinds in new words; "kinds", fields that training never asks for. Whatever
            the seeds, names, places and things of the test splits do not occur in train.
        n: how many; None for 208.
        seed: other seeds draw others.

    Raises:
        ValueError: the split is unknown, or n is negative or more than `LARGEST`.
    """
    check_name("a split of the extraction task", split, SPLITS)
    n = 208 if n is None else n
    check_integer("n", n, 0, LARGEST[split])
    rng = random.Random(f"extract/{split}/{seed}")
    kinds = [kind for kind in KINDS if (kind in NEW_KINDS) == (split == "kinds")]
    found: dict[str, Message] = {}
    while len(found) < n:
        message = _draw(kinds[len(found) % len(kinds)], split == "train", rng)
        found.setdefault(message.text, message)
    return shuffled(list(found.values()), rng)


def same_records(items: Sequence[Message], answers: Sequence[str]) -> list[bool]:
    """Tells for each answer whether it is one JSON object with exactly the item's fields and values, in any order.

    Numbers must be numbers and texts texts; untrusted text is parsed, never run.

    Raises:
        ValueError: the lengths differ.
    """
    return [_typed(item.fields) == _typed(_parsed(text)) for item, text in paired(items, answers)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _typed(value: Any) -> Any:
    return {name: (type(each), each) for name, each in value.items()} if isinstance(value, dict) else None


def _value(pool: str, train: bool, rng: random.Random, taken: list[str | int]) -> str:
    """One word of each list of a pool, of the part that is for training or of the other; not one that is taken."""
    halves = [words[: len(words) * 2 // 3] if train else words[len(words) * 2 // 3 :] for words in POOLS[pool]]
    while True:
        value = " ".join(words[int(rng.random() * len(words))] for words in halves)
        value = value.title() if pool in PROPER else value
        if value not in taken:
            return value


def _draw(kind: str, train: bool, rng: random.Random) -> Message:
    fields, phrasings = KINDS[kind]
    chosen: dict[str, str | int] = {}
    for name, pool in fields.items():
        if isinstance(pool, tuple):
            chosen[name] = pool[0] + int(rng.random() * (pool[1] - pool[0] + 1))
        else:
            chosen[name] = _value(pool, train, rng, [*chosen.values()])
    sentences = phrasings.split("|")
    known = sentences[:4] if train or kind in NEW_KINDS else sentences[4:]
    text = re.sub(r"\{(\w+)\}", lambda match: str(chosen[match[1]]), known[int(rng.random() * len(known))])
    return Message(kind, text[:1].upper() + text[1:], chosen)


EXTRACTION = Task("extraction", SPLITS, messages, same_records, CHATML)
