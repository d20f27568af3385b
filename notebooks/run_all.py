"""Run the notebooks in order, each in a fresh kernel, and print the scoreboard.

python notebooks/run_all.py               what `make run` calls
python notebooks/run_all.py --in-place    also writes the outputs into the notebooks here
python notebooks/run_all.py --all-in-one  the same cells in one kernel: 00_all_in_one.ipynb

The executed copies are kept in the workspace.
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
from assemble import NAME, chapters
from tqdm import tqdm

from qlora_helpers import QLoraError, RunConfig, p_text, write_text
from qlora_helpers.config import workspace_folder

FOLDER = Path(__file__).parent
BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} cells, {elapsed} {postfix}"
# The kernel of this environment, not one of the user's with the same name.
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"


def code_cells(notebook: nbformat.NotebookNode) -> list[int]:
    return [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def run_notebook(path: Path, bar: tqdm, record_timing: bool = False) -> nbformat.NotebookNode:
    """Return the executed notebook.

    A failing cell ends the program with its number, source and error, and what ran is saved. With
    `record_timing`, each cell's metadata say when it began and ended.
    """
    notebook = nbformat.read(path, as_version=4)
    code = code_cells(notebook)
    for i in code:  # the committed outputs are of another run
        notebook.cells[i].update(execution_count=None, outputs=[])

    def interrupt():
        # A training then writes a checkpoint. nbclient's own handlers would kill the kernel.
        asyncio.ensure_future(client.km.interrupt_kernel())

    def started(cell, cell_index):
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        if cell_index in code:
            bar.set_postfix_str(f"{path.stem}, cell {code.index(cell_index) + 1} of {len(code)}")

    client = NotebookClient(
        notebook,
        timeout=None,
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        shutdown_kernel="immediate",  # its last cell has written all; torch takes seconds to leave
        coalesce_streams=True,  # a progress bar is one line
        record_timing=record_timing,
        on_cell_start=started,
        on_cell_executed=lambda **_: bar.update(),
    )
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        bar.close()
        save(notebook, path)
        sys.exit(failure(notebook, path, error))
    return notebook


def failure(notebook: nbformat.NotebookNode, path: Path, error: Exception) -> str:
    """Return a message that names the cell that failed, with its source and the reason."""
    code = code_cells(notebook)
    counted = sum(bool(notebook.cells[i].execution_count) for i in code)
    if isinstance(error, DeadKernelError):
        number, reason = counted + 1, "its kernel died (out of memory?)"  # before it was counted
    else:
        number, reason = max(1, counted), f"{error.ename}: {error.evalue}"
    number = min(number, len(code))
    source = notebook.cells[code[number - 1]].source.replace("\n", "\n    ")
    return (
        f"\n{path.name}, cell {number} of {len(code)} failed:\n\n    {source}\n\n{reason}\n\n"
        f"What ran is in {workspace_copy(path)}."
    )


def workspace_copy(path: Path) -> Path:
    return workspace_folder() / "notebooks" / path.name


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    write_text(workspace_copy(path), nbformat.writes(notebook))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-place", action="store_true", help="write the outputs into the files")
    parser.add_argument("--all-in-one", action="store_true", help="the assembled notebook alone")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="the notebooks' (default: here)"
    )
    arguments = parser.parse_args()
    try:  # a setting that cannot work stops here, before a kernel starts
        config = RunConfig.from_environment()
    except QLoraError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    folder = arguments.folder
    paths = [folder / NAME] if arguments.all_in_one else chapters(folder)
    cells = sum(len(code_cells(nbformat.read(path, as_version=4))) for path in paths)
    print(
        f"Profile {config.profile}: {config.base_model}, {config.num_epochs} epochs over "
        f"{config.train_size} rows of {config.data!r}."
    )
    done = threading.Event()
    with tqdm(total=cells, desc="Run all", bar_format=BAR, file=sys.stdout) as bar:

        def tick():  # the clock goes on in a long cell
            while not done.wait(1):
                bar.refresh()

        if sys.stdout.isatty():
            threading.Thread(target=tick, daemon=True).start()
        for path in paths:
            executed = run_notebook(path, bar)
            save(executed, path)
            if arguments.in_place:
                nbformat.write(executed, path)
        bar.set_postfix_str("done")
        done.set()
    workspace = workspace_folder()
    metrics = json.loads((workspace / "metrics.json").read_text(encoding="utf-8"))
    table = pd.DataFrame.from_dict(metrics["scoreboard"], orient="index")
    formats = {"p_value": p_text, "rows_per_second": "{:,.1f}".format}
    print(f"\n{table.to_string(float_format='%.4f', formatters=formats, na_rep='')}")
    print(f"\nThe executed notebooks are in {workspace}/notebooks.")
    tuned = table.loc["tuned model"]
    print(f"accuracy={tuned.accuracy:.4f} macro_f1={tuned.macro_f1:.4f}")


if __name__ == "__main__":
    main()
