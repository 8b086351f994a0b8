"""Scores patch pairs with Dask: Parquet in, Parquet out, a partition at a time.

Columns `vis` and `ir` hold image files or the bytes of 64 x 64 8-bit pixels; other columns are kept.

python examples/dask_score.py IN_FOLDER OUT_FOLDER [--scheduler ADDRESS]
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs", help="folder of Parquet files that all machines reach")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--model", default="kglnet-vis-nir", help="bundled name, folder or Hub id")
    parser.add_argument("--scheduler", help="address of a cluster; default: one process here")
    args = parser.parse_args()

    import dask.dataframe as dd

    from kglmatch.batch import Scorer

    if args.scheduler:
        from dask.distributed import Client

        Client(args.scheduler)
    # Bytes stay bytes: Dask would make text of them.
    import dask

    with dask.config.set({"dataframe.convert-string": False}):
        pairs = dd.read_parquet(args.pairs)
        kept = pairs._meta.drop(columns=["vis", "ir"])
        meta = kept.assign(score=0.0, error="").astype({"score": "float32", "error": "string"})
        scored = pairs.map_partitions(Scorer(args.model), meta=meta)
        # One model in one process; on a cluster, each worker has its own.
        scored.to_parquet(args.out, compute_kwargs={} if args.scheduler else {"scheduler": "sync"})


if __name__ == "__main__":
    main()
