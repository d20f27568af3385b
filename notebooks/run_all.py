"""Run the notebooks in order, each in a fresh kernel, keep the executed copies in the workspace, and print the scoreboard.

python notebooks/run_all.py               what `make run` calls
python notebooks/run_all.py --in-place    also overwrites the notebooks here with their executed selves (for a commit)
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from qlora_helpers import QLoraError, RunConfig, Workspace, p_text, write_text
from qlora_helpers.config import workspace_folder

FOLDER = Path(__file__).parent
os.environ["JUPYTER_PREFER_ENV_PATH"] = (
    "1"  # the kernel of this environment, not one of the user's with the same name
)


def run_notebook(path: Path, bar: tqdm, record_timing: bool = False) -> nbformat.NotebookNode:
    """The executed notebook. A failing cell ends the program, after saying which one and why; what ran before it is kept.
    With `record_timing`, each cell's metadata say when it began and ended."""
    notebook = nbformat.read(path, as_version=4)
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for i in code:  # what a commit holds is of another run
        notebook.cells[i].update(execution_count=None, outputs=[])

    def interrupt():  # a training then writes a checkpoint; nbclient's own handlers would kill the kernel
        asyncio.ensure_future(client.km.interrupt_kernel())

    def started(cell, cell_index):
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        bar.set_postfix_str(
            f"{path.stem}, cell {code.index(cell_index) + 1} of {len(code)}"
            if cell_index in code
            else path.stem
        )

    def executed(cell, cell_index, execute_reply):
        bar.update()

    client = NotebookClient(
        notebook,
        timeout=None,
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=record_timing,
        on_cell_start=started,
        on_cell_executed=executed,
    )
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        bar.close()
        save(notebook, path)
        failed = max((i for i in code if notebook.cells[i].execution_count), default=code[0])
        if isinstance(
            error, DeadKernelError
        ):  # the reply that would have counted the cell never came
            failed = min((i for i in code if i > failed), default=failed)
        reason = (
            f"{error.ename}: {error.evalue}"
            if isinstance(error, CellExecutionError)
            else "its kernel died (out of memory?)"
        )
        source = "\n".join("    " + line for line in notebook.cells[failed].source.splitlines())
        sys.exit(
            f"\n{path.name}, cell {code.index(failed) + 1} of {len(code)} failed:\n\n{source}\n\n{reason}\n\n"
            f"What ran is in {workspace_copy(path)}."
        )
    return notebook


def workspace_copy(path: Path) -> Path:
    return workspace_folder() / "notebooks" / path.name


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    write_text(workspace_copy(path), nbformat.writes(notebook))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--in-place", action="store_true", help="overwrite the notebooks with their executed selves"
    )
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where the notebooks are (default: here)"
    )
    arguments = parser.parse_args()
    try:
        config = (
            RunConfig.from_environment()
        )  # a setting that cannot work stops here, before a kernel starts
    except QLoraError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    paths = sorted(arguments.folder.glob("[0-9]*.ipynb"))
    cells = sum(
        cell.cell_type == "code"
        for path in paths
        for cell in nbformat.read(path, as_version=4).cells
    )
    print(
        f"Profile {config.profile}: {config.base_model}, {config.num_epochs} epochs over {config.train_size} rows of {config.data!r}."
    )
    layout = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} cells, {elapsed} {postfix}"
    with tqdm(total=cells, desc="Run all", bar_format=layout, file=sys.stdout) as bar:
        done = threading.Event()
        if sys.stdout.isatty():  # a long cell: the clock goes on
            threading.Thread(
                target=lambda: [bar.refresh() for _ in iter(lambda: done.wait(1), True)],
                daemon=True,
            ).start()
        for path in paths:
            executed = run_notebook(path, bar)
            save(executed, path)
            if arguments.in_place:
                nbformat.write(executed, path)
        bar.set_postfix_str("done")
        done.set()
    workspace = Workspace(workspace_folder())
    metrics = json.loads((workspace / "metrics.json").read_text(encoding="utf-8"))
    table = pd.DataFrame.from_dict(metrics["scoreboard"], orient="index")
    formats = {"p_value": p_text, "rows_per_second": "{:,.1f}".format}
    print(f"\n{table.to_string(float_format='%.4f', formatters=formats, na_rep='')}")
    print(f"\nThe executed notebooks are in {workspace}/notebooks.")
    print(
        f"accuracy={table.accuracy['tuned model']:.4f} macro_f1={table.macro_f1['tuned model']:.4f}"
    )


if __name__ == "__main__":
    main()
