"""The command line: `python -m qlora_helpers classify`, for people who are not in a notebook."""

import argparse
import json
import os
import sys

from qlora_helpers.errors import DataError, QLoraError

_ROWS_AT_ONCE = 512  # what has been classified is written before the rest is


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def main(arguments: list[str] | None = None) -> int:
    """Classify as the arguments say; 0, or 2 with one line on stderr that says what is wrong."""
    parser = _Parser(
        prog="python -m qlora_helpers", description="Use a model that the notebooks tuned."
    )
    classify = parser.add_subparsers(
        dest="command", required=True, parser_class=_Parser
    ).add_parser(
        "classify",
        help="label headlines",
        description="Write a line of JSON for each headline: text, label (null for an empty one), "
        "confidence, probabilities. Without arguments the headlines are the lines of standard input.",
    )
    classify.add_argument("headlines", nargs="*", metavar="HEADLINE")
    source = classify.add_mutually_exclusive_group()
    source.add_argument(
        "--workspace",
        metavar="FOLDER",
        help="a run's folder (default: $QLORA_WORKSPACE, or runs/PROFILE)",
    )
    source.add_argument(
        "--adapter",
        metavar="FOLDER_OR_HUB_ID",
        help="an adapter alone: its folder, or account/name on the hub",
    )
    asked = parser.parse_args(arguments)
    # These import torch, which takes seconds: --help does without them.
    from tqdm import tqdm

    from qlora_helpers import HeadlineClassifier
    from qlora_helpers.classifier import split_lines

    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        if not asked.headlines and sys.stdin.isatty():
            raise DataError(
                "there is nothing to classify: give headlines, or lines on standard input"
            )
        texts = asked.headlines or split_lines(sys.stdin.buffer.read(), "standard input")
        classifier = (
            HeadlineClassifier.from_adapter(asked.adapter)
            if asked.adapter
            else HeadlineClassifier.from_workspace(asked.workspace)
        )
        with tqdm(
            total=len(texts), unit="row", delay=3, mininterval=1, disable=not sys.stderr.isatty()
        ) as bar:
            for start in range(0, len(texts), _ROWS_AT_ONCE):
                part = texts[start : start + _ROWS_AT_ONCE]
                for text, row in zip(
                    part, classifier(part, bar.update).to_dict("records"), strict=True
                ):
                    print(_json_line(text, row, classifier.labels))
                sys.stdout.flush()
    except QLoraError as error:
        print(f"python -m qlora_helpers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (
        BrokenPipeError
    ):  # `| head` has seen enough; Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _json_line(text: str, row: dict, labels: tuple[str, ...]) -> str:
    empty = row["confidence"] != row["confidence"]  # NaN, which is not JSON
    found = (
        {"label": None, "confidence": None, "probabilities": None}
        if empty
        else {
            "label": row["label"],
            "confidence": row["confidence"],
            "probabilities": {name: row[f"P({name})"] for name in labels},
        }
    )
    return json.dumps({"text": text} | found, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
