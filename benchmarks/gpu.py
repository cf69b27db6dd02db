"""Every method on a GPU: whether it trains there, with the same loss as on a CPU, and how fast.

    python benchmarks/gpu.py

The data are ml-100k, the teacher is a BPR of 64 dimensions, and the student a BPR of 16. A few
methods are also run with other students. Each method trains three epochs on both devices from the
same initial weights. In the first epoch, the KD loss of a method without random draws must be the
same up to rounding; for the other methods, compare the two columns. If a method fails, the table
says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback

import torch
from tabulate import tabulate

from recbole_rcekd import run_recbole_kd
from recbole_rcekd.losses import LOSSES

EPOCHS = 3
MORE = [
    ("LightGCN", "rce"),
    ("LightGCN", "rce+freqd"),
    ("NeuMF", "rce"),
    ("SASRec", "rce"),
    ("HSTU", "rce"),
    ("HSTU", "hetcomp"),
]


def main() -> int:
    """Train on each device and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", default=",".join([*LOSSES, "rce+freqd"]))
    parser.add_argument(
        "--others", action=argparse.BooleanOptionalAction, default=True, help="other students too"
    )
    options = parser.parse_args()
    sys.argv = sys.argv[:1]
    os.chdir(tempfile.mkdtemp())
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows, failed = [], 0
    for model, loss in [
        *(("BPR", name) for name in options.losses.split(",")),
        *(MORE if options.others else []),
    ]:
        row = [model, loss]
        for device in devices:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                first, last, score, seconds = one(model, loss, device)
                row += [f"{first:.5f}", f"{last:.5f}", f"{score:.4f}", f"{seconds:.2f}"]
            except Exception:
                traceback.print_exc()
                row += ["failed", "", "", ""]
                failed += 1
        if device == "cuda":
            row.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f}")
        rows.append(row)
        print(row, flush=True)
    header = ["student", "method"]
    for device in devices:
        header += [f"{device}: KD loss, epoch 0", f"epoch {EPOCHS - 1}", "valid", "s/epoch"]
    print(
        f"{torch.cuda.get_device_name() if len(devices) > 1 else 'no GPU'}, torch "
        f"{torch.__version__}"
    )
    print(
        tabulate(
            rows,
            [*header, *(["MiB"] if len(devices) > 1 else [])],
            tablefmt="github",
            disable_numparse=True,
        )
    )
    return 1 if failed else 0


def one(model: str, loss: str, device: str) -> tuple[float, float, float, float]:
    """Train one student with one method on one device.

    Returns:
        The KD loss of the first and of the last epoch, the best validation score, and the mean
        seconds of an epoch after the first.
    """
    sequential = model in ("SASRec", "HSTU")
    settings = {
        "gpu_id": "0" if device == "cuda" else "",
        "embedding_size": 16,
        "hidden_size": 16,
        "teacher_embedding_size": 64,
        "teacher_epochs": 8,
        **({"teacher_checkpoints": 2} if loss == "hetcomp" else {}),
        "epochs": EPOCHS,
        "train_batch_size": 2048,
        "show_progress": False,
        "state": "ERROR",
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "tarec_assistant_size": 0,
        "hetcomp_weight": 0.01,
        **(
            {"train_neg_sample_args": None, "kd_sequence_split": "interactions"}
            if sequential
            else {}
        ),
        **({"eval_args": {"order": "TO", "split": {"RS": [0.8, 0.1, 0.1]}}} if sequential else {}),
        **({"dcd_item_weight": 0.0, "rrd_item_weight": 0.0} if sequential else {}),
        "output_dir": f"{model}-{loss}-{device}",
    }
    run_recbole_kd(
        model=model, dataset="ml-100k", teacher="BPR", kd_loss=loss, config_dict=settings
    )
    import csv

    with open(f"{model}-{loss}-{device}/{loss}-seed2020/history.csv") as file:
        rows = [
            {key: float(value or "nan") for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    seconds = sum(row["train_seconds"] for row in rows[1:]) / (len(rows) - 1)
    return (
        rows[0]["kd_loss"],
        rows[-1]["kd_loss"],
        max(row["valid_ndcg@10"] for row in rows),
        seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
