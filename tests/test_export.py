import resource
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import export_adapter, merge_adapter
from qlora_helpers.errors import ModelError, WorkspaceError
from qlora_helpers.prompts import build_prompt, label_token_ids
from qlora_helpers.run.workspace import Workspace

TEXTS = ["Striker signs record contract", "Oil climbs as the port closes for a third week", "Rain"]


def test_the_merged_model_answers_as_the_adapter_does(classifier, tmp_path):
    (tmp_path / "new" / "merged.partial").mkdir(parents=True)  # of the reader's own
    folder = merge_adapter(classifier, tmp_path / "new" / "merged")
    assert {path.name for path in folder.parent.iterdir()} == {"merged", "merged.partial"}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lora = sum(p.numel() for n, p in classifier.model.named_parameters() if "lora_" in n)
    parameters = classifier.model.get_base_model().num_parameters() - lora
    assert size == pytest.approx(2 * parameters, rel=0.01)  # as 05 announces
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any("lora" in name for name, _ in model.named_parameters())
    ids, tuned = label_token_ids(tokenizer, classifier.labels), classifier.probabilities(TEXTS)
    for text, expected in zip(TEXTS, tuned, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(build_prompt(text), return_tensors="pt")).logits[0, -1, ids]
        answer = torch.softmax(logits.double() / classifier.temperature, 0).numpy()
        np.testing.assert_allclose(answer, expected, atol=0.01)
    base = classifier.probabilities(TEXTS, base_model=True)
    assert abs(base - tuned).max() > 0.1  # the adapter is felt


def test_a_folder_that_is_there_is_left_alone(classifier, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("")
    with pytest.raises(ModelError, match="merged is there already: delete it"):
        merge_adapter(classifier, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]


def test_weights_that_float16_cannot_hold_are_named(classifier, tmp_path):
    norm = classifier.model.get_base_model().model.norm.weight
    kept = norm.data
    norm.data = kept * 1e6
    try:
        with pytest.raises(ModelError, match="model.norm.weight holds values that float16"):
            merge_adapter(classifier, tmp_path / "merged")
    finally:
        norm.data = kept
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("calibration.json", '{"temperature": 0}', "calibration.json says temperature 0"),
        ("calibration.json", None, "calibration.json is a link"),
        ("README.md", None, "README.md is a link"),
        ("README.md", "x" * 2**21, "README.md is longer than 1,048,576 bytes"),
    ],
)
def test_what_loading_would_refuse_or_lies_elsewhere_is_not_packed(
    tuned, tmp_path, name, content, said
):
    run = Workspace(shutil.copytree(tuned.path, tmp_path / "run"))
    path = run / "adapter" / name
    path.unlink(missing_ok=True)
    if content:
        path.write_text(content)
    else:
        (tmp_path / "secret").write_text('{"temperature": 1}')
        path.symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=f"refused: {said}"):
        export_adapter(run, tmp_path / "adapter.zip")
    assert not (tmp_path / "adapter.zip").exists()


def test_a_disk_that_takes_no_more_is_named_and_nothing_half_stays(tuned, classifier, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes of each file
    try:
        with pytest.raises(WorkspaceError, match=r"adapter.zip cannot .* \(.*File too large"):
            export_adapter(tuned, tmp_path / "adapter.zip")
        with pytest.raises(WorkspaceError, match=r"merged cannot be written \(.*File too large"):
            merge_adapter(classifier, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("merged*")) and not (tmp_path / "adapter.zip").exists()
