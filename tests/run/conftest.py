"""What tests of checkpoints and of resuming share: a run that was not stopped, and a trainer."""

import pytest
import stages

from qlora_helpers.errors import TrainingStopped


@pytest.fixture(scope="package")
def uninterrupted(tiny, tmp_path_factory) -> dict:
    """What a run ends with that was never stopped, and wrote no checkpoint but the epochs'."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_WORKSPACE", str(folder))
        stages.set_up(stages.tiny_config(tiny))
        stages.draw()
        stages.train(checkpoint_steps=None)
        stages.evaluate()
    return stages.result(folder)


@pytest.fixture
def prepared(tiny, workspace):
    """A function that makes a trainer in a workspace that has its subset."""
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()

    def prepare(**options):
        run, config = stages.open_workspace("02_data_subset")
        return run, stages.trainer_for(run, config, **options)

    return prepare


@pytest.fixture
def stopped(prepared):
    """A function that stops a training in the second micro-batch after `step` steps."""

    def stop(step: int, **options) -> str:
        run, trainer = prepared(**options)
        stages.stop_at(trainer, step)
        with pytest.raises(TrainingStopped) as error:
            stages.fit(run, trainer)
        return str(error.value)

    return stop


@pytest.fixture
def finish(workspace):
    """A function that trains to the end, evaluates, and returns the result."""

    def finish(prepare, **options) -> dict:
        stages.fit(*prepare(**options))
        stages.evaluate()
        return stages.result(workspace)

    return finish
