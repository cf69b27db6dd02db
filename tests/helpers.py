"""What several test files share: a tiny RecBole dataset, models on it, and trained teachers.

Everything is written below the folder that is passed in. RecBole's Trainer also writes
``log_tensorboard/`` in the working directory. So the functions here that need a trainer change to
the folder of the checkpoint (:func:`inside`), and tests with a trainer of their own call
``monkeypatch.chdir(tmp_path)``.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import recbole_rcekd  # noqa: F401  (mends RecBole before it is imported)

# isort: split
import recbole
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_rcekd.core.settings import KDSettings
from recbole_rcekd.losses.base import Loss
from recbole_rcekd.training.run_settings import RunSettings

N_USERS, N_ITEMS, N_BLOCKS = 40, 60, 4
Pair = tuple[str, str]


class Bundle(NamedTuple):
    """What RecBole needs to train a model."""

    config: Any
    dataset: Any
    train: Any
    valid: Any
    test: Any


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in ``folder``, with a command line without arguments.

    It is for fixtures with a wider scope than a test.
    """
    before, argv = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["pytest"]
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = argv


def block_pairs(
    n_users: int = N_USERS,
    n_items: int = N_ITEMS,
    n_blocks: int = N_BLOCKS,
    per_user: int = 12,
    seed: int = 0,
) -> list[Pair]:
    """Interactions from which a model can learn.

    User ``u7`` mostly takes items of block 7 mod ``n_blocks``. Every user has ``per_user``
    interactions, and every item has at least one.
    """
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for user in range(n_users):
        own = [item for item in range(n_items) if item % n_blocks == user % n_blocks]
        others = [item for item in range(n_items) if item % n_blocks != user % n_blocks]
        n_own = min(len(own), per_user - 2)
        for item in [*draw.sample(own, n_own), *draw.sample(others, per_user - n_own)]:
            pairs.append((f"u{user}", f"i{item}"))
    taken = {item for _, item in pairs}
    pairs += [
        (f"u{item % n_users}", f"i{item}") for item in range(n_items) if f"i{item}" not in taken
    ]
    return pairs


def write_atomic_file(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write one of RecBole's atomic files; ``header`` has ``name:type`` words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(header), *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_dataset(folder: Path, name: str = "tiny", pairs: Sequence[Pair] | None = None) -> Path:
    """Write ``<folder>/<name>/<name>.inter`` and return ``folder``, the data path.

    The columns are user, item, rating and time stamp. ``pairs`` are (user token, item token), by
    default those of :func:`block_pairs`.
    """
    pairs = block_pairs() if pairs is None else pairs
    write_atomic_file(
        folder / name / f"{name}.inter",
        ("user_id:token", "item_id:token", "rating:float", "timestamp:float"),
        [(user, item, 3 + n % 3, n) for n, (user, item) in enumerate(pairs)],
    )
    return folder


def write_knowledge(
    folder: Path,
    name: str = "tiny",
    pairs: Sequence[Pair] | None = None,
    without: Collection[str] = (),
) -> None:
    """Add a knowledge graph to a dataset.

    Every item has an entity, and the entities of a block share a genre. Items in ``without`` have
    no entity; a knowledge-aware dataset then drops their interactions.
    """
    pairs = block_pairs() if pairs is None else pairs
    items = sorted(
        {item for _, item in pairs if item not in without}, key=lambda token: int(token[1:])
    )
    triples = [(f"e{item}", "of_genre", f"genre{int(item[1:]) % N_BLOCKS}") for item in items]
    triples += [
        (f"e{item}", "next_to", f"e{other}")
        for item, other in zip(items, [*items[1:], items[0]], strict=True)
    ]
    write_atomic_file(
        folder / name / f"{name}.link",
        ("item_id:token", "entity_id:token"),
        [(i, f"e{i}") for i in items],
    )
    write_atomic_file(
        folder / name / f"{name}.kg",
        ("head_id:token", "relation_id:token", "tail_id:token"),
        triples,
    )


def example_data_path() -> Path:
    """The folder with ml-100k in RecBole's wheel.

    It has interactions, user and item features, and a knowledge graph.
    """
    return Path(recbole.__file__).parent / "dataset_example"


def build_config(folder: Path, model: str = "BPR", dataset: str = "tiny", **overrides: Any) -> Any:
    """RecBole's Config for a dataset below ``folder``; it reads ``sys.argv``, as RecBole does."""
    settings: dict[str, Any] = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
        "seed": 2020,
        "epochs": 2,
        "train_batch_size": 128,
        "eval_batch_size": 4096,
        "metrics": ["NDCG", "Recall"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        **overrides,
    }
    return Config(model=model, dataset=dataset, config_dict=settings)


def build(folder: Path, model: str = "BPR", dataset: str = "tiny", **overrides: Any) -> Bundle:
    """Config, dataset and data loaders for a model, as ``run_recbole`` makes them."""
    config = build_config(folder, model, dataset, **overrides)
    init_seed(config["seed"], config["reproducibility"])
    data = create_dataset(config)
    train, valid, test = data_preparation(config, data)
    return Bundle(config, data, train, valid, test)


def build_model(bundle: Bundle, seed: int | None = None) -> Any:
    """The RecBole model of a bundle, with freshly drawn weights."""
    config = bundle.config
    init_seed(config["seed"] if seed is None else seed, config["reproducibility"])
    return get_model(config["model"])(config, bundle.train._dataset).to(config["device"])


def read_kd_settings(config: Any) -> tuple[KDSettings, dict[str, Loss]]:
    """The settings that the losses of a Config share, and the losses themselves by their names."""
    settings = RunSettings.read(config)
    return settings.common, settings.build_losses()


def train_and_save(bundle: Bundle, path: Path, model: Any = None) -> Any:
    """Train with RecBole's trainer; save the best checkpoint at ``path`` and return its model."""
    config = bundle.config
    model = build_model(bundle) if model is None else model
    path.parent.mkdir(parents=True, exist_ok=True)
    with inside(path.parent):
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        trainer.saved_model_file = str(path)  # RecBole's own names have one-second resolution
        trainer.fit(bundle.train, bundle.valid, saved=True, show_progress=False)
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    model.load_state_dict(checkpoint["state_dict"])
    model.load_other_parameter(checkpoint.get("other_parameter"))
    model.eval()
    return model


def save_untrained(bundle: Bundle, path: Path, model: Any = None) -> Any:
    """Write the checkpoint of an untrained model with RecBole's trainer; return the model."""
    config = bundle.config
    model = build_model(bundle) if model is None else model
    path.parent.mkdir(parents=True, exist_ok=True)
    with inside(path.parent):
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        trainer.saved_model_file = str(path)
        trainer._save_checkpoint(0, verbose=False)
    return model


def train_teacher(
    folder: Path, model: str = "BPR", dataset: str = "tiny", **overrides: Any
) -> Path:
    """Train a small teacher on the data below ``folder``.

    Its checkpoint, ``<folder>/saved/<model>.pth``, is returned.
    """
    bundle = build(folder, model, dataset, **{"epochs": 5, **overrides})
    path = folder / "saved" / f"{model}.pth"
    train_and_save(bundle, path)
    return path
