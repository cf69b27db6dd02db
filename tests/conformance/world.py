"""A tiny dataset on disk with all that any model of RecBole reads.

It has features, a knowledge graph and pretrained vectors. The 40 users and 60 items are in four
blocks. A user mostly takes items of the same block, and features, genres and vectors differ between
the blocks, so that a model can learn from each of them. An epoch of any model takes about a second.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.helpers import (
    N_BLOCKS,
    N_ITEMS,
    N_USERS,
    block_pairs,
    write_atomic_file,
    write_dataset,
    write_knowledge,
)

NAME = "world"
VECTOR = 8  # of the pretrained entity and relation vectors

INTER = ["user_id", "item_id", "rating", "timestamp"]
USER = ["user_id", "age", "gender", "tags"]
ITEM = ["item_id", "price", "brand", "class"]
# The columns that are loaded for each kind of model; `class` is the item attribute in RecBole's own
# settings.
GENERAL_COLUMNS = {"inter": ["user_id", "item_id"]}
SEQUENCE_COLUMNS = {"inter": ["user_id", "item_id", "timestamp"]}
CONTEXT_COLUMNS = {"inter": ["user_id", "item_id"], "user": USER, "item": ITEM}
KNOWLEDGE_COLUMNS = {
    **GENERAL_COLUMNS,
    "kg": ["head_id", "relation_id", "tail_id"],
    "link": ["item_id", "entity_id"],
}


def write_world(folder: Path) -> Path:
    """Write ``<folder>/world/`` and return ``folder``, the data path."""
    pairs = block_pairs()
    write_dataset(folder, NAME, pairs)
    write_knowledge(folder, NAME, pairs)
    draw = random.Random(1)
    # Numbers between 0 and 1: models with features multiply by them directly, and have a sigmoid at
    # the end.
    place = folder / NAME
    write_atomic_file(
        place / f"{NAME}.user",
        ("user_id:token", "age:float", "gender:token", "tags:token_seq"),
        [
            (f"u{u}", (u % N_BLOCKS) / N_BLOCKS, "fm"[u % 2], f"t{u % N_BLOCKS} t{4 + u % 3}")
            for u in range(N_USERS)
        ],
    )
    write_atomic_file(
        place / f"{NAME}.item",
        ("item_id:token", "price:float", "brand:token", "class:token_seq"),
        [
            (f"i{i}", (i % N_BLOCKS) / N_BLOCKS, f"b{i % 5}", f"c{i % N_BLOCKS} c{4 + i % 3}")
            for i in range(N_ITEMS)
        ],
    )

    def vector(block: int) -> str:
        return " ".join(
            f"{(1.0 if axis % N_BLOCKS == block else 0.0) + draw.gauss(0, 0.1):.4f}"
            for axis in range(VECTOR)
        )

    entities = [(f"ei{i}", vector(i % N_BLOCKS)) for i in range(N_ITEMS)]
    entities += [(f"genre{block}", vector(block)) for block in range(N_BLOCKS)]
    write_atomic_file(place / f"{NAME}.ent", ("ent_id:token", "ent_vec:float_seq"), entities)
    texts = [(f"i{i}", vector(i % N_BLOCKS)) for i in range(N_ITEMS)]
    write_atomic_file(place / f"{NAME}.text", ("tid:token", "text_vec:float_seq"), texts)
    relations = [(name, vector(n)) for n, name in enumerate(("of_genre", "next_to"))]
    write_atomic_file(place / f"{NAME}.rel", ("rel_id:token", "rel_vec:float_seq"), relations)
    return folder
