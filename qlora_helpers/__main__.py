"""The command line: `python -m qlora_helpers classify` or `train`, without a notebook."""

import argparse
import json
import os
import sys

from qlora_helpers.errors import DataError, QLoraError

_ROWS_AT_ONCE = 512  # these are written before the next are classified


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments say; return 0, or 2 after one line on stderr for an error."""
    asked = _parser().parse_args(arguments)
    try:
        return asked.run(asked)
    except QLoraError as error:
        print(f"python -m qlora_helpers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _train(asked: argparse.Namespace) -> int:
    from qlora_helpers.config import workspace_folder
    from qlora_helpers.launch import train_run

    train_run(asked.workspace or workspace_folder())
    return 0


def _classify(asked: argparse.Namespace) -> int:
    # These import torch, which takes seconds: --help does without them.
    from tqdm import tqdm

    from qlora_helpers.classifier import HeadlineClassifier, split_lines

    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        if not asked.headlines and sys.stdin.isatty():
            raise DataError("give headlines, or lines on standard input")
        texts = asked.headlines or split_lines(sys.stdin.buffer.read(), "standard input")
        make = (
            HeadlineClassifier.from_adapter if asked.adapter else HeadlineClassifier.from_workspace
        )
        classifier = make(asked.adapter or asked.workspace)
        with tqdm(total=len(texts), unit="row", delay=3, disable=None) as bar:
            for start in range(0, len(texts), _ROWS_AT_ONCE):
                part = texts[start : start + _ROWS_AT_ONCE]
                rows = classifier(part, bar.update).to_dict("records")
                for text, row in zip(part, rows, strict=True):
                    print(_json_line(text, row, classifier.labels))
                sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_helpers", description="What the notebooks do, without them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    folder = "a run's folder; else $QLORA_WORKSPACE or runs/PROFILE"
    train = commands.add_parser(
        "train",
        help="train, as notebook 03 does",
        description="Train in the workspace that 01 and 02 have filled. On several GPUs: "
        "accelerate launch -m qlora_helpers train",
    )
    train.add_argument("--workspace", help=folder)
    train.set_defaults(run=_train)
    classify = commands.add_parser(
        "classify",
        help="label headlines",
        description="Write a line of JSON for each headline: text, label (null for an empty one), "
        "confidence, probabilities. Without arguments, standard input holds a headline a line.",
    )
    classify.add_argument("headlines", nargs="*", metavar="HEADLINE")
    source = classify.add_mutually_exclusive_group()
    source.add_argument("--workspace", help=folder)
    source.add_argument("--adapter", help="an adapter alone: a folder, or account/name on the hub")
    classify.set_defaults(run=_classify)
    return parser


def _json_line(text: str, row: dict, labels: tuple[str, ...]) -> str:
    answer = {"text": text, "label": None, "confidence": None, "probabilities": None}
    if row["confidence"] == row["confidence"]:  # not NaN
        answer |= {"label": row["label"], "confidence": row["confidence"]}
        answer["probabilities"] = {name: row[f"P({name})"] for name in labels}
    return json.dumps(answer, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
