"""What tests of checkpoints and of resuming share: a run that was not stopped, and a trainer."""

import pytest
import stages


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
