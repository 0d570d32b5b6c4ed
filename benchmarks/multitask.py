"""Multi-task balancers against TorchJD 0.18 and LibMTL 1.1.5: what a step costs over that of a plain sum of the losses.

All in one process and in turn, on the same network and batch (512 rows, one thread): a recommender (8 fields of a table
of 20,000 x 16, body 256-128-64, towers 32-16) with 3 and 6 tasks, and a wide network without a table. Time is that of
the processor for the forward pass and for setting the gradients, the median of rounds in which all take one step, in
another order each. TorchJD counts with the fastest of its ways. Target: no method costs more than theirs; GradCraft,
which they do not have, no more than their PCGrad. Nothing is allowed for noise: repeated runs differ by some 2 %.

    python benchmarks/multitask.py
"""

from __future__ import annotations

import os
from typing import Any

from peers import HERE, run_peer, write_result

ROUNDS = 100


def main() -> None:
    """Measure, print the ratios, write `results/multitask.json`."""
    env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    load = os.getloadavg()[0]
    found = run_peer("multitask", "peer_multitask.py", HERE.parent / "src", ROUNDS, env=env)
    tables = {name: table(part["methods"]) for name, part in found.items()}
    for name, rows in tables.items():
        print(
            f"\n{name}: a plain sum takes {found[name]['methods']['plain']['ours']['ms']:.1f} ms; times that of the sum"
        )
        print(f"{'':10} {'ours':>6} {'TorchJD':>8} {'LibMTL':>7} {'over the faster':>16}")
        for slug, row in rows.items():
            cells = [f"{row[kind]:.2f}" if row[kind] else "-" for kind in ("ours", "torchjd", "libmtl")]
            against = f"{row['over'] - 1:+.1%}" if row["over"] else ""
            print(
                f"{slug:10} {cells[0]:>6} {cells[1]:>8} {cells[2]:>7} {against:>16}"
                f"{'' if row['met'] is not False else '  missed'}"
            )
        for what, error in found[name]["failed"].items():
            print(f"failed: {what}: {error}")
    met = all(row["met"] is not False for rows in tables.values() for row in rows.values())
    print(f"\nno more than theirs: {met}")
    write_result(
        "multitask",
        {
            "target": "no more than theirs",
            "met": met,
            "rounds": ROUNDS,
            "load": {"before": load, "after": os.getloadavg()[0]},
            "ratios": tables,
            "measured": found,
        },
    )


def table(methods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By method the time over that of the plain sum: ours, the fastest way of TorchJD, LibMTL; None where it has none."""
    plain = methods["plain"]["ours"]["ms"]
    rows: dict[str, dict[str, Any]] = {}
    for slug, kinds in methods.items():
        if slug == "plain":
            continue
        jd = [kind["ms"] for name, kind in kinds.items() if name.startswith("torchjd")]
        row: dict[str, Any] = {
            "ours": kinds["ours"]["ms"] / plain,
            "torchjd": min(jd) / plain if jd else None,
            "libmtl": kinds["libmtl"]["ms"] / plain if "libmtl" in kinds else None,
        }
        against = rows["pcgrad"] if slug == "gradcraft" else row
        peers = [against[kind] for kind in ("torchjd", "libmtl") if against[kind]]
        row["over"] = row["ours"] / min(peers) if peers else None
        row["met"] = row["ours"] <= min(peers) if peers else None
        rows[slug] = row
    return rows


if __name__ == "__main__":
    main()
