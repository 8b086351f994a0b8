"""Scores patch pairs with Ray Data: Parquet in, Parquet out, one model an actor, on this machine or on many.

Columns `vis` and `ir` hold image files or the bytes of 64 x 64 8-bit pixels; other columns are kept.

python examples/ray_score.py IN_FOLDER OUT_FOLDER [--actors 2] [--gpus 1]
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs", help="folder of Parquet files that all machines reach")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--model", default="kglnet-vis-nir", help="bundled name, folder or Hub id")
    parser.add_argument("--actors", type=int, default=2, help="each holds the model")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--batch", type=int, default=1024, help="pairs that an actor takes at once")
    args = parser.parse_args()

    import ray.data

    from kglmatch.batch import Scorer

    scored = ray.data.read_parquet(args.pairs).map_batches(
        Scorer,
        fn_constructor_args=(args.model,),
        batch_format="pyarrow",
        batch_size=args.batch,
        concurrency=args.actors,
        num_gpus=args.gpus,
    )
    scored.write_parquet(args.out)


if __name__ == "__main__":
    main()
