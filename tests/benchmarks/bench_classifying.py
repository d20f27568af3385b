"""How long HeadlineClassifier takes, warm: one headline, a file of headlines, and a file of headlines with descriptions.

    python tests/benchmarks/bench_classifying.py runs/cpu AG_NEWS/test.csv --rows 1000

The first argument is the workspace of a finished run; the second a CSV in AG News' layout (class, title, description). One line of JSON:
the median and the slowest of 40 headlines, one at a time, in seconds, and rows/s of the two files.
"""

import argparse
import json
import statistics
import time

import pandas as pd

from qlora_helpers import HeadlineClassifier


def seconds(classifier, texts) -> float:
    start = time.perf_counter()
    classifier(texts, progress=lambda rows: None)  # without a bar
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace")
    parser.add_argument("csv")
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    classifier = HeadlineClassifier.from_workspace(args.workspace)
    rows = pd.read_csv(args.csv, header=None, names=["class", "title", "description"]).head(
        args.rows
    )
    headlines, texts = rows.title.tolist(), (rows.title + " " + rows.description).tolist()
    seconds(classifier, texts[:40])  # warm
    one = [seconds(classifier, [headline]) for headline in headlines[:40]]
    print(
        json.dumps(
            {
                "one_headline_s": round(statistics.median(one), 3),
                "slowest_headline_s": round(max(one), 3),
                "rows": len(rows),
                "headlines_per_s": round(len(rows) / seconds(classifier, headlines), 1),
                "with_descriptions_per_s": round(len(rows) / seconds(classifier, texts), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
